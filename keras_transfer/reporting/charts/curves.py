"""Curves over all thresholds: ROC, and precision against recall."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_transfer.evaluation.intervals import wilson
from keras_transfer.findings.finding import counted
from keras_transfer.reporting.charts.style import (
    CLASSES,
    DASHES,
    INK,
    LINE,
    MUTED,
    legend_below,
    legend_name,
    new_axes,
    styled,
    thinned,
    unit_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_SHOWN = 8  # classes with a color each
_WORST, _BEST = 4, 2  # of more classes, those that are shown in color
_MOST_THIN = 40  # other classes, as thin lines
_MOST_BANDS = 2  # more bands than this hide each other
_FEWEST = 5  # images that show a class; the curve of fewer is a few steps of chance
_GRID = np.linspace(0, 1, 201)


@dataclass(frozen=True, eq=False)
class Curve:
    """The curve of one class against all others.

    Attributes:
        name: Name of the class.
        x: float64 `[K]` from 0 to 1, increasing.
        y: float64 `[K]` from 0 to 1.
        trials: float64 `[K]`: y is a fraction of as many images.
        area: Area under the curve.
        images: Number of images that show the class.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    trials: np.ndarray
    area: float
    images: int

    @property
    def is_vague(self) -> bool:
        """Whether so few images show the class that the curve says little."""
        return self.images < _FEWEST


@styled
def roc_curves(
    targets: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]
) -> "Figure":
    """Draws the ROC curve of each class against all others, with its area.

    Of two classes there is one curve, of the second. Of more than 8, there are the mean
    over all classes, the worst and best few, and up to 40 others as thin lines. Curves
    of classes that fewer than 5 images show are thin and pale too. A band (of at most
    two curves) is the 95% interval of the sensitivity at each threshold (Wilson).

    Args:
        targets: int64 `[N]` class indices; for multi-label data, uint8
            `[N, num_classes]` with 1 where the class is present.
        probabilities: float32 `[N, num_classes]` in the range 0 to 1.
        class_names: Class names in the order of the columns.
    """
    curves = [
        roc_curve(name, positive, scores)
        for name, positive, scores in _one_against_rest(
            targets, probabilities, class_names
        )
        if not positive.all()
    ]

    def draw(axes: "Axes") -> None:
        axes.plot([0, 1], [0, 1], color=LINE, linewidth=1, zorder=1)
        axes.set_xlabel("false positive rate (1 − specificity)")
        axes.set_ylabel("true positive rate (sensitivity)")

    return _draw(curves, "AUC", draw)


@styled
def precision_recall_curves(
    targets: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]
) -> "Figure":
    """Draws precision against recall of each class, with its average precision.

    Classes are shown as by `roc_curves`. A band is the 95% interval of the precision
    at each threshold (Wilson).

    Args:
        targets: As for `roc_curves`.
        probabilities: As for `roc_curves`.
        class_names: As for `roc_curves`.
    """
    classes = list(_one_against_rest(targets, probabilities, class_names))
    curves = [precision_recall_curve(*one) for one in classes]

    def draw(axes: "Axes") -> None:
        if len(classes) == 1:
            share = float(classes[0][1].mean())
            axes.axhline(share, color=LINE, linewidth=1, zorder=1)
        axes.set_xlabel("recall")
        axes.set_ylabel("precision")

    return _draw(curves, "AP", draw)


def roc_curve(name: str, positive: np.ndarray, scores: np.ndarray) -> Curve:
    """Computes the ROC curve.

    Args:
        name: Name of the class.
        positive: bool `[N]`, with at least one True and one False.
        scores: float `[N]`, larger for images that are more likely positive.
    """
    hits, found = _counted(positive, scores)
    count = hits[-1]
    x = np.concatenate([[0.0], (found - hits) / (len(positive) - count)])
    y = np.concatenate([[0.0], hits / count])
    area = float(np.trapezoid(y, x))
    return Curve(name, x, y, np.full(len(x), float(count)), area, int(count))


def precision_recall_curve(
    name: str, positive: np.ndarray, scores: np.ndarray
) -> Curve:
    """Computes precision against recall; the area is the average precision.

    Args:
        name: Name of the class.
        positive: bool `[N]`, with at least one True.
        scores: float `[N]`, larger for images that are more likely positive.
    """
    hits, found = _counted(positive, scores)
    recall, precision = hits / hits[-1], hits / found
    area = float(np.diff(recall, prepend=0.0) @ precision)
    # Below the smallest recall that any threshold gives, there is no precision.
    x = np.concatenate([[0.0], recall])
    y = np.concatenate([precision[:1], precision])
    trials = np.concatenate([found[:1], found])
    return Curve(name, x, y, trials, area, int(hits[-1]))


def _counted(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts positive images, and all, with at least each score, largest first."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    return np.cumsum(positive[order])[ends], ends + 1.0


def _one_against_rest(
    targets: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields (name, positive images, scores) of each class that occurs."""
    for index, name in enumerate(class_names):
        is_mirrored = targets.ndim == 1 and len(class_names) == 2 and index == 0
        positive = targets[:, index] > 0 if targets.ndim == 2 else targets == index
        if positive.any() and not is_mirrored:
            yield name, positive, probabilities[:, index].astype(np.float64)


def _draw(
    curves: Sequence[Curve], area: str, draw_axes: "Callable[[Axes], None]"
) -> "Figure":
    shown, thin = _chosen(curves)
    figure, axes = new_axes()
    unit_axes(axes)
    draw_axes(axes)
    drawn = thin[:: -(-len(thin) // _MOST_THIN) or 1]
    part = f"{len(drawn)} of " if len(drawn) < len(thin) else ""
    others = f"the other {len(thin)}" if shown else f"all {len(thin)}"
    for number, curve in enumerate(drawn):
        label = f"{part}{others} classes" if number == 0 else None
        kept = thinned(curve.x, curve.y, 60)
        axes.plot(
            curve.x[kept],
            curve.y[kept],
            color=MUTED,
            alpha=0.3,
            linewidth=0.7,
            label=label,
        )
    for number, curve in enumerate(shown):
        kept = thinned(curve.x, curve.y)
        x, y, color = curve.x[kept], curve.y[kept], CLASSES[number]
        if len(shown) <= _MOST_BANDS and not thin and not curve.is_vague:
            low, high = wilson(y, curve.trials[kept]).T
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        label = f"{legend_name(curve.name)}, {area} {curve.area:.3f}"
        style: dict[str, Any] = {"color": color, "linestyle": DASHES[number]}
        if curve.is_vague:
            label += f" ({counted(curve.images, 'image')})"
            style |= {"alpha": 0.5, "linewidth": 0.8, "zorder": 1.5}
        axes.plot(x, y, label=label, **style)
    if thin:
        mean = np.mean([_on_grid(curve, area == "AP") for curve in curves], axis=0)
        value = np.mean([curve.area for curve in curves])
        label = f"mean of {len(curves)}, {area} {value:.3f}"
        axes.plot(_GRID, mean, color=INK, linewidth=2.4, label=label)
    if not curves:
        axes.text(
            0.5, 0.5, "undefined: there is only one class", ha="center", color=MUTED
        )
    legend_below(figure)
    return figure


def _chosen(curves: Sequence[Curve]) -> tuple[list[Curve], list[Curve]]:
    """Divides curves into those shown in color, worst first, and thin ones."""
    if len(curves) <= _MOST_SHOWN:
        return list(curves), []
    ordered = sorted(curves, key=lambda curve: (curve.is_vague, curve.area))
    clear = sum(not curve.is_vague for curve in curves)
    best = max(clear - _BEST, min(clear, _WORST))
    shown = [*ordered[: min(clear, _WORST)], *ordered[best:clear]]
    return shown, [curve for curve in ordered if curve not in shown]


def _on_grid(curve: Curve, is_step: bool) -> np.ndarray:
    """Evaluates a curve at evenly spaced places.

    Precision is that of the largest threshold with at least this recall. Between points
    of a ROC curve, chance decides between two thresholds.
    """
    if is_step:
        return curve.y[np.searchsorted(curve.x, _GRID).clip(0, len(curve.x) - 1)]
    # Where a curve rises steeply, the upper end counts.
    last = np.append(np.diff(curve.x) > 0, True)
    return np.interp(_GRID, curve.x[last], curve.y[last])
