"""The workflow of `kt unfreeze-and-finetune`.

It starts from the trained head of `kt fit` (linear probing, then fine-tuning: Kumar et
al. 2022). Pretrained layers learn more slowly than the head, outputs of the frozen part
are computed once, and the result replaces the run's model only if it is better.
"""

import contextlib
import csv
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from keras_transfer.evaluation.metrics import (
    Evaluation,
    deciding_metric,
    evaluate,
    selection_key,
)
from keras_transfer.evaluation.of_run import load_model, run_splits
from keras_transfer.evaluation.prediction import predict_table, prediction_engine
from keras_transfer.events import Broadcast, Listener
from keras_transfer.features.activations import (
    Activations,
    frozen_activations,
    split_point_id,
)
from keras_transfer.features.cache import FeatureCache, Features
from keras_transfer.features.engine import predict
from keras_transfer.features.frozen_part import FrozenFeatures, FrozenPart
from keras_transfer.features.image_table import changed_images, known_images
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
    phase_model,
    updating,
)
from keras_transfer.runtime.openvino import cpu_has_bf16
from keras_transfer.training.head import LabelledFeatures, class_weights
from keras_transfer.training.optim import group_multipliers, layer_patterns
from keras_transfer.training.tail import (
    TailData,
    TailRecipe,
    TrainedTail,
    has_state,
    images_per_second,
    predict_rows,
    probability_function,
    train_tail,
)

ALPHAS = (0.25, 0.5, 0.75, 1.0)
"""Fractions of the fine-tuned weights to try (WiSE-FT, Wortsman et al. 2022)."""


@dataclass(frozen=True, repr=False)
class FinetuneResult:
    """The result of fine-tuning, whether or not the new model was kept.

    Attributes:
        run: The run.
        report: What was done, and whether the new model was kept.
        evaluations: Metrics of the new model by held-out split (`val`, `test`).
    """

    run: Run
    report: FinetuneReport
    evaluations: Mapping[str, Evaluation]

    def __repr__(self) -> str:
        return f"FinetuneResult({self.run.run_dir}: {self.report.reason})"


def run_finetuning(
    run: Run, options: Mapping[str, Any], resume: bool | None, listener: Listener
) -> FinetuneResult:
    """Implements `api.unfreeze_and_finetune`.

    Args:
        run: The run.
        options: Keys of `config.FinetuneConfig`.
        resume: Whether to continue an interrupted fine-tuning; None raises an error if
            there is one.
        listener: Receives notes, progress, epochs and artifacts.

    Returns:
        The result, which describes the new model even if it was not kept and the run
        still contains an earlier fine-tuned model.

    Raises:
        UsageError: If an option does not fit the run, or there is nothing to resume.
        KerasTransferError: If the data no longer exist, activations exceed the disk
            budget, a loss is not finite, or another process is changing the run.
    """
    with only_process(run.run_dir):
        config = _resolve(run, options, resume)
        with _checkpoint_removed(run):
            result = _finetune(run, config, listener)
    listener.note(result.report.reason)
    listener.artifact(run.run_dir, "run")
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


def _finetune(run: Run, config: Config, listener: Listener) -> FinetuneResult:
    clock = _Clock()
    told = Broadcast([listener])  # keeps the notes for the report

    # Cut the model, and run the frozen part once.
    classifier = _load_classifier(run, config)
    with clock.measure("features"):
        activations = _compute_activations(run, config, classifier, told)
    phases, phase = run.metrics, run.manifest.phase
    so_far = _predict_run(run, activations.splits)

    # Train the tail, which includes the trained head.
    with clock.measure("training"):
        trained = _train(run, config, classifier, activations, told)

    # Choose the best mix of weights before and after, and compare it with the model.
    with clock.measure("comparison"):
        mix = _Mix(classifier, trained.weights, config.finetune)
        scores = mix.choose(activations, run.class_names)
        held_out = _HeldOut(mix, activations, run.class_names, so_far, told)
        evaluations = held_out.evaluate()
        comparison = held_out.compare(config.seed)
    val = activations.splits.val
    kept, reason = _verdict(phase, comparison, config.finetune.force, len(val))

    report = FinetuneReport(
        created=now(),
        config=config.finetune,
        kept=kept,
        reason=reason,
        metric=deciding_metric(val.targets),
        before=comparison.before if comparison else None,
        after=comparison.after if comparison else None,
        p_value=comparison.p_value if comparison else None,
        alpha=mix.alpha,
        alphas={f"{alpha:g}": metric for alpha, (metric, _) in scores.items()},
        groups=classifier.rates(config.finetune),
        trained_parameters=sum(math.prod(v.shape) for v in mix.variables),
        split_point=classifier.split_point,
        activation_bytes=activations.nbytes,
        best_epoch=trained.best_epoch,
        epochs=len(trained.history),
        engine=activations.engine,
        precision=trained.precision,
        parity=held_out.parity,
        images_per_second=images_per_second(trained, len(activations.splits.train)),
        timings=clock.timings(),
        notes=told.notes,
    )
    if kept or phase == "fit":
        found = {name: one.model_dump() for name, one in evaluations.items()}
        metrics = {**phases, "finetune": found}
        _commit(run, classifier.model, report, trained, metrics)
    return FinetuneResult(run, report, evaluations)


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


def _load_classifier(run: Run, config: Config) -> "_Classifier":
    """Loads the model of the `fit` phase and cuts it below the unfrozen layers."""
    splits = run_splits(run)
    _check_validation(run, splits, config.finetune)
    model = load_model(run, "fit")
    groups = unfrozen_groups(model, get_base(config.base), config.finetune.unfreeze)
    sample = sample_images(splits, model.input_shape[1], PARITY_IMAGES)
    return _Classifier(model, groups, splits, sample)


def _compute_activations(
    run: Run, config: Config, classifier: "_Classifier", listener: Listener
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
    # Validation images may have become unreadable.
    _check_validation(run, activations.splits, config.finetune)
    known = known_images(run.images_path, listener)
    if changed := changed_images(known, activations.digests):
        listener.note(
            f"{len(changed):,} of {len(activations.digests):,} images have changed "
            f"since the head was trained, such as {changed[0]}"
        )
    _check_same_images(run, activations)
    return activations


def _predict_run(run: Run, splits: Splits) -> np.ndarray | None:
    """Predicts validation images with the run's model if it was fine-tuned before.

    Returns None otherwise, because training then starts from the run's model.
    """
    if run.manifest.phase == "finetune" and len(splits.val):
        return predict_table(load_model(run), splits.val, splits.read)
    return None


class _Classifier:
    """A model cut in two, with its predictions from pixels and from activations.

    Attributes:
        model: Model from [0, 255] RGB pixels to probabilities.
        groups: The layers to train, by group.
        splits: The images.
        sample_sources: Images on which both kinds of predictions are compared.
        split_point: Name of the layer after which the model is cut.
        tail: The part above the cut.
    """

    def __init__(
        self,
        model: keras.Model,
        groups: LayerGroups,
        splits: Splits,
        sample: Sequence[tuple[str, bytes, np.ndarray]],
    ):
        self.model = model
        self.groups = groups
        self.splits = splits
        self.split_point = split_point(model, self.unfrozen)
        self.sample_sources = [source for source, _, _ in sample]
        self._frozen, self.tail = cut(model, self.split_point)
        self._sample = sample
        self._of_pixels = prediction_engine(model)
        self._of_rows = probability_function(self.tail)

    @property
    def unfrozen(self) -> set[keras.layers.Layer]:
        """The layers to train."""
        return {layer for layers in self.groups.values() for layer in layers}

    def multipliers(self, tuning: FinetuneConfig) -> dict[str, float]:
        """Returns the multiplier of the head's learning rate by group."""
        relative = tuning.base_lr and tuning.base_lr / tuning.learning_rate
        return group_multipliers(list(self.groups), tuning.decay, relative)

    def rates(self, tuning: FinetuneConfig) -> dict[str, float]:
        """Returns the peak learning rate by group."""
        multipliers = self.multipliers(tuning)
        return {name: m * tuning.learning_rate for name, m in multipliers.items()}

    def frozen_part(self, config: Config) -> FrozenPart:
        """Returns the part below the split point."""
        return FrozenPart(
            self._frozen,
            config.base,
            weights_digest(self._frozen),
            split_point_id(self._frozen),
            config.seed,
            FeatureCache(config.cache_dir),
        )

    def predict(self, rows: Features) -> np.ndarray:
        """Computes float32 `[N, num_classes]` probabilities from activations."""
        return predict_rows(self._of_rows, rows)

    def parity(self, features: FrozenFeatures, tolerance: float) -> dict[str, float]:
        """Compares predictions from activations with those from pixels on a sample."""
        known = features.extraction.digests
        images = {source: x for source, _, x in self._sample if source in known}
        if not images:
            return parity(np.zeros((0, 1)), np.zeros((0, 1)), tolerance)
        from_rows = self.predict(features.rows(list(images)))
        from_pixels = predict(self._of_pixels, np.stack(list(images.values())))
        return parity(from_pixels, from_rows, tolerance)


def _train(
    run: Run,
    config: Config,
    classifier: _Classifier,
    activations: Activations,
    listener: Listener,
) -> TrainedTail:
    """Trains a copy of the tail; the tail itself is not changed."""
    tuning, splits, num_classes = (
        config.finetune,
        activations.splits,
        len(run.class_names),
    )
    balanced = config.head.class_weight == "balanced"
    weights = class_weights(splits.train.targets, num_classes, balanced)

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

    def labelled(views: Sequence[Features], table: Table) -> LabelledFeatures:
        return LabelledFeatures(views, table.targets, num_classes, weights)

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
    data = TailData(
        labelled(activations.train, splits.train),
        labelled([activations.features.rows(splits.val.sources)], splits.val),
        run.class_names,
        activations.transform,
    )
    return train_tail(recipe, data, run.checkpoint, listener)


class _Mix:
    """A classifier whose weights are a mix of those before and after training.

    Attributes:
        classifier: The classifier, whose model has the mixed weights.
        variables: The variables that training changed.
        alpha: Fraction of the weights after training, from 0 to 1.
    """

    def __init__(
        self,
        classifier: _Classifier,
        after: Sequence[np.ndarray],
        tuning: FinetuneConfig,
    ):
        self.classifier = classifier
        self.variables = changed_variables(
            classifier.tail, classifier.unfrozen, tuning.train_bn
        )
        self._interpolate = interpolation(self.variables, after)
        self._alphas = (1.0,) if tuning.from_scratch_head else ALPHAS
        self.alpha = 0.0

    def set(self, alpha: float) -> None:
        """Sets the model's weights to the mix for `alpha`."""
        self._interpolate(alpha)
        self.alpha = alpha

    def choose(
        self, activations: Activations, class_names: Sequence[str]
    ) -> dict[float, tuple[float, float]]:
        """Sets the mix with the best validation score, or alpha 1 without images.

        Returns:
            The `selection_key` of each alpha that was tried.
        """
        val, scores = activations.splits.val, {}
        if len(val):
            rows = activations.features.rows(val.sources)
            for alpha in self._alphas:
                self.set(alpha)
                probabilities = self.classifier.predict(rows)
                evaluation = evaluate(val.targets, probabilities, class_names)
                scores[alpha] = selection_key(evaluation)
        self.set(max(scores, key=lambda alpha: scores[alpha], default=1.0))
        return scores


class _HeldOut:
    """Predictions of a mix, and of the run's previous model, for held-out images.

    Both are computed in the same way: from cached activations, or from image files if
    activations do not give the model's own predictions.

    Attributes:
        parity: Agreement of the mix's predictions from activations with those from
            pixels; see `parity.parity`.
    """

    def __init__(
        self,
        mix: _Mix,
        activations: Activations,
        class_names: Sequence[str],
        so_far: np.ndarray | None,
        listener: Listener,
    ):
        """Computes the mix's predictions.

        Args:
            mix: The new model.
            activations: Inputs of its tail.
            class_names: Class names in the order of the outputs.
            so_far: Predictions of the run's model for the files of validation images;
                None if training started from that model.
            listener: Receives a note if image files have to be used.
        """
        self._mix = mix
        self._activations = activations
        self._class_names = class_names
        self.parity = mix.classifier.parity(
            activations.features, activations.parity["tolerance"]
        )
        is_exact = is_close(self.parity)
        if not is_exact:
            listener.note(
                "figures are of the model on image files: what it says of cached "
                "activations differs by up to "
                f"{self.parity['max_probability_difference']:.2g}"
            )
        self._from_files = so_far is not None or not is_exact
        self._so_far = so_far
        self._said = {
            name: self._predict(table)
            for name, table in activations.splits.items()
            if name != "train" and len(table)
        }

    def evaluate(self) -> dict[str, Evaluation]:
        """Computes metrics of the mix by split."""
        return {
            name: evaluate(
                getattr(self._activations.splits, name).targets,
                probabilities,
                self._class_names,
            )
            for name, probabilities in self._said.items()
        }

    def compare(self, seed: int) -> Comparison | None:
        """Compares the mix with the run's model; None without validation images."""
        val = self._activations.splits.val
        if not len(val):
            return None
        before, alpha = self._so_far, self._mix.alpha
        if before is None:
            self._mix.set(0.0)
            before = self._predict(val)
            self._mix.set(alpha)
        return compare(val.targets, before, self._said["val"], self._class_names, seed)

    def _predict(self, table: Table) -> np.ndarray:
        classifier, activations = self._mix.classifier, self._activations
        if self._from_files:
            return predict_table(classifier.model, table, activations.splits.read)
        return classifier.predict(activations.features.rows(table.sources))


def interpolation(
    variables: Sequence[keras.Variable], after: Sequence[np.ndarray]
) -> Callable[[float], None]:
    """Creates a function that mixes the current values of variables with new ones.

    Args:
        variables: The variables to set.
        after: The new values.

    Returns:
        A function that takes alpha, the fraction of the new values: 0 restores the
        current values exactly, and 1 sets the new values exactly.
    """
    before = [variable.numpy() for variable in variables]

    def mix(alpha: float) -> None:
        for variable, old, new in zip(variables, before, after, strict=True):
            variable.assign((1 - alpha) * old + alpha * new)

    return mix


def _resolve(run: Run, options: Mapping[str, Any], resume: bool | None) -> Config:
    """Merges the options into the run's config and saves it in the checkpoint.

    With `resume`, the saved config is used, and options must not differ from it.
    """
    saved = run.checkpoint / CONFIG
    if resume:
        if not saved.exists():
            raise UsageError(
                f"There is nothing to go on with. Received: {run.run_dir} and "
                "resume=True. Start without it."
            )
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
    config = with_finetune(run.config, options)
    if saved.exists() and resume is None:
        raise UsageError(
            f"An earlier fine-tuning was not finished. Received: {run.run_dir}. Go on "
            "with resume=True, or start over with resume=False."
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
            "some, or keep the model whatever it is with force=True."
        )


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


def _verdict(
    phase: Phase, comparison: Comparison | None, force: bool, images: int
) -> tuple[bool, str]:
    """Decides whether the new model becomes the run's model, and gives the reason."""
    if comparison is None:  # only possible with force
        return True, "the fine-tuned model was kept by force, compared with nothing"
    name = comparison.metric.replace("_", " ")
    figures = (
        f"{name} on the {images:,} validation images {comparison.before:.4f} -> "
        f"{comparison.after:.4f} (p = {comparison.p_value:.2g})"
    )
    if comparison.is_better:
        return True, f"the fine-tuned model was kept: {figures}"
    if force:
        return True, f"the fine-tuned model was kept by force: {figures}"
    old = "head-only" if phase == "fit" else "earlier fine-tuned"
    return False, f"the {old} model stays, for the new one is not better: {figures}"


def _commit(
    run: Run,
    model: keras.Model,
    report: FinetuneReport,
    trained: TrainedTail,
    metrics: dict[str, dict[str, Any]],
) -> None:
    """Adds the phase to the run atomically."""
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
