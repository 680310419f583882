"""A run's model -> a SavedModel version directory for TensorFlow Serving, verified.

What is published was loaded before by TensorFlow's own C++ loader, in a process
without Python's TensorFlow, and said of real images what the model says.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel
from tensorflow.python.saved_model.fingerprinting_utils import write_fingerprint

from keras_transfer.bundle import (
    EXAMPLE_KEY,
    TOLERANCE,
    ServingBundle,
    disagreement,
    frozen_network,
    with_features,
)
from keras_transfer.c_api import ABOUT, Arrays, Request, answer_elsewhere
from keras_transfer.decode import DECODER_VERSION
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.model import weights_digest
from keras_transfer.prediction import load_model, run_splits, sample_images
from keras_transfer.run import (
    Manifest,
    OnNote,
    Run,
    committing,
    now,
    open_run,
    read_together,
    rename_to_first_free,
    settle,
    temporary_directory,
    version_dirs,
    versions,
    write_atomic,
)
from keras_transfer.warmup import RECORDS, read_records, write_records

_BATCHES = (1, 8)  # images in the requests of verification and of warm-up
# What is served is never trained, and TensorFlow cannot save the gradient of its swish.
_SAVING = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
_FORBIDDEN_OPS = re.compile(
    "Random|Multinomial|PyFunc|XlaCallModule|^(Read|Write)File$|MatchingFiles"
)


@dataclass(frozen=True)
class Sample:
    """Images of a run, and what its model says of them.

    Attributes:
        files: Encoded images, n of them.
        pixels: uint8 `[n, image_size, image_size, 3]`: the same, decoded.
        expected: `probabilities` float32 `[n, C]`, and what the head reads, `features`
            float32 `[n, D]`.
    """

    files: Sequence[bytes]
    pixels: np.ndarray
    expected: Arrays


@dataclass(frozen=True)
class Trained:
    """A run's model, and what the run says of it.

    Attributes:
        model: From [0, 255] RGB pixels to probabilities.
        class_names: The classes, in the order of its outputs.
        manifest: Where it came from.
        metrics: Split to what `evaluation.Evaluation` documents.
        identity: `Run.identity` of the run that all of these are of.
    """

    model: keras.Model
    class_names: list[str]
    manifest: Manifest
    metrics: dict[str, dict]
    identity: bytes


def load_trained(run: Run, min_accuracy: float | None) -> Trained:
    """Loads what is exported.

    Args:
        run: The run.
        min_accuracy: Refuses a model whose accuracy on the test images is lower.

    Raises:
        UsageError: If the run has no test images to judge by.
        KerasTransferError: If the model's accuracy is lower.
    """

    def read() -> Trained:
        manifest, metrics = run.manifest, run.metrics
        return Trained(
            load_model(run),
            run.class_names,
            manifest,
            metrics[manifest.phase],
            run.identity,
        )

    trained = read_together(run, read)
    if min_accuracy is not None:
        test = trained.metrics.get("test")
        if not test:
            raise UsageError(
                f"--min-accuracy needs a test split. Received: {run.run_dir}, which "
                "has none. Train it again with one, or export without."
            )
        check_accuracy(test["accuracy"], test["images"], min_accuracy)
    return trained


def check_accuracy(accuracy: float, images: int, min_accuracy: float) -> None:
    """Refuses a model that is wrong too often.

    Raises:
        KerasTransferError: If its accuracy on the test images is too low.
    """
    if accuracy < min_accuracy:
        raise KerasTransferError(
            f"The model is not good enough: its accuracy on the {images:,} test images "
            f"is {accuracy:.4f}. Received: --min-accuracy {min_accuracy}. Nothing was "
            "exported."
        )


def sample_of_run(run: Run, model: keras.Model, on_note: OnNote) -> Sample:
    """Some of a run's training images; noise, where they cannot be read."""
    image_size, count = model.input_shape[1], sum(_BATCHES)
    try:
        images = sample_images(run_splits(run), image_size, count)
    except KerasTransferError as error:
        on_note(f"Verified on noise, for the run's images cannot be read: {error}")
        images = []
    if images:
        files = [encoded for _, encoded, _ in images]
        pixels = np.stack([decoded for _, _, decoded in images])
    else:
        shape = (count, image_size, image_size, 3)
        pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        files = [tf.io.encode_png(image).numpy() for image in pixels]
    said = with_features(model)(pixels.astype(np.float32), training=False)
    expected = {name: keras.ops.convert_to_numpy(rows) for name, rows in said.items()}
    return Sample(files, pixels, expected)


def export(
    run: str | Path | Run,
    *,
    min_accuracy: float | None = None,
    keep: int | None = None,
    on_note: OnNote = lambda _: None,
) -> Path:
    """Publishes a run's model.keras as its next version directory.

    Args:
        run: A run or its directory.
        min_accuracy: Refuses a model whose accuracy on the test images is lower.
        keep: How many versions, the new one among them, are left; None for all.
        on_note: Told what the user should know.

    Returns:
        The version directory, complete: it appears under its number only after what
        was saved has been loaded again and agreed with the model.

    Raises:
        UsageError: If there is no such run, or it has no test images to judge by.
        KerasTransferError: If the model is worse than `min_accuracy`, the bundle does
            not agree with it, or another process changed the run meanwhile. Nothing is
            published then.
    """
    run = open_run(run)
    if keep is not None and keep < 1:
        raise UsageError(f"At least one version is kept. Received: --keep {keep}.")
    trained = load_trained(run, min_accuracy)
    sample = sample_of_run(run, trained.model, on_note)
    network, is_folded = frozen_network(trained.model, sample.pixels, sample.expected)
    if not is_folded:
        on_note("BatchNormalization is not folded: it would change what is predicted")
    image_size = trained.manifest.image_size
    bundle = ServingBundle(network, image_size, trained.class_names)
    with temporary_directory(run.run_dir) as staging:
        tf.saved_model.save(tf.Module(), str(staging), bundle.signatures, _SAVING)
        (staging / "assets").rmdir()  # empty
        _finish_graph(staging)
        (staging / RECORDS).parent.mkdir()
        write_records(staging / RECORDS, _warmups(sample))
        about = _about(run, trained, is_folded, staging)
        write_atomic(staging / ABOUT, json.dumps(about, indent=1, ensure_ascii=False))
        _verify(staging, sample, trained.class_names)
        version = _publish(staging, run.run_dir, trained.identity)
    if keep is not None:
        _prune(run.run_dir, keep)
    return version


def read_signatures(saved: Path) -> dict[str, dict[str, dict[str, str]]]:
    """Signature -> `inputs`, `outputs` -> name -> name of the tensor."""
    proto = SavedModel.FromString((saved / "saved_model.pb").read_bytes())
    return {
        name: {
            "inputs": {key: info.name for key, info in signature.inputs.items()},
            "outputs": {key: info.name for key, info in signature.outputs.items()},
        }
        for name, signature in proto.meta_graphs[0].signature_def.items()
        if not name.startswith("__")  # which initialize
    }


def _finish_graph(saved: Path) -> None:
    """Makes `classify` one of TensorFlow Serving's classification signatures.

    Raises:
        KerasTransferError: If the graph holds what must not be served.
    """
    path = saved / "saved_model.pb"
    proto = SavedModel.FromString(path.read_bytes())
    (graph,) = proto.meta_graphs
    functions = graph.graph_def.library.function
    nodes = [*graph.graph_def.node, *(n for f in functions for n in f.node_def)]
    forbidden = sorted({n.op for n in nodes if _FORBIDDEN_OPS.search(n.op)})
    if forbidden:
        raise KerasTransferError(
            f"The graph holds operations that do not belong in a server: {forbidden}. "
            "Nothing was published."
        )
    classify = graph.signature_def["classify"]
    classify.method_name = tf.saved_model.CLASSIFY_METHOD_NAME
    path.write_bytes(proto.SerializeToString(deterministic=True))
    write_fingerprint(str(saved))


def _about(run: Run, trained: Trained, is_folded: bool, saved: Path) -> dict[str, Any]:
    """What `assets.extra/keras_transfer.json` says."""
    manifest = trained.manifest
    graph = (saved / "saved_model.pb").read_bytes()
    return {
        "schema_version": 1,
        "created": now(),
        "run": run.run_dir.resolve().name,
        "base": manifest.base,
        "phase": manifest.phase,
        "labels": trained.class_names,
        "multi_label": manifest.multi_label,
        "image_size": manifest.image_size,
        "decoder_version": DECODER_VERSION,
        "batch_normalization_folded": is_folded,
        "metrics": trained.metrics,
        "weights_sha256": weights_digest(trained.model),
        "graph_sha256": hashlib.sha256(graph).hexdigest(),
        "versions": versions(),
        "signatures": read_signatures(saved),
    }


def _requests(files: Sequence[bytes], pixels: np.ndarray) -> list[Request]:
    """A request to each signature with these images."""
    image_bytes = np.array(files, object)
    return [
        Request("serving_default", {"image_bytes": image_bytes}),
        Request("predict_images", {"images": pixels}),
        Request("predict_tensor", {"images": pixels.astype(np.float32)}),
        Request("classify", {"inputs": np.array([*map(_example, files)], object)}),
        Request("embed", {"image_bytes": image_bytes}),
    ]


def _example(encoded: bytes) -> bytes:
    value = tf.train.Feature(bytes_list=tf.train.BytesList(value=[encoded]))
    features = tf.train.Features(feature={EXAMPLE_KEY: value})
    return tf.train.Example(features=features).SerializeToString()


def _batches(sample: Sample) -> list[np.ndarray]:
    """Which images are asked for together."""
    everything = np.arange(sum(_BATCHES)) % len(sample.files)
    return np.split(everything, np.cumsum(_BATCHES)[:-1])


def _warmups(sample: Sample) -> list[Request]:
    """Requests with small copies of the images, to the signatures asked most."""
    files = [tf.io.encode_jpeg(x, quality=75).numpy() for x in sample.pixels]
    return [
        request
        for rows in _batches(sample)
        for request in _requests([files[i] for i in rows], sample.pixels[rows])
        if request.signature in ("serving_default", "classify")
    ]


def _verify(saved: Path, sample: Sample, class_names: Sequence[str]) -> None:
    """Asks every signature, as TensorFlow Serving would, and compares.

    Raises:
        KerasTransferError: If an answer is not what the model says.
    """
    asked = [
        (rows, request)
        for rows in _batches(sample)
        for request in _requests([sample.files[i] for i in rows], sample.pixels[rows])
    ]
    warmups = list(read_records(saved / RECORDS))
    answers = answer_elsewhere(saved, [*(r for _, r in asked), *warmups])
    for (rows, request), answer in zip(asked, answers, strict=False):
        wrong = (
            answer
            if isinstance(answer, str)
            else _difference(answer, sample, rows, class_names)
        )
        if wrong:
            raise KerasTransferError(
                f"Signature {request.signature}, asked for {len(rows)} images, is "
                f"wrong: {wrong}. Nothing was published."
            )
    for answer in answers[len(asked) :]:
        if isinstance(answer, str):
            raise KerasTransferError(
                f"A warm-up record fails: {answer}. Nothing was published."
            )


def _difference(
    answer: Arrays, sample: Sample, rows: np.ndarray, class_names: Sequence[str]
) -> str:
    """How an answer differs from what the model says of the images; "" if it agrees."""
    expected = {name: values[rows] for name, values in sample.expected.items()}
    wrong = disagreement(answer, expected)
    if wrong or "scores" not in answer:
        return wrong
    scores, classes = answer["scores"], answer["classes"]
    probabilities = expected["probabilities"]
    best = np.sort(probabilities)[:, ::-1][:, : scores.shape[1]]
    apart = np.abs(scores - best).max()
    if not apart <= TOLERANCE:
        return f"scores differ by {apart:.2g}"
    for row, named, said in zip(probabilities, classes, scores, strict=True):
        for name, score in zip(named, said, strict=True):
            if abs(row[class_names.index(name.decode())] - score) > TOLERANCE:
                return f"the score of {name.decode()!r} is that of another class"
    if "indices" in answer:
        by_index = np.array([name.encode() for name in class_names], object)
        if (by_index[answer["indices"]] != classes).any():
            return "indices are not those of the classes"
    return ""


def _publish(staging: Path, run_dir: Path, made_from: bytes) -> Path:
    """Gives a directory the next number; it is on the disk before it has it."""
    settle(staging)
    with committing(run_dir, made_from):
        last = max((int(path.name) for path in version_dirs(run_dir)), default=0)
        numbers = itertools.count(last + 1)
        return rename_to_first_free(staging, (run_dir / str(n) for n in numbers))


def _prune(run_dir: Path, keep: int) -> None:
    """Deletes all but the newest versions, each at once as far as a server sees."""
    versions = [path for path in version_dirs(run_dir) if path.is_dir()]
    for version in versions[:-keep]:
        with (
            temporary_directory(run_dir) as pruned,
            contextlib.suppress(FileNotFoundError),  # pruned by another process
        ):
            os.rename(version, pruned)
