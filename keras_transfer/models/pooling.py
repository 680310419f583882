"""Turns the output of a base, or of one of its stages, into one vector per image."""

import keras

from keras_transfer.models.bases import Base


def pool(tensor: keras.KerasTensor, base: Base, name: str) -> keras.KerasTensor:
    """Pools a base's output, or that of one of its stages.

    Args:
        tensor: Output of a layer of the base: a map `[N, H, W, D]` or tokens
            `[N, T, D]`.
        base: The base's row in the table, which says how its output is pooled.
        name: Name of the last layer that is added. Its other layers' names begin with
            it.

    Returns:
        float32 `[N, D]`, or `[N, 2 * D]` for `class+mean`.
    """
    if base.pooling == "map":
        return keras.layers.GlobalAveragePooling2D(name=name, dtype="float32")(tensor)
    if base.pooling == "tokens":
        return keras.layers.GlobalAveragePooling1D(name=name, dtype="float32")(tensor)
    other_tokens = (0, tensor.shape[1] - 1)
    first = keras.layers.Cropping1D(other_tokens, name=f"{name}_class")(tensor)
    if base.pooling == "class":
        return keras.layers.GlobalAveragePooling1D(name=name, dtype="float32")(first)
    prefix = (base.prefix_tokens, 0)
    patches = keras.layers.Cropping1D(prefix, name=f"{name}_patches")(tensor)
    means = [
        keras.layers.GlobalAveragePooling1D(dtype="float32", name=f"{name}_{part}")(x)
        for part, x in (("first", first), ("mean", patches))
    ]
    return keras.layers.Concatenate(name=name, dtype="float32")(means)
