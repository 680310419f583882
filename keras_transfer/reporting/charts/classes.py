"""Figures by class: the confusion matrix, and a metric with its intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from keras_transfer.evaluation.metrics import ClassEvaluation
from keras_transfer.evaluation.names import label
from keras_transfer.reporting.charts.style import (
    ACCENT,
    INK,
    LINE,
    MUTED,
    ON_ACCENT,
    WRONG,
    new_axes,
    new_figure,
    plain,
    styled,
    text_width,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_IN_MATRIX = 15
_MOST_BARS = 20
_WORST, _BEST = 14, 5  # of more classes, those whose bars are shown
_DARK = 0.55  # share of a row from which on numbers have the other color


@styled
def confusion_matrix(
    confusion: Sequence[Sequence[int]] | np.ndarray, class_names: Sequence[str]
) -> "Figure":
    """Draws the confusion matrix, shaded by the share of each true class.

    Of more than 15 classes, the 14 that are most often confused are shown, and the
    others together.

    Args:
        confusion: int `[num_classes, num_classes]`: a row per true class, a column per
            predicted class.
        class_names: Class names in the order of the rows.
    """
    counts = np.asarray(confusion, dtype=np.int64)
    names = [plain(name, 16) for name in class_names]
    if len(names) > _MOST_IN_MATRIX:
        shown, counts = _most_confused(counts)
        rest = len(names) - len(shown)
        names = [*(names[index] for index in shown), f"{rest} others"]
    size = max(2.4, 0.29 * len(names) + 0.2)
    longest = max(map(text_width, names))
    is_turned = longest > 0.9 * size / len(names)
    figure = new_figure(
        size + longest + 0.5,
        size + (longest * math.sqrt(0.5) if is_turned else 0) + 0.6,
    )
    axes = figure.add_subplot()
    _draw_cells(axes, counts)
    places = np.arange(len(names))
    axes.set_xticks(places, names, rotation=45 if is_turned else 0)
    if is_turned:
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(places, names)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return figure


def _most_confused(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keeps the classes with most mistakes, in their order, and adds up the others.

    Returns:
        (int64 indices of the classes kept, int64 counts with the others at the end).
    """
    wrong = counts.sum(0) + counts.sum(1) - 2 * np.diag(counts)
    kept = np.sort(np.argsort(-wrong, kind="stable")[: _MOST_IN_MATRIX - 1])
    place = np.full(len(counts), len(kept))
    place[kept] = np.arange(len(kept))
    merged = np.zeros((len(kept) + 1,) * 2, np.int64)
    np.add.at(merged, (place[:, None], place[None, :]), counts)
    return kept, merged


def _draw_cells(axes: "Axes", counts: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    is_small = len(counts) > 10
    for row, column in np.ndindex(*counts.shape):
        share, count = float(shares[row, column]), int(counts[row, column])
        corner = column - 0.48, row - 0.48
        axes.add_patch(
            Rectangle(
                corner,
                0.96,
                0.96,
                facecolor=ACCENT if row == column else WRONG,
                alpha=0.12 + 0.88 * share,
                linewidth=0,
                in_layout=False,
            )
            if count
            else Rectangle(
                corner, 0.96, 0.96, color=LINE, alpha=0.35, lw=0, in_layout=False
            )
        )
        axes.text(
            column,
            row,
            f"{count:,}" if count < 100_000 else f"{count / 1000:,.0f}k",
            ha="center",
            va="center_baseline",
            color=ON_ACCENT if share > _DARK else INK if count else MUTED,
            fontsize=7 if is_small or count > 9999 else 9,
            in_layout=False,
        )


@styled
def class_bars(
    classes: Mapping[str, ClassEvaluation], metric: str = "recall"
) -> "Figure":
    """Draws a metric of each class with its 95% interval, the lowest first.

    Of more than 20 classes, the 14 lowest and 5 highest are shown. Classes without
    images, and those for which the metric is undefined, are left out.

    Args:
        classes: Metrics by class name.
        metric: A field of `ClassEvaluation`, such as `recall` or `average_precision`.
    """
    values = {
        name: getattr(one, metric) for name, one in classes.items() if one.support
    }
    order = sorted((v, name) for name, v in values.items() if v is not None)
    shown: list[tuple[float, str] | None] = [*order]
    if len(order) > _MOST_BARS:
        shown = [*order[:_WORST], None, *order[-_BEST:]]
    figure, axes = new_axes(
        label(metric),
        height=0.8 + 0.23 * max(len(shown), 1),
    )
    axes.grid(axis="y", visible=False)
    names = []
    for place, one in enumerate(shown):
        if one is None:
            names.append(f"{len(order) - len(shown) + 1} more")
            continue
        value, name = one
        names.append(f"{plain(name)} ({classes[name].support:,})")
        axes.barh(place, value, height=0.62, color=ACCENT, alpha=0.35)
        low, high = classes[name].intervals.get(metric, (value, value))
        axes.plot([low, high], [place, place], color=ACCENT, linewidth=1.3)
        axes.plot(value, place, color=ACCENT, marker="o", markersize=4)
    axes.set_yticks(np.arange(len(names)), names)
    if None in shown:
        axes.get_yticklabels()[shown.index(None)].set(color=MUTED, style="italic")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.01)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure
