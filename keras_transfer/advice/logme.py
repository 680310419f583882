"""LogME: how well a base's features suit a task, without training a network."""

import math

import numpy as np

_MOST_IMAGES = 5000
_LOGME_STEPS = 100
_LOGME_TOLERANCE = 1e-5


def logme(
    features: np.ndarray, targets: np.ndarray, num_classes: int, seed: int = 0
) -> float:
    """Computes LogME, the log evidence of one-versus-rest linear models on features.

    The models are Bayesian linear regressions of 0/1 labels with the prior
    w ~ N(0, I / alpha) and the noise variance 1 / beta, where alpha and beta maximize
    the evidence. Higher is better. No images are held out. Source: You et al. 2021,
    "LogME: Practical Assessment of Pre-trained Models for Transfer Learning",
    arXiv:2102.11005, equations 2 to 5, with the fixed-point iteration of algorithm 1.

    Args:
        features: float `[N, D]`.
        targets: int `[N]` class indices, or 0/1 `[N, num_classes]`.
        num_classes: Number of classes.
        seed: Seed of the sample that is drawn if there are more than 5,000 images.

    Returns:
        The mean over classes of the maximum log evidence per image, in nats. Classes
        that all images or none of them show are excluded, because their evidence is
        unbounded. NaN if no class remains.
    """
    picked = np.random.default_rng(seed).permutation(len(features))[:_MOST_IMAGES]
    features, targets = features[picked].astype(np.float64), targets[picked]
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    if targets.ndim == 1:
        targets = targets[:, None] == np.arange(num_classes)
    labels = [label for label in (targets.T > 0) if label.any() and not label.all()]
    found = [_evidence(left, singular**2, features.shape[1], x) for x in labels]
    return float(np.mean(found)) if found else math.nan


def _evidence(
    left: np.ndarray, squares: np.ndarray, dimension: int, label: np.ndarray
) -> float:
    """Computes the maximum log evidence per image for one class.

    Args:
        left: `[N, K]` left singular vectors of the features.
        squares: `[K]` squared singular values.
        dimension: Number of features, D.
        label: bool `[N]`, whether each image shows the class.
    """
    count, label = len(label), label.astype(np.float64)
    projected = (left.T @ label) ** 2
    outside = max(float(label @ label - projected.sum()), 0.0)
    alpha = beta = 1.0
    for _ in range(_LOGME_STEPS):
        before = alpha / beta
        ratio = alpha / beta
        effective = float((squares / (squares + ratio)).sum())
        weight_norm = float((squares * projected / (squares + ratio) ** 2).sum())
        residual = (
            float((ratio**2 * projected / (squares + ratio) ** 2).sum()) + outside
        )
        alpha = effective / max(weight_norm, 1e-12)
        beta = (count - effective) / max(residual, 1e-12)
        if abs(alpha / beta - before) <= _LOGME_TOLERANCE * before:
            break
    ratio = alpha / beta
    weight_norm = float((squares * projected / (squares + ratio) ** 2).sum())
    residual = float((ratio**2 * projected / (squares + ratio) ** 2).sum()) + outside
    # log det(alpha I + beta F^T F), including the directions that F does not span
    log_determinant = float(np.log(alpha + beta * squares).sum())
    log_determinant += (dimension - len(squares)) * np.log(alpha)
    evidence = (
        count * np.log(beta)
        + dimension * np.log(alpha)
        - count * np.log(2 * np.pi)
        - beta * residual
        - alpha * weight_norm
        - log_determinant
    ) / 2
    return float(evidence / count)
