"""Cuts a classifier below the layers that are trained.

Everything below the first trained layer is computed once; `split_point` finds how far
up that reaches. Outputs of lower stages, and those of further bases, that a head reads
beside are computed once too: `pooled_below` names them.
"""

import math
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any

import keras

from keras_transfer.errors import UsageError
from keras_transfer.models.classifier import FEATURES, get_layer, pooled_outputs
from keras_transfer.models.fold import inputs_of, operations_of_base, outputs_of
from keras_transfer.models.layer_groups import can_change

PACKED = "_packed"
"""End of the name of the layer that joins what crosses a cut."""


def cut(
    model: keras.Model,
    split_point: str,
    beside: Sequence[str] = (),
    output: keras.KerasTensor | None = None,
) -> tuple[keras.Model, keras.Model]:
    """Cuts a model in two after a layer.

    Args:
        model: A model built by `build_base`, `join_bases` or `attach_head`.
        split_point: Name of the layer; the name of the input for a first part that
            passes pixels on unchanged.
        beside: Names of layers whose outputs `[N, D]` are read above the cut too.
        output: What the tail computes; None for the model's output.

    Returns:
        (extractor, tail): the models below and above the cut. The output of the first
        is the input of the second: that of the layer, or float32 `[N, K]` if there are
        several, each flattened. They share the model's weights.

    Raises:
        UsageError: If the layer does not exist, or layers above it read more than these
            outputs.
    """
    layer = get_layer(model, split_point)
    if split_point == FEATURES:
        tensors = pooled_outputs(model)
    else:
        tensors = [layer.output, *(get_layer(model, x).output for x in beside)]
    is_one = len(tensors) == 1
    rows = tensors[0] if is_one else pack(tensors, split_point + PACKED)
    extractor = keras.Model(model.input, rows, name=f"{model.name}_extractor")
    inputs = tensors[0] if is_one else tensors
    try:
        end = model.output if output is None else output
        tail = keras.Model(inputs, end, name=f"{model.name}_tail")
    except ValueError:
        raise UsageError(
            f"{model.name} cannot be cut at {split_point!r}: layers above it read more "
            "than its output."
        ) from None
    return extractor, tail if is_one else _of_rows(tail)


def pack(tensors: Sequence[keras.KerasTensor], name: str) -> keras.KerasTensor:
    """Joins tensors `[N, ...]` to rows `[N, K]`, each flattened.

    Args:
        tensors: Two or more tensors.
        name: Name of the layer that joins them.
    """
    flat = [keras.layers.Flatten()(x) if len(x.shape) > 2 else x for x in tensors]
    return keras.layers.Concatenate(name=name)(flat)


def unpack(rows: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """Takes rows `[N, K]` apart into tensors `[N, *shape]`, the inverse of `pack`."""
    ends = list(accumulate(math.prod(shape) for shape in shapes))
    return [
        keras.ops.reshape(rows[:, start:end], (-1, *shape))
        for start, end, shape in zip([0, *ends], ends, shapes, strict=False)
    ]


def _of_rows(tail: keras.Model) -> keras.Model:
    """Converts a model of several inputs to one of rows that hold all of them."""
    shapes = [tensor.shape[1:] for tensor in tail.inputs]
    rows = keras.Input((sum(map(math.prod, shapes)),), name="rows")
    # Unlike calling the model, this applies its layers one by one, and does not make
    # it a layer itself.
    return keras.Model(rows, tail.call(unpack(rows, shapes)), name=tail.name)


def split_point(model: keras.Model, unfrozen: Collection[keras.layers.Layer]) -> str:
    """Finds the highest layer after which a model can be cut below the given layers.

    A model can be cut after a layer if, of all outputs below the cut, only that layer's
    output is read above the cut. In other words, in topological order, no tensor that
    was written before the layer is read after it.

    Args:
        model: The classifier.
        unfrozen: Layers that must be above the cut.

    Returns:
        The layer's name; the name of the input if no layers with weights can be cut
        off.
    """
    above = [x for x in pooled_outputs(model) if _depends_on(model, x, unfrozen)]
    if not above and len(pooled_outputs(model)) > 1:
        return FEATURES
    operations = operations_of_base(keras.Model(model.input, above) if above else model)
    written = {
        id(tensor): i for i, op in enumerate(operations) for tensor in outputs_of(op)
    }
    last_read = dict.fromkeys(range(len(operations)), 0)
    for index, operation in enumerate(operations):
        for tensor in inputs_of(operation):
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
    # If only input scaling is below the cut, uint8 pixels take less space.
    below = keras.Model(model.input, operations[best].output).layers
    is_worth_it = any(can_change(layer) for layer in below if layer.weights)
    return operations[best if is_worth_it else 0].name


def pooled_below(
    model: keras.Model, split_point: str, unfrozen: Collection[keras.layers.Layer]
) -> list[str]:
    """Names the layers whose pooled outputs the head reads, and training cannot change.

    Args:
        model: The classifier.
        split_point: The layer that `split_point` found.
        unfrozen: The layers to train.

    Returns:
        The layers' names; none if the model is cut at its input, or at the features.
    """
    pooled = pooled_outputs(model)
    if split_point in (FEATURES, model.layers[0].name) or len(pooled) == 1:
        return []
    fixed = {id(x) for x in pooled if not _depends_on(model, x, unfrozen)}
    return [layer.name for layer in model.layers if id(layer.output) in fixed]


def _depends_on(
    model: keras.Model,
    tensor: keras.KerasTensor,
    layers: Collection[keras.layers.Layer],
) -> bool:
    """Returns whether a tensor depends on the weights of any of the layers."""
    below = keras.Model(model.input, tensor).layers
    return any(layer in layers for layer in below if layer.weights)
