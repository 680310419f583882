"""Which layers are trained, where the frozen part ends, and a copy to train them in.

A base's layers form groups, stem, stage_1, stage_2, ..., and the head is a group too.
What is unfrozen is a run of groups from the head down. Everything below the first
unfrozen layer can be computed once; `split_point` finds how far up that reaches.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_transfer.bases import Base
from keras_transfer.errors import UsageError
from keras_transfer.model import HEAD, POOL, get_layer

LayerGroups = dict[str, list[keras.layers.Layer]]
"""Group name to layers, from the input up; the last group is the head."""

_POLICIES = {"f32": "float32", "bf16": "mixed_bfloat16", "f16": "mixed_float16"}


def layer_groups(model: keras.Model, base: Base) -> LayerGroups:
    """All layers of a classifier by group: stem, stage_1, ..., head.

    A stage holds the layers that its last layer depends on and the stages below do
    not; every layer, and so every variable, is in exactly one group.

    Args:
        model: What `model.attach_head` returned.
        base: The row of its base.
    """
    groups: LayerGroups = {}
    taken: set[keras.layers.Layer] = set()
    for index, end in enumerate(base.stage_ends):
        layer = get_layer(model, end.removeprefix("before:"))
        tensor = layer.input if end.startswith("before:") else layer.output
        below = keras.Model(model.input, tensor).layers
        groups[f"stage_{index}"] = [x for x in below if x not in taken]
        taken.update(below)
    head = get_layer(model, HEAD)
    above = [x for x in model.layers if x not in taken and x is not head]
    groups[f"stage_{len(base.stage_ends)}"] = above
    return {"stem": groups.pop("stage_0"), **groups, HEAD: [head]}


def unfrozen_groups(model: keras.Model, base: Base, unfreeze: str) -> LayerGroups:
    """The layers to train, by group.

    Args:
        model: What `model.attach_head` returned.
        base: The row of its base.
        unfreeze: `top` (the last stage), `stages:N` (the last N), `all`, or
            `from:LAYER` (that layer and all that do not lie below it); the head is
            always trained.

    Raises:
        UsageError: If there are fewer stages, or there is no such layer.
    """
    groups = layer_groups(model, base)
    if unfreeze == f"from:{HEAD}":
        return {HEAD: groups[HEAD]}
    if unfreeze.startswith("from:"):
        layer = get_layer(model, unfreeze.removeprefix("from:"))
        frozen = {*keras.Model(model.input, layer.output).layers} - {layer}
        kept = {
            name: [layer for layer in layers if layer not in frozen]
            for name, layers in groups.items()
        }
        return {name: layers for name, layers in kept.items() if layers}
    if unfreeze == "all":
        return groups
    count = 1 if unfreeze == "top" else int(unfreeze.removeprefix("stages:"))
    names = list(groups)
    if count > len(names) - 2:
        raise UsageError(
            f"{base.name} has {len(names) - 2} stages above its stem. Received: "
            f"--unfreeze {unfreeze}. Use at most stages:{len(names) - 2}, or all."
        )
    return {name: groups[name] for name in names[-1 - count :]}


def split_point(model: keras.Model, unfrozen: Collection[keras.layers.Layer]) -> str:
    """The highest layer at which a model can be cut with all these layers above.

    A model can be cut above a layer if no layer above the cut reads what a layer
    below it wrote, other than that layer's output: in an order in which every layer
    comes after those it reads, nothing written before it is read after it.

    Returns:
        The layer's name; the input's, where nothing that has weights can be cut off.
    """
    operations = _operations_of_base(model)
    written = {id(tensor): i for i, op in enumerate(operations) for tensor in _out(op)}
    last_read = dict.fromkeys(range(len(operations)), 0)
    for index, operation in enumerate(operations):
        for tensor in _in(operation):
            last_read[written[id(tensor)]] = index
    first = min(
        (i for i, op in enumerate(operations) if op in unfrozen),
        default=len(operations),
    )
    best, reach = 0, 0
    for index in range(first):
        is_layer = isinstance(operations[index], keras.layers.Layer)
        if reach <= index and is_layer:
            best = index
        reach = max(reach, last_read[index])
    # With nothing but scaling below, pixels are smaller to keep than scaled ones.
    below = keras.Model(model.input, operations[best].output).layers
    is_worth_it = any(_can_change(layer) for layer in below if layer.weights)
    return operations[best if is_worth_it else 0].name


def _operations_of_base(model: keras.Model) -> list[keras.Operation]:
    """In an order in which each comes after those it reads."""
    return [operation for operation in model.operations if operation.name != HEAD]


def _in(operation: keras.Operation) -> Sequence[keras.KerasTensor]:
    is_input = isinstance(operation, keras.layers.InputLayer)
    return [] if is_input else keras.tree.flatten(operation.input)


def _out(operation: keras.Operation) -> Sequence[keras.KerasTensor]:
    return keras.tree.flatten(operation.output)


@dataclass(frozen=True)
class TrainingCopy:
    """A copy of a tail made to be trained fast.

    Attributes:
        model: From what the tail reads to float32 `[N, num_classes]` logits.
        changed: Its variables that training changes, in the order of
            `changed_variables`.
    """

    model: keras.Model
    changed: Sequence[keras.Variable]


def training_copy(
    tail: keras.Model,
    unfrozen: Collection[keras.layers.Layer],
    train_bn: bool,
    precision: str,
) -> TrainingCopy:
    """Copies a tail for training; the tail itself stays as it is.

    In the copy only the unfrozen layers are trainable. BatchNormalization is not
    (unless `train_bn`): with `trainable=False` on each such layer, and nothing less,
    Keras 3 leaves its statistics alone. Where it normalizes a convolution's output
    it is folded into the convolution. Random layers that are frozen are left out.
    The head gives logits, so that a confident mistake still has a gradient.

    Args:
        tail: The upper part that `model.cut` returned.
        unfrozen: The layers to train.
        train_bn: Whether BatchNormalization is trained, statistics and all.
        precision: `f32`, `bf16` or `f16`: of the base's layers, the weights and the
            head staying float32.
    """
    folded = {} if train_bn else _convolutions_to_fold(tail)
    absorbed = set(folded.values())
    twins: dict[int, keras.Variable] = {}
    copies: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []

    def copy_layer(layer: Any) -> Any:
        if not isinstance(layer, keras.layers.Layer):
            return layer  # an operation without weights
        trained, in_head = layer in unfrozen, layer.name == HEAD
        if isinstance(layer, keras.Model):
            return keras.models.clone_model(
                layer, clone_function=lambda inner: copy_leaf(inner, trained, in_head)
            )
        return copy_leaf(layer, trained, in_head)

    def copy_leaf(
        layer: keras.layers.Layer, trained: bool, in_head: bool
    ) -> keras.layers.Layer:
        stays_float32 = in_head or layer.name == POOL or not _can_change(layer)
        policy = "float32" if stays_float32 else _POLICIES[precision]
        if layer in absorbed or (not trained and _is_random(layer)):
            return _Through(name=layer.name, dtype=policy)
        if layer in folded:
            copy = FoldedConvolution(layer, folded[layer], policy)
        else:
            config = {**layer.get_config(), "dtype": policy}
            if in_head and config.get("activation") in ("softmax", "sigmoid"):
                config["activation"] = "linear"
            copy = layer.__class__.from_config(config)
        copy.trainable = trained and _can_change(layer, train_bn)
        copies.append((layer, copy))
        return copy

    model = keras.models.clone_model(tail, clone_function=copy_layer)
    for layer, copy in copies:
        for variable, twin in zip(layer.weights, copy.weights, strict=True):
            twin.assign(variable)
            twins[id(variable)] = twin
    changed = changed_variables(tail, unfrozen, train_bn)
    return TrainingCopy(model, [twins[id(variable)] for variable in changed])


def changed_variables(
    tail: keras.Model, unfrozen: Collection[keras.layers.Layer], train_bn: bool
) -> list[keras.Variable]:
    """The variables of a tail that training changes; see `training_copy`."""
    return [
        variable
        for layer in tail.layers
        if layer in unfrozen
        for leaf in _leaves(layer)
        if _can_change(leaf, train_bn)
        for variable in leaf.weights
    ]


def trained_layers(groups: LayerGroups, train_bn: bool) -> dict[str, list[str]]:
    """Group to the names of the layers in it that have weights to train."""
    return {
        group: [
            leaf.name
            for layer in members
            for leaf in _leaves(layer)
            if leaf.weights and _can_change(leaf, train_bn)
        ]
        for group, members in groups.items()
    }


def _leaves(layer: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """The layers in a layer that is a model itself, or else the layer."""
    if isinstance(layer, keras.Model):
        for inner in layer.layers:
            yield from _leaves(inner)
    else:
        yield layer


def _can_change(layer: keras.layers.Layer, train_bn: bool = True) -> bool:
    """Whether training can change a layer's weights, if it has any."""
    if isinstance(layer, (keras.layers.Rescaling, keras.layers.Normalization)):
        return False  # the base's input scaling
    return train_bn or not _is_bn(layer)


def _is_random(layer: keras.layers.Layer) -> bool:
    return hasattr(layer, "seed_generator") or hasattr(layer, "drop_path_rate")


def _is_bn(layer: keras.layers.Layer) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization)


def _convolutions_to_fold(
    model: keras.Model,
) -> dict[keras.layers.Layer, keras.layers.BatchNormalization]:
    """Convolution to the BatchNormalization that alone reads its output."""
    readers: dict[int, list[keras.Operation]] = {}
    for operation in _operations_of_base(model):
        for tensor in _in(operation):
            readers.setdefault(id(tensor), []).append(operation)
    folded = {}
    for layer in model.layers:
        if (
            type(layer) in _CONVOLUTIONS
            and layer.activation is keras.activations.linear
            and getattr(layer, "groups", 1) == 1
        ):
            of_layer = readers.get(id(layer.output), [])
            if len(of_layer) == 1 and isinstance(
                of_layer[0], keras.layers.BatchNormalization
            ):
                folded[layer] = of_layer[0]
    return folded


def _convolve(layer: "FoldedConvolution", x: Any, kernel: Any) -> Any:
    if layer.kernel_size == (1, 1) and layer.strides == (1, 1):
        # A matrix product: its gradient is faster than the convolution's.
        flat = keras.ops.reshape(x, (-1, x.shape[-1]))
        product = keras.ops.matmul(flat, kernel[0, 0])
        return keras.ops.reshape(product, (-1, *x.shape[1:3], kernel.shape[-1]))
    return keras.ops.conv(
        x, kernel, layer.strides, layer.padding, "channels_last", layer.dilation_rate
    )


def _convolve_depthwise(layer: "FoldedConvolution", x: Any, kernel: Any) -> Any:
    return keras.ops.depthwise_conv(
        x, kernel, layer.strides, layer.padding, "channels_last", layer.dilation_rate
    )


def _convolve_separable(
    layer: "FoldedConvolution", x: Any, depthwise: Any, pointwise: Any
) -> Any:
    return keras.ops.separable_conv(
        x,
        depthwise,
        pointwise,
        layer.strides,
        layer.padding,
        "channels_last",
        layer.dilation_rate,
    )


_CONVOLUTIONS: dict[type, Callable] = {
    keras.layers.Conv2D: _convolve,
    keras.layers.DepthwiseConv2D: _convolve_depthwise,
    keras.layers.SeparableConv2D: _convolve_separable,
}


class FoldedConvolution(keras.layers.Layer):
    """A convolution and the frozen BatchNormalization above it, as one convolution.

    The weights are the convolution's own; what normalization multiplies its output
    with is multiplied into the kernel at every step. So gradients, and what an
    optimizer makes of them, are those of the two layers, and nothing has to be
    unfolded afterwards.
    """

    def __init__(
        self,
        convolution: keras.layers.Layer,
        normalization: keras.layers.BatchNormalization,
        dtype: str,
    ):
        super().__init__(name=convolution.name, dtype=dtype)
        self.kernel_size = tuple(convolution.kernel_size)
        self.strides = tuple(convolution.strides)
        self.padding = convolution.padding
        self.dilation_rate = tuple(convolution.dilation_rate)
        self._convolve = _CONVOLUTIONS[type(convolution)]
        self._output_of = convolution.compute_output_shape
        scale = 1 / np.sqrt(
            normalization.moving_variance.numpy() + normalization.epsilon
        )
        if normalization.gamma is not None:
            scale = scale * normalization.gamma.numpy()
        shift = -normalization.moving_mean.numpy() * scale
        if normalization.beta is not None:
            shift = shift + normalization.beta.numpy()
        self._scale, self._shift = scale.astype(np.float32), shift.astype(np.float32)
        for variable in convolution.weights:
            self.add_weight(
                name=variable.name, shape=variable.shape, initializer="zeros"
            )
        self._use_bias = convolution.use_bias
        self.built = True

    def call(self, x):
        """Float `[N, H, W, C]` in and out."""
        *kernels, kernel = [
            keras.ops.convert_to_tensor(weight.value)
            for weight in self.weights[: -1 if self._use_bias else None]
        ]
        # A depthwise kernel is [h, w, C, multiplier], the others [h, w, C, filters].
        scale = self._scale
        if self._convolve is _convolve_depthwise:
            scale = scale.reshape(kernel.shape[2:])
        cast = [keras.ops.cast(k, x.dtype) for k in (*kernels, kernel * scale)]
        shift = self._shift
        if self._use_bias:
            shift = shift + self._scale * keras.ops.convert_to_tensor(
                self.weights[-1].value
            )
        return self._convolve(self, x, *cast) + keras.ops.cast(shift, x.dtype)

    def compute_output_shape(self, input_shape):
        """As of the convolution."""
        return self._output_of(input_shape)


class _Through(keras.layers.Layer):
    """In the place of a layer that has nothing left to do."""

    def call(self, x, mask=None, training=None):
        return x
