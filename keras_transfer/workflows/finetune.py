"""The workflow of `kt unfreeze-and-finetune`.

It starts from a trained head (linear probing, then fine-tuning: Kumar et al. 2022).
Pretrained layers learn more slowly than the head, outputs of the frozen part are
computed once, and the result replaces the run's model only if it is better.

Some training images are set aside to decide that. The head is trained again without
them, so that neither the model before nor the one after has seen them. Each half of
them chooses how much to mix both models and the temperature; the other half judges.
"""

import contextlib
import csv
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_transfer.advice.evidence import Trial
from keras_transfer.config import (
    Config,
    FinetuneConfig,
    Precision,
    load_config,
    to_yaml,
    with_finetune,
)
from keras_transfer.data.in_memory.forms import NOT_KEPT, name_of
from keras_transfer.data.samples import sample_images
from keras_transfer.data.tables import Splits, Table
from keras_transfer.errors import DivergenceError, KerasTransferError, UsageError
from keras_transfer.evaluation.crossvalidation import head_folds
from keras_transfer.evaluation.metrics import (
    Evaluation,
    deciding_metric,
)
from keras_transfer.evaluation.of_run import load_model, run_splits
from keras_transfer.evaluation.prediction import predict_table
from keras_transfer.events import SILENT, Broadcast, Listener, announcing
from keras_transfer.features.activations import (
    Activations,
    frozen_activations,
)
from keras_transfer.features.base import frozen_base_of
from keras_transfer.features.cache import Features
from keras_transfer.features.frozen_part import (
    FrozenFeatures,
    Storage,
    frozen_features,
)
from keras_transfer.features.image_table import changed_images, known_images
from keras_transfer.features.parity import PARITY_IMAGES
from keras_transfer.features.usable import usable_splits
from keras_transfer.models.bases import get_bases
from keras_transfer.models.classifier import (
    HEAD,
    copy_head,
    dense_layers,
)
from keras_transfer.models.layer_groups import (
    TrainingCopy,
    trained_layers,
    training_copy,
    unfrozen_groups,
)
from keras_transfer.reporting.of_run.record import Loaded
from keras_transfer.runs.files import (
    csv_text,
    only_process,
    temporary_directory,
    write_atomic,
)
from keras_transfer.runs.manifest import FinetuneReport, now
from keras_transfer.runs.run import (
    CONFIG,
    HISTORY,
    MANIFEST,
    METRICS,
    MODEL,
    Run,
    phase_model,
    phase_predictions,
    updating,
)
from keras_transfer.runtime.openvino import cpu_has_bf16
from keras_transfer.training.head import train_on_features
from keras_transfer.training.labelled import (
    LabelledFeatures,
    class_weighting,
    relative_weights,
)
from keras_transfer.training.optim import layer_patterns
from keras_transfer.training.tail import (
    TailData,
    TailRecipe,
    TrainedTail,
    averaged_epochs,
    has_state,
    images_per_second,
    train_tail,
)
from keras_transfer.training.tuned import CutClassifier, Mix
from keras_transfer.workflows.gate import (
    Decision,
    HeldOut,
    Parts,
    decide,
    divide,
    note_few,
    usable_parts,
)
from keras_transfer.workflows.judging import Judgement
from keras_transfer.workflows.report import report_phase

_OLD_PATIENCE = 4
"""Default of version 0.1.0, which every config.yaml of its runs contains."""


@dataclass(frozen=True, repr=False)
class FinetuneResult:
    """The result of fine-tuning, whether or not the new model was kept.

    Attributes:
        run: The run.
        report: What was done, and whether the new model was kept.
        evaluations: Metrics of the new model on `test` images, and on the images set
            aside to decide (`deciding`): the latter tell whether it is better, not how
            good it is.
    """

    run: Run
    report: FinetuneReport
    evaluations: Mapping[str, Evaluation]

    def __repr__(self) -> str:
        return f"FinetuneResult({self.run.run_dir}: {self.report.reason})"


def run_finetuning(
    run: Run,
    options: Mapping[str, Any],
    resume: bool | None,
    listener: Listener,
    in_memory: object | None = None,
    report: bool | None = None,
    trial: Trial | None = None,
) -> FinetuneResult:
    """Implements `api.unfreeze_and_finetune`.

    Args:
        run: The run.
        options: Keys of `config.FinetuneConfig`.
        resume: Whether to continue an interrupted fine-tuning; None raises an error if
            there is one.
        listener: Receives notes, progress, epochs and artifacts.
        in_memory: The images that the run was made from, if they were given in Python.
        report: Whether to make the report page; None does what the run's config says.
        trial: What the same options gained in folds of the run's training images, which
            then has a say in whether the new model is kept; None if that is unknown.

    Returns:
        The result, which describes the new model even if it was not kept and the run
        still contains an earlier fine-tuned model.

    Raises:
        UsageError: If an option does not fit the run, or there is nothing to resume.
        KerasTransferError: If the data no longer exist, activations exceed the disk
            budget, a loss is not finite, or another process is changing the run.
    """
    if in_memory is not None and run.config.data not in NOT_KEPT:
        raise UsageError(
            "The run's images are read again from where they are. Received: "
            f"data={name_of(in_memory)} and a run of {run.config.data}. Leave data out."
        )
    with only_process(run.run_dir):
        config = _resolve(run, options, resume)
        parameters = config.model_dump(mode="json")
        with announcing(listener, "finetune", run.run_dir, parameters):
            with _checkpoint_removed(run):
                result, known = _finetune(run, config, listener, in_memory, trial)
            listener.note(result.report.reason)
            listener.artifact(run.run_dir, "run")
            if config.report if report is None else report:
                report_phase(run, listener, known)
    figures = {name: x.model_dump() for name, x in result.evaluations.items()}
    listener.finished("finetune", run.run_dir, figures)
    return result


@contextlib.contextmanager
def _checkpoint_removed(run: Run) -> Iterator[None]:
    """Removes the checkpoint at the end, unless training can be resumed from it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DivergenceError) or not has_state(run.checkpoint):
            shutil.rmtree(run.checkpoint)
        raise
    shutil.rmtree(run.checkpoint)


def _finetune(
    run: Run,
    config: Config,
    listener: Listener,
    in_memory: object | None,
    trial: Trial | None,
) -> tuple[FinetuneResult, Loaded]:
    """Returns the result, and what of the run is in memory."""
    clock = _Clock()
    told = Broadcast([listener])  # keeps the notes for the report
    metrics = run.metrics  # now, since they may be damaged

    # Set images aside, train the head without them, and run the frozen part once.
    with clock.measure("features"):
        splits = run_splits(run, in_memory)
        parts = divide(run, config, splits, told)
        classifier, features = _load_classifier(run, config, parts, told)
        activations = _compute_activations(run, config, classifier, told)
        parts = usable_parts(run, parts, activations.splits, config.finetune)
        so_far = _predict_run(run, parts)

    # Train the tail, which includes the trained head.
    with clock.measure("training"):
        trained = _train(run, config, classifier, activations, parts, told)

    # Compare mixes of the weights before and after with the model so far.
    with clock.measure("comparison"):
        mix = Mix(classifier, trained.weights, config.finetune)
        held_out = HeldOut(mix, activations, run.class_names, so_far, told)
        metric = deciding_metric(parts.splits.train.targets, config.metric)
        attempt = run.manifest.next_attempt
        verdict = held_out.judge(parts.judging, metric, attempt, config.seed)
        if verdict:
            note_few(verdict.comparison, told)
            mix.finish(verdict.chosen.key, verdict.chosen.temperature)
        judgement = held_out.describe(config, parts, verdict, told)
    phase, force = run.manifest.phase, config.finetune.force
    decision = decide(metric, verdict, phase, parts.rival, force, trial)
    report = _report(config.finetune, decision, mix, activations, trained, clock, told)
    _commit(run, classifier.model, report, trained, judgement, metrics)
    known = Loaded(splits, features, classifier.model if report.kept else None)
    return FinetuneResult(run, report, judgement.evaluations), known


def _report(
    tuning: FinetuneConfig,
    decision: Decision,
    mix: Mix,
    activations: Activations,
    trained: TrainedTail,
    clock: "_Clock",
    told: Broadcast,
) -> FinetuneReport:
    """Puts together the record of a fine-tuning."""
    classifier = mix.classifier
    return FinetuneReport(
        created=now(),
        config=tuning,
        metric=decision.metric,
        kept=decision.kept,
        reason=decision.reason,
        before=decision.before,
        after=decision.after,
        p_value=decision.p_value,
        attempts=decision.attempts,
        deciding_images=decision.deciding_images,
        images_needed=decision.images_needed,
        alphas=dict(decision.alphas),
        calibration=decision.calibration,
        alpha=mix.alpha,
        groups=classifier.rates(tuning),
        trained_parameters=sum(math.prod(v.shape) for v in mix.variables),
        split_point=classifier.split_point,
        activation_bytes=activations.nbytes,
        best_epoch=trained.best_epoch,
        averaged_epochs=averaged_epochs(tuning),
        epochs=len(trained.history),
        engine=activations.engine,
        precision=trained.precision,
        parity=mix.parity(activations),
        images_per_second=images_per_second(trained, len(activations.splits.train)),
        timings=clock.timings(),
        notes=told.notes,
    )


class _Clock:
    """Measures wall-clock seconds of the parts of a workflow."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._parts[part] = time.perf_counter() - started

    def timings(self) -> dict[str, float]:
        """Returns the seconds of each part, and `total`."""
        return {**self._parts, "total": time.perf_counter() - self._started}


def _load_classifier(
    run: Run, config: Config, parts: Parts, listener: Listener
) -> tuple[CutClassifier, FrozenFeatures | None]:
    """Loads the model of the `fit` phase and cuts it below the unfrozen layers.

    Returns:
        (the model; features of the frozen base, if images were set aside, so that the
        head was trained again).
    """
    model, features = load_model(run, "fit"), None
    if len(parts.splits.val):
        features = _train_head_again(run, config, model, parts.splits, listener)
    first = get_bases(config.base)[0]
    groups = unfrozen_groups(model, first, config.finetune.unfreeze)
    sample = sample_images(parts.splits, model.input_shape[1], PARITY_IMAGES)
    return CutClassifier(model, groups, parts.splits, sample), features


def _train_head_again(
    run: Run, config: Config, model: keras.Model, splits: Splits, listener: Listener
) -> FrozenFeatures:
    """Trains the model's head on the training images left, in place.

    The features of the base are those that the run's head was trained on, from the
    cache. The L2 strength is chosen again, so that it knows nothing of the judges: in
    as many folds as the config says, or in fewer if that many are not possible with the
    images that are left.

    Returns:
        The features of all images.
    """
    part = frozen_base_of(model, config, run.manifest.weights_digest)
    precision: Precision = "bf16" if run.manifest.precision == "bf16" else "f32"
    storage = Storage(precision, quality=True)
    features = frozen_features(part, splits, config.augment, storage, listener)
    usable = usable_splits(config, splits, features.extraction)
    names = usable.class_names
    try:
        head_folds(usable.train, len(names), config.folds, config.seed)
    except UsageError:
        config = config.model_copy(update={"folds": None})
    config = config.model_copy(update={"features": run.manifest.features})
    head = train_on_features(config, usable, features, SILENT)
    copy_head(head.model, model.get_layer(HEAD))
    return features


def _compute_activations(
    run: Run, config: Config, classifier: "CutClassifier", listener: Listener
) -> Activations:
    """Computes the tail's inputs and checks the images for changes."""
    activations = frozen_activations(
        classifier.frozen_part(config),
        classifier.splits,
        config,
        classifier.sample_sources,
        classifier.parity,
        listener,
    )
    known = known_images(run.images_path, listener)
    if changed := changed_images(known, activations.digests):
        if run.config.data in NOT_KEPT:  # they may be others, in another order
            raise KerasTransferError(
                "These are not the images that the run was made from. Received: "
                f"{run.config.data}, of which {len(changed):,} of "
                f"{len(activations.digests):,} differ, such as {changed[0]}. Give the "
                "same images in the same order."
            )
        listener.note(
            f"{len(changed):,} of {len(activations.digests):,} images have changed "
            f"since the head was trained, such as {changed[0]}"
        )
    _check_same_images(run, activations)
    return activations


def _predict_run(run: Run, parts: Parts) -> np.ndarray | None:
    """Predicts the judging images with the run's fine-tuned model if it is the rival.

    Returns None otherwise, because training then starts from the model to compare with.
    """
    if parts.rival == "finetune" and len(parts.judging):
        return predict_table(load_model(run), parts.judging, parts.splits.read)
    return None


def _train(
    run: Run,
    config: Config,
    classifier: CutClassifier,
    activations: Activations,
    parts: Parts,
    listener: Listener,
) -> TrainedTail:
    """Trains a copy of the tail; the tail itself is not changed."""
    tuning, splits, stopping = config.finetune, parts.splits, parts.stopping
    weighting = class_weighting(
        splits.train.targets,
        run.class_names,
        config.head.class_weight,
        config.head.logit_adjustment,
    )

    def make_copy(precision: str) -> TrainingCopy:
        copy = training_copy(
            classifier.tail,
            classifier.unfrozen,
            tuning.train_bn,
            precision,
            config.seed,
        )
        if tuning.from_scratch_head:
            _forget_head(copy.model.get_layer(HEAD), config.seed)
        return copy

    def labelled(
        views: Sequence[Features], table: Table, is_learned: bool
    ) -> LabelledFeatures:
        weights = relative_weights(table, is_learned)
        return LabelledFeatures(views, table.targets, weighting, weights)

    recipe = TailRecipe(
        tuning,
        make_copy,
        layer_patterns(
            trained_layers(classifier.groups, tuning.train_bn),
            classifier.multipliers(tuning),
        ),
        _precisions(tuning),
        config.seed,
    )
    # The judging images are not looked at while training, lest somebody starts over
    # until their figures please.
    data = TailData(
        labelled(activations.train, splits.train, True),
        labelled([activations.features.rows(stopping.sources)], stopping, False)
        if len(stopping)
        else None,
        activations.transform,
        tuning.mix,
        tuning.label_smoothing,
    )
    return train_tail(recipe, data, run.checkpoint, listener)


def _resolve(run: Run, options: Mapping[str, Any], resume: bool | None) -> Config:
    """Merges the options into the run's config and saves it in the checkpoint.

    With `resume`, the saved config is used, and options must not differ from it.
    """
    run.check_resume(resume)
    saved = run.checkpoint / CONFIG
    if resume:
        config = load_config(saved)
        asked = with_finetune(config, options)
        if asked != config:
            old, new = config.finetune.model_dump(), asked.finetune.model_dump()
            key = next(key for key in old if old[key] != new[key])
            raise UsageError(
                "To resume is to keep the options it was started with. Received: "
                f"{key} {new[key]!r} instead of {old[key]!r}. Leave it out, or start "
                "over with resume=False."
            )
        return config
    config = run.config
    is_old = run.manifest.schema_version == 1
    if is_old and config.finetune.patience == _OLD_PATIENCE:  # nobody asked for it
        options = {"patience": None, **options}
    config = with_finetune(config, options)
    shutil.rmtree(run.checkpoint, ignore_errors=True)
    with temporary_directory(run.run_dir) as checkpoint:
        write_atomic(checkpoint / CONFIG, to_yaml(config))
        checkpoint.rename(run.checkpoint)
    return config


def _check_same_images(run: Run, activations: Activations) -> None:
    """Checks that the images are those that the checkpoint was made with."""
    path = run.checkpoint / "images.txt"
    fingerprint = activations.splits.fingerprint(activations.digests)
    if not path.exists():
        write_atomic(path, fingerprint)
    elif path.read_text() != fingerprint:
        raise UsageError(
            "The images changed since the training that is to be resumed. "
            f"Received: {run.config.data}. Start over with resume=False."
        )


def _precisions(tuning: FinetuneConfig) -> list[str]:
    """Lists the precisions to choose from; the first one is the reference."""
    if tuning.precision != "auto":
        return [tuning.precision]
    if tf.config.list_physical_devices("GPU"):
        return ["f32", "bf16", "f16"]
    return ["f32", "bf16"] if cpu_has_bf16() else ["f32"]


def _forget_head(head: keras.Model, seed: int) -> None:
    """Resets a head to random weights."""
    for index, layer in enumerate(dense_layers(head)):
        initializer = keras.initializers.GlorotUniform(seed + index)
        layer.kernel.assign(initializer(layer.kernel.shape))
        layer.bias.assign(keras.ops.zeros_like(layer.bias))


def _commit(
    run: Run,
    model: keras.Model,
    report: FinetuneReport,
    trained: TrainedTail,
    judgement: Judgement,
    metrics: Mapping[str, Any],
) -> None:
    """Adds the phase to the run and its metrics atomically.

    If a new model is not kept beside an earlier fine-tuned one, only the number of
    attempts is written.
    """
    manifest = run.manifest
    attempts = report.attempts if report.deciding_images else manifest.attempts
    with updating(run.run_dir) as staging:
        update: dict[str, Any] = {"attempts": attempts}
        if report.kept or manifest.phase == "fit":
            found = {name: x.model_dump() for name, x in judgement.evaluations.items()}
            values = {**metrics, "finetune": found}
            text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
            write_atomic(staging / METRICS, text)
            write_atomic(staging / HISTORY, _history(run, trained))
            update |= {"phase": "fit", "finetune": report}
            path = staging / (MODEL if report.kept else phase_model("finetune"))
            model.save(path)
        if report.kept:
            update |= {"phase": "finetune", **vars(judgement.choices)}
            judgement.write(staging, run.class_names)
            if manifest.phase == "fit":
                _link(run.model_path, staging / phase_model("fit"))
                if run.predictions_path.exists():  # not in a run of version 0.1.0
                    kept = staging / phase_predictions("fit")
                    _link(run.predictions_path, kept)
        changed = manifest.model_copy(update=update)
        write_atomic(staging / MANIFEST, changed.to_json())
    if report.kept:  # delete the model of an earlier fine-tuning that was not kept
        (run.run_dir / phase_model("finetune")).unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system does not support links
        shutil.copyfile(source, target)


def _history(run: Run, trained: TrainedTail) -> str:
    """Formats history.csv with the rows of `fit` and one row per epoch."""
    with (run.run_dir / HISTORY).open(newline="", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["phase"] == "fit"]
    rows: list[dict[str, Any]] = [*lines]
    rows += [{"phase": "finetune", **epoch} for epoch in trained.history]
    header = list(dict.fromkeys(key for row in rows for key in row))
    return csv_text(header, [[row.get(key, "") for key in header] for row in rows])
