"""Heads that read several stages, or several bases: what is cut, trained and saved."""

import keras
import numpy as np
import pytest

from keras_transfer.config import HeadConfig
from keras_transfer.errors import UsageError
from keras_transfer.models.bases import get_base, get_bases
from keras_transfer.models.classifier import (
    FEATURES,
    HEAD,
    POOL,
    SPREAD,
    attach_head,
    build_base,
    build_head,
    copy_head,
    join_bases,
    pooled_outputs,
    set_raw_weights,
    with_stages,
    without_head,
)
from keras_transfer.models.cut import cut, pooled_below, split_point
from keras_transfer.models.fold import folded_copy
from keras_transfer.models.layer_groups import (
    changed_variables,
    layer_groups,
    training_copy,
    unfrozen_groups,
)
from keras_transfer.training.tuned import CutClassifier

SIZE = 32
NAMES = ("MobileNetV2", "efficientnet_lite0")


@pytest.fixture(scope="module")
def bases() -> list[keras.Model]:
    """Two bases with random weights, and with BatchNormalization that counts."""
    models = []
    for name in NAMES:
        model = build_base(get_base(name), "none", SIZE, 3)
        rng = np.random.default_rng(4)
        for layer in model.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                size = layer.gamma.shape
                values = (0.9, 1.1), (-0.1, 0.1), (-0.1, 0.1), (0.8, 1.2)
                layer.set_weights([rng.uniform(*pair, size) for pair in values])
        models.append(with_stages(model, get_base(name)))
    return models


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (3, SIZE, SIZE, 3)).astype(np.float32)


def classifier(bases: list[keras.Model], stages: bool = True) -> keras.Model:
    base = join_bases(bases, stages)
    is_scaled = base.output_shape[1] != base.get_layer(POOL).output.shape[1]
    head = build_head(HeadConfig(), base.output_shape[1], 3, False, 0, is_scaled)
    if is_scaled:
        rng = np.random.default_rng(1)
        width = base.output_shape[1]
        weights = [rng.normal(0, 0.1, (width, 3)).astype(np.float32), np.ones(3)]
        set_raw_weights(head, weights, (rng.random(width), 0.5 + rng.random(width)))
    return attach_head(base, head)


def run(model: keras.Model, x: np.ndarray) -> np.ndarray:
    return np.asarray(model(x, training=False))


def layers_of(groups) -> set[keras.layers.Layer]:
    return {layer for layers in groups.values() for layer in layers}


def test_features_are_those_of_each_stage_and_base(bases, pixels):
    joined = run(join_bases(bases, True), pixels)
    expected = []
    for model, row in zip(bases, get_bases("+".join(NAMES)), strict=True):
        for end in row.stage_ends[-2:]:
            below = keras.Model(model.input, model.get_layer(end).output)
            expected.append(run(below, pixels).mean((1, 2)))
        expected.append(
            run(keras.Model(model.input, model.get_layer(POOL).output), pixels)
        )
    np.testing.assert_allclose(
        joined, np.concatenate(expected, 1), rtol=1e-4, atol=1e-5
    )
    alone = run(join_bases(bases, False), pixels)
    last = np.concatenate([expected[2], expected[5]], 1)
    np.testing.assert_allclose(alone, last, rtol=1e-4, atol=1e-5)
    assert join_bases(bases[:1], False).output_shape == (None, 1280)


def test_a_head_that_scales_says_what_its_raw_weights_say():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (5, 7)).astype(np.float32)
    for kind, shapes in {"linear": [(7, 3)], "mlp": [(7, 4), (4, 3)]}.items():
        weights = [
            array
            for shape in shapes
            for array in (rng.normal(size=shape), rng.normal(size=shape[1]))
        ]
        config = HeadConfig(kind=kind, hidden=(4,))
        plain, scaled = (build_head(config, 7, 3, False, 0, s) for s in (False, True))
        set_raw_weights(plain, weights, None)
        set_raw_weights(scaled, weights, (x.mean(0), x.std(0) + 1))
        np.testing.assert_allclose(run(scaled, x), run(plain, x), atol=1e-5)
        copied = build_head(config, 7, 3, False, 1, True)
        copy_head(scaled, copied)
        np.testing.assert_array_equal(run(copied, x), run(scaled, x))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("unfreeze", "point", "beside"),
    [
        ("top", "block_12_add", ["pool_stage_1", "pool_stage_2"]),
        ("stages:2", "block_5_add", ["pool_stage_1"]),
        ("from:block_15_add", "block_14_add", ["pool_stage_1", "pool_stage_2"]),
        ("from:head", FEATURES, []),
        ("all", "image", []),
    ],
)
def test_what_is_frozen_is_computed_once(bases, pixels, count, unfreeze, point, beside):
    model = classifier(bases[:count])
    row = get_base(NAMES[0])
    unfrozen = layers_of(unfrozen_groups(model, row, unfreeze))
    other = [f"{POOL}_{NAMES[1]}"] * (count - 1) if beside else []
    assert split_point(model, unfrozen) == point
    assert sorted(pooled_below(model, point, unfrozen)) == sorted(beside + other)

    extractor, tail = cut(model, point, pooled_below(model, point, unfrozen))
    rows = run(extractor, pixels)
    np.testing.assert_allclose(run(tail, rows), run(model, pixels), atol=1e-6)
    ours = {id(x) for layer in unfrozen for x in layer.weights}
    assert not ours & {id(x) for x in extractor.weights}
    assert ours <= {id(x) for x in tail.weights}
    own = without_head(model)
    _, below_head = cut(model, point, beside + other, own.output)
    expected = run(own, pixels)
    np.testing.assert_allclose(run(below_head, rows), expected, atol=1e-6)


@pytest.mark.parametrize("unfreeze", ["top", "from:head"])
def test_a_training_copy_of_rows_changes_what_is_unfrozen_only(bases, pixels, unfreeze):
    model = classifier(bases)
    unfrozen = layers_of(unfrozen_groups(model, get_base(NAMES[0]), unfreeze))
    point = split_point(model, unfrozen)
    extractor, tail = cut(model, point, pooled_below(model, point, unfrozen))
    rows = run(extractor, pixels)
    for precision, tolerance in {"f32": 1e-5, "bf16": 0.1}.items():
        copy = training_copy(tail, unfrozen, False, precision)
        said = keras.ops.softmax(run(copy.model, rows))
        np.testing.assert_allclose(said, run(model, pixels), atol=tolerance)
        trained = {id(x) for x in copy.model.trainable_variables}
        assert trained == {id(x) for x in copy.changed} != set()
        expected = changed_variables(tail, unfrozen, False)
        assert len(expected) == len(copy.changed)


def test_predictions_follow_a_head_that_is_exchanged(bases, pixels):
    model = classifier(bases[:1])
    groups = unfrozen_groups(model, get_base(NAMES[0]), "top")
    tuned = CutClassifier(model, groups, None, [])
    beside = pooled_below(model, tuned.split_point, tuned.unfrozen)
    rows = run(cut(model, tuned.split_point, beside)[0], pixels)
    before = tuned.predict(rows)
    np.testing.assert_allclose(before, run(model, pixels), atol=1e-6)
    width = model.get_layer(HEAD).input_shape[1]
    other = build_head(HeadConfig(), width, 3, False, 0, is_scaled=True)
    rng = np.random.default_rng(5)
    weights = [rng.normal(0, 0.1, (width, 3)), np.zeros(3)]
    set_raw_weights(other, weights, (rng.random(width), 2 + rng.random(width)))
    tuned.set_head(other)
    np.testing.assert_allclose(tuned.predict(rows), run(model, pixels), atol=1e-6)
    assert np.abs(tuned.predict(rows) - before).max() > 0.01


@pytest.mark.parametrize("layer", NAMES[1:] + (f"{POOL}_{NAMES[1]}",))
def test_a_further_base_cannot_be_unfrozen(bases, layer):
    with pytest.raises(UsageError, match="others stay frozen. Received: unfreeze=from"):
        unfrozen_groups(classifier(bases), get_base(NAMES[0]), f"from:{layer}")


def test_layers_of_a_further_base_are_in_no_group(bases):
    model = classifier(bases)
    groups = layer_groups(model, get_base(NAMES[0]))
    assert list(groups)[-1] == HEAD
    inside = {id(x) for layer in layers_of(groups) for x in layer.weights}
    other = {id(x) for x in model.get_layer(NAMES[1]).weights}
    assert not inside & other
    assert inside | other == {id(x) for x in model.weights}


def test_a_saved_model_and_a_folded_copy_say_the_same(bases, pixels, tmp_path):
    model = classifier(bases)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(run(loaded, pixels), run(model, pixels))
    assert len(pooled_outputs(loaded)) == 4
    assert loaded.get_layer(HEAD).get_layer(SPREAD)
    folded = folded_copy(model)
    np.testing.assert_allclose(run(folded, pixels), run(model, pixels), atol=1e-5)
    other = folded.get_layer(NAMES[1])
    assert not [x for x in other.layers if "BatchNorm" in type(x).__name__]


@pytest.mark.parametrize("names", ["MobileNetV2+", "+MobileNetV2", "A++B"])
def test_a_name_that_is_missing_is_refused(names):
    with pytest.raises(UsageError, match="A name is missing beside a [+]. Received"):
        get_bases(names)


def test_the_same_base_twice_is_refused():
    with pytest.raises(UsageError, match="Several bases are different ones. Received"):
        get_bases("MobileNetV2+mobilenet-v2")
