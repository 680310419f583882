"""Outliers: images that are unlike all others, by their features."""

import numpy as np

from keras_transfer.evaluation.out_of_distribution import MOST_FITTED, OutOfDistribution
from keras_transfer.findings.finding import Finding, Suspect
from keras_transfer.findings.images import FEWEST_IMAGES, AuditedImages

_UNUSUAL = 3.0
"""Modified z-score. In six data sets, at most 1.5% of the images are above it, and at
most 6 images of one; of the images of another one, mostly 40% to all."""
_LEAST_SPREAD = 0.02  # of the logarithms of distances
_ROWS = 4_096  # whose features are in memory together


def outlier_findings(images: AuditedImages, seed: int) -> list[Finding]:
    """Finds images whose features are far from those of all others.

    The score is the distance to the nearest other image that is no copy and not of the
    same group; see `out_of_distribution`. Outliers are images whose distance is far
    above the others', by the median absolute deviation of its logarithm.

    Args:
        images: The N images.
        seed: Seed of the choice of at most 5,000 images to compare with.
    """
    if len(images) < FEWEST_IMAGES:
        return []
    distances = _distances(images, seed)
    known = np.flatnonzero(np.isfinite(distances) & (distances > 0))
    if len(known) < FEWEST_IMAGES:
        return []
    logs = np.log(distances[known].astype(np.float64))
    median = float(np.median(logs))
    spread = max(1.4826 * float(np.median(np.abs(logs - median))), _LEAST_SPREAD)
    far = known[logs > median + _UNUSUAL * spread]
    if not len(far):
        return []
    are = "is" if len(far) == 1 else "are"
    order = far[np.argsort(-distances[far], kind="stable")]
    return [
        Finding(
            kind="outliers",
            severity="low",
            message=f"{len(far):,} of {len(images):,} images {are} unlike all others; "
            "the score in audit.csv is the distance of their features to the nearest, "
            f"whose median is {np.exp(median):.2f}. Look whether they belong here.",
            suspects=tuple(
                Suspect(path=images.table.sources[i], score=float(distances[i]))
                for i in order
            ),
            figures={"images": float(len(far)), "median": float(np.exp(median))},
        )
    ]


def _distances(images: AuditedImages, seed: int) -> np.ndarray:
    """Computes float32 `[N]` distances to the nearest other image."""
    some = np.sort(np.random.default_rng(seed).permutation(len(images))[:MOST_FITTED])
    sample = images.table.select(some)
    detector = OutOfDistribution.fit(
        images.features[some], sample.targets, sample.groups, seed
    )
    parts = []
    for start in range(0, len(images), _ROWS):
        rows = slice(start, start + _ROWS)
        groups = images.table.groups[rows]
        parts.append(detector.score_left_out(images.features[rows], groups))
    return np.concatenate(parts)
