"""What a head gains by reading several stages of its base, and choosing which.

    python tests/benchmarks/stages.py DATA [DATA ...] [--seeds 10] [--most 1200]

For each DATA (all of whose images are used, whatever splits it names) and each seed, a
stratified 70% of the images, or as many as `--most`, train heads on the features of
efficientnet_lite0: on the last stage, on several stages, and on what `auto` chooses out
of fold. Printed are accuracy and log loss of the last stage on the other images, and
the mean differences of the others from it with their 95% intervals over seeds.
"""

import argparse
import math
from dataclasses import replace

import numpy as np
import scipy.stats

from keras_transfer.config import Config, load_config
from keras_transfer.data.tables import Splits, Table
from keras_transfer.evaluation.metrics import score
from keras_transfer.events import SILENT
from keras_transfer.features.base import frozen_base
from keras_transfer.features.frozen_part import FrozenFeatures, frozen_features
from keras_transfer.features.usable import usable_splits
from keras_transfer.training.head import predict_images, train_on_features
from keras_transfer.workflows.inputs import prepare

TRAINED = 0.7


def divide(table: Table, seed: int, most: int) -> tuple[Table, Table]:
    """Training and test images, stratified by class."""
    rng = np.random.default_rng(seed)
    shuffled = rng.random(len(table))
    place = np.empty(len(table))
    for index in np.unique(table.targets):
        members = np.flatnonzero(table.targets == index)
        place[members[np.argsort(shuffled[members])]] = np.arange(len(members)) / len(
            members
        )
    learned = rng.permutation(np.flatnonzero(place < TRAINED))[:most]
    return table.select(np.sort(learned)), table.select(
        np.flatnonzero(place >= TRAINED)
    )


def figures(
    config: Config, splits: Splits, features: FrozenFeatures
) -> tuple[float, float, str]:
    """Accuracy and log loss on test images, and what the head reads."""
    head = train_on_features(config, splits, features, SILENT)
    said = predict_images(head, features, splits.test.sources)
    targets = splits.test.targets
    kind = "stages" if head.stages else "last"
    return score("accuracy", targets, said), -score("log_loss", targets, said), kind


def measure(data: str, seeds: int, most: int) -> None:
    inputs = prepare(load_config(None, {"data": data}), makes_run=False)
    config, splits = inputs.config, inputs.splits
    features = frozen_features(frozen_base(config), splits, 0)
    splits = usable_splits(config, splits, features.extraction)
    everything = splits.train.joined(splits.val).joined(splits.test)
    kinds = ("last", "stages", "auto")
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    chosen = 0
    for seed in range(seeds):
        train, test = divide(everything, seed, most)
        divided = replace(splits, train=train, val=train.keep(()), test=test)
        for kind in kinds:
            asked = config.model_copy(update={"features": kind, "seed": seed})
            *pair, reads = figures(asked, divided, features)
            found[kind].append((pair[0], pair[1]))
            chosen += kind == "auto" and reads == "stages"
    base = np.array(found["last"])
    print(
        f"{data}: {len(train):,} images; last: accuracy {base[:, 0].mean():.4f}, "
        f"log loss {base[:, 1].mean():.4f}; auto chose stages {chosen} of {seeds} times"
    )
    for kind in kinds[1:]:
        more = np.array(found[kind]) - base
        half = more.std(0, ddof=1) / math.sqrt(seeds)
        half *= scipy.stats.t.ppf(0.975, seeds - 1)
        print(
            f"  {kind}: accuracy {more[:, 0].mean():+.4f} +- {half[0]:.4f}, "
            f"log loss {more[:, 1].mean():+.4f} +- {half[1]:.4f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--most", type=int, default=1200)
    asked = parser.parse_args()
    for data in asked.data:
        measure(data, asked.seeds, asked.most)


if __name__ == "__main__":
    main()
