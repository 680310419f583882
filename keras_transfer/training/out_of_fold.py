"""Predictions of all images of DATA by heads that did not learn from them."""

import numpy as np

from keras_transfer.config import HeadConfig
from keras_transfer.data.tables import Table, count_classes
from keras_transfer.evaluation.crossvalidation import (
    FOLDS,
    can_be_right,
    fold_numbers,
    head_folds,
)
from keras_transfer.events import SILENT, Listener
from keras_transfer.features.cache import Features
from keras_transfer.training.head import LINEAR_L2, train_head
from keras_transfer.training.labelled import Weighting, label_features, relative_weights

MOST_PREDICTIONS = 20_000_000
"""Images times classes, up to which every image is predicted, which takes 80 MB. Beyond
it, only a tenth of the images are."""

_L2 = LINEAR_L2[::2]
"""Every other strength that `kt fit` tries, in half of the time: what is looked for in
the predictions hardly depends on the strength."""


def out_of_fold_probabilities(
    table: Table,
    features: Features | np.ndarray,
    num_classes: int,
    seed: int,
    listener: Listener = SILENT,
) -> np.ndarray:
    """Predicts images by linear heads that did not learn from them or their group.

    The L2 strength is chosen as in `kt fit`, from fewer. If that is on a held-out
    tenth, because there are very many images, heads with the chosen strength then
    predict the others in folds.

    Args:
        table: The N images.
        features: float32 `[N, D]`.
        num_classes: Number of classes, C.
        seed: Seed of the folds.
        listener: Receives progress after each L2 strength.

    Returns:
        float32 `[N, C]`; rows of NaN for images that are in no fold, or whose class the
        head that predicts them did not learn; see `can_be_right`. They all are if there
        are too few images, or only one class.
    """
    found = np.full((len(table), num_classes), np.nan, np.float32)
    shown = np.count_nonzero(count_classes(table.targets, num_classes))
    folds = head_folds(table, num_classes, None, seed)
    if folds is None or shown < (2 if table.targets.ndim == 1 else 1):
        return found
    weights = relative_weights(table)
    data = label_features(
        [features], table.targets, Weighting.equal(num_classes), weights
    )
    head = train_head(HeadConfig(l2=_L2), data, folds, seed, listener)
    if folds.min() < 0 and found.size <= MOST_PREDICTIONS:
        folds = fold_numbers(table, num_classes, FOLDS, seed)
        head = train_head(HeadConfig(l2=(head.l2,)), data, folds, seed, listener)
    said = head.out_of_fold
    assert said is not None
    found[said.rows] = said.probabilities[said.chosen]
    found[~can_be_right(table, num_classes, folds)] = np.nan
    return found
