"""The workflow of `kt advise`: what the rules of advice.py need is measured.

The features are those of `kt fit`, which finds them in the cache afterwards.
"""

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import keras
import numpy as np
import scipy.special
from pydantic import BaseModel
from sklearn.neighbors import KNeighborsClassifier

from keras_transfer.advice import Advice, Evidence, Method, recommend
from keras_transfer.bases import get_base, weights_path
from keras_transfer.config import Config, FinetuneConfig, HeadConfig, load_config
from keras_transfer.crossvalidation import estimate, fold_numbers
from keras_transfer.data import Splits, count_classes
from keras_transfer.data import load as load_data
from keras_transfer.evaluation import evaluate, score
from keras_transfer.extract import Extractor, FrozenFeatures, frozen_features
from keras_transfer.feature_extraction import frozen_base, resolve, usable_splits
from keras_transfer.head import (
    LabelledFeatures,
    class_weights,
    label_features,
    predict_head,
    train_head,
)
from keras_transfer.model import attach_head, build_head, cut
from keras_transfer.optim import group_multipliers, layer_patterns
from keras_transfer.prediction import sample_images
from keras_transfer.run import Estimate, OnNote, OnProgress
from keras_transfer.tail import measure_training
from keras_transfer.torch_checkpoint import read_torch_checkpoint
from keras_transfer.transferability import logme
from keras_transfer.unfreeze import (
    split_point,
    trained_layers,
    training_copy,
    unfrozen_groups,
)

SHARES = (0.25, 0.5, 1.0)
"""Of the training images, in the learning curve."""

FOLDS = 5
NEIGHBOURS = 5

_UNFREEZE: dict[Method, str] = {"finetune-top": "top", "finetune-all": "all"}
_MOST_PROBED = 20_000  # training images, whose features are held in memory
_SAMPLE = 32  # images that are run to measure how long they take


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
    data: str,
    *,
    budget: float | None = None,
    on_progress: OnProgress = lambda *_: None,
    on_note: OnNote = lambda _: None,
    **options: Any,
) -> Recommendation:
    """Measures which method suits a task, on its images and on this machine.

    Args:
        data: As of `fit`.
        budget: The most minutes that the method may take.
        on_progress: Told how the work goes on.
        on_note: Told what is being measured.
        **options: Config keys, such as `base="MobileNetV2"`.

    Raises:
        UsageError: If an option or the data are not usable, or the budget allows
            nothing.
        KerasTransferError: If the data or the weights are not good enough.
    """
    config = resolve(load_config(None, {**options, "data": data}))
    splits = load_data(config.data, config.splits, config.seed, config.data_dir)
    fold_numbers(splits.train, len(splits.class_names), FOLDS, config.seed)
    part = frozen_base(config)
    features = frozen_features(
        part, splits, 0, config.precision, on_progress=on_progress
    )
    splits = usable_splits(config, splits, features.extraction)
    probed = probed_splits(splits, config.seed)
    rows = features.rows(probed.train.sources)[:]

    on_note(f"probing the features of {len(rows):,} training images")
    curve, head_seconds = learning_curve(config, probed, features)
    full = curve[SHARES[-1]]
    halves = zip(full.values, curve[0.5].values, strict=True)
    gain = estimate([all_ - half for all_, half in halves], 1 / FOLDS, lowest=-1.0)

    on_note("measuring what methods take on this machine")
    minutes, gigabytes = _costs(config, splits, part.model, head_seconds)
    targets, classes = splits.train.targets, len(splits.class_names)
    counts = count_classes(targets, classes)
    confidence, entropy = imagenet_certainty(config, rows)
    evidence = Evidence(
        class_counts=dict(zip(splits.class_names, counts.tolist(), strict=True)),
        accuracy=full,
        curve=curve,
        gain=gain,
        # What a constant answer scores, in accuracy or in mean average precision.
        majority=float(counts.mean() if splits.multi_label else counts.max())
        / len(targets),
        neighbours=_neighbours(config, probed, rows),
        logme=logme(rows, probed.train.targets, classes, config.seed),
        imagenet_confidence=confidence,
        imagenet_entropy=entropy,
        minutes=minutes,
        gigabytes=gigabytes,
    )
    method, advice = recommend(evidence, budget)
    return Recommendation(
        method=method,
        advice=list(advice),
        evidence=evidence,
        command=_command(config, method, options),
    )


def probed_splits(splits: Splits, seed: int) -> Splits:
    """The splits, with no more training images than probes need."""
    sources = splits.train.sources
    if len(sources) <= _MOST_PROBED:
        return splits
    picked = _dealt(splits.train.targets, seed)[:_MOST_PROBED]
    return replace(splits, train=splits.train.keep(sources[i] for i in picked))


def learning_curve(
    config: Config,
    splits: Splits,
    features: FrozenFeatures,
    shares: Sequence[float] = SHARES,
) -> tuple[Mapping[float, Estimate], float]:
    """The accuracy of probes with shares of the training images, cross-validated.

    Returns:
        (share to accuracy, seconds that the run's own head took).
    """
    table, classes = splits.train, len(splits.class_names)
    weights = class_weights(table.targets, classes, balanced=False)
    rows = features.rows(table.sources)[:]

    def labelled(index: np.ndarray) -> LabelledFeatures:
        return LabelledFeatures([rows[index]], table.targets[index], classes, weights)

    started = time.perf_counter()
    val = label_features(
        [features.rows(splits.val.sources)], splits.val.targets, classes, weights
    )
    chosen = train_head(HeadConfig(), labelled(np.arange(len(rows))), val, config.seed)
    seconds = time.perf_counter() - started
    probe = HeadConfig(l2=(chosen.l2,))
    nothing = labelled(np.arange(0))
    numbers = fold_numbers(table, classes, FOLDS, config.seed)
    found: dict[float, list[float]] = {share: [] for share in shares}
    for fold in range(FOLDS):
        # In the order of a finer dealing, any first part has all classes alike.
        inside = np.flatnonzero(numbers != fold)
        inside = inside[_dealt(table.targets[inside], config.seed + fold)]
        held_out = np.flatnonzero(numbers == fold)
        for share in shares:
            some = inside[: max(round(share * len(inside)), 1)]
            head = train_head(probe, labelled(np.sort(some)), nothing, config.seed)
            evaluation = evaluate(
                table.targets[held_out],
                predict_head(head.model, rows[held_out]),
                splits.class_names,
            )
            found[share].append(score(evaluation)[0])
    return {share: estimate(v, 1 / FOLDS) for share, v in found.items()}, seconds


def _dealt(targets: np.ndarray, seed: int) -> np.ndarray:
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


def _neighbours(config: Config, splits: Splits, rows: np.ndarray) -> float | None:
    """Accuracy of the nearest neighbours by cosine, cross-validated."""
    targets = splits.train.targets
    if targets.ndim == 2:
        return None
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    numbers = fold_numbers(splits.train, len(splits.class_names), FOLDS, config.seed)
    right = 0
    for fold in range(FOLDS):
        inside, held_out = numbers != fold, numbers == fold
        classifier = KNeighborsClassifier(min(NEIGHBOURS, int(inside.sum())))
        classifier.fit(rows[inside], targets[inside])
        right += int((classifier.predict(rows[held_out]) == targets[held_out]).sum())
    return right / len(targets)


def imagenet_certainty(
    config: Config, rows: np.ndarray
) -> tuple[float | None, float | None]:
    """How sure the base's own classifier is of ImageNet classes.

    Returns:
        (mean probability of the likeliest class, mean entropy from 0 to 1); None where
        the base's weights have no classifier.
    """
    base = get_base(config.base)
    if base.name != "efficientnet_lite0" or config.weights != "imagenet":
        return None, None
    arrays = read_torch_checkpoint(weights_path(base))
    logits = rows @ arrays["_fc.weight"].T + arrays["_fc.bias"]
    log_probabilities = scipy.special.log_softmax(logits, axis=1)
    probabilities = np.exp(log_probabilities)
    entropy = -(probabilities * log_probabilities).sum(1) / np.log(logits.shape[1])
    return float(probabilities.max(1).mean()), float(entropy.mean())


def _costs(
    config: Config, splits: Splits, base: keras.Model, head_seconds: float
) -> tuple[dict[Method, float], dict[Method, float]]:
    """(minutes, gigabytes of cached activations) of each method, for all images."""
    tuning, classes = config.finetune, len(splits.class_names)
    head = build_head(HeadConfig(), base.output_shape[1], classes, splits.multi_label)
    model = attach_head(base, head)
    sample = sample_images(splits, model.input_shape[1], _SAMPLE)
    pixels = np.stack([decoded for _, _, decoded in sample])
    images = sum(len(table) for _, table in splits.items())
    extraction = images * Extractor(base).measure(pixels) + head_seconds
    minutes: dict[Method, float] = {
        "extract": extraction / 60,
        "more-data": extraction / 60,
    }
    gigabytes: dict[Method, float] = {"extract": 0.0, "more-data": 0.0}
    for method, unfreeze in _UNFREEZE.items():
        groups = unfrozen_groups(model, get_base(config.base), unfreeze)
        unfrozen = {layer for layers in groups.values() for layer in layers}
        frozen, tail = cut(model, split_point(model, unfrozen))
        shape = (tuning.batch_size, *tail.input_shape[1:])
        below, dtype, itemsize = 0.0, "uint8", 1
        if frozen.weights:
            below, dtype, itemsize = Extractor(frozen).measure(pixels), "float32", 2
        # How long a step takes does not depend on what is in the rows.
        batch = LabelledFeatures(
            [np.random.default_rng(0).integers(0, 256, shape).astype(dtype)],
            np.arange(tuning.batch_size) % classes
            if not splits.multi_label
            else np.zeros((tuning.batch_size, classes), np.uint8),
            classes,
            np.ones((2, classes), np.float32),
        )
        step = measure_training(
            tuning,
            partial(training_copy, tail, unfrozen, tuning.train_bn),
            layer_patterns(
                trained_layers(groups, tuning.train_bn),
                group_multipliers(list(groups), tuning.decay),
            ),
            batch,
        )
        training = tuning.epochs * len(splits.train) * step / tuning.batch_size
        seconds = extraction + images * below + training
        minutes[method] = float(seconds) / 60
        gigabytes[method] = images * int(np.prod(shape[1:])) * itemsize / 1e9
    return minutes, gigabytes


def _command(config: Config, method: Method, options: Mapping[str, Any]) -> str:
    """What to run, with the options that were given."""
    flags = [
        f"--set {shlex.quote(f'{key}={json.dumps(value)}')}"
        if isinstance(value, (dict, list, tuple))
        else f"--{key.replace('_', '-')} {shlex.quote(str(value))}"
        for key, value in options.items()
        if value is not None
    ]
    command = " ".join(["kt fit", shlex.quote(config.data), *flags])
    if method in _UNFREEZE:
        run = shlex.quote(str(config.runs_dir / str(config.name)))
        command += f" && kt unfreeze-and-finetune {run}"
        if _UNFREEZE[method] != FinetuneConfig().unfreeze:
            command += f" --unfreeze {_UNFREEZE[method]}"
    return command
