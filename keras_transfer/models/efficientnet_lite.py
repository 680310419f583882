"""EfficientNet-Lite0 to Lite2, variants of EfficientNet for edge devices.

Sources: Tan & Le 2019, arXiv:1905.11946; for the Lite variants, the TensorFlow TPU
repository, `efficientnet/lite` (ReLU6 instead of swish, no squeeze-and-excitation;
stem and head, and the numbers of blocks of the first and the last stage, are not
scaled).
"""

import math
from collections.abc import Iterator, Mapping

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

# Names in the PyTorch port
_ENDS = {
    "stem_conv": "_conv_stem",
    "stem_bn": "_bn0",
    "top_conv": "_conv_head",
    "top_bn": "_bn1",
}
_PARTS = {
    "expand_conv": "_expand_conv",
    "expand_bn": "_bn0",
    "dwconv": "_depthwise_conv",
    "dw_bn": "_bn1",
    "project_conv": "_project_conv",
    "project_bn": "_bn2",
}


def efficientnet_lite0(input_tensor: keras.KerasTensor) -> keras.Model:
    """Builds EfficientNet-Lite0 without its classifier, with random weights.

    Args:
        input_tensor: float32 `[N, H, W, 3]` RGB pixels scaled by (x - 127) / 128.

    Returns:
        A model from the source of `input_tensor` to float32 `[N, H/32, W/32, 1280]`.
    """
    return _efficientnet_lite(input_tensor, "efficientnet_lite0", 1.0, 1.0)


def efficientnet_lite1(input_tensor: keras.KerasTensor) -> keras.Model:
    """Builds EfficientNet-Lite1 without its classifier; see `efficientnet_lite0`."""
    return _efficientnet_lite(input_tensor, "efficientnet_lite1", 1.0, 1.1)


def efficientnet_lite2(input_tensor: keras.KerasTensor) -> keras.Model:
    """Builds EfficientNet-Lite2 without its classifier; see `efficientnet_lite0`."""
    return _efficientnet_lite(input_tensor, "efficientnet_lite2", 1.1, 1.2)


def from_torch(model: keras.Model, arrays: Mapping[str, np.ndarray]) -> None:
    """Sets the weights of a model from a state dict of EfficientNet's PyTorch port.

    Args:
        model: A model built by one of the constructors.
        arrays: Arrays by name, such as `_blocks.3._bn1.weight`.

    Raises:
        KeyError: If an array is missing.
        ValueError: If an array has the wrong shape.
    """
    for keras_name, torch_name in _layer_names(model):
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


def _efficientnet_lite(
    input_tensor: keras.KerasTensor, name: str, width: float, depth: float
) -> keras.Model:
    """Builds a network whose stages are scaled in width and depth."""
    x = _conv(input_tensor, "stem", filters=32, kernel=3, strides=2)
    for stage, (repeats, kernel, strides, expansion, filters) in enumerate(_STAGES, 1):
        is_scaled = 1 < stage < len(_STAGES)
        for repeat in range(math.ceil(depth * repeats) if is_scaled else repeats):
            x = _inverted_bottleneck(
                x,
                name=f"block{stage}{chr(ord('a') + repeat)}",
                kernel=kernel,
                strides=strides if repeat == 0 else 1,
                expansion=expansion,
                filters=_round_filters(width * filters),
            )
    x = _conv(x, "top", filters=1280)
    return keras.Model(keras.utils.get_source_inputs(input_tensor), x, name=name)


def _round_filters(filters: float) -> int:
    """Rounds to the nearest multiple of 8 that is at least 90% of the number."""
    rounded = max(8, int(filters + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * filters else rounded


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


def _layer_names(model: keras.Model) -> Iterator[tuple[str, str]]:
    """Yields (layer name, name in the PyTorch port) of all layers that have weights."""
    yield from _ENDS.items()
    blocks: dict[str, int] = {}
    for layer in model.layers:
        block, _, part = layer.name.partition("_")
        if part in _PARTS:
            number = blocks.setdefault(block, len(blocks))
            yield layer.name, f"_blocks.{number}.{_PARTS[part]}"
