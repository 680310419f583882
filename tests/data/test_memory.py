"""Images given in Python: what is taken, what they are called, what is refused."""

import hashlib
import io
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import tensorflow as tf
from conftest import CLASSES, encode
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from keras_transfer.config import ListingConfig
from keras_transfer.data.decode import make_decoder, resize_image
from keras_transfer.data.in_memory.forms import list_memory, name_of, settled
from keras_transfer.data.loading import load, load_all
from keras_transfer.data.tables import Listing
from keras_transfer.errors import KerasTransferError, UsageError

GIVE_AGAIN = (
    "The images were given in Python and are not kept: evaluate and "
    "unfreeze_and_finetune take them again."
)
RNG = np.random.default_rng(7)
PIXELS = RNG.integers(0, 256, (12, 5, 7, 3), np.uint8)
INDICES = np.arange(12) % 3
SIDE = 16


def listed(data: object, multi_label: bool = False, **options: object) -> Listing:
    return list_memory(data, ListingConfig(**options), multi_label)


def refusal(data: object, error: type[Exception] = UsageError, **options: object):
    with pytest.raises(error) as caught:
        listed(data, **options)
    assert type(caught.value) is error
    message = str(caught.value)
    assert "\n" not in message
    assert "Received: " in message
    return message


def content(listing: Listing) -> dict[str, bytes]:
    read = dict(listing.read(listing.sources))
    assert sorted(read) == sorted(listing.sources)
    return read


def content_in_order(listing: Listing) -> list[bytes]:
    found = content(listing)
    return [found[source] for source in listing.sources]


def pixels(encoded: bytes) -> np.ndarray:
    return np.load(io.BytesIO(encoded), allow_pickle=False)


def names(listing: Listing) -> list[str]:
    return [name for (name,) in listing.labels]


# Arrays


def test_arrays_are_named_by_index_and_read_as_npy():
    listing = listed((PIXELS, INDICES))
    assert listing.sources == [f"{index:06d}" for index in range(12)]
    assert names(listing) == ["0", "1", "2"] * 4
    assert listing.class_names == ["0", "1", "2"]
    assert listing.root is None
    assert not listing.multi_label
    assert listing.sample_weight is None
    assert listing.warnings == [GIVE_AGAIN]
    for index, encoded in enumerate(content(listing).values()):
        assert pixels(encoded).dtype == np.uint8
        np.testing.assert_array_equal(pixels(encoded), PIXELS[index])
    read = listing.read(["000007", "000003"])
    assert sorted(name for name, _ in read) == ["000003", "000007"]


def test_the_same_pixels_travel_as_the_same_bytes():
    wanted = [*content(listed((PIXELS, INDICES))).values()]
    for same in (
        PIXELS.astype(np.int64),
        PIXELS.astype(">u2"),
        np.asfortranarray(PIXELS),
        np.repeat(PIXELS, 2, axis=2)[:, :, ::2],
        tf.constant(PIXELS),
        keras.ops.convert_to_tensor(PIXELS),
        list(PIXELS),
        tuple(PIXELS),
        PIXELS.tolist(),
    ):
        assert [*content(listed((same, INDICES))).values()] == wanted
    as_floats = PIXELS.astype(np.float32)
    floats = [*content(listed((as_floats, INDICES))).values()]
    assert floats != wanted
    assert pixels(floats[0]).dtype == np.float32
    swapped = as_floats.astype(">f4")
    assert [*content(listed((swapped, INDICES))).values()] == floats


@pytest.mark.parametrize("shape", [(4, 6), *((4, 6, c) for c in (1, 2, 3, 4))])
def test_arrays_may_have_any_number_of_channels(shape):
    x = RNG.integers(0, 256, (3, *shape), np.uint8)
    read = content(listed((x, [0, 1, 0])))
    assert [pixels(encoded).shape for encoded in read.values()] == [shape] * 3


def test_a_list_holds_images_of_different_sizes():
    shapes = [(3, 5, 3), (8, 2), (1, 1, 4), (6, 6, 1)]
    images = [RNG.integers(0, 256, shape, np.uint8) for shape in shapes]
    read = content(listed((images, ["a", "b", "a", "b"])))
    assert [pixels(encoded).shape for encoded in read.values()] == shapes


def test_arrays_are_not_copied_until_they_are_read():
    x = np.full((4, 2, 2, 3), 2, np.uint8)
    listing = listed((x, [0, 1, 0, 1]))
    x[2] = 9
    assert pixels(content(listing)["000002"]).max() == 9


@pytest.mark.parametrize(
    ("y", "found", "classes"),
    [
        ([10, 9, 2, 10], ["10", "9", "2", "10"], ["2", "9", "10"]),
        ([[10], [9], [2], [10]], ["10", "9", "2", "10"], ["2", "9", "10"]),
        (np.array([1, 0, 1, 0], np.uint8), ["1", "0", "1", "0"], ["0", "1"]),
        (np.array([1.0, 0, 1, 0]), ["1", "0", "1", "0"], ["0", "1"]),
        (["b", "a", "10", "9"], ["b", "a", "10", "9"], ["10", "9", "a", "b"]),
        (["10", "-9", "2", "0"], ["10", "-9", "2", "0"], ["-9", "0", "2", "10"]),
        (["10", "9", "02", "9"], ["10", "9", "02", "9"], ["02", "10", "9"]),
        ([b"b", b"\xc3\xa4", b"b", b"b"], ["b", "ä", "b", "b"], ["b", "ä"]),
        ([True, False, True, True], ["True", "False", *["True"] * 2], None),
        (pd.Series(["b", "a", "b", "b"]), ["b", "a", "b", "b"], ["a", "b"]),
        (pd.Series([3, 1, 1, 1], dtype="Int64"), ["3", "1", "1", "1"], ["1", "3"]),
        (pl.Series(["b", "a", "b", "b"]), ["b", "a", "b", "b"], ["a", "b"]),
        (pd.Categorical(["b", "a", "b", "b"]), ["b", "a", "b", "b"], ["a", "b"]),
        (tf.constant(["b", "a", "b", "b"]), ["b", "a", "b", "b"], ["a", "b"]),
        (np.array(["b", "a", "b", "b"], object), ["b", "a", "b", "b"], ["a", "b"]),
        (np.eye(3)[[2, 0, 1, 0]], ["2", "0", "1", "0"], ["0", "1", "2"]),
        (np.eye(3, dtype=bool)[[2, 0, 1, 0]], ["2", "0", "1", "0"], ["0", "1", "2"]),
    ],
)
def test_labels_of_arrays(y, found, classes):
    listing = listed((PIXELS[:4], y))
    assert names(listing) == found
    assert listing.class_names == (classes or ["False", "True"])
    assert not listing.multi_label


def test_rows_with_several_classes_are_multi_label():
    y = np.zeros((3, 12), np.float32)
    y[0, [2, 10]] = y[2, 2] = 1
    listing = listed((PIXELS[:3], y))
    assert listing.multi_label
    assert listing.labels == [("2", "10"), (), ("2",)]
    assert listing.class_names == ["2", "10"]
    assert listing.warnings == [
        GIVE_AGAIN,
        "10 of 12 classes have no image and were left out: 0, 1, 3, 4, 5, ....",
        "Labels are read as multi-label: 2 of 3 rows do not have exactly one 1, such "
        "as image 0.",
    ]
    y = np.eye(2)[[0, 1, 1, 0]]
    y[2] = 0
    for given_ in ((PIXELS[:4], y), dataset(PIXELS[:4], y)):
        assert listed(given_).warnings[1:] == [
            "Labels are read as multi-label: 1 of 4 rows does not have exactly one 1, "
            "such as image 2."
        ]
    assert listed((PIXELS[:4], y), multi_label=True).warnings == [GIVE_AGAIN]


def test_one_hot_labels_of_a_multi_label_run_are_multi_label():
    one_hot = np.eye(2)[[0, 1]]
    assert listed((PIXELS[:2], one_hot), multi_label=True).multi_label
    assert not listed((PIXELS[:2], one_hot)).multi_label


def test_weights_of_arrays():
    weights = [0, 1.5, 2]
    assert listed((PIXELS[:3], [0, 1, 0], weights)).sample_weight == weights
    column = np.array(weights, np.float32)[:, None]
    assert listed((PIXELS[:3], [0, 1, 0], column)).sample_weight == weights


FLOATS = PIXELS.astype(np.float32)


def with_value(value: float) -> np.ndarray:
    changed = FLOATS.copy()
    changed[7, 1, 2, 0] = value
    return changed


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (FLOATS / 255, "floats of at most 1. Multiply them by 255"),
        (FLOATS * 0, "floats of at most 0. Multiply"),
        (list(FLOATS / 255), "floats of at most 1. Multiply them by 255"),
        ((FLOATS / 255).astype("uint8"), "integers of at most 1. Leave out the div"),
        (list(PIXELS // 255), "integers of at most 1. Leave out the division"),
        (PIXELS.astype(np.int64) * 0, "integers of at most 0. Leave out the division"),
        (with_value(np.nan), r"x\[7\] with nan. Replace"),
        (with_value(np.inf), r"x\[7\] with inf. Scale"),
        (with_value(-1), r"x\[7\] with -1. Leave out the preprocessing"),
        (list(with_value(-1)), r"x\[7\] with -1. Leave out the preprocessing"),
        (with_value(255.5), r"x\[7\] with 255.5. Scale"),
        (PIXELS.astype(np.uint16) * 257, r"x\[0\] with \d+. Scale .* x / 257"),
        (PIXELS.astype(np.int8), r"x\[0\] with -\d+"),
    ],
)
def test_pixels_that_are_refused(x, words):
    message = refusal((x, INDICES))
    assert re.search(words, message), message


def test_images_that_are_nearly_black_are_told():
    for x in (PIXELS // 16 + 1, list(PIXELS // 16 + 1), FLOATS / 16):
        warnings = listed((x, INDICES)).warnings
        assert any("no pixel is above 1" in line for line in warnings), warnings
    told = listed(dataset(PIXELS // 16, INDICES)).warnings
    assert any("Multiply them by 17" in line for line in told), told
    assert not any("black" in line for line in listed((PIXELS, INDICES)).warnings)


def test_one_bright_image_is_enough():
    dark = [image // 255 for image in PIXELS[:11]]
    for kind in (np.uint8, np.int16, np.float32):
        listed(([*dark, PIXELS[11].astype(kind)], INDICES))
    black = np.concatenate([np.repeat(PIXELS * 0, 30, 0), PIXELS]).astype(np.float32)
    listed((black, np.arange(len(black)) % 3))
    listed(dataset(black, np.arange(len(black)) % 3).batch(100))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (PIXELS > 9, r"x of dtype bool. Multiply by 255"),
        (PIXELS.astype(complex), "x of dtype complex128"),
        (np.array([*PIXELS, None], object)[:12], r"dtype object. .* list\(x\)"),
        ([b"\xff\xd8"] * 12, r"x\[0\] of dtype \|S2. .* encoded images as files"),
        (tf.constant(["a.png"] * 12), r"x of dtype \|S5. Give paths as str"),
        (PIXELS[0], r"the same length. Received: x of uint8 \[5, 7, 3\]"),
        (PIXELS[..., [0] * 5], r"x of uint8 \[12, 5, 7, 5\]"),
        (np.moveaxis(PIXELS, 3, 1), r"\[12, 3, 5, 7\]. Put the channels last"),
        (list(np.moveaxis(PIXELS, 3, 1)), r"x\[0\] of uint8 \[3, 5, 7\]. Put the"),
        (PIXELS[None], r"x of uint8 \[1, 12, 5, 7, 3\]"),
        (PIXELS[0, 0], r"x of uint8 \[7, 3\]"),
        (np.uint8(3), r"x of uint8 \[\]"),
        (PIXELS[:0], r"There are no images. Received: x of uint8 \[0, 5, 7, 3\]"),
        ([], "There are no images"),
        (PIXELS[:, :0], r"There are no images. Received: x of uint8 \[12, 0, 7, 3\]"),
        ([*PIXELS[:11], PIXELS[0, :0]], r"x\[11\] of uint8 \[0, 7, 3\]"),
        ([*PIXELS[:11], PIXELS], r"x\[11\] of uint8 \[12, 5, 7, 3\]"),
        ([*PIXELS[:11], [[1, 2], [3]]], r"x\[11\] is no array. Received: list \("),
        ("images.npy", r"Received: \(str, ndarray\)"),
        (tf.ragged.constant([[[1], [2, 3]]]), "x"),
        ((PIXELS, INDICES), "Give one of them"),
    ],
)
def test_arrays_that_are_refused(x, words):
    message = refusal((x, INDICES))
    assert re.search(words, message), message


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (INDICES[:11], r"x of uint8 \[12, 5, 7, 3\] and y of int64 \[11\]"),
        (3, r"y of int64 \[\]"),
        (np.zeros((12, 2, 2)), r"labels of float64 \[12, 2, 2\]"),
        (np.zeros((12, 0)), r"labels of float64 \[12, 0\]"),
        (np.full((12, 2), "a"), r"labels of <U1 \[12, 2\]. Give several names"),
        (np.array([3, *"abcdefghijk"], object), r"object \[12\] with int, str"),
        ([["a"], ["a", "b"]] * 6, "y is no array. Received: list"),
        (np.zeros(12, "M8[s]"), "labels of datetime64"),
    ],
)
def test_forms_of_labels_that_are_refused(y, words):
    message = refusal((PIXELS, y))
    assert re.search(words, message), message


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (np.full((12, 3), 1 / 3), "0.33.* for image 0 .*Soft labels .* y.argmax"),
        (INDICES + 0.5, r"0.5 for image 0 .labels of float64 \[12\]"),
        (np.full(12, np.nan), "nan for image 0"),
        (np.array([*INDICES[:11], 2.0**53]), "9007199254740992.0 for image 11"),
        (np.array([*INDICES[:11], -1e300]), r"-1e\+300 for image 11"),
        (np.full((12, 3), 2), r"2 for image 0 \(labels of int64 \[12, 3\]"),
        ([b"\xff"] * 12, r"Labels are UTF-8. Received: b'\\xff'"),
        (["a", ""] * 6, "A label is not empty. Received: '' for image 1"),
        (["a", None] * 6, "Image 1 has no label. Received: None. Add one"),
        (pd.Series(["a", None] * 6), "Image 1 has no label. Received: nan"),
        (pd.Series([1, None] * 6, dtype="Int64"), "Received: nan for image 1"),
    ],
)
def test_labels_that_are_refused(y, words):
    message = refusal((PIXELS, y), KerasTransferError)
    assert re.search(words, message), message


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (np.ones(11), r"each of the 12 images. Received: float64 \[11\]"),
        (["1"] * 12, "Received: <U1"),
        (1.0, r"Received: float64 \[\]"),
    ],
)
def test_forms_of_weights_that_are_refused(weights, words):
    paths = [f"{index}.png" for index in range(12)]
    for data in ((PIXELS, INDICES, weights), (paths, INDICES, weights)):
        message = refusal(data)
        assert re.search(words, message), message


@pytest.mark.parametrize("value", [-1.0, np.inf, np.nan, 1e300])
def test_weights_have_one_rule_in_arrays_datasets_paths_and_tables(value, tmp_path):
    weights = np.array([*np.ones(11), value])
    rule = f"a sample_weight is a number from 0 to 1e+30. Received: {value}."
    paths = [f"{index}.png" for index in range(12)]
    for data in (
        (PIXELS, INDICES, weights),
        dataset(PIXELS, INDICES, weights),
        (paths, INDICES, weights),
        (paths, INDICES, weights[:, None]),
    ):
        assert refusal(data, KerasTransferError) == f"Image 11: {rule}"
    frame = pd.DataFrame({"path": paths, "label": INDICES, "sample_weight": weights})
    with pytest.raises(KerasTransferError, match="the table, row 12: a sample_weight"):
        load(frame)


def test_integers_match_the_classes_of_a_run():
    table, _ = load_all((PIXELS, INDICES), ["0", "1", "2", "3"], False)
    assert table.targets.tolist() == INDICES.tolist()
    with pytest.raises(
        KerasTransferError, match=r"no class '2'\. Its classes are 0, 1"
    ):
        load_all((PIXELS, INDICES), ["0", "1"], False)


def test_arrays_are_divided_into_splits():
    splits = load((PIXELS, INDICES, np.arange(12.0)))
    assert splits.class_names == ("0", "1", "2")
    assert len(splits.train) + len(splits.test) == 12
    for _, table in splits.items():
        assert list(map(int, table.sources)) == table.sample_weight.tolist()


@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.int16, np.float16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=40).flatmap(
            lambda size: st.sampled_from([size, *((*size, c) for c in (1, 2, 3, 4))])
        ),
        elements={"min_value": 0, "max_value": 255},
        fill=st.just(200),
    )
)
@settings(max_examples=60, deadline=None)
def test_any_image_is_decoded_as_its_rounded_pixels(image):
    given_ = ([image, image], [0, 1])
    if image.max() <= 1:
        assert "ultiply them by 255" in refusal(given_, KerasTransferError)
        return
    rgb = image[..., None] if image.ndim == 2 else image[..., :3]
    rgb = rgb[..., :1] if rgb.shape[2] == 2 else rgb
    rgb = np.broadcast_to(np.rint(rgb).astype(np.uint8), (*image.shape[:2], 3))
    expected = resize_image(tf.constant(rgb), SIDE).numpy()
    for encoded in content(listed(given_)).values():
        np.testing.assert_array_equal(pixels(encoded), image)
        np.testing.assert_array_equal(make_decoder(SIDE)(encoded), expected)


def test_arrays_are_listed_without_tensorflow():
    code = (
        "import sys, numpy as np, pandas as pd\n"
        "from keras_transfer.data.loading import load\n"
        "x = np.full((9, 4, 4, 3), 7, np.uint8)\n"
        "splits = load((x, np.arange(9) % 3))\n"
        "assert len(list(splits.read(splits.train.sources))) > 5\n"
        "load(([f'{i}.png' for i in range(9)], list('abcabcabc')))\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    root = str(Path(__file__).parents[2])
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": root}
    )


# Data sets


def dataset(*parts: object) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(parts)


def by_digest(listing: Listing) -> dict[str, str]:
    """Label of each image; fails if an image is not named by its content."""
    for source, encoded in content(listing).items():
        assert source.split("-")[0] == hashlib.sha256(encoded).hexdigest()[:16]
    return dict(zip(listing.sources, names(listing), strict=True))


def test_images_of_a_dataset_are_named_by_content_in_any_order():
    given_ = dataset(PIXELS, INDICES)
    listing = listed(given_)
    assert listing.sources == sorted(listing.sources)
    for encoded, position in zip(
        content_in_order(listing), listing.positions, strict=True
    ):
        np.testing.assert_array_equal(pixels(encoded), PIXELS[position])
    assert listing.root is None
    assert listing.warnings == [GIVE_AGAIN]
    assert listing.class_names == ["0", "1", "2"]
    found = by_digest(listing)
    arrays = content(listed((PIXELS, INDICES))).values()
    assert sorted(content(listing).values()) == sorted(arrays)
    for other in (
        given_.batch(5),
        given_.shuffle(12, seed=3),
        given_.shuffle(12).batch(4).prefetch(1),
        given_.map(lambda x, y: {"image": x, "label": y, "id": 7}),
        given_.map(lambda x, y: (x, y[None])),
    ):
        again = listed(other)
        assert by_digest(again) == found
        assert again.sources == listing.sources


def test_copies_in_a_dataset_are_told_apart():
    x, y = PIXELS[[0, 1, 0, 0]], np.array([0, 1, 1, 0])
    one, other = (listed(dataset(x[o], y[o])) for o in ([0, 1, 2, 3], [3, 2, 1, 0]))
    first = hashlib.sha256(content(one)[one.sources[0]]).hexdigest()[:16]
    assert {f"{first}-2", f"{first}-3"} < {*one.sources} or len({*one.sources}) == 4
    assert by_digest(one) == by_digest(other)
    assert sorted(names(one)) == ["0", "0", "1", "1"]


def test_encoded_images_of_a_dataset_are_kept_as_they_are():
    files = [
        encode(image, kind)
        for image, kind in zip(PIXELS, ["JPEG", "PNG"] * 6, strict=True)
    ]
    for given_ in (dataset(files, INDICES), dataset(files, INDICES).batch(5)):
        assert sorted(content(listed(given_)).values()) == sorted(files)


@pytest.mark.parametrize("shape", [(6, 8), *((6, 8, c) for c in (1, 2, 3, 4))])
@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("known", [True, False])
def test_elements_are_batches_or_images_by_their_rank(shape, one_hot, batch, known):
    x = RNG.integers(0, 256, (12, *shape), np.uint8)
    y = np.eye(3, dtype=np.float32)[INDICES] if one_hot else INDICES
    made = dataset(x, y, np.arange(12.0))
    made = made.batch(batch) if batch else made
    if not known:
        made = tf.data.Dataset.from_generator(
            made.as_numpy_iterator,
            (tf.uint8, tf.float32 if one_hot else tf.int64, tf.float64),
        )
    listing = listed(made)
    assert len(listing.sources) == 12
    weights = listing.sample_weight
    for source, weight, name in zip(
        listing.sources, weights, names(listing), strict=True
    ):
        np.testing.assert_array_equal(pixels(content(listing)[source]), x[int(weight)])
        assert int(name) == INDICES[int(weight)]


def test_a_ragged_batch_holds_images_of_different_sizes():
    shapes = [(3, 5, 3), (8, 2, 3), (1, 1, 3), (6, 6, 3)]
    images = [RNG.integers(0, 256, shape, np.uint8) for shape in shapes]
    single = tf.data.Dataset.from_generator(
        lambda: zip(images, [0, 1, 0, 1], strict=True),
        output_signature=(
            tf.TensorSpec((None, None, 3), tf.uint8),
            tf.TensorSpec((), tf.int32),
        ),
    )
    expected = by_digest(listed(single))
    assert sorted(pixels(x).shape for x in content(listed(single)).values()) == sorted(
        shapes
    )
    assert by_digest(listed(single.ragged_batch(3))) == expected


@pytest.mark.parametrize("mode", ["int", "categorical", "binary"])
def test_a_keras_dataset_names_its_classes(photos, tmp_path, mode):
    folder = photos
    if mode == "binary":
        folder = tmp_path / "two"
        for name in CLASSES[:2]:
            (folder / name).mkdir(parents=True)
            for file in (photos / name).iterdir():
                (folder / name / file.name).symlink_to(file)
    made = keras.utils.image_dataset_from_directory(
        folder, label_mode=mode, image_size=(20, 20), batch_size=8, verbose=False
    )
    listing = listed(made)
    classes = list(CLASSES[:2] if mode == "binary" else CLASSES)
    assert listing.class_names == classes
    assert sorted(names(listing)) == sorted(classes * 20)
    assert all(pixels(x).dtype == np.float32 for x in content(listing).values())


def test_a_dataset_is_read_once_however_often_it_is_listed():
    reads = []

    def generate():
        reads.append(1)
        yield from zip(PIXELS, INDICES, strict=True)

    made = tf.data.Dataset.from_generator(
        generate,
        output_signature=(
            tf.TensorSpec((5, 7, 3), tf.uint8),
            tf.TensorSpec((), tf.int64),
        ),
    )
    once = settled(made)
    assert not reads
    assert name_of(once) == name_of(made) == "memory:dataset"
    one, two = listed(once), listed(settled(once))
    assert content(one) == content(two)
    assert len(reads) == 1
    one.splits[0] = "test"
    assert two.splits[0] == ""


def spec(*shapes: object) -> tuple[tf.TensorSpec, ...]:
    return tuple(tf.TensorSpec(shape, kind) for shape, kind in shapes)


def failing():
    yield PIXELS[0], 1
    raise ValueError("no such luck")


@pytest.mark.parametrize(
    ("made", "error", "words"),
    [
        (lambda: dataset(PIXELS, INDICES).repeat(), UsageError, "infinite cardinality"),
        (lambda: dataset(PIXELS, INDICES).take(0), UsageError, "without any"),
        (
            lambda: dataset(FLOATS / 255, INDICES),
            UsageError,
            "at most 1. Multiply",
        ),
        (
            lambda: dataset(PIXELS // 255, INDICES).batch(5),
            UsageError,
            "integers of at most 1. Leave out the division",
        ),
        (
            lambda: dataset(PIXELS, INDICES).map(lambda x, y: (x // 255, y)).batch(5),
            UsageError,
            "integers of at most 1",
        ),
        (
            lambda: dataset(with_value(-3), INDICES),
            UsageError,
            "image 7 with -3",
        ),
        (lambda: dataset(PIXELS > 9, INDICES), UsageError, "images of dtype bool"),
        (
            lambda: dataset(PIXELS[..., [0] * 5], INDICES),
            UsageError,
            r"image 0 of uint8 \[5",
        ),
        (lambda: dataset(PIXELS), UsageError, "tuples of 1"),
        (lambda: tf.data.Dataset.range(5), UsageError, "Received: TensorSpec"),
        (
            lambda: tf.data.Dataset.from_tensor_slices({"photo": PIXELS, "y": INDICES}),
            UsageError,
            r"dictionaries of photo, y. Select them with map\(\)",
        ),
        (
            lambda: dataset(PIXELS, {"y": INDICES}),
            UsageError,
            "Received: TensorSpec, dict",
        ),
        (
            lambda: dataset(PIXELS, np.zeros((12, 2, 2))),
            UsageError,
            r"image \[5, 7, 3\], label \[2, 2\]",
        ),
        (lambda: dataset(PIXELS, INDICES + 0.5), KerasTransferError, "0.5 for image 0"),
        (
            lambda: dataset(PIXELS, tf.ragged.constant([[1], [2, 3]] * 6)),
            UsageError,
            "Received: TensorSpec, RaggedTensorSpec",
        ),
        (
            lambda: tf.data.Dataset.from_generator(
                failing, output_signature=spec(((5, 7, 3), "uint8"), ((), "int32"))
            ),
            KerasTransferError,
            "failed after 1 elements. Received: ValueError: no such luck",
        ),
        (
            lambda: dataset([b"no image"] * 12, INDICES).map(
                lambda x, y: (tf.io.decode_jpeg(x), y)
            ),
            KerasTransferError,
            "failed after 0 elements",
        ),
    ],
)
def test_datasets_that_are_refused(made, error, words):
    message = refusal(made(), error)
    assert re.search(words, message), message


def test_class_names_that_do_not_fit_are_refused():
    made = dataset(PIXELS, INDICES)
    made.class_names = ["a", "b"]
    message = refusal(made, KerasTransferError)
    assert "index of the 2 class_names. Received: 2 for image 2" in message
    for repeated in (["u", "u", "w"], ["u", "", "w"]):
        made.class_names = repeated
        message = refusal(made, KerasTransferError)
        assert "Names of classes are different, and not empty. Re" in message
        assert str(repeated) in message
    made = dataset(PIXELS, np.eye(3)[INDICES])
    made.class_names = ["a", "b"]
    assert "Received: 2 class_names" in refusal(made)
    made = dataset(PIXELS, INDICES)
    made.class_names = ["a", "b", "c", "d"]
    listing = listed(made)
    assert listing.class_names == ["a", "b", "c"]
    assert listing.warnings[1:] == [
        "1 of 4 classes have no image and were left out: d."
    ]


@pytest.mark.parametrize("batch", [0, 32])
def test_a_generator_that_repeats_its_images_ends_in_an_error(batch):
    def generate():
        rng = np.random.default_rng(0)
        while True:
            for index in rng.permutation(12):
                yield PIXELS[index], INDICES[index]

    made = tf.data.Dataset.from_generator(
        generate, output_signature=spec(((5, 7, 3), "uint8"), ((), "int64"))
    )
    message = refusal(made.batch(batch) if batch else made, KerasTransferError)
    assert "images, of which 12 are different. Leave out repeat()" in message


@pytest.mark.parametrize("size", [100, 3000])
def test_a_generator_of_ever_new_images_does_not_fill_the_disk(
    small_disk, monkeypatch, size
):
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))

    def generate():
        for index in itertools.count():
            image = np.zeros((size, size, 3), np.uint8)
            image.flat[:4] = np.array([index]).astype(np.uint32).view(np.uint8)
            yield image, index % 2

    made = tf.data.Dataset.from_generator(
        generate, output_signature=spec(((size, size, 3), "uint8"), ((), "int64"))
    )
    message = refusal(made, KerasTransferError)
    assert "does not end, or is too large" in message
    assert "set TMPDIR" in message
    found = os.statvfs(small_disk)
    assert found.f_bavail == found.f_blocks  # nothing is left behind


def test_memory_does_not_grow_with_the_dataset():
    code = (
        "import resource, numpy as np, tensorflow as tf\n"
        "from keras_transfer.config import ListingConfig\n"
        "from keras_transfer.data.in_memory.forms import list_memory\n"
        "def peak(count):\n"
        "    x = tf.data.Dataset.range(count).map(\n"
        "        lambda i: (tf.fill((256, 256, 3), tf.cast(i / 9, 'float32')), 1))\n"
        "    listing = list_memory(x.batch(16), ListingConfig(), False)\n"
        "    read = listing.read(listing.sources)\n"
        "    assert sum(len(y) for _, y in read) > count * 256 * 256 * 12\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "few = peak(40)\n"
        "print(few, peak(400))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    few, many = map(float, done.stdout.split())
    assert many - few < 100  # of 315 MB


# Paths and tables


def paths_and_labels(listing: Listing) -> dict[str, tuple[str, ...]]:
    return dict(zip(listing.sources, listing.labels, strict=True))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    found = [tmp_path / f"{index}.png" for index in range(4)]
    for path, image in zip(found, PIXELS, strict=False):
        path.write_bytes(encode(image, "PNG"))
    return found


LABELS = ["b", "a", "b", "a"]


def test_paths_come_in_many_forms(files):
    expected = {str(file): (name,) for file, name in zip(files, LABELS, strict=True)}
    texts = [str(file) for file in files]
    for given_ in (
        (files, LABELS),
        (texts, LABELS),
        (tuple(texts), tuple(LABELS)),
        ([file.name for file in files], LABELS),
        (np.array(texts), np.array(LABELS)),
        (np.array(files, object), np.array(LABELS, object)),
        (pd.Series(files), pd.Series(LABELS)),
        (pl.Series(texts), pl.Series(LABELS)),
        (pa.chunked_array([texts]), pa.array(LABELS)),
        (iter(files), iter(LABELS)),
        (iter(files), LABELS),
        list(zip(files, LABELS, strict=True)),
        [[file, name] for file, name in zip(files, LABELS, strict=True)],
        zip(files, LABELS, strict=True),
        ((file, name) for file, name in zip(texts, LABELS, strict=True)),
        {str(file): name for file, name in zip(files, LABELS, strict=True)}.items(),
    ):
        assert name_of(given_) == "memory:paths"
        listing = listed(given_)
        assert paths_and_labels(listing) == expected
        assert listing.warnings == []
        assert not listing.multi_label
        assert sorted(content(listing).values()) == sorted(
            f.read_bytes() for f in files
        )


def test_iterators_are_consumed_once_and_listed_often(files):
    once = settled(zip(files, LABELS, strict=True))
    assert settled(once) is once
    assert name_of(once) == "memory:paths"
    assert paths_and_labels(listed(once)) == paths_and_labels(listed(once))
    splits = load(once)
    assert splits.class_names == ("a", "b")


def test_paths_have_integers_lists_and_weights(files):
    listing = listed((files, [10, 9, 10, 9], [1, 2, 3, 4]))
    assert names(listing) == ["10", "9", "10", "9"]
    assert load((files, [10, 9, 10, 9])).class_names == ("9", "10")
    assert listing.sample_weight == [1, 2, 3, 4]
    column = np.array([[10], [9], [10], [9]])
    assert listed((files, column, column)).labels == listing.labels
    assert listed((files, column, column)).sample_weight == [10, 9, 10, 9]
    lists = [["a", "b"], [], ["b"], ("a",)]
    listing = listed((files, lists))
    assert listing.multi_label
    assert listing.labels == [("a", "b"), (), ("b",), ("a",)]
    assert listed([(file, ["a"]) for file in files]).multi_label


def test_paths_need_not_be_unicode(tmp_path):
    file = os.fsdecode(b"\xff.png")
    Path(file).write_bytes(b"1")
    listing = listed(([file, "2.png"], ["a", "b"]))
    assert dict(listing.read(listing.sources[:1])) == {str(tmp_path / file): b"1"}


def frames(files: list[Path]) -> dict[str, object]:
    texts = [str(file) for file in files]
    columns = {"path": texts, "label": LABELS, "age": [1, 2, 3, 4]}
    table = pa.table(columns)
    return {
        "pandas": pd.DataFrame({**columns, "path": files}, index=[7, 7, 8, 9]),
        "categories": pd.DataFrame({**columns, "label": pd.Categorical(LABELS)}),
        "polars": pl.DataFrame(columns),
        "polars categories": pl.DataFrame(columns).with_columns(
            pl.col("label").cast(pl.Categorical)
        ),
        "pyarrow": table,
        "batch": table.to_batches()[0],
        "stream": table.to_reader(),
    }


@pytest.mark.parametrize(
    "kind",
    (
        "pandas",
        "categories",
        "polars",
        "polars categories",
        "pyarrow",
        "batch",
        "stream",
    ),
)
def test_tables_of_other_libraries(files, kind):
    given_ = settled(frames(files)[kind])
    assert name_of(given_) == "memory:paths"
    for _ in range(2):
        listing = listed(given_)
        expected = {str(f): (name,) for f, name in zip(files, LABELS, strict=True)}
        assert paths_and_labels(listing) == expected
        assert listing.extra.column_names == ["age"]
        assert listing.extra["age"].to_pylist() == [1, 2, 3, 4]


def test_columns_of_a_frame_that_arrow_does_not_know_are_text(files):
    frame = pd.DataFrame(
        {"path": files, "label": LABELS, 5: [1, "x", None, Path("y")], "z": [1j] * 4}
    )
    listing = listed(frame)
    assert listing.extra["5"].to_pylist()[1:2] == ["x"]
    assert names(listing) == LABELS


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NA, pd.NaT])
def test_missing_values_are_missing_however_they_are_written(files, missing):
    mixed = [1, "b", missing, 1]
    frame = pd.DataFrame({"path": files, "label": LABELS, "patient": mixed})
    listing = listed(frame, group_column="patient")
    assert listing.groups == ["1", "b", "", "1"]
    frame = pd.DataFrame({"path": files, "label": mixed})
    assert "row 3: " in (message := str(caught_by(frame)))
    assert "has no label" in message
    for labels in (
        ["a", "b", missing, "a"],
        pd.Series(["a", "b", missing, "a"], dtype=object),
        pd.Series([1, 2, missing, 1], dtype=object),
        np.array(["a", "b", missing, "a"], object),
    ):
        assert "has no label" in str(caught_by((files, labels)))
        pairs = list(zip(files, labels, strict=True))
        assert "has no label" in str(caught_by(pairs))
    assert "has no label" in str(caught_by((files, pd.Series(["a", "b", None, "a"]))))


def test_the_home_directory_may_be_short():
    listing = listed((["~/a.jpg", Path("~/b.jpg")], ["x", "y"]))
    assert listing.sources == [str(Path.home() / name) for name in ("a.jpg", "b.jpg")]


def caught_by(data: object) -> KerasTransferError:
    with pytest.raises(KerasTransferError) as caught:
        listed(data)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_path_in_a_frame_need_not_be_unicode(tmp_path):
    file = os.fsdecode(b"\xff.png")
    Path(file).write_bytes(b"1")
    for kind in (str, Path):
        frame = pd.DataFrame(
            {
                "path": pd.Series([kind(file), kind("2.png")], dtype=object),
                "label": [1, 2],
            }
        )
        listing = listed(frame)
        assert dict(listing.read(listing.sources[:1])) == {str(tmp_path / file): b"1"}


def test_named_columns_of_a_frame(files):
    frame = pd.DataFrame({"scan": files, "diagnosis": LABELS})
    listing = listed(frame, path_column="scan", label_column="diagnosis")
    assert names(listing) == LABELS
    refusal(frame, path_column="photo")


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ((["a", "b"], ["x"]), UsageError, "2 paths and 1 of label"),
        ((["a"], itertools.repeat("x")), UsageError, "1 paths and 2 or more of label"),
        ((["a", "b"], ["x", "y"], [1]), UsageError, r"the 2 images. .* int64 \[1\]"),
        ((["a", "b"], ["x", "y"], ["1", "2"]), UsageError, "the 2 images. .* <U1"),
        ((["a", "b"], None), UsageError, "one for each path. Received: NoneType"),
        ((["a", "b"], 3), UsageError, "one for each path. Received: int"),
        ((["a"], np.array(3)), UsageError, "one for each path. Received: ndarray"),
        ((["a", "b"], "xy"), UsageError, "one for each path. Received: str"),
        ((["a", "b"], np.eye(2)), UsageError, r"float64 \[2, 2\]. .* y.argmax\(1\)"),
        ((["a", 3], ["x", "y"]), UsageError, "item 1 is int '3'"),
        ((["a", ""], ["x", "y"]), UsageError, "item 1 is str ''"),
        ((["a", "b"], ["x", 3]), UsageError, r"all integers .* \['x', 3\]"),
        ((["a", "b"], ["x", ["y"]]), UsageError, "lists of strings"),
        (
            (["a", "./a"], ["x", "y"]),
            KerasTransferError,
            "Received: ./a as item 0 and 1",
        ),
        (itertools.cycle([("a", "x"), ("b", "y")]), KerasTransferError, "item 0 and 2"),
        ([("a", "x"), ("b",)], UsageError, r"item 1 is tuple \"\('b',\)\""),
        (["a.png", "b.png"], UsageError, "item 0 is str 'a.png'"),
        ([PIXELS, INDICES], UsageError, r"item 0 is ndarray .* tuple \(x, y\)"),
        (iter([(PIXELS[0], 1)]), UsageError, "item 0 is tuple"),
        ((iter(PIXELS), INDICES), UsageError, "item 0 is ndarray"),
        (("folder", "labels.csv"), UsageError, r"\(str, str\)"),
        (({"a": 1}, {"b": 2}), UsageError, "x is no array. Received: dict"),
        ((None, INDICES), UsageError, "x is no array. Received: NoneType"),
        ((PIXELS, None), UsageError, "y is no array. Received: NoneType"),
        (tf.constant(PIXELS), UsageError, "Received: EagerTensor"),
        (PIXELS, UsageError, "Received: ndarray"),
        ({"path": ["a"], "label": ["x"]}, UsageError, "Received: dict"),
        (b"folder", UsageError, "Received: bytes"),
        (7, UsageError, "Received: int"),
        (pl.Series(["a"]), UsageError, "no table of images. Received: Series"),
    ],
)
def test_what_is_neither_paths_nor_tables_is_refused(data, error, words):
    message = refusal(data, error)
    assert re.search(words, message), message


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return PIXELS, INDICES


def test_loaders_of_batches_are_refused():
    message = refusal(Batches())
    assert "(path, label) pairs" in message


@pytest.mark.parametrize("data", ["digits", Path("x") / "y"])
def test_paths_and_names_stand_for_themselves(data):
    assert settled(data) == str(data)
    assert name_of(data) == str(data)
