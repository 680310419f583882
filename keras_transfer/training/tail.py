"""Rows at the split point -> a trained tail.

Keras's `fit` trains, an epoch a call. After each epoch everything that the next one
depends on is written to a checkpoint, so that a process killed at any moment can be
continued, and ends with the same bits as if it had not been killed.
"""

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_transfer.config import FinetuneConfig
from keras_transfer.errors import DivergenceError, UsageError
from keras_transfer.evaluation.metrics import evaluate, score
from keras_transfer.events import duration
from keras_transfer.features.activations import Transform
from keras_transfer.features.cache import Features
from keras_transfer.models.layer_groups import TrainingCopy
from keras_transfer.runs.files import replacing
from keras_transfer.training.head import LabelledFeatures
from keras_transfer.training.optim import LayerwiseAdamW, LrMultipliers, warmup_cosine

_STATE = "state.npz"
_MEASURED_STEPS = 4  # after one that traces
_A_MOMENT = 10.0  # seconds of training, in which measuring would not pay
_WORTH_IT = 1.05  # how much faster less precise arithmetic has to be
_SAME_LOSS = 0.05  # and how near its first loss to that of float32, in relation to it
_PREDICTION_BATCH = 64
_FIX = (
    "Training diverged; the run is as it was. Use a lower learning rate (--lr, "
    "--base-lr), or --precision f32."
)


@dataclass
class TrainedTail:
    """A tail after its best epoch.

    Attributes:
        weights: Of `unfreeze.changed_variables`, in order.
        history: A dict an epoch: epoch (from 1), loss (mean weighted cross-entropy in
            nats), val_loss (the same), val_metric, learning_rate (at the end), seconds.
        best_epoch: The epoch, from 1, that the weights are of.
        precision: `f32`, `bf16` or `f16`.
    """

    weights: list[np.ndarray] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    precision: str = ""


def train_tail(
    config: FinetuneConfig,
    make_copy: Callable[[str], TrainingCopy],
    lr_multipliers: LrMultipliers,
    train: LabelledFeatures,
    val: LabelledFeatures,
    class_names: Sequence[str],
    seed: int,
    checkpoint: Path,
    transform: Transform | None = None,
    precisions: Sequence[str] = ("f32",),
    on_note: Callable[[str], object] = lambda _: None,
    on_batch: Callable[[int], object] = lambda _: None,
) -> TrainedTail:
    """Trains until validation gets no better, and returns the best epoch's weights.

    Args:
        config: Rates, epochs, batch size.
        make_copy: From a precision to a copy of the tail to train.
        lr_multipliers: Of the learning rate, by the path of a variable.
        train: Rows to learn from; each epoch takes one view of every image.
        val: Rows that tell the best epoch; of no image, the last epoch is taken.
        class_names: In the order of the outputs.
        seed: Of the order of images and the choice of views.
        checkpoint: A folder. If it holds the state of an earlier process, training
            goes on from there.
        transform: What is done to training rows in every epoch.
        precisions: What to choose from by measuring some steps, float32 first; with
            one there is nothing to measure.
        on_note: Told what was decided.
        on_batch: Called once a batch, with how many are done, those of an earlier
            process included.

    Raises:
        DivergenceError: If a loss is not finite.
    """
    steps = math.ceil(len(train.targets) / config.batch_size)

    def batches(epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return _batches(train, config.batch_size, seed, epoch, transform)

    tail, kept = TrainedTail(), None
    if has_state(checkpoint):
        tail, kept = _load(checkpoint / _STATE)
        precisions = [tail.precision]
    for _ in range(2):  # the first is slower
        started = time.perf_counter()
        batch = next(batches(0))
        batch_seconds = time.perf_counter() - started
    learner = _fastest(
        lambda name: _Learner(make_copy, lr_multipliers, name, config, steps, train),
        precisions,
        batch,
        steps * config.epochs,
        on_note,
    )
    tail.precision = learner.precision
    if kept is not None:
        learner.set_state(kept)
    seconds = (learner.seconds_a_step + batch_seconds) * steps
    on_note(
        f"an epoch of {len(train.targets):,} images takes about {duration(seconds)}, "
        f"{config.epochs} epochs {duration(seconds * config.epochs)}"
    )

    done = itertools.count(len(tail.history) * steps + 1)
    while (
        len(tail.history) < config.epochs
        and len(tail.history) - tail.best_epoch < config.patience
    ):
        epoch = len(tail.history)
        started = time.perf_counter()
        loss = learner.train(batches(epoch), steps, lambda: on_batch(next(done)))
        trained = time.perf_counter()
        row = {"epoch": epoch + 1, "loss": loss, "val_loss": math.nan}
        if len(val):
            probabilities = learner.predict(val.views[0])
            evaluation = evaluate(val.targets, probabilities, class_names)
            row |= {
                "val_loss": _mean_loss(val, probabilities),
                "val_metric": score(evaluation)[0],
            }
        row |= {"learning_rate": learner.rate(), "seconds": trained - started}
        tail.history.append(row)
        if not epoch or _score(row) > _score(tail.history[tail.best_epoch - 1]):
            tail.best_epoch, tail.weights = epoch + 1, learner.weights()
        _save(checkpoint / _STATE, tail, learner.state())
    return tail


def measure_training(
    config: FinetuneConfig,
    make_copy: Callable[[str], TrainingCopy],
    lr_multipliers: LrMultipliers,
    batch: LabelledFeatures,
) -> float:
    """Seconds that a training step on a batch takes, in float32; nothing is kept.

    Args:
        config: Rates.
        make_copy: From a precision to a copy of the tail to train.
        lr_multipliers: Of the learning rate, by the path of a variable.
        batch: Rows and their targets.
    """
    learner = _Learner(make_copy, lr_multipliers, "f32", config, 1, batch)
    learner.measure(next(_batches(batch, len(batch), 0, 0, None)), _MEASURED_STEPS)
    return learner.seconds_a_step


def has_state(checkpoint: Path) -> bool:
    """Whether a checkpoint holds a finished epoch."""
    return (checkpoint / _STATE).exists()


def _score(row: dict[str, float]) -> tuple[float, float]:
    """Larger is better; without validation images, later is better."""
    return row.get("val_metric", row["epoch"]), -row["val_loss"]


def images_per_second(tail: TrainedTail, images: int) -> float:
    """Of training, the median epoch."""
    return images / statistics.median(row["seconds"] for row in tail.history)


def predict_rows(
    function: Callable[[Any], Any], rows: Features | np.ndarray
) -> np.ndarray:
    """float32 `[N, num_classes]` of rows `[N, ...]`, in batches.

    Raises:
        DivergenceError: If a probability is not finite.
    """
    starts = range(0, len(rows), _PREDICTION_BATCH)
    parts = (rows[start : start + _PREDICTION_BATCH] for start in starts)
    values = np.concatenate([function(tf.constant(part)).numpy() for part in parts])
    if not np.isfinite(values).all():
        raise DivergenceError(f"The model's probabilities are not finite. {_FIX}")
    return values


def probability_function(model: keras.Model, multi_label: bool | None = None):
    """A compiled function of rows, in inference mode.

    Args:
        model: From rows to probabilities; or to logits, if `multi_label` is given.
        multi_label: Which probabilities logits stand for.
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
    """A compiled training copy with everything that a step changes."""

    def __init__(
        self,
        make_copy: Callable[[str], TrainingCopy],
        lr_multipliers: LrMultipliers,
        precision: str,
        config: FinetuneConfig,
        steps: int,
        train: LabelledFeatures,
    ):
        self.precision = precision
        self.seconds_a_step = math.inf
        self._copy = make_copy(precision)
        self._model = self._copy.model
        optimizer = LayerwiseAdamW(
            warmup_cosine(config.learning_rate, steps * config.epochs, config.warmup),
            lr_multipliers,
            weight_decay=config.weight_decay,
        )
        # Biases and scales are not decayed, as is usual (He et al. 2019, 3.1).
        flat = [v for v in self._model.trainable_variables if len(v.shape) < 2]
        optimizer.exclude_from_weight_decay(var_list=flat)
        if precision == "f16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        optimizer.build(self._model.trainable_variables)
        self._optimizer = optimizer
        self._model.compile(
            optimizer, _cross_entropy(train.multi_label), jit_compile=False
        )
        self._predict = probability_function(self._model, train.multi_label)
        rows = train.views[0]
        self._signature = (
            tf.TensorSpec((None, *self._model.input_shape[1:]), rows.dtype),
            tf.TensorSpec((None, 2 * train.num_classes), tf.float32),
        )

    def rate(self) -> float:
        return float(keras.ops.convert_to_numpy(self._optimizer.learning_rate))

    def measure(self, batch: tuple[np.ndarray, np.ndarray], steps: int) -> float:
        """Times steps on one batch, forgets them, and returns the first one's loss."""
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
    ) -> float:
        """One epoch; returns its mean loss."""
        watch = _Watch(on_batch)
        loss = self._fit(batches, steps, watch)
        if not math.isfinite(loss):
            raise DivergenceError(
                f"The loss is {loss} after {len(watch.times)} batches. {_FIX}"
            )
        if not all(np.isfinite(value).all() for value in self.weights()):
            raise DivergenceError(f"Weights are not finite. {_FIX}")
        return loss

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
    ) -> float:
        dataset = tf.data.Dataset.from_generator(
            lambda: batches, output_signature=self._signature
        )
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(steps))
        options = tf.data.Options()
        # There is nothing to tune, and the end of an epoch may wait for its thread.
        options.autotune.enabled = False
        dataset = dataset.prefetch(2).with_options(options)
        log = self._model.fit(dataset, shuffle=False, callbacks=[watch], verbose=0)
        return log.history["loss"][0]


class _Watch(keras.callbacks.Callback):
    """When each batch ended; stops at a loss that is not finite."""

    def __init__(self, on_batch: Callable[[], object] = lambda: None):
        super().__init__()
        self.times: list[float] = []
        self.first_loss = math.nan
        self._on_batch = on_batch

    def on_train_batch_end(self, batch, logs=None):
        loss = float(logs["loss"])
        if not self.times:
            self.first_loss = loss
        self.times.append(time.perf_counter())
        self._on_batch()
        if not math.isfinite(loss):
            self.model.stop_training = True


def _fastest(
    make_learner: Callable[[str], _Learner],
    precisions: Sequence[str],
    batch: tuple[np.ndarray, np.ndarray],
    steps: int,
    on_note: Callable[[str], object],
) -> _Learner:
    """Measures some steps with each; a later one is taken if it is worth it.

    Where all steps together take a moment only, the first is taken.
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
        on_note(
            f"precision {learner.precision}: {speed:.2f} times as fast as "
            f"{chosen.precision}, first loss {loss:.4f} instead of {first_loss:.4f}"
        )
        if speed >= _WORTH_IT and same:
            chosen = learner
    assert chosen is not None
    return chosen


def _cross_entropy(multi_label: bool) -> Callable[[Any, Any], Any]:
    """Weighted cross-entropy of logits; targets and weights side by side."""

    def loss(targets_and_weights, logits):
        targets, weights = keras.ops.split(targets_and_weights, 2, axis=-1)
        if multi_label:
            losses = keras.ops.softplus(logits) - targets * logits
        else:
            losses = -targets * keras.ops.log_softmax(logits)
        return keras.ops.sum(weights * losses, axis=-1)

    return loss


def _mean_loss(data: LabelledFeatures, probabilities: np.ndarray) -> float:
    """What training makes smaller, of probabilities."""
    targets, weights = data.labels(slice(None))
    clipped = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    losses = -targets * np.log(clipped)
    if data.multi_label:
        losses -= (1 - targets) * np.log(1 - clipped)
    return float((weights * losses).sum(1).mean())


def _batches(
    data: LabelledFeatures,
    batch_size: int,
    seed: int,
    epoch: int,
    transform: Transform | None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, targets and weights) of an epoch; the same for the same seed and epoch."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(data.targets))
    view_of = rng.integers(0, len(data.views), len(order))
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        views = view_of[picked]
        plain = data.views[0]
        rows = np.empty((len(picked), *plain.shape[1:]), plain.dtype)
        for number in np.unique(views):
            rows[views == number] = data.views[number][picked[views == number]]
        if transform:
            rows = transform(rows, picked, epoch)
        yield rows, np.concatenate(data.labels(picked), axis=1)


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
    arrays |= {f"best_{i}": value for i, value in enumerate(tail.weights)}
    with replacing(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def _load(path: Path) -> tuple[TrainedTail, list[np.ndarray]]:
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            text = json.loads(str(file["text"]))
            best, state = (
                [
                    file[f"{kind}_{i}"]
                    for i in range(sum(k.startswith(kind) for k in file))
                ]
                for kind in ("best", "state")
            )
    except Exception as error:  # zip, NumPy and JSON each raise their own types
        raise UsageError(
            f"{path} is damaged ({type(error).__name__}). Start over with --no-resume."
        ) from None
    return TrainedTail(weights=best, **text), state
