"""Heads that read several stages, or several bases, from the images to the export."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import Told

import keras_transfer
from keras_transfer.data.decode import make_decoder
from keras_transfer.runs.run import Run

SIZE = 48
BASES = "efficientnet_lite0+MobileNetV3Small"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


def fit(photos: Path, workspace: Path, name: str, **options: object) -> Run:
    fitted = keras_transfer.fit(
        photos,
        name=name,
        runs_dir=workspace / "runs",
        cache_dir=workspace / "cache",
        **{"image_size": SIZE, "precision": "f32", "report": False, **options},
    )
    return Run(fitted.run_dir)


@pytest.fixture(scope="module")
def several(photos: Path, workspace: Path) -> Run:
    """Two bases without pretrained weights, all of their last stages."""
    return fit(photos, workspace, "two", base=BASES, weights="none", features="stages")


def pixels_of(photos: Path) -> np.ndarray:
    decode = make_decoder(SIZE)
    files = sorted(photos.glob("*/0[0-3].jpg"))
    return np.stack([decode(x.read_bytes()) for x in files])


def values(layer: keras.layers.Layer) -> list[np.ndarray]:
    return [np.array(x) for x in layer.get_weights()]


@pytest.mark.long
def test_two_bases_are_one_model_from_fit_to_export(photos, several, workspace):
    manifest = several.manifest
    assert (manifest.base, manifest.features) == (BASES, "stages")
    assert len(manifest.weights_digest.split("+")) == 2
    before = keras.saving.load_model(several.model_path)
    assert manifest.parity["max_probability_difference"] < 1e-4

    tuned = keras_transfer.unfreeze_and_finetune(
        several.run_dir, epochs=1, batch_size=16, force=True, report=False
    )
    assert tuned.manifest.finetune.split_point == "block5c_add"
    after = keras.saving.load_model(several.model_path)
    other, same = (m.get_layer("MobileNetV3Small") for m in (before, after))
    for old, new in zip(values(other), values(same), strict=True):
        np.testing.assert_array_equal(old, new)
    for name, is_equal in {"block5c_project_conv": True, "top_conv": False}.items():
        pair = (values(m.get_layer(name))[0] for m in (before, after))
        assert np.array_equal(*pair) is is_equal

    version = keras_transfer.export(several.run_dir)
    loaded = tf.saved_model.load(str(version))
    pixels = pixels_of(photos)
    said = loaded.signatures["predict_images"](tf.constant(pixels, tf.uint8))
    expected = np.asarray(after(pixels.astype(np.float32), training=False))
    np.testing.assert_allclose(said["probabilities"], expected, atol=1e-4)


@pytest.mark.long
def test_auto_keeps_what_is_better_out_of_fold(photos, workspace):
    told = Told()
    run = fit(photos, workspace, "auto", weights="none", listeners=[told])
    (note,) = [x for x in told.notes if x.startswith("features ")]
    last, stages = map(float, re.findall(r"[0-9]+[.][0-9]+", note))
    assert run.manifest.features == ("stages" if stages < last else "last")

    losses = {}
    for kind in ("last", "stages"):
        alone = fit(photos, workspace, kind, weights="none", features=kind)
        assert alone.manifest.features == kind
        losses[kind] = alone.metrics["fit"]["out_of_fold"]["log_loss"]
        model = keras.saving.load_model(alone.model_path)
        width = 40 + 112 + 1280 if kind == "stages" else 1280
        assert model.get_layer("head").input_shape == (None, width)
        assert alone.manifest.images_forwarded == 0  # what `auto` has computed
    assert losses["last"] == pytest.approx(last, rel=0.1)
    assert losses["stages"] == pytest.approx(stages, rel=0.1)


@pytest.mark.long
def test_extracted_features_are_those_of_all_bases(photos, workspace):
    options = {"image_size": SIZE, "weights": "none", "precision": "f32"}
    options["cache_dir"] = workspace / "cache"
    widths = {}
    for base in ("efficientnet_lite0", "MobileNetV3Small", BASES):
        for kind in ("last", "stages"):
            found = keras_transfer.extract_features(
                photos, base=base, features=kind, **options
            )
            widths[base, kind] = found.features
    for kind in ("last", "stages"):
        single = [widths[base, kind] for base in BASES.split("+")]
        np.testing.assert_array_equal(widths[BASES, kind], np.concatenate(single, 1))
    assert widths[BASES, "last"].shape == (60, 1280 + 576)
