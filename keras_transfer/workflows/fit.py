"""The workflow of `kt fit`: feature extraction with a frozen base."""

import contextlib
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_transfer.config import Config, Precision, load_config, to_yaml
from keras_transfer.data.decode import DECODER_VERSION
from keras_transfer.data.samples import sample_images
from keras_transfer.data.tables import Splits
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.evaluation.crossvalidation import estimate, fold_numbers
from keras_transfer.evaluation.metrics import evaluate, score
from keras_transfer.evaluation.prediction import Predictor
from keras_transfer.events import OnNote, OnProgress
from keras_transfer.features.base import frozen_base, image_size_of
from keras_transfer.features.engine import Engine
from keras_transfer.features.extraction import FrozenFeatures, frozen_features
from keras_transfer.features.parity import (
    PARITY_IMAGES,
    PARITY_TOLERANCE,
    is_close,
    parity,
)
from keras_transfer.features.usable import doubts, usable_splits
from keras_transfer.models.classifier import attach_head
from keras_transfer.runs.files import csv_text, write_atomic
from keras_transfer.runs.manifest import Estimate, Manifest, host, now, versions
from keras_transfer.runs.run import (
    CONFIG,
    HISTORY,
    LABELS,
    MANIFEST,
    METRICS,
    MODEL,
    OUT_OF_FOLD,
    SKIPPED,
    SPLITS,
    Run,
    building,
)
from keras_transfer.training.head import (
    TrainedHead,
    class_weights,
    label_features,
    predict_head,
    train_head,
)
from keras_transfer.workflows.export import export
from keras_transfer.workflows.inputs import Inputs, prepare

FEW_IMAGES = 30
"""Fewer test images than these say less than cross-validation: at an accuracy of 0.9
the 95% interval of a share of 30 is 0.74 to 0.97 (Wilson)."""

_FOLDS = 5
_MOST_CROSS_VALIDATED = 20_000  # training images; more heads would take minutes


def fit(
    data: str | Path | None = None,
    *,
    config: Config | str | Path | None = None,
    on_progress: OnProgress = lambda *_: None,
    on_note: OnNote = lambda _: None,
    **options: Any,
) -> Run:
    """Trains a new head on a frozen base's features, and evaluates the classifier.

    Args:
        data: A folder of class folders, a CSV/TSV file, `tfds:NAME` or `digits`.
        config: A `Config`, or a YAML file of config keys.
        on_progress: Told how the work goes on.
        on_note: Told what the user should know, as soon as it is known.
        **options: Config keys that override the config's: `base="MobileNetV2"`,
            `head={"kind": "mlp"}`.

    Returns:
        The finished run.

    Raises:
        UsageError: If an option, the data or the run's name is not usable.
        KerasTransferError: If the data or the weights are not good enough to train.
    """
    if data is not None:
        options["data"] = str(data)
    source = Path(config) if isinstance(config, str) else config
    inputs = prepare(load_config(source, options))
    return extract_and_fit(inputs, on_progress, on_note)


def extract_and_fit(inputs: Inputs, on_progress: OnProgress, on_note: OnNote) -> Run:
    """Does what `fit` says, with inputs that were checked."""
    started = time.perf_counter()
    config = inputs.config.model_copy(update={"overwrite": False})
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        on_note(text)

    # Who trains, who validates, who tests
    splits = inputs.splits
    for warning in splits.warnings:
        note(warning)
    folds = _folds(config, splits)
    if folds and folds != config.folds:
        note(
            f"{len(splits.test)} test images say little: the training images are "
            f"cross-validated too, in {folds} folds, and that figure comes first."
        )

    # The frozen base; every image goes through it once
    part = frozen_base(config)
    base = part.model
    for precision, engine in _ATTEMPTS[config.precision]:
        features = frozen_features(
            part, splits, config.augment, precision, engine, on_progress=on_progress
        )
        extraction, extractor = features.extraction, features.extraction.extractor
        for text in extractor.notes if extractor else ():
            note(text)
        usable = usable_splits(config, splits, extraction)

        # A new head on the features
        head_started = time.perf_counter()
        head = _train(config, usable, features, on_progress)
        head_seconds = time.perf_counter() - head_started

        # One model of both, which must say what the features said
        model_started = time.perf_counter()
        model = attach_head(base, head.model)
        sample = sample_images(usable, image_size_of(config), PARITY_IMAGES)
        found = _compare(model, head, features, sample)
        if is_close(found):
            break
        note(
            f"{features.precision} was given up: on {found['images']} images the "
            f"Keras model agrees on {found['top1_agreement']:.1%} of the classes "
            f"and differs by up to {found['max_probability_difference']:.2g}"
        )
    else:
        raise KerasTransferError(
            "The stitched Keras model does not agree with the features its head was "
            f"trained on: {notes[-1]}. Please report this."
        )

    for text in doubts(splits, usable, extraction):
        note(text)

    # The same head on parts of the training images, for an honest interval
    estimated, out_of_fold = None, None
    if folds := _folds(config, usable):
        estimated, out_of_fold = _cross_validate(
            config, usable, features, folds, on_progress
        )

    # Figures of what the head never saw, and everything on disk at once
    with building(inputs.run) as staging:
        model.save(staging / MODEL)
        for name, text in {
            CONFIG: to_yaml(config),
            LABELS: "".join(f"{label}\n" for label in usable.class_names),
            SPLITS: usable.to_csv(),
            SKIPPED: csv_text(("path", "reason"), extraction.skipped.items()),
            HISTORY: _history(head),
            METRICS: _metrics(usable, head, features),
        }.items():
            write_atomic(staging / name, text)
        if out_of_fold:
            write_atomic(staging / OUT_OF_FOLD, out_of_fold)
        finished = time.perf_counter()
        manifest = Manifest(
            created=now(),
            data=config.data,
            data_fingerprint=usable.fingerprint(extraction.digests),
            class_counts=usable.class_counts(),
            skipped=len(extraction.skipped),
            multi_label=usable.multi_label,
            base=config.base,
            weights=config.weights,
            weights_digest=part.weights_digest,
            image_size=image_size_of(config),
            decoder_version=DECODER_VERSION,
            engine=extractor.engine if extractor else "cache",
            precision=features.precision,
            notes=notes,
            parity=found,
            folds=estimated,
            l2=head.l2,
            seed=config.seed,
            versions=versions(),
            host=host(),
            timings={
                "decode": extraction.decode_seconds,
                "forward": extractor.seconds if extractor else 0.0,
                "features": features.seconds,
                "head": head_seconds,
                "model": finished - model_started,
                "total": finished - started,
            },
            images_decoded=extraction.decoded,
            images_forwarded=extractor.images if extractor else 0,
        )
        write_atomic(staging / MANIFEST, manifest.to_json())
    run = Run(inputs.run.run_dir)
    if config.export:
        export(run)
    return run


def _folds(config: Config, splits: Splits) -> int | None:
    """How many folds the training images are dealt into, if they are.

    Where few images are held out for the test, cross-validation says more: that many
    folds are made as there can be, 5 at most.

    Raises:
        UsageError: If the folds asked for cannot be had.
    """

    def deal(folds: int) -> int:
        fold_numbers(splits.train, len(splits.class_names), folds, config.seed)
        return folds

    if config.folds:
        return deal(config.folds)
    if len(splits.test) < FEW_IMAGES and len(splits.train) <= _MOST_CROSS_VALIDATED:
        for folds in range(_FOLDS, 1, -1):
            with contextlib.suppress(UsageError):
                return deal(folds)
    return None


_ATTEMPTS: dict[str, list[tuple[Precision, Engine | None]]] = {
    "auto": [("auto", None), ("f32", None), ("f32", "keras")],
    "bf16": [("bf16", None), ("f32", None), ("f32", "keras")],
    "f32": [("f32", None), ("f32", "keras")],
}
"""How features are computed; a later way only if the model disagrees with them."""


def _train(
    config: Config, splits: Splits, features: FrozenFeatures, on_progress: OnProgress
) -> TrainedHead:
    num_classes = len(splits.class_names)
    weights = class_weights(
        splits.train.targets, num_classes, config.head.class_weight == "balanced"
    )
    done = itertools.count(1)
    return train_head(
        config.head,
        label_features(
            [
                features.rows(splits.train.sources, view)
                for view in range(config.augment + 1)
            ],
            splits.train.targets,
            num_classes,
            weights,
        ),
        label_features(
            [features.rows(splits.val.sources)],
            splits.val.targets,
            num_classes,
            weights,
        ),
        config.seed,
        lambda: on_progress("head", next(done), 0),
    )


def _cross_validate(
    config: Config,
    splits: Splits,
    features: FrozenFeatures,
    folds: int,
    on_progress: OnProgress,
) -> tuple[Estimate, str]:
    """Trains the head once a fold of the training images, on the other folds.

    The validation images choose each L2 strength, as for the run's own head, so no
    head knows anything of the fold that it is measured on.

    Returns:
        (the deciding metric, the text of out_of_fold.csv).
    """
    table, num_classes = splits.train, len(splits.class_names)
    numbers = fold_numbers(table, num_classes, folds, config.seed)
    probabilities = np.zeros((len(table), num_classes), np.float32)
    values = []
    for fold in range(folds):
        inside = [s for s, n in zip(table.sources, numbers, strict=True) if n != fold]
        others = replace(splits, train=table.keep(inside))
        head = _train(config, others, features, on_progress)
        held_out = np.flatnonzero(numbers == fold)
        rows = features.rows([table.sources[i] for i in held_out])
        probabilities[held_out] = predict_head(head.model, rows)
        evaluation = evaluate(
            table.targets[held_out], probabilities[held_out], splits.class_names
        )
        values.append(score(evaluation)[0])
    header = ("path", "fold", *splits.class_names)
    lines = (
        (source, number, *(f"{value:.6f}" for value in row))
        for source, number, row in zip(
            table.sources, numbers, probabilities, strict=True
        )
    )
    return estimate(values, 1 / folds), csv_text(header, lines)


def _compare(
    model: keras.Model,
    head: TrainedHead,
    features: FrozenFeatures,
    sample: Sequence[tuple[str, bytes, np.ndarray]],
) -> dict[str, float]:
    """Parity of a model on a sample of images with its head on cached features."""
    actual = Predictor(model)([pixels for _, _, pixels in sample])
    rows = features.rows([source for source, _, _ in sample])
    expected = predict_head(head.model, rows)
    return parity(expected, actual, PARITY_TOLERANCE[features.precision])


def _metrics(splits: Splits, head: TrainedHead, features: FrozenFeatures) -> str:
    """The text of metrics.json: figures of the images that were held out."""
    evaluations = {}
    for name, table in splits.items():
        if name != "train" and len(table):
            rows = features.rows(table.sources)
            probabilities = predict_head(head.model, rows)
            evaluation = evaluate(table.targets, probabilities, splits.class_names)
            evaluations[name] = evaluation.model_dump()
    return json.dumps({"fit": evaluations}, indent=1, ensure_ascii=False) + "\n"


def _history(head: TrainedHead) -> str:
    rows = [("fit", *epoch.values()) for epoch in head.history]
    return csv_text(("phase", *head.history[0]), rows)
