"""Linear probes on cached features: their accuracy and learning curve."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import threadpoolctl

from keras_transfer.config import Config, HeadConfig
from keras_transfer.data.samples import sample_images
from keras_transfer.data.tables import Splits, Table
from keras_transfer.errors import UsageError
from keras_transfer.evaluation.crossvalidation import (
    FOLDS,
    estimate,
    evaluate_out_of_fold,
    fold_numbers,
    quick_folds,
)
from keras_transfer.evaluation.intervals import as_interval, wilson
from keras_transfer.evaluation.metrics import deciding_metric, score
from keras_transfer.evaluation.thresholds import independent_images
from keras_transfer.features.engine import make_engine, seconds_per_image
from keras_transfer.features.frozen_part import FrozenFeatures, FrozenPart
from keras_transfer.features.throughput import Throughput, remember
from keras_transfer.features.usable import keep_copies_together
from keras_transfer.runs.manifest import Estimate
from keras_transfer.training.head import KINDS, LINEAR_L2, TrainedHead, train_head
from keras_transfer.training.labelled import (
    CHUNK_ROWS,
    LabelledFeatures,
    Weighting,
    relative_weights,
    scalings,
)

SHARES = (0.25, 0.5, 1.0)
"""Fractions of the training images used for the points of the learning curve."""

QUICK_SHARES = (0.125, 0.25, 0.5, 1.0)
"""Those of the quick curve."""

_MOST_PROBED = 20_000  # training images, whose features are kept in memory
_SAMPLE = 32  # images to measure the speed on

_MOST_QUICK = 1_000  # training images of the quick curve
_QUICK_DIRECTIONS = 128  # of their features; see `quick_learning_curve`
_QUICK_ITERATIONS = 30  # enough for figures, not for weights that last
_FEWEST_PER_FOLD = 2  # images that each fold of a point has at least


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

    Copies of an image are in the same fold, as far as there are enough others.

    Raises:
        UsageError: If there are too few images for the folds.
    """
    table = splits.train
    if len(table) > _MOST_PROBED:
        picked = deal(table.targets, config.seed)[:_MOST_PROBED]
        table = table.select(np.sort(picked))
    apart = keep_copies_together(table, features.extraction)
    try:
        numbers = fold_numbers(apart, len(splits.class_names), FOLDS, config.seed)
    except UsageError:  # too few are no copies
        numbers = fold_numbers(table, len(splits.class_names), FOLDS, config.seed)
    each = [_rows(table, features, stages) for stages in KINDS[config.features]]
    if len(each) == 1:
        return Probed(table, each[0], numbers)
    losses = []
    for rows in each:  # as `kt fit` will choose
        probed = Probed(table, rows, numbers)
        everything = np.arange(len(table))
        names = splits.class_names
        head = _head_of_some(HeadConfig(), probed, everything, len(names), config.seed)
        losses.append(min(row["val_loss"] for row in head.history))
    return Probed(table, each[int(np.argmin(losses))], numbers)


def _rows(table: Table, features: FrozenFeatures, stages: bool) -> np.ndarray:
    """Returns float32 `[N, D]`: what a head reads of images, scaled if it is several.

    Args:
        table: The images.
        features: Their features.
        stages: Whether outputs of stages below the top are read.
    """
    rows = features.head_inputs(table.sources, stages)[:]
    widths = features.head_widths(stages)
    if len(widths) == 1:
        return rows
    equal = Weighting.equal(1)
    data = LabelledFeatures([rows], table.targets, equal, widths=widths)
    return scalings(data, np.full(len(table), -1))[0].apply(rows)


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
    curve = {}
    for share, some in _shares(table, shares, config.seed):
        started = time.perf_counter()
        head = _head_of_some(HeadConfig(), probed, some, len(names), config.seed)
        seconds = time.perf_counter() - started
        assert head.out_of_fold is not None
        _, estimated = evaluate_out_of_fold(
            table, head.out_of_fold, names, None, None, config.seed
        )
        assert estimated is not None
        curve[share] = estimated
    return curve, seconds


def _shares(
    table: Table, shares: Sequence[float], seed: int
) -> Iterator[tuple[float, np.ndarray]]:
    """Yields (fraction, indices of as many images), each including those before.

    Images with a sample_weight of 0 are not counted.

    Raises:
        KerasTransferError: If all images have a sample_weight of 0.
    """
    weights = relative_weights(table)
    counted = np.arange(len(table)) if weights is None else np.flatnonzero(weights)
    order = counted[deal(table.targets[counted], seed)]
    for share in shares:
        yield share, order[: max(round(share * len(order)), FOLDS)]


def _head_of_some(
    config: HeadConfig,
    probed: Probed,
    some: np.ndarray,
    num_classes: int,
    seed: int,
    chunk_rows: int = CHUNK_ROWS,
) -> TrainedHead:
    """Trains heads on some of the images; all are predicted, out of fold."""
    table, weights = probed.table, relative_weights(probed.table)
    weights_of_some = np.zeros(len(table), np.float32)
    weights_of_some[some] = 1 if weights is None else weights[some]
    weighting = Weighting.equal(num_classes)
    data = LabelledFeatures(
        [probed.rows], table.targets, weighting, weights_of_some, chunk_rows
    )
    return train_head(config, data, probed.folds, seed)


def quick_learning_curve(
    config: Config,
    splits: Splits,
    features: FrozenFeatures,
    l2: float | None = None,
) -> list[tuple[int, Estimate]]:
    """Cross-validates heads on 1/8, 1/4, 1/2 and all of the training images, fast.

    It costs the same for any number of images: there are at most 1,000 of them, and of
    their features only the 128 directions in which they differ most.
    tests/benchmarks/learning_curve.py compares the figures with those of `kt advise`.

    Args:
        config: The resolved config; its metric and seed are used.
        splits: The usable images.
        features: Their features.
        l2: The L2 strength of the run's linear head. Weaker ones than this are not
            tried, a stronger one is, since fewer images need more. None tries all.

    Returns:
        (number of images, the deciding metric over folds with its 95% interval) for
        each share of at least 2 images per fold. Each head learned from 4/5 of them.
        Empty if there are too few images or groups for folds. The log loss is positive.

    Raises:
        KerasTransferError: If all images have a sample_weight of 0.
    """
    # In order of the sources, so that it is the same however the images were listed.
    sources = splits.train.sources
    order = sorted(range(len(sources)), key=sources.__getitem__)
    table = splits.train.select(np.array(order, np.int64))
    if len(table) > _MOST_QUICK:
        picked = deal(table.targets, config.seed)[:_MOST_QUICK]
        table = table.select(np.sort(picked))
    classes = len(splits.class_names)
    apart = keep_copies_together(table, features.extraction)
    folds = quick_folds(apart, classes, config.seed)
    if folds is None:
        return []
    read = _rows(table, features, config.features == "stages")
    rows, ratio = _main_directions(read, config.seed)
    strengths = LINEAR_L2 if l2 is None else [l2 * 10**power for power in (0, 0.75)]
    head = HeadConfig(
        l2=tuple(strength * ratio for strength in strengths), epochs=_QUICK_ITERATIONS
    )
    probed, curve = Probed(table, rows, folds), []
    for _, some in _shares(table, QUICK_SHARES, config.seed):
        if len(some) >= _FEWEST_PER_FOLD * FOLDS:
            # One chunk: dividing so few rows between threads takes longer.
            found = _head_of_some(head, probed, some, classes, config.seed, _MOST_QUICK)
            assert found.out_of_fold is not None
            said = found.out_of_fold.probabilities[found.out_of_fold.chosen]
            curve.append((len(some), _over_folds(table, said, folds, config.metric)))
    return curve


def _main_directions(rows: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
    """Returns the coordinates of features along their main directions.

    Returns:
        (float32 `[N, R]`; what L2 strengths have to be multiplied by, because they
        refer to features of unit overall variance).
    """
    from sklearn.utils.extmath import randomized_svd

    if min(rows.shape) <= _QUICK_DIRECTIONS:
        return rows, 1.0
    centered = rows - rows.mean(0)
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        _, _, directions = randomized_svd(
            centered, _QUICK_DIRECTIONS, n_iter=2, random_state=seed
        )
    reduced = centered @ directions.T
    return reduced, float(centered.var() / reduced.var())


def _over_folds(
    table: Table, said: np.ndarray, folds: np.ndarray, metric: str | None
) -> Estimate:
    """Estimates the deciding metric over the folds in which it is defined."""
    name = deciding_metric(table.targets, metric)
    sign, most = (-1, math.inf) if name == "log_loss" else (1, 1.0)
    parts = [np.flatnonzero(folds == fold) for fold in range(FOLDS)]
    values = [
        sign * score(name, table.targets[part], said[part])
        for part in parts
        if len(np.unique(table.targets[part])) > 1
    ] or [sign * score(name, table.targets, said)]
    of_images = None
    if name == "accuracy":
        right = float((said.argmax(1) == table.targets).mean())
        images = independent_images(table.groups, len(table))
        of_images = as_interval(wilson(right, images))
    return estimate(values, 1 / FOLDS, (0.0, most), of_images)


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

    The result is remembered beside the cached features, for `kt bases`.

    Returns:
        Images per second that go through the base, or through all of several.
    """
    pixels, seconds = draw_rows(splits, part.image_size), 0.0
    for one in (part, *part.others):
        engine = make_engine(one.model, features.precision)
        each = seconds_per_image(engine, pixels)
        seconds += each
        measured = Throughput(
            base=one.base,
            image_size=one.image_size,
            engine=engine.name,
            precision=engine.precision,
            device=engine.device,
            images_per_second=1 / each,
        )
        remember(one.cache, measured)
    return 1 / seconds


def draw_rows(splits: Splits, image_size: int) -> np.ndarray:
    """Decodes 32 training images as uint8 `[32, image_size, image_size, 3]`.

    If there are fewer images, they are repeated.
    """
    images = [pixels for *_, pixels in sample_images(splits, image_size, _SAMPLE)]
    return np.resize(images, (_SAMPLE, *images[0].shape))
