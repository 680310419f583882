"""The workflow of `kt unfreeze-and-finetune`.

The head of a run of `kt fit` is trained already: linear probing, then fine-tuning
(Kumar et al. 2022). Pretrained layers learn slowly, the head faster, what is frozen is
computed once, and the result replaces the run's model only if it is better.
"""

import contextlib
import csv
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_transfer.config import (
    Config,
    FinetuneConfig,
    load_config,
    to_yaml,
    with_finetune,
)
from keras_transfer.data.samples import sample_images
from keras_transfer.data.tables import Splits, Table
from keras_transfer.errors import DivergenceError, UsageError
from keras_transfer.evaluation.comparison import Comparison, compare
from keras_transfer.evaluation.metrics import deciding_metric, evaluate, score
from keras_transfer.evaluation.of_run import load_model, run_splits
from keras_transfer.evaluation.prediction import Predictor, predict_sources
from keras_transfer.events import OnNote, OnProgress
from keras_transfer.features.activations import (
    Activations,
    frozen_activations,
    position,
)
from keras_transfer.features.cache import FeatureCache, Features
from keras_transfer.features.extraction import FrozenFeatures, FrozenPart
from keras_transfer.features.parity import PARITY_IMAGES, is_close, parity
from keras_transfer.models.bases import get_base
from keras_transfer.models.classifier import HEAD, cut, dense_layers, weights_digest
from keras_transfer.models.layer_groups import (
    LayerGroups,
    TrainingCopy,
    changed_variables,
    split_point,
    trained_layers,
    training_copy,
    unfrozen_groups,
)
from keras_transfer.runs.files import (
    csv_text,
    only_process,
    temporary_directory,
    write_atomic,
)
from keras_transfer.runs.manifest import FinetuneReport, Phase, now
from keras_transfer.runs.run import (
    CONFIG,
    HISTORY,
    MANIFEST,
    METRICS,
    MODEL,
    Run,
    open_run,
    phase_model,
    updating,
)
from keras_transfer.runtime.openvino import cpu_has_bf16
from keras_transfer.training.head import LabelledFeatures, class_weights
from keras_transfer.training.optim import group_multipliers, layer_patterns
from keras_transfer.training.tail import (
    TrainedTail,
    has_state,
    images_per_second,
    predict_rows,
    probability_function,
    train_tail,
)

ALPHAS = (0.25, 0.5, 0.75, 1.0)
"""Shares of the fine-tuned weights that are tried (WiSE-FT, Wortsman et al. 2022)."""


def unfreeze_and_finetune(
    run: str | Path | Run,
    *,
    resume: bool | None = None,
    on_progress: OnProgress = lambda *_: None,
    on_note: OnNote = lambda _: None,
    **options: Any,
) -> Run:
    """Fine-tunes a run's model, and keeps the result if it is better.

    Args:
        run: A run of `fit`, or its directory. A run that was fine-tuned before starts
            from its head-only model again, and the better of the results stays.
        resume: True goes on after the last finished epoch of a process that was
            killed, False starts over; None is an error if there is something to go
            on with.
        on_progress: Told how the work goes on.
        on_note: Told what was decided, before it takes its time.
        **options: Keys of `config.FinetuneConfig`: `unfreeze="all"`, `epochs=5`.

    Returns:
        The run, with a phase more.

    Raises:
        UsageError: If an option does not fit the run.
        KerasTransferError: If the data are gone, activations do not fit the disk
            budget, or a loss is not finite. The run is then as it was.
    """
    run = open_run(run)
    attempt(run, options, resume, on_progress, on_note)
    return run


def attempt(
    run: Run,
    options: Mapping[str, Any],
    resume: bool | None,
    on_progress: OnProgress,
    on_note: OnNote,
) -> tuple[FinetuneReport, dict[str, dict]]:
    """Does what `unfreeze_and_finetune` says, and returns what came of it.

    Returns:
        (report, figures of each held-out split as in `metrics.json`), also of a model
        that is not kept, while the run holds those of an earlier fine-tuning.
    """
    with only_process(run.run_dir):
        config = _resolve(run, options, resume)
        with _checkpoint_removed(run):
            report, metrics = _finetune(run, config, on_progress, on_note)
    on_note(report.reason)
    return report, metrics


@contextlib.contextmanager
def _checkpoint_removed(run: Run) -> Iterator[None]:
    """Removes the checkpoint at the end, unless there is something to go on with."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DivergenceError) or not has_state(run.checkpoint):
            shutil.rmtree(run.checkpoint)
        raise
    shutil.rmtree(run.checkpoint)


def _finetune(
    run: Run, config: Config, on_progress: OnProgress, on_note: OnNote
) -> tuple[FinetuneReport, dict[str, dict]]:
    started = time.perf_counter()
    tuning, class_names = config.finetune, run.class_names
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        on_note(text)

    # What is trained, and what lies below it
    splits = run_splits(run)
    _check_validation(run, splits, tuning)
    model = load_model(run, "fit")
    groups = unfrozen_groups(model, get_base(config.base), tuning.unfreeze)
    unfrozen = {layer for layers in groups.values() for layer in layers}
    sample = sample_images(splits, model.input_shape[1], PARITY_IMAGES)
    classifier = _Classifier(model, split_point(model, unfrozen), sample)

    # The frozen part, once
    features_started = time.perf_counter()
    activations = frozen_activations(
        classifier.frozen_part(config),
        splits,
        config,
        [source for source, _, _ in sample],
        classifier.parity,
        note,
        on_progress,
    )
    features_seconds = time.perf_counter() - features_started
    splits, rows = activations.splits, activations.features.rows
    _check_validation(run, splits, tuning)  # of which some may be unreadable by now
    _check_same_images(run, activations)

    # The model to beat, if it is not the one that training starts from
    phase, phases, so_far = run.manifest.phase, run.metrics, None
    if phase == "finetune" and len(splits.val):
        so_far = _predict_files(load_model(run), splits, splits.val)

    # The tail, its head trained already
    training_started = time.perf_counter()
    relative = tuning.base_lr and tuning.base_lr / tuning.learning_rate
    multipliers = group_multipliers(list(groups), tuning.decay, relative)
    trained = _train(
        run,
        config,
        classifier.tail,
        groups,
        multipliers,
        activations,
        note,
        on_progress,
    )
    training_seconds = time.perf_counter() - training_started

    # The best mix of the weights before and after, by the validation images
    comparison_started = time.perf_counter()
    variables = changed_variables(classifier.tail, unfrozen, tuning.train_bn)
    mix = interpolation(variables, trained.weights)
    scores = {}
    if len(splits.val):
        for alpha in (1.0,) if tuning.from_scratch_head else ALPHAS:
            mix(alpha)
            probabilities = classifier.predict(rows(splits.val.sources))
            evaluation = evaluate(splits.val.targets, probabilities, class_names)
            scores[alpha] = score(evaluation)
    alpha = max(scores, key=lambda alpha: scores[alpha], default=1.0)

    # The run's model so far and the new one, on the same images, in the same way
    mix(alpha)
    parity = classifier.parity(activations.features, activations.parity["tolerance"])
    if not is_close(parity):
        note(
            "figures are of the model on image files: what it says of cached "
            f"activations differs by up to {parity['max_probability_difference']:.2g}"
        )
    from_files = so_far is not None or not is_close(parity)

    def predict(table: Table) -> np.ndarray:
        if from_files:
            return _predict_files(model, splits, table)
        return classifier.predict(rows(table.sources))

    new = {
        name: predict(table)
        for name, table in splits.items()
        if name != "train" and len(table)
    }
    comparison = None
    if len(splits.val):
        if so_far is None:
            mix(0.0)
            so_far = predict(splits.val)
            mix(alpha)
        targets = splits.val.targets
        comparison = compare(targets, so_far, new["val"], class_names, config.seed)
    kept, reason = _verdict(phase, comparison, tuning.force, len(splits.val))

    # Everything in the run, at once
    report = FinetuneReport(
        created=now(),
        config=tuning,
        kept=kept,
        reason=reason,
        metric=deciding_metric(splits.val.targets),
        before=comparison.before if comparison else None,
        after=comparison.after if comparison else None,
        p_value=comparison.p_value if comparison else None,
        alpha=alpha,
        alphas={f"{a:g}": metric for a, (metric, _) in scores.items()},
        groups={name: m * tuning.learning_rate for name, m in multipliers.items()},
        trained_parameters=sum(math.prod(v.shape) for v in variables),
        split_point=classifier.split_point,
        activation_bytes=activations.nbytes,
        best_epoch=trained.best_epoch,
        epochs=len(trained.history),
        engine=activations.engine,
        precision=trained.precision,
        parity=parity,
        images_per_second=images_per_second(trained, len(splits.train)),
        timings={
            "features": features_seconds,
            "training": training_seconds,
            "comparison": time.perf_counter() - comparison_started,
            "total": time.perf_counter() - started,
        },
        notes=notes,
    )
    metrics = {}
    for name, probabilities in new.items():
        targets = getattr(splits, name).targets
        metrics[name] = evaluate(targets, probabilities, class_names).model_dump()
    if kept or phase == "fit":
        _commit(run, model, report, trained, {**phases, "finetune": metrics})
    return report, metrics


class _Classifier:
    """A model cut in two, and what it says of pixels and of activations.

    Attributes:
        model: From [0, 255] pixels to probabilities.
        split_point: Where it is cut.
        tail: The part above.
    """

    def __init__(
        self,
        model: keras.Model,
        split_point: str,
        sample: Sequence[tuple[str, bytes, np.ndarray]],
    ):
        self.model = model
        self.split_point = split_point
        self._frozen, self.tail = cut(model, split_point)
        self._sample = sample
        self._of_pixels = Predictor(model)
        self._of_rows = probability_function(self.tail)

    def frozen_part(self, config: Config) -> FrozenPart:
        """The part below the split point."""
        return FrozenPart(
            self._frozen,
            config.base,
            weights_digest(self._frozen),
            position(self._frozen),
            config.seed,
            FeatureCache(config.cache_dir),
        )

    def predict(self, rows: Features) -> np.ndarray:
        """float32 `[N, num_classes]` probabilities of activations."""
        return predict_rows(self._of_rows, rows)

    def parity(self, features: FrozenFeatures, tolerance: float) -> dict[str, float]:
        """What activations say of a sample of images against what pixels do."""
        known = features.extraction.digests
        images = {source: x for source, _, x in self._sample if source in known}
        if not images:
            return parity(np.zeros((0, 1)), np.zeros((0, 1)), tolerance)
        from_rows = self.predict(features.rows(list(images)))
        return parity(self._of_pixels(list(images.values())), from_rows, tolerance)


def _train(
    run: Run,
    config: Config,
    tail: keras.Model,
    groups: LayerGroups,
    multipliers: dict[str, float],
    activations: Activations,
    on_note: OnNote,
    on_progress: OnProgress,
) -> TrainedTail:
    """Trains copies of the tail; the tail stays as it is."""
    tuning, splits, num_classes = (
        config.finetune,
        activations.splits,
        len(run.class_names),
    )
    unfrozen = {layer for layers in groups.values() for layer in layers}
    balanced = config.head.class_weight == "balanced"
    weights = class_weights(splits.train.targets, num_classes, balanced)

    def make_copy(precision: str) -> TrainingCopy:
        copy = training_copy(tail, unfrozen, tuning.train_bn, precision, config.seed)
        if tuning.from_scratch_head:
            _forget_head(copy.model.get_layer(HEAD), config.seed)
        return copy

    def labelled(views: Sequence[Features], table: Table) -> LabelledFeatures:
        return LabelledFeatures(views, table.targets, num_classes, weights)

    steps = tuning.epochs * math.ceil(len(splits.train) / tuning.batch_size)
    return train_tail(
        tuning,
        make_copy,
        layer_patterns(trained_layers(groups, tuning.train_bn), multipliers),
        labelled(activations.train, splits.train),
        labelled([activations.features.rows(splits.val.sources)], splits.val),
        run.class_names,
        config.seed,
        run.checkpoint,
        activations.transform,
        _precisions(tuning),
        on_note,
        lambda done: on_progress("training", done, steps),
    )


def interpolation(
    variables: Sequence[keras.Variable], after: Sequence[np.ndarray]
) -> Callable[[float], None]:
    """A function that sets variables to a mix of their values now and others.

    Returns:
        From alpha, the share of the others: 0 restores the values exactly, 1 sets the
        others exactly.
    """
    before = [variable.numpy() for variable in variables]

    def mix(alpha: float) -> None:
        for variable, old, new in zip(variables, before, after, strict=True):
            variable.assign((1 - alpha) * old + alpha * new)

    return mix


def _resolve(run: Run, options: Mapping[str, Any], resume: bool | None) -> Config:
    """The run's config with the options of this phase, kept in its checkpoint."""
    saved = run.checkpoint / CONFIG
    if resume:
        if not saved.exists():
            raise UsageError(
                f"There is nothing to go on with. Received: {run.run_dir} and "
                "--resume. Start without it."
            )
        config = load_config(saved)
        asked = with_finetune(config, options)
        if asked != config:
            old, new = config.finetune.model_dump(), asked.finetune.model_dump()
            key = next(key for key in old if old[key] != new[key])
            raise UsageError(
                "--resume goes on with the options it was started with. Received: "
                f"{key} {new[key]!r} instead of {old[key]!r}. Leave it out, or start "
                "over with --no-resume."
            )
        return config
    config = with_finetune(run.config, options)
    if saved.exists() and resume is None:
        raise UsageError(
            f"An earlier fine-tuning was not finished. Received: {run.run_dir}. Go on "
            "with --resume, or start over with --no-resume."
        )
    shutil.rmtree(run.checkpoint, ignore_errors=True)
    with temporary_directory(run.run_dir) as checkpoint:
        write_atomic(checkpoint / CONFIG, to_yaml(config))
        checkpoint.rename(run.checkpoint)
    return config


def _check_validation(run: Run, splits: Splits, tuning: FinetuneConfig) -> None:
    if not len(splits.val) and not tuning.force:
        raise UsageError(
            "Without validation images nothing can tell whether a fine-tuned model is "
            f"better. Received: {run.run_dir}, which has none. Train it again with "
            "some, or keep the model whatever it is with --force."
        )


def _check_same_images(run: Run, activations: Activations) -> None:
    """A checkpoint is of the images it was made with."""
    path = run.checkpoint / "images.txt"
    fingerprint = activations.splits.fingerprint(activations.digests)
    if not path.exists():
        write_atomic(path, fingerprint)
    elif path.read_text() != fingerprint:
        raise UsageError(
            f"The images changed since the training that --resume goes on with. "
            f"Received: {run.config.data}. Start over with --no-resume."
        )


def _precisions(tuning: FinetuneConfig) -> list[str]:
    """What training may be done in; the first is what others are measured against."""
    if tuning.precision != "auto":
        return [tuning.precision]
    if tf.config.list_physical_devices("GPU"):
        return ["f32", "bf16", "f16"]
    return ["f32", "bf16"] if cpu_has_bf16() else ["f32"]


def _forget_head(head: keras.Model, seed: int) -> None:
    """Gives a head random weights, as if it had never been trained."""
    for index, layer in enumerate(dense_layers(head)):
        initializer = keras.initializers.GlorotUniform(seed + index)
        layer.kernel.assign(initializer(layer.kernel.shape))
        layer.bias.assign(keras.ops.zeros_like(layer.bias))


def _predict_files(model: keras.Model, splits: Splits, table: Table) -> np.ndarray:
    """float32 `[N, num_classes]` of a table's images, read again."""
    by_source = {
        prediction.source: prediction.probabilities
        for prediction in predict_sources(model, table.sources, splits.read)
    }
    return np.stack([by_source[source] for source in table.sources])  # type: ignore[misc]


def _verdict(
    phase: Phase, comparison: Comparison | None, force: bool, images: int
) -> tuple[bool, str]:
    """Whether the new model becomes the run's, and why."""
    if comparison is None:  # which only --force allows
        return True, "the fine-tuned model was kept by --force, compared with nothing"
    name = comparison.metric.replace("_", " ")
    figures = (
        f"{name} on the {images:,} validation images {comparison.before:.4f} -> "
        f"{comparison.after:.4f} (p = {comparison.p_value:.2g})"
    )
    if comparison.is_better:
        return True, f"the fine-tuned model was kept: {figures}"
    if force:
        return True, f"the fine-tuned model was kept by --force: {figures}"
    old = "head-only" if phase == "fit" else "earlier fine-tuned"
    return False, f"the {old} model stays, for the new one is not better: {figures}"


def _commit(
    run: Run,
    model: keras.Model,
    report: FinetuneReport,
    trained: TrainedTail,
    metrics: dict[str, dict],
) -> None:
    """Puts the phase into the run; it is there whole or not at all."""
    manifest = run.manifest
    with updating(run.run_dir) as staging:
        if report.kept:
            model.save(staging / MODEL)
            if manifest.phase == "fit":
                _link(run.model_path, staging / phase_model("fit"))
        else:
            model.save(staging / phase_model("finetune"))
        text = json.dumps(metrics, indent=1, ensure_ascii=False) + "\n"
        write_atomic(staging / METRICS, text)
        write_atomic(staging / HISTORY, _history(run, trained))
        update = {"phase": "finetune" if report.kept else "fit", "finetune": report}
        changed = manifest.model_copy(update=update)
        write_atomic(staging / MANIFEST, changed.to_json())
    if report.kept:  # of an earlier fine-tuning that was not
        (run.run_dir / phase_model("finetune")).unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _history(run: Run, trained: TrainedTail) -> str:
    """The text of history.csv, with a row an epoch."""
    with (run.run_dir / HISTORY).open(newline="", encoding="utf-8") as file:
        rows: list[dict] = [r for r in csv.DictReader(file) if r["phase"] == "fit"]
    rows += [{"phase": "finetune", **epoch} for epoch in trained.history]
    header = list(dict.fromkeys(key for row in rows for key in row))
    return csv_text(header, [[row.get(key, "") for key in header] for row in rows])
