"""Extraction: the base runs in inference mode, and once an image."""

import collections
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, Told, draw, encode, without_root_powers

from keras_transfer.config import AugmentPolicy, choices
from keras_transfer.data import loading, reading
from keras_transfer.data.augment import make_augmenter
from keras_transfer.data.decode import (
    DecodedImage,
    make_decoder,
    make_measuring_decoder,
)
from keras_transfer.data.reading import read_files
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.features import engine as engine_module
from keras_transfer.features.cache import FeatureCache
from keras_transfer.features.engine import BATCH_SIZE, Engine, make_engine, predict
from keras_transfer.features.extraction import Images, extract_features
from keras_transfer.features.frozen_part import FrozenPart, Storage, frozen_features
from keras_transfer.features.shards import FeatureSpec
from keras_transfer.models.bases import get_base
from keras_transfer.models.classifier import build_base
from keras_transfer.runtime.openvino import import_openvino, instruction_set

SIZE = 64
SMALL = 16


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([draw(CLASSES[i % 3], rng, SIZE) for i in range(19)])


@pytest.fixture(scope="module")
def lite() -> keras.Model:
    return build_base(get_base("efficientnet_lite0"), "imagenet", SIZE, 0)


@pytest.fixture(scope="module")
def lite_openvino(lite) -> Engine:
    return make_engine(lite)


@pytest.fixture(scope="module")
def lite_keras(lite) -> Engine:
    return make_engine(lite, name="keras")


@pytest.fixture(scope="module")
def noisy() -> keras.Model:
    """A small model full of layers that act otherwise in training."""
    keras.utils.set_random_seed(0)
    image = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Rescaling(1 / 255)(image)
    x = keras.layers.RandomFlip()(x)
    x = keras.layers.GaussianNoise(0.5)(x)
    x = keras.layers.Conv2D(8, 3, strides=4)(x)
    normalization = keras.layers.BatchNormalization()
    x = keras.layers.SpatialDropout2D(0.5)(normalization(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(image, keras.layers.Dropout(0.5)(x))
    ones = np.ones(8, np.float32)
    normalization.set_weights([2 * ones, 3 * ones, 0.1 * ones, 0.5 * ones])
    return model


@pytest.fixture(scope="module")
def small() -> Engine:
    keras.utils.set_random_seed(0)
    image = keras.Input((SMALL, SMALL, 3))
    x = keras.layers.Conv2D(8, 3, activation="relu")(image)
    return make_engine(keras.Model(image, keras.layers.GlobalAveragePooling2D()(x)))


def by_keras(model: keras.Model, pixels: np.ndarray) -> np.ndarray:
    return np.asarray(model(pixels.astype(np.float32), training=False))


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest value."""
    assert actual.shape == expected.shape
    assert np.ptp(expected, axis=0).max() > 0, "all images look the same"
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def test_openvino_agrees_with_keras(lite, lite_openvino, pixels):
    outputs = predict(lite_openvino, pixels)
    assert (lite_openvino.name, lite_openvino.precision) == ("openvino", "f32")
    assert outputs.dtype == np.float32
    assert np.abs(outputs - by_keras(lite, pixels)).max() < 1e-4


def test_openvino_agrees_with_keras_on_a_random_base(pixels):
    base = build_base(get_base("MobileNetV2"), "none", SIZE, 0)
    outputs = predict(make_engine(base), pixels)
    assert difference(outputs, by_keras(base, pixels)) < 1e-4


def test_openvino_gives_the_output_only(pixels):
    image = keras.Input(pixels.shape[1:])
    features = keras.layers.Conv2D(3, 3, activation="silu")(image)  # as EfficientNet's
    model = keras.Model(image, keras.layers.GlobalAveragePooling2D()(features))
    engine = make_engine(model)
    assert engine.name == "openvino"
    assert difference(predict(engine, pixels), by_keras(model, pixels)) < 1e-3


@pytest.mark.parametrize("name", ["openvino", "keras"])
def test_features_do_not_depend_on_the_batch_an_image_comes_in(request, pixels, name):
    engine = request.getfixturevalue(f"lite_{name}")
    together = predict(engine, pixels)
    for count in (1, 7, 8):
        assert np.array_equal(predict(engine, pixels[:count]), together[:count])
    order = np.random.default_rng(1).permutation(len(pixels))
    assert np.array_equal(predict(engine, pixels[order]), together[order])


def test_each_batch_keeps_its_tag_and_its_place(small):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, SMALL, SMALL, 3), np.uint8)
    parts = np.split(images, np.cumsum([8, 1, 7, 8, 3, 8]))
    expected = np.split(predict(small, images), np.cumsum([8, 1, 7, 8, 3, 8]))
    outputs = list(small.run(enumerate(parts)))
    assert [tag for tag, _ in outputs] == list(range(len(parts)))
    for (_, actual), wanted in zip(outputs, expected, strict=True):
        assert np.array_equal(actual, wanted)


@pytest.mark.parametrize("name", [None, "keras"])
def test_layers_are_in_inference_mode(noisy, pixels, name):
    engine = make_engine(noisy, name=name)
    before = noisy.get_weights()
    first, second = predict(engine, pixels), predict(engine, pixels)
    assert np.array_equal(first, second)
    assert difference(first, by_keras(noisy, pixels)) < 1e-5
    for old, new in zip(before, noisy.get_weights(), strict=True):
        assert np.array_equal(old, new)
    trained = noisy(pixels.astype(np.float32), training=True)
    assert difference(np.asarray(trained), first) > 0.01


class Foreign(keras.layers.Layer):
    """Runs Python code, which OpenVINO cannot."""

    def __init__(self, wrapper):
        super().__init__()
        self.wrapper = wrapper

    def call(self, x):
        result = self.wrapper(lambda pixels: pixels * np.float32(2), [x], tf.float32)
        result.set_shape(x.shape)
        return result


def with_foreign_code(wrapper) -> keras.Model:
    image = keras.Input((SIZE, SIZE, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(Foreign(wrapper)(image))
    return keras.Model(image, pooled)


@pytest.mark.parametrize(
    "wrapper", [tf.numpy_function, tf.py_function], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("precision", ["f32", "auto"])
def test_keras_runs_what_openvino_cannot(pixels, wrapper, precision):
    model = with_foreign_code(wrapper)
    told = Told()
    engine = make_engine(model, precision, pixels[:BATCH_SIZE], listener=told)
    assert (engine.name, engine.precision) == ("keras", "f32")
    (note,) = told.notes
    assert note.startswith("engine keras: OpenVINO cannot convert it")
    expected = 2 * pixels.mean(axis=(1, 2))
    np.testing.assert_allclose(predict(engine, pixels), expected, rtol=1e-5)


def test_bfloat16_without_openvino_is_refused():
    with pytest.raises(
        UsageError, match=r"bfloat16 needs OpenVINO.*Use auto"
    ) as caught:
        make_engine(with_foreign_code(tf.numpy_function), "bf16")
    assert "\n" not in str(caught.value)


def test_engine_keras_can_be_asked_for(lite, lite_keras, pixels):
    assert (lite_keras.name, lite_keras.precision) == ("keras", "f32")
    outputs = predict(lite_keras, pixels)
    assert outputs.dtype == np.float32
    assert np.abs(outputs - by_keras(lite, pixels)).max() < 1e-4


def has_bf16() -> bool:
    core = import_openvino().Core()
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture(scope="module")
def rounded(lite, pixels) -> np.ndarray:
    """bfloat16 features of the first batch."""
    if not has_bf16():
        pytest.skip("this CPU has no bfloat16")
    return predict(make_engine(lite, "bf16"), pixels[:BATCH_SIZE])


@pytest.mark.parametrize("accepted", [engine_module.MAX_BF16_ERROR, 1.0])
def test_auto_decides_by_what_it_measures(
    lite, lite_openvino, rounded, pixels, accepted, monkeypatch
):
    monkeypatch.setattr(engine_module, "MAX_BF16_ERROR", accepted)
    sample = pixels[:BATCH_SIZE]
    told = Told()
    engine = make_engine(lite, "auto", sample, listener=told)
    (note,) = told.notes
    numbers = re.search(
        rf"precision {engine.precision}: on {len(sample)} images bfloat16 is "
        r"([\d.]+) times as fast and changes features by ([\d.]+)%",
        note,
    )
    assert numbers
    speed, error = float(numbers[1]), float(numbers[2]) / 100

    exact = predict(lite_openvino, sample)
    change = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 0 < change < 0.2
    assert error == pytest.approx(change, abs=6e-4)
    if engine.precision == "bf16":
        assert speed >= 1.0
        assert change <= accepted
        assert np.array_equal(predict(engine, sample), rounded)
    else:
        assert speed <= 1.0 or change > accepted
        assert np.array_equal(predict(engine, sample), exact)


def test_a_cpu_without_bfloat16_uses_float32():
    script = """
import json, sys
import numpy as np, keras, openvino
from keras_transfer.errors import UsageError
from keras_transfer.events import Broadcast
from keras_transfer.features.engine import make_engine, predict
core = openvino.Core()
if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
    print("null")
    sys.exit()
image = keras.Input((16, 16, 3))
x = keras.layers.Conv2D(4, 3)(image)
model = keras.Model(image, keras.layers.GlobalAveragePooling2D()(x))
pixels = np.arange(9 * 16 * 16 * 3).astype(np.uint8).reshape(9, 16, 16, 3)
expected = np.asarray(model(pixels.astype(np.float32), training=False))
told = Broadcast(())
engine = make_engine(model, "auto", pixels[:8], listener=told)
error = float(abs(predict(engine, pixels) / expected - 1).max())
try:
    make_engine(model, "bf16")
except UsageError as caught:
    refusal = str(caught)
chosen = [engine.name, engine.precision, told.notes]
print(json.dumps([*chosen, error, refusal]))
"""
    environment = os.environ | {"OV_CPU_MAX_ISA": "AVX2"}
    output = subprocess.check_output(
        [sys.executable, "-c", script],
        env=environment,
        text=True,
        stderr=subprocess.DEVNULL,
    )
    found = json.loads(output.splitlines()[-1])
    if found is None:
        pytest.skip("this CPU cannot be made to hide its bfloat16")
    engine, precision, notes, error, refusal = found
    assert (engine, precision) == ("openvino", "f32")
    assert notes == ["precision f32: this CPU has no bfloat16"]
    assert error < 1e-5
    assert refusal == "This CPU has no bfloat16. Received: precision bf16. Use auto."


class Counted:
    """An engine that counts the images it runs."""

    def __init__(self, engine: Engine):
        self.name, self.precision = engine.name, engine.precision
        self.device, self.batch_size = engine.device, engine.batch_size
        self.images = 0
        self._engine = engine

    def run(self, batches):
        for tag, outputs in self._engine.run(batches):
            self.images += len(outputs)
            yield tag, outputs


class Pipeline:
    """`extract_features` on the files of a folder, with its parts counted."""

    def __init__(self, folder: Path, engine: Engine):
        self.folder = folder
        self.engine = Counted(engine)
        self.cache = FeatureCache(folder / "cache")
        self.decoder = make_measuring_decoder(SMALL)
        self.augment = make_augmenter(SMALL, seed=3)
        self.forget()

    def forget(self) -> None:
        self.decodes: collections.Counter[bytes] = collections.Counter()
        self.engines_made = 0
        self.asked: list[str] = []
        self.engine.images = 0

    @property
    def images_run(self) -> int:
        return self.engine.images

    def sources(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.suffix)

    def bytes_of(self, source: str) -> bytes:
        return (self.folder / source).read_bytes()

    def read(self, sources):
        return read_files(sources, self.folder)

    def decode(self, encoded: bytes) -> DecodedImage:
        self.decodes[encoded] += 1
        return self.decoder(encoded)

    def make_engine(self, sample: np.ndarray) -> Counted:
        assert sample.dtype == np.uint8
        assert sample.shape[1:] == (SMALL, SMALL, 3)
        self.engines_made += 1
        return self.engine

    def tables(self, precision: str):
        return [
            self.cache.table(FeatureSpec("base", "", SMALL, "", precision, 1, view))
            for view in range(3)
        ]

    def tables_of(self, engine: Engine):
        self.asked.append(engine.precision)
        return self.tables(engine.precision)

    def run(
        self,
        sources=None,
        precision="f32",
        on_image=lambda *_: None,
        make_engine=None,
        **options,
    ):
        images = {
            "sources": self.sources() if sources is None else sources,
            "read": self.read,
            "decode": self.decode,
            "augment": self.augment,
        }
        return extract_features(
            Images(**images | options),
            self.tables(precision),
            make_engine or self.make_engine,
            self.tables_of,
            Told(on_image),
        )

    def check(self, extraction, sources, view=0) -> None:
        """The cache has, on disk, the right features of these images."""
        digests = [hashlib.sha256(self.bytes_of(s)).digest() for s in sources]
        assert [extraction.digests[source] for source in sources] == digests
        pixels = [self.decoder(self.bytes_of(x)).pixels for x in sources]
        if view:
            pairs = zip(pixels, digests, strict=True)
            pixels = [self.augment(image, digest, view) for image, digest in pairs]
        expected = predict(self.engine, np.stack(pixels))
        for table in (extraction.tables[view], self.tables("f32")[view]):
            assert all(digest in table for digest in digests)
            assert np.array_equal(table.features(digests)[:], expected)
        self.forget()


@pytest.fixture
def pipeline(tmp_path, photos, small):
    for index in range(20):
        shutil.copy(photos / "circle" / f"{index:02d}.jpg", tmp_path)
    return Pipeline(tmp_path, small)


def test_each_image_is_computed_once(pipeline):
    seen = []
    extraction = pipeline.run(on_image=lambda *_: seen.append(1))
    assert len(seen) == 20
    assert set(pipeline.decodes.values()) == {1}
    assert (extraction.decoded, pipeline.images_run) == (20, 20)
    assert extraction.decode_seconds > 0
    assert pipeline.engines_made == 1
    assert extraction.engine is pipeline.engine
    assert (extraction.forwarded, extraction.forward_seconds > 0) == (20, True)
    assert extraction.skipped == {}
    pipeline.check(extraction, pipeline.sources())


def test_copies_of_an_image_are_computed_once(pipeline):
    for index in range(8):
        shutil.copy(pipeline.folder / "00.jpg", pipeline.folder / f"copy{index}.jpg")
    extraction = pipeline.run()
    assert set(pipeline.decodes.values()) == {1}
    assert extraction.decoded == len(pipeline.decodes) == pipeline.images_run == 20
    pipeline.check(extraction, pipeline.sources())


def test_the_second_time_nothing_is_computed(pipeline):
    first = pipeline.run()
    pipeline.forget()
    shutil.copy(pipeline.folder / "00.jpg", pipeline.folder / "another_name.jpg")
    second = pipeline.run()
    assert (len(pipeline.decodes), pipeline.engines_made) == (0, 0)
    assert (second.decoded, second.engine) == (0, None)
    assert second.digests.items() > first.digests.items()
    pipeline.check(second, pipeline.sources())


def test_only_new_and_edited_files_are_computed(pipeline):
    pipeline.run()
    pipeline.forget()
    rng = np.random.default_rng(0)
    for name in ("03.jpg", "new.png"):
        (pipeline.folder / name).write_bytes(encode(draw("stripes", rng), "PNG"))
    extraction = pipeline.run()
    changed = {pipeline.bytes_of("03.jpg"): 1, pipeline.bytes_of("new.png"): 1}
    assert pipeline.decodes == changed
    assert (extraction.decoded, pipeline.images_run) == (2, 2)
    pipeline.check(extraction, pipeline.sources())


def test_unusable_files_are_skipped_with_their_reason(pipeline):
    good = pipeline.sources()
    cut = pipeline.bytes_of("00.jpg")[:700]
    bad = {"cut.jpg": cut, "cut2.jpg": cut, "empty.jpg": b"", "text.jpg": b"hello"}
    for name, data in bad.items():
        (pipeline.folder / name).write_bytes(data)
    (pipeline.folder / "folder.jpg").mkdir()
    everything = [*bad, "missing.jpg", *good, "folder.jpg"]
    for made in (1, 0):
        pipeline.forget()
        seen = []
        extraction = pipeline.run(everything, on_image=lambda *_: seen.append(1))  # noqa: B023
        assert len(seen) == len(everything)
        assert extraction.skipped == {
            "cut.jpg": "damaged or truncated, 700 bytes",
            "cut2.jpg": "damaged or truncated, 700 bytes",
            "empty.jpg": "an empty file",
            "text.jpg": "not an image",
            "missing.jpg": "cannot be read: No such file or directory",
            "folder.jpg": "cannot be read: it is not a regular file",
        }
        assert sorted(extraction.digests) == good
        assert set(pipeline.decodes.values()) == {1}
        assert (extraction.decoded, pipeline.engines_made) == (20 * made, made)
        pipeline.check(extraction, good)


def test_all_files_may_be_unusable(pipeline):
    (pipeline.folder / "bad.jpg").write_bytes(b"hello")
    extraction = pipeline.run(["bad.jpg", "missing.jpg"])
    assert set(extraction.skipped) == {"bad.jpg", "missing.jpg"}
    assert (extraction.digests, extraction.engine) == ({}, None)
    assert pipeline.engines_made == 0
    assert [len(table.features([])) for table in extraction.tables] == [0, 0, 0]


@pytest.mark.parametrize(
    ("place", "engine", "kept"),
    [
        ("on_image", "openvino", {50}),
        ("on_image", "keras", {50}),
        # Of the 49 that were read, up to 9 were still to be decoded.
        ("read", "keras", {40, 48}),
        ("read", "openvino", {40, 48}),
    ],
)
def test_what_is_finished_when_interrupted_is_kept(
    tmp_path, photos, small, place, engine, kept
):
    for path in photos.glob("*/*.jpg"):
        shutil.copy(path, tmp_path / f"{path.parent.name}{path.name}")
    if engine == "keras":
        image = keras.Input((SMALL, SMALL, 3))
        x = keras.layers.GlobalAveragePooling2D()(image)
        small = make_engine(keras.Model(image, x), name="keras")
    pipeline = Pipeline(tmp_path, small)
    calls = []

    def count(*_) -> None:
        calls.append(1)
        if len(calls) == 50:
            raise KeyboardInterrupt

    def counting_read(sources):
        for item in pipeline.read(sources):
            count()
            yield item

    options = {"on_image": count} if place == "on_image" else {"read": counting_read}
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(decoded_ahead=BATCH_SIZE, **options)

    pipeline.forget()
    extraction = pipeline.run()
    assert extraction.decoded == sum(pipeline.decodes.values()) == pipeline.images_run
    assert 60 - extraction.decoded in kept
    pipeline.check(extraction, pipeline.sources())


@pytest.fixture
def many(tmp_path, photos, small):
    """A pipeline of 60 photos."""
    for path in photos.glob("*/*.jpg"):
        shutil.copy(path, tmp_path / f"{path.parent.name}{path.name}")
    return Pipeline(tmp_path, small)


def test_the_first_batch_does_not_wait_for_many_images(many):
    read, done = 0, threading.Semaphore(0)
    read_before = []

    def slow_read(sources):
        nonlocal read
        for item in many.read(sources):
            read += 1
            yield item
            done.acquire(timeout=10)

    def decode_and_tell(encoded):
        image = many.decode(encoded)
        done.release()
        return image

    def make_and_tell(sample):
        read_before.append(read)
        return many.make_engine(sample)

    extraction = many.run(
        read=slow_read,
        decode=decode_and_tell,
        make_engine=make_and_tell,
        decoded_ahead=446,
    )
    assert extraction.decoded == read == 60
    assert BATCH_SIZE <= read_before[0] <= 3 * BATCH_SIZE


def test_encoded_images_that_wait_are_bounded_by_bytes(many, monkeypatch):
    monkeypatch.setattr(reading, "MOST_BYTES_AHEAD", 20_000)
    lock = threading.Lock()
    waiting = furthest = largest = 0

    def counting_read(sources):
        nonlocal waiting, furthest, largest
        for source, encoded in many.read(sources):
            with lock:
                waiting += len(encoded)
                furthest = max(furthest, waiting)
                largest = max(largest, len(encoded))
            yield source, encoded

    def slow_decode(encoded):
        nonlocal waiting
        time.sleep(0.005)
        with lock:
            waiting -= len(encoded)
        return many.decode(encoded)

    options = {"read": counting_read, "decode": slow_decode}
    assert many.run(**options, decoded_ahead=446).decoded == 60
    assert 10_000 < furthest <= 20_000 + 2 * largest


def test_a_warm_cache_that_is_read_only_works(public_directory, photos, small):
    for index in range(9):
        shutil.copy(photos / "circle" / f"{index:02d}.jpg", public_directory)
    pipeline = Pipeline(public_directory, small)
    first = pipeline.run()
    shutil.copy(photos / "square" / "00.jpg", public_directory / "new.jpg")
    for path in (*pipeline.cache.directory.rglob("*"), pipeline.cache.directory):
        path.chmod(0o555 if path.is_dir() else 0o444)
    with without_root_powers():
        second = pipeline.run(sorted(first.digests))
        assert (second.decoded, second.engine) == (0, None)
        pipeline.check(second, sorted(first.digests))
        with pytest.raises(KerasTransferError, match="cannot be written"):
            pipeline.run()


def test_where_one_table_cannot_be_written_the_others_are(many):
    views = dict.fromkeys(many.sources(), 1)
    key = FeatureSpec("base", "", SMALL, "", "f32", 1, 0).key()
    folder = many.cache.directory / key

    def put_a_file_in_its_way(*_) -> None:
        if folder.is_dir():
            shutil.rmtree(folder)
            folder.touch()

    with pytest.raises(KerasTransferError, match="cannot be written"):
        many.run(views=views, on_image=put_a_file_in_its_way)
    folder.unlink()
    many.forget()
    extraction = many.run(views=views)
    assert (extraction.decoded, many.images_run) == (60, 60)
    many.check(extraction, many.sources(), view=1)


def test_views_are_cached_for_the_images_that_have_them(pipeline):
    views = {"00.jpg": 2, "01.jpg": 1, "02.jpg": 0}
    extraction = pipeline.run(views=views)
    assert set(pipeline.decodes.values()) == {1}
    assert (extraction.decoded, pipeline.images_run) == (20, 23)
    pipeline.check(extraction, pipeline.sources())
    pipeline.check(extraction, ["00.jpg", "01.jpg"], view=1)
    pipeline.check(extraction, ["00.jpg"], view=2)
    rows = [sum(d in t for d in extraction.digests.values()) for t in extraction.tables]
    assert rows == [20, 2, 1]

    second = pipeline.run(views=views)
    assert (second.decoded, pipeline.engines_made) == (0, 0)
    third = pipeline.run(views=views | {"02.jpg": 1})
    assert pipeline.decodes == {pipeline.bytes_of("02.jpg"): 1}
    assert pipeline.images_run == 1
    pipeline.check(third, ["00.jpg", "01.jpg", "02.jpg"], view=1)


def test_a_copy_with_views_adds_only_its_views(pipeline):
    shutil.copy(pipeline.folder / "00.jpg", pipeline.folder / "copy.jpg")
    extraction = pipeline.run(views={"copy.jpg": 2})
    assert (extraction.decoded, pipeline.images_run) == (21, 22)
    pipeline.check(extraction, ["copy.jpg"], view=1)
    pipeline.check(extraction, ["00.jpg"], view=2)


def test_the_engine_decides_which_tables_are_filled(pipeline):
    extraction = pipeline.run(precision="bf16")
    assert pipeline.asked == [pipeline.engine.precision] == ["f32"]
    assert extraction.decoded == 20
    pipeline.check(extraction, pipeline.sources())
    assert pipeline.run(precision="bf16").decoded == 20
    assert pipeline.run(precision="f32").decoded == 0
    assert pipeline.asked == ["f32"]


@pytest.fixture
def part(tmp_path):
    image = keras.Input((SMALL, SMALL, 3))
    x = keras.layers.Conv2D(4, 3, activation="relu")(image)
    model = keras.Model(image, keras.layers.GlobalAveragePooling2D()(x))
    cache = FeatureCache(tmp_path / "cache")
    return FrozenPart(model, "base", "weights", "pool", 0, cache)


def keep_bf16(part: FrozenPart, digests) -> None:
    """As this CPU would if it has bfloat16."""
    spec = part.spec("bf16", "openvino", instruction_set(), "float32")
    table = part.cache.table(spec)
    for digest in digests:
        table.add(digest, np.zeros(4, np.float32))
    table.flush()


def no_bf16(monkeypatch) -> None:
    openvino = import_openvino()
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32"])


def a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind])
    monkeypatch.setattr(
        tf.config.experimental, "get_device_details", lambda _: {"device_name": "G"}
    )


def another_cpu(monkeypatch) -> None:
    """One without bfloat16, that shares the cache."""
    no_bf16(monkeypatch)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")


@pytest.mark.parametrize("make", [no_bf16, a_gpu, another_cpu])
def test_auto_computes_float32_where_bfloat16_cannot_be_added_to(
    part, photos, monkeypatch, make
):
    splits = loading.load(str(photos))
    keep_bf16(part, [bytes([i]) * 32 for i in range(99)])
    make(monkeypatch)
    with pytest.raises(UsageError, match="bfloat16"):
        frozen_features(part, splits, 0, Storage("bf16"))
    told = Told()
    found = frozen_features(part, splits, 0, Storage("auto"), told)
    assert found.precision == "f32"
    assert found.extraction.decoded == 60
    reason = "engine keras: there is a GPU" if make is a_gpu else "precision f32: "
    assert any(note.startswith(reason) for note in told.notes)
    pixels = [
        make_decoder(SMALL)((photos / s).read_bytes()) for s in splits.test.sources
    ]
    rows = found.rows(splits.test.sources)[:]
    assert difference(rows, by_keras(part.model, np.stack(pixels))) < 1e-4

    again = frozen_features(part, splits, 0, Storage("auto"))
    assert (again.precision, again.extraction.engine) == ("f32", None)


def test_auto_takes_bfloat16_that_is_cached_on_any_cpu(part, photos, monkeypatch):
    splits = loading.load(str(photos))
    files = [(photos / s).read_bytes() for _, t in splits.items() for s in t.sources]
    keep_bf16(part, [hashlib.sha256(file).digest() for file in files])
    openvino = import_openvino()
    monkeypatch.setattr(
        openvino.Core, "get_property", lambda *_: pytest.fail("not needed")
    )
    found = frozen_features(part, splits, 0, Storage("auto"))
    assert (found.precision, found.extraction.engine) == ("bf16", None)


def test_another_instruction_set_has_features_of_its_own(part, photos, monkeypatch):
    splits = loading.load(str(photos))
    assert frozen_features(part, splits, 0, Storage("f32")).extraction.decoded == 60
    assert frozen_features(part, splits, 0, Storage("f32")).extraction.decoded == 0
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert frozen_features(part, splits, 0, Storage("f32")).extraction.decoded == 60


def test_features_of_an_earlier_version_are_left_alone_with_a_note(part, photos):
    splits, told = loading.load(str(photos)), Told()
    table = part.cache.table(part.spec("f32", "", "", "float32"))
    table.add(bytes(32), np.zeros(4, np.float32))
    table.flush()
    found = frozen_features(part, splits, 0, Storage("f32"), told)
    assert found.extraction.decoded == 60
    assert any("1 features that an earlier version cached" in x for x in told.notes)
    assert part.cache.prune(unused_days=0)[0] == 2  # also what is old


POLICIES = choices(AugmentPolicy)


@pytest.fixture(scope="module", params=POLICIES)
def policy(request):
    return request.param


@pytest.fixture(scope="module")
def augment(policy):
    return make_augmenter(SIZE, 0, policy)


DIGEST = hashlib.sha256(b"an image").digest()


def test_a_view_depends_on_nothing_that_was_done_before(augment, policy, pixels):
    first = [augment(pixels[0], DIGEST, number) for number in (1, 2, 3)]
    keras.utils.set_random_seed(5)
    other = make_augmenter(SIZE, 0, policy)
    for i in range(3):
        other(pixels[i], bytes(32), i)
    again = [other(pixels[0], DIGEST, number) for number in (3, 2, 1)]
    assert np.array_equal(first, again[::-1])


def test_views_differ_by_number_digest_and_seed(augment, pixels):
    views = [
        augment(pixels[0], DIGEST, 1),
        augment(pixels[0], DIGEST, 2),
        augment(pixels[0], bytes(32), 1),
        make_augmenter(SIZE, seed=1)(pixels[0], DIGEST, 1),
        pixels[0],
    ]
    assert len({view.tobytes() for view in views}) == len(views)


@pytest.mark.parametrize("policy", ["standard"], indirect=True)
def test_a_view_looks_like_the_image(augment, pixels):
    smooth = np.stack(
        [np.kron(image[::16, ::16], np.ones((16, 16, 1), np.uint8)) for image in pixels]
    )
    for image in (*pixels, *smooth):
        before = image.copy()
        view = augment(image, DIGEST, 1)
        assert (view.dtype, view.shape) == (np.uint8, (SIZE, SIZE, 3))
        assert np.array_equal(image, before)
        assert 2 < np.abs(view.astype(int) - image).mean() < 100
        assert abs(view.mean() - image.mean()) < 60


@pytest.mark.parametrize("policy", ["randaugment"], indirect=True)
def test_randaugment_does_all_that_it_may_do(augment):
    image = np.full((SIZE, SIZE, 3), (40, 90, 160), np.uint8)
    image[24:40, 24:40] = 150, 170, 60
    views = [augment(image, DIGEST, number).astype(int) for number in range(150)]
    plain = {tuple(x) for x in image.reshape(-1, 3)}
    colors = [{tuple(x) for x in view.reshape(-1, 3)} for view in views]
    assert sum(plain <= found for found in colors) > 5  # moved at most
    extremes = sum(view.min() == 0 and view.max() == 255 for view in views)
    assert 10 < extremes < 75  # autocontrast or equalization, 2 of 14 in either step
    means = np.array([np.median(view, axis=(0, 1)) for view in views])
    brightness = means.mean(1) - np.mean([40, 90, 160])
    assert brightness.min() < -30 and brightness.max() > 30
    areas = [np.sum(abs(view[..., 0] - 150) < 3) for view in views]
    assert min(areas) == 0 and max(areas) > 250


def test_views_of_each_policy_are_cached_apart(part):
    keys = {replace(part, policy=name).augmented(1).key for name in POLICIES}
    assert len(keys) == len(POLICIES)
    assert part.augmented(1).key == "1:0"  # of views that were cached earlier


@pytest.mark.parametrize("policy", ["standard"], indirect=True)
def test_views_are_mirrored_and_turned(augment):
    ramp = np.broadcast_to(np.arange(SIZE, dtype=np.uint8)[:, None] * 3, (64, 64, 3))
    views = [augment(ramp, DIGEST, number).astype(int) for number in range(40)]
    mirrored = sum(view[:, :32].mean() > view[:, 32:].mean() for view in views)
    assert 8 < mirrored < 32
    tilts = [view[:16].mean() - view[-16:].mean() for view in views]
    assert min(tilts) < -5
    assert max(tilts) > 5
