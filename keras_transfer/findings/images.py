"""What an audit looks at: all usable images of DATA, row by row."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from keras_transfer.data.reading import Reader
from keras_transfer.data.tables import Splits, Table
from keras_transfer.features.cache import Features
from keras_transfer.features.frozen_part import FrozenFeatures
from keras_transfer.findings.finding import counted

FEWEST_IMAGES = 30
"""Images that shortcuts and outliers are looked for in; fewer show nothing."""


@dataclass(frozen=True, eq=False, repr=False)
class AuditedImages:
    """N usable images with everything that is known of them.

    Attributes:
        table: Their sources, targets, groups and weights.
        split: str `[N]` name of the split of each image.
        class_names: Class names in the order of the targets.
        multi_label: Whether an image may show several classes, or none.
        digests: bytes `[N]`, SHA-256 of each image's bytes.
        quality: `[N]` of `quality.QUALITY_DTYPE`; zeros for images not measured.
        features: float32 `[N, D]` outputs of the frozen base, read on demand.
        read: Reads the encoded bytes of sources.
        extra: Further columns of the data, a row for each image; None for none.
        is_file: Whether sources are paths.
    """

    table: Table
    split: np.ndarray
    class_names: tuple[str, ...]
    multi_label: bool
    digests: list[bytes]
    quality: np.ndarray
    features: Features
    read: Reader
    extra: pa.Table | None
    is_file: bool

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"AuditedImages({counted(len(self), 'image')})"

    @classmethod
    def of(cls, splits: Splits, found: FrozenFeatures) -> "AuditedImages":
        """Puts the images of all splits in one table: train, val, test.

        Args:
            splits: The usable images.
            found: Their features, with quality measures.
        """
        parts = dict(splits.items())
        table = splits.train.joined(splits.val).joined(splits.test)
        extra = None
        if splits.extra is not None:
            rows = [splits.extra.rows[source] for source in table.sources]
            extra = splits.extra.table.take(pa.array(rows, pa.int64()))
        return cls(
            table,
            np.repeat([*parts], [len(part) for part in parts.values()]),
            splits.class_names,
            splits.multi_label,
            [found.extraction.digests[source] for source in table.sources],
            found.extraction.quality(table.sources),
            found.rows(table.sources),
            splits.read,
            extra,
            splits.root is not None,
        )
