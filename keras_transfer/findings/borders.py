"""Whether the class can be told from the border of images, with the center hidden.

Hospitals mark X-rays with letters near a corner, web sites add logos and frames, and a
model may learn these instead of what is shown. Hiding the center was proposed by
Maguolo & Nanni 2021, "A critic evaluation of methods for COVID-19 automatic detection
from X-ray images", Information Fusion 76. In photos of objects the surroundings tell
the class too, but less than the center does. So the border is compared with the center
and with the whole image, and the four corners, enlarged, with the border: a frozen base
pools its features over the image and hardly sees a small letter, and without one the
corners tell less than the border, of which they are a part.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from keras_transfer.config import Config
from keras_transfer.data.tables import Splits
from keras_transfer.evaluation.intervals import Interval, Macro, roc_auc
from keras_transfer.events import SILENT, Listener
from keras_transfer.features.frozen_part import (
    FrozenPart,
    Storage,
    Views,
    frozen_features,
)
from keras_transfer.findings.finding import Finding, Severity
from keras_transfer.findings.images import FEWEST_IMAGES, AuditedImages
from keras_transfer.findings.probing import (
    cross_validated,
    out_of_fold,
    stratified,
    units_of,
)
from keras_transfer.findings.telling import (
    FEWEST_OF_CLASS,
    Units,
    fraction_interval,
    least_mean,
)

BORDER = 0.15
"""Width of the border by that of the image, so that the center has half of its area.

With MobileNetV2, the border of photos of ants and bees, CIFAR-10, faces and flowers
goes 0.5 to 0.7 of the way of the whole image from the majority class, and the center
0.9 to 1.0. A border of 0.2 goes up to 0.8 of the way, the center down to 0.75; one of
0.1 may not hold a whole marker."""

MOST_IMAGES = 600
"""Images that are looked at, each in three views: an accuracy is known to 0.04, and the
base runs on 1,800 images."""

HIDE_VERSION = 2
"""Changes whenever any view changes, because features of views are cached."""

_GRAY = (124, 116, 104)  # mean color of ImageNet: a color that says nothing
_LEAST_WAY = 0.2  # from the majority class to the whole image's figure
_HIGH_WAY = 0.8
_LEVEL = 0.025 / 2  # of error: the border and the corners are two looks


def hiding(image_size: int) -> Views:
    """Returns a view of the border, one of the center and one of the corners.

    In views 1 and 2, all else is gray. In view 3, the corners fill the image.

    Args:
        image_size: Side of the images in pixels.
    """
    width = max(round(BORDER * image_size), 1)
    center = slice(width, max(image_size - width, width + 1))

    def view(pixels: np.ndarray, digest: bytes, number: int) -> np.ndarray:
        if number == 1:
            border = pixels.copy()
            border[center, center] = _GRAY
            return border
        if number == 2:
            inside = np.full_like(pixels, _GRAY)
            inside[center, center] = pixels[center, center]
            return inside
        ends = np.r_[:width, image_size - width : image_size]
        corners = Image.fromarray(pixels[np.ix_(ends, ends)])
        size = (image_size, image_size)
        return np.asarray(corners.resize(size, Image.Resampling.BILINEAR))

    return Views(3, f"border {BORDER:g} version {HIDE_VERSION}", lambda: view)


@dataclass(frozen=True)
class _Figure:
    """The accuracy, or for multi-label data the mean ROC AUC.

    Attributes:
        value: The figure.
        interval: Its 95% confidence interval.
        terms: float64 `[N]` whose mean is the figure, apart from a constant.
    """

    value: float
    interval: Interval
    terms: np.ndarray

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.2f} ({low:.2f} to {high:.2f})"


def border_findings(
    images: AuditedImages,
    splits: Splits,
    part: FrozenPart,
    config: Config,
    listener: Listener = SILENT,
) -> list[Finding]:
    """Finds out whether the class can be told from the border of images.

    Linear heads are cross-validated on features of whole images, of their border and of
    their center, on the same images and folds. The features of views are computed by
    the same frozen base and cached.

    Args:
        images: The images with their features; at most 600 are looked at.
        splits: The same images in their splits.
        part: The frozen base.
        config: The resolved config; its seed and precision are used.
        listener: Receives progress after each image.

    Returns:
        A finding if the border tells clearly more than the majority class. It is of low
        severity unless the border tells clearly more than the center, or the corners
        than the border, or either as much as the whole image and more than the center,
        none of which they do in photos of objects or textures; it is of high severity
        if one of the first two is so, and they reach nearly what the whole image does.
    """
    units, rows = _units(images, config.seed)
    if units is None or (images.multi_label and not _ranked(units)):
        return []
    table = images.table.select(rows)
    nothing = table.keep(())
    some = replace(splits, train=table, val=nothing, test=nothing)
    storage = Storage(config.precision)
    views = hiding(part.image_size)
    alone = replace(part, others=())  # the rows are those of the first base
    found = frozen_features(alone, some, views, storage, listener)
    figures = tuple(
        _figure(found.rows(table.sources, view)[:], units, config.seed)
        for view in range(views.count + 1)
    )
    return _findings(images, units, figures)


def _findings(
    images: AuditedImages, units: Units, figures: tuple[_Figure, ...]
) -> list[Finding]:
    """Judges the figures of the whole image, the border, the center and the corners."""
    plain, border, center, corners = figures
    best = max(border, corners, key=lambda figure: figure.value)
    base, least = _least_gain(best, units)
    whole = max(plain.value, best.value) - base
    if least <= 0 or best.value - base < _LEAST_WAY * whole:
        return []

    def is_more(one: _Figure, other: _Figure) -> bool:
        return least_mean(one.terms - other.terms, units.groups, _LEVEL) > 0

    severity: Severity = "low"
    if is_more(border, center) or is_more(corners, border):
        severity = "high" if best.value - base >= _HIGH_WAY * whole else "medium"
    elif best.value >= plain.value and best.value > center.value:
        severity = "medium"
    return [
        Finding(
            kind="class told from the border",
            severity=severity,
            message=_message(images, units, figures, base, severity),
            figures={
                "border": border.value,
                "low": border.interval[0],
                "high": border.interval[1],
                "whole": plain.value,
                "center": center.value,
                "corners": corners.value,
                "baseline": base,
                "images": float(len(units)),
            },
        )
    ]


def _units(images: AuditedImages, seed: int) -> tuple[Units | None, np.ndarray]:
    """Draws images, stratified by class, with folds; None if they are too few."""
    rows = stratified(images, np.arange(len(images)), MOST_IMAGES, seed)
    if len(rows) < FEWEST_IMAGES:
        return None, rows
    return units_of(images, rows, seed), rows


def _figure(rows: np.ndarray, units: Units, seed: int) -> _Figure:
    """Computes the figure of features float32 `[N, D]`."""
    said = out_of_fold(cross_validated(rows, units, seed))
    if units.targets.ndim == 1:
        right = (said.argmax(1) == units.targets).astype(np.float64)
        return _Figure(
            float(right.mean()), fraction_interval(right, units.groups), right
        )
    alone, grouped = Macro(), Macro()
    for index in _ranked(units):
        pair = units.shown[:, index], said[:, index]
        alone.add(roc_auc(*pair))
        grouped.add(roc_auc(*pair, units.groups))
    mean, of_groups = alone.mean, grouped.mean
    assert mean is not None and of_groups is not None
    terms = mean.influence * len(rows) + mean.value
    return _Figure(mean.value, of_groups.interval, terms)


def _ranked(units: Units) -> list[int]:
    """Returns the classes of multi-label data that enough images show, and not."""
    ones = units.shown.sum(0)
    enough = np.minimum(ones, len(units) - ones) >= FEWEST_OF_CLASS
    return np.flatnonzero(enough).tolist()


def _least_gain(border: _Figure, units: Units) -> tuple[float, float]:
    """Returns the figure of a way that looks at nothing, and the least gain over it."""
    if units.targets.ndim == 2:
        return 0.5, least_mean(border.terms - 0.5, units.groups, _LEVEL)
    most = np.bincount(units.targets).argmax()
    is_most = (units.targets == most).astype(np.float64)
    gain = least_mean(border.terms - is_most, units.groups, _LEVEL)
    return float(is_most.mean()), gain


def _message(
    images: AuditedImages,
    units: Units,
    figures: tuple[_Figure, ...],
    base: float,
    severity: Severity,
) -> str:
    """Says what the border tells, in words."""
    plain, border, center, corners = figures
    what, beside = "mean ROC AUC", "guessing"
    if units.targets.ndim == 1:
        most = images.class_names[int(np.bincount(units.targets).argmax())]
        what, beside = "accuracy", f"always saying {most}"
    measured = (
        f"The class can be told from the border of the images, with their center "
        f"hidden: {what} {border}, and {corners} from the corners alone, enlarged, "
        f"beside {base:.2f} for {beside}, {center} for the center alone and {plain} "
        "for whole images"
    )
    if severity != "low":
        return (
            f"{measured}. What is at the border, such as a marker, a logo or a frame, "
            "may decide instead of what is shown (DeGrave et al. 2021, Nature Machine "
            "Intelligence 3). Look at the borders class by class, and crop or paint "
            "over what differs."
        )
    return (
        f"{measured}. The surroundings of an object often tell its class; look whether "
        "borders hold anything that has nothing to do with it, such as markers."
    )
