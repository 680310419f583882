"""Audited images that the tests make, without files."""

from collections.abc import Sequence

import numpy as np

from keras_transfer.data.quality import QUALITY_DTYPE
from keras_transfer.data.tables import Table
from keras_transfer.findings.images import AuditedImages


def quality_of(count: int, seed: int = 0) -> np.ndarray:
    """Quality of usual photos, which vary a bit."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(count, QUALITY_DTYPE)
    rows["bytes"] = 20_000
    rows["width"] = rng.integers(380, 420, count)
    rows["height"] = rng.integers(280, 320, count)
    rows["brightness"] = rng.uniform(90, 150, count)
    rows["contrast"] = rng.uniform(40, 60, count)
    rows["sharpness"] = np.exp(rng.normal(6, 0.5, count))
    return rows


def audited(
    targets: Sequence[int] | np.ndarray,
    *,
    split: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    quality: np.ndarray | None = None,
    features: np.ndarray | None = None,
    class_names: Sequence[str] = ("cat", "dog"),
) -> AuditedImages:
    """Images called 0, 1, 2, ... with the given properties."""
    targets = np.asarray(targets)
    count = len(targets)
    names = tuple(map(str, range(count)))
    return AuditedImages(
        Table(names, targets, tuple(groups or [""] * count)),
        np.array(split or ["train"] * count),
        tuple(class_names),
        targets.ndim == 2,
        [name.encode() for name in names],
        quality_of(count) if quality is None else quality,
        np.zeros((count, 4), np.float32) if features is None else features,
        lambda sources: iter(()),
        None,
        False,
    )
