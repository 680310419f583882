"""A small chart made of text, for terminals."""

import math
from collections.abc import Sequence

from keras_transfer.runs.manifest import Estimate

_MOST_LINES = 9
_STEPS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # between lines, of what is 0 to 1
_COLUMN = 14  # characters between two points
_BLOCKS = {"point": "●", "bar": "│", "axis": "┤", "corner": "└", "line": "─"}
_ASCII = {"point": "o", "bar": "|", "axis": "|", "corner": "+", "line": "-"}


def text_chart(
    points: Sequence[tuple[str, Estimate]], encoding: str | None = "utf-8"
) -> str:
    """Draws estimates with their 95% intervals, one after the other.

    Args:
        points: (what stands below it, such as the number of images; the estimate).
        encoding: Encoding of the output; only characters that it has are used.

    Returns:
        Lines of text; empty without points.
    """
    if not points:
        return ""
    marks = _BLOCKS if _has(encoding, "".join(_BLOCKS.values())) else _ASCII
    low = min(one.low for _, one in points)
    high = max(one.high for _, one in points)
    step = next(x for x in _STEPS if high / x - low / x <= _MOST_LINES - 3)
    top, bottom = math.ceil(round(high / step, 6)), math.floor(round(low / step, 6))

    def line(value: float) -> int:
        return round(top - value / step)

    rows = [[" "] * (_COLUMN * len(points)) for _ in range(top - bottom + 1)]
    for number, (_, one) in enumerate(points):
        place = _COLUMN * number + _COLUMN // 2
        for row in range(line(one.high), line(one.low) + 1):
            rows[row][place] = marks["bar"]
        rows[line(one.mean)][place] = marks["point"]
        mean = f"{one.mean:.3f}"
        rows[line(one.mean)][place + 2 : place + 2 + len(mean)] = mean
    lines = [
        f"{(top - row) * step:6.3f} {marks['axis']}" + "".join(cells).rstrip()
        for row, cells in enumerate(rows)
    ]
    lines.append(" " * 7 + marks["corner"] + marks["line"] * (_COLUMN * len(points)))
    below = "".join(name.center(_COLUMN + 1)[:_COLUMN] for name, _ in points)
    return "\n".join([*lines, (" " * 8 + below).rstrip()])


def _has(encoding: str | None, characters: str) -> bool:
    try:
        characters.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
