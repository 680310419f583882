"""The chart of `kt rank`."""

from collections.abc import Sequence
from pathlib import Path

from keras_transfer.advice.ranking import Ranked
from keras_transfer.reporting.charts.output import save_png
from keras_transfer.reporting.charts.style import ACCENT, INK, MUTED, new_axes, styled


@styled
def draw_chart(ranked: Sequence[Ranked], path: Path) -> None:
    """Draws accuracy against speed, with the Pareto front as a line.

    Args:
        ranked: The measured bases.
        path: The PNG file to write.
    """
    figure, axes = new_axes(
        "images a second on this machine", "accuracy of a linear probe, 95% interval"
    )
    figure.set_size_inches(6.4, 4.2)
    for one in ranked:
        low, high = one.accuracy.low, one.accuracy.high
        mean, speed = one.accuracy.mean, one.images_per_second
        axes.errorbar(
            speed,
            mean,
            yerr=[[mean - low], [high - mean]],
            fmt="o" if one.is_best else "D",
            color=ACCENT if one.is_best else MUTED,
            markersize=5,
            linewidth=1.2,
        )
        axes.annotate(
            one.base,
            (speed, mean),
            xytext=(6, 6),
            textcoords="offset points",
            color=INK if one.is_best else MUTED,
        )
    front = sorted((x.images_per_second, x.accuracy.mean) for x in ranked if x.is_best)
    axes.plot(*zip(*front, strict=True), color=ACCENT, linewidth=1)
    axes.set_xlim(0, 1.25 * max(one.images_per_second for one in ranked))
    save_png(figure, path)
