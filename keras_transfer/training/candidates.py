"""A head that could be chosen, with its out-of-fold predictions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Candidate:
    """A head that could be chosen, with its out-of-fold predictions.

    Attributes:
        l2: Its L2 strength.
        epoch: Number of L-BFGS iterations, or of epochs.
        loss: Mean weighted cross-entropy of the training images in nats, without the L2
            term.
        val_loss: The same of the images that were in a fold, each by the head that did
            not learn from it; NaN without folds.
        weights: Weights of the head that learned from all images, in the order of
            `build_head(...).get_weights()`, for raw features.
        out_of_fold: float32 `[n, C]` probabilities of the n images in a fold, in order,
            each by the head that did not learn from it; None without folds.
    """

    l2: float
    epoch: int
    loss: float
    val_loss: float
    weights: list[np.ndarray]
    out_of_fold: np.ndarray | None


Candidates = Callable[[float], Iterator[Candidate]]
"""Takes an L2 strength and yields candidates from fewer to more epochs. Strengths are
given from strong to weak, as each solution is the start of the next."""
