"""Cross-validation folds, and confidence intervals of metrics measured in them."""

import math
import warnings
from collections.abc import Sequence

import numpy as np
import scipy.stats
from sklearn.model_selection import StratifiedGroupKFold

from keras_transfer.data.tables import Table, count_classes
from keras_transfer.errors import UsageError
from keras_transfer.runs.manifest import Estimate

CONFIDENCE = 0.95


def estimate(values: Sequence[float], held_out: float, lowest: float = 0.0) -> Estimate:
    """Computes the mean of repeated measurements and its 95% confidence interval.

    The training sets overlap, so the measurements are not independent: the variance of
    their mean is (1 / n + held_out / (1 - held_out)) times that of a measurement.
    Source: Nadeau & Bengio 2003, "Inference for the Generalization Error", Machine
    Learning 52.

    Args:
        values: The measurements.
        held_out: Fraction of the images that each measurement was made on.
        lowest: Smallest possible value of a measurement; the largest is 1.
    """
    count, mean = len(values), float(np.mean(values))
    half = 0.0
    if count > 1:
        variance = float(np.var(values, ddof=1))
        variance *= 1 / count + held_out / (1 - held_out)
        half = math.sqrt(variance) * scipy.stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    low, high = max(mean - half, lowest), min(mean + half, 1.0)
    return Estimate(mean=mean, low=low, high=high, values=tuple(values))


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
    strata = table.targets
    if strata.ndim == 2:
        counts = count_classes(strata, num_classes)
        rarity = np.where(strata > 0, counts, len(strata) + 1)
        strata = np.where(strata.any(1), rarity.argmin(1), num_classes)
    if is_grouped:
        return _grouped(strata, table.groups, folds, seed)
    # Deal round-robin, class by class, so that images of small classes spread too.
    shuffled = np.random.default_rng(seed).random(len(table))
    numbers = np.empty(len(table), np.int64)
    numbers[np.lexsort((shuffled, strata))] = np.arange(len(table)) % folds
    return numbers


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
