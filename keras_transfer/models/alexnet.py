"""AlexNet in its single-column form.

Source: Krizhevsky 2014, arXiv:1404.5997. The layer sizes are those of torchvision,
whose weights it uses.
"""

from collections.abc import Mapping

import keras
import numpy as np


def alexnet(input_tensor: keras.KerasTensor) -> keras.Model:
    """Builds AlexNet up to the pooling after its last convolution, with random weights.

    Args:
        input_tensor: float32 `[N, H, W, 3]` RGB pixels normalized by ImageNet's mean
            and standard deviation.

    Returns:
        A model from the source of `input_tensor` to float32 `[N, h, w, 256]`; h and w
        are 6 for images of 224 pixels.
    """
    inputs = keras.utils.get_source_inputs(input_tensor)
    return keras.Model(inputs, _convolutions(input_tensor), name="alexnet")


def alexnet_fc7(input_tensor: keras.KerasTensor) -> keras.Model:
    """Builds AlexNet up to its second fully connected layer, with random weights.

    The fully connected layers are built as convolutions, so that larger images result
    in a map of features.

    Args:
        input_tensor: As for `alexnet`, with H and W at least 223.

    Returns:
        A model from the source of `input_tensor` to float32 `[N, h, w, 4096]`; h and w
        are 1 for images of 224 pixels.
    """
    x = _convolutions(input_tensor)
    for name, kernel in (("fc6", 6), ("fc7", 1)):
        x = keras.layers.Dropout(0.5, name=f"{name}_dropout")(x)
        x = keras.layers.Conv2D(4096, kernel, activation="relu", name=name)(x)
    inputs = keras.utils.get_source_inputs(input_tensor)
    return keras.Model(inputs, x, name="alexnet_fc7")


def from_torch(model: keras.Model, arrays: Mapping[str, np.ndarray]) -> None:
    """Sets the weights of a model from torchvision's state dict.

    Args:
        model: A model built by `alexnet` or `alexnet_fc7`.
        arrays: Arrays by name, such as `features.0.weight`.

    Raises:
        KeyError: If an array is missing.
        ValueError: If an array has the wrong shape.
    """
    for layer in model.layers:
        if layer.name not in _TORCH_NAMES:
            continue
        torch_name = _TORCH_NAMES[layer.name]
        kernel, bias = (arrays[f"{torch_name}.{field}"] for field in ("weight", "bias"))
        height, width, channels, filters = layer.kernel.shape
        # torch [out, in, kh, kw] or flattened [out, in * kh * kw]
        # -> Keras [kh, kw, in, out]
        kernel = kernel.reshape(filters, channels, height, width).transpose(2, 3, 1, 0)
        layer.set_weights([kernel, bias])


_TORCH_NAMES = {
    "conv1": "features.0",
    "conv2": "features.3",
    "conv3": "features.6",
    "conv4": "features.8",
    "conv5": "features.10",
    "fc6": "classifier.1",
    "fc7": "classifier.4",
}


def _convolutions(x: keras.KerasTensor) -> keras.KerasTensor:
    x = keras.layers.ZeroPadding2D(2, name="conv1_pad")(x)
    x = keras.layers.Conv2D(64, 11, 4, activation="relu", name="conv1")(x)
    x = keras.layers.MaxPooling2D(3, 2, name="pool1")(x)
    x = _convolution(x, 192, 5, "conv2")
    x = keras.layers.MaxPooling2D(3, 2, name="pool2")(x)
    x = _convolution(x, 384, 3, "conv3")
    x = _convolution(x, 256, 3, "conv4")
    x = _convolution(x, 256, 3, "conv5")
    return keras.layers.MaxPooling2D(3, 2, name="pool5")(x)


def _convolution(
    x: keras.KerasTensor, filters: int, kernel: int, name: str
) -> keras.KerasTensor:
    return keras.layers.Conv2D(
        filters, kernel, padding="same", activation="relu", name=name
    )(x)
