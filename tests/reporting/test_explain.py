from dataclasses import replace

import keras
import numpy as np
import pytest

from keras_transfer.config import HeadConfig
from keras_transfer.models.bases import get_base
from keras_transfer.models.classifier import (
    FEATURES,
    POOL,
    STAGE_POOL,
    attach_head,
    build_base,
    build_head,
    dense_layers,
    fold_temperature,
    join_bases,
    set_raw_weights,
    with_stages,
)
from keras_transfer.reporting.explain import border_share, heat_maps
from keras_transfer.reporting.projection import project

SIZE = 32


def base(pooling: str = "map", strides: int = 8) -> keras.Model:
    """Averages the colors of patches: class 0 is red, 1 green, 2 blue."""
    image = keras.Input((SIZE, SIZE, 3), name="image")
    x = keras.layers.Rescaling(1 / 255)(image)
    x = keras.layers.AveragePooling2D(strides)(x)
    if pooling == "map":
        x = keras.layers.GlobalAveragePooling2D(name=POOL)(x)
    elif pooling == "max":
        x = keras.layers.GlobalMaxPooling2D(name=POOL)(x)
    else:
        x = keras.layers.Reshape((-1, 3))(x)
        if pooling == "class token":
            x = keras.layers.ZeroPadding1D((1, 0))(x)
        x = keras.layers.GlobalAveragePooling1D(name=POOL)(x)
    return keras.Model(image, x)


def classifier(
    pooling: str = "map",
    kind: str = "linear",
    multi_label: bool = False,
    strides: int = 8,
) -> keras.Model:
    config = HeadConfig(kind=kind, hidden=(8,))
    head = build_head(config, 3, 3, multi_label, seed=1)
    if kind == "linear":
        head.set_weights([5 * np.eye(3, dtype=np.float32), np.full(3, -0.5)])
    return attach_head(base(pooling, strides), head)


def planted() -> np.ndarray:
    """One image for each class, with its color in one corner only."""
    pixels = np.zeros((3, SIZE, SIZE, 3), np.uint8)
    pixels[0, :16, :16, 0] = 255
    pixels[1, :16, 16:, 1] = 255
    pixels[2, 16:, :16, 2] = 255
    return pixels


CORNERS = [
    (slice(0, 2), slice(0, 2)),
    (slice(0, 2), slice(2, 4)),
    (slice(2, 4), slice(0, 2)),
]


def logits(model: keras.Model, pixels: np.ndarray) -> np.ndarray:
    features = keras.Model(model.input, model.get_layer(POOL).output)
    last = dense_layers(model.get_layer("head"))[-1]
    return np.asarray(features(pixels.astype(np.float32))) @ last.kernel + last.bias


@pytest.mark.parametrize("pooling", ["map", "tokens"])
@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_mean_of_exact_evidence_is_the_logit(pooling, multi_label, temperature):
    model = classifier(pooling, multi_label=multi_label)
    fold_temperature(model.get_layer("head"), temperature)
    pixels = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
    classes = np.array([0, 1, 2, 1, 0])
    found = heat_maps(model, pixels, classes)
    assert found.is_exact and found.is_meaningful and found.maps.shape == (5, 4, 4)
    expected = np.asarray(logits(model, pixels))[np.arange(5), classes]
    np.testing.assert_allclose(
        found.evidence.mean((1, 2)), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "pooling, kind, is_exact",
    [
        ("map", "linear", True),
        ("tokens", "linear", True),
        ("class token", "linear", False),
        ("max", "linear", False),
    ],
)
def test_heat_is_where_the_evidence_was_planted(pooling, kind, is_exact):
    found = heat_maps(classifier(pooling, kind), planted(), np.arange(3))
    assert found.is_exact is is_exact
    for number, corner in enumerate(CORNERS):
        heat = found.maps[number]
        assert heat.max() == 1 and heat[corner].sum() == pytest.approx(heat.sum())


def test_gradients_of_an_mlp_point_to_the_planted_corner():
    model = classifier(kind="mlp")
    head = model.get_layer("head")
    first, last = dense_layers(head)
    first.set_weights([np.eye(3, 8, dtype=np.float32), np.zeros(8)])
    last.set_weights([np.eye(8, 3, dtype=np.float32), np.zeros(3)])
    found = heat_maps(model, planted(), np.arange(3))
    assert not found.is_exact
    for number, corner in enumerate(CORNERS):
        heat = found.maps[number]
        assert heat[corner].sum() == pytest.approx(heat.sum()) and heat.max() == 1


def staged(kind: str = "linear") -> keras.Model:
    """Reads colors of patches of 8 pixels, and of finer ones, scaled by the head."""
    image = keras.Input((SIZE, SIZE, 3), name="image")
    x = keras.layers.Rescaling(1 / 255)(image)
    fine = keras.layers.AveragePooling2D(4)(x)
    below = keras.layers.GlobalAveragePooling2D(name=f"{STAGE_POOL}2")(fine)
    top = keras.layers.AveragePooling2D(2)(fine)
    own = keras.layers.GlobalAveragePooling2D(name=POOL)(top)
    joined = keras.layers.Concatenate(name=FEATURES)([below, own])
    config = HeadConfig(kind=kind, hidden=(8,))
    head = build_head(config, 6, 3, False, seed=1, is_scaled=True)
    first = np.concatenate([np.eye(3), 2 * np.eye(3)]).astype(np.float32)
    weights = [first, np.full(3, -0.5)]
    if kind == "mlp":
        weights = [first @ np.eye(3, 8), np.zeros(8), np.eye(8, 3), np.zeros(3)]
    set_raw_weights(head, weights, (np.full(6, 0.1), np.full(6, 0.7)))
    return attach_head(keras.Model(image, joined), head)


def test_maps_of_several_stages_add_up_to_the_logit():
    model = staged()
    pixels = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), np.uint8)
    found = heat_maps(model, pixels, np.array([0, 1, 2, 0]))
    assert found.is_exact and found.maps.shape == (4, 4, 4)
    colors = pixels.mean((1, 2)) / 255  # both outputs are the mean color
    expected = (3 * colors - 0.5)[np.arange(4), [0, 1, 2, 0]]
    np.testing.assert_allclose(found.evidence.mean((1, 2)), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_heat_of_several_stages_is_where_the_evidence_was_planted(kind):
    found = heat_maps(staged(kind), planted(), np.arange(3))
    assert found.is_exact is (kind == "linear")
    for number, corner in enumerate(CORNERS):
        heat = found.maps[number]
        assert heat.max() == 1 and heat[corner].sum() == pytest.approx(heat.sum())


def test_a_further_base_is_not_explained_but_counts():
    further = base()
    further = keras.Model(further.input, further.output, name="further")
    joined = join_bases([base(), further], stages=False)
    head = build_head(HeadConfig(), 6, 3, False, seed=1, is_scaled=True)
    weights = [np.concatenate([5 * np.eye(3), np.eye(3)]), np.full(3, -0.5)]
    set_raw_weights(head, weights, (np.zeros(6), np.ones(6)))
    found = heat_maps(attach_head(joined, head), planted(), np.arange(3))
    assert not found.is_exact and found.maps.shape == (3, 4, 4)
    for number, corner in enumerate(CORNERS):
        heat = found.maps[number]
        assert heat[corner].sum() == pytest.approx(heat.sum())


def test_nothing_speaks_for_a_class_that_is_not_there():
    found = heat_maps(classifier(multi_label=True), planted()[:1], np.array([2]))
    assert (found.maps == 0).all() and np.isnan(found.border_share).all()


def test_a_single_place_says_nothing():
    found = heat_maps(classifier(strides=SIZE), planted(), np.arange(3))
    assert found.maps.shape == (3, 1, 1) and not found.is_meaningful


def test_border_share_counts_areas():
    maps = np.zeros((4, 7, 7))
    maps[0] = 1  # everywhere
    maps[1, 3, 3] = 1  # in the middle
    maps[2, 0, 3] = 1  # at the edge
    maps[3, 1, 3] = 1  # 1/7 to 2/7 of the height: 0.15 is 5% of the way
    expected = [1 - 0.7**2, 0, 1, 0.05]
    np.testing.assert_allclose(border_share(maps), expected, atol=1e-9)
    assert border_share(np.ones((1, 3, 5)))[0] == pytest.approx(0.51)


def test_projection_is_repeatable_and_keeps_neighbors():
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(3, 20)) * 20
    features = (centers[np.arange(60) % 3] + rng.normal(size=(60, 20))).astype("f4")
    for method in ("pca", "tsne"):
        found = project(features, method, seed=1)
        assert found.shape == (60, 2) and found.dtype == np.float32
        assert np.isfinite(found).all()
        np.testing.assert_array_equal(found, project(features, method, seed=1))
        means = np.stack([found[k::3].mean(0) for k in range(3)])
        nearest = np.linalg.norm(found[:, None] - means, axis=-1).argmin(1)
        assert (nearest == np.arange(60) % 3).all()


def test_pca_is_that_of_an_exact_decomposition():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(50, 8)) * 2.0 ** -np.arange(8)).astype(np.float32)
    centered = features - features.mean(0)
    exact = centered @ np.linalg.svd(centered)[2][:2].T
    np.testing.assert_allclose(np.abs(project(features)), np.abs(exact), atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 5), (3, 1), (4, 4)])
def test_few_images_are_projected_too(shape):
    for method in ("pca", "tsne"):
        found = project(np.ones(shape, np.float32), method, 0)
        assert found.shape == (shape[0], 2) and np.isfinite(found).all()


@pytest.mark.parametrize(
    ("pooling", "width"),
    [("class", 384), pytest.param("class+mean", 768, marks=pytest.mark.long)],
)
def test_a_transformer_is_explained_by_what_its_last_block_reads(pooling, width):
    row = replace(get_base("dinov2_small"), pooling=pooling)
    head = build_head(HeadConfig(), width, 3, multi_label=False, seed=1)
    whole = build_base(row, "none", 42, 0)
    model = attach_head(whole, head)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 42, 42, 3), np.uint8)
    found = heat_maps(model, pixels, np.arange(3))
    assert found.evidence.shape == (3, 3, 3)
    head = build_head(HeadConfig(), 3 * width, 3, multi_label=False, seed=1)
    several = heat_maps(
        attach_head(with_stages(whole, row), head), pixels, np.arange(3)
    )
    assert several.evidence.shape == (3, 3, 3) and not several.is_exact
    assert not found.is_exact
    assert (np.ptp(found.evidence, axis=(1, 2)) > 0).all()
    moved = np.roll(pixels, 14, axis=1)  # the patches of each image swap places
    assert not np.allclose(heat_maps(model, moved, np.arange(3)).maps, found.maps)
