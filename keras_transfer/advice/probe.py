"""Linear probes on cached features: their accuracy and learning curve."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from keras_transfer.config import Config, HeadConfig
from keras_transfer.data.samples import sample_images
from keras_transfer.data.tables import Splits, Table
from keras_transfer.evaluation.crossvalidation import estimate, fold_numbers
from keras_transfer.evaluation.metrics import evaluate, selection_key
from keras_transfer.features.engine import make_engine, seconds_per_image
from keras_transfer.features.frozen_part import FrozenFeatures, FrozenPart
from keras_transfer.runs.manifest import Estimate
from keras_transfer.training.head import (
    LabelledFeatures,
    class_weights,
    label_features,
    predict_head,
    train_head,
)

SHARES = (0.25, 0.5, 1.0)
"""Fractions of the training images used for the points of the learning curve."""

FOLDS = 5
"""Number of cross-validation folds."""

_MOST_PROBED = 20_000  # training images, whose features are kept in memory
_SAMPLE = 32  # images to measure the speed on


@dataclass(frozen=True)
class Probed:
    """Training images on which probes are trained and cross-validated.

    Attributes:
        table: The N images.
        rows: float32 `[N, D]` features.
        folds: int64 `[N]` fold of each image, starting at 0.
    """

    table: Table
    rows: np.ndarray
    folds: np.ndarray


def probe(config: Config, splits: Splits, features: FrozenFeatures) -> Probed:
    """Samples at most 20,000 training images and assigns them to folds.

    Raises:
        UsageError: If there are too few images for the folds.
    """
    table = splits.train
    if len(table) > _MOST_PROBED:
        picked = deal(table.targets, config.seed)[:_MOST_PROBED]
        table = table.keep(table.sources[i] for i in picked)
    numbers = fold_numbers(table, len(splits.class_names), FOLDS, config.seed)
    return Probed(table, features.rows(table.sources)[:], numbers)


def learning_curve(
    config: Config,
    splits: Splits,
    probed: Probed,
    features: FrozenFeatures,
    shares: Sequence[float] = SHARES,
) -> tuple[Mapping[float, Estimate], float]:
    """Cross-validates probes on fractions of the training images.

    For each fraction, the L2 strength is chosen on the validation images.

    Args:
        config: The resolved config; its seed is used.
        splits: The images; the validation images choose L2 strengths.
        probed: The training images.
        features: Features of the images.
        shares: Fractions of the training images, greater than 0 and at most 1.

    Returns:
        (accuracy by fraction, seconds that training a head with the last fraction
        took). For multi-label data, accuracy is the mean average precision.
    """
    targets, classes = probed.table.targets, len(splits.class_names)
    weights = class_weights(targets, classes, balanced=False)

    def labelled(index: np.ndarray) -> LabelledFeatures:
        rows = probed.rows[np.sort(index)]
        return LabelledFeatures([rows], targets[np.sort(index)], classes, weights)

    def some(index: np.ndarray, share: float, seed: int) -> LabelledFeatures:
        dealt = index[deal(targets[index], seed)]
        return labelled(dealt[: max(round(share * len(index)), 1)])

    val = label_features(
        [features.rows(splits.val.sources)], splits.val.targets, classes, weights
    )
    nothing = labelled(np.arange(0))
    curve = {}
    for share in shares:
        started = time.perf_counter()
        images = some(np.arange(len(targets)), share, config.seed)
        chosen = train_head(HeadConfig(), images, val, config.seed)
        seconds = time.perf_counter() - started
        head_config = HeadConfig(l2=(chosen.l2,))
        values = []
        for fold in range(FOLDS):
            inside = np.flatnonzero(probed.folds != fold)
            held_out = np.flatnonzero(probed.folds == fold)
            images = some(inside, share, config.seed + fold)
            head = train_head(head_config, images, nothing, config.seed)
            probabilities = predict_head(head.model, probed.rows[held_out])
            evaluation = evaluate(targets[held_out], probabilities, splits.class_names)
            values.append(selection_key(evaluation)[0])
        curve[share] = estimate(values, 1 / FOLDS)
    return curve, seconds


def deal(targets: np.ndarray, seed: int) -> np.ndarray:
    """Orders images randomly so that every prefix has about the same class balance.

    For multi-label data, the order is simply random.

    Args:
        targets: Targets of the images, as in `tables.Table`.
        seed: Seed of the order.

    Returns:
        int64 `[N]` indices of the images.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(targets))
    if targets.ndim == 2:
        return order
    place = np.zeros(len(targets))
    for index in np.unique(targets):
        members = order[targets[order] == index]
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(place)


def images_per_second(
    part: FrozenPart, splits: Splits, features: FrozenFeatures
) -> float:
    """Measures a base's throughput on this machine, in the precision of its features.

    Returns:
        Images per second.
    """
    pixels = draw_rows(splits, part.image_size)
    return 1 / seconds_per_image(make_engine(part.model, features.precision), pixels)


def draw_rows(splits: Splits, image_size: int) -> np.ndarray:
    """Decodes 32 training images as uint8 `[32, image_size, image_size, 3]`.

    If there are fewer images, they are repeated.
    """
    images = [pixels for *_, pixels in sample_images(splits, image_size, _SAMPLE)]
    return np.resize(images, (_SAMPLE, *images[0].shape))
