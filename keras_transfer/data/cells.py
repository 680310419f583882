"""The cells of a table in one form, be they of CSV, TSV, Parquet or in memory."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from keras_transfer.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal["text", "list", "other"]
"""What a column holds: single values that can be written as text, lists of such values,
or something else."""


class Cells(Protocol):
    """The cells of a table.

    Attributes:
        place: The table, for messages.
        names: Stripped column names; "" for a column without one.
    """

    place: str
    names: list[str]

    def __len__(self) -> int:
        """Returns the number of rows."""

    def row(self, index: int) -> str:
        """Says where a row comes from, such as "line 7" or "row 6"."""

    def repeated(self) -> tuple[str, str, int] | None:
        """Finds (place, name, how often it is there) of a repeated column name."""

    def kind(self, column: int) -> Kind:
        """Returns what a column holds."""

    def type_name(self, column: int) -> str:
        """Returns the name of a column's type, for messages."""

    def is_keepable(self, column: int) -> bool:
        """Returns whether a column can be kept in a run, which holds no files."""

    def text(self, column: int) -> list[str]:
        """Returns the cells of a column without spaces around them.

        A missing value is "". The values of a list are joined by `LABEL_SEPARATOR`.
        """

    def typed(self, columns: Sequence[int]) -> "pa.Table":
        """Returns columns for reports, under their names."""


def check_repeated(cells: Cells) -> None:
    """Checks that no two columns have the same name.

    Raises:
        UsageError: If they do.
    """
    if found := cells.repeated():
        place, name, count = found
        raise UsageError(
            f"{place}: column {name!r} is there {count} times. Remove or rename all "
            "but one."
        )


def first_repeated(place: str, names: Sequence[str]) -> tuple[str, str, int] | None:
    """Returns what `Cells.repeated` does, for names of the columns at a place."""
    for name, count in Counter(names).items():
        if name and count > 1:
            return place, name, count
    return None


def utf8(text: str) -> str:
    """Converts text to valid UTF-8, as Arrow requires; other bytes are escaped."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")
