"""Cached features -> a trained head.

Training a linear head is a convex problem. L-BFGS on all features finds its optimum
without a learning rate, and gives bit-identical results every time. Its L2 strength is
chosen on the validation split along a path from strong to weak, where each solution is
the starting point of the next (Friedman et al. 2010, glmnet). An mlp is trained with
Adam by Keras's `fit`.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import keras
import numpy as np
import scipy.optimize
import tensorflow as tf
import threadpoolctl

from keras_transfer.config import HeadConfig
from keras_transfer.data.reading import map_ahead
from keras_transfer.data.tables import count_classes, one_hot
from keras_transfer.events import SILENT, Listener
from keras_transfer.features.cache import Features
from keras_transfer.models.classifier import build_head, dense_layers
from keras_transfer.training.losses import keras_loss, logit_losses

LINEAR_L2 = tuple(10.0**exponent for exponent in np.arange(1, -5.5, -0.5).tolist())
"""L2 strengths tried for a linear head, on features scaled to unit overall variance."""

MLP_L2 = (1e-3, 1e-4, 1e-5)
"""L2 strengths tried for an mlp, on features scaled in the same way."""

_Chunk = TypeVar("_Chunk")
_Part = TypeVar("_Part")

CHUNK_ROWS = 4096
"""Rows of features to process at once."""

IN_MEMORY_BYTES = 2**30
"""Features up to this size in bytes are read into memory."""

MIN_DELTA = 1e-3
"""Minimum improvement of the loss in nats, for early stopping of an MLP."""

_PATIENCE = 3  # weaker strengths to try after the best one
_MLP_BATCH = 256


@dataclass
class TrainedHead:
    """A trained head and its training history.

    Attributes:
        model: Model from float32 `[N, D]` features to float32 `[N, num_classes]`
            probabilities.
        l2: The L2 strength that was chosen.
        history: One dict per row of `history.csv`: l2, epoch, loss and val_loss. The
            losses are mean cross-entropies in nats without the L2 term; val_loss is NaN
            without validation images.
    """

    model: keras.Model
    l2: float
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class LabelledFeatures:
    """Features and targets of the images of one split, in one or more views.

    Attributes:
        views: Features `[N, D]` (or rows `[N, ...]`) of each view, plain images first.
        targets: Targets of the N images, as in `tables.Table`.
        num_classes: Number of classes.
        class_weights: float32 `[2, num_classes]` weights in the loss: of an absent and
            of a present class.
        chunk_rows: Number of rows per chunk.
    """

    views: Sequence[Features | np.ndarray]
    targets: np.ndarray
    num_classes: int
    class_weights: np.ndarray
    chunk_rows: int = CHUNK_ROWS

    def __len__(self) -> int:
        return len(self.views) * len(self.targets)

    @property
    def multi_label(self) -> bool:
        """Whether an image may show several classes, or none."""
        return self.targets.ndim == 2

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields (features, targets, loss weights), each with one row per image."""
        for view in self.views:
            for start in range(0, len(self.targets), self.chunk_rows):
                rows = slice(start, start + self.chunk_rows)
                yield (view[rows], *self.labels(rows))

    def labels(self, rows: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns float32 (targets, loss weights), both `[n, num_classes]`."""
        targets = one_hot(self.targets[rows], self.num_classes)
        absent, present = self.class_weights
        if self.multi_label:
            return targets, np.where(targets > 0, present, absent)
        weights = present[self.targets[rows]][:, None]
        return targets, np.broadcast_to(weights, targets.shape)


def label_features(
    views: Sequence[Features],
    targets: np.ndarray,
    num_classes: int,
    class_weights: np.ndarray,
    in_memory_bytes: int = IN_MEMORY_BYTES,
) -> LabelledFeatures:
    """Combines features and targets; small features are read into memory.

    The arguments are the attributes of `LabelledFeatures`; views of up to
    `in_memory_bytes` are read.
    """
    fits = sum(view.nbytes for view in views) <= in_memory_bytes
    arrays = [view[:] if fits else view for view in views]
    return LabelledFeatures(arrays, targets, num_classes, class_weights)


def class_weights(targets: np.ndarray, num_classes: int, balanced: bool) -> np.ndarray:
    """Computes weights in the loss of absent and of present classes.

    Balanced weights give each class the same total weight, with a mean weight of 1
    (King & Zeng 2001, as in scikit-learn). For multi-label data, this applies to the
    presence and absence of each class. A class that no image shows gets the weight 0
    and is not counted as a class.

    Args:
        targets: Targets of the training images, as in `tables.Table`.
        num_classes: Number of classes.
        balanced: Whether to balance the weights; otherwise all of them are 1.

    Returns:
        float32 `[2, num_classes]`: weights of an absent and of a present class.
    """
    if not balanced:
        return np.ones((2, num_classes), np.float32)
    counts = count_classes(targets, num_classes)
    if targets.ndim == 1:
        total = len(targets) / max(int(np.count_nonzero(counts)), 1)
        both = np.stack([counts, counts])
    else:
        total = len(targets) / 2
        both = np.stack([len(targets) - counts, counts])
    weights = total / np.maximum(both, 1)
    return np.where(both > 0, weights, 0).astype(np.float32)


def train_head(
    config: HeadConfig,
    train: LabelledFeatures,
    val: LabelledFeatures,
    seed: int,
    listener: Listener = SILENT,
) -> TrainedHead:
    """Trains a head to convergence with the L2 strength of lowest validation loss.

    Without validation images, only the middle of the grid is tried.

    Args:
        config: Options of the head.
        train: Features to train on.
        val: Features to choose the L2 strength with, and to stop an mlp; may be empty.
        seed: Seed of an mlp's initial weights, dropout and order of images.
        listener: Receives progress after each L2 strength, and its epochs.
    """
    grid = config.l2 or (LINEAR_L2 if config.kind == "linear" else MLP_L2)
    if not len(val):
        grid = (sorted(grid)[len(grid) // 2],)
    train_one: _TrainOne
    if config.kind == "linear":
        train_one = _LinearTrainer(config, train, val)
    else:
        train_one = _mlp_trainer(config, train, val, seed)
    best_weights: list[np.ndarray] = []
    best_l2, best_loss, since_best = 0.0, math.inf, 0
    history: list[dict[str, float]] = []
    for number, l2 in enumerate(sorted(grid, reverse=True), start=1):
        weights, rows = train_one(l2)
        history += [{"l2": l2, **row} for row in rows]
        for row in history[-len(rows) :]:
            listener.epoch("fit", int(row["epoch"]), row)
        listener.progress("head", number, len(grid))
        loss = min(row["val_loss"] if len(val) else row["loss"] for row in rows)
        if loss < best_loss:
            best_weights, best_l2, best_loss, since_best = weights, l2, loss, 0
        else:
            since_best += 1
        if since_best == _PATIENCE:
            break
    head = _new_head(config, train, seed)
    head.set_weights(best_weights)
    return TrainedHead(head, best_l2, history)


def predict_head(
    head: keras.Model, features: Features | np.ndarray, chunk_rows: int = CHUNK_ROWS
) -> np.ndarray:
    """Computes float32 `[N, num_classes]` probabilities from `[N, D]` features."""
    parts = [np.zeros((0, head.output_shape[-1]), np.float32)]
    for start in range(0, len(features), chunk_rows):
        chunk = features[start : start + chunk_rows]
        parts.append(np.asarray(head(chunk, training=False)))
    return np.concatenate(parts)


_TrainOne = Callable[[float], tuple[list[np.ndarray], list[dict[str, float]]]]
"""Takes an L2 strength; returns the head's weights and rows of the history."""


def _new_head(config: HeadConfig, train: LabelledFeatures, seed: int) -> keras.Model:
    num_features = train.views[0].shape[1]
    return build_head(config, num_features, train.num_classes, train.multi_label, seed)


class _LinearTrainer:
    """Solves for one L2 strength at a time, starting from the previous solution."""

    def __init__(
        self, config: HeadConfig, train: LabelledFeatures, val: LabelledFeatures
    ):
        self._epochs = config.epochs
        self._train = train
        self._val = val
        self._mean, self._scale = _mean_and_scale(train)
        self._shape = (len(self._mean), train.num_classes)
        self._solution = np.zeros((self._shape[0] + 1) * self._shape[1])

    def __call__(self, l2: float) -> tuple[list[np.ndarray], list[dict[str, float]]]:
        # With such thin matrices, BLAS threads mostly wait for each other.
        with threadpoolctl.threadpool_limits(1, user_api="blas"):
            result = scipy.optimize.minimize(
                self._objective,
                self._solution,
                args=(l2,),
                jac=True,
                method="L-BFGS-B",
                options={"maxiter": self._epochs, "gtol": 1e-5, "ftol": 1e-8},
            )
            self._solution = result.x
            loss, _, _ = self._cross_entropy(result.x, self._train)
            val_loss = math.nan
            if len(self._val):
                val_loss, _, _ = self._cross_entropy(result.x, self._val)
        row = {"epoch": result.nit, "loss": loss, "val_loss": val_loss}
        return list(self._raw(result.x)), [row]

    def _objective(self, flat: np.ndarray, l2: float) -> tuple[float, np.ndarray]:
        """Computes the loss with the L2 term and its gradient, on scaled features."""
        loss, gradient, gradient_bias = self._cross_entropy(flat, self._train)
        gradient = (gradient - np.outer(self._mean, gradient_bias)) / self._scale
        kernel = flat.reshape(-1, self._shape[1])[:-1]
        loss += l2 / 2 * float((kernel**2).sum())
        return loss, np.vstack([gradient + l2 * kernel, gradient_bias]).ravel()

    def _raw(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Converts parameters for scaled features to a kernel and bias for raw ones."""
        parameters = flat.reshape(-1, self._shape[1])
        kernel = parameters[:-1] / self._scale
        bias = parameters[-1] - self._mean @ kernel
        return kernel.astype(np.float32), bias.astype(np.float32)

    def _cross_entropy(
        self, flat: np.ndarray, data: LabelledFeatures
    ) -> tuple[float, np.ndarray, np.ndarray]:
        """Computes the mean loss and its gradients for the raw kernel and bias."""
        kernel, bias = self._raw(flat)

        def part(
            chunk: tuple[np.ndarray, np.ndarray, np.ndarray],
        ) -> tuple[float, np.ndarray, np.ndarray]:
            features, targets, weights = chunk
            losses, residual = logit_losses(
                features @ kernel + bias, targets, weights, data.multi_label
            )
            loss = float(losses.sum(dtype=np.float64))
            return loss, features.T @ residual, residual.sum(0, dtype=np.float64)

        loss, gradient = 0.0, np.zeros(self._shape)
        gradient_bias = np.zeros(self._shape[1])
        # Sum in the order of the chunks, so that threading does not affect the result.
        for part_loss, part_gradient, part_bias in _in_threads(part, data.chunks()):
            loss += part_loss
            gradient += part_gradient
            gradient_bias += part_bias
        count = max(len(data), 1)
        return loss / count, gradient / count, gradient_bias / count


def _mlp_trainer(
    config: HeadConfig, train: LabelledFeatures, val: LabelledFeatures, seed: int
) -> _TrainOne:
    """Creates a trainer that uses Adam with early stopping and keeps the best epoch."""
    mean, scale = _mean_and_scale(train)

    cross_entropy = keras_loss(train.multi_label, from_logits=False)
    # Use one model for all strengths, as tracing takes longer than training.
    strength = keras.Variable(0.0, trainable=False, name="l2")
    head = _new_head(config, train, seed)
    for layer in dense_layers(head):
        layer.kernel.regularizer = lambda kernel: (
            strength / 2 * keras.ops.sum(kernel**2)
        )
    adam = keras.optimizers.Adam(config.learning_rate)
    adam.build(head.trainable_variables)
    head.compile(adam, cross_entropy, metrics=[cross_entropy], jit_compile=False)
    start = [
        (variable, variable.numpy()) for variable in head.variables + adam.variables
    ]

    def train_one(l2: float) -> tuple[list[np.ndarray], list[dict[str, float]]]:
        strength.assign(l2)
        for variable, value in start:
            variable.assign(value)
        stop = keras.callbacks.EarlyStopping(
            "val_cross_entropy" if len(val) else "cross_entropy",
            mode="min",
            min_delta=MIN_DELTA,
            patience=config.patience,
            restore_best_weights=True,
        )
        log = head.fit(
            _batches(train, mean, scale, seed),
            validation_data=_batches(val, mean, scale, None) if len(val) else None,
            epochs=config.epochs,
            shuffle=False,
            callbacks=[stop],
            verbose=0,
        )
        # Fold the scaling into the first layer, since the head is used on raw features.
        kernel, bias, *others = head.get_weights()
        weights = [kernel / scale, bias - mean @ kernel / scale, *others]
        losses = log.history["cross_entropy"]
        val_losses = log.history.get("val_cross_entropy", [math.nan] * len(losses))
        return weights, [
            {"epoch": epoch + 1, "loss": loss, "val_loss": val_loss}
            for epoch, (loss, val_loss) in enumerate(
                zip(losses, val_losses, strict=True)
            )
        ]

    return train_one


def _batches(
    data: LabelledFeatures, mean: np.ndarray, scale: float, seed: int | None
) -> tf.data.Dataset:
    """Creates batches of scaled features for `fit`; a seed reshuffles every epoch."""
    rng = None if seed is None else np.random.default_rng(seed)
    single_mean, single_scale = mean.astype(np.float32), np.float32(scale)

    def epoch() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = np.arange(len(data)) if rng is None else rng.permutation(len(data))
        for start in range(0, len(order), _MLP_BATCH):
            picked = np.sort(order[start : start + _MLP_BATCH])
            view, rows = np.divmod(picked, len(data.targets))
            features = np.concatenate(
                [data.views[v][rows[view == v]] for v in np.unique(view)]
            )
            scaled = (features - single_mean) / single_scale
            yield scaled, np.concatenate(data.labels(rows), axis=1)

    signature = (
        tf.TensorSpec((None, len(mean)), tf.float32),
        tf.TensorSpec((None, 2 * data.num_classes), tf.float32),
    )
    dataset = tf.data.Dataset.from_generator(epoch, output_signature=signature)
    count = math.ceil(len(data) / _MLP_BATCH)
    return dataset.apply(tf.data.experimental.assert_cardinality(count))


def _in_threads(
    function: Callable[[_Chunk], _Part], chunks: Iterable[_Chunk]
) -> Iterator[_Part]:
    """Maps a function over chunks in order; a single chunk runs in this thread."""
    iterator = iter(chunks)
    first = list(itertools.islice(iterator, 2))
    if len(first) < 2:
        return map(function, first)
    items = itertools.chain(first, iterator)
    return map_ahead(function, items, threads=os.cpu_count() or 1)


def _mean_and_scale(data: LabelledFeatures) -> tuple[np.ndarray, float]:
    """Computes the float64 `[D]` mean of each feature and one overall deviation.

    There is one standard deviation for all features, because dividing each feature by
    its own would amplify those that hardly vary, and with them the rounding differences
    between engines.
    """
    mean = sum(chunk.sum(0, dtype=np.float64) for chunk, _, _ in data.chunks())
    mean = np.asarray(mean) / len(data)
    square = sum(
        float(np.square(chunk - mean.astype(np.float32)).sum(dtype=np.float64))
        for chunk, _, _ in data.chunks()
    )
    return mean, max(math.sqrt(square / (len(data) * len(mean))), 1e-12)
