"""A run's model -> a verified SavedModel version directory for TensorFlow Serving.

Before it is published, the SavedModel is loaded by TensorFlow's C++ loader in a process
that does not import TensorFlow's Python package, and its outputs for real images are
compared with the model's.
"""

import contextlib
import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel
from tensorflow.python.saved_model.fingerprinting_utils import write_fingerprint

from keras_transfer.data.decode import DECODER_VERSION
from keras_transfer.errors import KerasTransferError
from keras_transfer.evaluation.decisions import NO_RULE, DecisionRule
from keras_transfer.models.classifier import weights_digest
from keras_transfer.runs.files import rename_to_first_free, settle, temporary_directory
from keras_transfer.runs.manifest import Manifest, now, versions
from keras_transfer.runs.run import Run, committing, version_dirs
from keras_transfer.runtime.c_api import Arrays, Request, answer_elsewhere
from keras_transfer.serving.sample import BATCHES, Sample, Trained
from keras_transfer.serving.signatures import (
    EXAMPLE_KEY,
    TOLERANCE,
    ServingBundle,
    disagreement,
)
from keras_transfer.serving.warmup import RECORDS, read_records, write_records

# A served model is not trained, and TensorFlow cannot save the gradient of swish.
_SAVING = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
_FORBIDDEN_OPS = re.compile(
    "Random|Multinomial|PyFunc|XlaCallModule|^(Read|Write)File$|MatchingFiles"
)


def write_savedmodel(saved: Path, bundle: ServingBundle, sample: Sample) -> None:
    """Writes a bundle's graph and warm-up requests to a directory.

    Raises:
        KerasTransferError: If the graph contains operations that must not be served.
    """
    tf.saved_model.save(tf.Module(), str(saved), bundle.signatures, _SAVING)
    (saved / "assets").rmdir()  # empty
    _finish_graph(saved)
    (saved / RECORDS).parent.mkdir()
    write_records(saved / RECORDS, _warmup_requests(sample))


def read_signatures(saved: Path) -> dict[str, dict[str, dict[str, str]]]:
    """Reads tensor names by signature, `inputs` or `outputs`, and argument name."""
    proto = SavedModel.FromString((saved / "saved_model.pb").read_bytes())
    return {
        name: {
            "inputs": {key: info.name for key, info in signature.inputs.items()},
            "outputs": {key: info.name for key, info in signature.outputs.items()},
        }
        for name, signature in proto.meta_graphs[0].signature_def.items()
        if not name.startswith("__")  # these are initializers
    }


def _finish_graph(saved: Path) -> None:
    """Checks the graph and marks `classify` as a Classification API signature.

    Raises:
        KerasTransferError: If the graph contains operations that must not be served.
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


def decisions(manifest: Manifest) -> dict[str, Any]:
    """Returns the manifest's keys that say how probabilities become decisions."""
    found = manifest.abstention
    return {
        "abstention": found.model_dump() if found else None,
        "thresholds": manifest.thresholds,
    }


def describe(
    run: Run, trained: Trained, is_folded: bool, saved: Path, flip_tta: bool = False
) -> dict[str, Any]:
    """Builds the content of `assets.extra/keras_transfer.json`.

    Args:
        run: The run.
        trained: Its model and metadata.
        is_folded: Whether BatchNormalization is folded.
        saved: Directory of the SavedModel.
        flip_tta: Whether probabilities are averaged over each image and its mirror
            image; the metrics are of the model without.
    """
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
        **decisions(manifest),
        "image_size": manifest.image_size,
        "decoder_version": DECODER_VERSION,
        "batch_normalization_folded": is_folded,
        "flip_tta": flip_tta,
        "metrics": trained.metrics,
        "weights_sha256": weights_digest(trained.model),
        "graph_sha256": hashlib.sha256(graph).hexdigest(),
        "versions": versions(),
        "signatures": read_signatures(saved),
    }


def _requests(files: Sequence[bytes], pixels: np.ndarray) -> list[Request]:
    """Builds one request per signature for the given images."""
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
    """Returns the indices of the images in each batch of requests."""
    everything = np.arange(sum(BATCHES)) % len(sample.files)
    return np.split(everything, np.cumsum(BATCHES)[:-1])


def _warmup_requests(sample: Sample) -> list[Request]:
    """Builds requests to the most-used signatures, with small copies of the images."""
    files = [tf.io.encode_jpeg(x, quality=75).numpy() for x in sample.pixels]
    return [
        request
        for rows in _batches(sample)
        for request in _requests([files[i] for i in rows], sample.pixels[rows])
        if request.signature in ("serving_default", "classify")
    ]


def verify(
    saved: Path,
    sample: Sample,
    class_names: Sequence[str],
    rule: DecisionRule = NO_RULE,
) -> None:
    """Runs every signature as TensorFlow Serving would and compares the outputs.

    Args:
        saved: Directory of the SavedModel.
        sample: The images, with the model's outputs.
        class_names: Class names in the order of the outputs.
        rule: The rule that the SavedModel decides by.

    Raises:
        KerasTransferError: If an output differs from the model's, a request or a
            warm-up record fails, or the SavedModel cannot be loaded.
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
            else difference(answer, sample, rows, class_names)
            or undecided(answer, rule)
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


def difference(
    answer: Arrays, sample: Sample, rows: np.ndarray, class_names: Sequence[str]
) -> str:
    """Describes how an answer differs from the model's outputs; "" if it agrees.

    Args:
        answer: Outputs of a signature by name.
        sample: The images.
        rows: Indices of the images in the request.
        class_names: Class names in the order of the outputs.
    """
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


def undecided(answer: Arrays, rule: DecisionRule) -> str:
    """Describes how an answer's decisions differ from a rule's; "" if they agree.

    They must agree exactly: they follow from the answer's own probabilities.

    Args:
        answer: Outputs of a signature by name.
        rule: The rule that the SavedModel decides by.
    """
    if "probabilities" not in answer:
        return ""
    probabilities = answer["probabilities"]
    expected = {"sure": rule.is_sure(probabilities)}
    expected["predicted"] = (
        None if rule.classes is None else rule.predicted(probabilities)
    )
    for name, decisions in expected.items():
        if (decisions is None) != (name not in answer):
            return f"{name} is {'missing' if name not in answer else 'not expected'}"
        if decisions is not None and not np.array_equal(answer[name], decisions):
            return f"{name} does not follow from the probabilities"
    return ""


def publish(staging: Path, run_dir: Path, made_from: bytes) -> Path:
    """Syncs a directory to disk and renames it to the run's next version number.

    Args:
        staging: The complete version directory.
        run_dir: The run's directory.
        made_from: The `identity` that the run must have.

    Returns:
        The version directory.

    Raises:
        KerasTransferError: If the run's identity is not `made_from`.
    """
    settle(staging)
    with committing(run_dir, made_from):
        last = max((int(path.name) for path in version_dirs(run_dir)), default=0)
        numbers = itertools.count(last + 1)
        return rename_to_first_free(staging, (run_dir / str(n) for n in numbers))


def prune_versions(run_dir: Path, keep: int) -> None:
    """Deletes all but the newest `keep` versions, each atomically for a server."""
    versions = [path for path in version_dirs(run_dir) if path.is_dir()]
    for version in versions[:-keep]:
        with (
            temporary_directory(run_dir) as pruned,
            contextlib.suppress(FileNotFoundError),  # another process pruned it
        ):
            os.rename(version, pruned)
