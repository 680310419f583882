"""Whether thresholds found out of fold keep their promises on new images.

    python tests/benchmarks/thresholds.py [FEATURES.npz ...]

A file holds `x` float32 `[N, D]` and `y` int64 `[N]`; without any, the pixels of
scikit-learn's digits are the features. Of each, images are drawn (200 and 600), heads
are trained in 5 folds and on all of them, and the unused images say what is true:

- sure: for accuracies of 0.9 and 0.95, how often a threshold was found, how often the
  accuracy of sure predictions was below the target (at most 5% of the draws are
  promised), and the mean coverage, with 0 where nothing was found;
- classes: the mean F1 of one-against-rest heads with their thresholds, beside 0.5.
"""

import sys
import warnings
from collections import defaultdict

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import KFold

from keras_transfer.errors import UsageError
from keras_transfer.evaluation.thresholds import abstention_threshold, class_thresholds

DRAWS = 50
STRENGTHS = (1e-3, 1e-2, 1e-1)  # L2 of the mean loss, as in `kt fit`
DIMENSIONS = 128


def fitted(x: np.ndarray, y: np.ndarray, new: np.ndarray, l2: float) -> np.ndarray:
    """float32 `[N, num_classes]` of new images by a head trained on others."""
    mean, scale = x.mean(0), x.std()
    head = LogisticRegression(C=1 / (l2 * len(y)), max_iter=200, tol=1e-3)
    head.fit((x - mean) / scale, y)
    probabilities = np.zeros((len(new), int(y.max()) + 1), np.float32)
    probabilities[:, head.classes_] = head.predict_proba((new - mean) / scale)
    return probabilities


def predicted(
    x: np.ndarray, y: np.ndarray, new: np.ndarray, strengths: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Out-of-fold probabilities of the images, and those of new ones."""
    best, chosen = np.inf, (np.empty(0), 0.0)
    for l2 in strengths:
        out_of_fold = np.zeros((len(y), int(y.max()) + 1), np.float32)
        for train, rest in KFold(5, shuffle=True, random_state=0).split(x):
            found = fitted(x[train], y[train], x[rest], l2)
            out_of_fold[rest, : found.shape[1]] = found
        loss = -np.log(np.maximum(out_of_fold[np.arange(len(y)), y], 1e-7)).mean()
        if loss < best:
            best, chosen = loss, (out_of_fold, l2)
    return chosen[0], fitted(x, y, new, chosen[1])


def measure(name: str, x: np.ndarray, y: np.ndarray, images: int) -> None:
    """Prints a line for each target and one for the thresholds of the classes."""
    coverage, accuracy, gains = defaultdict(list), defaultdict(list), []
    for seed in range(DRAWS):
        order = np.random.default_rng(seed).permutation(len(y))
        drawn, unused = order[:images], order[images:]
        known, new = predicted(x[drawn], y[drawn], x[unused], STRENGTHS)
        is_right = new.argmax(1) == y[unused]
        for target in (0.9, 0.95):
            try:
                found = abstention_threshold(known, y[drawn], target)
            except UsageError:
                coverage[target].append(0.0)
                continue
            sure = new.max(1) >= np.float32(found.threshold)
            coverage[target].append(sure.mean())
            accuracy[target].append(is_right[sure].mean() if sure.any() else 1.0)
        is_first = (y == y[drawn[0]]).astype(np.int64)
        known, new = predicted(x[drawn], is_first[drawn], x[unused], (1e-1,))
        threshold = class_thresholds(known[:, 1:], is_first[drawn, None], ["first"])
        scores = [
            f1_score(is_first[unused], new[:, 1] >= value, zero_division=0.0)
            for value in (threshold["first"], 0.5)
        ]
        gains.append(scores)
    for target, found in accuracy.items():
        broken = sum(value < target for value in found)
        print(
            f"{name}, {images} images, target {target}: found {len(found)}/{DRAWS}, "
            f"broken {broken}, coverage {np.mean(coverage[target]):.3f}, accuracy of "
            f"the sure {np.mean(found):.3f}",
            flush=True,
        )
    chosen, half = np.mean(gains, 0)
    print(f"{name}, {images} images: F1 {chosen:.3f}, with 0.5 {half:.3f}", flush=True)


def main() -> None:
    """Measures each file."""
    warnings.simplefilter("ignore")
    sets = {path: np.load(path) for path in sys.argv[1:]}
    digits = load_digits()
    data = {path: (found["x"], found["y"]) for path, found in sets.items()} or {
        "digits": (digits.data.astype(np.float32), digits.target)
    }
    for name, (x, y) in data.items():
        if x.shape[1] > DIMENSIONS:  # principal components, to be quick
            _, _, components = np.linalg.svd(x - x.mean(0), full_matrices=False)
            x = x @ components[:DIMENSIONS].T
        for images in (200, 600):
            if 2 * images <= len(y):
                measure(name, x, y, images)


if __name__ == "__main__":
    main()
