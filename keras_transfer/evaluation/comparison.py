"""Two models on the same images -> which is better, and how sure that is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
from sklearn import metrics

from keras_transfer.evaluation.metrics import deciding_metric, evaluate

MAX_P_VALUE = 0.25
"""Above this a better figure is taken for an accident. Strict enough to turn down one
image more in a handful, lenient enough for the small validation sets there are."""

_BOOTSTRAP_ROUNDS = 300


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images.

    Attributes:
        metric: `accuracy`, or of multi-label data `mean_average_precision`.
        before: The metric of the first model.
        after: The metric of the second.
        p_value: How likely it is to see the second this much better, or more, if it
            is not better at all.
    """

    metric: str
    before: float
    after: float
    p_value: float

    @property
    def is_better(self) -> bool:
        """Whether the second model is better, and that is no mere accident."""
        return self.after > self.before and self.p_value <= MAX_P_VALUE


def compare(
    targets: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    class_names: Sequence[str],
    seed: int = 0,
) -> Comparison:
    """Tests whether one model is better than another, on the same images.

    Of single-label data with McNemar's exact test (1947): only images that one model
    has right and the other wrong tell them apart, and if neither is better, each of
    those falls to either side like a coin. Of multi-label data, whose mean average
    precision is not a mean over images, with a paired bootstrap (Efron 1979): the
    share of resampled sets of images on which the second model is not better.

    Args:
        targets: As for `evaluate`.
        before: float32 `[N, num_classes]` probabilities of the first model.
        after: float32 `[N, num_classes]` probabilities of the second.
        class_names: In the order of the columns.
        seed: Of the bootstrap.
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
