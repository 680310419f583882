"""Cached features -> a trained head.

The L2 strength (and the number of epochs of an mlp) is chosen by cross-validation on
the training images, so that no image has to be held out for it. The head itself learns
from all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import keras
import numpy as np

from keras_transfer.config import Config, HeadConfig, Metric
from keras_transfer.data.tables import Splits
from keras_transfer.evaluation.crossvalidation import OutOfFold, head_folds
from keras_transfer.evaluation.metrics import score
from keras_transfer.events import SILENT, Listener
from keras_transfer.features.cache import Features
from keras_transfer.features.frozen_part import FrozenFeatures
from keras_transfer.features.usable import keep_copies_together
from keras_transfer.models.classifier import build_head, set_raw_weights
from keras_transfer.training.candidates import Candidate
from keras_transfer.training.labelled import (
    CHUNK_ROWS,
    LabelledFeatures,
    class_weighting,
    label_features,
    relative_weights,
    scalings,
)
from keras_transfer.training.linear import linear_candidates
from keras_transfer.training.mlp import mlp_candidates

KINDS = {"last": (False,), "stages": (True,), "auto": (False, True)}
"""Whether heads to choose from read outputs of stages below the top, by the config's
features."""

LINEAR_L2 = tuple(10.0**exponent for exponent in np.arange(1, -5.5, -0.5).tolist())
"""L2 strengths tried for a linear head, on features scaled to unit overall variance."""

MLP_L2 = (3e-2, 1e-3)
"""L2 strengths tried for an mlp, on features scaled in the same way."""

_CLEARLY_WORSE = 1.01  # loss over the lowest one; losses along the path have one valley


@dataclass(frozen=True)
class TrainedHead:
    """A trained head and its training history.

    Attributes:
        model: Model from float32 `[N, D]` features to float32 `[N, num_classes]`
            probabilities.
        l2: The L2 strength that was chosen.
        history: One dict per row of `history.csv`: l2, epoch, loss and val_loss. The
            losses are mean cross-entropies in nats without the L2 term: of the training
            images, and out of fold. The latter is NaN without folds.
        out_of_fold: Out-of-fold predictions; None without folds.
        groups: Group of each training image, by which the folds were dealt: copies of
            an image share one, and "" is a group of its own. Empty for given folds.
        stages: Whether the pooled outputs of stages below the top are among the
            features.
    """

    model: keras.Model
    l2: float
    history: list[dict[str, float]] = field(default_factory=list)
    out_of_fold: OutOfFold | None = None
    groups: tuple[str, ...] = ()
    stages: bool = False


def train_head(
    config: HeadConfig,
    data: LabelledFeatures,
    folds: np.ndarray | None,
    seed: int,
    listener: Listener = SILENT,
    metric: Metric | None = None,
) -> TrainedHead:
    """Trains a head with the L2 strength that is best out of fold.

    Args:
        config: Options of the head.
        data: The N images to train on.
        folds: int64 `[N]` fold of each image, starting at 0; -1 for images that all
            heads learn from. None takes the middle of the grid of strengths.
        seed: Seed of an mlp's initial weights, dropout and order of images.
        listener: Receives progress after each L2 strength, and its epochs.
        metric: The metric that chooses; the loss breaks ties. None chooses by the loss,
            which has less noise than a count of right images.
    """
    grid = sorted(
        config.l2 or (LINEAR_L2 if config.kind == "linear" else MLP_L2), reverse=True
    )
    if folds is None:
        grid = [grid[(len(grid) - 1) // 2]]
    if config.kind == "linear":
        solve = linear_candidates(config, data, folds)
    else:
        solve = mlp_candidates(config, data, folds, seed)
    candidates: list[Candidate] = []
    lowest = math.inf
    for number, l2 in enumerate(grid, start=1):
        found = list(solve(l2))
        candidates += found
        for one in found:
            listener.epoch("fit", one.epoch, _row(one))
        listener.progress("head", number, len(grid))
        loss = min(one.val_loss for one in found)
        lowest = min(lowest, loss)
        if metric is None and loss > _CLEARLY_WORSE * lowest:
            break
    return _chosen(config, data, folds, candidates, metric)


def train_on_features(
    config: Config, splits: Splits, features: FrozenFeatures, listener: Listener
) -> TrainedHead:
    """Trains a head on the cached features of the training images.

    Args:
        config: The resolved config.
        splits: The usable images; those of `train` are learned from.
        features: Their features, in as many views as the config says.
        listener: Receives progress and epochs.
    """
    table, names = splits.train, splits.class_names
    apart = keep_copies_together(table, features.extraction)
    folds = head_folds(apart, len(names), config.folds, config.seed)
    kinds = KINDS[config.features]
    heads = [
        train_head(
            config.head,
            _labelled(config, splits, features, stages),
            folds,
            config.seed,
            listener,
            config.metric,
        )
        for stages in (kinds if folds is not None else kinds[:1])
    ]
    best = _best_of(heads, table.targets, config.metric)
    if len(heads) > 1:
        losses = [_loss(head) for head in heads]
        listener.note(
            f"features {('last', 'stages')[best]}: out of fold, the loss of a head on "
            f"the last stage is {losses[0]:.4f}, on several stages {losses[1]:.4f}"
        )
    return replace(
        heads[best],
        out_of_fold=_together(heads, best),
        groups=apart.groups,
        stages=kinds[best],
    )


def _labelled(
    config: Config, splits: Splits, features: FrozenFeatures, stages: bool
) -> LabelledFeatures:
    """Combines what a head reads of the training images with their labels."""
    table, head = splits.train, config.head
    weighting = class_weighting(
        table.targets, splits.class_names, head.class_weight, head.logit_adjustment
    )
    return label_features(
        [
            features.head_inputs(table.sources, stages, view)
            for view in range(config.augment + 1)
        ],
        table.targets,
        weighting,
        relative_weights(table),
        widths=features.head_widths(stages),
    )


def _best_of(
    heads: Sequence[TrainedHead], targets: np.ndarray, metric: Metric | None
) -> int:
    """Returns the index of the head that is best out of fold; see `train_head`."""
    if len(heads) == 1:
        return 0
    keys = []
    for head in heads:
        found, figure = head.out_of_fold, 0.0
        if metric and found:
            said = found.probabilities[found.chosen]
            figure = score(metric, targets[found.rows], said)
        keys.append((figure, -_loss(head)))
    return max(range(len(keys)), key=keys.__getitem__)


def _loss(head: TrainedHead) -> float:
    """Returns the mean out-of-fold loss of a head in nats."""
    found = head.out_of_fold
    assert found is not None
    return float(found.losses[found.chosen].mean())


def _together(heads: Sequence[TrainedHead], best: int) -> OutOfFold | None:
    """Joins the candidates of all heads, as those that the best was chosen from."""
    found = [head.out_of_fold for head in heads if head.out_of_fold is not None]
    if not found:
        return None
    return OutOfFold(
        found[0].folds,
        np.concatenate([one.probabilities for one in found]),
        np.concatenate([one.losses for one in found]),
        sum(len(one.losses) for one in found[:best]) + found[best].chosen,
    )


def _chosen(
    config: HeadConfig,
    data: LabelledFeatures,
    folds: np.ndarray | None,
    candidates: Sequence[Candidate],
    metric: Metric | None,
) -> TrainedHead:
    best, out_of_fold = 0, None
    if folds is not None:
        said = np.stack([one.out_of_fold for one in candidates])  # type: ignore[misc]
        rows = np.flatnonzero(folds >= 0)
        losses = np.stack([data.losses_of(one, rows) for one in said])
        figures = [
            score(metric, data.targets[rows], one) if metric else 0.0 for one in said
        ]
        keys = [
            (figure, -one.val_loss)
            for figure, one in zip(figures, candidates, strict=True)
        ]
        best = max(range(len(keys)), key=keys.__getitem__)
        out_of_fold = OutOfFold(folds, said, losses, best)
    num_features, is_scaled = data.views[0].shape[1], len(data.widths) > 1
    head = build_head(
        config, num_features, data.num_classes, data.multi_label, is_scaled=is_scaled
    )
    spread = None
    if is_scaled:
        own = scalings(data, np.full(len(data.targets), -1))[0]
        spread = own.mean, own.scale
    set_raw_weights(head, candidates[best].weights, spread)
    history = [_row(one) for one in candidates]
    return TrainedHead(head, candidates[best].l2, history, out_of_fold)


def _row(candidate: Candidate) -> dict[str, float]:
    return {
        "l2": candidate.l2,
        "epoch": candidate.epoch,
        "loss": candidate.loss,
        "val_loss": candidate.val_loss,
    }


def predict_images(
    head: TrainedHead, features: FrozenFeatures, sources: Sequence[str]
) -> np.ndarray:
    """Computes float32 `[N, num_classes]` probabilities of images from features."""
    return predict_head(head.model, features.head_inputs(sources, head.stages))


def predict_head(
    head: keras.Model, features: Features | np.ndarray, chunk_rows: int = CHUNK_ROWS
) -> np.ndarray:
    """Computes float32 `[N, num_classes]` probabilities from `[N, D]` features."""
    parts = [np.zeros((0, head.output_shape[-1]), np.float32)]
    for start in range(0, len(features), chunk_rows):
        chunk = features[start : start + chunk_rows]
        parts.append(np.asarray(head(chunk, training=False)))
    return np.concatenate(parts)
