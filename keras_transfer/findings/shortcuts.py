"""Shortcuts: whether the class can be told from what should not matter.

A model learns whatever tells the classes apart in the data it is given. If images of
one class come from another camera, hospital or web site, that may be their size or the
way their files were made, and the model fails where these differ. Sources: Geirhos et
al. 2020, "Shortcut learning in deep neural networks", Nature Machine Intelligence 2;
DeGrave, Janizek & Lee 2021, "AI for radiographic COVID-19 detection selects shortcuts
over signal", Nature Machine Intelligence 3.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from keras_transfer.data.tables import count_classes
from keras_transfer.findings.finding import Finding
from keras_transfer.findings.images import FEWEST_IMAGES, AuditedImages
from keras_transfer.findings.probing import units_of
from keras_transfer.findings.properties import (
    Property,
    column_properties,
    file_properties,
    path_properties,
)
from keras_transfer.findings.telling import Units, tell
from keras_transfer.findings.wording import LEAST_WAY, finding_of, matters

LEVEL = 0.025
"""Probability that the lower side of a 95% interval misses, for all figures in all."""

_MOST_IMAGES = 5_000  # more tell nothing new of gains that matter
_MOST_CLASSES = 50  # with the most images
_MOST_TOLD_APART = 20  # classes, each from all others


def shortcut_findings(
    images: AuditedImages,
    accuracy: float | None,
    seed: int,
    further: Sequence[Property] = (),
) -> list[Finding]:
    """Finds properties from which the class can be told though they should not matter.

    No image is read. Each property by itself predicts the class of images of folds that
    it was not learned from, without dividing groups: by the frequencies of classes
    among images of the same value, or in the leaves of a small decision tree. It is
    reported if a gain matters and its interval is above 0, corrected by Bonferroni for
    the number of figures: the gain in accuracy over the majority class, and that of
    telling a class from all others (the mean of sensitivity and specificity) over
    guessing, which sees small classes and is all there is for multi-label data.

    Args:
        images: The images; at most 5,000 of the 50 largest classes are looked at.
        accuracy: The model's own out-of-fold accuracy, if known: the severity depends
            on how much of it a property reaches.
        seed: Seed of the folds and of the choice of images.
        further: Properties that were read from files, such as cameras; see `exif`.

    Returns:
        Findings, the clearest first; none for data in which classes are independent of
        all properties, apart from 2.5% of all data sets.
    """
    properties = [
        *file_properties(images),
        *further,
        *path_properties(images),
        *column_properties(images),
    ]
    rows = _sample(images, seed)
    if not properties or len(rows) < FEWEST_IMAGES:
        return []
    units = units_of(images, rows, seed)
    if units is None:
        return []
    classes = _told_apart(units)
    joint = _joint(properties, rows)
    tried = len(properties) + (joint is not None)
    level = LEVEL / (tried * (1 + len(classes)))
    found = []
    for one in properties:
        some, of_known = _known(one, rows, units)
        if of_known is not None:
            found.append(tell(some, of_known, classes, level, seed))
    files = [told.way for told in found if told.one.nature == "file"]
    if joint is not None and files:
        together, single = tell(joint, units, classes, level, seed), max(files)
        # It must add to the best single property, beyond doubt and by enough.
        if together.least_way > single and together.way >= single + LEAST_WAY / 2:
            found.append(together)
    found = [one for one in found if matters(one)]
    found.sort(key=lambda one: -one.way)
    return [finding_of(one, images.class_names, accuracy) for one in found]


def _sample(images: AuditedImages, seed: int) -> np.ndarray:
    """Draws int64 indices of at most 5,000 images of the largest classes."""
    targets = images.table.targets
    if images.multi_label:
        rows = np.arange(len(targets))
    else:
        counts = count_classes(targets, len(images.class_names))
        largest = np.argsort(-counts, kind="stable")[:_MOST_CLASSES]
        rows = np.flatnonzero(np.isin(targets, largest))
    shuffled = np.random.default_rng(seed).permutation(rows)
    return np.sort(shuffled[:_MOST_IMAGES])


def _told_apart(units: Units) -> list[int]:
    """Returns the largest classes, each of which is told from all others."""
    counts = units.shown.sum(0)
    largest = np.argsort(-counts, kind="stable")[:_MOST_TOLD_APART]
    if units.targets.ndim == 1 and (counts > 0).sum() == 2:
        return largest[1:2].tolist()  # the other one is told just as well
    return largest.tolist()


def _known(
    one: Property, rows: np.ndarray, units: Units
) -> tuple[Property, Units | None]:
    """Returns a property and the images of those that have it; None if too few."""
    known = one.is_known[rows]
    some = replace(one, values=one.values[rows][known], is_known=known[known])
    if not known.all():
        units = units.keep(known)
    is_enough = (
        len(units) >= FEWEST_IMAGES
        and len(np.unique(units.folds)) > 1
        and bool((units.targets != units.targets[0]).any())
    )
    return some, units if is_enough else None


def _joint(properties: Sequence[Property], rows: np.ndarray) -> Property | None:
    """Joins all properties of files, which tell more together than each alone."""
    files = [one for one in properties if one.nature == "file"]
    if len(files) < 2:
        return None
    columns = [one.values[:, None] if one.is_category else one.values for one in files]
    columns = [
        np.where(one.is_known[:, None], values, -1.0)[rows]
        for one, values in zip(files, columns, strict=True)
    ]
    return Property(
        "how the files were made",
        "file",
        np.concatenate(columns, 1),
        np.ones(len(rows), bool),
        (),
        "Collect images of all classes from the same sources.",
    )
