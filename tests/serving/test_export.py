"""What is published: asked through TensorFlow's C API, as TensorFlow Serving asks."""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, Told, draw, encode, fill
from PIL import Image
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel
from tensorflow.python.saved_model.fingerprinting_utils import write_fingerprint
from test_bases import EVERY_BASE_IN_TIME
from test_decode import linux, peak_memory, png_bomb
from test_layer_groups import SIZES, classifier, random_pixels

import keras_transfer
from keras_transfer.config import HeadConfig
from keras_transfer.data.decode import make_decoder
from keras_transfer.errors import KerasTransferError, UsageError, refusal
from keras_transfer.evaluation.decisions import DecisionRule
from keras_transfer.evaluation.of_run import load_model
from keras_transfer.evaluation.prediction import note_flip_tta, prediction_engine
from keras_transfer.events import SILENT
from keras_transfer.features.engine import predict
from keras_transfer.models.classifier import (
    attach_head,
    build_head,
    weights_digest,
    with_features,
)
from keras_transfer.models.fold import convolutions_to_fold, folded_copy
from keras_transfer.runs.run import Run, building, new_run
from keras_transfer.runtime.c_api import ABOUT, Request, Session, answer_elsewhere
from keras_transfer.serving import formats
from keras_transfer.serving.sample import (
    Sample,
    flip_averaged_sample,
    load_trained,
    sample_of_run,
)
from keras_transfer.serving.savedmodel import (
    describe,
    difference,
    verify,
    write_savedmodel,
)
from keras_transfer.serving.signatures import (
    TOLERANCE,
    Network,
    ServingBundle,
    disagreement,
    frozen_network,
)
from keras_transfer.serving.warmup import RECORDS, read_records, write_records
from keras_transfer.workflows.evaluate import evaluate_run
from keras_transfer.workflows.export import export_format, export_savedmodel
from keras_transfer.workflows.predict import predict_run

SIZE = 64
FILES = {
    "saved_model.pb",
    "fingerprint.pb",
    "variables/variables.index",
    "variables/variables.data-00000-of-00001",
    "assets.extra/tf_serving_warmup_requests",
    "assets.extra/keras_transfer.json",
}
CLASSIFICATION = {
    "probabilities": (tf.float32, (None, 3)),
    "classes": (tf.string, (None, 3)),
    "scores": (tf.float32, (None, 3)),
    "indices": (tf.int32, (None, 3)),
}
SIGNATURES = {
    "serving_default": (("image_bytes", tf.string, (None,)), CLASSIFICATION),
    "predict_images": (("images", tf.uint8, (None, None, None, 3)), CLASSIFICATION),
    "predict_tensor": (("images", tf.float32, (None, SIZE, SIZE, 3)), CLASSIFICATION),
    "classify": (
        ("inputs", tf.string, (None,)),
        {key: CLASSIFICATION[key] for key in ("classes", "scores")},
    ),
    "embed": (
        ("image_bytes", tf.string, (None,)),
        {"features": (tf.float32, (None, 1280))},
    ),
}


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(runs_dir: Path, photos: Path) -> Path:
    """A run that tests only read or copy."""
    run = keras_transfer.fit(
        str(photos),
        image_size=SIZE,
        folds=2,  # of which no test here says anything
        report=False,
        name="photos",
        runs_dir=runs_dir,
        cache_dir=runs_dir / "cache",
    )
    return run.run_dir


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    """Its first version, which tests only read."""
    with umask(0o077):
        return keras_transfer.export(trained)


@pytest.fixture(scope="module")
def session(exported: Path):
    with Session(exported) as opened:
        yield opened


def with_tiny_model(trained: Path, copy: Path) -> Path:
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("[0-9]*", "exported"))
    tiny_model().save(copy / "model.keras")
    (copy / "far.npz").unlink()  # of the features of the model before
    return copy


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, never exported, with a model that is fast to export."""
    return with_tiny_model(trained, tmp_path / "copy")


@pytest.fixture(scope="module")
def tiny_version(trained: Path, runs_dir: Path) -> Path:
    """The version of such a copy, which tests only read."""
    return keras_transfer.export(with_tiny_model(trained, runs_dir / "tiny"))


def tiny_model() -> keras.Model:
    """With augmentation, scaling and dropout inside, as recipes have them."""
    image = keras.Input((SIZE, SIZE, 3), name="image")
    x = keras.layers.RandomFlip()(image)
    x = keras.layers.RandomRotation(0.5)(x)
    x = keras.layers.Rescaling(1 / 255)(x)
    x = keras.layers.Normalization()(x)
    x = keras.layers.Conv2D(8, 3, strides=2)(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.GaussianNoise(1.0)(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(keras.layers.ReLU()(x))
    base = keras.Model(image, keras.layers.Dropout(0.5)(x))
    head = build_head(HeadConfig(kind="mlp", hidden=[16]), 8, 3, False)
    return attach_head(base, head)


def strings(*values: bytes) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def ask(session: Session, *files: bytes):
    return session.run(Request("serving_default", {"image_bytes": strings(*files)}))


def graph_of(version: Path):
    proto = SavedModel.FromString((version / "saved_model.pb").read_bytes())
    return proto.meta_graphs[0]


def turned_photos() -> list[bytes]:
    """A photo in all 8 EXIF orientations and both byte orders."""
    pixels = draw("square", np.random.default_rng(3), 80)
    pixels[:30, :20] = 255, 0, 0  # no symmetry is left
    files = []
    for order in "<>":
        mark = b"II*\0" if order == "<" else b"MM\0*"
        for orientation in range(1, 9):
            entry = struct.pack(f"{order}HHHIHH", 1, 0x0112, 3, 1, orientation, 0)
            exif = b"Exif\0\0" + mark + struct.pack(f"{order}I", 8) + entry + bytes(4)
            files.append(encode(pixels, "JPEG", exif=exif, quality=95))
    return files


# The version directory


def test_a_version_is_what_it_should_be(exported, trained):
    found = {str(p.relative_to(exported)) for p in exported.rglob("*") if p.is_file()}
    assert found == FILES
    assert {p.name for p in exported.iterdir() if p.is_dir()} == {
        "variables",
        "assets.extra",
    }
    assert exported.name == "1"
    assert not list(trained.glob(".*"))
    assert modes(exported) == (0o755, 0o644)


def modes(folder: Path) -> tuple[int, int]:
    """What may be done with its folders and with its files, if it is the same."""
    found: dict[bool, set[int]] = {True: set(), False: set()}
    for path in (folder, *folder.rglob("*")):
        found[path.is_dir()].add(path.stat().st_mode & 0o777)
    (of_folders,), (of_files,) = found[True], found[False]
    return of_folders, of_files


def test_it_says_what_it_is(exported, trained):
    run = keras_transfer.open_run(trained)
    about = json.loads((exported / "assets.extra/keras_transfer.json").read_text())
    assert about["labels"] == run.class_names
    assert about["image_size"] == SIZE
    assert about["phase"] == "fit" and about["base"] == "efficientnet_lite0"
    assert about["metrics"] == run.metrics["fit"]
    assert about["batch_normalization_folded"] is True
    assert len(about["weights_sha256"]) == len(about["graph_sha256"]) == 64
    assert about["versions"]["tensorflow"] == tf.__version__
    assert about["signatures"].keys() == SIGNATURES.keys()


def test_signatures_have_their_names_dtypes_and_shapes(exported):
    graph = graph_of(exported)
    for name, ((given, dtype, shape), outputs) in SIGNATURES.items():
        signature = graph.signature_def[name]
        found = {
            key: (tf.as_dtype(info.dtype), as_shape(info.tensor_shape))
            for key, info in signature.inputs.items()
        }
        assert found == {given: (dtype, shape)}
        found = {
            key: (tf.as_dtype(info.dtype), as_shape(info.tensor_shape))
            for key, info in signature.outputs.items()
        }
        assert found == outputs
        method = "classify" if name == "classify" else "predict"
        assert signature.method_name == f"tensorflow/serving/{method}"


def as_shape(proto) -> tuple:
    return tuple(None if dim.size < 0 else dim.size for dim in proto.dim)


def test_the_fingerprint_is_that_of_the_finished_graph(exported, tmp_path):
    copy = tmp_path / "1"
    shutil.copytree(exported, copy)
    (copy / "fingerprint.pb").unlink()
    write_fingerprint(str(copy))
    read = tf.saved_model.experimental.read_fingerprint
    one, other = read(str(exported)), read(str(copy))
    assert one.saved_model_checksum == other.saved_model_checksum
    assert one.graph_def_program_hash == other.graph_def_program_hash


def test_every_weight_is_there_once_and_nothing_is_random(exported, trained):
    model = load_model(keras_transfer.open_run(trained))
    weights = 4 * model.count_params()
    size = sum(path.stat().st_size for path in exported.rglob("*"))
    assert 0.95 * weights < size < 1.05 * weights + 300_000
    graph = graph_of(exported).graph_def
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    ops = {node.op for node in nodes}
    assert not [op for op in ops if "Random" in op or "PyFunc" in op or "Xla" in op]
    assert not ops & {"ReadFile", "WriteFile", "VarHandleOp", "ReadVariableOp"}
    assert not [op for op in ops if op.startswith("FusedBatchNorm")]


# What it answers


def test_every_format_is_answered_as_the_model_does(session, trained, photos):
    pixels = draw("stripes", np.random.default_rng(5), 90)
    alpha = np.full((90, 90, 1), 7, np.uint8)
    files = [
        (photos / "circle" / "03.jpg").read_bytes(),
        encode(pixels, "PNG"),
        encode(np.concatenate([pixels, alpha], axis=2), "PNG"),
        encode(pixels, "WEBP"),
        encode(pixels, "BMP"),
        encode(pixels, "GIF"),
        encode(pixels[..., 0], "PNG"),
        *turned_photos(),
    ]
    decode = make_decoder(SIZE)
    model = load_model(keras_transfer.open_run(trained))
    pixels = np.stack([decode(data) for data in files])
    expected = predict(prediction_engine(model), pixels)
    answer = ask(session, *files)
    np.testing.assert_allclose(answer["probabilities"], expected, atol=TOLERANCE)
    best = np.argmax(expected, axis=1)
    np.testing.assert_array_equal(answer["indices"][:, 0], best)
    assert answer["classes"][:, 0].tolist() == [CLASSES[i].encode() for i in best]
    np.testing.assert_array_equal(
        answer["scores"], np.sort(answer["probabilities"])[:, ::-1]
    )
    assert answer["classes"].shape == answer["indices"].shape == (len(files), 3)


def test_the_graph_decodes_as_training_did_to_the_bit(session):
    decode, files = make_decoder(SIZE), turned_photos()
    pixels = np.stack([decode(data) for data in files])
    tensors = {"images": pixels.astype(np.float32)}
    from_pixels = session.run(Request("predict_tensor", tensors))
    from_files = ask(session, *files)
    for name, values in from_files.items():
        np.testing.assert_array_equal(values, from_pixels[name])


def test_turned_photos_are_as_pillow_turns_them():
    from PIL import ImageOps

    decode = make_decoder(80)  # as large as the photo: nothing is resized
    for data in turned_photos():
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(decode(data), np.asarray(upright))


def test_pixels_of_any_size_are_resized_as_files_are(session):
    pixels = draw("circle", np.random.default_rng(9), 150)[:, :101]
    from_pixels = session.run(Request("predict_images", {"images": pixels[None]}))
    from_file = ask(session, encode(pixels, "PNG"))
    np.testing.assert_array_equal(
        from_pixels["probabilities"], from_file["probabilities"]
    )


def as_example(encoded: bytes) -> bytes:
    value = tf.train.Feature(bytes_list=tf.train.BytesList(value=[encoded]))
    features = tf.train.Features(feature={"image/encoded": value})
    return tf.train.Example(features=features).SerializeToString()


def test_classify_takes_examples(session, photos):
    files = [(photos / name / "00.jpg").read_bytes() for name in CLASSES]
    examples = strings(*map(as_example, files))
    answer = session.run(Request("classify", {"inputs": examples}))
    expected = ask(session, *files)
    assert set(answer) == {"classes", "scores"}
    np.testing.assert_array_equal(answer["classes"], expected["classes"])
    np.testing.assert_array_equal(answer["scores"], expected["scores"])


def test_embed_gives_what_the_head_reads(session, trained, photos):
    data = (photos / "circle" / "00.jpg").read_bytes()
    request = Request("embed", {"image_bytes": strings(data)})
    model = load_model(keras_transfer.open_run(trained))
    features = keras.Model(model.input, model.get_layer("pool").output)
    expected = predict(prediction_engine(features), make_decoder(SIZE)(data)[None])
    actual = session.run(request)["features"]
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_augmentation_inside_a_model_is_off(tiny_version):
    model = load_model(keras_transfer.open_run(tiny_version.parent))
    pixels = np.random.default_rng(0).uniform(0, 255, (4, SIZE, SIZE, 3)).astype("f4")
    request = Request("predict_tensor", {"images": pixels})
    one, other = answer_elsewhere(tiny_version, [request, request])
    np.testing.assert_array_equal(one["probabilities"], other["probabilities"])
    expected = model(pixels, training=False)
    np.testing.assert_allclose(one["probabilities"], expected, atol=TOLERANCE)
    assert np.abs(model(pixels, training=True) - expected).max() > 1e-3


# Hostile input: an error, and the process goes on


def animated_webp() -> bytes:
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def palette_bmp() -> bytes:
    buffer = io.BytesIO()
    Image.new("P", (40, 40)).save(buffer, "BMP")
    return buffer.getvalue()


def empty_request(signature: str) -> Request:
    (name, dtype, shape), _ = SIGNATURES[signature]
    nothing = np.zeros([0, *(side or 5 for side in shape[1:])], dtype.as_numpy_dtype)
    return Request(signature, {name: nothing})


NOT_FINITE = (np.nan, np.inf, -np.inf)


def pixels_with(value: float) -> Request:
    pixels = np.zeros((2, SIZE, SIZE, 3), "f4")
    pixels[1, 3, 4, 2] = value
    return Request("predict_tensor", {"images": pixels})


WHOLE = encode(draw("square", np.random.default_rng(0)), "JPEG")
HOSTILE_FILES = {
    "junk": b"junk" * 100,
    "empty": b"",
    "truncated": WHOLE[: len(WHOLE) // 2],
    "bomb": png_bomb(),
    "animated": animated_webp(),
    "palette": palette_bmp(),
}
HOSTILE = {
    **{
        f"{signature}-{name}": Request(signature, {"image_bytes": strings(data)})
        for signature in ("serving_default", "embed")
        for name, data in HOSTILE_FILES.items()
    },
    "bytes-rank-0": Request("serving_default", {"image_bytes": np.array(WHOLE, "O")}),
    "bytes-rank-2": Request("serving_default", {"image_bytes": strings(WHOLE)[None]}),
    "bytes-are-numbers": Request("serving_default", {"image_bytes": np.zeros(1, "f4")}),
    "one-of-many": Request("serving_default", {"image_bytes": strings(WHOLE, b"x")}),
    "tensor-rank-2": Request("predict_tensor", {"images": np.zeros((3, 3), "f4")}),
    "tensor-rank-5": Request("predict_tensor", {"images": np.zeros((1,) * 5, "f4")}),
    "tensor-size": Request("predict_tensor", {"images": np.zeros((1, 9, 9, 3), "f4")}),
    "tensor-channels": Request(
        "predict_tensor", {"images": np.zeros((1, SIZE, SIZE, 1), "f4")}
    ),
    "tensor-dtype": Request(
        "predict_tensor", {"images": np.zeros((1, SIZE, SIZE, 3), "f8")}
    ),
    "images-rank-3": Request("predict_images", {"images": np.zeros((9, 9, 3), "u1")}),
    "images-empty-side": Request(
        "predict_images", {"images": np.zeros((1, 0, 9, 3), "u1")}
    ),
    "images-channels": Request(
        "predict_images", {"images": np.zeros((1, 9, 9, 4), "u1")}
    ),
    "images-dtype": Request("predict_images", {"images": np.zeros((1, 9, 9, 3), "f4")}),
    "example-junk": Request("classify", {"inputs": strings(b"\xff\xff")}),
    "example-without-image": Request("classify", {"inputs": strings(b"")}),
    **{f"empty-{signature}": empty_request(signature) for signature in SIGNATURES},
    **{f"pixel-{value}": pixels_with(value) for value in NOT_FINITE},
}


@pytest.fixture(scope="module")
def answers(exported: Path) -> dict[str, tuple]:
    """Of each hostile request the answer, and that to a good one after it."""
    whole = Request("serving_default", {"image_bytes": strings(WHOLE)})
    requests = [x for hostile in HOSTILE.values() for x in (hostile, whole)]
    answers = answer_elsewhere(exported, requests)
    return dict(
        zip(HOSTILE, zip(answers[::2], answers[1::2], strict=True), strict=True)
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input_is_an_error_and_the_process_goes_on(answers, name):
    refused, answered = answers[name]
    assert isinstance(refused, str) and refused
    assert answered["probabilities"].shape == (1, 3)


def memory_of_asking(version: Path, files: list[bytes]) -> int:
    """Bytes by which the peak grows."""
    with Session(version) as session:
        ask(session, WHOLE)
        before = peak_memory()
        ask(session, *files)
        return peak_memory() - before


@linux
@pytest.mark.long
def test_few_images_of_a_request_are_decoded_at_a_time(
    exported, other_process, monkeypatch
):
    monkeypatch.setenv("TF_NUM_INTEROP_THREADS", "16")  # as on a machine of 16 cores
    side = 6_000
    asking = other_process.submit(memory_of_asking, exported, [png_bomb(side)] * 8)
    grown = asking.result(600)
    assert grown < 4 * 3 * side**2


@pytest.mark.parametrize("signature", SIGNATURES)
def test_an_empty_batch_is_refused_in_our_words(answers, signature):
    refused, answered = answers[f"empty-{signature}"]
    assert refusal(refused, 0) == "an empty batch; send an image"
    assert answered["probabilities"].shape == (1, 3)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_pixels_that_are_not_finite_are_refused(answers, value):
    refused, answered = answers[f"pixel-{value}"]
    assert refusal(refused, 0) == "pixels that are not finite numbers"
    assert answered["probabilities"].shape == (1, 3)


# Folding


def said_of(model: keras.Model, pixels: np.ndarray) -> dict[str, np.ndarray]:
    said = with_features(model)(pixels.astype(np.float32), training=False)
    return {name: rows.numpy() for name, rows in said.items()}


AMPLIFYING = {"EfficientNetV2M", "ResNet101", "ResNet152"}
"""Random weights make these so sensitive that the rounding of one operation shows in
the result: the same layers as a graph and one by one are not within the tolerance."""


@EVERY_BASE_IN_TIME
def test_folding_changes_no_probability(base):
    keras.utils.clear_session()
    model = classifier(base, SIZES.get(base.name, 48))
    pixels = random_pixels(model, 4).astype(np.uint8)
    expected = said_of(model, pixels)
    folded = folded_copy(model)
    if base.name in AMPLIFYING:
        actual, tolerance = said_of(folded, pixels), 100 * TOLERANCE
    else:
        network, is_folded = frozen_network(model, pixels, expected)
        assert is_folded
        actual, tolerance = network(tf.constant(pixels, tf.float32)), TOLERANCE
    np.testing.assert_allclose(
        actual["probabilities"], expected["probabilities"], atol=tolerance
    )
    assert np.ptp(expected["probabilities"], axis=0).max() > 1e-3  # all told apart
    names = {layer.name for layer in convolutions_to_fold(model).values()}
    left = [x.name for x in folded.layers if type(x).__name__ == "BatchNormalization"]
    assert not names & set(left)


def test_pixels_are_scaled_in_a_folded_copy_as_in_the_model():
    model = tiny_model()
    pixels = np.random.default_rng(0).uniform(0, 255, (4, SIZE, SIZE, 3)).astype("f4")
    (scaling,) = [x for x in model.layers if isinstance(x, keras.layers.Normalization)]
    scaling.adapt(pixels / 255)
    expected = model(pixels, training=False)
    folded = folded_copy(model)
    np.testing.assert_allclose(folded(pixels, training=False), expected, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["probabilities", "features"])
def test_where_folding_would_change_what_is_said_it_is_left_out(name):
    model = tiny_model()
    if name == "features":  # which then count for nothing
        first = next(x for x in model.get_layer("head").layers if x.weights)
        first.kernel.assign(first.kernel * 0)

    def inexact(model):
        folded = folded_copy(model)
        (convolution,) = [
            x for x in folded.layers if isinstance(x, keras.layers.Conv2D)
        ]
        convolution.bias.assign(convolution.bias + 0.01)
        return folded

    pixels = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), np.uint8)
    expected = said_of(model, pixels)
    network, is_folded = frozen_network(model, pixels, expected, fold=inexact)
    assert not is_folded
    assert not disagreement(network(tf.constant(pixels, tf.float32)), expected)
    other = {key: rows + 0.1 for key, rows in expected.items()}
    with pytest.raises(KerasTransferError, match="does not agree"):
        frozen_network(model, pixels, other)


# Verification


def nothing_is_published(run_dir: Path) -> bool:
    names = [path.name for path in run_dir.iterdir()]
    return not [name for name in names if name.isdigit() or name[0] == "."]


def test_what_verification_refuses_is_not_published(run_dir):
    (run_dir / "labels.txt").write_text("circle\ncircle\nstripes\n")  # damaged
    with pytest.raises(KerasTransferError, match="another class. Nothing was publ"):
        keras_transfer.export(run_dir)
    assert nothing_is_published(run_dir)


def save(
    run: Run, path: Path, change: Callable[[Network], Network] = lambda network: network
) -> Sample:
    """Writes a run's model, changed perhaps, as an export does before it verifies.

    Returns:
        What it is verified with.
    """
    trained = load_trained(run, None)
    sample = sample_of_run(run, trained.model, SILENT)
    network, _ = frozen_network(trained.model, sample.pixels, sample.expected)
    write_savedmodel(path, ServingBundle(change(network), SIZE, CLASSES), sample)
    (path / ABOUT).write_text(json.dumps(describe(run, trained, True, path)))
    return sample


def test_what_is_saved_is_verified(run_dir, tmp_path):
    path = tmp_path / "saved"
    sample = save(Run(run_dir), path)
    verify(path, sample, CLASSES)
    with pytest.raises(KerasTransferError, match="another class. Nothing was publ"):
        verify(path, sample, CLASSES[::-1])
    bad = [Request("serving_default", {"image_bytes": strings(b"junk")})]
    write_records(path / RECORDS, bad)
    with pytest.raises(KerasTransferError, match="A warm-up record fails: .*not an im"):
        verify(path, sample, CLASSES)


def test_a_graph_with_random_operations_is_refused(run_dir, tmp_path):
    def noisy(network: Network) -> Network:
        def with_noise(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
            return network(pixels + tf.random.normal(tf.shape(pixels)) * 1e-9)

        return with_noise

    with pytest.raises(KerasTransferError, match="RandomStandardNormal"):
        save(Run(run_dir), tmp_path / "saved", noisy)


def test_a_file_in_the_working_directory_is_not_imported(exported):
    Path("numpy.py").write_text("raise SystemExit('imported')")
    request = Request("serving_default", {"image_bytes": strings(WHOLE)})
    (answer,) = answer_elsewhere(exported, [request])
    assert answer["scores"].shape == (1, 3)


def test_a_signature_that_is_not_there_is_an_error(session):
    with pytest.raises(UsageError, match="predict_tensor.* Received: 'predict'"):
        session.run(Request("predict", {}))


ROW = np.array([[0.2, 0.7, 0.1]], np.float32)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, ""),
        ({"probabilities": ROW + 1e-3}, "probabilities differ by"),
        ({"scores": np.float32([[0.7, 0.2, 0.2]])}, "scores differ by 0.1"),
        (
            {"classes": strings(b"circle", b"square", b"stripes")[None]},
            "the score of 'circle' is that of another class",
        ),
        (
            {"indices": np.array([[0, 1, 2]], np.int32)},
            "indices are not those of the classes",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_answer_is_compared_in_all_its_parts(wrong, said):
    expected = {"probabilities": ROW, "features": np.ones((1, 4), "f4")}
    sample = Sample([WHOLE], np.zeros((1, SIZE, SIZE, 3), np.uint8), expected)
    answer = {
        "probabilities": ROW,
        "classes": strings(b"square", b"circle", b"stripes")[None],
        "scores": np.sort(ROW)[:, ::-1],
        "indices": np.array([[1, 0, 2]], np.int32),
        **wrong,
    }
    found = difference(answer, sample, np.array([0]), CLASSES)
    assert found.startswith(said) if said else not found


def refit(run_dir: Path) -> None:
    """Replaces a run by one that names its classes the other way round."""
    run = Run(run_dir)
    with building(new_run(run_dir.parent, run_dir.name, overwrite=True)) as staging:
        for path in run_dir.iterdir():
            if path.is_file():
                shutil.copy(path, staging)
        model = load_model(run)
        layer = model.get_layer("head").get_layer("probabilities")
        layer.set_weights([x[..., ::-1] for x in layer.get_weights()])
        model.save(staging / "model.keras")
        (staging / "labels.txt").write_text("\n".join(run.class_names[::-1]))
        notes = [*run.manifest.notes, "fitted anew"]
        manifest = run.manifest.model_copy(update={"notes": notes})
        (staging / "manifest.json").write_text(manifest.model_dump_json())


class ReplacedWhileRead(Run):
    """Is replaced between its model and the class names that are read after it.

    Attributes:
        left: How many times more.
    """

    def __init__(self, run_dir: Path, times: int):
        super().__init__(run_dir)
        self.left = times
        self._reads = 0

    @property
    def class_names(self) -> list[str]:
        names = super().class_names
        self._reads += 1
        # Whoever loads a model counts its classes first.
        if self._reads % 2 and self.left:
            self.left -= 1
            refit(self.run_dir)
        return names


class ReplacedWhileWritten(Run):
    """Is replaced once, when something that is made in it is under way."""

    def __init__(self, run_dir: Path):
        self._is_replaced = False
        super().__init__(run_dir)

    @property
    def run_dir(self) -> Path:
        if not self._is_replaced and any(self._run_dir.glob(".kt-unfinished.*")):
            self._is_replaced = True
            refit(self._run_dir)
        return self._run_dir

    @run_dir.setter
    def run_dir(self, path: Path) -> None:
        self._run_dir = path


def predicted(run: Run, image: Path) -> dict[str, float]:
    found = predict_run(run, image)
    (prediction,) = found.rows
    return dict(zip(found.class_names, prediction.probabilities, strict=True))


@pytest.mark.parametrize("times", [1, 2])
def test_model_and_labels_of_a_prediction_are_of_one_run(run_dir, photos, times):
    image = photos / "circle" / "00.jpg"
    before = predicted(Run(run_dir), image)
    run = ReplacedWhileRead(run_dir, times)
    after = predicted(run, image)
    assert run.left == 0
    assert [*after] == [*CLASSES[:: -1 if times % 2 else 1]]  # each turned the order
    assert after == pytest.approx(before)


def test_model_labels_and_images_of_an_evaluation_are_of_one_run(run_dir):
    before = evaluate_run(Run(run_dir))
    run = ReplacedWhileRead(run_dir, times=1)
    after = evaluate_run(run)
    assert run.left == 0
    assert Run(run_dir).class_names == [*CLASSES[::-1]]
    assert after.classes == before.classes
    assert after.confusion == [row[::-1] for row in before.confusion[::-1]]


def export(run: Run, form: str) -> None:
    if form == "savedmodel":
        export_savedmodel(run)
    else:
        export_format(run, form)


@pytest.mark.parametrize("form", ["savedmodel", "keras"])
def test_model_and_labels_of_an_export_are_of_one_run(run_dir, form):
    replaced = ReplacedWhileRead(run_dir, times=1)
    export(replaced, form)
    assert replaced.left == 0
    run, folder = Run(run_dir), run_dir / "exported" / "keras"
    if form == "keras":
        labels = (folder / "labels.txt").read_text().split()
        model = keras.saving.load_model(folder / "model.keras", compile=False)
        for one, other in zip(model.weights, load_model(run).weights, strict=True):
            np.testing.assert_array_equal(one, other)
    else:
        about = json.loads((run_dir / "1" / ABOUT).read_text())
        labels = about["labels"]
        assert about["weights_sha256"] == weights_digest(load_model(run))
    assert labels == run.class_names == [*CLASSES[::-1]]


@pytest.mark.parametrize("form", ["savedmodel", "keras"])
@pytest.mark.parametrize(
    "make",
    [lambda run_dir: ReplacedWhileRead(run_dir, 1000), ReplacedWhileWritten],
    ids=["while it is read", "while it is written"],
)
def test_a_run_that_changes_meanwhile_is_not_published(run_dir, form, make):
    with pytest.raises(KerasTransferError) as caught:
        export(make(run_dir), form)
    message = str(caught.value)
    assert "Another process changed the run" in message
    assert str(run_dir) in message and "\n" not in message
    assert nothing_is_published(run_dir)
    assert not (run_dir / "exported").exists()


def test_a_model_that_is_not_good_enough_is_refused(kt, run_dir):
    metrics = json.loads((run_dir / "metrics.json").read_text())
    metrics["fit"]["test"]["accuracy"] = 0.5
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    result = kt("export", run_dir, "--min-accuracy", 0.6)
    assert result.exit_code == 1
    assert "0.5000. Received: --min-accuracy 0.6" in result.stderr
    del metrics["fit"]["test"]
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    assert kt("export", run_dir, "--min-accuracy", 0.1).exit_code == 2
    assert not [p for p in run_dir.iterdir() if p.name.isdigit()]


def lose_images(run_dir: Path) -> None:
    config = run_dir / "config.yaml"
    lines = config.read_text().splitlines()
    gone = ["data: /gone" if line.startswith("data:") else line for line in lines]
    config.write_text("\n".join(gone))


def test_where_the_images_are_gone_noise_is_compared(run_dir, kt):
    lose_images(run_dir)
    result = kt("export", run_dir)
    assert result.exit_code == 0, result.output
    assert "noise" in result.stderr
    assert result.stdout.strip().endswith("/1")


# Publishing


def test_versions_go_up_and_old_ones_are_pruned(kt, tiny_version, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(tiny_version.parent, run_dir)
    for number in ("8", "9"):
        shutil.copytree(tiny_version, run_dir / number)
    (run_dir / "10").write_text("a file that a server takes for a version")
    before = (run_dir / "9" / "saved_model.pb").stat().st_mtime_ns
    result = kt("export", run_dir, "--keep", 3)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(run_dir / "11")
    left = sorted(p.name for p in run_dir.iterdir() if p.name.isdigit())
    assert left == ["10", "11", "8", "9"]  # never what kt did not make
    assert (run_dir / "9" / "saved_model.pb").stat().st_mtime_ns == before
    assert not list(run_dir.glob(".*"))


EXPORT = [
    sys.executable,
    "-c",
    "import sys; from keras_transfer.cli import main; main()",
]


@pytest.mark.long
def test_processes_at_the_same_time_publish_a_version_each(run_dir):
    process = subprocess.Popen(
        [*EXPORT, "export", run_dir], stdout=subprocess.PIPE, text=True
    )
    while not any(run_dir.glob(".kt-unfinished.*")):
        assert process.poll() is None
        time.sleep(0.01)
    published = keras_transfer.export(run_dir)
    said = {process.communicate()[0].strip(), str(published)}
    assert said == {str(run_dir / "1"), str(run_dir / "2")}
    for version in said:
        about = json.loads(
            Path(version, "assets.extra/keras_transfer.json").read_text()
        )
        assert about["labels"] == list(CLASSES)
    assert not list(run_dir.glob(".*"))


def check_kills(run_dir: Path, delays: list[float]) -> None:
    """Kills exports that have begun to write, and looks at what is left.

    Args:
        run_dir: The run.
        delays: How many seconds after it began each is killed; the next export begins
            where one is over by then.
    """
    loop = (
        "import sys\n"
        "import keras_transfer\n"
        "import keras_transfer.workflows.export\n"
        "print('ready', flush=True)\n"
        "while True: keras_transfer.export(sys.argv[1])"
    )
    left_over = 0
    for delay in delays:
        process = subprocess.Popen(
            [sys.executable, "-c", loop, run_dir], stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        before = set(run_dir.glob(".kt-unfinished.*"))
        while not set(run_dir.glob(".kt-unfinished.*")) - before:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        left_over += any(run_dir.glob(".kt-unfinished.*"))
        for version in run_dir.glob("[0-9]*"):
            found = {
                str(path.relative_to(version))
                for path in version.rglob("*")
                if path.is_file()
            }
            assert found == FILES
    assert left_over  # an export was killed while it wrote
    last = keras_transfer.export(run_dir)  # which removes what they left
    assert not list(run_dir.glob(".*"))
    with Session(last) as session:
        assert ask(session, WHOLE)["scores"].shape == (1, 3)


@pytest.mark.long
def test_killed_exports_leave_nothing_partial(run_dir):
    check_kills(run_dir, [0.0, 1.5])


@pytest.mark.slow
def test_eight_at_once_and_twenty_kills(run_dir):
    processes = [
        subprocess.Popen([*EXPORT, "export", run_dir], stdout=subprocess.DEVNULL)
        for _ in range(8)
    ]
    assert [process.wait() for process in processes] == [0] * 8
    versions = {path.name for path in run_dir.glob("[0-9]*")}
    assert versions == {str(number) for number in range(1, 9)}
    check_kills(run_dir, [*np.random.default_rng(0).uniform(0, 4, 20)])


# Warm-up records


def test_warm_up_records_are_those_of_the_public_protos(exported, tmp_path):
    from tensorflow_serving.apis import prediction_log_pb2

    path = tmp_path / "records"
    requests = list(read_records(exported / RECORDS))
    assert [(r.signature, len(*r.inputs.values())) for r in requests] == [
        ("serving_default", 1),
        ("classify", 1),
        ("serving_default", 8),
        ("classify", 8),
    ]
    requests.append(Request("predict_images", {"images": np.zeros((2, 5, 4, 3), "u1")}))
    write_records(path, requests)
    for record, request in zip(
        tf.data.TFRecordDataset(str(path)), requests, strict=True
    ):
        log = prediction_log_pb2.PredictionLog()
        if request.signature == "classify":
            asked = log.classify_log.request
            for data in request.inputs["inputs"]:
                asked.input.example_list.examples.add().ParseFromString(data)
        else:
            asked = log.predict_log.request
            for name, array in request.inputs.items():
                asked.inputs[name].CopyFrom(tf.make_tensor_proto(array))
        asked.model_spec.signature_name = request.signature
        assert record.numpy() == log.SerializeToString(deterministic=True)
        assert prediction_log_pb2.PredictionLog.FromString(record.numpy()) == log
    assert (exported / RECORDS).stat().st_size < 100_000


# Averaged over flips


def averaged(model: keras.Model, pixels: np.ndarray) -> np.ndarray:
    """What the average has to be; mirroring must make a difference."""
    one, other = (
        np.asarray(model(x.astype("f4"), training=False))
        for x in (pixels, pixels[:, :, ::-1])
    )
    assert abs(one - other).max() > 10 * formats.TOLERANCE
    return (one + other) / 2


def one_sided() -> np.ndarray:
    """uint8 images whose left half is another than the right one."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    pixels[:, :, ::5] = 0
    pixels[:, :, : SIZE // 2] //= 8
    return pixels


def weighed(run_dir: Path) -> keras.Model:
    """Gives a run's small model a head that tells left from right, and returns it."""
    model = load_model(Run(run_dir))
    one, other = (
        np.log(np.asarray(model(x.astype("f4"), training=False)))
        for x in (one_sided(), one_sided()[:, :, ::-1])
    )
    last, scale = (
        model.get_layer("head").get_layer("probabilities"),
        1 / abs(one - other).max(),
    )
    last.kernel.assign(scale * last.kernel)
    last.bias.assign(scale * (last.bias - one.mean(0)))
    model.save(run_dir / "model.keras")
    return model


@pytest.mark.long
def test_a_version_may_average_over_flips(run_dir):
    model, pixels = weighed(run_dir), one_sided()
    version = keras_transfer.export(run_dir, flip_tta=True)
    files = strings(*(encode(image, "PNG") for image in pixels))
    requests = [
        Request("serving_default", {"image_bytes": files}),
        Request("predict_images", {"images": pixels}),
        Request("predict_tensor", {"images": pixels.astype("f4")}),
        Request("predict_tensor", {"images": pixels[:1].astype("f4")}),
        Request("embed", {"image_bytes": files}),
    ]
    *answers, alone, embedded = answer_elsewhere(version, requests)
    expected = averaged(model, pixels)
    for answer in answers:
        np.testing.assert_allclose(answer["probabilities"], expected, atol=TOLERANCE)
        best = np.sort(answer["probabilities"])[:, ::-1]
        np.testing.assert_array_equal(answer["scores"], best)
    np.testing.assert_allclose(alone["probabilities"], expected[:1], atol=TOLERANCE)
    features = with_features(model)(pixels.astype("f4"), training=False)["features"]
    np.testing.assert_allclose(embedded["features"], features, rtol=1e-4)
    assert json.loads((version / ABOUT).read_text())["flip_tta"]


@pytest.mark.long
def test_a_version_that_does_not_average_is_refused_as_one_that_does(run_dir, tmp_path):
    model = weighed(run_dir)
    sample = save(Run(run_dir), tmp_path / "saved")
    verify(tmp_path / "saved", sample, CLASSES)
    other = flip_averaged_sample(sample, model)
    with pytest.raises(KerasTransferError, match="differ by"):
        verify(tmp_path / "saved", other, CLASSES)


@pytest.mark.parametrize(
    "form",
    ["keras", *(pytest.param(x, marks=pytest.mark.long) for x in ("litert", "onnx"))]
    + [pytest.param("openvino", marks=pytest.mark.long)],
)
def test_other_formats_may_average_over_flips(run_dir, form):
    expected = averaged(weighed(run_dir), one_sided())
    folder = keras_transfer.export(run_dir, format=form, flip_tta=True)
    predict = formats.RUNTIMES[form].load(folder / formats.RUNTIMES[form].file)
    found = predict(one_sided().astype("f4"))
    np.testing.assert_allclose(found, expected, atol=formats.TOLERANCE)
    assert json.loads((folder / "keras_transfer.json").read_text())["flip_tta"]


def test_of_a_model_that_averages_the_accuracy_is_measured(run_dir, kt):
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["fit"]["test"]["accuracy"] > 0.9  # of the model that was replaced
    with pytest.raises(KerasTransferError, match="not good enough: its accuracy"):
        keras_transfer.export(run_dir, min_accuracy=0.9, flip_tta=True)
    assert nothing_is_published(run_dir)
    result = kt("evaluate", run_dir, "--flip-tta", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["flip_tta"] and said["accuracy"] < 0.9


def test_where_nothing_can_be_averaged_it_is_not_asked_for(run_dir, kt, photos):
    for arguments in (
        ("predict", "--bundle", run_dir / "1", photos, "--flip-tta"),
        ("evaluate", run_dir, photos, "--drift", "--flip-tta"),
    ):
        result = kt(*arguments)
        assert result.exit_code == 2 and "Received: " in result.stderr


def test_thresholds_of_predictions_that_were_not_averaged_are_noted():
    for rule, count in (
        (DecisionRule(), 0),
        (DecisionRule(sure=0.9), 1),
        (DecisionRule(classes=np.full(3, 0.5, np.float32)), 1),
    ):
        told = Told()
        note_flip_tta(rule, told)
        assert len(told.notes) == count


# Other formats


@pytest.mark.parametrize("form", ["litert", "onnx", "openvino", "keras"])
def test_other_formats_say_what_the_model_says(kt, trained, form, photos):
    result = kt("export", trained, "--format", form)
    assert result.exit_code == 0, result.output
    folder = trained / "exported" / form
    assert str(folder) in result.stdout
    assert (folder / "labels.txt").read_text().split() == list(CLASSES)
    predict = formats.RUNTIMES[form].load(folder / formats.RUNTIMES[form].file)
    decode = make_decoder(SIZE)
    files = [(photos / name / "07.jpg").read_bytes() for name in CLASSES]
    pixels = np.stack([decode(data) for data in files]).astype(np.float32)
    expected = load_model(keras_transfer.open_run(trained))(pixels, training=False)
    np.testing.assert_allclose(predict(pixels), expected, atol=formats.TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize("quantize", ["dynamic", "int8"])
def test_litert_can_be_quantized(kt, trained, quantize, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    result = kt("export", copy, "--format", "litert", "--quantize", quantize)
    assert result.exit_code == 0, result.output
    folder = copy / "exported" / "litert"
    assert "accuracy on" in result.stdout
    about = json.loads((folder / "keras_transfer.json").read_text())
    before, after = about["accuracy"]
    assert before >= 0.8 and abs(after - before) <= 0.2
    weights = load_model(keras_transfer.open_run(copy)).count_params()
    assert (folder / "model.tflite").stat().st_size < 1.5 * weights


@pytest.mark.parametrize(
    ("shift", "quantize", "agrees"),
    [
        (0.9 * formats.TOLERANCE, None, True),
        (1.1 * formats.TOLERANCE, None, False),
        (1.1 * formats.TOLERANCE, "dynamic", True),
        (np.nan, "dynamic", False),
    ],
)
def test_a_format_agrees_within_the_tolerance(shift, quantize, agrees):
    expected = {"probabilities": ROW}
    pixels = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    sample = Sample([WHOLE], pixels, expected)
    job = formats.Job(tiny_model(), sample, quantize, lambda: iter(()))
    if agrees:
        found = formats.check_agreement("litert", lambda _: ROW + shift, job)
        assert found == pytest.approx(shift, rel=0.01)
    else:
        with pytest.raises(KerasTransferError, match="does not agree"):
            formats.check_agreement("litert", lambda _: ROW + shift, job)


def test_a_format_that_disagrees_leaves_what_was_there(run_dir):
    first = keras_transfer.export(run_dir, format="keras")
    before = (first / "model.keras").read_bytes()
    model = load_model(Run(run_dir))
    model.get_layer("head").get_layer("probabilities").bias.assign([np.nan] * 3)
    model.save(run_dir / "model.keras")
    with pytest.raises(KerasTransferError, match="does not agree"):
        keras_transfer.export(run_dir, format="keras")
    assert (first / "model.keras").read_bytes() == before
    assert not list(run_dir.glob(".*"))
    assert not list(first.parent.glob(".*"))


def test_a_quantized_model_that_is_not_good_enough_is_refused(kt, run_dir):
    model = load_model(Run(run_dir))  # which metrics.json says to be better than it is
    model.get_layer("head").get_layer("probabilities").bias.assign([99, 0, 0])
    model.save(run_dir / "model.keras")
    command = ("export", run_dir, "--format", "litert", "--quantize", "dynamic")
    result = kt(*command, "--min-accuracy", 0.5)
    assert result.exit_code == 1
    assert "9 test images is 0.3333. Received: --min-accuracy 0.5" in result.stderr
    assert not (run_dir / "exported").exists()
    assert kt(*command, "--min-accuracy", 0.3).exit_code == 0


def test_where_the_images_are_gone_quantization_is_not_measured(kt, run_dir):
    lose_images(run_dir)
    command = ("export", run_dir, "--format", "litert", "--quantize", "dynamic")
    result = kt(*command, "--min-accuracy", 0.5)
    assert result.exit_code == 2 and "/gone" in result.stderr
    result = kt(*command)
    assert result.exit_code == 0, result.output
    assert "was not measured" in result.stderr
    about = json.loads((run_dir / "exported/litert/keras_transfer.json").read_text())
    assert about["accuracy"] is None


@pytest.mark.parametrize("part", ["write", "load"])
def test_what_a_converter_refuses_is_one_line(kt, run_dir, monkeypatch, part):
    def fails(*arguments):
        raise RuntimeError("unknown operation Foo.\nat line 1\nat line 2")

    runtime = replace(formats.RUNTIMES["keras"], **{part: fails})
    monkeypatch.setitem(formats.RUNTIMES, "keras", runtime)
    result = kt("export", run_dir, "--format", "keras")
    assert result.exit_code == 1
    expected = "Error: Format keras cannot express this model: unknown operation Foo."
    assert result.stderr == f"{expected} Nothing was exported.\n"
    assert not (run_dir / "exported").exists()


def test_a_package_that_is_missing_is_named(run_dir, kt, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "tf2onnx" else find(name),
    )
    result = kt("export", run_dir, "--format", "onnx")
    assert result.exit_code == 1
    assert "pip install 'keras-transfer[onnx]'" in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--quantize", "int8"),
        ("--quantize", "int8", "--format", "onnx"),
        ("--keep", 2, "--format", "keras"),
        ("--keep", 0),
        ("--format", "coreml"),
        ("--min-accuracy", 90),
    ],
)
def test_options_that_do_not_go_together_are_usage_errors(kt, run_dir, options):
    result = kt("export", run_dir, *options)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_api_refuses_to_keep_no_version(run_dir):
    with pytest.raises(UsageError, match="Received: keep=0"):
        keras_transfer.export(run_dir, keep=0)


def test_whatever_the_umask_everyone_may_read_what_is_exported(kt, run_dir):
    with umask(0o077):
        options = ("--format", "keras", "--write-serving-config")
        assert kt("export", run_dir, *options).exit_code == 0
    assert modes(run_dir / "exported") == (0o755, 0o644)
    assert modes(run_dir / "serving") == (0o755, 0o644)


@pytest.mark.parametrize("form", ["savedmodel", "keras", "openvino", "onnx", "litert"])
def test_on_a_full_disk_nothing_is_published_and_nothing_is_lost(
    kt, run_dir, small_disk, form
):
    on_disk = small_disk / "run"
    shutil.copytree(run_dir, on_disk)
    for folder in ("1", f"exported/{form}"):
        (on_disk / folder).mkdir(parents=True)
        (on_disk / folder / "model").write_text("old")
    before = {path: path.read_bytes() for path in on_disk.rglob("*") if path.is_file()}
    fill(small_disk, 4_096)
    result = kt("export", on_disk, "--format", form)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: The disk is full. Received: ")
    assert str(on_disk) in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert {path for path in on_disk.rglob("*") if path.is_file()} == {*before}
    assert {path: path.read_bytes() for path in before} == before
    assert not list(on_disk.glob(".*"))
