"""Cross-validation: folds, out-of-fold figures, and what choosing by them costs."""

import contextlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.stats
from sklearn.model_selection import StratifiedGroupKFold

from keras_transfer.data.tables import Table, count_classes
from keras_transfer.errors import UsageError
from keras_transfer.evaluation.intervals import (
    CONFIDENCE,
    Groups,
    Interval,
    Z,
    from_trials,
    trials_of,
)
from keras_transfer.evaluation.metrics import (
    Evaluation,
    deciding_metric,
    evaluate,
    metrics_of,
    score,
)
from keras_transfer.evaluation.names import FIELDS
from keras_transfer.runs.manifest import Estimate

FOLDS = 5
"""Number of folds by default."""

OUT_OF_FOLD = "out_of_fold"
"""Name under which figures of cross-validation stand beside those of splits."""

PRIOR = 8
"""Measurements that the number of images counts as, in `estimate`. With it, intervals
hold the truth in 0.97 to 1.00 of draws, and so they do with 4 or 16; without, in 0.95
to 1.00, and their width varies 3 to 4 times as much (`tests/benchmarks/folds.py`)."""

MOST_CROSS_VALIDATED = 20_000
"""With more training images, a held-out tenth takes the place of the folds. So it does
with many classes, if predictions of every candidate would take too much memory."""

_MOST_PREDICTIONS = 2_000_000  # images times classes, of each candidate
_BOOTSTRAP_ROUNDS = 200
_MOST_RESAMPLED = 5_000  # images; more take time and hardly change the bias


def estimate(
    values: Sequence[float],
    held_out: float,
    bounds: tuple[float, float] = (0.0, 1.0),
    of_images: Interval | None = None,
) -> Estimate:
    """Computes the mean of repeated measurements and its 95% confidence interval.

    The training sets overlap, so the measurements are not independent: the variance of
    their mean is (1 / n + held_out / (1 - held_out)) times that of a measurement.
    Source: Nadeau & Bengio 2003, "Inference for the Generalization Error", Machine
    Learning 52.

    A few measurements tell badly how much they vary. The number of images tells it too,
    as far as it is by chance which of them are in which fold, and counts as much as 8
    measurements more. Source: Smyth 2004, "Linear Models and Empirical Bayes Methods
    for Assessing Differential Expression in Microarray Experiments", Statistical
    Applications in Genetics and Molecular Biology 3 (moderated t-statistics). Intervals
    of measurements from 0 to 1 are those of `intervals.from_trials`, others symmetric.

    Args:
        values: The measurements; those beyond the bounds are taken as these.
        held_out: Fraction of the images that each measurement was made on.
        bounds: Smallest and largest possible value of a measurement.
        of_images: Interval of the same figure by `metrics.evaluate`, or a Wilson
            interval; None if there is none.
    """
    values = np.clip(values, *bounds).tolist()
    count, mean = len(values), float(np.mean(values))
    is_fraction = bounds == (0.0, 1.0)
    # Variances of measurements; those of fractions are divided by mean (1 - mean).
    unit = max(mean * (1 - mean), 1e-12) if is_fraction else 1.0
    freedom, variance = count - 1, float(np.var(values)) * count / max(count - 1, 1)
    variance /= unit
    if of_images is not None:
        low, high = of_images
        usual = ((high - low) / (2 * Z)) ** 2
        if is_fraction:
            usual = 1 / trials_of(of_images)
        usual /= held_out  # a measurement has only some of the images
        variance = (freedom * variance + PRIOR * usual) / (freedom + PRIOR)
        freedom += PRIOR
    variance *= 1 / count + held_out / (1 - held_out)
    low = high = mean
    if variance and is_fraction:
        low, high = from_trials(mean, 1 / variance, freedom).tolist()
    elif variance:
        half = math.sqrt(variance) * scipy.stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
        low, high = max(mean - half, bounds[0]), min(mean + half, bounds[1])
    return Estimate(mean=mean, low=low, high=high, values=tuple(values))


def strata(table: Table, num_classes: int) -> np.ndarray:
    """Returns int64 `[N]` classes to stratify images by.

    This is the rarest class of a multi-label image; `num_classes` if it shows none.
    """
    targets = table.targets
    if targets.ndim == 1:
        return targets
    counts = count_classes(targets, num_classes)
    rarity = np.where(targets > 0, counts, len(targets) + 1)
    return np.where(targets.any(1), rarity.argmin(1), num_classes)


def fold_numbers(table: Table, num_classes: int, folds: int, seed: int) -> np.ndarray:
    """Assigns images to folds, stratified by class and without dividing groups.

    Args:
        table: The images; multi-label images are stratified by their rarest class.
        num_classes: Number of classes.
        folds: Number of folds.
        seed: Seed of the assignment.

    Returns:
        int64 `[N]` fold of each image, starting at 0.

    Raises:
        UsageError: If there are fewer images or groups than folds; if images are
            grouped, also if every class has fewer images than there are folds.
    """
    units = len({group or index for index, group in enumerate(table.groups)})
    is_grouped = any(table.groups)
    if units < folds:
        what = "groups of training images" if is_grouped else "training images"
        raise UsageError(
            f"There are fewer {what} than folds. Received: {units} and {folds} folds. "
            "Use fewer folds, or more images."
        )
    of_class = strata(table, num_classes)
    if is_grouped:
        return _grouped(of_class, table.groups, folds, seed)
    # Deal round-robin, class by class, so that images of small classes spread too.
    shuffled = np.random.default_rng(seed).random(len(table))
    numbers = np.empty(len(table), np.int64)
    numbers[np.lexsort((shuffled, of_class))] = np.arange(len(table)) % folds
    return numbers


def quick_folds(table: Table, num_classes: int, seed: int) -> np.ndarray | None:
    """Assigns images to folds without dividing groups, in little time.

    One image of each group stands for all of it, which scales to many groups, unlike
    exact stratification of all images.

    Args:
        table: The N images.
        num_classes: Number of classes.
        seed: Seed of the assignment.

    Returns:
        int64 `[N]` fold of each image, starting at 0; None if there are fewer images or
        groups than 5 folds.
    """
    groups = Groups.of(table.groups)
    index = np.arange(len(table)) if groups is None else groups.index
    first = table.select(np.unique(index, return_index=True)[1])
    if len(first) < FOLDS:
        return None
    alone = replace(first, groups=("",) * len(first))
    return fold_numbers(alone, num_classes, FOLDS, seed)[index]


def head_folds(
    table: Table, num_classes: int, folds: int | None, seed: int
) -> np.ndarray | None:
    """Assigns training images to the folds that the L2 strength is chosen in.

    Args:
        table: The N training images.
        num_classes: Number of classes.
        folds: Number of folds; None for 5, or as many as possible if that is fewer.
        seed: Seed of the assignment.

    Returns:
        int64 `[N]` fold of each image, starting at 0. With very many images, fold 0 is
        a tenth of them and the others are in no fold (-1). None if there are too few
        images for two folds.

    Raises:
        UsageError: If the requested number of folds is not possible.
    """
    if folds:
        return fold_numbers(table, num_classes, folds, seed)
    is_large = len(table) * num_classes > _MOST_PREDICTIONS
    if is_large or len(table) > MOST_CROSS_VALIDATED:
        tenths = fold_numbers(table, num_classes, 10, seed)
        return np.where(tenths == 0, 0, -1)
    for fewer in range(FOLDS, 1, -1):
        with contextlib.suppress(UsageError):
            return fold_numbers(table, num_classes, fewer, seed)
    return None


def can_be_right(table: Table, num_classes: int, folds: np.ndarray) -> np.ndarray:
    """Tells which images a model could predict that learned from the other folds.

    It cannot if no image that it learned from shows the image's class, as when all
    images of a class are in one group, or if all of them show that class alone. For
    multi-label data, a class has to be shown by some of them and not by others, as far
    as the image shows it or does not.

    Args:
        table: The N images; those with a sample_weight of 0 are not learned from.
        num_classes: Number of classes.
        folds: int64 `[N]` fold of each image, starting at 0; -1 for none.

    Returns:
        bool `[N]`; False for images in no fold.
    """
    found = np.zeros(len(table), bool)
    weights = table.sample_weight
    has_weight = np.ones(len(table), bool) if weights is None else weights > 0
    for fold in range(int(folds.max(initial=-1)) + 1):
        rows = np.flatnonzero(folds == fold)
        learned = table.targets[(folds != fold) & has_weight]
        counts, targets = count_classes(learned, num_classes), table.targets[rows]
        if targets.ndim == 1:
            found[rows] = (counts[targets] > 0) & (counts[targets] < len(learned))
        else:
            known = np.where(targets > 0, counts > 0, counts < len(learned))
            found[rows] = known.all(1)
    return found


@dataclass(frozen=True)
class OutOfFold:
    """Predictions of training images by models that did not learn from them.

    Attributes:
        folds: int64 `[N]` fold of each image, starting at 0; -1 for none.
        probabilities: float32 `[M, n, C]` of the n images in a fold, in order, by the M
            candidates that one was chosen from.
        losses: float32 `[M, n]` weighted cross-entropies in nats, by which a candidate
            is chosen unless a metric is given.
        chosen: Index of the chosen candidate.
    """

    folds: np.ndarray
    probabilities: np.ndarray
    losses: np.ndarray
    chosen: int

    @property
    def rows(self) -> np.ndarray:
        """int64 `[n]` indices of the images that are in a fold."""
        return np.flatnonzero(self.folds >= 0)


def selection_bias(
    targets: np.ndarray,
    found: OutOfFold,
    groups: Sequence[str],
    metric: str | None,
    seed: int,
) -> dict[str, float]:
    """Estimates how much the chosen candidate's figures flatter, because it was chosen.

    In each round, images (whole groups) are resampled, a candidate is chosen on them,
    and it is compared with the candidate that was chosen on all images, on the images
    that the round left out. Nothing is trained again. Source: Tsamardinos et al. 2018,
    "Bootstrapping the out-of-sample predictions for efficient and accurate
    cross-validation", Machine Learning 107.

    Args:
        targets: Targets of the n images in a fold, as in `tables.Table`.
        found: The predictions; their candidates are compared.
        groups: Group of each of the n images; "" for none.
        metric: The metric that chose; None for the loss.
        seed: Seed of the bootstrap.

    Returns:
        Mean difference by name of metric: what to add to the chosen one's figure. For
        figures of which more is better it is rarely positive.
    """
    rng, names = np.random.default_rng(seed), metrics_of(targets)
    some = np.sort(rng.permutation(len(targets))[:_MOST_RESAMPLED])
    targets, groups = targets[some], [groups[i] for i in some]
    said, losses = found.probabilities[:, some], found.losses[:, some]
    rounds = int(np.clip(2e6 / max(said[0].size, 1), 20, _BOOTSTRAP_ROUNDS))
    units = np.unique(
        [group or f"\0{i}" for i, group in enumerate(groups)], return_inverse=True
    )[1]
    differences = np.zeros((rounds, len(names)))
    for number in range(rounds):
        drawn = rng.integers(0, units.max() + 1, units.max() + 1)
        times = np.bincount(drawn, minlength=units.max() + 1)[units]
        left_out = np.flatnonzero(times == 0)
        figures = np.zeros(len(said))
        if metric:
            bag = np.repeat(np.arange(len(some)), times)
            figures = np.array([score(metric, targets[bag], one[bag]) for one in said])
        # As in the choice itself, the loss breaks ties.
        best = int(np.lexsort((losses @ times, -figures))[0])
        if best == found.chosen or not len(left_out):
            continue
        y = targets[left_out]
        differences[number] = [
            score(name, y, said[best, left_out])
            - score(name, y, said[found.chosen, left_out])
            for name in names
        ]
    return dict(zip(names, differences.mean(0).tolist(), strict=True))


def evaluate_out_of_fold(
    table: Table,
    found: OutOfFold,
    class_names: Sequence[str],
    thresholds: np.ndarray | None,
    metric: str | None,
    seed: int,
) -> tuple[Evaluation, Estimate | None]:
    """Computes out-of-fold metrics, corrected for the choice of the candidate.

    Args:
        table: The N training images.
        found: Their predictions.
        class_names: Class names in the order of the columns.
        thresholds: For multi-label data, float32 `[n, C]` thresholds of the images in a
            fold, chosen on other folds.
        metric: The metric that chose; None for the loss.
        seed: Seed of resampling.

    Returns:
        (metrics; the deciding metric over folds with the interval of `estimate`, or
        None if there is only one fold). The interval of the deciding metric is that of
        `estimate`; other intervals are those of `evaluate`.
    """
    rows = found.rows
    targets, said = table.targets[rows], found.probabilities[found.chosen]
    groups = [table.groups[i] for i in rows]
    plain = evaluate(targets, said, class_names, groups, thresholds, seed)
    biases = selection_bias(targets, found, groups, metric, seed)
    signs = {name: -1 if name == "log_loss" else 1 for name in biases}
    shifts = {FIELDS[name]: signs[name] * bias for name, bias in biases.items()}
    intervals = dict(plain.intervals)
    for field, shift in shifts.items():
        if field in intervals:
            intervals[field] = _shifted(field, intervals[field], shift)

    name = deciding_metric(targets, metric)
    field, numbers, estimated = FIELDS[name], found.folds[rows], None
    if numbers.max() > 0:
        values = [
            signs[name] * score(name, targets[numbers == fold], said[numbers == fold])
            + shifts[field]
            for fold in range(int(numbers.max()) + 1)
            if _is_defined(name, targets[numbers == fold])
        ] or [getattr(plain, field) + shifts[field]]
        held_out = 1 / (numbers.max() + 1)
        of_images = plain.intervals.get(field)
        estimated = estimate(values, held_out, _bounds(field), of_images)
        # With folds of unequal size, their mean is not the figure of all images.
        value = getattr(plain, field) + shifts[field]
        intervals[field] = min(estimated.low, value), max(estimated.high, value)
    update: dict[str, object] = {"intervals": intervals}
    for field, shift in shifts.items():
        if (value := getattr(plain, field)) is not None:
            update[field], _ = _shifted(field, (value, value), shift)
    return plain.model_copy(update=update), estimated


def _is_defined(metric: str, targets: np.ndarray) -> bool:
    """Returns whether a metric is defined for the classes that occur in a fold."""
    if metric == "mean_average_precision":
        return bool(targets.any())
    if metric != "auc":
        return True
    if targets.ndim == 1:
        return len(np.unique(targets)) > 1
    return bool((targets.any(0) & ~targets.all(0)).any())


def _bounds(field: str) -> tuple[float, float]:
    """Returns the smallest and largest possible value of a metric."""
    return (0.0, math.inf if field == "log_loss" else 1.0)


def _shifted(
    field: str, interval: tuple[float, float], shift: float
) -> tuple[float, float]:
    low, high = (float(np.clip(x + shift, *_bounds(field))) for x in interval)
    return low, high


def _grouped(
    strata: np.ndarray, groups: Sequence[str], folds: int, seed: int
) -> np.ndarray:
    most = int(np.bincount(strata).max())
    if most < folds:
        raise UsageError(
            "Every class has fewer training images than there are folds. Received: at "
            f"most {most} and {folds} folds. Use fewer folds, or more images."
        )
    names = [group or f"\0{index}" for index, group in enumerate(groups)]
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    numbers = np.empty(len(strata), np.int64)
    with warnings.catch_warnings():
        # A class with fewer images than folds is absent from some, which is acceptable.
        warnings.filterwarnings("ignore", message="The least populated class")
        parts = splitter.split(np.zeros(len(strata)), strata, names)
        for number, (_, held_out) in enumerate(parts):
            numbers[held_out] = number
    return numbers
