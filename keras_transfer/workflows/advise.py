"""The workflow of `kt advise`: what the rules of advice.py need is measured.

The features are those of `kt fit`, which finds them in the cache afterwards.
"""

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
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
    FOLDS,
    SHARES,
    Probed,
    deal,
    draw_rows,
    images_per_second,
    learning_curve,
    probe,
)
from keras_transfer.advice.rules import (
    Advice,
    Evidence,
    Method,
    is_imbalanced,
    recommend,
)
from keras_transfer.config import Config, FinetuneConfig, HeadConfig, load_config
from keras_transfer.data.tables import Splits, Table, count_classes
from keras_transfer.evaluation.crossvalidation import estimate, fold_numbers
from keras_transfer.events import OnNote, OnProgress
from keras_transfer.features.base import frozen_base
from keras_transfer.features.engine import Extractor
from keras_transfer.features.extraction import frozen_features
from keras_transfer.features.usable import doubts, usable_splits
from keras_transfer.models.bases import DOWNLOAD_FREE, get_base, weights_path
from keras_transfer.models.classifier import attach_head, build_head, cut
from keras_transfer.models.layer_groups import (
    split_point,
    trained_layers,
    training_copy,
    unfrozen_groups,
)
from keras_transfer.models.torch_checkpoint import read_torch_checkpoint
from keras_transfer.runs.files import numbered
from keras_transfer.training.head import LabelledFeatures
from keras_transfer.training.optim import group_multipliers, layer_patterns
from keras_transfer.training.tail import measure_training
from keras_transfer.workflows.inputs import Inputs, prepare

NEIGHBOURS = 5

_UNFREEZE: dict[Method, str] = {"finetune-top": "top", "finetune-all": "all"}
_MOST_CLASSIFIED = 500  # training images that an ImageNet classifier is asked about
_FLAGS = {  # config keys, and the head's class_weight, that `kt fit` has options for
    *("base", "weights", "image_size", "class_weight", "augment", "folds"),
    *("precision", "max_skipped", "name", "runs_dir", "seed", "data_dir", "cache_dir"),
}


class Recommendation(BaseModel):
    """What `kt advise` says."""

    method: Method
    advice: list[Advice]
    """What each rule said, with its evidence."""
    evidence: Evidence
    """What was measured."""
    command: str
    """What to run."""


def advise(
    data: str | Path,
    *,
    budget: float | None = None,
    on_progress: OnProgress = lambda *_: None,
    on_note: OnNote = lambda _: None,
    **options: Any,
) -> Recommendation:
    """Measures which method suits a task, on its images and on this machine.

    Args:
        data: As of `fit`.
        budget: The most minutes that the method may take, features being cached.
        on_progress: Told how the work goes on.
        on_note: Told what is being measured, and what is doubtful in the data.
        **options: Config keys, such as `base="MobileNetV2"`.

    Raises:
        UsageError: If an option or the data are not usable, or the budget allows
            nothing.
        KerasTransferError: If the data or the weights are not good enough.
    """
    config = load_config(None, {**options, "data": str(data)})
    inputs = prepare(config, makes_run=False)
    return measure(inputs, options, budget, on_progress, on_note)


def measure(
    inputs: Inputs,
    options: Mapping[str, Any],
    budget: float | None,
    on_progress: OnProgress,
    on_note: OnNote,
) -> Recommendation:
    """Does what `advise` says, with inputs that were checked.

    The options are those that were given, for the command to run.
    """
    started = time.perf_counter()
    config, splits = inputs.config, inputs.splits
    for warning in splits.warnings:
        on_note(warning)
    fold_numbers(splits.train, len(splits.class_names), FOLDS, config.seed)
    part = frozen_base(config)
    loading = time.perf_counter() - started
    features = frozen_features(
        part, splits, 0, config.precision, on_progress=on_progress
    )
    usable = usable_splits(config, splits, features.extraction)
    for doubt in doubts(splits, usable, features.extraction):
        on_note(doubt)
    splits = usable
    probed = probe(config, splits, features)
    targets, classes = splits.train.targets, len(splits.class_names)

    on_note(f"probing the features of {len(probed.table):,} training images")
    curve, head_seconds = learning_curve(config, splits, probed, features)
    full = curve[SHARES[-1]]
    halves = zip(full.values, curve[0.5].values, strict=True)
    gain = estimate([all_ - half for all_, half in halves], 1 / FOLDS, lowest=-1.0)
    confidence, entropy = imagenet_certainty(config, splits, probed.table)

    on_note("measuring what methods take on this machine")
    seconds: dict[Method, float] = dict.fromkeys(
        ("extract", "more-data"), loading + head_seconds
    )
    nbytes: dict[Method, int] = dict.fromkeys(seconds, 0)
    for method, unfreeze in _UNFREEZE.items():
        more, nbytes[method] = _finetuning_costs(config, splits, part.model, unfreeze)
        seconds[method] = seconds["extract"] + more
    counts = count_classes(targets, classes)
    evidence = Evidence(
        images=len(targets),
        class_counts=dict(zip(splits.class_names, counts.tolist(), strict=True)),
        accuracy=full,
        curve=curve,
        gain=gain,
        # What a constant answer scores, in accuracy or in mean average precision.
        majority=float(counts.mean() if splits.multi_label else counts.max())
        / len(targets),
        neighbours=_neighbours(probed),
        logme=logme(probed.rows, probed.table.targets, classes, config.seed),
        imagenet_confidence=confidence,
        imagenet_entropy=entropy,
        images_per_second=images_per_second(part, splits, features),
        minutes={method: value / 60 for method, value in seconds.items()},
        gigabytes={method: value / 1e9 for method, value in nbytes.items()},
        disk=min(config.finetune.disk_budget_gb, part.cache.free_bytes() / 1e9),
    )
    method, advice = recommend(evidence, budget)
    return Recommendation(
        method=method,
        advice=list(advice),
        evidence=evidence,
        command=_command(inputs, method, options, is_imbalanced(evidence.class_counts)),
    )


def _neighbours(probed: Probed) -> float | None:
    """Accuracy of the nearest neighbours by cosine, cross-validated."""
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
    """How sure a classifier of ImageNet's classes is of images.

    Whatever the base is, efficientnet_lite0 is asked, whose installed weights hold
    their classifier. Its features are cached, as those of `fit` are.

    Args:
        config: What `fit` would be told.
        splits: The images.
        table: Some of them, of which a part is asked about.

    Returns:
        (mean probability of the likeliest class, mean entropy from 0 to 1).
    """
    row = get_base(DOWNLOAD_FREE)
    asked = {"base": row.name, "weights": "imagenet", "image_size": row.image_size}
    part = frozen_base(config.model_copy(update=asked))
    picked = deal(table.targets, config.seed)[:_MOST_CLASSIFIED]
    some = table.keep(table.sources[i] for i in picked)
    only = replace(splits, train=some, val=table.keep(()), test=table.keep(()))
    features = frozen_features(part, only, 0, config.precision)
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
    """(seconds, bytes of cached activations) that fine-tuning takes, for all images.

    Steps are timed in float32; where bfloat16 is faster it takes less.
    """
    tuning, classes = config.finetune, len(splits.class_names)
    head = build_head(HeadConfig(), base.output_shape[1], classes, splits.multi_label)
    model = attach_head(base, head)
    groups = unfrozen_groups(model, get_base(config.base), unfreeze)
    unfrozen = {layer for layers in groups.values() for layer in layers}
    frozen, tail = cut(model, split_point(model, unfrozen))
    rows, below, itemsize = draw_rows(splits, model.input_shape[1]), 0.0, 1
    if frozen.weights:
        extractor = Extractor(frozen)
        below, itemsize = extractor.measure(rows), 2
        rows = extractor.predict(rows)
    size = tuning.batch_size
    steps = measure_training(
        tuning,
        partial(training_copy, tail, unfrozen, tuning.train_bn),
        layer_patterns(
            trained_layers(groups, tuning.train_bn),
            group_multipliers(list(groups), tuning.decay),
        ),
        LabelledFeatures(
            [np.resize(rows, (size, *rows.shape[1:]))],
            np.resize(splits.train.targets, (size, *splits.train.targets.shape[1:])),
            classes,
            np.ones((2, classes), np.float32),
        ),
    )
    images = sum(len(table) for _, table in splits.items())
    training = tuning.epochs * len(splits.train) / size * steps
    return images * below + training, images * rows[0].size * itemsize


def _command(
    inputs: Inputs, method: Method, options: Mapping[str, Any], balanced: bool
) -> str:
    """What to run, with the options that were given."""
    config, run = inputs.config, inputs.run.run_dir
    added: dict[str, Any] = {}
    if balanced and config.head.class_weight != "balanced":
        added["class_weight"] = "balanced"
    if run.exists() and not config.overwrite:
        run = next(path for path in numbered(run) if not path.exists())
        added["name"] = run.name
    given = {**options, **added}
    flags = [
        f"--{key.replace('_', '-')} {shlex.quote(str(value))}"
        if key in _FLAGS
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
