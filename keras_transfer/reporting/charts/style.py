"""What all charts have in common: colors, type, line styles, and text from users."""

import functools
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_P = ParamSpec("_P")
_R = TypeVar("_R")

COLORS: dict[str, tuple[str, str]] = {
    "ink": ("#1c2127", "#e8ebee"),
    "muted": ("#5a636d", "#a3adb8"),
    "line": ("#d8dde2", "#363d45"),
    "surface": ("#ffffff", "#15191d"),
    "accent": ("#1f5fa8", "#7ab7ff"),
    "on-accent": ("#fdfeff", "#0e1216"),
    "wrong": ("#c1372b", "#ff7b6b"),
    "c0": ("#2f6fb5", "#6fb1ff"),
    "c1": ("#c75300", "#ff9a4d"),
    "c2": ("#00825f", "#35c79a"),
    "c3": ("#9b4f96", "#d79bd3"),
    "c4": ("#1a8fbd", "#5cc8ee"),
    "c5": ("#8a6d00", "#e0c04f"),
    "c6": ("#b3234b", "#ff7d98"),
    "c7": ("#4f5b66", "#aab6c2"),
}
"""Colors on light and on dark paper by the name of their CSS variable.

Those of classes, `c0` to `c7`, follow Okabe & Ito 2008, "Color Universal Design",
darker or lighter for a contrast of at least 3 with the paper; text has at least 4.5.
"""

INK, MUTED, LINE, SURFACE, ACCENT, ON_ACCENT, WRONG, *CLASSES = (
    light for light, _ in COLORS.values()
)

DASHES: Sequence[Any] = (
    *("-", "--", "-.", ":"),
    *((0, (6, 1)), (0, (3, 1, 1, 1)), (0, (1, 2)), (0, (8, 2, 1, 2))),
)
"""Line styles of classes, so that colors are not needed to tell them."""

MARKERS = "os^DvP<X"
"""Markers of classes, for the same reason."""

WIDTH, HEIGHT = 4.3, 3.2  # inches; 340 pixels wide, text is still 11 pixels high
MOST_POINTS = 300  # of one curve: a page has many
_LINE = 0.185  # inches of a line of text
_LETTER = 0.076  # inches of a letter
_MARGIN = 0.08  # inches around a figure
_MOST_COLUMNS = 5  # of a legend
_LONGEST_NAME = 24
_SHOWN = "\N{WORD JOINER}"  # begins a label from files until the legend is made

_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic")

_STYLE = {
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called $x$
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.borderpad": 0.1,
    "legend.borderaxespad": 0.2,
    "legend.handlelength": 1.8,
    "legend.handletextpad": 0.5,
    "figure.facecolor": SURFACE,
    "figure.constrained_layout.w_pad": _MARGIN,
    "figure.constrained_layout.h_pad": _MARGIN,
    "svg.fonttype": "none",
    "svg.hashsalt": "keras_transfer",
}

# What XML does not allow, what steers text (line breaks, direction), and surrogates,
# which stand for bytes that are not valid text.
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def styled(draw: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes a function draw in the style of this package, whatever the user's is."""

    @functools.wraps(draw)
    def in_style(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        import matplotlib.style

        with matplotlib.style.context(("default", {**_STYLE, **_font_family()})):
            return draw(*args, **kwargs)

    return in_style


@functools.cache
def _font_family() -> dict[str, list[str]]:
    """Names the fonts of this machine that have most of the world's letters."""
    from matplotlib import font_manager

    known = {font.name for font in font_manager.fontManager.ttflist}
    return {"font.family": [name for name in _FONTS if name in known]}


def new_figure(width: float = WIDTH, height: float = HEIGHT) -> "Figure":
    """Creates an empty figure of a size in inches."""
    from keras_transfer.reporting.charts.figure import Chart

    return Chart(figsize=(width, height), layout="constrained")


def new_axes(
    xlabel: str = "", ylabel: str = "", height: float = HEIGHT
) -> "tuple[Figure, Axes]":
    """Creates a figure with one pair of axes and a light grid."""
    figure = new_figure(height=height)
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(True)
    return figure, axes


def unit_axes(axes: "Axes", x: bool = True, y: bool = True) -> None:
    """Lets axes span 0 to 1, with few ticks and room for lines at the ends."""
    ticks = [0, 0.25, 0.5, 0.75, 1]
    names = ["0", "0.25", "0.5", "0.75", "1"]
    if x:
        axes.set_xlim(-0.02, 1.02)
        axes.set_xticks(ticks, names)
    if y:
        axes.set_ylim(-0.02, 1.02)
        axes.set_yticks(ticks, names)


def log_axis(axes: "Axes", low: float, high: float) -> None:
    """Makes the x axis logarithmic, with few ticks that are written out."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max((last - first) // 4, 1)
    digits = (1, 3) if high / low < 100 else (1,)
    ticks = [
        digit * 10.0**power
        for power in range(first, last + 1, step)
        for digit in digits
    ]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(low, high)


def legend_below(figure: "Figure") -> None:
    """Adds a legend below the axes, where it never covers data, and room for it."""
    from matplotlib.lines import Line2D

    handles, labels = figure.axes[0].get_legend_handles_labels()
    if not handles:
        return
    has_lines = any(
        isinstance(one, Line2D) and one.get_linestyle() != "None" for one in handles
    )
    width, height = figure.get_size_inches()
    columns = _columns(labels, 0.46 if has_lines else 0.31, width)
    more_lines = -(-len(handles) // columns) - 1
    figure.set_size_inches(width, height + _LINE * more_lines)
    legend = figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        columnspacing=1,
        labelspacing=0.3,
        **({} if has_lines else {"handlelength": 0.7, "markerscale": 1.3}),
    )
    for text in legend.get_texts():
        text.set_text(text.get_text().removeprefix(_SHOWN))


def _columns(labels: Sequence[str], more: float, width: float) -> int:
    """Returns how many columns of a legend fit, each `more` inches wider than words."""
    for count in range(min(len(labels), _MOST_COLUMNS), 1, -1):
        rows = -(-len(labels) // count)
        columns = [
            labels[start : start + rows] for start in range(0, len(labels), rows)
        ]
        words = sum(max(map(text_width, one)) + more for one in columns)
        if words <= width - 2 * _MARGIN:
            return count
    return 1


def text_width(text: str) -> float:
    """Estimates the inches of a line; letters of East Asia are twice as wide."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return (len(text.removeprefix(_SHOWN)) + wide) * _LETTER


def legend_name(text: str) -> str:
    """Makes text from files safe to be a label that `legend_below` shows.

    Matplotlib leaves labels out that begin with an underscore, as a class may.
    """
    return _SHOWN + plain(text)


def plain(text: str, longest: int = _LONGEST_NAME) -> str:
    """Makes text from files safe to draw: one line, shortened, without controls."""
    text = _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> np.ndarray:
    """Picks points of a curve, evenly along it, such that it still looks the same.

    Args:
        x: float `[N]`.
        y: float `[N]`.
        most: Maximum number of points.

    Returns:
        int64 indices of at most `most` points, with both ends.
    """
    if len(x) <= most:
        return np.arange(len(x))
    steps = np.abs(np.diff(x)) / max(np.ptp(x), 1e-12)
    steps += np.abs(np.diff(y)) / max(np.ptp(y), 1e-12)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    wanted = np.linspace(0, along[-1], most)
    picked = np.searchsorted(along, wanted).clip(0, len(x) - 1)
    return np.unique(np.concatenate([[0], picked, [len(x) - 1]]))[-most:]


def theme_css() -> str:
    """Returns CSS that defines the variables of `themed_svg`, light and dark."""
    light, dark = (
        "".join(f"--{name}:{colors[i]};" for name, colors in COLORS.items())
        for i in (0, 1)
    )
    return (
        f":root{{{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        f"@media print{{:root{{{light}}}}}\n"
    )
