"""Images as an audit sees them, made from arrays."""

import numpy as np
import pyarrow as pa

from keras_transfer.data.quality import FILE_TYPES, QUALITY_DTYPE
from keras_transfer.data.tables import Table
from keras_transfer.findings.images import AuditedImages


def audited(
    targets: np.ndarray,
    sources: list[str] | None = None,
    groups: list[str] | None = None,
    features: np.ndarray | None = None,
    columns: dict[str, object] | None = None,
    names: tuple[str, ...] | None = None,
    **quality: object,
) -> AuditedImages:
    """Makes N images that are alike in all that is not given.

    Keywords set fields of the quality measures. Nothing can be read.
    """
    count = len(targets)
    rows = np.zeros(count, QUALITY_DTYPE)
    alike = {
        **{"bytes": 1000, "width": 64, "height": 64, "jpeg_quality": 90},
        **{"brightness": 100, "contrast": 50, "sharpness": 5},
        "file_type": FILE_TYPES.index("JPEG"),
    }
    for name, values in (alike | quality).items():
        rows[name] = values
    classes = targets.max() + 1 if targets.ndim == 1 else targets.shape[1]
    sources = sources or [f"{i}.jpg" for i in range(count)]
    return AuditedImages(
        Table(tuple(sources), targets, tuple(groups or [""] * count)),
        np.repeat("train", count),
        names or tuple(f"class {i}" for i in range(classes)),
        targets.ndim == 2,
        [str(i).encode().rjust(32) for i in range(count)],
        rows,
        np.zeros((count, 1), np.float32) if features is None else features,
        lambda _: iter(()),
        pa.table(columns) if columns else None,
        True,
    )
