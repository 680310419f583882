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
from keras_transfer.errors import KerasTransferError, UnusableImagesError
from keras_transfer.evaluation.metrics import Evaluation
from keras_transfer.evaluation.prediction import prediction_engine
from keras_transfer.evaluation.thresholds import SureEvaluation
from keras_transfer.events import Broadcast, Listener, announcing
from keras_transfer.features.base import digest_of, frozen_base, image_size_of
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
from keras_transfer.features.usable import usable_splits
from keras_transfer.models.classifier import attach_head, join_bases
from keras_transfer.reporting.of_run.record import Loaded
from keras_transfer.runs.files import csv_text, write_atomic
from keras_transfer.runs.manifest import (
    FEW_IMAGES,
    Estimate,
    Manifest,
    host,
    now,
    versions,
)
from keras_transfer.runs.run import (
    AUDIT,
    CONFIG,
    HISTORY,
    IMAGES,
    LABELS,
    MANIFEST,
    METRICS,
    MODEL,
    SKIPPED,
    SPLITS,
    Run,
    building,
)
from keras_transfer.training.head import TrainedHead, predict_images, train_on_features
from keras_transfer.workflows.audit import quick_audit
from keras_transfer.workflows.export import export_savedmodel
from keras_transfer.workflows.inputs import Inputs
from keras_transfer.workflows.judging import Judgement, judge_head
from keras_transfer.workflows.report import report_phase

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
        evaluations: Metrics of the classifier by `out_of_fold` (training images, each
            by a head that did not learn from it) and `test`, the more telling first.
        cross_validation: The deciding metric over folds of the training images; None
            without folds.
        sure: Coverage and accuracy of the sure predictions of test images; None without
            `abstain_at_accuracy` or test images.
    """

    run: Run
    evaluations: Mapping[str, Evaluation]
    cross_validation: Estimate | None
    sure: SureEvaluation | None = None

    def __repr__(self) -> str:
        figures = [f"{name}: {value}" for name, value in self.evaluations.items()]
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
    parameters = inputs.config.model_dump(mode="json")
    with announcing(listener, "fit", inputs.run.run_dir, parameters):
        result = _extract_and_fit(inputs, listener)
    figures = {name: x.model_dump() for name, x in result.evaluations.items()}
    listener.finished("fit", result.run.run_dir, figures)
    return result


def _extract_and_fit(inputs: Inputs, listener: Listener) -> FitResult:
    started = time.perf_counter()
    once = {"overwrite": False, "reread": False}  # must not apply when config is reused
    config = inputs.config.model_copy(update=once)
    told = Broadcast([listener])  # keeps the notes for the manifest
    _warn_of_data(inputs.splits, told)

    # Each image goes through the frozen base once; the head is trained on its features.
    part = frozen_base(inputs.config)
    skipped_list = inputs.run.run_dir.with_name(f"{config.name}.{SKIPPED}")
    with _listing_unusable(skipped_list):
        trained = _train_classifier(config, part, inputs.splits, told)

    # Evaluate out of fold and on test images, and write everything to disk atomically.
    judged = judge_head(config, trained.splits, trained.features, trained.head)
    if not judged.evaluations:
        told.note(
            "Nothing says how good the model is: the images are too few, or of too few "
            "groups, to hold any out."
        )
    audit = quick_audit(
        config.data,
        inputs.splits,
        trained.splits,
        trained.features,
        judged.predictions,
        config.seed,
        told,
    )
    with building(inputs.run) as staging:
        images = image_table(inputs.splits, trained.features.extraction)
        with (staging / IMAGES).open("wb") as file:  # its path may not be valid UTF-8
            pq.write_table(images, file, compression="zstd")
        _write(staging, config, trained, judged)
        write_atomic(staging / AUDIT, audit.to_json())
        manifest = _manifest(config, part, trained, judged, told.notes, started)
        write_atomic(staging / MANIFEST, manifest.to_json())
    run = Run(inputs.run.run_dir)
    told.artifact(run.run_dir, "run")
    if config.report:
        known = Loaded(trained.splits, trained.features, trained.model)
        report_phase(run, told, known)
    if config.export:
        export_savedmodel(run, listener=told)
    return FitResult(run, judged.evaluations, judged.folds, judged.sure)


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


def _warn_of_data(splits: Splits, listener: Listener) -> None:
    """Sends notes on doubtful properties of the data before any work is done."""
    for warning in splits.warnings:
        listener.note(warning)
    if len(splits.test) < FEW_IMAGES and len(splits.test):
        listener.note(
            f"{len(splits.test)} test images say little: figures of the training "
            "images, out of fold, come first."
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
        head = train_on_features(config, usable, features, listener)
        trained = time.perf_counter()
        base = join_bases(part.models, head.stages)
        model = attach_head(base, head.model)
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


def _compare(
    model: keras.Model, head: TrainedHead, features: FrozenFeatures, splits: Splits
) -> dict[str, float]:
    """Computes the parity of a model on sample images with its head on features."""
    size = model.input_shape[1]
    sample = sample_images(splits, size, PARITY_IMAGES)
    actual = predict(prediction_engine(model), np.stack([x for *_, x in sample]))
    sources = [source for source, _, _ in sample]
    expected = predict_images(head, features, sources)
    return parity(expected, actual, PARITY_TOLERANCE[features.precision])


def _write(
    staging: Path,
    config: Config,
    trained: _Classifier,
    judged: Judgement,
) -> None:
    """Writes the model, config, labels, splits, history and metrics of a new run."""
    trained.model.save(staging / MODEL)
    judged.write(staging, trained.splits.class_names)
    figures = {
        name: evaluation.model_dump() for name, evaluation in judged.evaluations.items()
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
    judged: Judgement,
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
        features="stages" if trained.head.stages else "last",
        weights_digest=digest_of(part),
        image_size=image_size_of(config),
        decoder_version=DECODER_VERSION,
        engine=extraction.engine.name if extraction.engine else "cache",
        precision=features.precision,
        notes=notes,
        parity=trained.parity,
        folds=judged.folds,
        **vars(judged.choices),
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
