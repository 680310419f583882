"""Finds the most alike images by their features, as candidates for copies."""

from collections.abc import Iterator

import numpy as np

from keras_transfer.features.cache import Features

_DIMENSIONS = 256
"""Number of whitened principal components. Of faces cropped by 10% off each side, the
original is among the 5 nearest for 97%, but for 80% by plain features
(`tests/benchmarks/duplicates.py`). Source of whitening: Jégou and Chum 2012, "Negative
evidences and co-occurences in image retrieval"."""

_IMAGES_PER_DIMENSION = 4  # with fewer, whitening makes all images equally far
_MOST_FITTED = 10_000  # images that principal components are computed from
_MOST_COMPARED = 20_000  # images all of whose pairs are compared, in 5 s
_PER_CELL = 5_000  # images, if there are more; each is in its nearest cells
_CELLS_OF_EACH = 3
_BLOCK = 2048


def nearest_pairs(features: Features, rows: np.ndarray, k: int) -> np.ndarray:
    """Pairs images with those whose features are nearest.

    Features are compared by the cosine of whitened principal components of their
    square roots. Of more than 20,000 images, those are compared that share one of the
    three random images that are nearest to each, so time does not grow with the square.

    Args:
        features: `[N, D]`.
        rows: int64 `[n]` images to pair.
        k: Number of nearest images of each.

    Returns:
        int64 `[P, 2]` pairs of values of `rows`, smaller first, without order.
    """
    if len(rows) < 2:
        return np.zeros((0, 2), np.int64)
    white = _whitened(features, rows)
    found = [np.zeros((0, 2), np.int64)]
    for cell in _cells(white):
        inside = white[cell]
        most = min(k, len(cell) - 1)
        if most < 1:
            continue
        for start in range(0, len(cell), _BLOCK):
            alike = inside[start : start + _BLOCK] @ inside.T
            own = np.arange(len(alike))
            alike[own, start + own] = -np.inf
            nearest = np.argpartition(-alike, most - 1, axis=1)[:, :most]
            one = np.repeat(cell[start : start + _BLOCK], most)
            found.append(np.stack([one, cell[nearest.ravel()]], axis=1))
    pairs = np.unique(np.sort(np.concatenate(found), axis=1), axis=0)
    return np.sort(rows[pairs], axis=1)


def _whitened(features: Features, rows: np.ndarray) -> np.ndarray:
    """Computes float32 `[n, d]` whitened components of length 1."""
    rng = np.random.default_rng(0)
    some = np.sort(rng.permutation(rows)[:_MOST_FITTED])
    sample = np.concatenate([*_rooted(features, some)])
    mean = sample.mean(0)
    sample -= mean
    covariance = sample.T @ sample / len(sample)
    variances, axes = np.linalg.eigh(covariance)
    count = min(_DIMENSIONS, max(len(rows) // _IMAGES_PER_DIMENSION, 1))
    is_used = (np.arange(len(variances)) >= len(variances) - count) & (
        variances > 1e-6 * variances[-1]
    )
    if not is_used.any():  # all images have the same features
        is_used[-1] = True
    axes = axes[:, is_used] / np.sqrt(np.maximum(variances[is_used], 1e-12))
    parts = [_unit((block - mean) @ axes) for block in _rooted(features, rows)]
    return np.concatenate(parts).astype(np.float32)


def _rooted(features: Features, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yields blocks of the signed square roots of features, of length 1."""
    for start in range(0, len(rows), _BLOCK):
        block = features[rows[start : start + _BLOCK]].astype(np.float32)
        block = block.reshape(len(block), -1)
        yield _unit(np.sign(block) * np.sqrt(np.abs(block)))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)


def _cells(white: np.ndarray) -> list[np.ndarray]:
    """Returns the images that are compared with each other, as int64 indices."""
    count = len(white)
    if count <= _MOST_COMPARED:
        return [np.arange(count)]
    cells = max(_CELLS_OF_EACH, _CELLS_OF_EACH * count // _PER_CELL)
    centers = white[np.random.default_rng(0).permutation(count)[:cells]]
    nearest = np.concatenate(
        [
            np.argpartition(-white[i : i + _BLOCK] @ centers.T, _CELLS_OF_EACH, axis=1)
            for i in range(0, count, _BLOCK)
        ]
    )[:, :_CELLS_OF_EACH]
    return [np.flatnonzero((nearest == cell).any(1)) for cell in range(cells)]
