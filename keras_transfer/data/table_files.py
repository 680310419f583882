"""Lists the images that a table names: a CSV, TSV or Parquet file, or one in memory."""

import math
import os
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from keras_transfer.config import ListingConfig
from keras_transfer.data.arrow_cells import arrow_cells, parquet_cells
from keras_transfer.data.cells import Cells
from keras_transfer.data.columns import find_columns, known_names
from keras_transfer.data.reading import read_files
from keras_transfer.data.tables import LABEL_SEPARATOR, Listing, splits_of
from keras_transfer.data.text_cells import text_cells
from keras_transfer.data.weights import check_weights
from keras_transfer.errors import KerasTransferError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

_PARQUET_MAGIC = b"PAR1"
_PARQUET_SUFFIXES = (".parquet", ".pq")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # as surrogateescape decodes it
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def list_table_file(
    file: Path,
    options: ListingConfig,
    multi_label: bool,
    usual: ListingConfig | None = None,
) -> Listing:
    """Lists the images that a CSV, TSV or Parquet file names.

    Args:
        file: The file. Paths in it are absolute, or relative to its folder.
        options: Names of its columns; see `columns.find_columns`.
        multi_label: Whether images may show several classes even if none does.
        usual: Names of columns that are used if the file has them.

    Raises:
        UsageError: If the file cannot be read, or a column is missing or not told.
        KerasTransferError: If a path or a label is not valid. A split or a weight that
            is not goes into the listing's `mistake`.
    """
    cells = _read_cells(file, known_names(options) | known_names(usual or options))
    root = file.parent
    listing = Listing(read=lambda paths: read_files(paths, root), root=root)
    listing.multi_label = multi_label
    _fill(listing, cells, options, usual, Path)
    if any(_NOT_UTF8.search(source) for source in listing.sources):
        listing.warnings.append(
            f"{file} is not UTF-8. If its paths are not found, save it as UTF-8 "
            "(in Excel: CSV UTF-8)."
        )
    return listing


def list_table(
    table: "pa.Table",
    options: ListingConfig,
    multi_label: bool,
    usual: ListingConfig | None = None,
) -> Listing:
    """Lists the images that a table in memory names.

    Args:
        table: The table. Paths in it are absolute, or relative to the current
            directory; those of the listing are absolute.
        options: As in `list_table_file`.
        multi_label: As in `list_table_file`.
        usual: As in `list_table_file`.

    Raises:
        UsageError: If a column is missing or not told.
        KerasTransferError: As in `list_table_file`.
    """
    current = Path.cwd()
    root = Path(current.anchor)
    listing = Listing(read=lambda paths: read_files(paths, root), root=root)
    listing.multi_label = multi_label
    _fill(listing, arrow_cells(table), options, usual, lambda path: current / path)
    return listing


def _read_cells(file: Path, known: Collection[str]) -> Cells:
    """Opens a file, which is Parquet by its suffix or its first four bytes.

    Args:
        file: The file.
        known: As in `text_cells.text_cells`.

    Raises:
        UsageError: If the file cannot be read, is damaged or holds no table.
    """
    try:
        with file.open("rb") as opened:
            magic = opened.read(len(_PARQUET_MAGIC))
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}).") from None
    if magic == _PARQUET_MAGIC or file.suffix.lower() in _PARQUET_SUFFIXES:
        return parquet_cells(file)
    return text_cells(file, known)


def _fill(
    listing: Listing,
    cells: Cells,
    options: ListingConfig,
    usual: ListingConfig | None,
    to_path: Callable[[str], Path],
) -> None:
    """Adds the images of a table to a listing."""
    columns = find_columns(cells, options, usual)
    listing.warnings += columns.notes
    labels = cells.text(columns.label)
    listing.multi_label |= cells.kind(columns.label) == "list"
    listing.multi_label |= any(LABEL_SEPARATOR in label for label in labels)
    listing.sources = _sources(cells, cells.text(columns.path), to_path)
    listing.labels = _labels(cells, listing, labels)
    listing.splits, listing.groups = [""] * len(labels), [""] * len(labels)
    if columns.group is not None:
        listing.groups = cells.text(columns.group)
    try:
        if columns.split is not None:
            listing.splits = splits_of(
                cells.text(columns.split), lambda row: _place(cells, row)
            )
        if columns.sample_weight is not None:
            listing.sample_weight = _weights(cells, cells.text(columns.sample_weight))
    except KerasTransferError as error:
        # Frames of the traceback would keep the table in memory.
        listing.mistake = error.with_traceback(None)
    if columns.further:
        listing.extra = cells.typed(columns.further)


def _sources(
    cells: Cells, paths: Sequence[str], to_path: Callable[[str], Path]
) -> list[str]:
    """Converts the cells with paths to sources.

    Raises:
        KerasTransferError: If a path is empty, a URL, or there twice.
    """
    rows: dict[str, int] = {}
    for row, path in enumerate(paths):
        if not path:
            raise _mistake(cells, row, "the path is empty.")
        if _URL.match(path):
            raise _mistake(
                cells,
                row,
                f"a path is that of a file. Received: {path}. Download the images, and "
                "name their files.",
            )
        path = os.path.expanduser(path) if path.startswith("~") else path
        source = to_path(path).as_posix()
        first = rows.setdefault(source, row)
        if first != row:
            raise _mistake(
                cells,
                row,
                f"{source} is on {cells.row(first)} already. Remove one. Several "
                f"labels go into one {cells.row(row).split()[0]}, separated by "
                f"{LABEL_SEPARATOR!r}.",
            )
    return list(rows)


def _labels(
    cells: Cells, listing: Listing, labels: Sequence[str]
) -> list[tuple[str, ...]]:
    """Divides the cells with labels into names of classes.

    Raises:
        KerasTransferError: If an image has no label, though data are single-label.
    """
    names_of = {
        label: tuple(
            dict.fromkeys(filter(None, map(str.strip, label.split(LABEL_SEPARATOR))))
        )
        for label in {*labels}
    }
    found = [names_of[label] for label in labels]
    if not listing.multi_label and () in names_of.values():
        row = found.index(())
        raise _mistake(
            cells,
            row,
            f"{listing.sources[row]} has no label. Add one, or remove it.",
        )
    return found


def _weights(cells: Cells, texts: Sequence[str]) -> list[float]:
    weights = []
    for text in texts:
        try:
            weights.append(float(text))
        except ValueError:
            weights.append(math.nan)
    check_weights(np.array(weights), texts, lambda row: _place(cells, row))
    return weights


def _mistake(cells: Cells, row: int, message: str) -> KerasTransferError:
    return KerasTransferError(f"{_place(cells, row)}: {message}")


def _place(cells: Cells, row: int) -> str:
    return f"{cells.place}, {cells.row(row)}"
