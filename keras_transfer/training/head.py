"""Cached features -> a trained head.

A linear head is a convex problem: L-BFGS on all features takes it to its optimum, with
no learning rate to choose, and gives the same bits every time. Its L2 strength is
chosen on the validation split along a path from strong to weak, each solution starting
the next (Friedman et al. 2010, glmnet). An mlp is trained with Adam by Keras's `fit`.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import keras
import numpy as np
import scipy.special
import tensorflow as tf
import threadpoolctl

from keras_transfer.config import HeadConfig
from keras_transfer.data.reading import map_ahead
from keras_transfer.data.tables import count_classes, one_hot
from keras_transfer.features.cache import Features
from keras_transfer.models.classifier import build_head, dense_layers

LINEAR_L2 = tuple(10.0**exponent for exponent in np.arange(1, -5.5, -0.5).tolist())
"""Strengths tried for a linear head, on features scaled to unit variance overall."""

MLP_L2 = (1e-3, 1e-4, 1e-5)

_PATIENCE = 3  # weaker strengths tried after the best so far
_CHUNK = 4096  # rows of features in memory at once, where they do not all fit
_IN_MEMORY_BYTES = 2**30
_MLP_BATCH = 256
_MIN_DELTA = 1e-3  # nats of validation loss that count as better
_EPSILON = 1e-7


@dataclass
class TrainedHead:
    """A head and how it came about.

    Attributes:
        model: From float32 `[N, D]` features to float32 `[N, num_classes]`
            probabilities.
        l2: The strength that was chosen.
        history: A dict a row of `history.csv`: l2, epoch, loss and val_loss (mean
            cross-entropies without the L2 term, in nats; NaN without validation).
    """

    model: keras.Model
    l2: float
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class LabelledFeatures:
    """Features of the images of one split, in one or more views.

    Attributes:
        views: Each `[N, D]`, the plain images first.
        targets: As in `data.Table`.
        num_classes: Number of classes.
        class_weights: float32 `[2, num_classes]`: what an absent and a present class
            count in the loss.
    """

    views: Sequence[Features | np.ndarray]
    targets: np.ndarray
    num_classes: int
    class_weights: np.ndarray

    def __len__(self) -> int:
        return len(self.views) * len(self.targets)

    @property
    def multi_label(self) -> bool:
        """Whether an image may show several classes, or none."""
        return self.targets.ndim == 2

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(features, targets, loss weights), each float32 with a row an image."""
        for view in self.views:
            for start in range(0, len(self.targets), _CHUNK):
                rows = slice(start, start + _CHUNK)
                yield (view[rows], *self.labels(rows))

    def labels(self, rows: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float32 (targets, loss weights), both `[n, num_classes]`."""
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
) -> LabelledFeatures:
    """Brings features and targets together; small ones are read into memory."""
    fits = sum(view.nbytes for view in views) <= _IN_MEMORY_BYTES
    arrays = [view[:] if fits else view for view in views]
    return LabelledFeatures(arrays, targets, num_classes, class_weights)


def class_weights(targets: np.ndarray, num_classes: int, balanced: bool) -> np.ndarray:
    """float32 `[2, num_classes]` weights of an absent and of a present class.

    Balanced: every class has the same total weight, and the mean weight is 1 (King &
    Zeng 2001, as in scikit-learn). Of multi-label data that holds for presence and
    absence of each class. A class that no image shows has the weight 0, and does not
    count among the classes.
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
    on_strength: Callable[[], object] = lambda: None,
) -> TrainedHead:
    """Trains a head to convergence with the L2 strength that suits validation best.

    Without validation images the middle of the grid is taken.

    Args:
        config: Kind, sizes, and the most epochs.
        train: What is learned from.
        val: What chooses the strength, and stops an mlp.
        seed: Of an mlp's first weights and its order of images.
        on_strength: Called once an L2 strength, as work goes on.
    """
    grid = config.l2 or (LINEAR_L2 if config.kind == "linear" else MLP_L2)
    if not len(val):
        grid = (sorted(grid)[len(grid) // 2],)
    train_one = (_linear_trainer if config.kind == "linear" else _mlp_trainer)(
        config, train, val, seed
    )
    best_weights: list[np.ndarray] = []
    best_l2, best_loss, since_best = 0.0, math.inf, 0
    history: list[dict[str, float]] = []
    for l2 in sorted(grid, reverse=True):
        weights, rows = train_one(l2)
        history += [{"l2": l2, **row} for row in rows]
        on_strength()
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


def predict_head(head: keras.Model, features: Features | np.ndarray) -> np.ndarray:
    """float32 `[N, num_classes]` probabilities of `[N, D]` features."""
    parts = [np.zeros((0, head.output_shape[-1]), np.float32)]
    for start in range(0, len(features), _CHUNK):
        parts.append(np.asarray(head(features[start : start + _CHUNK], training=False)))
    return np.concatenate(parts)


_TrainOne = Callable[[float], tuple[list[np.ndarray], list[dict[str, float]]]]
"""From an L2 strength to the head's weights and the rows of the history."""


def _new_head(config: HeadConfig, train: LabelledFeatures, seed: int) -> keras.Model:
    num_features = train.views[0].shape[1]
    return build_head(config, num_features, train.num_classes, train.multi_label, seed)


def _linear_trainer(
    config: HeadConfig, train: LabelledFeatures, val: LabelledFeatures, seed: int
) -> _TrainOne:
    """Solves for one strength, starting at the solution of the last."""
    del seed  # nothing is random
    mean, scale = _mean_and_scale(train)
    shape = (len(mean), train.num_classes)
    solution = np.zeros((shape[0] + 1, shape[1]))

    def raw(parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Kernel and bias on features as they are, from those on scaled features."""
        parameters = parameters.reshape(shape[0] + 1, shape[1])
        kernel = parameters[:-1] / scale
        return kernel.astype(np.float32), (parameters[-1] - mean @ kernel).astype(
            np.float32
        )

    def cross_entropy(
        parameters: np.ndarray, data: LabelledFeatures
    ) -> tuple[float, np.ndarray, np.ndarray]:
        """Mean loss, and its gradients by the raw kernel and bias."""
        kernel, bias = raw(parameters)

        def part(
            chunk: tuple[np.ndarray, np.ndarray, np.ndarray],
        ) -> tuple[float, np.ndarray, np.ndarray]:
            features, targets, weights = chunk
            logits = features @ kernel + bias
            if data.multi_label:
                # log(1 + exp(x)) - t x, and its derivative
                losses = np.logaddexp(0, logits) - targets * logits
                residual = weights * (scipy.special.expit(logits) - targets)
            else:
                log_probability = scipy.special.log_softmax(logits, axis=1)
                losses = -targets * log_probability
                residual = weights * (np.exp(log_probability) - targets)
            loss = float((weights * losses).sum(dtype=np.float64))
            return loss, features.T @ residual, residual.sum(0, dtype=np.float64)

        loss, gradient, gradient_bias = 0.0, np.zeros(shape), np.zeros(shape[1])
        # Summed in the order of the chunks, so that threads change no bit.
        for part_loss, part_gradient, part_bias in _in_threads(part, data.chunks()):
            loss += part_loss
            gradient += part_gradient
            gradient_bias += part_bias
        count = max(len(data), 1)
        return loss / count, gradient / count, gradient_bias / count

    def objective(flat: np.ndarray, l2: float) -> tuple[float, np.ndarray]:
        loss, gradient, gradient_bias = cross_entropy(flat, train)
        gradient = (gradient - np.outer(mean, gradient_bias)) / scale
        kernel = flat.reshape(-1, shape[1])[:-1]
        loss += l2 / 2 * float((kernel**2).sum())
        return loss, np.vstack([gradient + l2 * kernel, gradient_bias]).ravel()

    def train_one(l2: float) -> tuple[list[np.ndarray], list[dict[str, float]]]:
        nonlocal solution
        # On matrices this thin, BLAS threads wait for each other most of the time.
        with threadpoolctl.threadpool_limits(1, user_api="blas"):
            result = scipy.optimize.minimize(
                objective,
                solution.ravel(),
                args=(l2,),
                jac=True,
                method="L-BFGS-B",
                options={"maxiter": config.epochs, "gtol": 1e-5, "ftol": 1e-8},
            )
            solution = result.x
            loss, _, _ = cross_entropy(solution, train)
            val_loss = cross_entropy(solution, val)[0] if len(val) else math.nan
        row = {"epoch": result.nit, "loss": loss, "val_loss": val_loss}
        return list(raw(solution)), [row]

    return train_one


def _mlp_trainer(
    config: HeadConfig, train: LabelledFeatures, val: LabelledFeatures, seed: int
) -> _TrainOne:
    """Adam with early stopping; the epoch with the lowest validation loss is kept."""
    mean, scale = _mean_and_scale(train)

    def cross_entropy(targets_and_weights, probabilities):
        targets, weights = keras.ops.split(targets_and_weights, 2, axis=-1)
        clipped = keras.ops.clip(probabilities, _EPSILON, 1 - _EPSILON)
        log_likelihood = targets * keras.ops.log(clipped)
        if train.multi_label:
            log_likelihood += (1 - targets) * keras.ops.log(1 - clipped)
        return -keras.ops.sum(weights * log_likelihood, axis=-1)

    # One model for all strengths: to trace its training takes longer than to train it.
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
            min_delta=_MIN_DELTA,
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
        # The first layer takes over the scaling: the head is used on plain features.
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
    """Batches of scaled features for Keras's `fit`; a seed shuffles each epoch anew."""
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


def _in_threads(function: Callable, chunks: Iterable) -> Iterator:
    """`map` in order; a single chunk stays in this thread."""
    iterator = iter(chunks)
    first = list(itertools.islice(iterator, 2))
    if len(first) < 2:
        return map(function, first)
    items = itertools.chain(first, iterator)
    return map_ahead(function, items, threads=os.cpu_count() or 1)


def _mean_and_scale(data: LabelledFeatures) -> tuple[np.ndarray, float]:
    """float64 `[D]` mean of each feature, and one standard deviation for all.

    One for all, because to divide each feature by its own would blow up those that
    hardly vary, and with them the rounding differences between engines.
    """
    mean = sum(chunk.sum(0, dtype=np.float64) for chunk, _, _ in data.chunks())
    mean = np.asarray(mean) / len(data)
    square = sum(
        float(np.square(chunk - mean.astype(np.float32)).sum(dtype=np.float64))
        for chunk, _, _ in data.chunks()
    )
    return mean, max(math.sqrt(square / (len(data) * len(mean))), 1e-12)
