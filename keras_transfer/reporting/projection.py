"""Features -> a map: points that are near each other are similar images."""

from typing import Literal

import numpy as np
import threadpoolctl

from keras_transfer.errors import UsageError

Method = Literal["pca", "tsne"]

MOST_EMBEDDED = 2_000
"""Images that t-SNE takes at most: with these it takes 4 s of CPU time."""

LEAST_EMBEDDED = 5
"""Images that t-SNE takes at least."""

_MOST_FITTED = 10_000  # images that find the directions of a PCA
_DIRECTIONS = 50  # of a PCA before t-SNE, as its authors do
_PERPLEXITY = 30.0


def project(features: np.ndarray, method: Method = "pca", seed: int = 0) -> np.ndarray:
    """Projects features to two dimensions.

    `pca` finds the two directions in which images differ most (on at most 10,000 of
    them), `tsne` a map in which neighbors stay neighbors. Sources: Halko et al. 2011,
    "Finding Structure with Randomness"; van der Maaten & Hinton 2008, "Visualizing Data
    using t-SNE", started from a PCA (Kobak & Berens 2019).

    Args:
        features: float32 `[N, D]`.
        method: `pca`, or `tsne` for at most 2,000 images.
        seed: Seed of the sample and of random starts. The same seed gives the same map.

    Returns:
        float32 `[N, 2]`. For fewer than 5 images, `tsne` gives a PCA.

    Raises:
        UsageError: If there are too many images for `tsne`.
    """
    # Threads of these small problems wait for each other: t-SNE of 2,000 images takes
    # 4 s of CPU time with one and 18 s with two on two busy cores.
    with threadpoolctl.threadpool_limits(1):
        if method == "pca" or len(features) < LEAST_EMBEDDED:
            return _principal(features, 2, seed)
        return _neighbors(features, seed)


def _neighbors(features: np.ndarray, seed: int) -> np.ndarray:
    """Returns the float32 `[N, 2]` t-SNE map."""
    if len(features) > MOST_EMBEDDED:
        raise UsageError(
            f"A t-SNE map has at most {MOST_EMBEDDED:,} images. Received: "
            f"{len(features):,}. Use method='pca', or fewer images."
        )
    from sklearn.manifold import TSNE

    reduced = _principal(features, _DIRECTIONS, seed)
    embedding = TSNE(
        init="pca",
        perplexity=min(_PERPLEXITY, (len(features) - 1) / 3),
        random_state=seed,
        max_iter=500,
    )
    return embedding.fit_transform(reduced).astype(np.float32)


def _principal(features: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Returns float32 `[N, count]` principal components, zero where there are fewer."""
    from sklearn.utils.extmath import randomized_svd

    rows = np.arange(len(features))
    if len(rows) > _MOST_FITTED:
        rng = np.random.default_rng(seed)
        rows = np.sort(rng.choice(len(rows), _MOST_FITTED, replace=False))
    fitted = features[rows]
    mean = fitted.mean(0)
    found = np.zeros((len(features), count), np.float32)
    kept = min(count, *fitted.shape)
    if kept:
        _, _, directions = randomized_svd(
            fitted - mean, kept, random_state=seed, flip_sign=False
        )
        # The sign of a direction is arbitrary: its largest entry is positive.
        largest = np.abs(directions).argmax(1)
        directions *= np.sign(directions[np.arange(kept), largest])[:, None]
        found[:, :kept] = (features - mean) @ directions.T
    return found
