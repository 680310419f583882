"""Weighted cross-entropy: categorical for single-label, binary for multi-label data.

Targets and weights are float32 `[N, C]`, one value per image and class. For
single-label data, targets are one-hot and all weights in a row are equal.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special

from keras_transfer.evaluation.metrics import LEAST_PROBABILITY


def logit_losses(
    logits: np.ndarray, targets: np.ndarray, weights: np.ndarray, multi_label: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the loss of each class of each image and its gradient.

    Args:
        logits: float32 `[N, C]`, or `[N, H, C]` of several heads.
        targets: float32 `[N, C]`, or `[N, 1, C]`.
        weights: float32 `[N, C]`, or `[N, H, C]`.
        multi_label: Whether an image may show several classes, or none.

    Returns:
        (losses in nats, gradient of each image's total loss with respect to its
        logits), both in the shape of the logits.
    """
    if multi_label:
        # log(1 + exp(x)) - t x, and its derivative
        losses = np.logaddexp(0, logits) - targets * logits
        return weights * losses, weights * (scipy.special.expit(logits) - targets)
    shifted = logits - logits.max(-1, keepdims=True)
    exponentials = np.exp(shifted)
    totals = exponentials.sum(-1, keepdims=True)
    losses = weights * targets * (np.log(totals) - shifted)
    return losses, weights * (exponentials / totals - targets)


def probabilities_of_logits(logits: np.ndarray, multi_label: bool) -> np.ndarray:
    """Computes float32 `[N, C]` probabilities: a softmax, or a sigmoid per class."""
    if multi_label:
        return scipy.special.expit(logits).astype(np.float32)
    return scipy.special.softmax(logits, axis=-1).astype(np.float32)


def losses_of_probabilities(
    probabilities: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    multi_label: bool,
) -> np.ndarray:
    """Computes the loss of each image in nats, float32 `[N]`, from probabilities.

    The arguments are otherwise those of `logit_losses`.
    """
    kept = probabilities.astype(np.float64)
    clipped = np.clip(kept, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    losses = -targets * np.log(clipped)
    if multi_label:
        losses -= (1 - targets) * np.log(1 - clipped)
    return (weights * losses).sum(1).astype(np.float32)


def smoothed(targets: np.ndarray, fraction: float, multi_label: bool) -> np.ndarray:
    """Spreads a fraction of each label evenly over the classes.

    The weights in the loss remain those of the true labels. Source: Szegedy et al.
    2016, "Rethinking the Inception Architecture for Computer Vision", section 7.

    Args:
        targets: float32 `[N, C]`.
        fraction: The fraction, from 0 to below 1.
        multi_label: Whether an image may show several classes, or none; the fraction is
            then spread over the presence and the absence of each class.
    """
    outcomes = 2 if multi_label else targets.shape[1]
    return targets * np.float32(1 - fraction) + np.float32(fraction / outcomes)


def keras_loss(
    multi_label: bool, logit_offset: np.ndarray
) -> Callable[[Any, Any], Any]:
    """Creates the loss as a Keras loss function.

    Args:
        multi_label: Whether an image may show several classes, or none.
        logit_offset: float32 `[C]`, added to the logits; see `labelled.logit_offset`.

    Returns:
        A function from targets and weights, concatenated to `[N, 2 C]`, and logits
        `[N, C]` to losses `[N]` in nats.
    """
    import keras  # takes seconds, and weights are checked before

    def cross_entropy(targets_and_weights: Any, logits: Any) -> Any:
        targets, weights = keras.ops.split(targets_and_weights, 2, axis=-1)
        logits = logits + logit_offset
        if multi_label:
            losses = keras.ops.softplus(logits) - targets * logits
        else:
            losses = -targets * keras.ops.log_softmax(logits)
        return keras.ops.sum(weights * losses, axis=-1)

    return cross_entropy
