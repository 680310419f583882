"""Untrusted text as people see it: printable, and in HTML tables of results.

Every result has its own `_repr_html_`, which Jupyter, VS Code and others ask for.
This module is at the very bottom, so that results of any layer can use it.
"""

import html
import re
from collections.abc import Iterable, Sequence

MOST_ROWS = 30
"""Rows of a table at most; a last line says how many are left out."""

# Control characters, which terminals obey, and line separators; bidirectional controls,
# with which a name could pose as other text; surrogates, which stand for bytes that are
# not valid text.
_STEERING = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_NUMBER = re.compile(r"|–|[-+]?\d[\d,.]*%?( \([^()]*\))?")  # or nothing, or none


def printable(text: str) -> str:
    r"""Escapes characters that are not printable the way Python does, as in `\x1b`.

    File and class names are untrusted, so all text shown to people passes through here.
    """
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def escaped(value: object) -> str:
    """Formats a value as text in HTML, whatever characters it contains."""
    return html.escape(printable(str(value)))


def html_table(
    caption: object, header: Sequence[object], rows: Iterable[Sequence[object]]
) -> str:
    """Formats a table in HTML, with columns of numbers at the right.

    Args:
        caption: One line above the table.
        header: Names of the columns; empty for none.
        rows: Cells as any values; the first of a row is its heading.
    """
    kept = list(rows)
    columns = [*zip(*kept, strict=True)] or [()] * len(header)
    sides = ["left"] + [
        "right" if any(map(str, column)) and all(map(_is_number, column)) else "left"
        for column in columns[1:]
    ]
    lines = [f"<caption style='text-align:left'>{escaped(caption)}</caption>"]
    if header:
        cells = "".join(
            f"<th scope='col' style='text-align:{side}'>{escaped(x)}</th>"
            for x, side in zip(header, sides, strict=True)
        )
        lines.append(f"<thead><tr>{cells}</tr></thead>")
    lines.append("<tbody>")
    for first, *others in kept[:MOST_ROWS]:
        cells = "".join(
            f"<td style='text-align:{side}'>{escaped(value)}</td>"
            for value, side in zip(others, sides[1:], strict=True)
        )
        head = f"<th scope='row' style='text-align:left'>{escaped(first)}</th>"
        lines.append(f"<tr>{head}{cells}</tr>")
    lines.append("</tbody>")
    more = len(kept) - MOST_ROWS
    after = f"<p>and {more:,} more</p>" if more > 0 else ""
    return f"<table>{''.join(lines)}</table>{after}"


def _is_number(value: object) -> bool:
    return _NUMBER.fullmatch(str(value)) is not None
