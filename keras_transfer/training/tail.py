"""Rows at the split point -> a trained tail.

Training uses Keras's `fit`, called once per epoch. After each epoch, everything that
the next one depends on is written to a checkpoint. So training can be resumed after the
process was killed at any moment, with the same result, bit for bit, as without the
interruption.

No image chooses when to stop, unless the user asks for it: the learning rate falls to 0
over a fixed number of epochs, and the weights after the last of them are averaged
(Polyak & Juditsky 1992; Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima
and Better Generalization").
"""

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import keras
import numpy as np
import tensorflow as tf

from keras_transfer.config import FinetuneConfig, Mixing
from keras_transfer.errors import DivergenceError, UsageError
from keras_transfer.events import Listener, duration
from keras_transfer.features.activations import ComputedRows, Transform
from keras_transfer.features.cache import Features
from keras_transfer.models.layer_groups import TrainingCopy
from keras_transfer.runs.files import replacing
from keras_transfer.training.labelled import LabelledFeatures
from keras_transfer.training.losses import keras_loss, smoothed
from keras_transfer.training.mixing import draw_pairs
from keras_transfer.training.optim import LayerwiseAdamW, LrMultipliers, warmup_cosine

_STATE = "state.npz"
_MEASURED_STEPS = 4  # in addition to a first one that traces
_A_MOMENT = 10.0  # seconds of training below which measuring does not pay off
_WORTH_IT = 1.05  # minimum speedup for less precise arithmetic
_SAME_LOSS = 0.05  # maximum relative difference of its first loss from that of float32
_PREDICTION_BATCH = 64
AVERAGED = 0.3
"""Fraction of the epochs, the last ones, whose weights are averaged."""

_FIX = (
    "Training diverged; the run is as it was. Use a lower learning_rate or base_lr, or "
    "precision f32."
)


@dataclass
class TrainedTail:
    """A trained tail.

    Attributes:
        weights: Values of `layer_groups.changed_variables`, in order; the mean over
            several epochs or those of one. Empty while none of these is finished.
        history: One dict per epoch: epoch (starting at 1), loss (mean weighted
            cross-entropy in nats of the training rows), accuracy (share of these rows
            whose most likely class is correct; not for multi-label data), with
            `patience` val_loss (the loss of the rows that choose the epoch; NaN without
            any), learning_rate (of the head, at the end of the epoch), seconds and
            images_per_second. Loss and accuracy are means over the images, each with
            the weights before its step. Those of mixed images and smoothed labels are
            not comparable with others: the correct class is that of the larger share.
        best_epoch: The epoch that the weights are from, starting at 1; with a mean of
            several, the last of these. 0 while none is finished.
        precision: Arithmetic of training: `f32`, `bf16` or `f16`.
    """

    weights: list[np.ndarray] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    precision: str = ""


@dataclass(frozen=True)
class TailRecipe:
    """How a tail is trained.

    Attributes:
        config: Options of fine-tuning.
        make_copy: Creates a copy of the tail to train in a given precision.
        lr_multipliers: Multipliers of the learning rate, by patterns of variable paths.
        precisions: Precisions to choose from by timing a few steps, `f32` first.
        seed: Seed of the order of images and of the choice of views.
    """

    config: FinetuneConfig
    make_copy: Callable[[str], TrainingCopy]
    lr_multipliers: LrMultipliers
    precisions: Sequence[str] = ("f32",)
    seed: int = 0


@dataclass(frozen=True)
class TailData:
    """Data that a tail is trained on.

    Attributes:
        train: Training rows; each epoch uses one random view of every image.
        stopping: Held-out rows whose loss decides when to stop with `patience`; None
            without.
        transform: Applied to training rows in every epoch; None for no change.
        mixing: How the images of a batch are mixed; only with a `transform`.
        label_smoothing: Fraction of each training label that is spread over all
            classes.
    """

    train: LabelledFeatures
    stopping: LabelledFeatures | None = None
    transform: Transform | None = None
    mixing: Mixing = "none"
    label_smoothing: float = 0.0

    def batches(
        self, batch_size: int, seed: int, epoch: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the batches of an epoch, determined by the seed.

        Args:
            batch_size: Maximum number of images per batch.
            seed: Seed of the order of images, of the choice of views and of mixtures.
            epoch: Number of the epoch, starting at 0.

        Yields:
            (rows `[n, ...]`, targets and weights concatenated to `[n, 2 C]`).
        """
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(self.train.targets))
        view_of = rng.integers(0, len(self.train.views), len(order))
        mixing_rng = np.random.default_rng([seed, epoch, 1])
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            rows, labels = self._rows(picked, view_of[picked]), self._labels(picked)
            if self.transform:
                images, size = rows.shape[:2]
                pairs = draw_pairs(self.mixing, images, size, mixing_rng)
                change = pairs.pixels if pairs else None
                rows = self.transform(rows, picked, epoch, change)
                labels = pairs.labels(*labels) if pairs else labels
            yield rows, np.concatenate(labels, axis=1)

    def _labels(self, picked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the (targets, weights in the loss) of images `[n]`, as `[n, C]`."""
        targets, weights = self.train.labels(picked)
        if self.label_smoothing:
            multi_label = self.train.multi_label
            targets = smoothed(targets, self.label_smoothing, multi_label)
        return targets, weights

    def _rows(self, picked: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Reads the rows of images `[n]`, each in the view `[n]` drawn for it."""
        plain = self.train.views[0]
        rows = np.empty((len(picked), *plain.shape[1:]), plain.dtype)
        for number in np.unique(views):
            rows[views == number] = self.train.views[number][picked[views == number]]
        return rows


def train_tail(
    recipe: TailRecipe, data: TailData, checkpoint: Path, listener: Listener
) -> TrainedTail:
    """Trains a tail for a fixed number of epochs, or until a loss stops improving.

    Args:
        recipe: How to train.
        data: Data to train on.
        checkpoint: Folder for the state after each epoch. If it contains the state of
            an earlier process, training continues from there.
        listener: Receives notes, and progress after every batch and epoch.

    Returns:
        The tail with the mean of its weights after the last epochs; if the config has a
        `patience`, with those after the epoch of the lowest loss.

    Raises:
        DivergenceError: If a loss, a weight or a probability is not finite.
        UsageError: If the checkpoint is damaged.
    """
    config = recipe.config
    steps = math.ceil(len(data.train.targets) / config.batch_size)
    tail, state = TrainedTail(), None
    if has_state(checkpoint):
        tail, state = _load(checkpoint / _STATE)
        recipe = replace(recipe, precisions=[tail.precision])
    learner = _prepare(recipe, data, steps, listener)
    tail.precision = learner.precision
    if state is not None:
        learner.set_state(state)

    for row in tail.history:
        listener.epoch("finetune", int(row["epoch"]), row)
    done = itertools.count(len(tail.history) * steps + 1)

    def on_batch() -> None:
        listener.progress("training", next(done), steps * config.epochs)

    while not _is_done(tail, config):
        epoch = len(tail.history)
        started = time.perf_counter()
        batches = data.batches(config.batch_size, recipe.seed, epoch)
        figures = learner.train(batches, steps, on_batch)
        seconds = time.perf_counter() - started
        row = {"epoch": epoch + 1, **figures}
        if config.patience is not None:
            row["val_loss"] = _validate(learner, data.stopping)
        row |= {"learning_rate": learner.rate(), "seconds": seconds}
        row["images_per_second"] = len(data.train.targets) / seconds
        tail.history.append(row)
        _take_weights(tail, config, learner.weights)
        _save(checkpoint / _STATE, tail, learner.state())
        listener.epoch("finetune", epoch + 1, row)
    return tail


def _prepare(
    recipe: TailRecipe, data: TailData, steps: int, listener: Listener
) -> "_Learner":
    """Chooses the precision and sends a note on how long training will take."""
    config = recipe.config
    for _ in range(2):  # the first batch is slower
        started = time.perf_counter()
        batch = next(data.batches(config.batch_size, recipe.seed, 0))
        batch_seconds = time.perf_counter() - started
    learner = fastest(
        lambda precision: _Learner(recipe, precision, steps, data.train),
        recipe.precisions,
        batch,
        steps * config.epochs,
        listener,
    )
    seconds = (learner.seconds_a_step + batch_seconds) * steps
    listener.note(
        f"an epoch of {len(data.train.targets):,} images takes about "
        f"{duration(seconds)}, {config.epochs} epochs "
        f"{duration(seconds * config.epochs)}"
    )
    return learner


def _validate(learner: "_Learner", stopping: LabelledFeatures | None) -> float:
    """Computes the mean loss of the rows that choose the epoch; NaN without any."""
    if stopping is None:
        return math.nan
    probabilities = learner.predict(stopping.views[0])
    return float(stopping.losses_of(probabilities).mean())


def measure_training(recipe: TailRecipe, batch: LabelledFeatures) -> float:
    """Measures the seconds per training step in float32; the result is discarded.

    Args:
        recipe: How to train.
        batch: Rows and targets of one batch.
    """
    learner = _Learner(recipe, "f32", 1, batch)
    rows = next(TailData(batch).batches(len(batch), 0, 0))
    learner.measure(rows, _MEASURED_STEPS)
    return learner.seconds_a_step


def has_state(checkpoint: Path) -> bool:
    """Returns whether a checkpoint contains a finished epoch."""
    return (checkpoint / _STATE).exists()


def averaged_epochs(config: FinetuneConfig) -> int:
    """Returns the number of epochs whose weights are averaged; 1 with `patience`."""
    if config.patience is not None:
        return 1
    return max(1, round(AVERAGED * config.epochs))


def _is_done(tail: TrainedTail, config: FinetuneConfig) -> bool:
    epochs = len(tail.history)
    if epochs == config.epochs:
        return True
    return config.patience is not None and epochs - tail.best_epoch >= config.patience


def _take_weights(
    tail: TrainedTail, config: FinetuneConfig, weights: Callable[[], list[np.ndarray]]
) -> None:
    """Updates a tail's weights after an epoch, if they depend on this epoch."""
    epoch = len(tail.history)
    if config.patience is not None:
        losses = [row["val_loss"] for row in tail.history]
        # Without rows to choose by, losses are NaN and later epochs are better.
        if epoch == 1 or not losses[-1] >= losses[tail.best_epoch - 1]:
            tail.best_epoch, tail.weights = epoch, weights()
        return
    # The mean of n values is that of the first n - 1, plus 1 / n of the difference.
    count = epoch - (config.epochs - averaged_epochs(config))
    if count == 1:
        tail.best_epoch, tail.weights = epoch, weights()
    elif count > 1:
        pairs = zip(tail.weights, weights(), strict=True)
        tail.best_epoch = epoch
        tail.weights = [old + (new - old) / np.float32(count) for old, new in pairs]


def images_per_second(tail: TrainedTail, images: int) -> float:
    """Computes the training throughput in the median epoch.

    Args:
        tail: The trained tail.
        images: Number of training images.
    """
    return images / statistics.median(row["seconds"] for row in tail.history)


def predict_rows(
    function: Callable[[Any], Any], rows: Features | ComputedRows | np.ndarray
) -> np.ndarray:
    """Applies a function to rows in batches.

    Args:
        function: Computes outputs `[n, K]`, such as probabilities or features, of n
            rows; see `inference_function`.
        rows: `[N, ...]` activations.

    Returns:
        float32 `[N, K]` outputs.

    Raises:
        DivergenceError: If an output is not finite.
    """
    starts = range(0, len(rows), _PREDICTION_BATCH)
    parts = (rows[start : start + _PREDICTION_BATCH] for start in starts)
    values = np.concatenate([function(tf.constant(part)).numpy() for part in parts])
    if not np.isfinite(values).all():
        raise DivergenceError(f"The model's outputs are not finite. {_FIX}")
    return values


def inference_function(
    model: keras.Model, multi_label: bool | None = None
) -> Callable[[Any], Any]:
    """Compiles a model in inference mode as a function of rows.

    It uses the model's current weights whenever it is called.

    Args:
        model: Model from rows to any outputs; to logits if `multi_label` is given.
        multi_label: Whether logits are converted to probabilities by a sigmoid (True)
            or a softmax (False); None leaves outputs as they are.
    """
    activation = {
        None: keras.activations.linear,
        False: keras.activations.softmax,
        True: keras.activations.sigmoid,
    }[multi_label]

    @tf.function(reduce_retracing=True, autograph=False)
    def function(rows: tf.Tensor) -> tf.Tensor:
        return activation(model(tf.cast(rows, tf.float32), training=False))

    return function


class _Learner:
    """A compiled training copy, including all state that a training step changes."""

    def __init__(
        self, recipe: TailRecipe, precision: str, steps: int, train: LabelledFeatures
    ):
        config = recipe.config
        self.precision = precision
        self.seconds_a_step = math.inf
        self._copy = recipe.make_copy(precision)
        self._model = self._copy.model
        optimizer = LayerwiseAdamW(
            warmup_cosine(config.learning_rate, steps * config.epochs, config.warmup),
            recipe.lr_multipliers,
            weight_decay=config.weight_decay,
        )
        # Biases and scales are exempt from weight decay (He et al. 2019, section 3.1).
        flat = [
            variable
            for variable in self._model.trainable_variables
            if len(variable.shape) < 2 or variable.name == "bias"
        ]
        optimizer.exclude_from_weight_decay(var_list=flat)
        if precision == "f16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        optimizer.build(self._model.trainable_variables)
        self._optimizer = optimizer
        loss = keras_loss(train.multi_label, train.weighting.logit_offset)
        accuracy = keras.metrics.MeanMetricWrapper(_is_right, "accuracy")
        metrics = [] if train.multi_label else [accuracy]
        self._model.compile(optimizer, loss, metrics=metrics, jit_compile=False)
        self._predict = inference_function(self._model, train.multi_label)
        rows = train.views[0]
        self._signature = (
            tf.TensorSpec((None, *self._model.input_shape[1:]), rows.dtype),
            tf.TensorSpec((None, 2 * train.num_classes), tf.float32),
        )

    def rate(self) -> float:
        return float(keras.ops.convert_to_numpy(self._optimizer.learning_rate))

    def measure(self, batch: tuple[np.ndarray, np.ndarray], steps: int) -> float:
        """Times steps on one batch and undoes them; returns the first step's loss."""
        watch, start = _Watch(), self.state()
        self._fit(iter([batch] * (1 + steps)), 1 + steps, watch)
        self.seconds_a_step = min(np.diff(watch.times), default=math.inf)
        self.set_state(start)
        return watch.first_loss

    def train(
        self,
        batches: Iterator[tuple[np.ndarray, np.ndarray]],
        steps: int,
        on_batch: Callable[[], object],
    ) -> dict[str, float]:
        """Trains for one epoch; returns its mean loss and accuracy."""
        watch = _Watch(on_batch)
        figures = self._fit(batches, steps, watch)
        if not math.isfinite(figures["loss"]):
            raise DivergenceError(
                f"The loss is {figures['loss']} after {len(watch.times)} batches. "
                f"{_FIX}"
            )
        if not all(np.isfinite(value).all() for value in self.weights()):
            raise DivergenceError(f"Weights are not finite. {_FIX}")
        return figures

    def predict(self, rows: Features | np.ndarray) -> np.ndarray:
        return predict_rows(self._predict, rows)

    def weights(self) -> list[np.ndarray]:
        return [variable.numpy() for variable in self._copy.changed]

    def state(self) -> list[np.ndarray]:
        return [variable.numpy() for variable in self._variables()]

    def set_state(self, state: Sequence[np.ndarray]) -> None:
        for variable, value in zip(self._variables(), state, strict=True):
            variable.assign(value)

    def _variables(self) -> list[keras.Variable]:
        return [*self._model.variables, *self._optimizer.variables]

    def _fit(
        self,
        batches: Iterator[tuple[np.ndarray, np.ndarray]],
        steps: int,
        watch: "_Watch",
    ) -> dict[str, float]:
        dataset = tf.data.Dataset.from_generator(
            lambda: batches, output_signature=self._signature
        )
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(steps))
        options = tf.data.Options()
        # There is nothing to tune, and the tuning thread can delay the end of an epoch.
        options.autotune.enabled = False
        dataset = dataset.prefetch(2).with_options(options)
        log = self._model.fit(dataset, shuffle=False, callbacks=[watch], verbose=0)
        values = log.history
        return {x: values[x][0] for x in ("loss", "accuracy") if x in values}


def _is_right(targets_and_weights: Any, logits: Any) -> Any:
    """Returns float `[N]`: 1 where the most likely class is the target."""
    targets, _ = keras.ops.split(targets_and_weights, 2, axis=-1)
    is_right = keras.ops.argmax(targets, axis=-1) == keras.ops.argmax(logits, axis=-1)
    return keras.ops.cast(is_right, "float32")


class _Watch(keras.callbacks.Callback):
    """Records when each batch ends; stops training if a loss is not finite."""

    def __init__(self, on_batch: Callable[[], object] = lambda: None):
        super().__init__()
        self.times: list[float] = []
        self.first_loss = math.nan
        self._on_batch = on_batch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        loss = float(logs["loss"])
        if not self.times:
            self.first_loss = loss
        self.times.append(time.perf_counter())
        self._on_batch()
        if not math.isfinite(loss):
            self.model.stop_training = True


class Measurable(Protocol):
    """Something that trains in one precision and can be timed.

    Attributes:
        precision: `f32`, `bf16` or `f16`.
        seconds_a_step: Measured seconds per step.
    """

    precision: str
    seconds_a_step: float

    def measure(self, batch: tuple[np.ndarray, np.ndarray], steps: int) -> float:
        """Times steps on one batch, undoes them, and returns the loss of the first."""


_Measured = TypeVar("_Measured", bound=Measurable)


def fastest(
    make_learner: Callable[[str], _Measured],
    precisions: Sequence[str],
    batch: tuple[np.ndarray, np.ndarray],
    steps: int,
    listener: Listener,
) -> _Measured:
    """Times steps in each precision and chooses the fastest that trains equally well.

    Once all steps together would take only a moment, no further precision is tried.

    Args:
        make_learner: Creates a learner for a precision.
        precisions: Candidates; the first is the reference.
        batch: The batch to measure on.
        steps: Total number of training steps.
        listener: Receives a note on each alternative.
    """
    chosen, first_loss = None, math.nan
    for precision in precisions:
        if chosen and chosen.seconds_a_step * steps < _A_MOMENT:
            break
        learner = make_learner(precision)
        loss = learner.measure(batch, _MEASURED_STEPS)
        if chosen is None:
            chosen, first_loss = learner, loss
            continue
        speed = chosen.seconds_a_step / learner.seconds_a_step
        same = abs(loss - first_loss) <= _SAME_LOSS * abs(first_loss)
        listener.note(
            f"precision {learner.precision}: {speed:.2f} times as fast as "
            f"{chosen.precision}, first loss {loss:.4f} instead of {first_loss:.4f}"
        )
        if speed >= _WORTH_IT and same:
            chosen = learner
    assert chosen is not None
    return chosen


def _save(path: Path, tail: TrainedTail, state: Sequence[np.ndarray]) -> None:
    text = json.dumps(
        {
            "history": tail.history,
            "best_epoch": tail.best_epoch,
            "precision": tail.precision,
        }
    )
    arrays = {"text": np.array(text)}
    arrays |= {f"state_{i}": value for i, value in enumerate(state)}
    arrays |= {f"kept_{i}": value for i, value in enumerate(tail.weights)}
    with replacing(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def _load(path: Path) -> tuple[TrainedTail, list[np.ndarray]]:
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            text = json.loads(str(file["text"]))
            kept, state = (
                [
                    file[f"{kind}_{i}"]
                    for i in range(sum(k.startswith(kind) for k in file))
                ]
                for kind in ("kept", "state")
            )
    except Exception as error:  # zip, NumPy and JSON each raise their own types
        raise UsageError(
            f"{path} is damaged ({type(error).__name__}). Start over with resume=False."
        ) from None
    return TrainedTail(weights=kept, **text), state
