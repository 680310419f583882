"""base + head -> one keras.Model on [0, 255] pixels, and cutting it in two."""

import difflib
import hashlib
from collections.abc import Sequence

import keras

from keras_transfer.config import HeadConfig
from keras_transfer.errors import KerasTransferError, UsageError
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
    """A pretrained base with its input scaling and its pooling.

    Args:
        base: The row of the table.
        weights: `imagenet`, `none` or a file's path.
        image_size: Side of the images in pixels.
        seed: Of the random weights with `none`.

    Returns:
        A model from float32 `[N, image_size, image_size, 3]` RGB pixels in [0, 255]
        to float32 `[N, D]` features, not trainable. Its layers carry the names of the
        base's own layers.

    Raises:
        UsageError: If the base does not work at this image size.
        WeightsError: If its weights cannot be loaded.
    """
    image = keras.Input((image_size, image_size, 3), name="image")
    try:
        network = pretrained_network(base, scale(image, base.scaling), weights, seed)
    except ValueError as error:
        raise UsageError(
            f"{base.name} cannot be built for images of {image_size} pixels: "
            f"{str(error).splitlines()[0]} Its own size is {base.image_size}."
        ) from None
    features = _POOLING[base.pooling](name=POOL)(network.output)
    model = keras.Model(image, features, name=base.name)
    model.trainable = False
    return model


def scale(image: keras.KerasTensor, scaling: Scaling) -> keras.KerasTensor:
    """Applies a base's input scaling to float32 `[N, H, W, 3]` RGB pixels."""
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
    """The new classifier, untrained, its random weights drawn from the seed.

    Returns:
        A model from float32 `[N, num_features]` to float32 `[N, num_classes]`
        probabilities: a softmax, or of multi-label data a sigmoid per class.
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
    """One model from [0, 255] pixels to probabilities, sharing both parts' weights."""
    return keras.Model(base.input, head(base.output), name=base.name)


def cut(model: keras.Model, split_point: str) -> tuple[keras.Model, keras.Model]:
    """Cuts a model in two above a layer.

    Args:
        model: What `build_base` or `attach_head` returned.
        split_point: The layer's name; the input's name for a first part that passes
            pixels on as they are.

    Returns:
        (extractor, tail): the model below and the model above the cut; the output of
        the first is the input of the second. They share the model's weights.

    Raises:
        UsageError: If there is no such layer, or layers above read more than its
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
    """A layer by its name.

    Raises:
        UsageError: If there is no such layer; the nearest name is given.
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
    """SHA-256 over shapes and values of all weights.

    Names do not count: Keras numbers them by what else the process has built.
    """
    digest = hashlib.sha256()
    for variable in model.weights:
        value = variable.numpy()
        digest.update(repr((value.shape, value.dtype.str)).encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def dense_layers(head: keras.Model) -> Sequence[keras.layers.Dense]:
    """The layers of a head that have weights, from features to probabilities."""
    return [layer for layer in head.layers if isinstance(layer, keras.layers.Dense)]
