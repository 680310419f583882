"""A linear probe of cached features: how well it does, and with how many images."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from keras_transfer.config import Config, HeadConfig
from keras_transfer.data.samples import sample_images
from keras_transfer.data.tables import Splits, Table
from keras_transfer.evaluation.crossvalidation import estimate, fold_numbers
from keras_transfer.evaluation.metrics import evaluate, score
from keras_transfer.features.engine import Extractor
from keras_transfer.features.extraction import FrozenFeatures, FrozenPart
from keras_transfer.runs.manifest import Estimate
from keras_transfer.training.head import (
    LabelledFeatures,
    class_weights,
    label_features,
    predict_head,
    train_head,
)

SHARES = (0.25, 0.5, 1.0)
"""Of the training images, in the learning curve."""

FOLDS = 5
_MOST_PROBED = 20_000  # training images, whose features are held in memory
_SAMPLE = 32  # images that are run to measure how long they take


@dataclass(frozen=True)
class Probed:
    """Training images that heads are trained and measured on.

    Attributes:
        table: The images.
        rows: float32 `[N, D]`, their features.
        folds: int64 `[N]`, the fold of each.
    """

    table: Table
    rows: np.ndarray
    folds: np.ndarray


def probe(config: Config, splits: Splits, features: FrozenFeatures) -> Probed:
    """No more of the training images than probes need, dealt into folds."""
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
    """The accuracy of probes with shares of the training images, cross-validated.

    Each share has its own L2 strength, which the validation images choose.

    Returns:
        (share to accuracy, seconds that a head on all of them took).
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
            values.append(score(evaluation)[0])
        curve[share] = estimate(values, 1 / FOLDS)
    return curve, seconds


def deal(targets: np.ndarray, seed: int) -> np.ndarray:
    """An order of which every first part holds the classes in their proportions."""
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
    """How fast a base is on this machine, in the precision of its features."""
    pixels = draw_rows(splits, part.image_size)
    return 1 / Extractor(part.model, features.precision).measure(pixels)


def draw_rows(splits: Splits, image_size: int) -> np.ndarray:
    """uint8 `[32, image_size, image_size, 3]`; few images are there several times."""
    images = [pixels for *_, pixels in sample_images(splits, image_size, _SAMPLE)]
    return np.resize(images, (_SAMPLE, *images[0].shape))
