"""Cached features -> mlp heads: that of all images, and one for each fold.

Head 0 learns from all images, the head of fold k from all images but those of fold k.
All heads start from the same weights, and take the same minibatches and dropout masks,
from which the head of a fold leaves out the fold's images. So after an epoch all heads
have taken the same number of steps, and what the heads of the folds show out of fold is
what head 0 can be expected to do. A head knows nothing of its fold, not even the mean
of its features.

Each head learns on the first principal components of the images that it learns from,
found once for all L2 strengths, and scaled to unit overall variance. That takes a fifth
of the time of learning on all features, and was more accurate on held-out images: the
many weak components mostly served to fit the training images by heart.
Heads share the cores: matrix products of this size are faster on one core, next to
those of another head, than on several.
"""

import functools
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import threadpoolctl

from keras_transfer.config import HeadConfig
from keras_transfer.data.reading import map_ahead
from keras_transfer.training.candidates import Candidate, Candidates
from keras_transfer.training.labelled import LabelledFeatures, Scaling, scalings
from keras_transfer.training.losses import logit_losses, probabilities_of_logits

MIN_DELTA = 1e-3
"""Minimum improvement of the out-of-fold loss in nats, for early stopping."""

_BATCH = 256
_EPOCHS_WITHOUT_FOLDS = 30  # where nothing tells when to stop
# Of 300 images, 128 components were better on flowers and 256 on digits; of 2,000
# flowers 256 were better than 128, and of 3,500 better than 64, 128 and 512.
_COMPONENTS = 256
_OVERSAMPLING = 10  # more directions than that while searching for them
_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-7  # Adam, as in Keras
_ADAM_BLOCK = 2**14  # parameters whose gradient and moments fit into a core's cache

_THREADS = os.cpu_count() or 1
_ONE_BLAS_THREAD = functools.partial(
    threadpoolctl.threadpool_limits, 1, user_api="blas"
)

_Chunk = tuple[int, np.ndarray, np.ndarray]
"""(head, rows, features `[n, D]`); row v * N + i is image i in view v."""


def mlp_candidates(
    config: HeadConfig, data: LabelledFeatures, folds: np.ndarray | None, seed: int
) -> Candidates:
    """Prepares the training of mlp heads with Adam (Kingma & Ba 2015).

    The features are read four times, in chunks. About 2 kB per image, view and head
    are needed in memory, half of it until the end.

    Args:
        config: Options of the head.
        data: Features to train on. All views of a fold's images are left out together;
            out-of-fold predictions are of the first view.
        folds: int64 `[N]` fold of each image from 0, or -1 for images from which all
            heads learn; None trains one head on all images.
        seed: Seed of the initial weights, dropout and order of images.

    Returns:
        A function from an L2 strength to the candidates after 1, 2, 3, 4, 6, 8, 11, 16,
        23, 32, ... epochs, up to `config.epochs`. They end when the out-of-fold loss
        has not improved by `MIN_DELTA` for `config.patience` epochs. Without folds,
        there is one candidate, after a fixed number of epochs. The same arguments give
        the same bits.

    Raises:
        UsageError: If a fold leaves no images to learn from.
    """
    if folds is None:
        folds = np.full(len(data.targets), -1)
    with _ONE_BLAS_THREAD():
        examples = _examples(data, folds, seed)

    def candidates(l2: float) -> Iterator[Candidate]:
        heads = [_Head(config, data, each, l2, seed) for each in examples]
        best_loss, best_epoch, epoch = np.inf, 0, 0
        for checkpoint in _checkpoints(config.epochs, len(heads) > 1):
            candidate = _train(heads, data, epoch, checkpoint)
            yield candidate
            epoch = checkpoint
            if candidate.val_loss < best_loss - MIN_DELTA:
                best_loss, best_epoch = candidate.val_loss, epoch
            elif epoch - best_epoch >= config.patience:
                return

    return candidates


def _checkpoints(epochs: int, has_folds: bool) -> list[int]:
    """Returns the epochs after which to evaluate, each about sqrt(2) times the last."""
    if not has_folds:
        return [min(epochs, _EPOCHS_WITHOUT_FOLDS)]
    spaced = {round(2 ** (half / 2)) for half in range(2 * epochs.bit_length())}
    return sorted(epoch for epoch in spaced if epoch < epochs) + [epochs]


def _chunks(data: LabelledFeatures, heads: int) -> Iterator[_Chunk]:
    """Yields each chunk of features once per head."""
    count = len(data.targets)
    for number, view in enumerate(data.views):
        for start in range(0, count, data.chunk_rows):
            features = view[start : start + data.chunk_rows]
            rows = number * count + start + np.arange(len(features))
            for head in range(heads):
                yield head, rows, features


@dataclass(frozen=True)
class _Examples:
    """What one head learns from, and what it is judged by.

    Attributes:
        scaling: Scaling of the features.
        axes: float64 `[D, r]` principal axes of the scaled features, divided by the
            overall deviation of the components.
        components: float32 `[V * N, r]` scaled features times axes, of all images.
        learned: bool `[V * N]`, whether the head learns from a row of `components`.
        judged: Rows to predict at the checkpoints: for head 0, those that it learns
            from; for the head of a fold, its images in the first view.
    """

    scaling: Scaling
    axes: np.ndarray
    components: np.ndarray
    learned: np.ndarray
    judged: np.ndarray


def _examples(data: LabelledFeatures, folds: np.ndarray, seed: int) -> list[_Examples]:
    """Finds the principal components for head 0 and for the head of each fold."""
    each = scalings(data, folds)
    learned = [
        np.tile([fold != scaling.fold for fold in folds.tolist()], len(data.views))
        for scaling in each
    ]
    width = min(data.views[0].shape[1], _COMPONENTS + _OVERSAMPLING)
    axes = _leading_subspaces(data, each, learned, width, seed)
    projected = np.empty((len(axes), len(data), axes[0].shape[1]), np.float32)

    def project(chunk: _Chunk) -> tuple[int, np.ndarray, np.ndarray]:
        head, rows, features = chunk
        scaled = each[head].apply(features)
        return head, rows, scaled @ axes[head].astype(np.float32)

    for head, rows, part in map_ahead(project, _chunks(data, len(axes)), _THREADS):
        projected[head, rows] = part
    examples = []
    for head, scaling in enumerate(each):
        own = projected[head, learned[head]]
        rotation = np.linalg.eigh(own.T @ own)[1][:, ::-1][:, :_COMPONENTS]
        rotation /= max(float((own @ rotation).std()), 1e-12)
        judged = np.arange(len(data))
        if scaling.fold is not None:
            judged = np.flatnonzero(folds == scaling.fold)
        components = (projected[head] @ rotation).astype(np.float32)
        both = axes[head] @ rotation
        examples.append(_Examples(scaling, both, components, learned[head], judged))
    return examples


def _leading_subspaces(
    data: LabelledFeatures,
    each: list[Scaling],
    learned: list[np.ndarray],
    width: int,
    seed: int,
) -> list[np.ndarray]:
    """Finds where the scaled features of each head vary most.

    By the subspace iteration of Halko et al. (2011): multiplying random directions by
    the covariance matrix turns them towards its first eigenvectors. Two rounds suffice,
    as any subspace will do that holds nearly all of the variance.

    Returns:
        Orthonormal float64 `[D, width]` bases, one per head.
    """
    size = (data.views[0].shape[1], width)
    start = np.random.default_rng(seed).normal(size=size)
    axes = [start for _ in each]

    def multiply(chunk: _Chunk) -> tuple[int, np.ndarray]:
        head, rows, features = chunk
        scaled = each[head].apply(features[learned[head][rows]])
        return head, scaled.T @ (scaled @ axes[head].astype(np.float32))

    for _ in range(2):
        products = [np.zeros_like(start) for _ in each]
        # Sum in the order of the chunks, so that threading does not affect the result.
        chunks = _chunks(data, len(each))
        for head, product in map_ahead(multiply, chunks, _THREADS):
            products[head] += product
        axes = list(map_ahead(lambda one: np.linalg.qr(one)[0], products, _THREADS))
    return axes


class _Head:
    """The parameters of one mlp on principal components, and Adam's moments."""

    def __init__(
        self,
        config: HeadConfig,
        data: LabelledFeatures,
        examples: _Examples,
        l2: float,
        seed: int,
    ):
        self.l2 = l2
        self.examples = examples
        self._config = config
        self._data = data
        self._rng = np.random.default_rng(seed)
        self._steps = 0
        sizes = [examples.components.shape[1], *config.hidden, data.num_classes]
        self._parameters: list[np.ndarray] = []  # kernel, bias, kernel, bias, ...
        for inputs, units in zip(sizes, sizes[1:], strict=False):
            limit = math.sqrt(6 / (inputs + units))  # Glorot & Bengio 2010
            kernel = self._rng.uniform(-limit, limit, (inputs, units))
            self._parameters += [kernel.astype(np.float32), np.zeros(units, np.float32)]
        self._moments = [np.zeros((2, p.size), np.float32) for p in self._parameters]

    def train(self, epochs: int) -> None:
        """Takes one step of Adam per minibatch."""
        count = len(self.examples.learned)
        for _ in range(epochs):
            order = self._rng.permutation(count)
            # Nearly equal sizes: a small last batch would be as long a step as others.
            for batch in np.array_split(order, -(-count // _BATCH)):
                keep = self.examples.learned[batch]
                masks = self._dropout_masks(keep)
                if keep.any():
                    self._step(batch[keep], masks)

    def _dropout_masks(self, keep: np.ndarray) -> list[np.ndarray]:
        """Draws factors for each hidden layer, the same ones whatever rows are kept."""
        rate = self._config.dropout
        if not rate:
            return [np.ones((1, 1), np.float32) for _ in self._config.hidden]
        # 16 random bits per unit take a third of the time of a float.
        below = min(round(rate * 2**16), 2**16 - 1)
        draws = [
            self._rng.integers(2**16, size=(len(keep), units), dtype=np.uint16)
            for units in self._config.hidden
        ]
        # What is kept is scaled up, so that prediction needs no factor.
        scale = np.float32(2**16 / (2**16 - below))
        return [(draw[keep] >= below) * scale for draw in draws]

    def _step(self, rows: np.ndarray, masks: list[np.ndarray]) -> None:
        gradients = self._gradients(rows, masks)
        self._steps += 1
        rate = self._config.learning_rate * math.sqrt(1 - _BETA_2**self._steps)
        rate /= 1 - _BETA_1**self._steps
        for parameters, gradient, moments in zip(
            self._parameters, gradients, self._moments, strict=True
        ):
            _adam(parameters.reshape(-1), gradient.reshape(-1), moments, rate)

    def _gradients(self, rows: np.ndarray, masks: list[np.ndarray]) -> list[np.ndarray]:
        """Computes the gradients of the mean loss with the L2 term."""
        kernels, biases = self._parameters[::2], self._parameters[1::2]
        inputs = [self.examples.components[rows]]  # of each layer
        for kernel, bias, mask in zip(kernels, biases, masks, strict=False):
            hidden = inputs[-1] @ kernel
            hidden += bias
            np.maximum(hidden, 0, out=hidden)
            hidden *= mask
            inputs.append(hidden)
        logits = inputs[-1] @ kernels[-1] + biases[-1]
        _, back = _losses(logits, rows, self._data)
        back = (back / len(rows)).astype(np.float32)
        gradients: list[np.ndarray] = []
        for layer in reversed(range(len(kernels))):
            gradient = inputs[layer].T @ back
            gradient += np.float32(self.l2) * kernels[layer]
            gradients = [gradient, back.sum(0), *gradients]
            if layer:
                # A hidden unit is above 0 where neither ReLU nor dropout stopped it.
                back = back @ kernels[layer].T
                back *= inputs[layer] > 0
                back *= masks[layer - 1]
        return gradients

    def judge(self) -> tuple[np.ndarray, float]:
        """Computes `[n, C]` logits of the rows to judge by, and their total loss."""
        parts, loss = [], 0.0
        for start in range(0, len(self.examples.judged), self._data.chunk_rows):
            rows = self.examples.judged[start : start + self._data.chunk_rows]
            *hidden, kernel, bias = self._parameters
            x = self.examples.components[rows]
            for hidden_kernel, hidden_bias in zip(
                hidden[::2], hidden[1::2], strict=True
            ):
                x = np.maximum(x @ hidden_kernel + hidden_bias, 0)
            parts.append(x @ kernel + bias)
            losses, _ = _losses(parts[-1], rows, self._data)
            loss += float(losses.sum(dtype=np.float64))
        return np.concatenate(parts), loss

    def raw_weights(self) -> list[np.ndarray]:
        """Returns weights for raw features: the first layer takes over the scaling."""
        kernel, bias, *others = self._parameters
        scaling = self.examples.scaling
        raw = self.examples.axes @ kernel / scaling.scale[:, None]
        raw_bias = bias - scaling.mean @ raw
        return [
            raw.astype(np.float32),
            raw_bias.astype(np.float32),
            *(other.copy() for other in others),
        ]


def _adam(
    parameters: np.ndarray, gradient: np.ndarray, moments: np.ndarray, rate: float
) -> None:
    """Updates flat parameters and both moments in place; overwrites the gradient."""
    for start in range(0, len(parameters), _ADAM_BLOCK):
        block = slice(start, start + _ADAM_BLOCK)
        g, (first, second) = gradient[block], moments[:, block]
        first *= _BETA_1
        first += (1 - _BETA_1) * g
        np.square(g, out=g)
        g *= 1 - _BETA_2
        second *= _BETA_2
        second += g
        np.sqrt(second, out=g)
        g += _EPSILON
        np.divide(first, g, out=g)
        g *= rate
        parameters[block] -= g


def _train(
    heads: list[_Head], data: LabelledFeatures, done: int, epochs: int
) -> Candidate:
    """Trains on up to a number of epochs, several heads at a time, and evaluates."""

    def train(head: _Head) -> tuple[np.ndarray, float]:
        head.train(epochs - done)
        return head.judge()

    with _ONE_BLAS_THREAD(), ThreadPoolExecutor(_THREADS) as pool:
        (_, loss), *held_out = pool.map(train, heads)
    loss /= len(data)
    l2, weights = heads[0].l2, heads[0].raw_weights()
    if not held_out:
        return Candidate(l2, epochs, loss, math.nan, weights, None)
    judged = np.concatenate([head.examples.judged for head in heads[1:]])
    said = np.concatenate([logits for logits, _ in held_out])
    out_of_fold = probabilities_of_logits(said[np.argsort(judged)], data.multi_label)
    count = sum(len(logits) for logits, _ in held_out)
    val_loss = sum(fold_loss for _, fold_loss in held_out) / count
    return Candidate(l2, epochs, loss, val_loss, weights, out_of_fold)


def _losses(
    logits: np.ndarray, rows: np.ndarray, data: LabelledFeatures
) -> tuple[np.ndarray, np.ndarray]:
    """Computes losses and gradients of rows as `logit_losses`, with the offset."""
    logits = logits + data.weighting.logit_offset
    targets, weights = data.labels(rows % len(data.targets))
    return logit_losses(logits, targets, weights, data.multi_label)
