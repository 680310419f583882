"""Determines which layers to train, and copies a tail for training.

A base's layers form the groups stem, stage_1, stage_2, ..., and the head is a group
too. Consecutive groups, from the head down, are unfrozen.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import keras

from keras_transfer.errors import UsageError
from keras_transfer.models.bases import Base
from keras_transfer.models.classifier import (
    FEATURES,
    HEAD,
    POOL,
    STAGE_POOL,
    further_bases,
    get_layer,
    stage_end,
)
from keras_transfer.models.fold import (
    FoldedConvolution,
    Identity,
    convolutions_to_fold,
    copy_layers,
    derive_from_weights,
)

LayerGroups = dict[str, list[keras.layers.Layer]]
"""Layers by group name, from the input up; the last group is the head."""

_POLICIES = {"f32": "float32", "bf16": "mixed_bfloat16", "f16": "mixed_float16"}


def layer_groups(model: keras.Model, base: Base) -> LayerGroups:
    """Groups all layers of a classifier: stem, stage_1, ..., head.

    A stage consists of the layers that its last layer depends on and that are not part
    of a lower stage. Every layer, and so every variable, is in exactly one group, but
    for further bases: they stay frozen, and are in none.

    Args:
        model: A model built by `classifier.attach_head`.
        base: The row of its first base in the table.
    """
    groups: LayerGroups = {}
    taken: set[keras.layers.Layer] = set()
    for index, end in enumerate(base.stage_ends):
        below = keras.Model(model.input, stage_end(model, end)).layers
        groups[f"stage_{index}"] = [x for x in below if x not in taken]
        taken.update(below)
    head = get_layer(model, HEAD)
    taken.update({head, *further_bases(model)})
    above = [x for x in model.layers if x not in taken]
    groups[f"stage_{len(base.stage_ends)}"] = above
    return {"stem": groups.pop("stage_0"), **groups, HEAD: [head]}


def unfrozen_groups(model: keras.Model, base: Base, unfreeze: str) -> LayerGroups:
    """Selects the layers to train, by group.

    Args:
        model: A model built by `classifier.attach_head`.
        base: The row of its base in the table.
        unfreeze: `top` (the last stage), `stages:N` (the last N stages), `all`, or
            `from:LAYER` (that layer and all layers that it does not depend on). The
            head is always included.

    Raises:
        UsageError: If the base has fewer stages, or the layer does not exist or
            belongs to a further base.
    """
    groups = layer_groups(model, base)
    if unfreeze == f"from:{HEAD}":
        return {HEAD: groups[HEAD]}
    if unfreeze.startswith("from:"):
        layer = get_layer(model, unfreeze.removeprefix("from:"))
        for further in further_bases(model):
            if layer.name in (further.name, f"{POOL}_{further.name}"):
                raise UsageError(
                    "Only the first base is fine-tuned, others stay frozen. Received: "
                    f"unfreeze={unfreeze}. Name a layer of {base.name}."
                )
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
            f"unfreeze={unfreeze}. Use at most stages:{len(names) - 2}, or all."
        )
    return {name: groups[name] for name in names[-1 - count :]}


@dataclass(frozen=True)
class TrainingCopy:
    """A copy of a tail that can be trained fast.

    Attributes:
        model: Model from the tail's input to float32 `[N, num_classes]` logits.
        changed: The model's variables that training changes, in the order of
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
    """Copies a tail for training; the tail itself is not changed.

    In the copy, only the unfrozen layers are trainable. BatchNormalization is not,
    unless `train_bn` is set: Keras 3 leaves its statistics unchanged only if
    `trainable=False` is set on each such layer. Unless it is trained,
    BatchNormalization is folded into the convolution that precedes it, if any. Random
    layers that are frozen are replaced by identities. The head returns logits, so that
    a confident mistake still has a gradient.

    Args:
        tail: The upper part returned by `classifier.cut`.
        unfrozen: The layers to train.
        train_bn: Whether to train BatchNormalization, including its statistics.
        precision: Arithmetic of the base's layers: `f32`, `bf16` or `f16`. The weights
            and the head remain float32.
        seed: Seed of random layers that do not have their own.
    """
    folded = {} if train_bn else convolutions_to_fold(tail)
    absorbed = set(folded.values())
    trained_leaves = {leaf for layer in unfrozen for leaf in _leaves(layer)}
    head_leaves = {*_leaves(get_layer(tail, HEAD))}
    copies: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []

    def copy_layer(layer: keras.layers.Layer) -> keras.layers.Layer:
        trained, in_head = layer in trained_leaves, layer in head_leaves
        is_pool = layer.name in (POOL, FEATURES) or layer.name.startswith(STAGE_POOL)
        stays_float32 = in_head or is_pool or not can_change(layer)
        policy = "float32" if stays_float32 else _POLICIES[precision]
        if layer in absorbed or (not trained and _is_random(layer)):
            return Identity(name=layer.name, dtype=policy)
        if layer in folded:
            copy = FoldedConvolution(layer, folded[layer], policy)
        else:
            copy = _same_layer(layer, policy, in_head, seed + len(copies))
        copy.trainable = trained and can_change(layer, train_bn)
        copies.append((layer, copy))
        return copy

    model = copy_layers(tail, copy_layer)
    twins = _take_weights(copies)
    changed = changed_variables(tail, unfrozen, train_bn)
    return TrainingCopy(model, [twins[id(variable)] for variable in changed])


def _same_layer(
    layer: keras.layers.Layer, policy: str, gives_logits: bool, seed: int
) -> keras.layers.Layer:
    """Builds a layer again in another precision, without its weights."""
    if hasattr(layer, "drop_path_rate"):
        # Stochastic depth is equivalent to this Dropout, but draws from a global
        # generator that is neither seeded nor part of a checkpoint.
        return keras.layers.Dropout(
            layer.drop_path_rate,
            (None, *[1] * (len(layer.output.shape) - 1)),
            seed,
            name=layer.name,
            dtype=policy,
        )
    config = {**layer.get_config(), "dtype": policy}
    if config.get("seed", seed) is None:
        config["seed"] = seed
    if gives_logits and config.get("activation") in ("softmax", "sigmoid"):
        config["activation"] = "linear"
    return layer.__class__.from_config(config)


def _take_weights(
    copies: Sequence[tuple[keras.layers.Layer, keras.layers.Layer]],
) -> dict[int, keras.Variable]:
    """Copies weights; returns a mapping from the id of each to its copy."""
    twins: dict[int, keras.Variable] = {}
    for layer, copy in copies:
        for variable, twin in zip(layer.weights, copy.weights, strict=True):
            twin.assign(variable)
            twins[id(variable)] = twin
        derive_from_weights(copy)
    return twins


def changed_variables(
    tail: keras.Model, unfrozen: Collection[keras.layers.Layer], train_bn: bool
) -> list[keras.Variable]:
    """Lists the variables of a tail that training changes; see `training_copy`."""
    return [
        variable
        for layer in tail.layers
        if layer in unfrozen
        for leaf in _leaves(layer)
        if can_change(leaf, train_bn)
        for variable in leaf.weights
    ]


def trained_layers(groups: LayerGroups, train_bn: bool) -> dict[str, list[str]]:
    """Lists the names of the layers that have weights to train, by group."""
    return {
        group: [
            leaf.name
            for layer in members
            for leaf in _leaves(layer)
            if leaf.weights and can_change(leaf, train_bn)
        ]
        for group, members in groups.items()
    }


def _leaves(layer: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """Yields the layers inside a nested model, or else the layer itself."""
    if isinstance(layer, keras.Model):
        for inner in layer.layers:
            yield from _leaves(inner)
    else:
        yield layer


def can_change(layer: keras.layers.Layer, train_bn: bool = True) -> bool:
    """Returns whether training can change a layer's weights, if it has any."""
    if isinstance(layer, (keras.layers.Rescaling, keras.layers.Normalization)):
        return False  # the base's input scaling
    return train_bn or not _is_bn(layer)


def _is_random(layer: keras.layers.Layer) -> bool:
    return hasattr(layer, "seed_generator") or hasattr(layer, "drop_path_rate")


def _is_bn(layer: keras.layers.Layer) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization)
