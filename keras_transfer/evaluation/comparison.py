"""Compares two models on the same images and tests the difference."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

from keras_transfer.evaluation.intervals import Groups, Interval, Z
from keras_transfer.evaluation.metrics import score

LEVEL = 0.13
"""Largest p-value of a gain that is not attributed to chance, for a single attempt.

It keeps at most 15% of the models that are no better, whatever the number of images;
the choice of the mix on the other half of the images is included
(`tests/benchmarks/honesty.py gate`)."""

FEWEST_INFORMATIVE = 3
"""Images, or groups, for which the models have to differ before one counts as better.

Of two, both favor the second model in a quarter of the cases if it is no better; the
mid-p value of that is 1/8, which `LEVEL` would let pass."""

_ROUNDS = 2000
_ROUNDS_OF_RANKS = 300  # each sorts all images once per class
_TIE = 1e-9  # larger than rounding errors, smaller than what one image changes


@dataclass(frozen=True)
class Comparison:
    """The comparison of two models on the same images.

    Attributes:
        metric: A name that `metrics.deciding_metric` returns.
        before: Metric of the first model: the log loss in nats, others from 0 to 1.
        after: Metric of the second model.
        p_value: Probability of a gain at least this large if the second model is not
            better, from 0 to 1; half of the probability of exactly this gain counts.
        attempts: Number of models that were compared with the first one so far.
        images: Number of images.
        spread: Standard deviation of the gain if the models are equally good, in the
            unit of the metric.
        informative: Number of images, or groups, for which the models differ in a way
            that can change the metric.
        units: Number of images, or of groups if any image has one.
    """

    metric: str
    before: float
    after: float
    p_value: float
    attempts: int = 1
    images: int = 0
    spread: float = 0.0
    informative: int = 0
    units: int = 0

    @property
    def gain(self) -> float:
        """How much better the second model is; negative if it is worse."""
        difference = self.after - self.before
        return -difference if self.metric == "log_loss" else difference

    @property
    def interval(self) -> Interval:
        """95% confidence interval of the gain.

        A normal one, to whose variance an image (or group) is added that only the first
        model gets right, and one that only the second does: without them, models that
        do not differ for any image would be known to be equal. After Bonett & Price
        2012,
        "Adjusted Wald Confidence Interval for a Difference of Binomial Proportions
        Based on Paired Data", Journal of Educational and Behavioral Statistics 37.
        """
        units = max(self.units, 1)
        variance = max(self.spread**2 - self.gain**2 / units, 0) + 2 / units**2
        half = Z * math.sqrt(variance)
        most = math.inf if self.metric == "log_loss" else 1.0
        return max(-most, self.gain - half), min(most, self.gain + half)

    @property
    def level(self) -> float:
        """Largest p-value of a gain that is not attributed to chance.

        The k-th attempt has to pass `LEVEL` / k, so that it does not pay to try until
        chance helps. This bounds each attempt: in the k-th, a model that is no better
        is kept with a probability of about `LEVEL` / k. Over all attempts these add up,
        to `LEVEL` (1 + 1/2 + ... + 1/k): with Bonferroni's correction proper, the
        number of attempts would have to be known before the first one.
        """
        return LEVEL / self.attempts

    @property
    def is_better(self) -> bool:
        """Whether the second model is better by more than chance may explain."""
        is_clear = self.gain > 0 and self.p_value <= self.level
        return is_clear and self.informative >= FEWEST_INFORMATIVE


def compare(
    metric: str,
    targets: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    groups: Sequence[str] = (),
    attempts: int = 1,
    seed: int = 0,
) -> Comparison:
    """Tests whether the second of two models is better than the first, one-sided.

    For the accuracy on images without groups, this is `mcnemar`. Otherwise it is a
    paired permutation test (Pitman 1937): if the models are equally good, the
    predictions of both for all images of a group may be swapped, and the gain is
    compared with that after swapping random groups. For metrics of ranks (`auc` and
    `mean_average_precision`), ranks are swapped instead of probabilities, so that it
    does not matter if one model is more confident (Venkatraman & Begg 1996).

    Args:
        metric: A name that `metrics.deciding_metric` returns.
        targets: As for `metrics.evaluate`.
        before: float32 `[N, num_classes]` probabilities of the first model.
        after: float32 `[N, num_classes]` probabilities of the second model.
        groups: Group of each image, "" for none; empty if no image has one.
        attempts: Number of models compared with the first one, including this one.
        seed: Seed of the permutations.
    """
    first, second = (score(metric, targets, p) for p in (before, after))
    if metric == "accuracy" and not any(groups):
        was_right, is_right = (p.argmax(1) == targets for p in (before, after))
        gained = int((is_right & ~was_right).sum())
        lost = int((was_right & ~is_right).sum())
        p_value, informative = float(mcnemar(gained, lost)), gained + lost
        units = len(targets)
        spread = math.sqrt(informative) / max(len(targets), 1)
    else:
        grouped, rng = Groups.of(groups), np.random.default_rng(seed)
        numbers = np.arange(len(targets)) if grouped is None else grouped.index
        units = int(numbers.max(initial=-1)) + 1
        gains, informative = _permuted_gains(
            metric, targets, (before, after), numbers, rng
        )
        # The observed gain is one of the permutations (Phipson & Smyth 2010).
        larger, equal = gains > gains[0] + _TIE, abs(gains - gains[0]) <= _TIE
        p_value = float(np.mean(larger + equal / 2))
        spread = float(gains[1:].std())
    sign = -1 if metric == "log_loss" else 1
    return Comparison(
        metric,
        sign * first,
        sign * second,
        p_value,
        attempts,
        len(targets),
        spread,
        informative,
        units,
    )


def mcnemar(gained: np.ndarray | int, lost: np.ndarray | int) -> np.ndarray:
    """Computes one-sided p-values of McNemar's test (1947) in its mid-p version.

    Only images that exactly one of the models classifies correctly are informative. If
    the models are equally good, each of these favors either with probability 1/2. The
    outcome itself counts half, which keeps the test from being too strict where few
    images differ (Fagerland et al. 2013, "The McNemar test for binary matched-pairs
    data", BMC Medical Research Methodology 13).

    Args:
        gained: Number of images that only the second model classifies correctly.
        lost: Number of images that only the first model classifies correctly.
    """
    coin = scipy.stats.binom(np.add(gained, lost), 0.5)
    return np.asarray(coin.sf(gained) + coin.pmf(gained) / 2)


def images_needed(
    comparison: Comparison,
    gain: float = 0.05,
    power: float = 0.8,
    level: float | None = None,
) -> int:
    """Estimates how many images it takes to recognize a gain.

    The spread of a gain shrinks with the square root of the number of images. It takes
    (z_level + z_power)^2 * variance / gain^2 images, where the variance is that of one
    image (Connor 1987, for McNemar's test). A gain of 0.05 in accuracy takes at least
    5% of images that one model alone classifies correctly, so the variance is at least
    as large as the gain. The same is assumed of other metrics from 0 to 1.

    Args:
        comparison: A comparison whose spread is extrapolated; not by the log loss,
            which has no fixed scale.
        gain: The true gain, in the unit of the metric.
        power: Probability of recognizing it, between 0 and 1.
        level: Largest one-sided p-value of a gain that is recognized; None for that of
            the comparison.
    """
    variance = max(comparison.images * comparison.spread**2, gain)
    z = scipy.stats.norm.isf(level or comparison.level) + scipy.stats.norm.ppf(power)
    return math.ceil(z**2 * variance / gain**2)


def best_candidate(
    metric: str, targets: np.ndarray, candidates: Mapping[float, np.ndarray]
) -> float:
    """Returns the key of the best predictions; the log loss breaks ties.

    Args:
        metric: A name that `metrics.deciding_metric` returns.
        targets: As for `metrics.evaluate`.
        candidates: float32 `[N, num_classes]` probabilities by key.
    """
    return max(
        candidates,
        key=lambda key: tuple(
            score(name, targets, candidates[key]) for name in (metric, "log_loss")
        ),
    )


def _permuted_gains(
    metric: str,
    targets: np.ndarray,
    pair: tuple[np.ndarray, np.ndarray],
    numbers: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, int]:
    """Computes the gain as it is, and after random swaps.

    Args:
        metric: A name that `metrics.deciding_metric` returns.
        targets: As for `metrics.evaluate`.
        pair: `[N, num_classes]` probabilities of the first and of the second model.
        numbers: int64 `[N]` number of each image's group, starting at 0.
        rng: Source of the random swaps.

    Returns:
        (float64 `[1 + rounds]` gains, number of groups whose swap can change them).
    """
    count = int(numbers.max(initial=-1)) + 1
    if metric in ("accuracy", "balanced_accuracy", "log_loss"):
        # A sum over images: swapping a group changes the sign of its part of the gain.
        first, second = (_contributions(metric, targets, p) for p in pair)
        parts = np.bincount(numbers, second - first, count)
        parts = parts[parts != 0]
        signs = (rng.choice((-1.0, 1.0), len(parts)) for _ in range(_ROUNDS))
        return np.array([parts.sum(), *(sign @ parts for sign in signs)]), len(parts)
    if metric == "macro_f1":
        rounds, both = _ROUNDS, np.stack([_predictions(targets, p) for p in pair])
    else:
        rounds = _ROUNDS_OF_RANKS
        both = np.stack([scipy.stats.rankdata(p, axis=0) for p in pair])
    differs = np.bincount(numbers, (both[0] != both[1]).any(1), count) > 0
    rows, gains = np.arange(len(targets)), []
    for i in range(1 + rounds):
        swap = rng.integers(0, 2, count)[numbers] if i else np.zeros_like(rows)
        one, other = (score(metric, targets, both[k, rows]) for k in (swap, 1 - swap))
        gains.append(other - one)
    return np.array(gains), int(differs.sum())


def _contributions(
    metric: str, targets: np.ndarray, probabilities: np.ndarray
) -> np.ndarray:
    """Computes float64 `[N]` parts, one per image, whose sum is `metrics.score`."""
    of_image = "log_loss" if metric == "log_loss" else "accuracy"
    rows = (slice(i, i + 1) for i in range(len(targets)))
    values = [score(of_image, targets[row], probabilities[row]) for row in rows]
    if metric != "balanced_accuracy":
        return np.array(values) / max(len(targets), 1)
    # The mean over the classes that occur of the fraction of their images found.
    support = np.bincount(targets)
    return np.array(values) / support[targets] / np.count_nonzero(support)


def _predictions(targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Returns bool `[N, num_classes]`: the classes predicted for each image."""
    if targets.ndim == 2:
        return probabilities >= 0.5
    return probabilities.argmax(1)[:, None] == np.arange(probabilities.shape[1])
