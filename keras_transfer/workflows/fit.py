"""The workflow of `kt fit`: feature extraction with a frozen base."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import keras
import numpy as np
import pyarrow.parquet as pq

from keras_transfer.config import Config, to_yaml
from keras_transfer.data.decode import DECODER_VERSION
from keras_transfer.data.samples import sample_images
from keras_transfer.data.tables import Splits
from keras_transfer.errors import KerasTransferError, UnusableImagesError, UsageError
from keras_transfer.evaluation.crossvalidation import estimate, fold_numbers
from keras_transfer.evaluation.metrics import Evaluation, evaluate, selection_key
from keras_transfer.evaluation.prediction import prediction_engine
from keras_transfer.events import SILENT, Broadcast, Listener
from keras_transfer.features.base import frozen_base, image_size_of
from keras_transfer.features.engine import predict
from keras_transfer.features.frozen_part import (
    FrozenFeatures,
    FrozenPart,
    Storage,
    frozen_features,
)
from keras_transfer.features.image_table import image_table
from keras_transfer.features.parity import (
    PARITY_IMAGES,
    PARITY_TOLERANCE,
    is_close,
    parity,
)
from keras_transfer.features.usable import data_warnings, usable_splits
from keras_transfer.models.classifier import attach_head
from keras_transfer.runs.files import csv_text, write_atomic
from keras_transfer.runs.manifest import Estimate, Manifest, host, now, versions
from keras_transfer.runs.run import (
    CONFIG,
    HISTORY,
    IMAGES,
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
from keras_transfer.workflows.export import export_savedmodel
from keras_transfer.workflows.inputs import Inputs

FEW_IMAGES = 30
"""With fewer test images than this, the head is cross-validated by default. At an
accuracy of 0.9 on 30 images, the 95% confidence interval is 0.74 to 0.97 (Wilson)."""

_FOLDS = 5
_MOST_CROSS_VALIDATED = 20_000  # training images; with more it would take minutes

_STORAGE: dict[str, Sequence[Storage]] = {
    "auto": (Storage("auto"), Storage("f32"), Storage("f32", "keras")),
    "bf16": (Storage("bf16"), Storage("f32"), Storage("f32", "keras")),
    "f32": (Storage("f32"), Storage("f32", "keras")),
}
"""Ways to compute features, by the config's precision. A later one is used only if the
model disagrees with features that were computed in an earlier one."""


@dataclass(frozen=True, repr=False)
class FitResult:
    """The result of `kt fit`.

    Attributes:
        run: The finished run.
        evaluations: Metrics of the classifier by held-out split (`val`, `test`).
        cross_validation: The deciding metric (accuracy, or mean average precision for
            multi-label data) over folds of the training images; None without
            cross-validation.
    """

    run: Run
    evaluations: Mapping[str, Evaluation]
    cross_validation: Estimate | None

    def __repr__(self) -> str:
        figures = [f"{name}: {value}" for name, value in self.evaluations.items()]
        if self.cross_validation:
            figures.insert(0, f"cross-validation: {self.cross_validation}")
        return f"FitResult({self.run.run_dir}, {', '.join(figures)})"


def extract_and_fit(inputs: Inputs, listener: Listener) -> FitResult:
    """Implements `api.fit`.

    Args:
        inputs: Checked inputs.
        listener: Receives notes, progress, epochs and artifacts.

    Raises:
        UsageError: If the images or options do not allow the requested folds or
            precision.
        KerasTransferError: If the data or the weights cannot be used for training.
    """
    started = time.perf_counter()
    once = {"overwrite": False, "reread": False}  # must not apply when config is reused
    config = inputs.config.model_copy(update=once)
    told = Broadcast([listener])  # keeps the notes for the manifest
    warn_of_data(config, inputs.splits, told)

    # Each image goes through the frozen base once; the head is trained on its features.
    part = frozen_base(inputs.config)
    skipped_list = inputs.run.run_dir.with_name(f"{config.name}.{SKIPPED}")
    with _listing_unusable(skipped_list):
        trained = _train_classifier(config, part, inputs.splits, told)
    for text in data_warnings(
        inputs.splits, trained.splits, trained.features.extraction
    ):
        told.note(text)

    # Cross-validate the same kind of head on the training images.
    folds = folds_of(config, trained.splits)
    estimated, out_of_fold = None, None
    if folds:
        estimated, out_of_fold = _cross_validate(config, trained, folds, told)

    # Evaluate on held-out images and write everything to disk atomically.
    evaluations = _evaluate(trained)
    with building(inputs.run) as staging:
        images = image_table(inputs.splits, trained.features.extraction)
        with (staging / IMAGES).open("wb") as file:  # its path may not be valid UTF-8
            pq.write_table(images, file, compression="zstd")
        _write(staging, config, trained, evaluations)
        if out_of_fold:
            write_atomic(staging / OUT_OF_FOLD, out_of_fold)
        manifest = _manifest(config, part, trained, estimated, told.notes, started)
        write_atomic(staging / MANIFEST, manifest.to_json())
    run = Run(inputs.run.run_dir)
    told.artifact(run.run_dir, "run")
    if config.export:
        export_savedmodel(run, listener=told)
    return FitResult(run, evaluations, estimated)


@contextlib.contextmanager
def _listing_unusable(path: Path) -> Iterator[None]:
    """Writes the list of unusable images if they are too many, else removes it.

    Raises:
        KerasTransferError: The original error, with the path of the list.
    """
    try:
        yield
    except UnusableImagesError as error:
        text = csv_text(("path", "reason"), error.skipped.items())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text)
        except (OSError, KerasTransferError):
            raise error from None
        raise KerasTransferError(f"{error} All are listed in {path}.") from None
    path.unlink(missing_ok=True)


def warn_of_data(config: Config, splits: Splits, listener: Listener) -> None:
    """Sends notes on doubtful properties of the data before any work is done."""
    for warning in splits.warnings:
        listener.note(warning)
    folds = folds_of(config, splits)
    if folds and folds != config.folds:
        listener.note(
            f"{len(splits.test)} test images say little: the training images are "
            f"cross-validated too, in {folds} folds, and that figure comes first."
        )


@dataclass(frozen=True)
class _Classifier:
    """A model with the features that its head was trained on.

    Attributes:
        splits: The usable images.
        features: Features of the images.
        head: The trained head.
        model: Base and head, from [0, 255] RGB pixels to probabilities.
        parity: Agreement of the model on sample images with the head on their features;
            see `parity.parity`.
        head_seconds: Seconds that training took.
        model_seconds: Seconds that joining base and head and comparing took.
    """

    splits: Splits
    features: FrozenFeatures
    head: TrainedHead
    model: keras.Model
    parity: dict[str, float]
    head_seconds: float
    model_seconds: float

    @property
    def is_consistent(self) -> bool:
        """Whether the model agrees with its head on cached features."""
        return is_close(self.parity)


def _train_classifier(
    config: Config, part: FrozenPart, splits: Splits, listener: Listener
) -> _Classifier:
    """Computes features and trains a head in the fastest way that is exact enough.

    Raises:
        KerasTransferError: If the model disagrees with its head on features, in
            whatever way these are computed.
    """
    for option in _STORAGE[config.precision]:
        storage = replace(option, quality=True)
        features = frozen_features(part, splits, config.augment, storage, listener)
        usable = usable_splits(config, splits, features.extraction)
        started = time.perf_counter()
        head = _train_head(config, usable, features, listener)
        trained = time.perf_counter()
        model = attach_head(part.model, head.model)
        found = _compare(model, head, features, usable)
        compared = time.perf_counter()
        classifier = _Classifier(
            usable, features, head, model, found, trained - started, compared - trained
        )
        if classifier.is_consistent:
            return classifier
        reason = (
            f"{features.precision} was given up: on {found['images']} images the "
            f"Keras model agrees on {found['top1_agreement']:.1%} of the classes "
            f"and differs by up to {found['max_probability_difference']:.2g}"
        )
        listener.note(reason)
    raise KerasTransferError(
        "The stitched Keras model does not agree with the features its head was "
        f"trained on: {reason}. Please report this."
    )


def _train_head(
    config: Config, splits: Splits, features: FrozenFeatures, listener: Listener
) -> TrainedHead:
    train, val, num_classes = splits.train, splits.val, len(splits.class_names)
    balanced = config.head.class_weight == "balanced"
    weights = class_weights(train.targets, num_classes, balanced)
    views = [features.rows(train.sources, view) for view in range(config.augment + 1)]
    return train_head(
        config.head,
        label_features(views, train.targets, num_classes, weights),
        label_features([features.rows(val.sources)], val.targets, num_classes, weights),
        config.seed,
        listener,
    )


def _compare(
    model: keras.Model, head: TrainedHead, features: FrozenFeatures, splits: Splits
) -> dict[str, float]:
    """Computes the parity of a model on sample images with its head on features."""
    size = model.input_shape[1]
    sample = sample_images(splits, size, PARITY_IMAGES)
    actual = predict(prediction_engine(model), np.stack([x for *_, x in sample]))
    rows = features.rows([source for source, _, _ in sample])
    expected = predict_head(head.model, rows)
    return parity(expected, actual, PARITY_TOLERANCE[features.precision])


def folds_of(config: Config, splits: Splits) -> int | None:
    """Returns the number of cross-validation folds; None for no cross-validation.

    If the config does not say, training images are cross-validated if there are few
    test images, in as many folds as possible up to 5.

    Args:
        config: The resolved config.
        splits: The images.

    Raises:
        UsageError: If the requested number of folds is not possible.
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


def _cross_validate(
    config: Config, trained: _Classifier, folds: int, listener: Listener
) -> tuple[Estimate, str]:
    """Trains and evaluates one head per fold, training on the other folds.

    As for the run's own head, each L2 strength is chosen on the validation images, so
    the fold that a head is evaluated on has no influence on it.

    Returns:
        (estimate of the deciding metric, text of out_of_fold.csv).
    """
    splits, features = trained.splits, trained.features
    table, num_classes = splits.train, len(splits.class_names)
    numbers = fold_numbers(table, num_classes, folds, config.seed)
    probabilities = np.zeros((len(table), num_classes), np.float32)
    values = []
    for fold in range(folds):
        inside = [s for s, n in zip(table.sources, numbers, strict=True) if n != fold]
        others = replace(splits, train=table.keep(inside))
        head = _train_head(config, others, features, SILENT)
        held_out = np.flatnonzero(numbers == fold)
        rows = features.rows([table.sources[i] for i in held_out])
        probabilities[held_out] = predict_head(head.model, rows)
        evaluation = evaluate(
            table.targets[held_out], probabilities[held_out], splits.class_names
        )
        values.append(selection_key(evaluation)[0])
        listener.progress("folds", fold + 1, folds)
    header = ("path", "fold", *splits.class_names)
    lines = (
        (source, number, *(f"{value:.6f}" for value in row))
        for source, number, row in zip(
            table.sources, numbers, probabilities, strict=True
        )
    )
    return estimate(values, 1 / folds), csv_text(header, lines)


def _evaluate(trained: _Classifier) -> dict[str, Evaluation]:
    """Evaluates the head on each held-out split that has images."""
    splits = trained.splits
    return {
        name: evaluate(
            table.targets,
            predict_head(trained.head.model, trained.features.rows(table.sources)),
            splits.class_names,
        )
        for name, table in splits.items()
        if name != "train" and len(table)
    }


def _write(
    staging: Path,
    config: Config,
    trained: _Classifier,
    evaluations: Mapping[str, Evaluation],
) -> None:
    """Writes the model, config, labels, splits, history and metrics of a new run."""
    trained.model.save(staging / MODEL)
    figures = {
        name: evaluation.model_dump() for name, evaluation in evaluations.items()
    }
    skipped = trained.features.extraction.skipped
    history = trained.head.history
    for name, text in {
        CONFIG: to_yaml(config),
        LABELS: "".join(f"{label}\n" for label in trained.splits.class_names),
        SPLITS: trained.splits.to_csv(),
        SKIPPED: csv_text(("path", "reason"), skipped.items()),
        HISTORY: csv_text(
            ("phase", *history[0]), [("fit", *row.values()) for row in history]
        ),
        METRICS: json.dumps({"fit": figures}, indent=1, ensure_ascii=False) + "\n",
    }.items():
        write_atomic(staging / name, text)


def _manifest(
    config: Config,
    part: FrozenPart,
    trained: _Classifier,
    estimated: Estimate | None,
    notes: list[str],
    started: float,
) -> Manifest:
    """Builds the manifest; `started` is the `time.perf_counter` of the start."""
    splits, features = trained.splits, trained.features
    extraction = features.extraction
    return Manifest(
        created=now(),
        data=config.data,
        data_fingerprint=splits.fingerprint(extraction.digests),
        class_counts=splits.class_counts(),
        skipped=len(extraction.skipped),
        multi_label=splits.multi_label,
        base=config.base,
        weights=config.weights,
        weights_digest=part.weights_digest,
        image_size=image_size_of(config),
        decoder_version=DECODER_VERSION,
        engine=extraction.engine.name if extraction.engine else "cache",
        precision=features.precision,
        notes=notes,
        parity=trained.parity,
        folds=estimated,
        l2=trained.head.l2,
        seed=config.seed,
        versions=versions(),
        host=host(),
        timings={
            "decode": extraction.decode_seconds,
            "forward": extraction.forward_seconds,
            "features": features.seconds,
            "head": trained.head_seconds,
            "model": trained.model_seconds,
            "total": time.perf_counter() - started,
        },
        images_decoded=extraction.decoded,
        images_forwarded=extraction.forwarded,
    )
