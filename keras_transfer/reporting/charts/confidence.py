"""Whether probabilities mean what they say, and what abstaining gives."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from keras_transfer.evaluation.intervals import wilson
from keras_transfer.evaluation.metrics import BINS, calibration_error, confidence_bins
from keras_transfer.reporting.charts.style import (
    ACCENT,
    LINE,
    MUTED,
    new_axes,
    styled,
    unit_axes,
)
from keras_transfer.runs.manifest import CoveragePoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEAST_IN_BIN = 20  # images; with fewer, chance alone makes a zigzag


@styled
def reliability_diagram(confidence: np.ndarray, is_right: np.ndarray) -> "Figure":
    """Draws how often predictions are right against how sure they are.

    Images are divided into bins of equal count, at most 15 (as for the calibration
    error) and of at least 20 images, unless there are fewer than 20 in all: the points
    of smaller bins would zigzag by chance. The error that is written into the chart is
    that of all 15 bins. Bars are 95% intervals (Wilson).

    Args:
        confidence: float `[N]` largest probability of each image. N is at least 1.
        is_right: bool `[N]`.
    """
    figure, axes = new_axes("probability of the predicted class", "fraction correct")
    unit_axes(axes)
    axes.plot([0, 1], [0, 1], color=LINE, linewidth=1, zorder=1)
    bins = confidence_bins(
        confidence, max(min(BINS, len(confidence) // _LEAST_IN_BIN), 1)
    )
    _, bins, counts = np.unique(bins, return_inverse=True, return_counts=True)
    said = np.bincount(bins, confidence.astype(np.float64)) / counts
    right = np.bincount(bins, is_right.astype(np.float64)) / counts
    low, high = wilson(right, counts).T
    axes.plot(said, right, color=ACCENT, linewidth=1, alpha=0.5)
    axes.errorbar(
        said,
        right,
        yerr=[right - low, high - right],
        fmt="o",
        color=ACCENT,
        markersize=4.5,
        elinewidth=1.2,
    )
    axes.text(
        0.98,
        0.04,
        f"calibration error {calibration_error(confidence, is_right):.3f}",
        transform=axes.transAxes,
        ha="right",
        color=MUTED,
    )
    axes.annotate(
        "too unsure", (0.03, 0.93), xycoords="axes fraction", color=MUTED, fontsize=9
    )
    axes.annotate(
        "too sure",
        (0.98, 0.12),
        xycoords="axes fraction",
        color=MUTED,
        fontsize=9,
        ha="right",
    )
    return figure


@styled
def accuracy_coverage_curve(points: Sequence[CoveragePoint]) -> "Figure":
    """Draws the accuracy of the surest predictions against their share.

    The band is the 95% interval of the accuracy (Wilson).

    Args:
        points: The curve, as `thresholds.accuracy_coverage` returns it.
    """
    figure, axes = new_axes("share of images that are decided", "accuracy on them")
    unit_axes(axes, y=False)
    coverage = np.array([point.coverage for point in points])
    accuracy = np.array([point.accuracy for point in points])
    low, high = wilson(accuracy, np.array([point.images for point in points])).T
    axes.fill_between(coverage, low, high, color=ACCENT, alpha=0.15, linewidth=0)
    axes.plot(coverage, accuracy, color=ACCENT, marker="o", markersize=3.5)
    axes.set_ylim(max(min(low, default=0.0) - 0.02, -0.02), 1.005)
    return figure
