"""`kt evaluate --drift` and the flag `far` of predictions, on a real run."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, Told, draw, encode

import keras_transfer
from keras_transfer.data.decode import make_decoder
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.evaluation.of_run import load_model, run_splits
from keras_transfer.evaluation.out_of_distribution import OutOfDistribution
from keras_transfer.evaluation.prediction import predict_sources
from keras_transfer.features.base import frozen_base
from keras_transfer.features.frozen_part import Storage, frozen_features
from keras_transfer.models.classifier import POOL, with_features, without_head
from keras_transfer.models.cut import cut


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> keras_transfer.Run:
    """A run with what tells far images and with predictions of its test images."""
    folder = tmp_path_factory.mktemp("drift")
    run = keras_transfer.fit(
        photos,
        image_size=64,
        name="drift",
        runs_dir=folder,
        cache_dir=folder / "cache",
        splits={"test": 0.3},
    )
    splits = run_splits(run)
    config = run.config.model_copy(update={"cache_dir": folder / "cache"})
    part = frozen_base(config)
    features = frozen_features(part, splits, 0, Storage("f32"), Told())
    detector = OutOfDistribution.fit(
        features.rows(splits.train.sources), splits.train.targets
    )
    detector.save(run.far_path)
    model = load_model(run)
    scores = [f"p_{name}" for name in CLASSES]
    lines = [("path", "split", "how", "label", "predicted", *scores, "sure", "far")]
    for prediction in predict_sources(
        model, splits.test.sources, splits.read, detector
    ):
        predicted = CLASSES[prediction.probabilities.argmax()]
        far = str(prediction.far).lower()
        said = map(str, prediction.probabilities)
        lines.append((prediction.source, "test", "test", "", predicted, *said, "", far))
    fitted = ("a.jpg", "train", "fitted", "circle", "circle", 1, 0, 0, "", "true")
    lines.append(fitted)
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    run.predictions_path.write_text(text.getvalue())
    return run


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of circles and squares as in training, of noise, and a broken file."""
    folder = tmp_path_factory.mktemp("new")
    rng = np.random.default_rng(7)
    for name in ("like", "unlike"):
        (folder / name / "inside").mkdir(parents=True)
    for index in range(20):
        image = draw(CLASSES[index % 2], rng)
        (folder / "like/inside" / f"{index}.jpg").write_bytes(encode(image, "JPEG"))
        image = np.full((72, 72, 3), rng.integers(0, 256, 3), np.uint8)
        image[:, index : index + 30] = 255
        (folder / "unlike" / f"{index}.png").write_bytes(encode(image, "PNG"))
    (folder / "unlike/broken.jpg").write_bytes(b"no image")
    return folder


def test_predictions_say_what_is_far(run, new):
    flags = {}
    for name in ("like", "unlike"):
        found = list(keras_transfer.predict(run, new / name, recursive=True))
        flags[name] = [one.far for one in found if not one.error]
        assert all(one.far is None for one in found if one.error)
    assert np.mean(flags["like"]) < 0.2
    assert np.mean(flags["unlike"]) > 0.8


def test_probabilities_are_the_same_without_the_flag(run, new):
    paths = sorted(str(path) for path in (new / "like/inside").iterdir())
    model = load_model(run)
    plain = predict_sources(model, paths, reading)
    found = keras_transfer.predict(run, paths)
    for one, other in zip(plain, found, strict=True):
        assert one.far is None
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-6)


@pytest.mark.long
def test_averaged_over_flips_an_image_is_as_far_as_it_is(run, new):
    model, decode = load_model(run), make_decoder(64)
    paths = sorted(str(path) for path in new.rglob("*[0-9].*"))
    pixels = np.stack([decode(Path(path).read_bytes()) for path in paths])
    one, other = (
        np.asarray(model(x.astype("f4"), training=False))
        for x in (pixels, pixels[:, :, ::-1])
    )
    assert abs(one - other).max() > 1e-3
    plain = list(keras_transfer.predict(run, paths))
    found = list(keras_transfer.predict(run, paths, flip_tta=True))
    assert [x.far for x in found] == [x.far for x in plain]
    assert {x.far for x in found} == {True, False}
    alone = list(predict_sources(model, paths, reading, flip_tta=True))
    for rows in (found, alone):
        said = np.stack([x.probabilities for x in rows])
        np.testing.assert_allclose(said, (one + other) / 2, atol=1e-5)


def reading(sources):
    return ((source, Path(source).read_bytes()) for source in sources)


def test_the_part_below_the_head_can_be_cut(run):
    model = load_model(run)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype("float32")
    below = without_head(model)
    point = [layer.name for layer in below.layers if layer.name != POOL][-4]
    expected = with_features(model)(pixels, training=False)["features"]
    frozen, tail = cut(below, point)
    found = tail(frozen(pixels, training=False), training=False)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_like_images_drift_only_in_their_classes(run, new):
    told = Told()
    found = keras_transfer.drift(run, new / "like", listeners=[told])
    assert (found.images, found.reference_images, found.reference) == (20, 18, "test")
    assert not found.far.is_clear
    assert found.classes["stripes"].is_clear
    assert found.p_value < 0.05
    assert told.steps[-1] == ("drift", 20, 20)


def test_the_command(run, new, kt):
    """The images are far, apart from one that is left out."""
    shown = kt("evaluate", run.run_dir, new / "unlike", "--drift")
    assert shown.exit_code == 0
    assert "20 new images beside 18 of the run (test)" in shown.stdout
    assert shown.stdout.count("<- differs") >= 1
    assert "predicted stripes" in shown.stdout
    assert f"left out: {new / 'unlike/broken.jpg'}" in shown.stderr
    said = json.loads(
        kt("evaluate", run.run_dir, new / "like", "--drift", "--json").stdout
    )
    assert said["far"]["new"]["images"] == 20
    assert said["skipped"] == {}
    assert set(said["classes"]) == set(CLASSES)


def test_out_of_fold_predictions_stand_in_for_missing_test_images(run, new, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(run.run_dir, other)
    text = (other / "predictions.csv").read_text()
    text = text.replace(",test,test,", ",train,out of fold,")
    (other / "predictions.csv").write_text(text)
    assert keras_transfer.drift(other, new / "like").reference == "out of fold"


@pytest.mark.parametrize("missing", ["far.npz", "predictions.csv"])
def test_a_run_of_an_earlier_version(run, new, tmp_path, missing):
    other = tmp_path / "run"
    shutil.copytree(run.run_dir, other)
    (other / missing).unlink()
    with pytest.raises(KerasTransferError, match="Train it again") as caught:
        keras_transfer.drift(other, new / "like")
    assert "\n" not in str(caught.value)
    if missing == "far.npz":
        paths = [new / "like/inside/0.jpg"]
        assert next(keras_transfer.predict(other, paths)).far is None


def test_bad_input(run, new, tmp_path, kt):
    with pytest.raises(UsageError, match="There are no images"):
        (tmp_path / "empty").mkdir()
        keras_transfer.drift(run, tmp_path / "empty")
    with pytest.raises(KerasTransferError, match="None of the 1 images"):
        keras_transfer.drift(run, new / "unlike/broken.jpg")
    for arguments in ((), (new / "like", "--phase", "fit")):
        found = kt("evaluate", run.run_dir, *arguments, "--drift")
        assert found.exit_code == 2
        assert "--drift compares a folder" in found.stderr
