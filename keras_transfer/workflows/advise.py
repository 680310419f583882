"""The workflow of `kt advise`: measures what the rules in advice/ need.

The features are the same as those of `kt fit`, which finds them in the cache later.
"""

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import scipy.special
from pydantic import BaseModel
from sklearn.neighbors import KNeighborsClassifier

from keras_transfer.advice.logme import logme
from keras_transfer.advice.probe import (
    SHARES,
    Probed,
    deal,
    draw_rows,
    images_per_second,
    learning_curve,
    probe,
)
from keras_transfer.advice.rules import (
    METHODS,
    Advice,
    Evidence,
    Method,
    is_imbalanced,
    recommend,
)
from keras_transfer.config import (
    FLAGS,
    Config,
    FinetuneConfig,
    HeadConfig,
)
from keras_transfer.data.in_memory.forms import NOT_KEPT
from keras_transfer.data.tables import Splits, Table, count_classes
from keras_transfer.evaluation.crossvalidation import FOLDS, estimate, fold_numbers
from keras_transfer.events import Listener
from keras_transfer.features.base import frozen_base
from keras_transfer.features.engine import make_engine, predict, seconds_per_image
from keras_transfer.features.frozen_part import FrozenPart, Storage, frozen_features
from keras_transfer.features.usable import usable_splits
from keras_transfer.markup import html_table
from keras_transfer.models.bases import (
    DOWNLOAD_FREE,
    get_base,
    get_bases,
    weights_path,
)
from keras_transfer.models.classifier import attach_head, build_head
from keras_transfer.models.cut import cut, pooled_below, split_point
from keras_transfer.models.layer_groups import (
    trained_layers,
    training_copy,
    unfrozen_groups,
)
from keras_transfer.models.torch_checkpoint import read_torch_checkpoint
from keras_transfer.runs.files import numbered
from keras_transfer.runs.manifest import Estimate
from keras_transfer.training.labelled import LabelledFeatures, Weighting
from keras_transfer.training.optim import group_multipliers, layer_patterns
from keras_transfer.training.tail import TailRecipe, measure_training
from keras_transfer.workflows.audit import quick_audit
from keras_transfer.workflows.inputs import Inputs

NEIGHBOURS = 5

_UNFREEZE: dict[Method, str] = {"finetune-top": "top", "finetune-all": "all"}
_MOST_CLASSIFIED = 500  # training images to run an ImageNet classifier on


class Recommendation(BaseModel):
    """The result of `kt advise`."""

    method: Method
    """The recommended method."""
    advice: list[Advice]
    """The conclusion of each rule, with its evidence."""
    evidence: Evidence
    """The measurements."""
    command: str
    """Shell command to run; for images in memory, a Python expression."""

    def _repr_html_(self) -> str:
        """What notebooks show: the advice, and the command to run."""
        rows = [(one.rule, one.message) for one in self.advice]
        caption = f"Recommended: {METHODS[self.method]}"
        return html_table(caption, (), [*rows, ("command", self.command)])


def measure(
    inputs: Inputs,
    options: Mapping[str, Any],
    budget: float | None,
    listener: Listener,
) -> Recommendation:
    """Implements `api.advise`.

    Args:
        inputs: Checked inputs.
        options: Config keys that the user gave, to repeat in the recommended command.
        budget: Maximum number of minutes that the method may take; None for no limit.
        listener: Receives notes and progress.

    Raises:
        UsageError: If no method fits the budget, or there are too few images for
            cross-validation.
        KerasTransferError: If the data or the weights cannot be used.
    """
    config = inputs.config
    for warning in inputs.splits.warnings:
        listener.note(warning)
    train, classes = inputs.splits.train, len(inputs.splits.class_names)
    fold_numbers(train, classes, FOLDS, config.seed)

    # Compute the features that `fit` would train its head on.
    started = time.perf_counter()
    part = frozen_base(config)
    loading = time.perf_counter() - started
    storage = Storage(config.precision, quality=True)
    features = frozen_features(part, inputs.splits, 0, storage, listener)
    splits = usable_splits(config, inputs.splits, features.extraction)
    quick_audit(config.data, inputs.splits, splits, features, (), config.seed, listener)
    probed = probe(config, splits, features)

    # Probe the features, and measure what each method costs on this machine.
    listener.note(f"probing the features of {len(probed.table):,} training images")
    curve, head_seconds = learning_curve(config, splits, probed)
    listener.note("measuring what methods take on this machine")
    costs = _costs(config, splits, part, loading + head_seconds)
    speed = images_per_second(part, splits, features)
    evidence = _evidence(config, splits, probed, curve, costs, speed)

    method, advice = recommend(evidence, budget)
    return Recommendation(
        method=method,
        advice=list(advice),
        evidence=evidence,
        command=command_line(
            inputs, method, options, is_imbalanced(evidence.class_counts)
        ),
    )


@dataclass(frozen=True)
class _Costs:
    """Costs of the methods.

    Attributes:
        seconds: Estimated seconds for each method.
        nbytes: Bytes of cached activations for each method.
        disk_gigabytes: Disk space for activations, in units of 10^9 bytes.
    """

    seconds: Mapping[Method, float]
    nbytes: Mapping[Method, int]
    disk_gigabytes: float


def _costs(config: Config, splits: Splits, part: FrozenPart, fit: float) -> _Costs:
    """Estimates the costs of all methods; `fit` is the seconds of fitting a head."""
    seconds: dict[Method, float] = {"extract": fit, "more-data": fit}
    nbytes: dict[Method, int] = dict.fromkeys(seconds, 0)
    for method, unfreeze in _UNFREEZE.items():
        more, nbytes[method] = _finetuning_costs(config, splits, part.model, unfreeze)
        seconds[method] = fit + more
    free = min(config.finetune.disk_budget_gb, part.cache.free_bytes() / 1e9)
    return _Costs(seconds, nbytes, free)


def _evidence(
    config: Config,
    splits: Splits,
    probed: Probed,
    curve: Mapping[float, Estimate],
    costs: _Costs,
    speed: float,
) -> Evidence:
    targets, classes = splits.train.targets, len(splits.class_names)
    counts = count_classes(targets, classes)
    full = curve[SHARES[-1]]
    halves = zip(full.values, curve[0.5].values, strict=True)
    gains = [all_ - half for all_, half in halves]
    confidence, entropy = imagenet_certainty(config, splits, probed.table)
    return Evidence(
        images=len(targets),
        class_counts=dict(zip(splits.class_names, counts.tolist(), strict=True)),
        accuracy=full,
        curve=curve,
        gain=estimate(gains, 1 / FOLDS, (-1.0, 1.0)),
        # Score of a constant prediction: its accuracy or mean average precision.
        majority=float(counts.mean() if splits.multi_label else counts.max())
        / len(targets),
        neighbours=_neighbours(probed),
        logme=logme(probed.rows, probed.table.targets, classes, config.seed),
        imagenet_confidence=confidence,
        imagenet_entropy=entropy,
        images_per_second=speed,
        minutes={method: value / 60 for method, value in costs.seconds.items()},
        gigabytes={method: value / 1e9 for method, value in costs.nbytes.items()},
        disk=costs.disk_gigabytes,
    )


def _neighbours(probed: Probed) -> float | None:
    """Cross-validates the accuracy of the nearest neighbors by cosine similarity."""
    targets, rows = probed.table.targets, probed.rows
    if targets.ndim == 2:
        return None
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    right = 0
    for fold in range(FOLDS):
        inside, held_out = probed.folds != fold, probed.folds == fold
        classifier = KNeighborsClassifier(min(NEIGHBOURS, int(inside.sum())))
        classifier.fit(rows[inside], targets[inside])
        right += int((classifier.predict(rows[held_out]) == targets[held_out]).sum())
    return right / len(targets)


def imagenet_certainty(
    config: Config, splits: Splits, table: Table
) -> tuple[float, float]:
    """Measures how certain an ImageNet classifier is about images.

    The classifier is always efficientnet_lite0, whatever the base is, because its
    installed weights include the classifier. Its features are cached like those of
    `fit`.

    Args:
        config: The resolved config.
        splits: The images.
        table: Some of the images; at most 500 of them are used.

    Returns:
        (mean probability of the most likely class, mean entropy), both from 0 to 1; the
        entropy is relative to its maximum.
    """
    row = get_base(DOWNLOAD_FREE)
    asked = {"base": row.name, "weights": "imagenet", "image_size": row.image_size}
    part = frozen_base(config.model_copy(update=asked))
    picked = deal(table.targets, config.seed)[:_MOST_CLASSIFIED]
    some = table.select(np.sort(picked))
    only = replace(splits, train=some, val=table.keep(()), test=table.keep(()))
    features = frozen_features(part, only, 0, Storage(config.precision))
    arrays = read_torch_checkpoint(weights_path(row))
    weights, bias = arrays["_fc.weight"], arrays["_fc.bias"]
    logits = features.rows(some.sources)[:] @ weights.T + bias
    log_probabilities = scipy.special.log_softmax(logits, axis=1)
    probabilities = np.exp(log_probabilities)
    entropy = -(probabilities * log_probabilities).sum(1) / np.log(len(bias))
    return float(probabilities.max(1).mean()), float(entropy.mean())


def _finetuning_costs(
    config: Config, splits: Splits, base: keras.Model, unfreeze: str
) -> tuple[float, int]:
    """Estimates the costs of fine-tuning for all images.

    Steps are timed in float32; training may be faster in bfloat16.

    Returns:
        (seconds, bytes of cached activations).
    """
    tuning, classes = config.finetune, len(splits.class_names)
    head = build_head(HeadConfig(), base.output_shape[1], classes, splits.multi_label)
    model = attach_head(base, head)
    groups = unfrozen_groups(model, get_bases(config.base)[0], unfreeze)
    unfrozen = {layer for layers in groups.values() for layer in layers}
    point = split_point(model, unfrozen)
    frozen, tail = cut(model, point, pooled_below(model, point, unfrozen))
    rows, below, itemsize = draw_rows(splits, model.input_shape[1]), 0.0, 1
    if frozen.weights:
        engine = make_engine(frozen)
        below, itemsize = seconds_per_image(engine, rows), 2
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
    steps = measure_training(
        recipe,
        LabelledFeatures(
            [np.resize(rows, (size, *rows.shape[1:]))],
            np.resize(splits.train.targets, (size, *splits.train.targets.shape[1:])),
            Weighting.equal(classes),
        ),
    )
    images = sum(len(table) for _, table in splits.items())
    training = tuning.epochs * len(splits.train) / size * steps
    return images * below + training, images * rows[0].size * itemsize


def command_line(
    inputs: Inputs, method: Method, options: Mapping[str, Any], balanced: bool
) -> str:
    """Builds the shell command for a method, or the Python call for images in memory.

    Args:
        inputs: The inputs that the advice is for.
        method: The recommended method.
        options: Config keys that the user gave; None means not given.
        balanced: Whether to balance class weights.

    Returns:
        One line. It keeps an existing run unless overwriting was requested.
    """
    config, run = inputs.config, inputs.run.run_dir
    added: dict[str, Any] = {}
    if balanced and config.head.class_weight != "balanced":
        added["head.class_weight"] = "balanced"
    if run.exists() and not config.overwrite:
        run = next(path for path in numbered(run) if not path.exists())
        added["name"] = run.name
    given = {**options, **added}
    if inputs.in_memory is not None:
        return _python_call(method, given, config.data not in NOT_KEPT)
    flags = [
        f"{FLAGS[key]} {shlex.quote(str(value))}"
        if key in FLAGS
        else f"--set {shlex.quote(f'{key}={json.dumps(value)}')}"
        for key, value in given.items()
        if value is not None
    ]
    command = " ".join(["kt fit", shlex.quote(config.data), *flags])
    if method in _UNFREEZE:
        command += f" && kt unfreeze-and-finetune {shlex.quote(str(run))}"
        if _UNFREEZE[method] != FinetuneConfig().unfreeze:
            command += f" --unfreeze {_UNFREEZE[method]}"
    return command


def _python_call(method: Method, options: Mapping[str, Any], is_kept: bool) -> str:
    """Builds the Python expression for a method on images that are in memory.

    Args:
        method: The recommended method.
        options: Config keys that were given or are recommended.
        is_kept: Whether fine-tuning can find the images again.
    """
    given: dict[str, Any] = {}
    for key, value in options.items():
        if value is not None:
            section, _, name = key.rpartition(".")
            plain = str(value) if isinstance(value, Path) else value
            if section:
                given[section] = {**given.get(section, {}), name: plain}
            elif isinstance(value, Mapping):
                given[name] = {**given.get(name, {}), **value}
            else:
                given[name] = plain
    arguments = ["data", *(f"{key}={value!r}" for key, value in given.items())]
    call = f"keras_transfer.fit({', '.join(arguments)})"
    if method not in _UNFREEZE:
        return call
    arguments = [call, f"unfreeze={_UNFREEZE[method]!r}"]
    arguments += [] if is_kept else ["data=data"]
    return f"keras_transfer.unfreeze_and_finetune({', '.join(arguments)})"
