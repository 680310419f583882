"""BatchNormalization folded into the convolution before it.

At inference, and while it is frozen, BatchNormalization multiplies and adds constants;
a convolution can do that itself. For training the kernel stays the variable it is and
is multiplied at every step; for serving it is multiplied once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_transfer.models.classifier import HEAD


def operations_of_base(model: keras.Model) -> list[keras.Operation]:
    """In an order in which each comes after those it reads."""
    return [operation for operation in model.operations if operation.name != HEAD]


def inputs_of(operation: keras.Operation) -> Sequence[keras.KerasTensor]:
    """The tensors that an operation reads."""
    is_input = isinstance(operation, keras.layers.InputLayer)
    return [] if is_input else keras.tree.flatten(operation.input)


def outputs_of(operation: keras.Operation) -> Sequence[keras.KerasTensor]:
    """The tensors that an operation writes."""
    return keras.tree.flatten(operation.output)


def convolutions_to_fold(
    model: keras.Model,
) -> dict[keras.layers.Layer, keras.layers.BatchNormalization]:
    """Convolution to the BatchNormalization that alone reads its output."""
    readers: dict[int, list[keras.Operation]] = {}
    for operation in operations_of_base(model):
        for tensor in inputs_of(operation):
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


def copy_layers(
    model: keras.Model, copy_layer: Callable[[keras.layers.Layer], keras.layers.Layer]
) -> keras.Model:
    """A model with the same graph, made of copies of its layers.

    Args:
        model: The model; layers that are models themselves are copied layer by layer.
        copy_layer: From a layer to another with the same inputs and outputs.
    """

    def copy(operation: Any) -> Any:
        if not isinstance(operation, keras.layers.Layer):
            return operation  # without weights
        if isinstance(operation, keras.Model):
            return keras.models.clone_model(operation, clone_function=copy_layer)
        return copy_layer(operation)

    return keras.models.clone_model(model, clone_function=copy)


def derive_from_weights(layer: keras.layers.Layer) -> None:
    """Brings up to date what a layer computes from weights that were assigned.

    Normalization multiplies with constants that it makes of its weights when it is
    built and when a file is loaded, but not when the weights are assigned.
    """
    if hasattr(layer, "finalize_state"):
        layer.finalize_state()


def folded_copy(model: keras.Model) -> keras.Model:
    """Copies a model for inference, with normalization folded where it can be."""
    folded = convolutions_to_fold(model)
    absorbed = set(folded.values())
    copies: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []

    def copy_layer(layer: keras.layers.Layer) -> keras.layers.Layer:
        if layer in absorbed:
            return Through(name=layer.name)
        config = layer.get_config()
        if layer in folded:
            config["use_bias"] = True
        copy = layer.__class__.from_config(config)
        copies.append((layer, copy))
        return copy

    copied = copy_layers(model, copy_layer)
    for layer, copy in copies:
        values = layer.get_weights()
        if layer in folded:
            scale, shift = _scale_and_shift(folded[layer])
            bias = values.pop() * scale if layer.use_bias else 0.0
            values[-1] = values[-1] * _along_kernel(scale, layer)
            values.append(bias + shift)
        copy.set_weights(values)
        derive_from_weights(copy)
    return copied


def _scale_and_shift(
    normalization: keras.layers.BatchNormalization,
) -> tuple[np.ndarray, np.ndarray]:
    """float32 `[C]` each: normalization is x * scale + shift."""
    scale = 1 / np.sqrt(normalization.moving_variance.numpy() + normalization.epsilon)
    if normalization.gamma is not None:
        scale = scale * normalization.gamma.numpy()
    shift = -normalization.moving_mean.numpy() * scale
    if normalization.beta is not None:
        shift = shift + normalization.beta.numpy()
    return scale.astype(np.float32), shift.astype(np.float32)


def _along_kernel(scale: np.ndarray, convolution: keras.layers.Layer) -> np.ndarray:
    """The scale in a shape in which it multiplies a convolution's last kernel."""
    # A depthwise kernel is [h, w, C, multiplier], the others [h, w, C, filters].
    if isinstance(convolution, keras.layers.DepthwiseConv2D):
        return scale.reshape(-1, convolution.depth_multiplier)
    return scale


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
        self._scale, self._shift = _scale_and_shift(normalization)
        self._kernel_scale = _along_kernel(self._scale, convolution)
        for variable in convolution.weights:
            self.add_weight(
                name=variable.name,
                shape=variable.shape,
                initializer="zeros",
                autocast=False,  # the product is rounded once, not its factors
            )
        self._use_bias = convolution.use_bias
        self.built = True

    def call(self, x):
        """Float `[N, H, W, C]` in and out."""
        *kernels, kernel = [
            keras.ops.convert_to_tensor(weight.value)
            for weight in self.weights[: -1 if self._use_bias else None]
        ]
        kernels.append(kernel * self._kernel_scale)
        cast = [keras.ops.cast(kernel, x.dtype) for kernel in kernels]
        shift = self._shift
        if self._use_bias:
            shift = shift + self._scale * keras.ops.convert_to_tensor(
                self.weights[-1].value
            )
        return self._convolve(self, x, *cast) + keras.ops.cast(shift, x.dtype)

    def compute_output_shape(self, input_shape):
        """As of the convolution."""
        return self._output_of(input_shape)


class Through(keras.layers.Layer):
    """In the place of a layer that has nothing left to do."""

    def call(self, x, mask=None, training=None):
        """What came in."""
        return x
