"""Draws images, and cross-validates linear heads on their features."""

import numpy as np

from keras_transfer.config import HeadConfig
from keras_transfer.evaluation.crossvalidation import quick_folds, strata
from keras_transfer.evaluation.intervals import Groups
from keras_transfer.findings.images import AuditedImages
from keras_transfer.findings.telling import Units
from keras_transfer.training.head import TrainedHead, train_head
from keras_transfer.training.labelled import LabelledFeatures, Weighting


def units_of(images: AuditedImages, rows: np.ndarray, seed: int) -> Units | None:
    """Assigns images to folds without dividing groups.

    Args:
        images: All images; copies are expected to share a group.
        rows: int64 `[n]` indices of those to take.
        seed: Seed of the assignment.

    Returns:
        The images; None if they are too few or of too few groups for two folds.
    """
    table, num_classes = images.table.select(rows), len(images.class_names)
    folds = quick_folds(table, num_classes, seed)
    if folds is None:
        return None
    return Units(table.targets, num_classes, folds, Groups.of(table.groups))


def stratified(
    images: AuditedImages, rows: np.ndarray, most: int, seed: int
) -> np.ndarray:
    """Draws at most so many of the given images, from each class in proportion.

    Args:
        images: All images.
        rows: int64 `[n]` indices to draw from.
        most: Largest number of images to draw.
        seed: Seed of the draw.

    Returns:
        int64 sorted indices.
    """
    if len(rows) <= most:
        return rows
    shuffled = np.random.default_rng(seed).permutation(rows)
    of_class = strata(images.table.select(shuffled), len(images.class_names))
    ordered = shuffled[np.argsort(of_class, kind="stable")]
    places = np.floor(np.arange(most) * (len(rows) / most)).astype(np.int64)
    return np.sort(ordered[places])


def cross_validated(rows: np.ndarray, units: Units, seed: int) -> TrainedHead:
    """Cross-validates a linear head.

    Args:
        rows: float32 `[N, D]` features.
        units: The N images.
        seed: Seed of the head.

    Returns:
        The head, with the L2 strength that is best out of fold.
    """
    return train_head(HeadConfig(), labelled(rows, units), units.folds, seed)


def labelled(rows: np.ndarray, units: Units) -> LabelledFeatures:
    """Puts float32 `[N, D]` features and targets of N images together."""
    equal = Weighting.equal(units.num_classes)
    return LabelledFeatures([rows], units.targets, equal)


def out_of_fold(head: TrainedHead) -> np.ndarray:
    """Returns float32 `[N, C]` probabilities by heads that did not learn from them."""
    found = head.out_of_fold
    assert found is not None
    return found.probabilities[found.chosen]
