"""What averaging over an image and its mirror image gains, and how to average.

    python tests/benchmarks/flip.py FOLDER ... --seeds 5 [--base BASE]

For each data set and seed, the training images (test images are left out) are divided
into 5 folds; a linear head is trained as in `kt fit` on the features of four of them,
and predicts the fifth, plain and mirrored. Printed are the means over seeds of the
accuracy and the log loss of the plain predictions, and what averaging probabilities or
logits changes, with the standard deviation of the change over seeds.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from keras_transfer.config import load_config
from keras_transfer.data.tables import Splits
from keras_transfer.evaluation.crossvalidation import head_folds
from keras_transfer.evaluation.metrics import score
from keras_transfer.events import SILENT
from keras_transfer.features.base import frozen_base
from keras_transfer.features.frozen_part import (
    FrozenFeatures,
    Storage,
    Views,
    frozen_features,
)
from keras_transfer.features.usable import usable_splits
from keras_transfer.training.head import predict_head, train_on_features
from keras_transfer.workflows.inputs import prepare

FLIPPED = Views(1, "flip", lambda: lambda pixels, digest, number: pixels[:, ::-1])


def averaged_logits(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Softmax of the mean logits, float32 `[N, C]`."""
    said = np.sqrt(first.astype(np.float64) * second)
    return (said / said.sum(1, keepdims=True)).astype(np.float32)


def figures(
    splits: Splits, features: FrozenFeatures, config: object
) -> dict[str, list[float]]:
    """(accuracy, log loss) out of fold by the way of averaging."""
    table = splits.train
    folds = head_folds(table, len(splits.class_names), 5, config.seed)
    said: dict[str, list[np.ndarray]] = {"plain": [], "probabilities": [], "logits": []}
    targets = []
    for fold in range(5):
        inside = replace(splits, train=table.select(np.flatnonzero(folds != fold)))
        held_out = table.select(np.flatnonzero(folds == fold))
        head = train_on_features(config, inside, features, SILENT).model
        plain, mirrored = (
            predict_head(head, features.rows(held_out.sources, view)) for view in (0, 1)
        )
        said["plain"].append(plain)
        said["probabilities"].append((plain + mirrored) / 2)
        said["logits"].append(averaged_logits(plain, mirrored))
        targets.append(held_out.targets)
    joined = np.concatenate(targets)
    return {
        name: [
            score("accuracy", joined, np.concatenate(parts)),
            -score("log_loss", joined, np.concatenate(parts)),
        ]
        for name, parts in said.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--base", default="efficientnet_lite0")
    arguments = parser.parse_args()
    print("data | images | plain | probabilities | logits (accuracy; log loss)")
    for folder in arguments.folders:
        found: dict[str, list[list[float]]] = {}
        for seed in range(arguments.seeds):
            given = {"data": folder, "base": arguments.base, "seed": seed}
            inputs = prepare(load_config(None, given), makes_run=False)
            config, storage = inputs.config, Storage("f32")
            part = frozen_base(config)
            features = frozen_features(part, inputs.splits, FLIPPED, storage)
            usable = usable_splits(config, inputs.splits, features.extraction)
            for name, pair in figures(usable, features, config).items():
                found.setdefault(name, []).append(pair)
        plain = np.array(found.pop("plain"))
        cells = ["{:.4f}; {:.4f}".format(*plain.mean(0))]
        for pairs in found.values():
            change = np.array(pairs) - plain
            mean, spread = change.mean(0), change.std(0, ddof=1)
            cells.append(
                f"{100 * mean[0]:+.2f} +- {100 * spread[0]:.2f} points; "
                f"{mean[1]:+.4f} +- {spread[1]:.4f}"
            )
        name = Path(folder).name
        print(" | ".join([name, f"{len(usable.train):,}", *cells]), flush=True)


if __name__ == "__main__":
    main()
