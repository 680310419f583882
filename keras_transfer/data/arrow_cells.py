"""The cells of a Parquet file, or of a table in memory."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from keras_transfer.data.cells import Cells, Kind, first_repeated
from keras_transfer.data.tables import LABEL_SEPARATOR
from keras_transfer.errors import KerasTransferError, UsageError, first_line

if TYPE_CHECKING:
    import pyarrow as pa

_MOST_KIND = 60  # characters of a type in an error, of up to thousands


def arrow_cells(table: "pa.Table") -> Cells:
    """Returns the cells of a table in memory."""
    return _ArrowCells(
        "the table",
        table.schema,
        lambda names: table if names is None else table.select(names),
    )


def parquet_cells(file: Path) -> Cells:
    """Returns the cells of a Parquet file.

    Raises:
        UsageError: If the file cannot be read or is damaged.
    """
    import pyarrow.parquet as pq

    with _explaining_damage(file), file.open("rb") as opened:
        schema = pq.read_schema(opened)

    def read(names: Sequence[str] | None) -> "pa.Table":
        # From a file object, because pyarrow takes only paths that are valid UTF-8.
        with _explaining_damage(file), file.open("rb") as opened:
            return pq.ParquetFile(opened).read(names)

    return _ArrowCells(str(file), schema, read)


@contextlib.contextmanager
def _explaining_damage(file: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UsageError(
            f"{file} is no Parquet file, or it is damaged ({first_line(error)}). Write "
            "it again."
        ) from None


class _ArrowCells:
    """The cells of a Parquet file or of a table in memory.

    The attributes and methods are those of `Cells`.
    """

    def __init__(
        self,
        place: str,
        schema: "pa.Schema",
        read: Callable[[Sequence[str] | None], "pa.Table"],
    ):
        """Looks at the columns, and reads none.

        Args:
            place: The table, for messages.
            schema: Its columns.
            read: Reads the columns of the given names, or all for None.
        """
        self.place = place
        self.names = [name.strip() for name in schema.names]
        self._schema, self._read = schema, read

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def row(self, index: int) -> str:
        return f"row {index + 1}"

    def repeated(self) -> tuple[str, str, int] | None:
        return first_repeated(self.place, self.names)

    def kind(self, column: int) -> Kind:
        kind = _storage(self._schema.field(column).type)
        if _is_list(kind):
            return "list" if _is_text(_storage(kind.value_type)) else "other"
        return "text" if _is_text(kind) else "other"

    def type_name(self, column: int) -> str:
        name = str(self._schema.field(column).type)
        return name if len(name) <= _MOST_KIND else f"{name[:_MOST_KIND]}..."

    def is_keepable(self, column: int) -> bool:
        return _can_be_kept(self._schema.field(column).type)

    def text(self, column: int) -> list[str]:
        import pyarrow.compute as pc

        values = self._column(column)
        if self.kind(column) == "text":
            return _texts(values)
        lengths = pc.list_value_length(values).to_pylist()
        flat, cells, start = _texts(pc.list_flatten(values)), [], 0
        for index, length in enumerate(lengths):
            parts = flat[start : start + (length or 0)]
            start += len(parts)
            if any(LABEL_SEPARATOR in part for part in parts):
                raise KerasTransferError(
                    f"{self.place}, {self.row(index)}: a label is text without "
                    f"{LABEL_SEPARATOR!r}. Received: {parts!r}. Rename the class."
                )
            cells.append(LABEL_SEPARATOR.join(parts))
        return cells

    def typed(self, columns: Sequence[int]) -> "pa.Table":
        import pyarrow as pa

        arrays = [self._column(column) for column in columns]
        arrays = [
            x.cast(pa.string()) if pa.types.is_string_view(x.type) else x
            for x in arrays
        ]
        return pa.table(arrays, names=[self.names[i] for i in columns])

    def _column(self, column: int) -> "pa.ChunkedArray":
        return self._table.column(self._schema.names[column])

    @functools.cached_property
    def _table(self) -> "pa.Table":
        """All columns but images and others that nothing is done with."""
        names = [
            name
            for column, name in enumerate(self._schema.names)
            if self.kind(column) != "other" or self.is_keepable(column)
        ]
        return self._read(None if names == self._schema.names else names)


def _texts(values: "pa.ChunkedArray") -> list[str]:
    """Converts values to text without spaces around it; null and NaN are ""."""
    import pyarrow as pa

    kind = _storage(values.type)
    if kind != values.type:
        values = values.cast(kind)
    if pa.types.is_boolean(kind):
        return ["" if value is None else str(value) for value in values.to_pylist()]
    if not pa.types.is_string(kind):
        values = values.cast(pa.string())  # 5.0 becomes "5"
    try:
        cells = ["" if cell is None else cell.strip() for cell in values.to_pylist()]
    except UnicodeDecodeError:  # paths that are not valid UTF-8 must be preserved
        encoded = values.cast(pa.binary()).to_pylist()
        cells = [(x or b"").decode(errors="surrogateescape").strip() for x in encoded]
    if pa.types.is_floating(kind):
        return ["" if cell == "nan" else cell for cell in cells]
    return cells


def _storage(kind: "pa.DataType") -> "pa.DataType":
    """Returns the type of the values of an extension or dictionary type."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_list(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    return bool(
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
    )


def _is_text(kind: "pa.DataType") -> bool:
    """Returns whether values can be written as text."""
    import pyarrow.types as types

    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_boolean(kind)
        or types.is_decimal(kind)
        or types.is_date(kind)
        or types.is_timestamp(kind)
        or types.is_time(kind)
        or types.is_null(kind)
    )


@functools.cache
def _can_be_kept(kind: "pa.DataType") -> bool:
    """Returns whether values can be kept in Parquet, and hold no files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if pa.types.is_string_view(kind):
        return True  # as strings
    if _holds_bytes(kind):
        return False
    empty = pa.schema([("column", kind)]).empty_table()
    try:  # some types cannot be written, others not be selected from
        pq.write_table(empty, pa.BufferOutputStream())
        empty.take(pa.array([], pa.int64()))
    except pa.ArrowException:
        return False
    return True


def _holds_bytes(kind: "pa.DataType") -> bool:
    """Returns whether values contain bytes, such as encoded images."""
    import pyarrow.types as types

    kind = _storage(kind)
    if types.is_binary(kind) or types.is_large_binary(kind):
        return True
    if types.is_binary_view(kind) or types.is_fixed_size_binary(kind):
        return True
    return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
