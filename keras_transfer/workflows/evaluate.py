"""The workflow of `kt evaluate`: evaluates a run's model on labeled images."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_transfer.config import ListingConfig
from keras_transfer.data.reading import hashing
from keras_transfer.data.tables import Table
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.evaluation.decisions import DecisionRule
from keras_transfer.evaluation.metrics import Evaluation, evaluate
from keras_transfer.evaluation.of_run import LabelledImages, labelled_images, load_model
from keras_transfer.evaluation.prediction import note_flip_tta, predict_sources
from keras_transfer.evaluation.thresholds import SureEvaluation, evaluate_sure
from keras_transfer.events import SILENT, Listener
from keras_transfer.features.image_table import (
    changed_images,
    known_images,
    trained_images,
)
from keras_transfer.runs.manifest import Phase
from keras_transfer.runs.run import Run, read_together


class RunEvaluation(Evaluation):
    """Metrics of a run's model, with the data that they were computed on."""

    data: str
    """Name of the run's split, or the DATA argument."""
    skipped: dict[str, str]
    """Reason why an image was left out, by source."""
    sure: SureEvaluation | None = None
    """Coverage and accuracy of the sure predictions, if the run has a threshold."""
    flip_tta: bool = False
    """Whether probabilities are averaged over each image and its mirror image."""


def evaluate_run(
    run: Run,
    source: object | None = None,
    options: ListingConfig = ListingConfig(),  # noqa: B008
    phase: Phase | None = None,
    listener: Listener = SILENT,
    flip_tta: bool = False,
) -> RunEvaluation:
    """Implements `api.evaluate`.

    Args:
        run: The run.
        source: Labeled images in any form that `fit` accepts; None for the run's test
            split (of runs of version 0.1.0 without one, the validation split).
        options: How labeled images are listed.
        phase: `fit` or `finetune`; None for the run's current model.
        listener: Receives notes, and progress after each image.
        flip_tta: Whether to average probabilities over each image and its mirror image,
            at twice the cost.

    Returns:
        The metrics, the name of the data, and the images that were left out.

    Raises:
        UsageError: If the phase or the data do not exist.
        KerasTransferError: If a label is not one of the run's classes, or no image can
            be read.
    """
    _check_options(source, options)
    model, class_names, (rule, lacks_thresholds), known, images = read_together(
        run,
        lambda: (
            load_model(run, phase),
            run.class_names,
            _rule(run, phase),
            known_images(run.images_path, listener),
            labelled_images(run, source, options),
        ),
    )
    for warning in images.warnings:
        listener.note(warning)
    if flip_tta:
        note_flip_tta(rule, listener)
    by_source, skipped, digests = _predict(model, images, listener, flip_tta)
    _note_changed_or_trained(known, digests, source is None, listener)
    if lacks_thresholds:
        _note_thresholds(phase, listener)
    if not by_source:
        raise KerasTransferError(f"None of the {len(skipped)} images can be read.")
    table = images.table.keep(by_source)
    probabilities = np.stack([by_source[source] for source in table.sources])
    figures = _figures(table, probabilities, class_names, rule)
    return RunEvaluation(
        **figures, data=images.name, skipped=skipped, flip_tta=flip_tta
    )


def _figures(
    table: Table, probabilities: np.ndarray, names: Sequence[str], rule: DecisionRule
) -> dict[str, Any]:
    """Computes the fields of an `Evaluation`, and `sure` with a threshold."""
    targets, groups = table.targets, table.groups
    found = dict(evaluate(targets, probabilities, names, groups, rule.classes))
    if rule.sure is not None:
        found["sure"] = evaluate_sure(probabilities, targets, rule.sure, groups)
    return found


def _note_thresholds(phase: Phase | None, listener: Listener) -> None:
    listener.note(
        f"Thresholds are kept for the run's current model only: figures of {phase} "
        "are without those of its own."
    )


def _check_options(source: object | None, options: ListingConfig) -> None:
    """Refuses options of a listing where nothing is listed.

    Raises:
        UsageError: If there are no data but options for them.
    """
    given = options.model_dump(exclude_defaults=True)
    if source is None and given:
        key, value = next(iter(given.items()))
        raise UsageError(
            "How images are listed is said of labeled images that are given. Received: "
            f"{key}={value} and none. Name some, or leave it out."
        )


def _predict(
    model: keras.Model, images: LabelledImages, listener: Listener, flip_tta: bool
) -> tuple[dict[str, np.ndarray], dict[str, str], dict[str, bytes]]:
    """Predicts images.

    Returns:
        (float32 `[C]` probabilities, reason why an image is unusable, SHA-256), each by
        source.
    """
    by_source, skipped = {}, {}
    digests: dict[str, bytes] = {}
    sources = images.table.sources
    read = hashing(images.read, digests)
    predictions = predict_sources(model, sources, read, flip_tta=flip_tta)
    for done, prediction in enumerate(predictions, start=1):
        listener.progress("evaluate", done, len(sources))
        if prediction.probabilities is None:
            skipped[prediction.source] = prediction.error
        else:
            by_source[prediction.source] = prediction.probabilities
    return by_source, skipped, digests


def _rule(run: Run, phase: Phase | None) -> tuple[DecisionRule, bool]:
    """Returns (rule of a phase's model, whether it lacks thresholds that it had)."""
    manifest, lacks = run.manifest, False
    if phase not in (None, manifest.phase):  # whose thresholds were replaced
        lacks = bool(manifest.abstention or manifest.thresholds)
        manifest = manifest.model_copy(update={"abstention": None, "thresholds": None})
    return DecisionRule.of(manifest, run.class_names), lacks


def _note_changed_or_trained(
    known: Mapping[str, tuple[str, bytes]],
    digests: Mapping[str, bytes],
    is_own_split: bool,
    listener: Listener,
) -> None:
    """Notes what the images' bytes say against the figures, if anything."""
    if is_own_split and (changed := changed_images(known, digests)):
        listener.note(
            f"{len(changed):,} of {len(digests):,} images have changed since the "
            f"run was made, such as {changed[0]}: figures are not comparable. Train it "
            "again."
        )
    if not is_own_split and (trained := trained_images(known, digests)):
        listener.note(
            f"{len(trained):,} of {len(digests):,} images are byte for byte images "
            f"that the model was trained on, such as {trained[0]}: their figures "
            "flatter."
        )
