"""95% confidence intervals of metrics on one set of images.

Every metric between 0 and 1 gets a Wilson score interval: with the number of images
where the metric is a fraction of images, and otherwise with the effective number of
trials, at which a fraction of that size would vary as much as the metric does:

    trials = value (1 - value) / variance

Such an interval stays within 0 to 1 and, unlike plus or minus two standard errors or
the quantiles of a bootstrap, does not shrink to a point where no image is wrong.

Images of one group, such as those of one patient, are not independent. The design
effect is the factor by which grouping increases the variance; it divides the trials.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import scipy.stats

CONFIDENCE = 0.95

Interval = tuple[float, float]

Z = float(scipy.stats.norm.ppf((1 + CONFIDENCE) / 2))
"""Standard deviations on each side of a normal distribution's middle 95%."""

_ROUNDS = 300  # the standard deviation of a metric is then known to about 4%
_QUANTILE_ROUNDS = 1000  # quantiles need more rounds than a standard deviation
_FEWEST_UNITS = 10  # images or groups whose losses tell how skewed losses are
_MOST_VALUES = 4_000_000  # resampled values held at a time: 32 MB


@dataclass(frozen=True)
class Groups:
    """Which images belong together, such as those of one patient.

    Attributes:
        index: int64 `[N]` group of each image, starting at 0.
    """

    index: np.ndarray

    @classmethod
    def of(cls, names: Sequence[str]) -> "Groups | None":
        """Numbers groups by name; returns None if no image has one.

        Args:
            names: Name of the group of each image; an image without one (the empty
                string) is a group of its own.
        """
        if not any(names):
            return None
        units = [name or index for index, name in enumerate(names)]
        numbers = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
        return cls(np.array([numbers[unit] for unit in units]))

    def __len__(self) -> int:
        return int(self.index.max()) + 1

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Adds up `[N]` values within each group."""
        return np.bincount(self.index, values, len(self))

    def sum_rows(self, rows: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
        """Adds up the rows of a sparse `[N, K]` array within each group."""
        images = len(self.index)
        ones = np.ones(images), (self.index, np.arange(images))
        return (scipy.sparse.csr_array(ones, (len(self), images)) @ rows).tocsr()


def wilson(value: np.ndarray | float, trials: np.ndarray | float) -> np.ndarray:
    """Computes Wilson's score interval of a fraction.

    Its ends are the fractions p from which the observed one is z standard deviations
    away: (value - p)^2 = z^2 p (1 - p) / trials. Source: Wilson 1927, "Probable
    Inference, the Law of Succession, and Statistical Inference", JASA 22.

    Args:
        value: Observed fraction, from 0 to 1; of any shape.
        trials: Number of trials, not necessarily whole; 0 gives the interval 0 to 1.

    Returns:
        float64 `[..., 2]` lower and upper end.
    """
    value, trials = np.broadcast_arrays(np.float64(value), np.float64(trials))
    middle = trials * value + Z**2 / 2
    half = Z * np.sqrt(trials * value * (1 - value) + Z**2 / 4)
    ends = np.stack([middle - half, middle + half], -1) / (trials + Z**2)[..., None]
    # Rounding must not push the ends past 0, 1 or the value itself.
    low = np.clip(np.minimum(ends[..., 0], value), 0.0, 1.0)
    return np.stack([low, np.clip(np.maximum(ends[..., 1], value), 0.0, 1.0)], -1)


def trials_of(interval: Interval) -> float:
    """Returns the number of trials of a Wilson interval, which its ends determine."""
    low, high = interval
    overlap = math.sqrt(low * high) + math.sqrt((1 - low) * (1 - high))
    return Z**2 * overlap**2 / max(1 - overlap**2, 1e-12)


def from_trials(
    value: float | np.ndarray, trials: float | np.ndarray, freedom: float | np.ndarray
) -> np.ndarray:
    """Computes the Wilson interval of a metric with its effective number of trials.

    If few images or groups tell the variance, it is uncertain itself, and Student's t
    takes the place of z: the trials are multiplied by (z / t)^2. Source: Korn &
    Graubard 1998, "Confidence Intervals for Proportions With Small Expected Number of
    Positive Counts Estimated From Survey Data", Survey Methodology 24.

    Args:
        value: The metric, from 0 to 1; of any shape.
        trials: The effective number of trials.
        freedom: Degrees of freedom of the variance; infinite if it is known.

    Returns:
        float64 `[..., 2]` lower and upper end.
    """
    t = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, np.maximum(freedom, 1))
    return wilson(value, trials * (Z / t) ** 2)


def weigh(
    measured: np.ndarray | float,
    cautious: np.ndarray | float,
    evidence: np.ndarray | float,
) -> np.ndarray:
    """Weighs a measured variance against a cautious one, `evidence` to 1.

    Variance shows only where images are wrong (or right, if these are fewer): without a
    single mistake it is 0, and from one or two it is too small as often as not.
    tests/benchmarks/honesty.py shows that intervals are too short without this.

    Args:
        measured: Variance, or a quantity proportional to it.
        cautious: The largest plausible one.
        evidence: Number of images or groups that show variance.
    """
    return np.asarray((evidence * measured + cautious) / (evidence + 1))


def of_fractions(right: np.ndarray, among: np.ndarray, seed: int) -> np.ndarray:
    """Computes intervals of fractions of grouped images, such as accuracy and recall.

    The variance is that of a bootstrap of whole groups (Field & Welsh 2007,
    "Bootstrapping Clustered Data", JRSS B 69), and gives the design effect.

    Args:
        right: float64 `[groups, K]` number of images that count for a fraction.
        among: float64 `[groups, K]` number of images that it is a fraction of.
        seed: Seed of the bootstrap.

    Returns:
        float64 `[K, 2]` lower and upper ends; 0 and 1 for a fraction of no images.
    """
    trials = among.sum(0)
    most = np.maximum(trials, 1)
    value = right.sum(0) / most
    rng = np.random.default_rng(seed)
    drawn = _resample(np.concatenate([right, among], 1), None, rng)
    drawn_right, drawn_among = np.split(drawn, 2, axis=1)
    deviations = drawn_right / np.maximum(drawn_among, 1) - value
    deviations[drawn_among == 0] = 0.0
    effect = _design_effect(
        (deviations**2).mean(0),
        value * (1 - value) / most,
        (among**2).sum(0) / most,
        np.minimum((right > 0).sum(0), (right < among).sum(0)),
    )
    return from_trials(value, trials / effect, (among > 0).sum(0) - 1)


def _design_effect(
    variance: np.ndarray,
    if_independent: np.ndarray,
    largest: np.ndarray,
    evidence: np.ndarray,
) -> np.ndarray:
    """Estimates the factor by which grouping increases variances.

    Args:
        variance: float64 `[K]` variances with whole groups resampled.
        if_independent: float64 `[K]` variances if the images were independent.
        largest: float64 `[K]` mean size of an image's group, which is the effect if all
            images of a group are right together or wrong together.
        evidence: int64 `[K]` number of groups with images that are wrong, or right.

    Returns:
        float64 `[K]` effects of at least 1.
    """
    largest = np.maximum(largest, 1.0)
    known = if_independent > 0
    ratio = np.where(known, variance / np.where(known, if_independent, 1.0), largest)
    return weigh(np.clip(ratio, 1.0, largest), largest, evidence)


def _resample(
    rows: np.ndarray | scipy.sparse.csr_array,
    weights: np.ndarray | None,
    rng: np.random.Generator,
    trials: int | None = None,
) -> np.ndarray:
    """Adds up rows drawn with replacement, in bounded memory.

    Args:
        rows: float64 `[U, K]`, sparse or not.
        weights: float64 `[U]`, proportional to the probability of each row; None for
            equal ones.
        rng: Random number generator.
        trials: Number of rows drawn in a round; None for U.

    Returns:
        float64 `[rounds, K]` sums.
    """
    units = rows.shape[0]
    weights = np.ones(units) if weights is None else weights
    probabilities = weights / weights.sum()
    sums = []
    for rounds in _parts(_ROUNDS, units):
        drawn = rng.multinomial(trials or units, probabilities, rounds)
        sums.append((rows.T @ drawn.T.astype(np.float64)).T)
    return np.concatenate(sums)


def _parts(rounds: int, size: int) -> Iterator[int]:
    """Divides rounds of `size` values into parts that fit into memory."""
    part = max(_MOST_VALUES // max(size, 1), 1)
    for first in range(0, rounds, part):
        yield min(part, rounds - first)


def of_confusion(
    counts: scipy.sparse.csr_array,
    metrics: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    is_right: np.ndarray,
    groups: Groups | None,
    seed: int,
) -> dict[str, Interval]:
    """Computes intervals of metrics of the confusion matrix, such as macro-F1.

    The variance is that of resampled confusion matrices. So that it is not 0 if no
    image is wrong, z^2 images are added to the matrix, as in Wilson's interval: half of
    them right and half wrong, equally many of each class. Where a metric equals the
    accuracy, the result is Wilson's interval.

    Args:
        counts: Sparse float64 `[N, 3 * num_classes]`, 1 where an image is predicted as
            a class that it shows, shows a class, and is predicted as a class.
        metrics: Computes metrics of float64 `[rounds, 3 * num_classes]` sums.
        is_right: bool `[N]`, whether an image is classified correctly.
        groups: Groups of the images.
        seed: Seed of the resampling.

    Returns:
        The intervals by the name of the metric.
    """
    rng = np.random.default_rng(seed)
    images, classes = counts.shape[0], counts.shape[1] // 3
    # Images with equal counts are interchangeable; of single-label data they are a cell
    # of the confusion matrix. A random projection tells rows apart.
    _, first, sizes = np.unique(
        counts @ rng.random(counts.shape[1]), return_index=True, return_counts=True
    )
    cells = counts[first]
    own, next_one = np.eye(classes), np.roll(np.eye(classes), 1, axis=1)
    added = np.block([[own, own, own], [0 * own, own, next_one]])
    smooth = scipy.sparse.vstack([cells, scipy.sparse.csr_array(added)]).tocsr()
    weights = np.concatenate([sizes, np.full(2 * classes, Z**2 / 2 / classes)])
    resampled = metrics(_resample(smooth, weights, rng, images))
    if groups is not None:
        independent = metrics(_resample(cells, sizes.astype(np.float64), rng, images))
        grouped = metrics(_resample(groups.sum_rows(counts), None, rng))
        in_group, right = groups.sum(np.ones(images)), groups.sum(is_right)
        largest = (in_group**2).sum() / images
        evidence = min((right > 0).sum(), (right < in_group).sum())
    found = {}
    for name, value in metrics(np.asarray(counts.sum(0))[None]).items():
        middle, variance = resampled[name].mean(), resampled[name].var()
        trials, freedom = middle * (1 - middle) / max(variance, 1e-12), np.inf
        if groups is not None:
            trials /= _design_effect(
                grouped[name].var(), independent[name].var(), largest, evidence
            )
            freedom = len(groups) - 1
        found[name] = as_interval(from_trials(value[0], trials, freedom))
    return found


def as_interval(ends: np.ndarray) -> Interval:
    """Converts `[2]` ends to a tuple of Python floats."""
    low, high = ends.tolist()
    return low, high


def of_mean(
    values: np.ndarray,
    groups: Groups | None,
    seed: int,
    wrong: float,
    largest: float,
) -> Interval | None:
    """Computes the interval of the mean of nonnegative values, such as losses.

    Losses are skewed: a few are large. The lower end is that of the bootstrap-t of
    images, or of whole groups, whose quantiles are those of (mean - true mean) /
    standard error and follow the skewness. Source: Efron & Tibshirani 1993, "An
    Introduction to the Bootstrap", chapter 12.

    Its upper end would be any number if few images are wrong, and too low if none is.
    It is therefore that of Student's t after adding two images (or groups of mean
    size), as Wilson's interval adds z^2 / 2 = 1.9 wrong ones: they have the largest
    loss that occurred, or that of a wrong prediction if none did. In simulations with
    10 to 300 images of synthetic classifiers, digits and flowers, the interval held the
    truth in 90 to 100% of all cases, and that of the bootstrap-t in 80 to 99%. With 5
    images, it was down to 81%.

    Args:
        values: float64 `[N]`.
        groups: Groups of the images.
        seed: Seed of the bootstrap.
        wrong: The smallest loss of a wrong prediction.
        largest: The largest possible loss.

    Returns:
        Lower and upper end; None for fewer than 10 images or groups.
    """
    sizes, sums = np.ones(len(values)), values
    if groups is not None:
        sizes, sums = groups.sum(sizes), groups.sum(values)
    units, mean, size = len(sums), float(values.mean()), float(sizes.mean())
    if units < _FEWEST_UNITS:
        return None
    low = _lower_end(sums, sizes, seed)
    worst = size * max(float((sums / sizes).max()), wrong)
    sums, sizes = np.append(sums, [worst] * 2), np.append(sizes, [size] * 2)
    middle = sums.sum() / sizes.sum()
    t = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, units - 1)
    high = float(middle + t * _standard_error(sums, sizes, middle, sizes.sum()))
    return min(max(low, 0.0), mean), max(min(high, largest), mean)


def _lower_end(sums: np.ndarray, sizes: np.ndarray, seed: int) -> float:
    """Computes the lower end of the bootstrap-t of sum(sums) / sum(sizes)."""
    units, mean = len(sums), sums.sum() / sizes.sum()
    error = _standard_error(sums, sizes, mean, sizes.sum())
    rng = np.random.default_rng(seed)
    parts = []
    for rounds in _parts(_QUANTILE_ROUNDS, units):
        drawn = rng.integers(0, units, (rounds, units))
        totals = sizes[drawn].sum(1)
        means = sums[drawn].sum(1) / totals
        errors = _standard_error(sums[drawn], sizes[drawn], means, totals)
        usable = errors > 0
        parts.append((means - mean)[usable] / errors[usable])
    deviations = np.concatenate([np.zeros(1), *parts])  # all units may be alike
    return float(mean - np.quantile(deviations, (1 + CONFIDENCE) / 2) * error)


def _standard_error(
    sums: np.ndarray, sizes: np.ndarray, means: np.ndarray, totals: np.ndarray
) -> np.ndarray:
    """Computes the standard error of sum(sums) / sum(sizes) over the last axis."""
    units = sums.shape[-1]
    residuals = sums - means[..., None] * sizes
    squares = (residuals**2).sum(-1) * units / (units - 1)
    return np.sqrt(squares) / totals


@dataclass(frozen=True)
class RankMetric:
    """A metric of the order in which scores put images, with what its interval needs.

    To first order, the metric is its true value plus the sum of the influences, so the
    sum of their squares is its variance. Influences of images of one group are added
    first (for the ROC AUC: Obuchowski 1997, "Nonparametric Analysis of Clustered ROC
    Curve Data", Biometrics 53).

    Attributes:
        value: The metric, from 0 to 1.
        influence: float64 `[U]` influence of each image or group; the sum is 0.
        fewest: Number of trials to assume where no image is out of order: the number of
            positive images, or of negative ones if these are fewer; of groups, if any.
        evidence: Number of images or groups that are out of order.
        freedom: Degrees of freedom of the variance.
    """

    value: float
    influence: np.ndarray
    fewest: float
    evidence: float
    freedom: float

    @property
    def interval(self) -> Interval:
        """The 95% confidence interval."""
        spread = self.value * (1 - self.value)
        variance, cautious = (
            float(np.square(self.influence).sum()),
            spread / self.fewest,
        )
        if spread < 1e-12:  # the metric is 0 or 1, apart from rounding
            trials = self.fewest
        else:
            weighed = weigh(variance, cautious, self.evidence)
            trials = spread / max(variance, float(weighed))
        return as_interval(from_trials(self.value, trials, self.freedom))


class Macro:
    """Computes the mean of rank metrics of several classes, one class at a time."""

    def __init__(self) -> None:
        self._classes = 0
        self._value = self._inverse = self._evidence = self._freedom = 0.0
        self._influence: np.ndarray | float = 0.0

    def add(self, one: RankMetric) -> None:
        """Adds the metric of another class on the same images."""
        self._classes += 1
        self._value += one.value
        self._influence = self._influence + one.influence
        self._inverse += 1 / one.fewest
        self._evidence += one.evidence
        self._freedom += one.freedom

    @property
    def mean(self) -> RankMetric | None:
        """The mean; None without classes.

        Its influences are the mean influences, which takes the covariance of classes
        into account. Every two classes are compared twice, one against the other and
        vice versa, so half as many trials are assumed as there would be in independent
        classes.
        """
        if not self._classes:
            return None
        influence = np.asarray(self._influence) / self._classes
        return RankMetric(
            min(self._value / self._classes, 1.0),
            influence,
            max(self._classes**2 / 2, 1) / self._inverse,
            self._evidence,
            min(self._freedom, len(influence) - 1),
        )


def roc_auc(
    positive: np.ndarray, scores: np.ndarray, groups: Groups | None = None
) -> RankMetric:
    """Computes the area under the ROC curve with DeLong's variance.

    The placement value of a positive image is the fraction of negative images with a
    lower score, ties counted by half, and vice versa. The area is their mean, and the
    influence of an image is its placement value minus the area, by the number of images
    of its kind. Sources: DeLong, DeLong & Clarke-Pearson 1988, "Comparing the Areas
    under Two or More Correlated Receiver Operating Characteristic Curves", Biometrics
    44; in O(N log N) by sorting: Sun & Xu 2014, "Fast Implementation of DeLong's
    Algorithm", IEEE Signal Processing Letters 21.

    Args:
        positive: bool `[N]` with both values.
        scores: float `[N]`, larger for images that are more likely positive.
        groups: Groups of the images.
    """
    influence = np.empty(len(scores))
    fewest, evidence, area = [], [], 0.0
    for own, at_best in ((positive, 1.0), (~positive, 0.0)):
        others, mine = np.sort(scores[~own]), scores[own]
        below = np.searchsorted(others, mine, "left").astype(np.float64)
        below = (below + np.searchsorted(others, mine, "right")) / 2 / len(others)
        area = float(below.mean())
        count = len(mine)
        influence[own] = (below - area) / np.sqrt(count * max(count - 1, 1))
        out_of_order = np.zeros(len(scores), bool)
        out_of_order[own] = below != at_best
        fewest.append(_count(own, groups))
        evidence.append(_count(out_of_order, groups))
    influence[~positive] *= -1  # the last pass counted positive images below negatives
    if groups is not None:
        influence = groups.sum(influence)
    freedom = np.inf if groups is None else len(groups) - 1
    return RankMetric(1 - area, influence, min(fewest), min(evidence), freedom)


def average_precision(
    positive: np.ndarray, scores: np.ndarray, groups: Groups | None = None
) -> RankMetric:
    """Computes the average precision with the variance of the infinitesimal jackknife.

    It is the mean over positive images of the precision among all images with at least
    their score, P = TP / ALL. Its derivative by the weight of an image, the influence,
    has two parts: P - AP of the image itself if it is positive, and what its presence
    changes in the precision at each positive image ranked below or equal,
    ([is positive] - P) / ALL. Source: Efron 1982, "The Jackknife, the Bootstrap and
    Other Resampling Plans", chapter 6. The quantiles of a bootstrap cover less
    (tests/benchmarks/honesty.py) and take much longer.

    Args:
        positive: bool `[N]` with at least one True.
        scores: float `[N]`, larger for images that are more likely positive.
        groups: Groups of the images.
    """
    order = np.argsort(-scores)
    ranked, hits = scores[order], positive[order].astype(np.float64)
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    ends = np.r_[starts[1:], len(ranked)] - 1
    tie = np.repeat(np.arange(len(starts)), ends - starts + 1)
    everything = (ends + 1.0)[tie]
    precision = np.cumsum(hits)[ends][tie] / everything
    count = hits.sum()
    value = min(float(precision @ hits / count), 1.0)
    # Sums over the positive images ranked below or equal, from the end of the ranking.
    gain = np.cumsum((hits / everything)[::-1])[::-1][starts][tie]
    loss = np.cumsum((hits * precision / everything)[::-1])[::-1][starts][tie]
    influence = np.empty(len(scores))
    influence[order] = hits * (precision - value) + hits * gain - loss
    influence /= np.sqrt(count * max(count - 1, 1))
    out_of_order = np.zeros(len(scores), bool)
    out_of_order[order] = (hits > 0) & (precision < 1)
    if groups is not None:
        influence = groups.sum(influence)
    fewest = _count(positive, groups)
    return RankMetric(
        value, influence, fewest, _count(out_of_order, groups), max(fewest - 1, 1)
    )


def _count(chosen: np.ndarray, groups: Groups | None) -> int:
    """Counts the chosen images, or the groups with any."""
    if groups is None:
        return int(chosen.sum())
    return len(np.unique(groups.index[chosen]))
