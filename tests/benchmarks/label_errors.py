"""How many wrong labels are among the first suspects of `kt audit`.

    python tests/benchmarks/label_errors.py DATA [DATA ...] --seeds 5

For each DATA and seed, 5% of the labels are replaced by another class at random, and
all images are predicted out of fold, with cached features. Printed are means over the
seeds: the fraction of the replaced labels that is found among as many first suspects
as labels were replaced, by cleanlab's own ranking of all images (`ranking`, for each of
its scores) and by the audit (`audit`). Where the audit has fewer suspects than labels
were replaced, `as many as suspects` is what the ranking finds among as many. Besides,
the number of the audit's suspects per replaced label, and the fraction of them that was
replaced. The latter is a lower bound of the precision, because DATA have wrong labels
of their own. `as given` is the fraction of images that are suspects with the labels as
they are.
"""

import argparse
from dataclasses import replace

import numpy as np
from cleanlab.rank import get_label_quality_scores

from keras_transfer.config import load_config
from keras_transfer.features.base import frozen_base
from keras_transfer.features.frozen_part import Storage, frozen_features
from keras_transfer.findings.groups import united_groups
from keras_transfer.findings.images import AuditedImages
from keras_transfer.findings.label_errors import label_error_findings
from keras_transfer.training.out_of_fold import out_of_fold_probabilities
from keras_transfer.workflows.inputs import prepare

FLIPPED = 0.05
SCORES = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")


def images_of(data: str) -> AuditedImages:
    """Lists DATA, with copies in one group."""
    inputs = prepare(load_config(None, {"data": data}), makes_run=False)
    part = frozen_base(inputs.config)
    features = frozen_features(part, inputs.splits, 0, Storage(quality=True))
    splits = inputs.splits.keep(features.extraction.digests)
    images = AuditedImages.of(splits, features)
    copies = np.unique(images.digests, return_inverse=True)[1]
    groups = united_groups(images.table.groups, copies)
    return replace(images, table=replace(images.table, groups=tuple(groups)))


def suspects_of(images: AuditedImages, probabilities: np.ndarray) -> np.ndarray:
    """Rows of the audit's suspects, in order."""
    row_of = {source: row for row, source in enumerate(images.table.sources)}
    found = label_error_findings(images, probabilities)
    return np.array([row_of[x.path] for one in found for x in one.suspects], int)


def measured(images: AuditedImages, seed: int) -> dict[str, float]:
    """The figures of one seed."""
    rng, classes = np.random.default_rng(seed), len(images.class_names)
    count = round(FLIPPED * len(images))
    flipped = rng.permutation(len(images))[:count]
    targets = images.table.targets.copy()
    targets[flipped] += rng.integers(1, classes, count)
    targets %= classes
    table = replace(images.table, targets=targets)
    said = out_of_fold_probabilities(table, images.features[:], classes, seed)
    is_flipped = np.isin(np.arange(len(images)), flipped)
    found = {}
    suspects = suspects_of(replace(images, table=table), said)
    for score in SCORES:
        order = np.argsort(get_label_quality_scores(targets, said, method=score))
        found[f"ranking by {score}"] = is_flipped[order[:count]].mean()
        as_many = order[: min(count, len(suspects))]
        found[f"as many as suspects by {score}"] = is_flipped[as_many].sum() / count
    found["audit"] = is_flipped[suspects[:count]].sum() / count
    found["suspects"] = len(suspects) / count
    found["replaced"] = is_flipped[suspects].mean()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    for data in arguments.data:
        images = images_of(data)
        classes = len(images.class_names)
        said = out_of_fold_probabilities(images.table, images.features[:], classes, 0)
        as_given = len(suspects_of(images, said)) / len(images)
        rows = [measured(images, seed) for seed in range(arguments.seeds)]
        print(f"\n{data}: {len(images):,} images, as given {as_given:.3f}")
        for name in rows[0]:
            values = [row[name] for row in rows]
            print(f"{name} | {np.mean(values):.3f} (sd {np.std(values):.3f})")


if __name__ == "__main__":
    main()
