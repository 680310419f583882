"""What is unfrozen, where the frozen part ends, and what training changes."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.applications.convnext import StochasticDepth
from test_bases import (
    EVERY_BASE_IN_TIME,
    FAMILIES_IN_TIME,
    PATCHES,
    stage_ends,
    without_weights,
)

from keras_transfer.config import HeadConfig
from keras_transfer.errors import UsageError
from keras_transfer.models.bases import BASES, get_base
from keras_transfer.models.classifier import (
    HEAD,
    POOL,
    attach_head,
    build_base,
    build_head,
)
from keras_transfer.models.cut import cut, split_point
from keras_transfer.models.fold import FoldedConvolution
from keras_transfer.models.layer_groups import (
    changed_variables,
    layer_groups,
    trained_layers,
    training_copy,
    unfrozen_groups,
)
from keras_transfer.training.optim import (
    LayerwiseAdamW,
    group_multipliers,
    layer_patterns,
)

BN = keras.layers.BatchNormalization
NUM_CLASSES = 3


def with_head(base: keras.Model, multi_label: bool = False, **config) -> keras.Model:
    head = build_head(
        HeadConfig(**config), base.output_shape[1], NUM_CLASSES, multi_label
    )
    return attach_head(base, head)


def layers_of(groups) -> set[keras.layers.Layer]:
    return {layer for layers in groups.values() for layer in layers}


def ids(layers) -> set[int]:
    """Of all variables of layers, or of a model."""
    layers = [layers] if isinstance(layers, keras.Model) else layers
    return {id(variable) for layer in layers for variable in layer.weights}


def beneath(layer: keras.layers.Layer) -> set[keras.Operation]:
    """Everything that a layer's output depends on, by Keras's records."""
    found: set[keras.Operation] = set()
    left = [layer]
    while left:
        for node in left.pop()._inbound_nodes:
            for tensor in node.input_tensors:
                operation = tensor._keras_history.operation
                if operation not in found:
                    found.add(operation)
                    left.append(operation)
    return found


def is_nasnet(base) -> bool:
    return "NASNet" in base.name  # each of its cells reads the two before it


# Groups and where they are cut, of every base


@pytest.fixture(scope="module", params=BASES, ids=lambda base: base.name)
def bare(request):
    """(base, classifier whose base has no values), one of every base."""
    return request.param, with_head(without_weights(request.param))


def test_every_variable_is_in_one_group_and_none_reads_a_higher_one(bare):
    base, model = bare
    groups = layer_groups(model, base)
    stages = [f"stage_{i}" for i in range(1, len(base.stage_ends) + 1)]
    assert list(groups) == ["stem", *stages, "head"]
    assert groups[HEAD] == [model.get_layer(HEAD)]

    layers = [layer for members in groups.values() for layer in members]
    assert len(layers) == len(set(layers)) == len(model.layers)
    assert set(layers) == set(model.layers)
    variables = [id(v) for layer in layers for v in layer.weights]
    assert sorted(variables) == sorted({id(v) for v in model.weights})
    assert all(ids(members) for members in groups.values())

    height = {x: i for i, members in enumerate(groups.values()) for x in members}
    for layer in layers:
        for node in layer._inbound_nodes[:1] if layer.name != HEAD else []:
            for tensor in node.input_tensors:
                read = tensor._keras_history.operation
                assert height.get(read, 0) <= height[layer]
    ends = [model.get_layer(end) for end in stage_ends(model, base)]
    assert [height[end] for end in ends] == list(range(len(ends)))


def test_a_cut_leaves_unfrozen_groups_above_and_frozen_ones_below(bare):
    base, model = bare
    groups = layer_groups(model, base)
    names = list(groups)
    stages = len(base.stage_ends)
    expected = {f"stages:{n}": names[-1 - n :] for n in range(1, stages + 1)}
    expected |= {"top": names[-2:], "all": names}
    for unfreeze, kept in expected.items():
        unfrozen = unfrozen_groups(model, base, unfreeze)
        assert unfrozen == {name: groups[name] for name in kept}
        if unfreeze != "top":  # which is the same as stages:1
            check_cut(model, base, layers_of(unfrozen), exact=not is_nasnet(base))


def test_from_a_layer_all_that_it_does_not_depend_on_is_unfrozen(bare):
    base, model = bare
    weighted = [layer for layer in model.layers if layer.weights]
    for share in (0.0, 0.5, 0.8):
        layer = weighted[int(share * len(weighted))]
        groups = unfrozen_groups(model, base, f"from:{layer.name}")
        unfrozen = layers_of(groups)
        assert layer in unfrozen
        assert unfrozen == set(model.layers) - beneath(layer)
        assert list(groups)[-1] == HEAD
        whole = layer_groups(model, base)
        assert list(groups) == [name for name in whole if name in groups]
        for name, members in groups.items():
            assert members == [x for x in whole[name] if x in unfrozen] != []
        check_cut(model, base, unfrozen, exact=False)


def check_cut(model, base, unfrozen, exact: bool) -> None:
    """That the split point separates what it should; frozen layers below if exact."""
    point = split_point(model, unfrozen)
    extractor, tail = cut(model, point)
    assert not ids(unfrozen) & ids(extractor)
    assert ids(unfrozen) <= ids(tail)
    assert ids(extractor) | ids(tail) == ids(model)
    assert not ids(extractor) & ids(tail)
    if exact:
        frozen = [layer for layer in model.layers if layer not in unfrozen]
        left = [x for x in frozen if ids([x]) & ids(tail)]
        assert not [x for x in left if not isinstance(x, BN)]
    elif not is_nasnet(base):
        assert ids(extractor) or point == "image"


@pytest.mark.parametrize(
    ("name", "unfreeze"),
    [
        ("MobileNetV2", "stages:2"),
        ("MobileNetV2", "from:block_14_depthwise"),
        pytest.param(
            "ResNet50", "from:conv5_block1_2_conv", marks=pytest.mark.families
        ),
        ("VGG16", "from:block3_conv2"),
        pytest.param("Xception", "stages:3", marks=pytest.mark.families),
        ("ConvNeXtTiny", "from:convnext_tiny_stage_2_block_3_pointwise_conv_1"),
    ],
)
def test_no_higher_cut_is_possible(name, unfreeze):
    base = get_base(name)
    model = with_head(without_weights(base))
    unfrozen = layers_of(unfrozen_groups(model, base, unfreeze))
    possible = {}
    for layer in model.layers:
        if unfrozen & {layer, *beneath(layer)}:
            continue
        try:
            extractor, _ = cut(model, layer.name)
        except UsageError:
            continue
        assert not unfrozen & set(extractor.layers)
        possible[layer.name] = len(extractor.operations)
    point = split_point(model, unfrozen)
    assert point == max(possible, key=lambda name: possible[name])
    assert len(possible) > 1


@pytest.mark.parametrize(
    ("name", "unfreeze", "expected"),
    [
        ("MobileNetV2", "top", "block_12_add"),
        ("MobileNetV2", "all", "image"),
        ("MobileNetV2", "from:Conv1", "image"),  # scaling alone is not kept
        ("MobileNetV2", "from:bn_Conv1", "Conv1"),
        ("MobileNetV2", "from:block_15_add", "block_14_add"),
        ("MobileNetV2", "from:pool", "out_relu"),
        ("MobileNetV2", "from:head", POOL),
        ("ResNet50", "stages:2", "conv3_block4_out"),
        ("ResNet50V2", "top", "conv4_block6_out"),
        ("VGG16", "from:block5_conv3", "block5_conv2"),
    ],
)
def test_where_the_frozen_part_ends(name, unfreeze, expected):
    base = get_base(name)
    model = with_head(without_weights(base))
    unfrozen = layers_of(unfrozen_groups(model, base, unfreeze))
    assert split_point(model, unfrozen) == expected


@pytest.mark.parametrize("name", ["MobileNetV2", "InceptionV3", "VGG16"])
def test_more_stages_than_there_are_are_refused(name):
    base = get_base(name)
    model = with_head(without_weights(base))
    count = len(base.stage_ends)
    assert len(unfrozen_groups(model, base, f"stages:{count}")) == count + 1
    for number in (count + 1, 99):
        with pytest.raises(UsageError) as caught:
            unfrozen_groups(model, base, f"stages:{number}")
        assert f"Received: unfreeze=stages:{number}." in str(caught.value)
        assert f"Use at most stages:{count}, or all." in str(caught.value)
        assert name in str(caught.value)


def test_an_unknown_layer_brings_up_the_nearest():
    base = get_base("MobileNetV2")
    model = with_head(without_weights(base))
    with pytest.raises(UsageError) as caught:
        unfrozen_groups(model, base, "from:blok_14_add")
    assert "Received: 'blok_14_add'. Did you mean 'block_14_add'?" in str(caught.value)


# Training copies, of a base of every family

SIZES = {
    **PATCHES,
    "alexnet": 64,
    "alexnet_fc7": 224,
    "InceptionResNetV2": 75,
    "InceptionV3": 75,
    "Xception": 71,
}
SLOW_TO_TRACE = ("InceptionResNetV2", "NASNetMobile", "EfficientNetV2B0")


def randomize_normalization(model: keras.Model, rows: np.ndarray) -> None:
    """Gives BatchNormalization values that count, yet keep rows apart to the end."""
    rng = np.random.default_rng(1)
    layers = [layer for layer in model.layers if isinstance(layer, BN)]
    for layer in layers:
        for variable in layer.weights:
            low, high = {"gamma": (0.7, 1.5), "beta": (-0.3, 0.3)}.get(
                variable.name, (1, 1)
            )
            variable.assign(rng.uniform(low, high, variable.shape))
        layer.trainable, layer.momentum = True, 0.0
    model(rows, training=True)  # which sets the statistics to those of the rows
    for layer in layers:
        layer.trainable, layer.momentum = False, 0.99
        mean, variance = layer.moving_mean, layer.moving_variance
        noise = rng.uniform(-0.3, 0.3, mean.shape)
        mean.assign(mean + noise * keras.ops.sqrt(variance))
        variance.assign(variance * rng.uniform(0.5, 2, mean.shape) + 1e-3)


def random_rows(shape, count: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, (count, *shape[1:])).astype("f4")


def one_hot(count: int) -> np.ndarray:
    return np.eye(NUM_CLASSES, dtype=np.float32)[np.arange(count) % NUM_CLASSES]


def classifier(base, size: int) -> keras.Model:
    """A base with random weights, normalization included, and a head."""
    model = with_head(build_base(base, "none", size, 0))
    randomize_normalization(model, random_pixels(model, 8))
    return model


def random_pixels(model: keras.Model, count: int) -> np.ndarray:
    """Noise of different colors and contrasts."""
    rng = np.random.default_rng(3)
    shape = (count, *model.input_shape[1:])
    pixels = rng.uniform(0, 255, shape) * rng.uniform(0.1, 1, (count, 1, 1, 3))
    return pixels.astype(np.float32)


def rows_at(model: keras.Model, point: str, count: int) -> np.ndarray:
    """Random images as they are at a split point."""
    pixels = random_pixels(model, count)
    return np.asarray(cut(model, point)[0](pixels, training=False))


@pytest.fixture(scope="module", params=FAMILIES_IN_TIME)
def network(request):
    """(base, classifier), one of every family."""
    keras.utils.clear_session()
    return request.param, classifier(request.param, SIZES.get(request.param.name, 48))


def values(weights) -> list[np.ndarray]:
    return [variable.numpy() for variable in weights]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> list[bool]:
    return [a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True)]


def check_training(base, model, unfreeze: str, train_bn=False, precision="f32"):
    """That training changes what it says, and nothing else; returns the copy."""
    groups = unfrozen_groups(model, base, unfreeze)
    unfrozen = layers_of(groups)
    point = split_point(model, unfrozen)
    tail = cut(model, point)[1]
    rows = rows_at(model, point, 8)
    model_before = values(model.weights)
    copy = training_copy(tail, unfrozen, train_bn, precision)
    originals = changed_variables(tail, unfrozen, train_bn)
    assert len(originals) == len(copy.changed) > 0
    assert all(same(values(originals), values(copy.changed)))

    before = values(copy.model.weights)
    losses = train(copy, groups, rows, train_bn)
    assert np.isfinite(losses).all()
    changed = {id(variable) for variable in copy.changed}
    weights = copy.model.weights
    assert changed <= {id(variable) for variable in weights}
    did_change = [not is_same for is_same in same(before, values(weights))]
    paths = [(v.path, id(v) in changed) for v in weights]
    assert paths == [(v.path, new) for v, new in zip(weights, did_change, strict=True)]
    assert all(same(model_before, values(model.weights)))
    return copy


def train(copy, groups, rows, train_bn: bool = False) -> list[float]:
    """Four steps, with a rate for every group; the losses."""
    rates = group_multipliers(list(groups), 0.5)
    names = trained_layers(groups, train_bn)
    copy.model.compile(
        LayerwiseAdamW(1e-3, layer_patterns(names, rates), weight_decay=0.1),
        keras.losses.CategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    targets = one_hot(len(rows))
    log = copy.model.fit(rows, targets, batch_size=4, epochs=2, verbose=0)
    return log.history["loss"]


def test_a_copy_computes_what_the_tail_does(network):
    base, model = network
    for unfreeze in ("all", "top"):
        unfrozen = layers_of(unfrozen_groups(model, base, unfreeze))
        point = split_point(model, unfrozen)
        tail = cut(model, point)[1]
        rows = rows_at(model, point, 4)
        copy = training_copy(tail, unfrozen, train_bn=False, precision="f32")
        logits = np.asarray(copy.model(rows, training=False))
        assert logits.dtype == np.float32
        assert copy.model.input_shape == tail.input_shape
        expected = np.log(np.asarray(tail(rows, training=False), np.float64))
        # log(softmax(x)) is x less something that is the same for all classes
        logits = logits - logits.mean(1, keepdims=True)
        expected = expected - expected.mean(1, keepdims=True)
        assert np.ptp(expected, axis=0).max() > 1e-2
        size = np.abs(expected).max()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * size)


def test_training_changes_the_unfrozen_variables_only(network):
    base, model = network
    unfreeze = "top" if base.name in SLOW_TO_TRACE else "stages:2"
    copy = check_training(base, model, unfreeze)
    moving = [v for v in copy.model.weights if v.name.startswith("moving_")]
    assert not {id(v) for v in moving} & {id(v) for v in copy.changed}
    # Those that no convolution could take up are still there, and did not move.
    if base.name in ("DenseNet121", "ResNet50V2", "NASNetMobile"):
        assert moving


@pytest.mark.parametrize(
    ("name", "count"), [("MobileNetV2", 52), ("ResNet50", 53), ("InceptionV3", 94)]
)
def test_every_normalization_of_these_is_folded(name, count):
    base = get_base(name)
    model = classifier(base, 75)
    assert sum(isinstance(layer, BN) for layer in model.layers) == count
    copy = training_copy(model, set(model.layers), train_bn=False, precision="f32")
    kinds = [type(layer) for layer in copy.model.layers]
    assert kinds.count(FoldedConvolution) == count
    assert kinds.count(BN) == 0


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("MobileNetV2", "block_14_depthwise"),
        pytest.param("ResNet50", "conv5_block2_2_conv", marks=pytest.mark.families),
        pytest.param("DenseNet121", "conv5_block15_2_conv", marks=pytest.mark.families),
        ("EfficientNetB0", "block7a_se_expand"),
    ],
)
def test_frozen_layers_above_the_cut_stay_as_they_are(name, layer):
    base = get_base(name)
    model = classifier(base, 64)
    unfrozen = layers_of(unfrozen_groups(model, base, f"from:{layer}"))
    tail = cut(model, split_point(model, unfrozen))[1]
    frozen = [x for x in tail.layers if x not in unfrozen and x.weights]
    assert [x for x in frozen if not isinstance(x, BN)]
    check_training(base, model, f"from:{layer}")


@pytest.mark.parametrize(
    "name", ["MobileNetV2", pytest.param("DenseNet121", marks=pytest.mark.families)]
)
def test_normalization_is_trained_when_asked(name):
    base = get_base(name)
    model = classifier(base, 64)
    unfrozen = layers_of(unfrozen_groups(model, base, "top"))
    copy = check_training(base, model, "top", train_bn=True)
    names = [variable.name for variable in copy.changed]
    normalized = sum(isinstance(layer, BN) for layer in unfrozen)
    assert normalized > 10
    for kind in ("gamma", "beta", "moving_mean", "moving_variance"):
        assert names.count(kind) == normalized
    assert not any(isinstance(x, FoldedConvolution) for x in copy.model.layers)


def test_frozen_normalization_does_not_move_where_others_are_trained():
    base = get_base("ResNet50V2")
    model = classifier(base, 64)
    copy = check_training(base, model, "from:conv5_block2_2_conv", train_bn=True)
    changed = {id(variable) for variable in copy.changed}
    moving = [v for v in copy.model.weights if v.name.startswith("moving_")]
    assert {id(v) in changed for v in moving} == {True, False}


@pytest.mark.long
def test_everything_can_be_trained_from_the_pixels_up():
    base = get_base("MobileNetV3Small")  # which scales its input itself
    model = classifier(base, 48)
    check_training(base, model, "all")


def test_changed_variables_are_those_that_training_changes():
    base = get_base("EfficientNetB0")  # whose input scaling has variables
    model = with_head(without_weights(base))
    unfrozen = layers_of(unfrozen_groups(model, base, "all"))
    changed = changed_variables(model, unfrozen, train_bn=True)
    names = [variable.path for variable in changed]
    assert not [name for name in names if name.startswith("normalization")]


@pytest.mark.parametrize(
    "name",
    [
        "MobileNetV2",
        pytest.param("ConvNeXtTiny", marks=pytest.mark.families),
        pytest.param("ResNet50V2", marks=pytest.mark.families),
    ],
)
def test_bf16_is_used_for_layers_but_not_for_variables_or_logits(name):
    base = get_base(name)
    model = classifier(base, 48)
    unfrozen = layers_of(unfrozen_groups(model, base, "stages:2"))
    point = split_point(model, unfrozen)
    tail = cut(model, point)[1]
    rows = rows_at(model, point, 4)
    copies = {p: training_copy(tail, unfrozen, False, p) for p in ("f32", "bf16")}
    logits = {p: np.asarray(c.model(rows, training=False)) for p, c in copies.items()}
    assert {str(v.dtype) for v in copies["bf16"].model.weights} == {"float32"}
    assert logits["bf16"].dtype == np.float32
    difference = np.abs(logits["bf16"] - logits["f32"]).max()
    assert 1e-6 < difference < 0.05 * np.abs(logits["f32"]).max()
    used = {layer.name: layer.compute_dtype for layer in copies["bf16"].model.layers}
    assert used[POOL] == used[HEAD] == "float32"
    inner = [x for x in copies["bf16"].model._flatten_layers() if x._layers == []]
    head = [*copies["bf16"].model.get_layer(HEAD)._flatten_layers()]
    others = [x.name for x in inner if x.weights and x not in head]
    assert len(others) > 10
    exact = [x.name for x in inner if x.name in others and x.compute_dtype == "float32"]
    assert exact == []
    check_training(base, model, "stages:2", precision="bf16")


def test_a_folded_kernel_is_rounded_once():
    convolution, norm = keras.layers.Conv2D(5, 1, use_bias=False), BN(center=False)
    keras.Sequential([keras.Input((1, 1, 64)), convolution, norm])
    scale = np.linspace(1, 2, 5, dtype="f4")
    norm.set_weights([scale, np.zeros(5), np.ones(5) - norm.epsilon])
    kernel = random_rows((None, 1, 64, 5), 1)
    convolution.set_weights([kernel])
    folded = FoldedConvolution(convolution, norm, "mixed_bfloat16")
    folded.weights[0].assign(convolution.kernel)
    # Each row picks one weight of every filter: no sum is rounded.
    outputs = folded(np.eye(64, dtype="f4")[:, None, None, :])
    exact = tf.cast(kernel[0, 0] * scale, tf.bfloat16)
    np.testing.assert_array_equal(outputs[:, 0, 0, :], exact)


def test_scaling_of_pixels_stays_exact_in_bf16():
    base = get_base("MobileNetV2")
    model = classifier(base, 48)
    copy = training_copy(model, set(model.layers), False, "bf16").model
    assert copy.get_layer("scaling").compute_dtype == "float32"
    assert copy.get_layer("Conv1").compute_dtype == "bfloat16"


# Training copies of small tails


def small_tail(build, head=None) -> keras.Model:
    """A tail of 6x6x4 rows, layers that `build` adds, pooling and a head."""
    rows = keras.Input((6, 6, 4), name="rows")
    features = keras.layers.GlobalAveragePooling2D(name=POOL)(build(rows))
    head = head or build_head(HeadConfig(), features.shape[-1], NUM_CLASSES, False)
    model = keras.Model(rows, head(features))
    randomize_normalization(model, random_rows(model.input_shape, 8))
    return model


def conv(name: str, **options) -> keras.layers.Conv2D:
    return keras.layers.Conv2D(5, 3, padding="same", name=name, **options)


def copy_of(tail: keras.Model, frozen=(), **options) -> keras.Model:
    unfrozen = {layer for layer in tail.layers if layer.name not in frozen}
    arguments = {"train_bn": False, "precision": "f32", **options}
    return training_copy(tail, unfrozen, **arguments).model


def is_folded(copy: keras.Model, name: str) -> bool:
    return isinstance(copy.get_layer(name), FoldedConvolution)


def assert_same_function(tail: keras.Model, copy: keras.Model) -> None:
    rows = random_rows(tail.input_shape, 4)
    probabilities = keras.ops.softmax(copy(rows, training=False))
    np.testing.assert_allclose(probabilities, tail(rows, training=False), rtol=1e-4)


def test_a_convolution_is_folded_if_normalization_alone_reads_it():
    def read_by_one(x):
        return BN()(conv("c")(x))

    def read_by_two(x):
        x = conv("c")(x)
        return keras.layers.Add()([BN()(x), x])

    def read_by_two_normalizations(x):
        x = conv("c")(x)
        return keras.layers.Add()([BN()(x), BN()(x)])

    def activated(x):
        return BN()(conv("c", activation="relu")(x))

    def activated_between(x):
        return BN()(keras.layers.ReLU()(conv("c")(x)))

    def normalized_before(x):
        return conv("c")(BN()(x))

    def read_by_an_operation_too(x):
        x = conv("c")(x)
        return BN()(x) + keras.ops.flip(x, axis=1)

    folded = {}
    for build in (
        read_by_one,
        read_by_two,
        read_by_two_normalizations,
        activated,
        activated_between,
        normalized_before,
        read_by_an_operation_too,
    ):
        tail = small_tail(build)
        copy = copy_of(tail)
        assert_same_function(tail, copy)
        folded[build.__name__] = is_folded(copy, "c")
    assert [name for name, is_so in folded.items() if is_so] == ["read_by_one"]


@pytest.mark.parametrize("noise", ["frozen", "unfrozen"])
@pytest.mark.parametrize(
    "layer",
    [
        keras.layers.Dropout(0.5, name="noise"),
        keras.layers.Dropout(0.5, noise_shape=(None, 1, 1, 1), name="noise"),
        keras.layers.SpatialDropout2D(0.5, name="noise"),
        keras.layers.GaussianNoise(1.0, name="noise"),
        StochasticDepth(0.5, name="noise"),
    ],
    ids=["Dropout", "of images", "SpatialDropout2D", "GaussianNoise", "ConvNeXt"],
)
def test_random_layers_are_active_where_they_are_unfrozen(layer, noise):
    tail = small_tail(lambda x: conv("b")(layer(conv("a")(x))))
    frozen = ("a", "noise") if noise == "frozen" else ()
    copy = copy_of(tail, frozen=frozen, seed=1)
    assert_same_function(tail, copy)
    rows = random_rows(tail.input_shape, 16)
    state = values(copy.variables)
    plain = np.asarray(copy(rows, training=False))
    first, second = (np.asarray(copy(rows, training=True)) for _ in range(2))
    if noise == "frozen":
        np.testing.assert_allclose(first, plain, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(second, plain, rtol=1e-5, atol=1e-6)
    else:
        assert np.abs(first - plain).max() > 1e-2
        assert np.abs(first - second).max() > 1e-2
        # It is the same for the same seed, and goes on from what a checkpoint holds.
        again, other = (copy_of(tail, frozen=frozen, seed=seed) for seed in (1, 2))
        np.testing.assert_array_equal(again(rows, training=True), first)
        assert np.abs(other(rows, training=True) - first).max() > 1e-2
        for variable, value in zip(again.variables, state, strict=True):
            variable.assign(value)
        np.testing.assert_array_equal(again(rows, training=True), first)


def test_dropout_of_a_base_is_active_where_it_is_unfrozen():
    base = get_base("EfficientNetB0")
    model = classifier(base, 48)
    unfrozen = layers_of(unfrozen_groups(model, base, "from:block6d_add"))
    tail = cut(model, "block6b_add")[1]
    drops = {x.name: x in unfrozen for x in tail.layers if x.name.endswith("_drop")}
    assert drops == {"block6c_drop": False, "block6d_drop": False}
    rows = rows_at(model, "block6b_add", 8)
    for trained in (False, True):
        layers = set(tail.layers) if trained else unfrozen
        copy = training_copy(tail, layers, False, "f32").model
        one = np.asarray(copy(rows, training=False))
        other = np.asarray(copy(rows, training=True))
        assert np.allclose(one, other, rtol=1e-5, atol=1e-6) != trained


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_head_gives_logits_of_its_probabilities(kind, multi_label):
    config = HeadConfig(kind=kind, hidden=(7,), dropout=0.5)
    head = build_head(config, 5, NUM_CLASSES, multi_label)
    tail = small_tail(lambda x: BN()(conv("c")(x)), head)
    copy = copy_of(tail)
    rows = 5 * random_rows(tail.input_shape, 8)
    logits = np.asarray(copy(rows, training=False))
    to_probabilities = keras.ops.sigmoid if multi_label else keras.ops.softmax
    expected = np.asarray(tail(rows, training=False))
    np.testing.assert_allclose(to_probabilities(logits), expected, rtol=1e-4)
    assert not np.allclose(logits, expected)
    hidden = np.asarray(copy(rows, training=True))
    assert np.allclose(hidden, logits, atol=1e-5) == (kind == "linear")
    probabilities = tail.get_layer(HEAD).get_layer("probabilities")
    assert probabilities.activation is not keras.activations.linear


def test_a_confident_mistake_still_has_a_gradient():
    tail = small_tail(conv("c"))
    tail.get_layer(HEAD).get_layer("probabilities").bias.assign([200.0, 0.0, 0.0])
    copy = copy_of(tail)
    rows = random_rows(tail.input_shape, 4)
    targets = np.eye(3, dtype=np.float32)[[1, 1, 2, 2]]
    with tf.GradientTape() as tape:
        loss = keras.losses.categorical_crossentropy(
            targets, copy(rows, training=True), from_logits=True
        )
    gradient = tape.gradient(loss, copy.get_layer("c").trainable_variables[0].value)
    assert np.abs(gradient).max() > 1e-3


def test_only_unfrozen_layers_are_trainable():
    def build(x):
        x = BN(name="alone")(conv("b")(BN()(conv("a")(x))))
        return conv("d")(keras.layers.ReLU()(BN(name="other")(x)))

    tail = small_tail(build)
    tail.trainable = False
    paths = {
        (tuple(frozen), train_bn): [
            variable.path
            for variable in copy_of(
                tail, frozen=frozen, train_bn=train_bn
            ).trainable_variables
        ]
        for frozen in ([], ["a", "b"])
        for train_bn in (False, True)
    }
    head = ["probabilities/kernel", "probabilities/bias"]
    a, b, d = ([f"{x}/kernel", f"{x}/bias"] for x in "abd")
    assert paths[(), False] == [*a, *b, *d, *head]
    assert paths[("a", "b"), False] == [*d, *head]
    assert paths[("a", "b"), True][-4:] == [*d, *head]
    assert "b/kernel" not in paths[("a", "b"), True]
    assert "other/gamma" in paths[("a", "b"), True]
    assert not tail.trainable_variables


LAYERS = keras.layers
CONVOLUTIONS = {
    "3x3": lambda: LAYERS.Conv2D(5, 3),
    "no bias": lambda: LAYERS.Conv2D(5, 3, use_bias=False),
    "strides": lambda: LAYERS.Conv2D(5, 3, strides=2, padding="same"),
    "two strides": lambda: LAYERS.Conv2D(5, (3, 2), strides=(2, 1), use_bias=False),
    "dilation": lambda: LAYERS.Conv2D(5, 3, dilation_rate=2, padding="same"),
    "7x1": lambda: LAYERS.Conv2D(5, (7, 1), padding="same", use_bias=False),
    "1x1": lambda: LAYERS.Conv2D(5, 1, use_bias=False),
    "1x1 bias": lambda: LAYERS.Conv2D(5, 1),
    "1x1 strides": lambda: LAYERS.Conv2D(5, 1, strides=2),
    "1x1 strides same": lambda: LAYERS.Conv2D(5, 1, strides=2, padding="same"),
    "depthwise": lambda: LAYERS.DepthwiseConv2D(3, use_bias=False),
    "depthwise 2": lambda: LAYERS.DepthwiseConv2D(3, depth_multiplier=2),
    "depthwise 1x1": lambda: LAYERS.DepthwiseConv2D(1, padding="same"),
    "depthwise strides": lambda: LAYERS.DepthwiseConv2D(
        3, strides=2, padding="same", depth_multiplier=2, use_bias=False
    ),
    "depthwise dilation": lambda: LAYERS.DepthwiseConv2D(3, dilation_rate=2),
    "separable": lambda: LAYERS.SeparableConv2D(5, 3, use_bias=False),
    "separable 2": lambda: LAYERS.SeparableConv2D(
        5, 3, strides=2, padding="same", depth_multiplier=2
    ),
}
NORMALIZATIONS = {
    "plain": {},
    "no scale": {"scale": False},
    "no center": {"center": False},
    "neither": {"scale": False, "center": False, "epsilon": 0.5},
}


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_folded_gradients_are_those_of_both_layers(kind, normalization):
    keras.utils.set_random_seed(0)
    layer = CONVOLUTIONS[kind]()
    layer.bias_initializer = keras.initializers.RandomNormal()
    rows = tf.constant(random_rows((None, 9, 8, 4), 3))
    norm = BN(**NORMALIZATIONS[normalization])
    model = keras.Sequential([keras.Input(rows.shape[1:]), layer, norm])
    randomize_normalization(model, rows)
    assert not norm.trainable
    folded = FoldedConvolution(layer, norm, "float32")
    for variable, original in zip(folded.weights, layer.weights, strict=True):
        variable.assign(original)

    results = {}
    for name, function, weights in (
        ("both", lambda x: model(x, training=True), layer.weights),
        ("folded", lambda x: folded(x, training=True), folded.weights),
    ):
        with tf.GradientTape() as tape:
            tape.watch(rows)
            y = function(rows)
            factors = tf.constant(random_rows((None, *y.shape[1:]), len(y), seed=5))
            loss = tf.reduce_sum(factors * y**2)
        sources = [rows, *[variable.value for variable in weights]]
        results[name] = [y, *tape.gradient(loss, sources)]
    assert folded.compute_output_shape((None, 9, 8, 4)) == model.output_shape
    assert len(results["folded"]) == 2 + len(layer.weights)
    for expected, found in zip(results["both"], results["folded"], strict=True):
        size = np.abs(expected).max()
        assert size > 0
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * size)


def test_folded_layers_train_like_the_two():
    keras.utils.set_random_seed(0)
    tail = small_tail(lambda x: BN()(conv("b")(LAYERS.ReLU()(BN()(conv("a")(x))))))
    folded = copy_of(tail)
    assert is_folded(folded, "a")
    assert is_folded(folded, "b")
    both = keras.models.clone_model(tail)
    both.set_weights(tail.get_weights())
    for layer in both.layers:
        layer.trainable = not isinstance(layer, BN)
    both.get_layer(HEAD).get_layer("probabilities").activation = None
    rows = random_rows(tail.input_shape, 8)
    starts = values(both.trainable_variables)
    for model in (both, folded):
        model.compile(
            LayerwiseAdamW(1e-3),
            keras.losses.CategoricalCrossentropy(from_logits=True),
            jit_compile=False,
        )
        model.fit(rows, one_hot(8), batch_size=4, epochs=3, shuffle=False, verbose=0)
    ends = zip(both.trainable_variables, folded.trainable_variables, strict=True)
    for (one, other), start in zip(ends, starts, strict=True):
        step = one.numpy() - start
        assert np.abs(step).max() > 1e-4
        np.testing.assert_allclose(other.numpy() - start, step, atol=1e-5)


def test_pixels_are_scaled_in_a_copy_as_in_the_tail():
    rows = random_rows((None, 6, 6, 4), 8)
    scaling = keras.layers.Normalization()
    scaling.adapt(rows + np.arange(4))
    tail = small_tail(scaling)
    assert_same_function(tail, copy_of(tail))


# One step of every base


@EVERY_BASE_IN_TIME
def test_every_base_can_be_trained(base):
    keras.utils.clear_session()
    model = with_head(build_base(base, "none", SIZES.get(base.name, 32), 0))
    unfrozen = layers_of(unfrozen_groups(model, base, "top"))
    point = split_point(model, unfrozen)
    copy = training_copy(cut(model, point)[1], unfrozen, False, "f32")
    rows = rows_at(model, point, 8)  # of two, a block's dropout may leave out both
    before = values(copy.changed)
    copy.model.compile(
        LayerwiseAdamW(1e-3),
        keras.losses.CategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    assert np.isfinite(copy.model.train_on_batch(rows, one_hot(8)))
    after = values(copy.changed)
    assert all(np.isfinite(value).all() for value in after)
    kept = zip(copy.changed, same(before, after), strict=True)
    assert not [variable.path for variable, is_same in kept if is_same]
