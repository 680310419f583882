"""Test accuracy by how the L2 strength is chosen: on a held-out tenth, or by folds.

    python tests/benchmarks/selection.py FEATURES [FEATURES ...] --seeds 20

FEATURES are files of tests/benchmarks/features.py. Images are drawn, stratified by
class as far as they go; the others, at most 2,000, are the test images. `held out`
trains on nine tenths of the drawn images with the strength that has the lowest loss on
the last tenth, as kt fit did before November 2026. `K folds` is `train_head` with K
folds, which chooses by the loss, or `by accuracy`. Differences are paired by seed; the
interval is that of their mean (t).
"""

import argparse
from pathlib import Path

import numpy as np
import scipy.special
import scipy.stats

from keras_transfer.advice.probe import deal
from keras_transfer.config import HeadConfig
from keras_transfer.data.tables import Table
from keras_transfer.errors import UsageError
from keras_transfer.evaluation.crossvalidation import fold_numbers
from keras_transfer.training.head import LINEAR_L2, predict_head, train_head
from keras_transfer.training.labelled import LabelledFeatures, Weighting
from keras_transfer.training.linear import linear_candidates

SIZES = (30, 100, 300, 1_000)
FOLDS = (5, 10)
PATIENCE = 3  # weaker strengths that were tried after the best one
MOST_TESTED = 2_000


def labelled(x: np.ndarray, y: np.ndarray, classes: int) -> LabelledFeatures:
    return LabelledFeatures([x], y, Weighting.equal(classes))


def held_out(x: np.ndarray, y: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """Kernel and bias `[D + 1, C]`, chosen on a held-out tenth."""
    order = deal(y, seed)
    few = max(round(len(y) / 10), 1)
    val, train = order[:few], order[few:]
    solve = linear_candidates(HeadConfig(), labelled(x[train], y[train], classes), None)
    best, best_loss, since = np.zeros(()), np.inf, 0
    for l2 in sorted(LINEAR_L2, reverse=True):
        (candidate,) = solve(l2)
        kernel, bias = candidate.weights
        logits = x[val] @ kernel + bias
        right = logits[np.arange(few), y[val]]
        loss = float((scipy.special.logsumexp(logits, 1) - right).mean())
        since += 1
        if loss < best_loss:
            best, best_loss, since = np.vstack([kernel, bias]), loss, 0
        if since == PATIENCE:
            break
    return best


def accuracies(x: np.ndarray, y: np.ndarray, n: int, seed: int) -> dict[str, float]:
    """Test accuracy by way of choosing."""
    order = deal(y, seed)
    drawn, test = np.sort(order[:n]), order[n : n + MOST_TESTED]
    classes = int(y.max()) + 1
    train_x, train_y, test_x, test_y = x[drawn], y[drawn], x[test], y[test]
    weights = held_out(train_x, train_y, classes, seed)
    said = (test_x @ weights[:-1] + weights[-1]).argmax(1)
    found = {"held out": float((said == test_y).mean())}
    names = tuple(map(str, drawn))
    table = Table(names, train_y, ("",) * n)
    for folds in FOLDS:
        try:
            numbers = fold_numbers(table, classes, folds, seed)
        except UsageError:
            continue
        data = labelled(train_x, train_y, classes)
        head = train_head(HeadConfig(), data, numbers, seed)
        said = predict_head(head.model, test_x).argmax(1)
        found[f"{folds} folds"] = float((said == test_y).mean())
    data = labelled(train_x, train_y, classes)
    numbers = fold_numbers(table, classes, FOLDS[0], seed)
    head = train_head(HeadConfig(), data, numbers, seed, metric="accuracy")
    said = predict_head(head.model, test_x).argmax(1)
    found[f"{FOLDS[0]} folds, by accuracy"] = float((said == test_y).mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("features", nargs="+", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--images", type=int, nargs="+", default=SIZES)
    arguments = parser.parse_args()
    print("data, images: mean accuracy held out; by folds (gain, 95% interval)")
    for path in arguments.features:
        with np.load(path) as file:
            x, y = file["x"], np.unique(file["y"], return_inverse=True)[1]
        for n in arguments.images:
            if n > 0.95 * len(y):
                continue
            rows = [accuracies(x, y, n, seed) for seed in range(arguments.seeds)]
            before = np.array([row["held out"] for row in rows])
            text = f"{path.stem}, {n}: {before.mean():.4f}"
            for way in [name for name in rows[0] if name != "held out"]:
                gains = np.array([row[way] for row in rows]) - before
                half = scipy.stats.sem(gains) * scipy.stats.t.ppf(0.975, len(gains) - 1)
                text += f"; {way} {before.mean() + gains.mean():.4f}"
                text += f" ({gains.mean():+.4f} +- {half:.4f})"
            print(text, flush=True)


if __name__ == "__main__":
    main()
