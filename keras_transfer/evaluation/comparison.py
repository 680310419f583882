"""Compares two models on the same images and tests the difference."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
from sklearn import metrics

from keras_transfer.evaluation.metrics import deciding_metric, evaluate

MAX_P_VALUE = 0.25
"""A gain with a larger p-value is attributed to chance. The threshold is strict enough
to reject a gain of one image among a handful that differ, and lenient enough for small
validation sets."""

_BOOTSTRAP_ROUNDS = 300


@dataclass(frozen=True)
class Comparison:
    """The comparison of two models on the same images.

    Attributes:
        metric: `accuracy`, or `mean_average_precision` for multi-label data.
        before: Metric of the first model, from 0 to 1.
        after: Metric of the second model, from 0 to 1.
        p_value: Probability of a gain at least this large if the second model is not
            better, from 0 to 1.
    """

    metric: str
    before: float
    after: float
    p_value: float

    @property
    def is_better(self) -> bool:
        """Whether the second model is better by more than chance may explain."""
        return self.after > self.before and self.p_value <= MAX_P_VALUE


def compare(
    targets: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    class_names: Sequence[str],
    seed: int = 0,
) -> Comparison:
    """Tests whether the second of two models is better than the first.

    For single-label data, this is McNemar's exact test (1947), one-sided: only images
    that exactly one of the models classifies correctly are informative, and if the
    models are equally good, each of these favors either with probability 1/2. For
    multi-label data, whose mean average precision is not a mean over images, it is a
    paired bootstrap (Efron 1979): the p-value is the fraction of resampled sets of
    images on which the second model is not better.

    Args:
        targets: As for `metrics.evaluate`.
        before: float32 `[N, num_classes]` probabilities of the first model.
        after: float32 `[N, num_classes]` probabilities of the second model.
        class_names: Class names in the order of the columns.
        seed: Seed of the bootstrap.
    """
    first, second = (evaluate(targets, p, class_names) for p in (before, after))
    if targets.ndim == 1:
        was_right = before.argmax(1) == targets
        is_right = after.argmax(1) == targets
        gained, lost = (is_right & ~was_right).sum(), (was_right & ~is_right).sum()
        p_value = float(scipy.stats.binom.sf(gained - 1, gained + lost, 0.5))
    else:
        rng = np.random.default_rng(seed)
        picks = rng.integers(0, len(targets), (_BOOTSTRAP_ROUNDS, len(targets)))
        not_better = [
            _mean_average_precision(targets[rows], after[rows])
            <= _mean_average_precision(targets[rows], before[rows])
            for rows in picks
        ]
        p_value = float(np.mean(not_better))
    name = deciding_metric(targets)
    return Comparison(name, getattr(first, name), getattr(second, name), p_value)


def _mean_average_precision(targets: np.ndarray, probabilities: np.ndarray) -> float:
    occurs = targets.any(0)
    if not occurs.any():
        return 0.0
    return metrics.average_precision_score(targets[:, occurs], probabilities[:, occurs])
