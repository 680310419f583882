"""Agreement of two ways of computing predictions, measured on real images."""

import numpy as np

PARITY_IMAGES = 64
"""Number of images on which predictions are compared."""

PARITY_AGREEMENT = 0.99
"""Smallest fraction of images whose predicted classes must agree."""

PARITY_TOLERANCE = {"f32": 1e-3, "bf16": 0.05}
"""Largest difference in probability between a model and its head on cached features, by
the arithmetic of the features."""


def parity(
    expected: np.ndarray, actual: np.ndarray, tolerance: float
) -> dict[str, float]:
    """Compares two predictions for the same images.

    Args:
        expected: `[N, num_classes]` probabilities.
        actual: `[N, num_classes]` probabilities.
        tolerance: Largest acceptable difference of probabilities.

    Returns:
        `images` (N), `top1_agreement` (0 to 1), `max_probability_difference` (0 to 1)
        and `tolerance`. With no images, the agreement is perfect. The predicted classes
        also count as agreeing if their expected probabilities differ by no more than
        the tolerance, because then their order is arbitrary. With multi-label data,
        several classes may be certain.
    """
    images = len(expected)
    if not images:
        expected = actual = np.zeros((1, 1), np.float32)
    said = np.take_along_axis(expected, actual.argmax(1)[:, None], axis=1)[:, 0]
    return {
        "images": images,
        "top1_agreement": float((expected.max(1) - said <= tolerance).mean()),
        "max_probability_difference": float(np.abs(expected - actual).max()),
        "tolerance": tolerance,
    }


def is_close(parity: dict[str, float]) -> bool:
    """Returns whether the result of `parity` is good enough."""
    return (
        parity["top1_agreement"] >= PARITY_AGREEMENT
        and parity["max_probability_difference"] <= parity["tolerance"]
    )
