"""Sets aside training images to judge a fine-tuned model by.

Each half of them chooses what the other half judges.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from keras_transfer.data.tables import Table
from keras_transfer.errors import UsageError
from keras_transfer.evaluation.calibration import apply_temperature, temperature
from keras_transfer.evaluation.comparison import best_candidate
from keras_transfer.evaluation.crossvalidation import fold_numbers, strata

SMALLEST_SHARE = 0.1
"""Fraction of the training images that is always set aside."""

LARGEST_SHARE = 0.25
"""Fraction of the training images that is set aside to come close to `ENOUGH`."""

ENOUGH = 100
"""Number of images on which a model that is 5 points better is mostly recognized
(`tests/benchmarks/honesty.py gate`)."""

_FEWEST_UNITS = 3
"""Groups, or images without one, of which two halves can choose and judge. Of two, both
gain in a quarter of the cases if the models are equally good."""


def validation_images(images: int) -> int:
    """Returns how many of a number of training images to set aside."""
    return round(max(SMALLEST_SHARE * images, min(LARGEST_SHARE * images, ENOUGH)))


def carve(table: Table, num_classes: int, seed: int) -> tuple[Table, Table]:
    """Divides training images into those that train and those that judge.

    The division is stratified by class (multi-label images by their rarest class) and
    keeps groups together. No class loses all of its training images.

    Args:
        table: The training images.
        num_classes: Number of classes.
        seed: Seed of the division.

    Returns:
        (train, val). There are `validation_images` of the latter, or about as many if
        whole groups or small classes do not allow exactly that number.

    Raises:
        UsageError: If fewer than three groups, or images without one, can be set aside.
    """
    if any(table.groups):
        judges = _best_fold(table, num_classes, seed)
    else:
        judges = _without_last_of_class(
            table, _dealt(strata(table, num_classes), len(table), seed)
        )
    val = table.select(judges)
    if not can_judge(val):
        raise UsageError(
            "Fine-tuning sets aside training images of at least three groups, or three "
            f"without a group, to judge by. Received: {len(table)} training images, of "
            f"which {len(val)} can be set aside. Use more images, or keep the model "
            "whatever it is with force=True."
        )
    return table.select(~judges), val


def carve_again(table: Table, judged: Collection[str]) -> tuple[Table, Table]:
    """Divides training images as an earlier `carve` did.

    Which images `carve` sets aside depends on all images of the table. If some of them
    no longer exist, it would set aside images that an earlier model learned from.

    Args:
        table: The training images.
        judged: Sources of the images that were set aside.

    Returns:
        (train, val): val has those of the images that are still there, except the last
        ones of a class.
    """
    judges = np.array([source in judged for source in table.sources], bool)
    judges = _without_last_of_class(table, judges)
    return table.select(~judges), table.select(judges)


def can_judge(table: Table) -> bool:
    """Returns whether images, with their groups whole, suffice to compare two models.

    At least three groups, or images without one, are needed.
    """
    return _units(table) >= _FEWEST_UNITS


def halves(table: Table, num_classes: int, seed: int) -> np.ndarray:
    """Divides images in two halves, stratified by class and without dividing groups.

    Args:
        table: At least two images, of at least two groups if they are grouped.
        num_classes: Number of classes.
        seed: Seed of the division.

    Returns:
        bool `[N]`: whether an image is in the first half. Neither half is empty.
    """
    if (
        np.bincount(strata(table, num_classes)).max() < 2
    ):  # there is nothing to stratify
        table = replace(table, targets=np.zeros(len(table), np.int64))
    return fold_numbers(table, num_classes, 2, seed) == 0


@dataclass(frozen=True)
class CrossFit:
    """What two halves of the judging images chose, and predictions to judge it by.

    Attributes:
        key: Mean of the keys of the candidates that the halves chose. If they chose
            different ones, no image judged it; see `probabilities`.
        temperature: Geometric mean of the temperatures that the halves chose, which no
            image judged either.
        uncalibrated: float32 `[N, num_classes]` probabilities of each image by the
            candidate that the other half chose.
        probabilities: The same after dividing the logits by the temperature that the
            other half chose.
    """

    key: float
    temperature: float
    uncalibrated: np.ndarray
    probabilities: np.ndarray


def cross_fit(
    metric: str,
    targets: np.ndarray,
    candidates: Mapping[float, np.ndarray],
    first: np.ndarray,
) -> CrossFit:
    """Chooses among candidates, without judging any by images that chose it.

    Each half of the images chooses the best candidate and fits its temperature; the
    other half is predicted with both.

    Args:
        metric: A name that `metrics.deciding_metric` returns; the log loss breaks ties.
        targets: As for `metrics.evaluate`.
        candidates: float32 `[N, num_classes]` probabilities by key.
        first: bool `[N]`: whether an image is in the first half; see `halves`.
    """
    uncalibrated = np.empty_like(next(iter(candidates.values())))
    probabilities = np.empty_like(uncalibrated)
    keys, temperatures = [], []
    for chooses in (first, ~first):
        rows = {key: values[chooses] for key, values in candidates.items()}
        key = best_candidate(metric, targets[chooses], rows)
        fitted = temperature(rows[key], targets[chooses])
        judged = candidates[key][~chooses]
        uncalibrated[~chooses] = judged
        probabilities[~chooses] = apply_temperature(judged, fitted, targets.ndim == 2)
        keys.append(key)
        temperatures.append(fitted)
    mean = math.sqrt(math.prod(temperatures))
    return CrossFit(sum(keys) / 2, mean, uncalibrated, probabilities)


def _dealt(strata: np.ndarray, images: int, seed: int) -> np.ndarray:
    """Picks images at equal distances in an order by class, random within a class."""
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(images), strata))
    share = validation_images(images) / images
    steps = np.floor(np.arange(images + 1) * share + rng.random())
    picked = np.zeros(images, bool)
    picked[order] = np.diff(steps) > 0
    return picked


def _best_fold(table: Table, num_classes: int, seed: int) -> np.ndarray:
    """Picks the fold of whole groups whose size comes closest to what is wanted."""
    wanted = validation_images(len(table))
    most = int(np.bincount(strata(table, num_classes)).max())
    # A fold has enough groups to judge, and training keeps two thirds of the images.
    enough = _units(table) // _FEWEST_UNITS
    folds = min(round(len(table) / max(wanted, 1)), enough, most)
    if folds < 3:
        return np.zeros(len(table), bool)
    numbers = fold_numbers(table, num_classes, folds, seed)
    usable = [_without_last_of_class(table, numbers == fold) for fold in range(folds)]

    def fitness(judges: np.ndarray) -> tuple[bool, int]:
        return can_judge(table.select(judges)), -abs(int(judges.sum()) - wanted)

    return max(usable, key=fitness)


def _without_last_of_class(table: Table, judges: np.ndarray) -> np.ndarray:
    """Leaves out images, with their groups, of classes that no other would train."""
    targets = table.targets
    if targets.ndim == 1:
        lost = ~np.isin(targets, targets[~judges])
    else:
        lost = (targets.astype(bool) & ~targets[~judges].any(0)).any(1)
    groups = {table.groups[i] for i in np.flatnonzero(lost)} - {""}
    return judges & ~lost & [group not in groups for group in table.groups]


def _units(table: Table) -> int:
    """Counts groups; an image without one is a group of its own."""
    counts = Counter(table.groups)
    return counts.pop("", 0) + len(counts)
