"""EfficientNet-Lite0, a variant of EfficientNet-B0 for edge devices.

Sources: Tan & Le 2019, arXiv:1905.11946; for the Lite variant, the TensorFlow TPU
repository, `efficientnet/lite` (ReLU6 instead of swish, no squeeze-and-excitation,
fixed stem and head).
"""

from collections.abc import Mapping

import keras
import numpy as np

_BN_EPSILON = 1e-3

_STAGES = (
    # repeats, kernel, strides, expansion, filters
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def efficientnet_lite0(input_tensor: keras.KerasTensor) -> keras.Model:
    """Builds EfficientNet-Lite0 without its classifier, with random weights.

    Args:
        input_tensor: float32 `[N, H, W, 3]` RGB pixels scaled by (x - 127) / 128.

    Returns:
        A model from the source of `input_tensor` to float32 `[N, H/32, W/32, 1280]`.
    """
    x = _conv(input_tensor, "stem", filters=32, kernel=3, strides=2)
    for stage, (repeats, kernel, strides, expansion, filters) in enumerate(_STAGES, 1):
        for repeat in range(repeats):
            x = _inverted_bottleneck(
                x,
                name=f"block{stage}{chr(ord('a') + repeat)}",
                kernel=kernel,
                strides=strides if repeat == 0 else 1,
                expansion=expansion,
                filters=filters,
            )
    x = _conv(x, "top", filters=1280)
    inputs = keras.utils.get_source_inputs(input_tensor)
    return keras.Model(inputs, x, name="efficientnet_lite0")


def from_torch(model: keras.Model, arrays: Mapping[str, np.ndarray]) -> None:
    """Sets the weights of a model from a state dict of EfficientNet's PyTorch port.

    Args:
        model: A model built by `efficientnet_lite0`.
        arrays: Arrays by name, such as `_blocks.3._bn1.weight`.

    Raises:
        KeyError: If an array is missing.
        ValueError: If an array has the wrong shape.
    """
    for keras_name, torch_name in _layer_names():
        layer = model.get_layer(keras_name)
        if isinstance(layer, keras.layers.BatchNormalization):
            fields = ("weight", "bias", "running_mean", "running_var")
            layer.set_weights([arrays[f"{torch_name}.{field}"] for field in fields])
        elif isinstance(layer, keras.layers.DepthwiseConv2D):
            # torch [C, 1, kh, kw] -> Keras [kh, kw, C, 1]
            layer.set_weights([arrays[f"{torch_name}.weight"].transpose(2, 3, 0, 1)])
        else:
            # torch [out, in, kh, kw] -> Keras [kh, kw, in, out]
            layer.set_weights([arrays[f"{torch_name}.weight"].transpose(2, 3, 1, 0)])


def _inverted_bottleneck(
    x: keras.KerasTensor,
    name: str,
    kernel: int,
    strides: int,
    expansion: int,
    filters: int,
) -> keras.KerasTensor:
    inputs = x
    if expansion > 1:
        x = _conv(x, f"{name}_expand", filters=expansion * x.shape[-1])
    x = keras.layers.DepthwiseConv2D(
        kernel, strides, padding="same", use_bias=False, name=f"{name}_dwconv"
    )(x)
    x = _normalize(x, f"{name}_dw")
    x = _conv(x, f"{name}_project", filters=filters, activation=False)
    if strides == 1 and inputs.shape[-1] == filters:
        x = keras.layers.Add(name=f"{name}_add")([inputs, x])
    return x


def _conv(
    x: keras.KerasTensor,
    name: str,
    filters: int,
    kernel: int = 1,
    strides: int = 1,
    activation: bool = True,
) -> keras.KerasTensor:
    x = keras.layers.Conv2D(
        filters, kernel, strides, padding="same", use_bias=False, name=f"{name}_conv"
    )(x)
    return _normalize(x, name, activation)


def _normalize(
    x: keras.KerasTensor, name: str, activation: bool = True
) -> keras.KerasTensor:
    x = keras.layers.BatchNormalization(epsilon=_BN_EPSILON, name=f"{name}_bn")(x)
    if activation:
        x = keras.layers.ReLU(max_value=6.0, name=f"{name}_activation")(x)
    return x


def _layer_names() -> list[tuple[str, str]]:
    """Returns (layer name, name in the PyTorch port) in the order of the network."""
    names = [("stem_conv", "_conv_stem"), ("stem_bn", "_bn0")]
    block = 0
    for stage, (repeats, _, _, expansion, _) in enumerate(_STAGES, 1):
        for repeat in range(repeats):
            ours, theirs = f"block{stage}{chr(ord('a') + repeat)}", f"_blocks.{block}"
            if expansion > 1:
                names += [
                    (f"{ours}_expand_conv", f"{theirs}._expand_conv"),
                    (f"{ours}_expand_bn", f"{theirs}._bn0"),
                ]
            names += [
                (f"{ours}_dwconv", f"{theirs}._depthwise_conv"),
                (f"{ours}_dw_bn", f"{theirs}._bn1"),
                (f"{ours}_project_conv", f"{theirs}._project_conv"),
                (f"{ours}_project_bn", f"{theirs}._bn2"),
            ]
            block += 1
    return [*names, ("top_conv", "_conv_head"), ("top_bn", "_bn1")]
