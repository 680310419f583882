"""Which score tells images that are far from the training images, and how often.

    python tests/benchmarks/far.py FEATURES [FEATURES ...] --seeds 10

FEATURES are .npz files of one base with `x` float32 `[N, D]`, `y` int64 `[N]`: the
first three are trained on, all others are foreign to them, as they are to each other.

For each size each class is left out of the drawn training images in turn. The area
under the ROC curve (AUROC) is that of its images (`left out`), or of images of other
files (`foreign`, the mean over files), against held-out images of the known classes.
After that, with all classes and several draws: the fraction of held-out images that the
package's own threshold calls far, and of foreign images.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from scipy.spatial.distance import cdist
from sklearn.covariance import ledoit_wolf
from sklearn.metrics import roc_auc_score

from keras_transfer.evaluation.out_of_distribution import OutOfDistribution

SIZES = (10, 30, 100, 300, 1_000)
FOREIGN = 75  # images of each other file
HELD_OUT = 300

Data = tuple[np.ndarray, np.ndarray]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


NORMALIZE = {
    "raw": lambda x: x,
    "L2": unit,
    "power": lambda x: unit(np.sign(x) * np.sqrt(np.abs(x))),
}


def mahalanobis(train: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Distances to the nearest class mean; shared covariance by Ledoit and Wolf."""
    classes, index = np.unique(y, return_inverse=True)
    means = np.stack([train[y == c].mean(0) for c in classes])
    covariance, _ = ledoit_wolf(train - means[index], assume_centered=True)
    factor = cholesky(covariance, lower=True)
    rows, centers = (solve_triangular(factor, x.T, lower=True).T for x in (new, means))
    return cdist(rows, centers).min(1)


def scores(train: np.ndarray, y: np.ndarray, new: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of new images by method; larger is farther."""
    found = {}
    for name, normalize in NORMALIZE.items():
        a, b = normalize(train), normalize(new)
        nearest = np.sort(cdist(b, a), 1)
        for k in (1, 5, 10):
            found[f"kNN, {name}, k={k}"] = nearest[:, min(k, len(a)) - 1]
        found[f"Mahalanobis per class, {name}"] = mahalanobis(a, y, b)
        found[f"Mahalanobis, {name}"] = mahalanobis(a, np.zeros(len(a), int), b)
    return found


def areas(data: list[Data], which: int, n: int, seed: int) -> dict[str, list[float]]:
    """(AUROC of the class left out, mean AUROC of foreign images) by method."""
    x, y = data[which]
    rng = np.random.default_rng(seed)
    classes = np.unique(y)
    out = classes[seed]
    known = rng.permutation(np.flatnonzero(y != out))
    if n + 100 > len(known):
        return {}
    held = known[n : n + HELD_OUT]
    sets = [x[held], x[rng.permutation(np.flatnonzero(y == out))[:HELD_OUT]]]
    sets += [
        other[rng.permutation(len(other))[:FOREIGN]]
        for i, (other, _) in enumerate(data)
        if i != which
    ]
    ends = np.cumsum([len(one) for one in sets])[:-1]
    found = {}
    for name, values in scores(
        x[known[:n]], y[known[:n]], np.concatenate(sets)
    ).items():
        inside, *others = np.split(values, ends)
        auc = [
            roc_auc_score(
                np.repeat([0, 1], [len(inside), len(one)]),
                np.concatenate([inside, one]),
            )
            for one in others
        ]
        found[name] = [auc[0], float(np.mean(auc[1:]))]
    return found


def rates(data: list[Data], which: int, n: int, seed: int) -> list[float]:
    """(fraction of held-out images called far, that of foreign images)."""
    x, y = data[which]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    if n + 100 > len(x):
        return []
    detector = OutOfDistribution.fit(x[order[:n]], y[order[:n]], seed=seed)
    foreign = [
        other[rng.permutation(len(other))[:FOREIGN]]
        for i, (other, _) in enumerate(data)
        if i != which
    ]
    far = [float(detector.is_far(one).mean()) for one in foreign]
    held = x[order[n : n + HELD_OUT]]
    return [float(detector.is_far(held).mean()), float(np.mean(far))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("features", nargs="+", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    data = []
    for path in arguments.features:
        with np.load(path) as arrays:
            data.append((arrays["x"], arrays["y"]))
    trained = range(min(3, len(data)))
    sizes = SIZES[1:]
    table: dict[tuple[str, int], list[list[float]]] = defaultdict(list)
    for n in sizes:
        for which in trained:
            for seed in range(len(np.unique(data[which][1]))):
                for name, pair in areas(data, which, n, seed).items():
                    table[name, n].append(pair)
    for column, kind in enumerate(("left out", "foreign")):
        print(f"\nAUROC, {kind} | " + " | ".join(map(str, sizes)) + " | mean")
        for name in dict.fromkeys(name for name, _ in table):
            row = [np.mean(table[name, n], 0)[column] for n in sizes]
            print(name, *(f"{value:.3f}" for value in [*row, np.mean(row)]), sep=" | ")
    print("\nimages | known called far, mean (sd, largest) | foreign called far")
    for n in SIZES:
        found = [
            pair
            for which in trained
            for seed in range(arguments.seeds)
            if (pair := rates(data, which, n, seed))
        ]
        known, foreign = np.array(found).T
        print(
            f"{n} | {known.mean():.3f} ({known.std():.3f}, {known.max():.3f}) | "
            f"{foreign.mean():.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
