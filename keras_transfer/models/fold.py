"""Folds BatchNormalization into the preceding convolution.

At inference, and while it is frozen, BatchNormalization multiplies by and adds
constants, which a convolution can do itself. For training, the kernel remains the
original variable and is multiplied at every step; for serving, it is multiplied once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_transfer.models.classifier import HEAD, further_bases


def operations_of_base(model: keras.Model) -> list[keras.Operation]:
    """Lists all operations but the head, each after those whose outputs it reads."""
    return [operation for operation in model.operations if operation.name != HEAD]


def inputs_of(operation: keras.Operation) -> Sequence[keras.KerasTensor]:
    """Returns the tensors that an operation reads."""
    is_input = isinstance(operation, keras.layers.InputLayer)
    return [] if is_input else keras.tree.flatten(operation.input)


def outputs_of(operation: keras.Operation) -> Sequence[keras.KerasTensor]:
    """Returns the tensors that an operation writes."""
    return keras.tree.flatten(operation.output)


def convolutions_to_fold(
    model: keras.Model,
) -> dict[keras.layers.Layer, keras.layers.BatchNormalization]:
    """Finds convolutions whose output is read only by a BatchNormalization.

    Returns:
        The BatchNormalization by convolution. Convolutions with an activation or with
        several groups are not included.
    """
    readers: dict[int, list[keras.Operation]] = {}
    for operation in operations_of_base(model):
        for tensor in inputs_of(operation):
            readers.setdefault(id(tensor), []).append(operation)
    folded: dict[keras.layers.Layer, keras.layers.BatchNormalization] = {}
    for further in further_bases(model):
        folded |= convolutions_to_fold(further)
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
    """Copies a model's graph with copies of its layers.

    Args:
        model: The model; nested models are copied layer by layer.
        copy_layer: Returns a replacement with the same inputs and outputs for a layer.
    """

    def copy(operation: Any) -> Any:
        if not isinstance(operation, keras.layers.Layer):
            return operation  # it has no weights
        if isinstance(operation, keras.Model):
            return keras.models.clone_model(operation, clone_function=copy)
        return copy_layer(operation)

    return keras.models.clone_model(model, clone_function=copy)


def derive_from_weights(layer: keras.layers.Layer) -> None:
    """Updates values that a layer derives from its weights after they were assigned.

    `Normalization` derives constants from its weights when it is built or loaded, but
    not when the weights are assigned.
    """
    if hasattr(layer, "finalize_state"):
        layer.finalize_state()


def folded_copy(model: keras.Model) -> keras.Model:
    """Copies a model for inference, folding BatchNormalization where possible."""
    folded = convolutions_to_fold(model)
    absorbed = set(folded.values())
    copies: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []

    def copy_layer(layer: keras.layers.Layer) -> keras.layers.Layer:
        if layer in absorbed:
            return Identity(name=layer.name)
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
    """Returns float32 `[C]` each, such that normalization is x * scale + shift."""
    scale = 1 / np.sqrt(normalization.moving_variance.numpy() + normalization.epsilon)
    if normalization.gamma is not None:
        scale = scale * normalization.gamma.numpy()
    shift = -normalization.moving_mean.numpy() * scale
    if normalization.beta is not None:
        shift = shift + normalization.beta.numpy()
    return scale.astype(np.float32), shift.astype(np.float32)


def _along_kernel(scale: np.ndarray, convolution: keras.layers.Layer) -> np.ndarray:
    """Reshapes a scale so that it broadcasts over a convolution's last kernel."""
    # A depthwise kernel is [h, w, C, multiplier]; the others are [h, w, C, filters].
    if isinstance(convolution, keras.layers.DepthwiseConv2D):
        return scale.reshape(-1, convolution.depth_multiplier)
    return scale


def _convolve(layer: "FoldedConvolution", x: Any, kernel: Any) -> Any:
    if layer.kernel_size == (1, 1) and layer.strides == (1, 1):
        # The gradient of a matrix product is faster than that of a convolution.
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


_CONVOLUTIONS: dict[type, Callable[..., Any]] = {
    keras.layers.Conv2D: _convolve,
    keras.layers.DepthwiseConv2D: _convolve_depthwise,
    keras.layers.SeparableConv2D: _convolve_separable,
}


class FoldedConvolution(keras.layers.Layer):
    """A convolution and the frozen BatchNormalization after it, as one convolution.

    The weights are the convolution's own, and the scale of the normalization is
    multiplied into the kernel at every step. Gradients and optimizer updates are
    therefore those of the two separate layers, and nothing has to be unfolded
    afterwards.
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
                autocast=False,  # round the product once, not each of its factors
            )
        self._use_bias = convolution.use_bias
        self.built = True

    def call(self, x: Any) -> Any:
        """Applies the convolution to float `[N, H, W, C]`; returns `[N, h, w, D]`."""
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

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Returns the convolution's output shape."""
        return self._output_of(input_shape)


class Identity(keras.layers.Layer):
    """Replaces a layer that has nothing left to do."""

    def call(self, x: Any, mask: Any = None, training: Any = None) -> Any:
        """Returns the input unchanged."""
        return x
