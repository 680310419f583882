"""Whether two ways of computing agree, measured on real images."""

import numpy as np

PARITY_IMAGES = 64
PARITY_AGREEMENT = 0.99
PARITY_TOLERANCE = {"f32": 1e-3, "bf16": 0.05}
"""How far a model may be from what cached features say, in probability, by the
arithmetic of the features."""


def parity(
    expected: np.ndarray, actual: np.ndarray, tolerance: float
) -> dict[str, float]:
    """How far two `[N, num_classes]` probabilities of the same images are apart.

    Returns:
        `images`, `top1_agreement` (0 to 1), `max_probability_difference`, `tolerance`;
        of no images, full agreement. Classes agree if they are the same, or as likely
        as each other but for the tolerance: which of these comes first is chance, and
        several classes of multi-label data may be certain.
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
    """Whether a parity is good enough."""
    return (
        parity["top1_agreement"] >= PARITY_AGREEMENT
        and parity["max_probability_difference"] <= parity["tolerance"]
    )
