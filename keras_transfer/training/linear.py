"""The linear heads of a cross-validation, solved together.

Training a linear head is a convex problem. L-BFGS on all features finds its optimum
without a learning rate, and gives bit-identical results every time. The heads of a
K-fold cross-validation and the head of all images are K + 1 such problems on nearly the
same images. They are solved as one: each pass over the features serves all of them, in
one wide matrix product instead of many thin ones.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import scipy.optimize
import threadpoolctl

from keras_transfer.config import HeadConfig
from keras_transfer.data.reading import map_ahead
from keras_transfer.training.candidates import Candidate, Candidates
from keras_transfer.training.labelled import LabelledFeatures, Scaling, scalings
from keras_transfer.training.losses import logit_losses, probabilities_of_logits

MOST_DIRECTIONS = 2_560
"""With more features and images than this, features are not transformed: finding the
directions would take longer (4 s) than it saves."""

_Chunk = TypeVar("_Chunk")
_Part = TypeVar("_Part")

_MOST_GRAM_ROWS = 10_000  # enough to know how features are correlated
_LEAST_CURVATURE = 1e-7  # along directions in which images hardly vary


def linear_candidates(
    config: HeadConfig, data: LabelledFeatures, folds: np.ndarray | None
) -> Candidates:
    """Creates a solver of linear heads.

    Args:
        config: Options of the head.
        data: The N images to train on.
        folds: int64 `[N]` fold of each image from 0 to K - 1, or -1 for none; None for
            no cross-validation.

    Returns:
        A function that yields one candidate for an L2 strength.
    """
    # With such thin matrices, BLAS threads mostly wait for each other.
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        solver = _Solver(config, data, folds)

    def solve(l2: float) -> Iterator[Candidate]:
        with threadpoolctl.threadpool_limits(1, user_api="blas"):
            yield solver.solve(l2)

    return solve


@dataclass(frozen=True)
class _Coordinates:
    """Coordinates in which the features of all images are uncorrelated, if possible.

    A feature vector x has the coordinates ((x - mean) / scale) @ basis.

    Attributes:
        mean: float32 `[D]` mean of each feature.
        scale: float32 `[D]`, one standard deviation for each pooled output.
        basis: float32 `[D, R]` orthonormal directions. The training images vary in no
            other direction, so the optimal kernels have no other component. None for
            the features themselves, where finding directions would take too long.
        variances: float64 `[R]` variance of the images along each direction.
    """

    mean: np.ndarray
    scale: np.ndarray
    basis: np.ndarray | None
    variances: np.ndarray

    def raw(self, kernel: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, ...]:
        """Converts kernels `[R, H, C]` and biases to those for raw features."""
        raw = kernel if self.basis is None else np.tensordot(self.basis, kernel, 1)
        raw = raw / self.scale[:, None, None]
        return raw, bias - np.tensordot(self.mean, raw, 1)

    def gradient(self, raw: np.ndarray, of_bias: np.ndarray) -> np.ndarray:
        """Converts the gradient for raw kernels to `[R, H, C]`: the chain rule."""
        raw = raw - np.multiply.outer(self.mean, of_bias)
        raw = raw / self.scale[:, None, None]
        return raw if self.basis is None else np.tensordot(self.basis.T, raw, 1)

    def of(self, features: np.ndarray) -> np.ndarray:
        """Returns the float32 `[N, R]` coordinates of raw features."""
        scaled = (features - self.mean) / self.scale
        return scaled if self.basis is None else scaled @ self.basis


def _coordinates(data: LabelledFeatures, scaling: Scaling) -> _Coordinates:
    """Finds coordinates by an eigendecomposition of the smaller Gram matrix."""
    mean, scale = scaling.mean.astype(np.float32), scaling.scale.astype(np.float32)
    step = max(len(data) // _MOST_GRAM_ROWS, 1)
    rows = np.concatenate([chunk[::step] for _, chunk in data.chunks()])
    rows = ((rows - mean) / scale).astype(np.float64)
    if min(rows.shape) > MOST_DIRECTIONS:
        return _Coordinates(mean, scale, None, rows.var(0))
    if len(rows) < len(mean):
        values, vectors = np.linalg.eigh(rows @ rows.T)
        kept = values > 1e-9 * values[-1]
        values = values[kept]
        basis = rows.T @ (vectors[:, kept] / np.sqrt(values))
    else:
        values, basis = np.linalg.eigh(rows.T @ rows)
    variances = np.maximum(values, 0) / len(rows)
    return _Coordinates(mean, scale, basis.astype(np.float32), variances)


class _Penalty:
    """The squares of the heads' kernels, each in the head's own scaling.

    All heads share one scaling. That of a head's own images divides the features of a
    pooled output by a slightly different number, and its kernel is larger by as much.
    """

    def __init__(
        self,
        coordinates: _Coordinates,
        each: Sequence[Scaling],
        widths: tuple[int, ...],
    ):
        ends = np.cumsum(widths or (len(coordinates.mean),))
        ratios = np.stack([one.scale[ends - 1] for one in each], axis=1)
        ratios = (ratios / ratios[:, :1]) ** 2  # [pooled outputs, H]
        self._common = ratios[-1, :, None]
        self._others = []
        # The directions are orthonormal, so most of the sum needs no product.
        for start, end, ratio in zip([0, *ends], ends[:-1], ratios, strict=False):
            basis = coordinates.basis
            part = np.eye(len(coordinates.mean)) if basis is None else basis
            rows = part[start:end].astype(np.float64)
            self._others.append((rows, ratio[:, None] - self._common))

    def gradient(self, kernel: np.ndarray) -> np.ndarray:
        """Returns half the gradient for kernels `[R, H, C]`."""
        found = self._common * kernel
        for basis, more in self._others:
            inside = np.tensordot(basis, kernel, 1)
            found += np.tensordot(basis.T, more * inside, 1)
        return found


class _Solver:
    """Solves for one L2 strength at a time, starting from the previous solution.

    There are H = K + 1 heads: head 0 learns from all images, head k from those that are
    not in fold k - 1. Kernels are `[R, H, C]` in the `_Coordinates`, biases `[H, C]`.
    """

    def __init__(
        self, config: HeadConfig, data: LabelledFeatures, folds: np.ndarray | None
    ):
        self._iterations = config.epochs
        self._folds = np.full(len(data.targets), -1) if folds is None else folds
        of_fold = {one.fold: one for one in scalings(data, self._folds)}
        everything = of_fold[None]
        others = [of_fold.get(k, everything) for k in range(self._folds.max() + 1)]
        self._coordinates = _coordinates(data, everything)
        self._penalty = _Penalty(self._coordinates, [everything, *others], data.widths)
        # In memory, features are transformed once; else kernels are, on each pass.
        self._is_transformed = all(isinstance(x, np.ndarray) for x in data.views)
        if self._is_transformed:
            views = [self._coordinates.of(view[:]) for view in data.views]
            data = replace(data, views=views)
        self._data = data
        heads = int(self._folds.max(initial=-1)) + 2
        directions = len(self._coordinates.variances)
        self._kernel = np.zeros((directions, heads, data.num_classes))
        self._bias = np.zeros((heads, data.num_classes))
        # p (1 - p) of a typical probability, the factor of the features' covariance in
        # the loss's second derivative
        share = 0.5 if data.multi_label else 1 / data.num_classes
        self._curvature = share * (1 - share)
        each = (
            np.ones(len(self._folds))
            if data.sample_weight is None
            else data.sample_weight
        )
        in_fold = np.bincount(self._folds + 1, each, heads)
        self._held_out = float(in_fold[1:].sum())
        in_fold[0] = 0.0  # head 0 learns from all images
        self._totals = (each.sum() - in_fold) * len(data.views)  # weight by head

    def solve(self, l2: float) -> Candidate:
        # L-BFGS takes few steps where all second derivatives are about 1. That of the
        # loss along a direction is about `curvature * variance + l2`.
        variances = self._coordinates.variances
        stretch = 1 / np.sqrt(self._curvature * variances + l2 + _LEAST_CURVATURE)
        stretch_bias = 1 / math.sqrt(self._curvature)
        shape, size = self._kernel.shape, self._kernel.size

        def parameters(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            kernel = flat[:size].reshape(shape) * stretch[:, None, None]
            return kernel, flat[size:].reshape(shape[1:]) * stretch_bias

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            # The heads share no parameter, so the optimum of the sum is that of each.
            kernel, bias = parameters(flat)
            losses, gradient, of_bias = self._cross_entropies(kernel, bias)
            shrinking = l2 * self._penalty.gradient(kernel)
            loss = float(losses.sum()) + float((shrinking * kernel).sum()) / 2
            gradient = (gradient + shrinking) * stretch[:, None, None]
            return loss, np.concatenate(
                [gradient.ravel(), of_bias.ravel() * stretch_bias]
            )

        start = np.concatenate(
            [
                (self._kernel / stretch[:, None, None]).ravel(),
                self._bias.ravel() / stretch_bias,
            ]
        )
        result = scipy.optimize.minimize(
            objective,
            start,
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": self._iterations, "gtol": 1e-6, "ftol": 1e-6},
        )
        self._kernel, self._bias = parameters(result.x)
        return self._candidate(l2, result.nit)

    def _candidate(self, l2: float, iterations: int) -> Candidate:
        losses, _, _ = self._cross_entropies(self._kernel, self._bias)
        probabilities, val_loss = None, math.nan
        if self._kernel.shape[1] > 1:
            probabilities, val_loss = self._out_of_fold()
        raw = self._coordinates.raw(self._kernel[:, :1], self._bias[:1])
        kernel, bias = (x.astype(np.float32) for x in raw)
        weights = [np.ascontiguousarray(kernel[:, 0]), bias[0]]
        return Candidate(
            l2, iterations, float(losses[0]), val_loss, weights, probabilities
        )

    def _for_views(
        self, kernel: np.ndarray, bias: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns float32 kernels `[., H * C]` and biases for the data's views."""
        if not self._is_transformed:
            kernel, bias = self._coordinates.raw(kernel, bias)
        flat = kernel.reshape(len(kernel), bias.size)
        return flat.astype(np.float32), bias.astype(np.float32)

    def _cross_entropies(
        self, kernel: np.ndarray, bias: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Computes each head's mean loss `[H]` and the gradients."""
        data, (_, heads, classes) = self._data, kernel.shape
        flat, single_bias = self._for_views(kernel, bias)
        single_bias = single_bias + data.weighting.logit_offset
        shares = (1 / np.maximum(self._totals, 1e-12)).astype(np.float32)

        def part(
            chunk: tuple[slice, np.ndarray],
        ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            rows, features = chunk
            logits = (features @ flat).reshape(-1, heads, classes) + single_bias
            targets, weights = data.labels(rows)
            # A head does not learn from the images of its fold.
            inside = self._folds[rows, None] != np.arange(-1, heads - 1)
            inside[:, 0] = True
            losses, residual = logit_losses(
                logits,
                targets[:, None],
                weights[:, None] * (inside * shares)[..., None],
                data.multi_label,
            )
            return (
                losses.sum((0, 2), dtype=np.float64),
                features.T @ residual.reshape(len(residual), heads * classes),
                residual.sum(0, dtype=np.float64),
            )

        loss, gradient_bias = np.zeros(heads), np.zeros((heads, classes))
        gradient = np.zeros(flat.shape)
        # Sum in the order of the chunks, so that threading does not affect the result.
        for part_loss, part_gradient, part_bias in _in_threads(part, data.chunks()):
            loss += part_loss
            gradient += part_gradient
            gradient_bias += part_bias
        raw = gradient.reshape(-1, heads, classes)
        if not self._is_transformed:
            raw = self._coordinates.gradient(raw, gradient_bias)
        return loss, raw, gradient_bias

    def _out_of_fold(self) -> tuple[np.ndarray, float]:
        """Predicts plain images in a fold by the head that did not learn from them.

        Returns:
            (float32 `[n, C]` probabilities, their mean weighted loss).
        """
        data, (_, heads, classes) = self._data, self._kernel.shape
        kernel, bias = self._for_views(self._kernel, self._bias)
        rows = np.flatnonzero(self._folds >= 0)
        parts, total = [], 0.0
        for start in range(0, len(rows), data.chunk_rows):
            chunk = rows[start : start + data.chunk_rows]
            every = (data.views[0][chunk] @ kernel).reshape(-1, heads, classes)
            heads_of = self._folds[chunk] + 1
            logits = every[np.arange(len(chunk)), heads_of] + bias[heads_of]
            targets, weights = data.labels(chunk)
            losses, _ = logit_losses(
                logits + data.weighting.logit_offset, targets, weights, data.multi_label
            )
            total += float(losses.sum(dtype=np.float64))
            parts.append(probabilities_of_logits(logits, data.multi_label))
        return np.concatenate(parts), total / max(self._held_out, 1e-12)


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
