"""Combines base and head into a `keras.Model` on [0, 255] pixels, and cuts models."""

import difflib
import hashlib
from collections.abc import Sequence

import keras
import numpy as np

from keras_transfer.config import HeadConfig
from keras_transfer.errors import KerasTransferError, UsageError, first_line
from keras_transfer.models.bases import Base, Scaling
from keras_transfer.models.pooling import pool
from keras_transfer.models.weights import pretrained_network

if keras.config.backend() != "tensorflow":
    raise KerasTransferError(
        f"Models run on Keras's TensorFlow backend. Received: {keras.config.backend()}."
        " Set KERAS_BACKEND=tensorflow."
    )

HEAD = "head"
POOL = "pool"

FEATURES = "features"
"""Layer that joins the pooled outputs that a head reads, if there are several."""

STAGE_POOL = "pool_stage_"
"""Start of the names of the layers that pool outputs of stages below the top."""

SPREAD = "spread"
"""First layer of a head that reads several pooled outputs: it scales them alike."""

STAGES = 2
"""Number of stages, below the last one, whose outputs are pooled too."""


def build_base(base: Base, weights: str, image_size: int, seed: int) -> keras.Model:
    """Builds a pretrained base with its input scaling and its pooling.

    Args:
        base: The base's row in the table.
        weights: `imagenet`, `none` (random) or the path of a weights file.
        image_size: Side of the square images in pixels.
        seed: Seed of the random weights, used only for `none`.

    Returns:
        A model that is not trainable, from float32 `[N, image_size, image_size, 3]` RGB
        pixels in [0, 255] to float32 `[N, D]` features: the pooled output. Its layers
        have the names of the base's own layers.

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
    features = pool(network.output, base, POOL)
    model = keras.Model(image, features, name=base.name)
    model.trainable = False
    return model


def with_stages(model: keras.Model, base: Base) -> keras.Model:
    """Extends a base by the pooled outputs of its last stages below the top.

    Low and middle layers know textures that the last ones, trained to tell ImageNet's
    classes, have forgotten. Their outputs come with the same forward pass.

    Args:
        model: A model built by `build_base`, or a classifier on it.
        base: The row of the base in the table.

    Returns:
        A model from the same input to float32 `[N, D]`, which shares the weights: the
        pooled outputs of the stages from the lower to the upper, then the base's own.
    """
    pooled = []
    for number, end in list(enumerate(base.stage_ends))[-STAGES:]:
        output = stage_end(model, end)
        pooled.append(pool(output, base, f"{STAGE_POOL}{number}"))
    pooled.append(model.get_layer(POOL).output)
    joined = keras.layers.Concatenate(name=FEATURES)(pooled)
    extended = keras.Model(model.input, joined, name=base.name)
    extended.trainable = False
    return extended


def stage_end(model: keras.Model, end: str) -> keras.KerasTensor:
    """Returns the output of a stage by its name in `Base.stage_ends`."""
    layer = get_layer(model, end.removeprefix("before:"))
    return layer.input if end.startswith("before:") else layer.output


def pooled_outputs(model: keras.Model) -> list[keras.KerasTensor]:
    """Returns the pooled outputs that a model's head reads, `[N, D]` each.

    Args:
        model: A model built by `build_base`, `with_stages`, `join_bases` or
            `attach_head`.
    """
    for layer in model.layers:
        if layer.name == FEATURES:
            return list(layer.input)
    return [model.get_layer(POOL).output]


def join_bases(bases: Sequence[keras.Model], stages: bool) -> keras.Model:
    """Joins bases to one, whose features are those of all.

    The layers of the first base are layers of the result; each further base is one
    layer, which has the base's name.

    Args:
        bases: Models returned by `with_stages`, for the same image size.
        stages: Whether the outputs of stages below the top are among the features.

    Returns:
        A model from float32 `[N, image_size, image_size, 3]` RGB pixels in [0, 255] to
        float32 `[N, D]` features, which shares the weights of the bases.
    """
    first, *others = bases
    features = pooled_outputs(first) if stages else [first.get_layer(POOL).output]
    for other in others:
        if not stages:
            own = other.get_layer(POOL).output
            other = keras.Model(other.input, own, name=other.name)
            other.trainable = False
        # A model's own `output` is not what it gives here, but that of this layer is.
        named = keras.layers.Identity(name=f"{POOL}_{other.name}")
        features.append(named(other(first.input)))
    joined = features[0]
    if len(features) > 1:
        joined = keras.layers.Concatenate(name=FEATURES)(features)
    return keras.Model(first.input, joined, name=first.name)


def scale(image: keras.KerasTensor, scaling: Scaling) -> keras.KerasTensor:
    """Applies a base's scaling to float32 `[N, H, W, 3]` RGB pixels in [0, 255]."""
    if scaling.bgr:
        image = keras.ops.flip(image, axis=-1)
    if scaling.scale == 1.0 and scaling.offset == 0.0:
        return image
    return keras.layers.Rescaling(scaling.scale, scaling.offset, name="scaling")(image)


def further_bases(model: keras.Model) -> list[keras.Model]:
    """Returns the bases beside the first one, each of which is a layer of the model."""
    names = {layer.name for layer in model.layers}
    return [
        layer
        for layer in model.layers
        if isinstance(layer, keras.Model) and f"{POOL}_{layer.name}" in names
    ]


def build_head(
    config: HeadConfig,
    num_features: int,
    num_classes: int,
    multi_label: bool,
    seed: int = 0,
    is_scaled: bool = False,
) -> keras.Model:
    """Builds the new classifier, untrained.

    Args:
        config: Kind and sizes of the head.
        num_features: Number of input features.
        num_classes: Number of classes.
        multi_label: Whether an image may show several classes, or none.
        seed: Seed of the random weights and of dropout.
        is_scaled: Whether the first layer scales the features; see `set_raw_weights`.

    Returns:
        A model from float32 `[N, num_features]` to float32 `[N, num_classes]`
        probabilities: a softmax, or one sigmoid per class for multi-label data.
    """
    features = keras.Input((num_features,), name="features")
    x = features
    if is_scaled:
        x = keras.layers.Normalization(name=SPREAD)(x)
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


def set_raw_weights(
    head: keras.Model,
    weights: Sequence[np.ndarray],
    spread: tuple[np.ndarray, np.ndarray] | None,
) -> None:
    """Sets the weights of a head that was trained on features as they are.

    Args:
        head: A head as built by `build_head`.
        weights: Kernels and biases of its dense layers, for features as they are.
        spread: float `[D]` mean and scale of the features, if the head scales them:
            its first layer subtracts the mean and divides by the scale, and the kernel
            above is changed so that the head says the same.
    """
    if spread is None:
        head.set_weights(weights)
        return
    mean, scale = (x.astype(np.float32) for x in spread)
    kernel, bias, *others = weights
    scaled = [kernel * scale[:, None], bias + mean @ kernel, *others]
    count = np.zeros((), np.int32)  # of the rows it would have been adapted to
    head.set_weights([mean, np.square(scale), count, *scaled])
    head.get_layer(SPREAD).finalize_state()  # it derives constants from its weights


def copy_head(source: keras.Model, target: keras.Model) -> None:
    """Copies the weights of a head to another one that was built alike."""
    target.set_weights(source.get_weights())
    for layer in target.layers:
        if layer.name == SPREAD:
            layer.finalize_state()


def attach_head(base: keras.Model, head: keras.Model) -> keras.Model:
    """Joins base and head into a model that shares their weights.

    Args:
        base: A model returned by `build_base`, `with_stages` or `join_bases`.
        head: A head on its features.

    Returns:
        A model from float32 `[N, image_size, image_size, 3]` RGB pixels in [0, 255] to
        float32 `[N, num_classes]` probabilities.
    """
    return keras.Model(base.input, head(base.output), name=base.name)


def with_features(model: keras.Model) -> keras.Model:
    """Extends a classifier to also return its (first) base's pooled output.

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
        A model from the same input to float32 `[N, D]` features: the pooled output of
        the (first) base.
    """
    # The identity makes it a model above any cut, also one at the pooling.
    features = keras.layers.Identity()(model.get_layer(POOL).output)
    return keras.Model(model.input, features, name=model.name)


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
