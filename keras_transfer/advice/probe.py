"""Linear probes on cached features: their accuracy and learning curve."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from keras_transfer.config import Config, HeadConfig
from keras_transfer.data.samples import sample_images
from keras_transfer.data.tables import Splits, Table
from keras_transfer.evaluation.crossvalidation import (
    FOLDS,
    evaluate_out_of_fold,
    fold_numbers,
)
from keras_transfer.features.engine import make_engine, seconds_per_image
from keras_transfer.features.frozen_part import FrozenFeatures, FrozenPart
from keras_transfer.runs.manifest import Estimate
from keras_transfer.training.head import train_head
from keras_transfer.training.labelled import (
    LabelledFeatures,
    Weighting,
    relative_weights,
)

SHARES = (0.25, 0.5, 1.0)
"""Fractions of the training images used for the points of the learning curve."""

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
        table = table.select(np.sort(picked))
    numbers = fold_numbers(table, len(splits.class_names), FOLDS, config.seed)
    return Probed(table, features.rows(table.sources)[:], numbers)


def learning_curve(
    config: Config,
    splits: Splits,
    probed: Probed,
    shares: Sequence[float] = SHARES,
) -> tuple[Mapping[float, Estimate], float]:
    """Cross-validates probes on fractions of the training images.

    Each fraction's L2 strength is chosen in the same folds; figures are corrected for
    that choice. Images count in the loss as in `kt fit`, and alike in figures.

    Args:
        config: The resolved config; its seed is used.
        splits: The images.
        probed: The training images.
        shares: Fractions of the training images, greater than 0 and at most 1; those
            with a sample_weight of 0 are not learned from and not counted.

    Returns:
        (accuracy by fraction, seconds that training a head with the last fraction
        took). For multi-label data, accuracy is the mean average precision.

    Raises:
        KerasTransferError: If all images have a sample_weight of 0.
    """
    table, names = probed.table, splits.class_names
    weights = relative_weights(table)
    if weights is None:
        weights = np.ones(len(table), np.float32)
    counted = np.flatnonzero(weights)
    order = counted[deal(table.targets[counted], config.seed)]
    curve = {}
    for share in shares:
        started = time.perf_counter()
        # All images are predicted, but only these are learned from.
        some = order[: max(round(share * len(order)), FOLDS)]
        weights_of_some = np.zeros_like(weights)
        weights_of_some[some] = weights[some]
        data = LabelledFeatures(
            [probed.rows],
            table.targets,
            Weighting.equal(len(names)),
            weights_of_some,
        )
        head = train_head(HeadConfig(), data, probed.folds, config.seed)
        seconds = time.perf_counter() - started
        assert head.out_of_fold is not None
        _, estimated = evaluate_out_of_fold(
            table, head.out_of_fold, names, None, None, config.seed
        )
        assert estimated is not None
        curve[share] = estimated
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
