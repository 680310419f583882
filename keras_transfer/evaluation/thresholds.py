"""Chooses thresholds on probabilities: of sure predictions, and of predicted classes.

All are chosen on out-of-fold predictions: each image was predicted by a head that was
not trained on it.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import scipy.special
from pydantic import BaseModel, ConfigDict

from keras_transfer.errors import UsageError
from keras_transfer.evaluation.decisions import DEFAULT_THRESHOLD
from keras_transfer.evaluation.intervals import Groups, as_interval, wilson
from keras_transfer.runs.manifest import Abstention, CoveragePoint

LEVEL = 0.05
"""Probability, at most, that the accuracy of sure predictions is below the target."""

LEAST_POSITIVES = 5
"""A class of multi-label data with fewer images out of fold keeps the threshold 0.5."""

_PRIOR_POSITIVES = 5  # the weight of that default, in images
_CURVE_POINTS = 20
_STEPS = 50  # number of thresholds tried
_SMALLEST = 1e-6  # a threshold's distance from 0 and 1, at least


class SureEvaluation(BaseModel):
    """Coverage and accuracy of sure predictions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: int
    """Number of images whose prediction is sure."""
    coverage: float
    """Share of all images, from 0 to 1."""
    coverage_interval: tuple[float, float]
    """The share's 95% interval (Wilson)."""
    accuracy: float | None
    """Share of the sure predictions that is correct, from 0 to 1; None without any."""
    accuracy_interval: tuple[float, float] | None
    """That share's 95% interval (Wilson); None without any."""


def accuracy_coverage(
    probabilities: np.ndarray, targets: np.ndarray, points: int = _CURVE_POINTS
) -> tuple[CoveragePoint, ...]:
    """Computes the accuracy-coverage curve of single-label predictions.

    A point says how accurate those predictions are whose largest probability reaches
    the threshold. Predictions of the same largest probability stay together. Source:
    Geifman & El-Yaniv 2017, "Selective Classification for Deep Neural Networks".

    Args:
        probabilities: float32 `[N, num_classes]` in the range 0 to 1.
        targets: int64 `[N]` class indices.
        points: Maximum number of points, evenly spaced in coverage.

    Returns:
        The points, from the smallest coverage to 1.
    """
    confidence, is_right = _by_confidence(probabilities, targets)
    count = len(is_right)
    right = np.cumsum(is_right)
    ends = np.flatnonzero(np.append(confidence[1:] < confidence[:-1], True)) + 1
    wanted = np.arange(1, points + 1) * count / points
    chosen = np.unique(ends[np.searchsorted(ends, np.ceil(wanted))]) if count else ends
    return tuple(
        CoveragePoint(
            threshold=float(confidence[end - 1]),
            coverage=float(end / count),
            accuracy=float(right[end - 1] / end),
            images=int(end),
        )
        for end in (chosen if count else ())
    )


def images_needed(accuracy: float, mistakes: int = 0) -> int:
    """Returns how many predictions show an accuracy with a 95% bound.

    Args:
        accuracy: The accuracy to be shown, in (0, 1).
        mistakes: Number of wrong ones among them.

    Returns:
        The smallest n for which the Clopper-Pearson lower bound of n - mistakes of n
        reaches `accuracy`; without mistakes the smallest n with `accuracy`^n <= 0.05,
        such as 59 for 0.95 and 299 for 0.99.
    """
    low, high = mistakes, mistakes + 1
    while not _shown(high, mistakes, accuracy):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if _shown(middle, mistakes, accuracy):
            high = middle
        else:
            low = middle
    return high


def check_reachable(
    accuracy: float, targets: np.ndarray, groups: Sequence[str] = ()
) -> None:
    """Rejects a target that cannot be shown even if no prediction is wrong.

    Args:
        accuracy: Target for the accuracy of sure predictions, in (0, 1).
        targets: Targets `[N]` or `[N, num_classes]` of the training images.
        groups: Group of each image; "" for none. Empty if there are no groups.

    Raises:
        UsageError: If there are too few images or groups, or the data are multi-label.
    """
    if targets.ndim == 2:
        raise UsageError(
            "Multi-label data have no largest probability to be sure of. Received: "
            f"abstain_at_accuracy={accuracy:g}. Leave it out: each class has a "
            "threshold of its own."
        )
    needed, images = images_needed(accuracy), independent_images(groups, len(targets))
    if images < needed:
        raise UsageError(
            f"To promise an accuracy of {accuracy:g} takes at least {needed:,} images, "
            f"all predicted correctly. Received: abstain_at_accuracy={accuracy:g} and "
            f"{images:,} images (grouped images count once per group). Use more images "
            "or a lower accuracy."
        )


def independent_images(groups: Sequence[str], count: int) -> int:
    """Counts groups; an image without one (the empty string) is one of its own."""
    numbered = Groups.of(groups)
    return count if numbered is None else len(numbered)


def abstention_threshold(
    probabilities: np.ndarray,
    targets: np.ndarray,
    accuracy: float,
    groups: Sequence[str] = (),
    seed: int = 0,
) -> Abstention:
    """Finds from which largest probability on predictions are accurate enough.

    The widest coverage is sought at which the accuracy of sure predictions, in the
    population that the images were drawn from, is at least `accuracy`; the result
    breaks this promise for at most 5% of all samples of images. Coverages are tried
    in an order that does not depend on what is right, from the strictest to the widest,
    and the first that fails ends the search, so that each may use the whole 5%
    (fixed sequence testing). Given the largest probability that is not covered, the
    k covered predictions are an independent sample, so that the number of mistakes is
    binomial:

        reject "accuracy(k) < target" if P(Binomial(k, 1 - target) <= mistakes) <= 0.05

    which is that the one-sided Clopper-Pearson bound reaches the target. Of grouped
    images (several of one patient) one per group counts, drawn at random, for the
    others are not independent; the promise is then for an image of a new group.

    Source: Angelopoulos et al. 2025, "Learn then Test", Annals of Applied Statistics
    19 (arXiv:2110.01052).

    Args:
        probabilities: float32 `[N, num_classes]` out-of-fold probabilities.
        targets: int64 `[N]` class indices.
        accuracy: Target for the accuracy of sure predictions, in (0, 1).
        groups: Group of each image; "" for none. Empty if there are no groups.
        seed: Seed of the draw of one image per group.

    Returns:
        The threshold, with the coverage and accuracy of all the images.

    Raises:
        UsageError: If the data are multi-label, or the accuracy cannot be reached.
    """
    check_reachable(accuracy, targets, groups)
    rows = _one_per_group(groups, len(targets), seed)
    confidence, is_right = _by_confidence(probabilities[rows], targets[rows])
    covered = _widest(confidence, is_right, accuracy)
    threshold = 0.0
    if covered < len(rows):
        threshold = _between(confidence[covered], confidence[covered - 1])
    confidence, is_right = _by_confidence(probabilities, targets)
    is_sure = confidence >= np.float32(threshold)
    return Abstention(
        target=accuracy,
        threshold=threshold,
        coverage=float(is_sure.mean()),
        accuracy=float(is_right[is_sure].mean()),
        images=len(targets),
        independent=len(rows),
    )


def evaluate_sure(
    probabilities: np.ndarray,
    targets: np.ndarray,
    threshold: float,
    groups: Sequence[str] = (),
) -> SureEvaluation:
    """Computes the coverage and accuracy of sure predictions on labeled images.

    Args:
        probabilities: float32 `[N, num_classes]` in the range 0 to 1.
        targets: int64 `[N]` class indices.
        threshold: Smallest largest probability of a sure prediction.
        groups: Group of each image; "" for none. Empty if there are no groups.
            Intervals are then as wide as if the images of a group were all alike.
    """
    is_sure = probabilities.max(1) >= np.float32(threshold)
    is_right = probabilities.argmax(1) == targets
    sure_groups = [group for group, sure in zip(groups, is_sure, strict=False) if sure]
    sure, right = int(is_sure.sum()), int((is_sure & is_right).sum())
    return SureEvaluation(
        images=sure,
        coverage=sure / len(targets),
        coverage_interval=_share_interval(sure, len(targets), groups),
        accuracy=right / sure if sure else None,
        accuracy_interval=_share_interval(right, sure, sure_groups) if sure else None,
    )


def class_thresholds(
    probabilities: np.ndarray, targets: np.ndarray, class_names: Sequence[str]
) -> dict[str, float]:
    """Chooses a threshold per class of multi-label data.

    Of the thresholds midway between neighboring probabilities, the one with the best
    F1 is chosen (the one nearest to 0.5 if several are). It is drawn toward 0.5, on
    the scale of logits, as if 5 more images had asked for 0.5:

        logit(threshold) = positives / (positives + 5) * logit(best)

    because the best of a few is partly luck. A class with fewer than 5 images, or that
    all images show, keeps 0.5.

    Args:
        probabilities: float32 `[N, num_classes]` out-of-fold probabilities.
        targets: uint8 `[N, num_classes]` with 1 where the class is present.
        class_names: Class names in the order of the columns.

    Returns:
        Thresholds in (0, 1) by class name, from which on a class is predicted.
    """
    return {
        name: _best_f1(probabilities[:, column], targets[:, column] > 0)
        for column, name in enumerate(class_names)
    }


def _best_f1(scores: np.ndarray, is_positive: np.ndarray) -> float:
    positives = int(is_positive.sum())
    if positives < LEAST_POSITIVES or positives == len(scores):
        return DEFAULT_THRESHOLD
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order].astype(np.float64)
    found = np.cumsum(is_positive[order])
    f1 = 2 * found / (np.arange(1, len(scores) + 1) + positives)
    below = np.append(ordered[1:], 0.0)
    ends = np.flatnonzero(np.append(below[:-1] < ordered[:-1], True))
    middles, f1 = ((ordered + below) / 2)[ends], f1[ends]
    best = middles[f1 >= f1.max() - 1e-12]
    chosen = np.clip(
        best[np.abs(best - DEFAULT_THRESHOLD).argmin()], _SMALLEST, 1 - _SMALLEST
    )
    weight = positives / (positives + _PRIOR_POSITIVES)
    logit = weight * np.log(chosen / (1 - chosen))
    return float(np.float32(1 / (1 + np.exp(-logit))))


def _by_confidence(
    probabilities: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sorts predictions by decreasing largest probability.

    Returns:
        (float32 `[N]` largest probabilities, bool `[N]` whether they are right).
    """
    confidence = probabilities.max(1)
    order = np.argsort(-confidence, kind="stable")
    return confidence[order], (probabilities.argmax(1) == targets)[order]


def _one_per_group(groups: Sequence[str], count: int, seed: int) -> np.ndarray:
    """Draws one image of each group; returns sorted indices."""
    numbered = Groups.of(groups)
    if numbered is None:
        return np.arange(count)
    order = np.random.default_rng(seed).permutation(count)
    _, first = np.unique(numbered.index[order], return_index=True)
    return np.sort(order[first])


def _widest(confidence: np.ndarray, is_right: np.ndarray, accuracy: float) -> int:
    """Returns the largest number of covered predictions that show the accuracy.

    Raises:
        UsageError: If the first does not.
    """
    mistakes = np.cumsum(~is_right)
    covered = 0
    for end in _sequence(confidence, accuracy):
        wrong = int(mistakes[end - 1])
        if not _shown(end, wrong, accuracy):
            break
        covered = end
    if not covered:
        raise _not_reached(accuracy, len(confidence), end, wrong)
    return covered


def _sequence(confidence: np.ndarray, accuracy: float) -> Iterator[int]:
    """Yields the numbers of covered predictions to try, in increasing order.

    The first is a quarter of the images, but at least as many as may contain one
    mistake, or if there are not twice that many images, as must not contain any.

    Args:
        confidence: float32 `[N]` largest probabilities in decreasing order. Equal ones
            are covered together.
        accuracy: Target for the accuracy.
    """
    count = len(confidence)
    with_one = images_needed(accuracy, mistakes=1)
    fewest = with_one if 2 * with_one <= count else images_needed(accuracy)
    first = max(fewest, -(-count // 4))
    last = 0
    for least in (*range(first, count, max(1, count // _STEPS)), count):
        end = int(np.searchsorted(-confidence, -confidence[least - 1], side="right"))
        if end > last:
            yield end
        last = end


def _shown(count: int, mistakes: int, accuracy: float) -> bool:
    """Returns whether `mistakes` of `count` show the accuracy with a 95% bound."""
    return bool(scipy.special.bdtr(mistakes, count, 1 - accuracy) <= LEVEL)


def _share_interval(
    part: int, count: int, groups: Sequence[str]
) -> tuple[float, float]:
    """Computes Wilson's 95% interval of a share; `count` is at least 1."""
    return as_interval(wilson(part / count, independent_images(groups, count)))


def _between(low: np.float32, high: np.float32) -> float:
    """Returns a float32 number above `low` and at most `high`, midway if possible."""
    middle = np.float32((np.float64(low) + np.float64(high)) / 2)
    return float(middle if middle > low else high)


def _not_reached(accuracy: float, count: int, end: int, wrong: int) -> UsageError:
    """Says that `wrong` of the `end` surest of `count` predictions are too many."""
    return UsageError(
        f"An accuracy of {accuracy:g} cannot be promised even of the surest "
        f"predictions, which takes {images_needed(accuracy):,} without a mistake or "
        f"{images_needed(accuracy, wrong):,} with {wrong:,}. Received: "
        f"abstain_at_accuracy={accuracy:g} and {count:,} independent images, of whose "
        f"{end:,} surest {wrong:,} are wrong. Use more images or a lower accuracy."
    )
