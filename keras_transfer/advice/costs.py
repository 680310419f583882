"""What each method takes on this machine, measured on a few images."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from keras_transfer.advice.evidence import Method
from keras_transfer.advice.probe import draw_rows
from keras_transfer.config import Config, HeadConfig
from keras_transfer.data.tables import Splits
from keras_transfer.features.engine import make_engine, predict, seconds_per_image
from keras_transfer.features.frozen_part import FrozenPart
from keras_transfer.models.bases import get_bases
from keras_transfer.models.classifier import attach_head, build_head, join_bases
from keras_transfer.models.cut import cut, pooled_below, split_point
from keras_transfer.models.layer_groups import (
    trained_layers,
    training_copy,
    unfrozen_groups,
)
from keras_transfer.training.labelled import LabelledFeatures, Weighting
from keras_transfer.training.optim import group_multipliers, layer_patterns
from keras_transfer.training.tail import TailRecipe, measure_training

UNFREEZE: dict[Method, str] = {"finetune-top": "top", "finetune-all": "all"}
"""Layers that each method of fine-tuning trains, as the config says it."""


@dataclass(frozen=True)
class TuningCosts:
    """What fine-tuning takes; steps are timed in float32, and may be faster otherwise.

    Attributes:
        forward: Seconds that the frozen part takes for an image.
        learning: Seconds that an epoch takes for an image.
        setup: Seconds before the first step.
        row_bytes: Bytes of an image's cached activation.
    """

    forward: float
    learning: float
    setup: float
    row_bytes: int


@dataclass(frozen=True)
class Costs:
    """What the methods take.

    Attributes:
        seconds: Estimated seconds for each method.
        nbytes: Bytes of cached activations for each method.
        disk_gigabytes: Disk space for activations, in units of 10^9 bytes.
        head: Seconds of training a head.
        top: What fine-tuning of the top stage takes.
    """

    seconds: Mapping[Method, float]
    nbytes: Mapping[Method, int]
    disk_gigabytes: float
    head: float
    top: TuningCosts


def method_costs(
    config: Config, splits: Splits, part: FrozenPart, loading: float, head: float
) -> Costs:
    """Estimates the costs of all methods for all images.

    Args:
        config: The resolved config.
        splits: The images.
        part: The frozen base.
        loading: Seconds that it takes to load the base.
        head: Seconds that it takes to train a head.
    """
    fit = loading + head
    seconds: dict[Method, float] = {"extract": fit, "more-data": fit}
    nbytes: dict[Method, int] = dict.fromkeys(seconds, 0)
    images = sum(len(table) for _, table in splits.items())
    costs = {}
    for method, unfreeze in UNFREEZE.items():
        costs[method] = one = tuning_costs(config, splits, part, unfreeze)
        learned = config.finetune.epochs * len(splits.train)
        seconds[method] = fit + images * one.forward + learned * one.learning
        nbytes[method] = images * one.row_bytes
    free = min(config.finetune.disk_budget_gb, part.cache.free_bytes() / 1e9)
    return Costs(seconds, nbytes, free, head, costs["finetune-top"])


def tuning_costs(
    config: Config, splits: Splits, part: FrozenPart, unfreeze: str
) -> TuningCosts:
    """Measures what fine-tuning takes, on a batch."""
    tuning, classes = config.finetune, len(splits.class_names)
    base = join_bases(part.models, config.features == "stages")
    head = build_head(HeadConfig(), base.output_shape[1], classes, splits.multi_label)
    model = attach_head(base, head)
    groups = unfrozen_groups(model, get_bases(config.base)[0], unfreeze)
    unfrozen = {layer for layers in groups.values() for layer in layers}
    point = split_point(model, unfrozen)
    frozen, tail = cut(model, point, pooled_below(model, point, unfrozen))
    rows, forward, itemsize = draw_rows(splits, model.input_shape[1]), 0.0, 1
    if frozen.weights:
        engine = make_engine(frozen)
        forward, itemsize = seconds_per_image(engine, rows), 2
        rows = predict(engine, rows)
    size = tuning.batch_size
    recipe = TailRecipe(
        tuning,
        partial(training_copy, tail, unfrozen, tuning.train_bn),
        layer_patterns(
            trained_layers(groups, tuning.train_bn),
            group_multipliers(list(groups), tuning.decay),
        ),
    )
    batch = LabelledFeatures(
        [np.resize(rows, (size, *rows.shape[1:]))],
        np.resize(splits.train.targets, (size, *splits.train.targets.shape[1:])),
        Weighting.equal(classes),
    )
    started = time.perf_counter()
    step = float(measure_training(recipe, batch))
    setup = time.perf_counter() - started
    return TuningCosts(forward, step / size, setup, rows[0].size * itemsize)
