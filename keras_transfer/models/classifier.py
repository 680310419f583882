"""Combines base and head into a `keras.Model` on [0, 255] pixels, and cuts models."""

import difflib
import hashlib
from collections.abc import Sequence

import keras

from keras_transfer.config import HeadConfig
from keras_transfer.errors import KerasTransferError, UsageError, first_line
from keras_transfer.models.bases import Base, Scaling
from keras_transfer.models.weights import pretrained_network

if keras.config.backend() != "tensorflow":
    raise KerasTransferError(
        f"Models run on Keras's TensorFlow backend. Received: {keras.config.backend()}."
        " Set KERAS_BACKEND=tensorflow."
    )

HEAD = "head"
POOL = "pool"

_POOLING = {
    "map": keras.layers.GlobalAveragePooling2D,
    "tokens": keras.layers.GlobalAveragePooling1D,
}


def build_base(base: Base, weights: str, image_size: int, seed: int) -> keras.Model:
    """Builds a pretrained base with its input scaling and global average pooling.

    Args:
        base: The base's row in the table.
        weights: `imagenet`, `none` (random) or the path of a weights file.
        image_size: Side of the square images in pixels.
        seed: Seed of the random weights, used only for `none`.

    Returns:
        A model that is not trainable, from float32 `[N, image_size, image_size, 3]` RGB
        pixels in [0, 255] to float32 `[N, D]` features. Its layers have the names of
        the base's own layers.

    Raises:
        UsageError: If the base cannot be built for this image size, or the weights file
            does not exist.
        WeightsError: If the weights cannot be loaded.
    """
    image = keras.Input((image_size, image_size, 3), name="image")
    try:
        network = pretrained_network(base, scale(image, base.scaling), weights, seed)
    except ValueError as error:
        raise UsageError(
            f"{base.name} cannot be built for images of {image_size} pixels: "
            f"{first_line(error)}. Its own size is {base.image_size}."
        ) from None
    features = _POOLING[base.pooling](name=POOL)(network.output)
    model = keras.Model(image, features, name=base.name)
    model.trainable = False
    return model


def scale(image: keras.KerasTensor, scaling: Scaling) -> keras.KerasTensor:
    """Applies a base's scaling to float32 `[N, H, W, 3]` RGB pixels in [0, 255]."""
    if scaling.bgr:
        image = keras.ops.flip(image, axis=-1)
    if scaling.scale == 1.0 and scaling.offset == 0.0:
        return image
    return keras.layers.Rescaling(scaling.scale, scaling.offset, name="scaling")(image)


def build_head(
    config: HeadConfig,
    num_features: int,
    num_classes: int,
    multi_label: bool,
    seed: int = 0,
) -> keras.Model:
    """Builds the new classifier, untrained.

    Args:
        config: Kind and sizes of the head.
        num_features: Number of input features.
        num_classes: Number of classes.
        multi_label: Whether an image may show several classes, or none.
        seed: Seed of the random weights and of dropout.

    Returns:
        A model from float32 `[N, num_features]` to float32 `[N, num_classes]`
        probabilities: a softmax, or one sigmoid per class for multi-label data.
    """
    features = keras.Input((num_features,), name="features")
    x = features
    if config.kind == "mlp":
        for index, units in enumerate(config.hidden):
            x = keras.layers.Dense(
                units,
                activation="relu",
                kernel_initializer=keras.initializers.GlorotUniform(seed + index),
                name=f"hidden_{index}",
            )(x)
            x = keras.layers.Dropout(
                config.dropout, seed=seed + index, name=f"dropout_{index}"
            )(x)
    probabilities = keras.layers.Dense(
        num_classes,
        activation="sigmoid" if multi_label else "softmax",
        kernel_initializer=keras.initializers.GlorotUniform(seed),
        name="probabilities",
    )(x)
    return keras.Model(features, probabilities, name=HEAD)


def attach_head(base: keras.Model, head: keras.Model) -> keras.Model:
    """Joins base and head into a model that shares their weights.

    Returns:
        A model from float32 `[N, image_size, image_size, 3]` RGB pixels in [0, 255] to
        float32 `[N, num_classes]` probabilities.
    """
    return keras.Model(base.input, head(base.output), name=base.name)


def with_features(model: keras.Model) -> keras.Model:
    """Extends a classifier to also return its head's input.

    Args:
        model: A model built by `attach_head`.

    Returns:
        A model of the same input that returns a dictionary with `probabilities` float32
        `[N, num_classes]` and `features` float32 `[N, D]`. It shares the model's
        weights.
    """
    features = model.get_layer(POOL).output
    outputs = {"probabilities": model.output, "features": features}
    return keras.Model(model.input, outputs)


def without_head(model: keras.Model) -> keras.Model:
    """Returns the part of a classifier below its head, which shares its weights.

    Args:
        model: A model built by `attach_head`.

    Returns:
        A model from the same input to float32 `[N, D]` features.
    """
    return keras.Model(model.input, model.get_layer(POOL).output, name=model.name)


def cut(model: keras.Model, split_point: str) -> tuple[keras.Model, keras.Model]:
    """Cuts a model in two after a layer.

    Args:
        model: A model built by `build_base` or `attach_head`.
        split_point: Name of the layer; the name of the input for a first part that
            passes pixels on unchanged.

    Returns:
        (extractor, tail): the models below and above the cut. The output of the first
        is the input of the second. They share the model's weights.

    Raises:
        UsageError: If the layer does not exist, or layers above it read more than its
            output.
    """
    tensor = get_layer(model, split_point).output
    try:
        tail = keras.Model(tensor, model.output, name=f"{model.name}_tail")
    except ValueError:
        raise UsageError(
            f"{model.name} cannot be cut at {split_point!r}: layers above it read more "
            "than its output."
        ) from None
    return keras.Model(model.input, tensor, name=f"{model.name}_extractor"), tail


def get_layer(model: keras.Model, name: str) -> keras.layers.Layer:
    """Finds a layer of a model by name.

    Raises:
        UsageError: If the layer does not exist; the message suggests the nearest name.
    """
    layers = {layer.name: layer for layer in model.layers}
    if name not in layers:
        nearest = difflib.get_close_matches(name, layers, n=1, cutoff=0.0)[0]
        raise UsageError(
            f"{model.name} has no such layer. Received: {name!r}. Did you mean "
            f"{nearest!r}?"
        )
    return layers[name]


def weights_digest(model: keras.Model) -> str:
    """Computes the SHA-256 over shapes, dtypes and values of all weights.

    Names are ignored, because Keras numbers them depending on what else the process has
    built.
    """
    digest = hashlib.sha256()
    for variable in model.weights:
        value = variable.numpy()
        digest.update(repr((value.shape, value.dtype.str)).encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def dense_layers(head: keras.Model) -> Sequence[keras.layers.Dense]:
    """Returns the layers of a head that have weights, from input to output."""
    return [layer for layer in head.layers if isinstance(layer, keras.layers.Dense)]


def fold_temperature(head: keras.Model, temperature: float) -> None:
    """Divides a head's logits by a temperature, in place.

    Logits are linear in the kernel and the bias of the last layer, so dividing both by
    the temperature gives the same model as dividing the logits.

    Args:
        head: A head as built by `build_head`.
        temperature: The temperature, greater than 0.
    """
    last = dense_layers(head)[-1]
    for variable in (last.kernel, last.bias):
        variable.assign(variable / temperature)
