"""How the model was found: L2 path, epochs, rates by layer, and learning curve."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_transfer.reporting.charts.style import (
    ACCENT,
    CLASSES,
    DASHES,
    MARKERS,
    MUTED,
    legend_below,
    log_axis,
    new_axes,
    new_figure,
    plain,
    styled,
)
from keras_transfer.runs.manifest import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OTHER_COLUMNS = ("phase", "l2", "epoch", "learning_rate", "seconds")
_NAMES = {"loss": "training images", "val_loss": "held-out images"}


@styled
def l2_path(rows: Sequence[Mapping[str, Any]], chosen: float | None = None) -> "Figure":
    """Draws the loss of training images, and out of fold, against the L2 strength.

    Args:
        rows: The rows of history.csv of the phase `fit`, with `l2`, `loss` and
            `val_loss` as numbers or text. Of several epochs with one strength, the best
            counts.
        chosen: The strength of the head, which is marked; None marks none.
    """
    best: dict[float, tuple[float, float]] = {}
    for row in rows:
        l2, loss, val = (_number(row.get(key)) for key in ("l2", "loss", "val_loss"))
        known = best.get(l2)
        if known is None or val < known[1]:
            best[l2] = loss, val
    strengths = sorted(l2 for l2 in best if l2 > 0)
    figure, axes = new_axes("L2 strength", "mean cross-entropy (nats)")
    for number, label in ((1, "out of fold"), (0, "training images")):
        losses = [best[l2][number] for l2 in strengths]
        if np.isfinite(losses).any():
            axes.plot(
                strengths,
                losses,
                color=ACCENT if number else MUTED,
                linestyle="-" if number else "--",
                marker="o" if number else "s",
                markersize=4,
                label=label,
            )
    if strengths:
        log_axis(axes, strengths[0] / 1.5, strengths[-1] * 1.5)
    if chosen in best:
        place = max(x for x in best[chosen] if math.isfinite(x))
        axes.plot(
            chosen,
            place,
            linestyle="",
            marker="o",
            markersize=10,
            markerfacecolor="none",
            markeredgecolor=ACCENT,
            label=f"chosen: {chosen:.2g}",
        )
    axes.set_ylim(bottom=0)
    legend_below(figure)
    return figure


@styled
def epoch_curves(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draws the losses, any metrics and the learning rate by epoch of fine-tuning.

    Args:
        rows: The rows of history.csv of the phase `finetune`, with `epoch`, `loss` and
            `learning_rate` as numbers or text. Columns `val_loss` and those that start
            with `val_` are shown where there are any.
    """
    epochs = [_number(row.get("epoch")) for row in rows]
    columns = {
        key: [_number(row.get(key)) for row in rows]
        for key in dict.fromkeys(key for row in rows for key in row)
        if key not in _OTHER_COLUMNS and (key == "loss" or key.startswith("val_"))
    }
    columns = {key: v for key, v in columns.items() if np.isfinite(v).any()}
    losses = {key: v for key, v in columns.items() if key in _NAMES}
    metrics = {key: v for key, v in columns.items() if key not in _NAMES}
    rates = [_number(row.get("learning_rate")) for row in rows]
    figure = new_figure(height=3.6 + (1.2 if metrics else 0))
    heights = [3, 3, 1] if metrics else [3, 1]
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    panels[0].set_ylabel("loss (nats)")
    for number, (key, values) in enumerate(losses.items()):
        _plot_epochs(panels[0], epochs, values, number, _NAMES[key])
    panels[0].set_ylim(bottom=0)
    if len(losses) > 1:
        panels[0].legend(loc="upper right")
    for number, (key, values) in enumerate(metrics.items()):
        name = plain(key.removeprefix("val_").replace("_", " "))
        _plot_epochs(panels[1], epochs, values, number, name)
        panels[1].legend(loc="lower right")
    panels[-1].plot(epochs, rates, color=MUTED, marker="s", markersize=3, linewidth=1.2)
    panels[-1].set_ylabel("rate")
    panels[-1].set_ylim(bottom=0)
    panels[-1].set_xlabel("epoch")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    for panel in panels:
        panel.grid(True)
        panel.yaxis.get_major_locator().set_params(nbins=4)
        panel.yaxis.set_major_formatter(_in_full)
    figure.align_ylabels()
    return figure


def _in_full(value: float, _: int) -> str:
    """Formats a tick in full, without a power of ten at the end of its axis."""
    return f"{value:.4g}".replace("e-0", "e-")


def _plot_epochs(
    axes: Any, epochs: Sequence[float], values: Sequence[float], number: int, name: str
) -> None:
    axes.plot(
        epochs,
        values,
        color=CLASSES[number % len(CLASSES)],
        linestyle=DASHES[number % len(DASHES)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=3.5,
        label=name,
    )


@styled
def layer_rates(groups: Mapping[str, float]) -> "Figure":
    """Draws the peak learning rate of each layer group, from the input to the head.

    They are points, because lengths on a logarithmic axis mean nothing.

    Args:
        groups: Rates by the name of the group; 0 for a group that was not trained.
    """
    figure, axes = new_axes(
        "peak learning rate", height=0.8 + 0.28 * max(len(groups), 1)
    )
    rates = [rate for rate in groups.values() if rate > 0] or [1e-3]
    for place, rate in enumerate(groups.values()):
        if rate > 0:
            axes.plot(rate, place, color=ACCENT, marker="o", markersize=7)
        axes.annotate(
            f"{rate:.2g}" if rate > 0 else "not trained",
            (1.02, place),
            xycoords=("axes fraction", "data"),
            va="center_baseline",
            color=MUTED,
        )
    log_axis(axes, min(rates) / 2, max(rates) * 2)
    axes.set_yticks(
        np.arange(len(groups)), [plain(name.replace("_", " ")) for name in groups]
    )
    axes.set_ylim(-0.6, len(groups) - 0.4)
    axes.tick_params(axis="y", length=0)
    return figure


@styled
def learning_curve(
    points: Sequence[tuple[int, Estimate]], metric: str = "accuracy"
) -> "Figure":
    """Draws a metric against the number of training images, with 95% intervals.

    Args:
        points: (number of images, estimate), by increasing number.
        metric: Name of the metric.
    """
    figure, axes = new_axes("training images", f"{plain(metric.replace('_', ' '))}")
    images = [count for count, _ in points]
    axes.fill_between(
        images,
        [one.low for _, one in points],
        [one.high for _, one in points],
        color=ACCENT,
        alpha=0.15,
        linewidth=0,
    )
    means = [one.mean for _, one in points]
    axes.plot(images, means, color=ACCENT, marker="o", markersize=4.5)
    if images:
        axes.set_xscale("log", base=2)
        axes.set_xticks(images, [f"{count:,}" for count in images])
        axes.minorticks_off()
    return figure


def _number(value: Any) -> float:
    """Reads a number of a CSV file; empty cells are NaN."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
