"""The image table of a run, with one row per image.

`images.parquet` is the machine-readable and more detailed counterpart of `splits.csv`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from keras_transfer.data.cells import utf8
from keras_transfer.data.quality import FILE_TYPES, QUALITY_DTYPE
from keras_transfer.data.tables import Extra, Splits
from keras_transfer.events import Listener
from keras_transfer.features.extraction import Extraction

_CODED = ("file_type", "jpeg_quality")  # columns whose numbers are codes


def image_table(splits: Splits, extraction: Extraction) -> pa.Table:
    """Builds the table of all images of a run, including unusable ones.

    Args:
        splits: All images.
        extraction: Digests, quality measures and reasons.

    Returns:
        A table with the columns `source`, `label`, `split`, `group`, `sha256` (32
        bytes; null if the image is unusable), `reason` (why the image is unusable, else
        null) and those of `quality.QUALITY_DTYPE`. The latter are null if they could
        not be measured or kept; `jpeg_quality` is also null if it is not a JPEG. With
        weights, there is `sample_weight` too. Further columns of the data follow, with
        `table_` before a name that is one of the others in any case of its letters.
    """
    sources = [source for _, table in splits.items() for source in table.sources]
    names = np.repeat([*dict(splits.items())], [len(x) for _, x in splits.items()])
    labels = [splits.label(y) for _, table in splits.items() for y in table.targets]
    groups = [group for _, table in splits.items() for group in table.groups]
    digests = [extraction.digests.get(source) for source in sources]
    reasons = [extraction.skipped.get(source) for source in sources]
    columns = {
        "source": pa.array(map(utf8, sources), pa.string()),
        "label": pa.array(labels, pa.string()).dictionary_encode(),
        "split": pa.array(names).dictionary_encode(),
        "group": pa.array(map(utf8, groups), pa.string()),
        "sha256": pa.array(digests, pa.binary(32)),
        "reason": pa.array(reasons, pa.string()),
    }
    if splits.train.sample_weight is not None:
        parts = (table.sample_weight for _, table in splits.items())
        weights = [part for part in parts if part is not None]
        columns["sample_weight"] = pa.array(np.concatenate(weights), pa.float32())
    columns |= _quality_columns(extraction.quality(sources))
    if splits.extra is not None:
        columns |= _further_columns(splits.extra, sources, columns.keys())
    return pa.table(columns)


def _further_columns(
    extra: Extra, sources: Sequence[str], names: Iterable[str]
) -> dict[str, pa.ChunkedArray]:
    """Returns columns of the data, under names that are not taken."""
    rows = pa.array([extra.rows[source] for source in sources], pa.int64())
    own, taken = {name.lower() for name in names}, {*extra.table.column_names}
    columns = {}
    for name in extra.table.column_names:
        new = name
        while new.lower() in own or (new != name and new in taken):
            new = f"table_{new}"
        taken.add(new)
        columns[new] = extra.table.column(name).take(rows)
    return columns


def _quality_columns(rows: np.ndarray) -> dict[str, pa.Array]:
    is_unknown = rows["bytes"] == 0
    columns = {
        name: pa.array(np.ascontiguousarray(rows[name]), mask=is_unknown)
        for name in rows.dtype.names or ()
        if name not in _CODED
    }
    quality = np.ascontiguousarray(rows["jpeg_quality"])
    columns["jpeg_quality"] = pa.array(quality, mask=quality == 0)
    kinds = pa.array(rows["file_type"].astype(np.int8), mask=is_unknown)
    columns["file_type"] = pa.DictionaryArray.from_arrays(kinds, list(FILE_TYPES))
    return columns


def known_images(path: Path, listener: Listener) -> dict[str, tuple[str, bytes]]:
    """Reads the split and the digest of a run's usable images.

    Args:
        path: Path of the image table, which runs of early versions do not have.
        listener: Receives a note if the table is damaged.

    Returns:
        (split, SHA-256) by source; nothing if there is no table.
    """
    try:
        # From bytes, because pyarrow takes only paths that are valid UTF-8.
        source = pa.BufferReader(path.read_bytes())
        table = pq.read_table(source, columns=["source", "split", "sha256"])
    except FileNotFoundError:
        return {}
    except (OSError, pa.ArrowException):
        listener.note(f"{path} is damaged: images that changed cannot be told")
        return {}
    return {
        source: (split, digest)
        for source, split, digest in zip(
            *(column.to_pylist() for column in table.columns), strict=True
        )
        if digest is not None
    }


def known_hashes(path: Path, sources: Sequence[str]) -> np.ndarray:
    """Reads what perceptual hashes tell copies by from the image table of a run.

    Args:
        path: Path of the image table.
        sources: The images.

    Returns:
        `[N]` of `quality.QUALITY_DTYPE` with only `contrast` and `perceptual_hash`;
        zeros for images that were not measured, and if there is no table.
    """
    rows = np.zeros(len(sources), QUALITY_DTYPE)
    names = ["source", "contrast", "perceptual_hash"]
    try:
        table = pq.read_table(pa.BufferReader(path.read_bytes()), columns=names)
    except (OSError, pa.ArrowException):
        return rows
    columns = (column.to_pylist() for column in table.columns)
    known = {source: found for source, *found in zip(*columns, strict=True)}
    for row, source in zip(rows, sources, strict=True):
        contrast, hash_ = known.get(utf8(source), (None, None))
        if contrast is not None and hash_ is not None:
            row["contrast"], row["perceptual_hash"] = contrast, hash_
    return rows


def changed_images(
    known: Mapping[str, tuple[str, bytes]], digests: Mapping[str, bytes]
) -> list[str]:
    """Returns the sources whose bytes have changed since the run was made.

    Args:
        known: Result of `known_images`.
        digests: Current SHA-256 of images, by source.
    """
    return [
        source
        for source, digest in digests.items()
        if known.get(utf8(source), ("", digest))[1] != digest
    ]


def trained_images(
    known: Mapping[str, tuple[str, bytes]], digests: Mapping[str, bytes]
) -> list[str]:
    """Returns the sources that are identical to training images of the run.

    Args:
        known: Result of `known_images`.
        digests: SHA-256 of images, by source.
    """
    trained = {digest for split, digest in known.values() if split == "train"}
    return [source for source, digest in digests.items() if digest in trained]
