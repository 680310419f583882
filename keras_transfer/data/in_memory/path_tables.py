"""Turns paths with labels, and tables of other libraries, into pyarrow tables."""

import os
import reprlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_transfer.data.in_memory.class_labels import is_missing, read_weights
from keras_transfer.data.in_memory.pixels import as_array, described
from keras_transfer.errors import KerasTransferError, UsageError, first_line

if TYPE_CHECKING:
    import pyarrow as pa


def is_table(data: object) -> bool:
    """Returns whether DATA is a table of pandas, polars, pyarrow or the like."""
    return _is_pandas(data) or hasattr(data, "__arrow_c_stream__")


def _is_pandas(data: object) -> bool:
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(data, pandas.DataFrame)


def to_arrow(data: Any) -> "pa.Table":
    """Converts a table.

    Args:
        data: A pandas DataFrame, whose index is left out, or any table that has an
            Arrow stream.

    Raises:
        UsageError: If it has no columns.
    """
    import pyarrow as pa

    if _is_pandas(data):
        columns = [_to_column(column) for _, column in data.items()]
        return pa.Table.from_arrays(columns, [str(name) for name in data.columns])
    try:
        table = pa.table(data)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise UsageError(
            f"This is no table of images. Received: {type(data).__name__} "
            f"({first_line(error)}). Give a table with a column of paths and one of "
            "labels."
        ) from None
    columns = [_without_views(column) for column in table.columns]
    return pa.Table.from_arrays(columns, table.column_names)


def _without_views(column: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """Decodes a dictionary of string views, as of polars; pyarrow casts no such one."""
    import pyarrow as pa

    is_dictionary = pa.types.is_dictionary(column.type)
    if not is_dictionary or column.type.value_type != pa.string_view():
        return column
    chunks = [x.dictionary.cast(pa.string()).take(x.indices) for x in column.chunks]
    return pa.chunked_array(chunks, pa.string())


def _to_column(column: Any) -> "pa.Array | pa.ChunkedArray":
    """Converts a column of pandas; objects that Arrow does not know become strings."""
    import pyarrow as pa

    if column.dtype == object:
        column = [
            None if gone else os.fspath(cell) if isinstance(cell, os.PathLike) else cell
            for cell, gone in zip(column, column.isna(), strict=True)
        ]
    try:
        return pa.array(column, from_pandas=True)
    except (pa.ArrowException, UnicodeEncodeError):
        return _text_column(None if cell is None else str(cell) for cell in column)


def _text_column(texts: Iterable[str | None]) -> "pa.Array":
    """Converts text; what is not valid UTF-8, such as some paths, is kept as it is."""
    import pyarrow as pa

    encoded = [None if text is None else os.fsencode(text) for text in texts]
    return pa.array(encoded, pa.binary()).view(pa.string())


def pairs_table(pairs: Iterable[Any]) -> "pa.Table":
    """Reads (path, label) pairs, as `paths_table` does.

    Raises:
        UsageError: If an item is not a pair of a path and a label.
    """

    def paths() -> Iterator[object]:
        for row, pair in enumerate(pairs):
            is_pair = isinstance(pair, (tuple, list, np.ndarray)) and len(pair) == 2
            if not is_pair or not isinstance(pair[0], (str, os.PathLike)):
                raise UsageError(
                    f"Items are (path, label) pairs. Received: item {row} is "
                    f"{type(pair).__name__} {str(pair)[:60]!r}. Give arrays as a tuple "
                    "(x, y), and lists as a tuple (paths, labels)."
                )
            labels.append(pair[1])
            yield pair[0]

    labels: list[object] = []
    return paths_table(paths(), labels)


def paths_table(
    paths: Iterable[object], labels: Iterable[object], sample_weight: object = None
) -> "pa.Table":
    """Reads paths and their labels, each once.

    Args:
        paths: Paths of images.
        labels: For each path a string or integer, or a list of them.
        sample_weight: A number for each path; None for equal weights.

    Returns:
        A table with the columns path and label and, if given, sample_weight. Paths are
        absolute.

    Raises:
        UsageError: If a path or label is of another type, or if lengths differ.
        KerasTransferError: If a path is there twice, or a weight is not valid.
    """
    import pyarrow as pa

    rows = _absolute(paths)
    # An iterator of labels may have no end.
    columns = {"label": list(islice(_label_cells(labels), len(rows) + 1))}
    if (count := len(columns["label"])) != len(rows):
        more = " or more" if count > len(rows) else ""
        raise UsageError(
            f"There is one label for each path. Received: {len(rows)} paths and "
            f"{count}{more} of label."
        )
    if sample_weight is not None:
        weights = as_array(sample_weight, "sample_weight")
        columns["sample_weight"] = [*read_weights(weights, len(rows))]
    try:
        return pa.table({"path": _text_column(rows), **columns})
    except (pa.ArrowException, UnicodeEncodeError) as error:
        raise UsageError(
            "Labels are all strings, all integers or all lists of strings. Received: "
            f"{reprlib.repr(columns['label'])} ({first_line(error)})."
        ) from None


def _absolute(paths: Iterable[object]) -> dict[str, int]:
    """Returns the row of each path.

    Raises:
        UsageError: If an item is no path.
        KerasTransferError: If a path is there twice, as in an endless iterator.
    """
    rows: dict[str, int] = {}
    for row, path in enumerate(_cells(paths)):
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise UsageError(
                f"A path is a str or Path. Received: item {row} is "
                f"{type(path).__name__} {str(path)[:60]!r}."
            )
        absolute = str(Path(path).expanduser().absolute())
        if absolute in rows:
            raise KerasTransferError(
                f"A path is there once. Received: {path} as item {rows[absolute]} and "
                f"{row}. Several labels of an image go into one list."
            )
        rows[absolute] = row
    return rows


def _label_cells(labels: Iterable[object]) -> Iterator[object]:
    """Yields the labels of paths.

    Raises:
        UsageError: If they are no list or the like, or numbers in several columns.
    """
    is_other = isinstance(labels, (str, bytes, Mapping))
    is_single = getattr(labels, "ndim", 1) == 0
    if is_other or is_single or not isinstance(labels, Iterable):
        raise UsageError(
            "Labels are a list with one for each path. Received: "
            f"{type(labels).__name__}."
        )
    array = _array_of(labels)
    if array is None or array.ndim < 2:
        return _cells(labels)
    if array.ndim == 2 and array.shape[1] == 1:
        return _cells(array[:, 0])
    if array.ndim > 2 or array.dtype.kind not in "UO":
        raise UsageError(
            "The label of a path is a string, an integer or a list of strings. "
            f"Received: labels of {described(array)}. Give names of classes, or the "
            "index of one, such as y.argmax(1)."
        )
    return _cells(array)


def _array_of(column: Iterable[object]) -> np.ndarray | None:
    """Converts an array, series or tensor to NumPy; None for another kind."""
    return np.asarray(column) if hasattr(column, "__array__") else None


def _cells(column: Iterable[object]) -> Iterator[object]:
    """Yields the values of a list, array, series or iterator as Python objects.

    None stands for a missing value.
    """
    array = _array_of(column)
    for cell in column if array is None else array:
        plain = cell.item() if isinstance(cell, np.generic) else cell
        yield None if is_missing(plain) else plain
