"""Weighted cross-entropy: categorical for single-label, binary for multi-label data.

Targets and weights are float32 `[N, C]`, one value per image and class. For
single-label data, targets are one-hot and all weights in a row are equal.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import scipy.special

_EPSILON = 1e-7  # probabilities are kept this far from 0 and 1


def logit_losses(
    logits: np.ndarray, targets: np.ndarray, weights: np.ndarray, multi_label: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the loss of each class of each image and its gradient.

    Args:
        logits: float32 `[N, C]`.
        targets: float32 `[N, C]`.
        weights: float32 `[N, C]`.
        multi_label: Whether an image may show several classes, or none.

    Returns:
        (losses `[N, C]` in nats, gradient of each image's total loss with respect to
        its logits `[N, C]`).
    """
    if multi_label:
        # log(1 + exp(x)) - t x, and its derivative
        losses = np.logaddexp(0, logits) - targets * logits
        return weights * losses, weights * (scipy.special.expit(logits) - targets)
    log_probabilities = scipy.special.log_softmax(logits, axis=1)
    gradient = weights * (np.exp(log_probabilities) - targets)
    return weights * (-targets * log_probabilities), gradient


def mean_loss(
    probabilities: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    multi_label: bool,
) -> float:
    """Computes the mean loss per image in nats from `[N, C]` probabilities.

    The arguments are otherwise those of `logit_losses`.
    """
    clipped = np.clip(probabilities.astype(np.float64), _EPSILON, 1 - _EPSILON)
    losses = -targets * np.log(clipped)
    if multi_label:
        losses -= (1 - targets) * np.log(1 - clipped)
    return float((weights * losses).sum(1).mean())


def keras_loss(multi_label: bool, from_logits: bool) -> Callable[[Any, Any], Any]:
    """Creates the loss as a Keras loss function.

    Args:
        multi_label: Whether an image may show several classes, or none.
        from_logits: Whether the outputs are logits rather than probabilities.

    Returns:
        A function from targets and weights, concatenated to `[N, 2 C]`, and outputs
        `[N, C]` to losses `[N]` in nats.
    """

    def cross_entropy(targets_and_weights: Any, outputs: Any) -> Any:
        targets, weights = keras.ops.split(targets_and_weights, 2, axis=-1)
        if not from_logits:
            clipped = keras.ops.clip(outputs, _EPSILON, 1 - _EPSILON)
            losses = -targets * keras.ops.log(clipped)
            if multi_label:
                losses -= (1 - targets) * keras.ops.log(1 - clipped)
        elif multi_label:
            losses = keras.ops.softplus(outputs) - targets * outputs
        else:
            losses = -targets * keras.ops.log_softmax(outputs)
        return keras.ops.sum(weights * losses, axis=-1)

    return cross_entropy
