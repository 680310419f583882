"""How often intervals of cross-validated accuracies hold the truth; how wide they are.

    python tests/benchmarks/folds.py DATA [DATA ...] --images 120 --draws 100

In each draw, some images of DATA are cross-validated in 5 folds, with linear heads on
features of the default base. The truth is the accuracy, on all other images, of a head
that learned from all of the draw. Compared are `crossvalidation.estimate` with and
without the interval of the number of images, for different weights of it, and that
interval alone.
"""

import argparse

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from keras_transfer.config import load_config
from keras_transfer.evaluation import crossvalidation
from keras_transfer.evaluation.crossvalidation import FOLDS, estimate
from keras_transfer.evaluation.intervals import as_interval, wilson
from keras_transfer.features.base import frozen_base
from keras_transfer.features.frozen_part import Storage, frozen_features
from keras_transfer.workflows.inputs import prepare

DIRECTIONS = 48  # of the features, so that thousands of heads take minutes
PRIORS = (4, 8, 16)


def features_of(data: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the main directions of the features of all images, and the targets."""
    inputs = prepare(load_config(None, {"data": data}), makes_run=False)
    part = frozen_base(inputs.config)
    found = frozen_features(part, inputs.splits, 0, Storage())
    splits = inputs.splits.keep(found.extraction.digests)
    table = splits.train.joined(splits.val).joined(splits.test)
    x = found.rows(table.sources)[:]
    x = x - x.mean(0)
    some = np.random.default_rng(0).permutation(len(x))[:1000]
    directions = np.linalg.svd(x[some], full_matrices=False)[2][:DIRECTIONS]
    reduced = x @ directions.T
    return reduced / reduced.std(), table.targets


def measured(
    x: np.ndarray, y: np.ndarray, images: int, seed: int
) -> dict[str, tuple[bool, float]]:
    """Whether each way's interval holds the truth of a draw, and its width."""
    order = np.random.default_rng(seed).permutation(len(x))
    drawn, others = order[:images], order[images:]

    def head(rows: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=1.0, max_iter=200).fit(x[rows], y[rows])

    truth = head(drawn).score(x[others], y[others])
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    values = [
        head(drawn[learned]).score(x[drawn[held]], y[drawn[held]])
        for learned, held in folds.split(x[drawn], y[drawn])
    ]
    of_images = as_interval(wilson(np.mean(values), images))
    intervals = {"number of images": of_images}
    found = estimate(values, 1 / FOLDS)
    intervals["folds"] = found.low, found.high
    usual = crossvalidation.PRIOR
    for crossvalidation.PRIOR in PRIORS:
        found = estimate(values, 1 / FOLDS, of_images=of_images)
        intervals[f"both, weight {crossvalidation.PRIOR}"] = found.low, found.high
    crossvalidation.PRIOR = usual
    return {
        name: (low <= truth <= high, high - low)
        for name, (low, high) in intervals.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--draws", type=int, default=100)
    given = parser.parse_args()
    for data in given.data:
        x, y = features_of(data)
        rows = [measured(x, y, given.images, seed) for seed in range(given.draws)]
        print(f"\n{data}: {given.images:,} of {len(x):,} images, {given.draws} draws")
        for name in rows[0]:
            held, width = np.array([row[name] for row in rows], float).T
            print(
                f"{name:18} | {held.mean():.3f} | width {width.mean():.3f}, "
                f"sd {width.std():.3f}, largest {width.max():.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
