"""`extract_features`: the base's outputs, in order, once an image."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, Told
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score

import keras_transfer
from keras_transfer.data.decode import make_decoder
from keras_transfer.errors import KerasTransferError, UnusableImagesError, UsageError
from keras_transfer.models.bases import get_base
from keras_transfer.models.classifier import build_base
from keras_transfer.workflows.extract import ImageFeatures

SIZE = 64


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def options(cache) -> dict[str, object]:
    return {"image_size": SIZE, "precision": "f32", "cache_dir": cache}


@pytest.fixture(scope="module")
def found(photos, options) -> ImageFeatures:
    return keras_transfer.extract_features(photos, **options)


def table(root: Path, photos: Path, *rows: str) -> str:
    """A table beside a copy of the photos."""
    shutil.copytree(photos, root, dirs_exist_ok=True)
    (root / "data.csv").write_text("\n".join(["path,label,group", *rows]))
    return str(root / "data.csv")


def test_features_are_those_of_the_base_on_decoded_pixels(photos, found):
    assert found.features.shape == (60, 1280)
    assert found.features.dtype == np.float32
    decode = make_decoder(SIZE)
    picked = slice(0, 60, 7)
    pixels = [
        decode((photos / source).read_bytes()) for source in found.sources[picked]
    ]
    base = build_base(get_base("efficientnet_lite0"), "imagenet", SIZE, 0)
    expected = base.predict(np.stack(pixels), verbose=0)
    np.testing.assert_allclose(found.features[picked], expected, atol=2e-3)


def test_the_order_is_that_of_the_data(photos, found):
    sources = [f"{name}/{i:02d}.jpg" for name in CLASSES for i in range(20)]
    assert found.sources.tolist() == found.groups.tolist() == sources
    assert found.labels.tolist() == [source.split("/")[0] for source in sources]
    assert found.class_names == CLASSES
    features, labels, sources = found
    assert features is found.features
    assert labels is found.labels
    assert sources is found.sources
    assert repr(found) == "ImageFeatures(60 images, 1,280 features, 3 classes)"


def test_a_table_keeps_its_own_order_and_groups(tmp_path, photos, options, found):
    rows = ["stripes/03.jpg,b,x", "circle/00.jpg,a,", "stripes/01.jpg,b,x"]
    mixed = keras_transfer.extract_features(table(tmp_path, photos, *rows), **options)
    assert mixed.labels.tolist() == ["b", "a", "b"]
    assert mixed.sources.tolist() == [
        "stripes/03.jpg",
        "circle/00.jpg",
        "stripes/01.jpg",
    ]
    assert mixed.groups.tolist() == ["x", "circle/00.jpg", "x"]
    known = dict(zip(found.sources, found.features, strict=True))
    for source, row in zip(mixed.sources, mixed.features, strict=True):
        np.testing.assert_array_equal(row, known[source])


def test_images_of_a_dataset_are_in_the_order_it_was_read(photos, options, found):
    order = np.random.default_rng(3).permutation(len(found.sources))[:20]
    files = [(photos / found.sources[row]).read_bytes() for row in order]
    made = tf.data.Dataset.from_tensor_slices((files, found.labels[order]))
    again = keras_transfer.extract_features(made.batch(7), **options)
    np.testing.assert_array_equal(again.features, found.features[order])
    assert again.labels.tolist() == found.labels[order].tolist()
    assert again.groups.tolist() == again.sources.tolist()


def test_nothing_is_computed_twice_nor_again_by_fit(photos, options, found, tmp_path):
    told = Told()
    again = keras_transfer.extract_features(photos, listeners=[told], **options)
    np.testing.assert_array_equal(again.features, found.features)
    assert told.notes == []  # an engine that starts is a note
    run = keras_transfer.fit(photos, runs_dir=tmp_path, **options)
    assert run.manifest.engine == "cache"
    assert run.manifest.images_forwarded == 0


def test_scikit_learn_takes_two_lines(photos, options):
    found = keras_transfer.extract_features(photos, **options)
    classifier = LogisticRegression(max_iter=500).fit(found.features, found.labels)
    assert classifier.score(found.features, found.labels) > 0.95


def test_groups_are_ready_for_cross_validation(photos, options):
    found = keras_transfer.extract_features(photos, group_regex=r"^(\d)", **options)
    assert {*found.groups} == {"0", "1"}
    scores = cross_val_score(
        LogisticRegression(max_iter=500),
        found.features,
        found.labels,
        groups=found.groups,
        cv=GroupKFold(2),
    )
    assert scores.min() > 0.8


def test_unusable_images_are_left_out_and_told(tmp_path, photos, options, found):
    shutil.copytree(photos, tmp_path / "photos")
    broken = tmp_path / "photos" / "square" / "05.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    (tmp_path / "photos" / "circle" / "07.jpg").write_text("no image")
    told = Told()
    part = keras_transfer.extract_features(
        tmp_path / "photos", listeners=[told], **options
    )
    left = ~np.isin(found.sources, ["square/05.jpg", "circle/07.jpg"])
    assert part.sources.tolist() == found.sources[left].tolist()
    assert part.labels.tolist() == found.labels[left].tolist()
    np.testing.assert_array_equal(part.features, found.features[left])
    (note,) = [x for x in told.notes if "left out" in x]
    assert note.startswith("2 images cannot be used and are left out; the first is ")
    with pytest.raises(UnusableImagesError, match=r"2 of 60 .*more than 1%"):
        keras_transfer.extract_features(
            tmp_path / "photos", max_skipped=0.01, **options
        )


def test_one_class_is_enough_for_any_base(tmp_path, photos, options):
    shutil.copytree(photos / "square", tmp_path / "one" / "square")
    small = {**options, "image_size": 32}
    found = keras_transfer.extract_features(
        tmp_path / "one", base="mobilenet_v2", weights="none", **small
    )
    assert {*found.labels} == {"square"}
    assert found.features.shape == (20, 1280)


def test_several_labels_are_columns(tmp_path, photos, options):
    rows = ["circle/00.jpg,round|red", "square/00.jpg,", "stripes/00.jpg,red"]
    data = table(tmp_path, photos, *(f"{row}," for row in rows))
    found = keras_transfer.extract_features(data, **options)
    assert found.class_names == ("red", "round")
    assert found.labels.dtype == np.uint8
    assert found.labels.tolist() == [[1, 1], [0, 0], [1, 0]]


def test_splits_and_weights_are_ignored(tmp_path, photos, options):
    data = Path(table(tmp_path, photos))
    rows = ["circle/00.jpg,round,holdout,heavy", "square/00.jpg,flat,train,-1"]
    data.write_text("\n".join(["path,label,split,sample_weight", *rows]))
    found = keras_transfer.extract_features(data, **options)
    assert found.labels.tolist() == ["round", "flat"]


def test_mistakes_are_one_line(tmp_path, photos, options):
    for error, data, given in (
        (UsageError, tmp_path / "nowhere", {}),
        (UsageError, photos, {"base": "no_such_base"}),
        (UsageError, photos, {"splitz": 1}),
        (UsageError, photos, {"group_regex": "(x_y)"}),
        (KerasTransferError, tmp_path, {}),
    ):
        with pytest.raises(error) as caught:
            keras_transfer.extract_features(data, **{**options, **given})
        assert "\n" not in str(caught.value)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_text("no image")
    with pytest.raises(KerasTransferError, match="None of the 1 images can be used"):
        keras_transfer.extract_features(tmp_path, max_skipped=1.0, **options)


def test_nothing_is_written_but_the_cache(tmp_path, photos, options):
    keras_transfer.extract_features(photos, **options)
    assert [*tmp_path.iterdir()] == []
