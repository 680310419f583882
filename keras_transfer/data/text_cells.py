"""The cells of a CSV or TSV file."""

import contextlib
import csv
import functools
import io
from collections.abc import Collection, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from keras_transfer.data.cells import Cells, Kind, check_repeated, first_repeated, utf8
from keras_transfer.data.formats.convert import file_type
from keras_transfer.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

_DELIMITERS = "\t,;"
_MOST_HEADER = 2**20  # characters that are searched for the delimiter
_MOST_MAGIC = 512  # bytes that tell what a file is
_OF_RUNS = ("path", "label", "split", "group")  # columns of a run's tables
# A code that would not survive as a number: 007, 0x1F, or too many digits for int64.
_CODE = r"^[+-]?(0[0-9xX]|[0-9]{19})"


def text_cells(file: Path, known: Collection[str]) -> Cells:
    """Returns the cells of a CSV or TSV file.

    Args:
        file: The file.
        known: Names in lower case that tell the delimiter, which is a tab, a comma or a
            semicolon: whichever finds most of them in the first line.

    Raises:
        UsageError: If the file cannot be read, or is no text.
    """
    return _TextCells(file, known)


def read_table(file: Path) -> list[tuple[int, dict[str, str]]]:
    """Reads a CSV or TSV file that has the columns path and label, as those of runs.

    Args:
        file: The file.

    Returns:
        (line number, cells by column name) for each line. Column names are stripped and
        in lower case. Cells are exactly as in the file, including spaces.

    Raises:
        UsageError: If the file cannot be read or parsed, a required column is missing,
            a column name is repeated, or a line has more cells than columns.
    """
    cells = _TextCells(file, _OF_RUNS)
    names = [name.lower() for name in cells.names]
    if not {"path", "label"} <= {*names}:
        raise UsageError(
            "A table of a run's images starts with path,label[,split][,group]. "
            f"Received: {file}, which starts with {','.join(cells.names)[:80]!r}."
        )
    check_repeated(cells)
    rows = zip(*(cells.raw(i) for i in range(len(names))), strict=True)
    return [
        (line, dict(zip(names, row, strict=True)))
        for line, row in zip(cells.lines, rows, strict=True)
    ]


class _TextCells:
    """The cells of a CSV or TSV file, which is parsed when they are asked for.

    The attributes and methods are those of `Cells`.
    """

    def __init__(self, file: Path, known: Collection[str]):
        """Reads the line of column names.

        Args:
            file: The file.
            known: As in `text_cells`.

        Raises:
            UsageError: If the file cannot be read, or is no text.
        """
        self.place = str(file)
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UsageError(f"{file} cannot be read ({error.strerror}).") from None
        _check_is_text(file, content[:_MOST_MAGIC])
        # Paths that are not valid UTF-8 must be preserved.
        text = content.decode("utf-8-sig", errors="surrogateescape")
        self._delimiter = _delimiter(text, known)
        self._reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=self._delimiter
        )
        try:
            self.names = [name.strip() for name in next(self._reader, [])]
        except csv.Error as error:
            raise self._mistake(error) from None

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def lines(self) -> Sequence[int]:
        """Line number of each row."""
        return self._rows[0]

    def row(self, index: int) -> str:
        return f"line {self.lines[index]}"

    def repeated(self) -> tuple[str, str, int] | None:
        # Names differ in more than case, as they are found in any case.
        return first_repeated(f"{self.place}, line 1", [x.lower() for x in self.names])

    def kind(self, column: int) -> Kind:
        return "text"

    def type_name(self, column: int) -> str:
        return "text"

    def is_keepable(self, column: int) -> bool:
        return True

    def raw(self, column: int) -> Sequence[str]:
        """Returns the cells of a column exactly as they are in the file."""
        return self._rows[1][column]

    def text(self, column: int) -> list[str]:
        return [cell.strip() for cell in self.raw(column)]

    def typed(self, columns: Sequence[int]) -> "pa.Table":
        """Returns int64, float64 or string columns; null for an empty cell.

        A column has the first of these types that all of its cells have.
        """
        import pyarrow as pa

        arrays = [_inferred(self.text(column)) for column in columns]
        return pa.table(arrays, names=[utf8(self.names[i]) for i in columns])

    @functools.cached_property
    def _rows(self) -> tuple[list[int], list[Sequence[str]]]:
        """The line number of each row, and the cells of each column."""
        reader, width = self._reader, len(self.names)
        numbers: list[int] = []
        rows: list[Sequence[str]] = [[""] * width]  # because others may be shorter
        try:
            for cells in filter(None, reader):
                if len(cells) > width:
                    some = [cell[:40] for cell in cells[:8]]
                    raise UsageError(
                        f"{self.place}, line {reader.line_num}: {len(cells)} cells for "
                        f"{width} columns. Received: {some!r}. A cell "
                        f"that holds {self._delimiter!r} goes into double quotes."
                    )
                numbers.append(reader.line_num)
                rows.append(cells)
        except csv.Error as error:
            raise self._mistake(error) from None
        columns = list(zip_longest(*rows, fillvalue=""))
        return numbers, [column[1:] for column in columns]

    def _mistake(self, error: csv.Error) -> UsageError:
        return UsageError(
            f"{self.place}, line {self._reader.line_num}: {error}. Is a double quote "
            "not closed?"
        )


def _check_is_text(file: Path, start: bytes) -> None:
    """Refuses images and other binary files, by their first bytes.

    Raises:
        UsageError: If the file is one.
    """
    if b"\0" not in start:
        return
    if kind := file_type(start):
        what = f"an image ({kind})"
    elif b"\0" in start.splitlines()[0]:
        what = "a binary file, or text in UTF-16"
    else:
        return  # one cell is odd, which will be told with its line
    raise UsageError(
        f"This is {what}, not a table. Received: {file}. Expected a folder of class "
        "folders, a Parquet file, or a CSV or TSV file in UTF-8."
    )


def _delimiter(text: str, known: Collection[str]) -> str:
    """Returns the delimiter that finds most known names in the first line."""

    def found(delimiter: str) -> tuple[int, int]:
        start = io.StringIO(text[:_MOST_HEADER], newline="")
        try:
            names = next(csv.reader(start, delimiter=delimiter), [])
        except csv.Error:  # reading with this delimiter will say so
            return 0, 0
        return len({name.strip().lower() for name in names} & {*known}), len(names)

    return max(_DELIMITERS, key=found)


def _inferred(cells: Sequence[str]) -> "pa.Array":
    """Returns cells as int64, float64 or string, with null for an empty one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        text = pa.array([cell or None for cell in cells], pa.string())
    except UnicodeEncodeError:
        text = pa.array([utf8(cell) or None for cell in cells], pa.string())
    has_codes = pc.any(pc.match_substring_regex(text, _CODE)).as_py()
    if text.null_count == len(text) or has_codes:
        return text
    for kind in (pa.int64(), pa.float64()):
        with contextlib.suppress(pa.ArrowInvalid):
            return text.cast(kind)
    return text
