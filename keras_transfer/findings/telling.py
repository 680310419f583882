"""How well the class can be told from a property of images, out of fold."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import scipy.stats

from keras_transfer.data.tables import one_hot
from keras_transfer.evaluation.intervals import (
    CONFIDENCE,
    Groups,
    Interval,
    as_interval,
    from_trials,
)
from keras_transfer.findings.properties import Property

FEWEST_OF_CLASS = 10
"""Images of a class, and others, that tell whether it can be told from the others."""

_PRIOR_IMAGES = 2.0  # that a value's frequencies of classes are smoothed with
_MOST_LEAVES = 16  # for few classes; a property that tells more is a category
_FEWEST_IN_LEAF = 5


@dataclass(frozen=True)
class Gain:
    """What a way of telling the class gains over a way that looks at nothing.

    Attributes:
        value: The figure, from 0 to 1.
        base: The same figure without looking.
        interval: 95% confidence interval of `value`.
        least: Lower end of the gain's interval, at the level that was asked for.
    """

    value: float
    base: float
    interval: Interval
    least: float

    def way(self, whole: float = 1.0) -> float:
        """Returns which part of the way from `base` to `whole` the figure goes."""
        return (self.value - self.base) / max(whole - self.base, 1e-9)

    def least_way(self, whole: float = 1.0) -> float:
        """Returns the part of the way that the gain's lower end goes."""
        return self.least / max(whole - self.base, 1e-9)


@dataclass(frozen=True)
class Units:
    """N images with what figures of them depend on.

    Attributes:
        targets: Targets, as in `tables.Table`.
        num_classes: Number of classes.
        folds: int64 `[N]` fold of each image, starting at 0.
        groups: Groups of the images; None for none.
    """

    targets: np.ndarray
    num_classes: int
    folds: np.ndarray
    groups: Groups | None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def shown(self) -> np.ndarray:
        """Whether each image shows each class, bool `[N, C]`."""
        return one_hot(self.targets, self.num_classes) > 0

    def keep(self, rows: np.ndarray) -> "Units":
        """Returns some of the images, by their bool `[N]` mask."""
        groups = self.groups
        if groups is not None:
            groups = Groups(np.unique(groups.index[rows], return_inverse=True)[1])
        return Units(self.targets[rows], self.num_classes, self.folds[rows], groups)


@dataclass(frozen=True)
class Told:
    """How well classes are told from a property.

    Attributes:
        one: The property of those images that have it.
        units: These images.
        accuracy: Fraction of images whose class is told, against always naming the most
            frequent class; None for multi-label data.
        classes: For classes of enough images, (gain in the mean of the fractions told
            of images that show it and of others, against guessing; its index), the
            largest gain first. Of two classes, only the smaller one is there.
    """

    one: Property
    units: Units
    accuracy: Gain | None
    classes: Sequence[tuple[Gain, int]]

    @property
    def gains(self) -> list[Gain]:
        """All gains."""
        accuracy = [] if self.accuracy is None else [self.accuracy]
        return [*accuracy, *(gain for gain, _ in self.classes)]

    @property
    def way(self) -> float:
        """The longest way that one of the gains goes, if it is clear; else 0."""
        return max((gain.way() for gain in self.gains if gain.least > 0), default=0.0)

    @property
    def least_way(self) -> float:
        """The lower end of the longest way."""
        return max((gain.least_way() for gain in self.gains), default=0.0)


def codes_of(one: Property, units: Units, seed: int) -> list[np.ndarray]:
    """Divides the values of a property into few, for each fold without its images.

    Values of a category stay as they are. Those of numbers become leaves of a decision
    tree, which learns from the other folds.

    Args:
        one: The property of N images, all of which have it.
        units: The images.
        seed: Seed of the tree, which settles ties.

    Returns:
        For each fold, int64 `[N]` numbers from 0 on.
    """
    from sklearn.tree import DecisionTreeClassifier

    folds = range(int(units.folds.max()) + 1)
    if one.is_category:
        return [one.values + 1] * len(folds)
    leaves = int(np.clip(2 * units.num_classes, _MOST_LEAVES, 4 * _MOST_LEAVES))
    found = []
    for fold in folds:
        learned = units.folds != fold
        tree = DecisionTreeClassifier(
            max_leaf_nodes=leaves, min_samples_leaf=_FEWEST_IN_LEAF, random_state=seed
        )
        tree.fit(one.values[learned], units.targets[learned])
        found.append(tree.apply(one.values))
    return found


def tell(
    one: Property, units: Units, classes: Sequence[int], level: float, seed: int
) -> Told:
    """Tells the class of each image from its property, by the images of other folds.

    The frequencies of classes among images of the same value are smoothed by those of
    all images. The most frequent class is said, and each class for which a value speaks
    (which is more frequent than among all images).

    Args:
        one: The property of N images, all of which have it.
        units: The images.
        classes: Indices of the classes to tell from all others.
        level: Probability that the interval of a gain may miss on its lower side.
        seed: Seed of decision trees.
    """
    shown = units.shown
    said, speaks = np.zeros(len(units), np.int64), np.zeros_like(shown)
    for fold, code in enumerate(codes_of(one, units, seed)):
        held_out, learned = units.folds == fold, units.folds != fold
        prior = shown[learned].mean(0)
        of_code = scipy.sparse.csr_array(
            (np.ones(learned.sum()), (code[learned], np.arange(learned.sum()))),
            (int(code.max()) + 1, int(learned.sum())),
        )
        images = np.asarray(of_code.sum(1))[:, None]
        often = of_code @ shown[learned].astype(np.float64) + _PRIOR_IMAGES * prior
        often /= images + _PRIOR_IMAGES
        said[held_out] = often[code[held_out]].argmax(1)
        speaks[held_out] = (often > prior + 1e-9)[code[held_out]]
    accuracy = None
    if units.targets.ndim == 1:
        accuracy = gain_in_accuracy(units, said, level)
    counts = shown.sum(0)
    enough = np.minimum(counts, len(units) - counts) >= FEWEST_OF_CLASS
    chosen = np.array([index for index in classes if enough[index]], np.int64)
    gains = _gains_of_classes(shown[:, chosen], speaks[:, chosen], units.groups, level)
    ranked = sorted(
        zip(gains, chosen.tolist(), strict=True), key=lambda pair: -pair[0].way()
    )
    return Told(one, units, accuracy, ranked)


def gain_in_accuracy(units: Units, said: np.ndarray, level: float) -> Gain:
    """Compares predicted classes with always predicting the most frequent one.

    Args:
        units: The N images.
        said: int64 `[N]` predicted classes.
        level: As for `tell`.
    """
    most = np.bincount(units.targets).argmax()
    right = (said == units.targets).astype(np.float64)
    is_most = units.targets == most
    return Gain(
        float(right.mean()),
        float(is_most.mean()),
        fraction_interval(right, units.groups),
        least_mean(right - is_most, units.groups, level),
    )


def fraction_interval(right: np.ndarray, groups: Groups | None) -> Interval:
    """Returns the 95% interval of the mean of `[N]` zeros and ones."""
    value, trials, freedom = float(right.mean()), float(len(right)), np.inf
    if groups is not None:
        freedom = max(len(groups) - 1, 1)
        variance = float(_errors((right - value)[:, None], groups)[0]) ** 2
        spread = value * (1 - value)
        trials = min(trials, spread / variance) if variance > 0 else len(groups)
    return as_interval(from_trials(value, trials, freedom))


def least_mean(values: np.ndarray, groups: Groups | None, level: float) -> float:
    """Computes the lower end of the interval of a mean, by Student's t.

    Args:
        values: float64 `[N]`.
        groups: Groups of the images, whose sums are taken as independent.
        level: Probability that the interval misses on this side.
    """
    mean = float(values.mean())
    error = float(_errors((values - mean)[:, None], groups)[0])
    units = len(values) if groups is None else len(groups)
    return mean - float(scipy.stats.t.isf(level, max(units - 1, 1))) * error


def _errors(deviations: np.ndarray, groups: Groups | None) -> np.ndarray:
    """Returns the standard errors of K means, of deviations float64 `[N, K]`."""
    images = len(deviations)
    if groups is not None:
        deviations = groups.sum_rows(scipy.sparse.csr_array(deviations)).toarray()
    units = len(deviations)
    squares = np.square(deviations).sum(0) * units / max(units - 1, 1)
    return np.sqrt(squares) / images


def _gains_of_classes(
    shown: np.ndarray, said: np.ndarray, groups: Groups | None, level: float
) -> list[Gain]:
    """Compares the mean of sensitivity and specificity with guessing, by class.

    If what is said has nothing to do with a class, it is said equally often for images
    that show it and others. The larger of that variance and of the observed one is
    taken, since a fraction of 0 or 1 shows none.

    Args:
        shown: bool `[N, K]`, whether an image shows a class.
        said: bool `[N, K]`, whether its property speaks for it.
        groups: Groups of the images.
        level: As for `tell`.
    """
    images, ones = len(shown), shown.sum(0)
    zeros = images - ones
    right = (said == shown).astype(np.float64)
    sensitivity = (right * shown).sum(0) / ones
    specificity = (right * ~shown).sum(0) / zeros
    weights = np.where(shown, images / 2 / ones, images / 2 / zeros)
    deviations = weights * (right - np.where(shown, sensitivity, specificity))
    often = said.mean(0)
    chance = np.sqrt(often * (1 - often) * (1 / ones + 1 / zeros)) / 2
    errors = np.maximum(_errors(deviations, groups), chance)
    freedom = np.minimum(ones, zeros) - 1
    if groups is not None:
        freedom = np.minimum(freedom, max(len(groups) - 1, 1))
    values = (sensitivity + specificity) / 2
    half = scipy.stats.t.isf((1 - CONFIDENCE) / 2, freedom) * errors
    least = values - 0.5 - scipy.stats.t.isf(level, freedom) * errors
    ends = np.clip(np.stack([values - half, values + half], 1), 0.0, 1.0)
    return [
        Gain(value, 0.5, as_interval(interval), low)
        for value, interval, low in zip(
            values.tolist(), ends, least.tolist(), strict=True
        )
    ]
