"""Charts, drawn with matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from keras_transfer.advice.ranking import Ranked


def draw_chart(ranked: Sequence[Ranked], path: Path) -> None:
    """Draws accuracy against speed, with the Pareto front as a line.

    Args:
        ranked: The measured bases.
        path: The PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for one in ranked:
        low, high = one.accuracy.low, one.accuracy.high
        mean, speed = one.accuracy.mean, one.images_per_second
        axes.errorbar(
            speed,
            mean,
            yerr=[[mean - low], [high - mean]],
            fmt="o",
            color="tab:blue" if one.is_best else "tab:gray",
            capsize=3,
        )
        axes.annotate(
            one.base, (speed, mean), xytext=(6, 6), textcoords="offset points"
        )
    front = sorted((x.images_per_second, x.accuracy.mean) for x in ranked if x.is_best)
    axes.plot(*zip(*front, strict=True), color="tab:blue", linewidth=1)
    axes.set_xlim(0, 1.25 * max(one.images_per_second for one in ranked))
    axes.set_xlabel("images a second on this machine")
    axes.set_ylabel("accuracy of a linear probe, 95% interval")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150, format="png")
