"""Which layers are trained, where the frozen part ends, and a copy to train them in.

A base's layers form groups, stem, stage_1, stage_2, ..., and the head is a group too.
What is unfrozen is a run of groups from the head down. Everything below the first
unfrozen layer can be computed once; `split_point` finds how far up that reaches.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import keras

from keras_transfer.errors import UsageError
from keras_transfer.models.bases import Base
from keras_transfer.models.classifier import HEAD, POOL, get_layer
from keras_transfer.models.fold import (
    FoldedConvolution,
    Through,
    convolutions_to_fold,
    copy_layers,
    derive_from_weights,
    inputs_of,
    operations_of_base,
    outputs_of,
)

LayerGroups = dict[str, list[keras.layers.Layer]]
"""Group name to layers, from the input up; the last group is the head."""

_POLICIES = {"f32": "float32", "bf16": "mixed_bfloat16", "f16": "mixed_float16"}


def layer_groups(model: keras.Model, base: Base) -> LayerGroups:
    """All layers of a classifier by group: stem, stage_1, ..., head.

    A stage holds the layers that its last layer depends on and the stages below do
    not; every layer, and so every variable, is in exactly one group.

    Args:
        model: What `model.attach_head` returned.
        base: The row of its base.
    """
    groups: LayerGroups = {}
    taken: set[keras.layers.Layer] = set()
    for index, end in enumerate(base.stage_ends):
        layer = get_layer(model, end.removeprefix("before:"))
        tensor = layer.input if end.startswith("before:") else layer.output
        below = keras.Model(model.input, tensor).layers
        groups[f"stage_{index}"] = [x for x in below if x not in taken]
        taken.update(below)
    head = get_layer(model, HEAD)
    above = [x for x in model.layers if x not in taken and x is not head]
    groups[f"stage_{len(base.stage_ends)}"] = above
    return {"stem": groups.pop("stage_0"), **groups, HEAD: [head]}


def unfrozen_groups(model: keras.Model, base: Base, unfreeze: str) -> LayerGroups:
    """The layers to train, by group.

    Args:
        model: What `model.attach_head` returned.
        base: The row of its base.
        unfreeze: `top` (the last stage), `stages:N` (the last N), `all`, or
            `from:LAYER` (that layer and all that do not lie below it); the head is
            always trained.

    Raises:
        UsageError: If there are fewer stages, or there is no such layer.
    """
    groups = layer_groups(model, base)
    if unfreeze == f"from:{HEAD}":
        return {HEAD: groups[HEAD]}
    if unfreeze.startswith("from:"):
        layer = get_layer(model, unfreeze.removeprefix("from:"))
        frozen = {*keras.Model(model.input, layer.output).layers} - {layer}
        kept = {
            name: [layer for layer in layers if layer not in frozen]
            for name, layers in groups.items()
        }
        return {name: layers for name, layers in kept.items() if layers}
    if unfreeze == "all":
        return groups
    count = 1 if unfreeze == "top" else int(unfreeze.removeprefix("stages:"))
    names = list(groups)
    if count > len(names) - 2:
        raise UsageError(
            f"{base.name} has {len(names) - 2} stages above its stem. Received: "
            f"--unfreeze {unfreeze}. Use at most stages:{len(names) - 2}, or all."
        )
    return {name: groups[name] for name in names[-1 - count :]}


def split_point(model: keras.Model, unfrozen: Collection[keras.layers.Layer]) -> str:
    """The highest layer at which a model can be cut with all these layers above.

    A model can be cut above a layer if no layer above the cut reads what a layer
    below it wrote, other than that layer's output: in an order in which every layer
    comes after those it reads, nothing written before it is read after it.

    Returns:
        The layer's name; the input's, where nothing that has weights can be cut off.
    """
    operations = operations_of_base(model)
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
    # With nothing but scaling below, pixels are smaller to keep than scaled ones.
    below = keras.Model(model.input, operations[best].output).layers
    is_worth_it = any(_can_change(layer) for layer in below if layer.weights)
    return operations[best if is_worth_it else 0].name


@dataclass(frozen=True)
class TrainingCopy:
    """A copy of a tail made to be trained fast.

    Attributes:
        model: From what the tail reads to float32 `[N, num_classes]` logits.
        changed: Its variables that training changes, in the order of
            `changed_variables`.
    """

    model: keras.Model
    changed: Sequence[keras.Variable]


def training_copy(
    tail: keras.Model,
    unfrozen: Collection[keras.layers.Layer],
    train_bn: bool,
    precision: str,
    seed: int = 0,
) -> TrainingCopy:
    """Copies a tail for training; the tail itself stays as it is.

    In the copy only the unfrozen layers are trainable. BatchNormalization is not
    (unless `train_bn`): with `trainable=False` on each such layer, and nothing less,
    Keras 3 leaves its statistics alone. Where it normalizes a convolution's output
    it is folded into the convolution. Random layers that are frozen are left out.
    The head gives logits, so that a confident mistake still has a gradient.

    Args:
        tail: The upper part that `model.cut` returned.
        unfrozen: The layers to train.
        train_bn: Whether BatchNormalization is trained, statistics and all.
        precision: `f32`, `bf16` or `f16`: of the base's layers, the weights and the
            head staying float32.
        seed: Of random layers that have no seed of their own.
    """
    folded = {} if train_bn else convolutions_to_fold(tail)
    absorbed = set(folded.values())
    trained_leaves = {leaf for layer in unfrozen for leaf in _leaves(layer)}
    head_leaves = {*_leaves(get_layer(tail, HEAD))}
    copies: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []

    def copy_layer(layer: keras.layers.Layer) -> keras.layers.Layer:
        trained, in_head = layer in trained_leaves, layer in head_leaves
        stays_float32 = in_head or layer.name == POOL or not _can_change(layer)
        policy = "float32" if stays_float32 else _POLICIES[precision]
        if layer in absorbed or (not trained and _is_random(layer)):
            return Through(name=layer.name, dtype=policy)
        if layer in folded:
            copy = FoldedConvolution(layer, folded[layer], policy)
        elif hasattr(layer, "drop_path_rate"):
            # The same as a Dropout, but it draws from a generator of the whole process,
            # which has no seed and is in no checkpoint.
            copy = keras.layers.Dropout(
                layer.drop_path_rate,
                (None, *[1] * (len(layer.output.shape) - 1)),
                seed + len(copies),
                name=layer.name,
                dtype=policy,
            )
        else:
            config = {**layer.get_config(), "dtype": policy}
            if config.get("seed", seed) is None:
                config["seed"] = seed + len(copies)
            if in_head and config.get("activation") in ("softmax", "sigmoid"):
                config["activation"] = "linear"
            copy = layer.__class__.from_config(config)
        copy.trainable = trained and _can_change(layer, train_bn)
        copies.append((layer, copy))
        return copy

    model = copy_layers(tail, copy_layer)
    twins: dict[int, keras.Variable] = {}
    for layer, copy in copies:
        for variable, twin in zip(layer.weights, copy.weights, strict=True):
            twin.assign(variable)
            twins[id(variable)] = twin
        derive_from_weights(copy)
    changed = changed_variables(tail, unfrozen, train_bn)
    return TrainingCopy(model, [twins[id(variable)] for variable in changed])


def changed_variables(
    tail: keras.Model, unfrozen: Collection[keras.layers.Layer], train_bn: bool
) -> list[keras.Variable]:
    """The variables of a tail that training changes; see `training_copy`."""
    return [
        variable
        for layer in tail.layers
        if layer in unfrozen
        for leaf in _leaves(layer)
        if _can_change(leaf, train_bn)
        for variable in leaf.weights
    ]


def trained_layers(groups: LayerGroups, train_bn: bool) -> dict[str, list[str]]:
    """Group to the names of the layers in it that have weights to train."""
    return {
        group: [
            leaf.name
            for layer in members
            for leaf in _leaves(layer)
            if leaf.weights and _can_change(leaf, train_bn)
        ]
        for group, members in groups.items()
    }


def _leaves(layer: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """The layers in a layer that is a model itself, or else the layer."""
    if isinstance(layer, keras.Model):
        for inner in layer.layers:
            yield from _leaves(inner)
    else:
        yield layer


def _can_change(layer: keras.layers.Layer, train_bn: bool = True) -> bool:
    """Whether training can change a layer's weights, if it has any."""
    if isinstance(layer, (keras.layers.Rescaling, keras.layers.Normalization)):
        return False  # the base's input scaling
    return train_bn or not _is_bn(layer)


def _is_random(layer: keras.layers.Layer) -> bool:
    return hasattr(layer, "seed_generator") or hasattr(layer, "drop_path_rate")


def _is_bn(layer: keras.layers.Layer) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization)
