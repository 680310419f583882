"""Heat maps: which places of an image speak for a class.

A linear head on globally averaged features is as well a linear head on each place whose
logits are averaged: mean_p(A[p]) @ kernel + bias = mean_p(A[p] @ kernel + bias). The
map of the right side is exact. Source: Zhou et al. 2016, "Learning Deep Features for
Discriminative Localization" (class activation maps). If the head reads outputs of
several stages, their maps are added up, each averaged over the places of the last one.

Otherwise, a place counts by its activations times the gradient of the logit with
respect to them. Source: Draelos & Carin 2020, "Use HiResCAM instead of Grad-CAM"; after
global average pooling, both are the same. In a vision transformer, these are the tokens
that its last block reads: above it, the class token no longer depends on the patches.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_transfer.evaluation.prediction import prediction_engine
from keras_transfer.features.engine import Engine, predict
from keras_transfer.findings.borders import BORDER
from keras_transfer.models.classifier import HEAD, POOL, dense_layers, pooled_outputs
from keras_transfer.models.cut import pack, unpack

_BATCH = 32
_AVERAGES = (keras.layers.GlobalAveragePooling2D, keras.layers.GlobalAveragePooling1D)


@dataclass(frozen=True, eq=False)
class HeatMaps:
    """Heat maps of N images, of one class each.

    Attributes:
        evidence: float32 `[N, h, w]` what each place contributes to the class' logit.
            If `is_exact`, the mean over all places is the logit.
        maps: float32 `[N, h, w]` in the range 0 to 1: what speaks for the class, of
            which the most is 1; 0 everywhere if nothing does. For single-label data,
            that is evidence beyond the mean of all classes', to which the probabilities
            do not react.
        border_share: float64 `[N]` share of the heat on the outer 15% of each side,
            from 0 to 1; NaN for an image without heat. The border of a map is that of
            the image, although each place sees its surroundings too.
        expected_border_share: The share if heat was the same everywhere, 0.51.
        is_exact: Whether the maps are exact; else they are gradients.
    """

    evidence: np.ndarray
    maps: np.ndarray
    border_share: np.ndarray
    expected_border_share: float
    is_exact: bool

    @property
    def is_meaningful(self) -> bool:
        """Whether the base has several places; with a single one, maps say nothing."""
        return self.maps.shape[1] * self.maps.shape[2] > 1

    def __repr__(self) -> str:
        count, height, width = self.maps.shape
        kind = "exact" if self.is_exact else "by gradients"
        return f"HeatMaps({count} images, {height} x {width} places, {kind})"


def heat_maps(model: keras.Model, pixels: np.ndarray, classes: np.ndarray) -> HeatMaps:
    """Computes heat maps of a classifier.

    Args:
        model: A classifier built by `classifier.attach_head`.
        pixels: uint8 or float32 `[N, image_size, image_size, 3]` RGB pixels in
            [0, 255]. N is at least 1.
        classes: int64 `[N]` class to explain for each image.
    """
    layers = [_pooling(model, layer) for layer in _pooled_layers(model)]
    engine, shapes = _engine_of([model.input, *(one.places for one in layers)])
    pixels = np.rint(pixels).clip(0, 255).astype(np.uint8)
    widths = [tensor.shape[-1] for tensor in pooled_outputs(model)]
    head = _Head(model.get_layer(HEAD), widths)
    is_average = all(isinstance(one.pool, _AVERAGES) for one in layers)
    parts = []
    for start in range(0, len(pixels), _BATCH):
        some = slice(start, start + _BATCH)
        rows = tf.constant(predict(engine, pixels[some]), tf.float32)
        places = [rows] if len(shapes) == 1 else unpack(rows, shapes)
        if is_average and head.is_linear:
            logits = _same_size([head.part(*x) for x in enumerate(places)])
            own, mean = _two_logits(tf.add_n(logits) + head.bias, classes[some])
        else:
            pools = [one.pool for one in layers]
            own, mean = _by_gradients(pools, head, places, classes[some])
        heat = own - mean if head.is_single_label else own
        parts.append((own.numpy(), heat.numpy()))
    evidence, heat = (np.concatenate(part) for part in zip(*parts, strict=True))
    evidence, has_all = _as_square(evidence)
    heat = np.maximum(_as_square(heat)[0], 0)
    most = heat.max((1, 2), keepdims=True)
    maps = heat / np.where(most > 0, most, 1)
    uniform = np.ones((1, *maps.shape[1:]))
    return HeatMaps(
        evidence,
        maps.astype(np.float32),
        border_share(maps),
        float(border_share(uniform)[0]),
        is_average and head.is_linear and has_all,
    )


def border_share(maps: np.ndarray) -> np.ndarray:
    """Computes the share of heat on the border, to which cells count by their area.

    Args:
        maps: float `[N, h, w]`, not negative.

    Returns:
        float64 `[N]` from 0 to 1; NaN for a map that is 0 everywhere.
    """
    rows, columns = (_inner_part(size) for size in maps.shape[1:])
    inner = np.einsum("nhw,h,w->n", maps.astype(np.float64), rows, columns)
    total = maps.sum((1, 2), dtype=np.float64)
    share = 1 - inner / np.where(total > 0, total, np.nan)
    return share.clip(0, 1)


def _inner_part(size: int) -> np.ndarray:
    """Returns which part of each of `size` cells is not on the border, `[size]`."""
    edges = np.linspace(0, 1, size + 1).clip(BORDER, 1 - BORDER)
    return np.diff(edges) * size


class _Pooling(NamedTuple):
    """What a pooled output is made of: activations, and what makes features of them.

    Attributes:
        places: Activations `[N, H, W, D]` or `[N, T, D]` to explain by; the features
            `[N, D]` themselves if they are not explained.
        pool: Computes the features of the activations.
    """

    places: keras.KerasTensor
    pool: Callable[[Any], Any]


def _pooled_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Returns the layers whose outputs the head reads, in order."""
    layers = {id(layer.output): layer for layer in model.layers}
    return [layers[id(tensor)] for tensor in pooled_outputs(model)]


def _pooling(model: keras.Model, layer: keras.layers.Layer) -> _Pooling:
    """Finds what an output that the head reads is made of.

    Outputs of further bases, and class tokens of lower blocks, are not explained.
    """
    attention = [
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.MultiHeadAttention)
    ]
    is_own = layer.name == POOL
    if not attention and (is_own or isinstance(layer, _AVERAGES)):
        return _Pooling(layer.input, layer)
    if not is_own:
        return _Pooling(layer.output, keras.layers.Identity())
    normalized = keras.tree.flatten(attention[-1].input)[0]
    tokens = normalized._keras_history.operation.input
    return _Pooling(tokens, keras.Model(tokens, layer.output))


def _engine_of(
    tensors: Sequence[keras.KerasTensor],
) -> tuple[Engine, list[tuple[int, ...]]]:
    """Creates an engine from the first tensor to the others, joined to rows.

    Returns:
        (the engine, the shapes of the others).
    """
    start, *ends = tensors
    rows = ends[0] if len(ends) == 1 else pack(ends, "places")
    return prediction_engine(keras.Model(start, rows)), [x.shape[1:] for x in ends]


def _same_size(maps: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Averages maps `[n, H, W, K]` over the places of the last one with places."""
    *_, last = (x for x in maps if len(x.shape) > 2)
    return [
        tf.image.resize(x, last.shape[1:3], "area") if len(x.shape) == 4 else x
        for x in maps
        if len(x.shape) > 2
    ]


class _Head:
    """The head of a classifier up to its logits, for places as well as for images.

    Attributes:
        is_linear: Whether logits are linear in the features.
        is_single_label: Whether an image shows exactly one class.
        bias: float32 `[num_classes]`, the logits of features that are 0.
    """

    def __init__(self, model: keras.Model, widths: Sequence[int]):
        *hidden, last = dense_layers(model)
        self.is_linear = not hidden
        self.is_single_label = last.activation is keras.activations.softmax
        self._last = last
        below = keras.Model(model.input, last.input)
        self._below = below if last.input is not model.input else None
        zeros = tf.zeros((1, sum(widths)))
        self.bias = self.logits(zeros)[0]
        # The rows of a linear head's kernel are what single features contribute.
        self._kernels = []
        if self.is_linear:
            kernel = self.logits(tf.eye(sum(widths))) - self.bias
            self._kernels = tf.split(kernel, list(widths))

    def logits(self, features: tf.Tensor) -> tf.Tensor:
        """Computes float32 `[n, num_classes]` logits of `[n, D]` features."""
        if self._below is not None:
            features = self._below(features, training=False)
        kernel = tf.cast(self._last.kernel.value, tf.float32)
        bias = tf.cast(self._last.bias.value, tf.float32)
        return tf.cast(features, tf.float32) @ kernel + bias

    def part(self, index: int, places: tf.Tensor) -> tf.Tensor:
        """Returns what places `[n, ..., D]` of a pooled output add to linear logits."""
        return tf.tensordot(places, self._kernels[index], 1)


def _two_logits(logits: tf.Tensor, classes: np.ndarray) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns float32 `[n, ...]` logits of each image's class, and of all on average.

    Args:
        logits: float32 `[n, ..., num_classes]`.
        classes: int64 `[n]`.
    """
    own = tf.stack([one[..., k] for one, k in zip(logits, classes, strict=True)])
    return own, tf.reduce_mean(logits, -1)


def _by_gradients(
    pools: Sequence[Callable[[Any], Any]],
    head: _Head,
    places: Sequence[tf.Tensor],
    classes: np.ndarray,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns float32 `[n, ...]`: what places contribute to the same two logits."""
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(places)
        pooled = [pool(x) for pool, x in zip(pools, places, strict=True)]
        logits = _two_logits(head.logits(tf.concat(pooled, -1)), classes)

    def contributions(one: tf.Tensor) -> tf.Tensor:
        pairs = zip(tape.gradient(one, places), places, strict=True)
        maps = [
            tf.reduce_sum(gradient * x, -1, keepdims=True) * math.prod(x.shape[1:-1])
            for gradient, x in pairs
        ]
        return tf.add_n(_same_size(maps))[..., 0]

    own, mean = (contributions(one) for one in logits)
    return own, mean


def _as_square(values: np.ndarray) -> tuple[np.ndarray, bool]:
    """Arranges the places of `[N, T]` tokens in a square `[N, h, w]`.

    Tokens before those of the image, such as a class token, have no place.

    Returns:
        (values, whether all tokens have a place).
    """
    if values.ndim == 3:
        return values, True
    count, tokens = values.shape
    side = math.isqrt(tokens)
    kept = values[:, tokens - side**2 :]
    return kept.reshape(count, side, side), side**2 == tokens
