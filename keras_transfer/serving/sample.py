"""Loads the model to export and the images that the export is verified on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_transfer.data.formats.convert import image_digest, to_png
from keras_transfer.data.samples import sample_images
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.evaluation.of_run import load_model, run_splits
from keras_transfer.events import Listener
from keras_transfer.features.image_table import changed_images, known_images
from keras_transfer.models.classifier import with_features
from keras_transfer.runs.manifest import Manifest
from keras_transfer.runs.run import Run, read_together
from keras_transfer.runtime.c_api import Arrays

BATCHES = (1, 8)
"""Numbers of images in the requests for verification and warm-up."""


@dataclass(frozen=True)
class Sample:
    """Images of a run with the expected outputs of its model.

    Attributes:
        files: The n encoded images, in formats that the exported model decodes.
        pixels: uint8 `[n, image_size, image_size, 3]` decoded images.
        expected: The model's outputs: `probabilities` float32 `[n, C]` and `features`
            (the head's input) float32 `[n, D]`.
    """

    files: Sequence[bytes]
    pixels: np.ndarray
    expected: Arrays


def flip_averaged_sample(sample: Sample, model: keras.Model) -> Sample:
    """Returns a sample with the outputs expected of a model that averages over flips.

    Args:
        sample: The sample of the model itself.
        model: Keras model from [0, 255] RGB pixels to probabilities.
    """
    mirrored = np.ascontiguousarray(sample.pixels[:, :, ::-1]).astype(np.float32)
    other = keras.ops.convert_to_numpy(model(mirrored, training=False))
    mean = (sample.expected["probabilities"] + other) / 2
    return replace(sample, expected={**sample.expected, "probabilities": mean})


@dataclass(frozen=True)
class Trained:
    """A run's model with its metadata, all in one consistent state.

    Attributes:
        model: Keras model from [0, 255] RGB pixels to probabilities.
        class_names: Class names in the order of its outputs.
        manifest: The run's manifest.
        metrics: The fields of `metrics.Evaluation` by split.
        identity: `Run.identity` when the files were read.
    """

    model: keras.Model
    class_names: list[str]
    manifest: Manifest
    metrics: dict[str, dict[str, Any]]
    identity: bytes


def load_trained(run: Run, min_accuracy: float | None) -> Trained:
    """Loads the model to export.

    Args:
        run: The run.
        min_accuracy: Minimum accuracy on the test images, from 0 to 1; None for no
            limit.

    Raises:
        UsageError: If `min_accuracy` is given but the run has no test images.
        KerasTransferError: If the accuracy is too low, or the run's files cannot be
            read.
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
                f"min_accuracy needs a test split. Received: {run.run_dir}, which "
                "has none. Train it again with one, or export without."
            )
        check_accuracy(test["accuracy"], test["images"], min_accuracy)
    return trained


def check_accuracy(accuracy: float, images: int, min_accuracy: float) -> None:
    """Rejects a model whose accuracy is too low.

    Args:
        accuracy: Accuracy on the test images, from 0 to 1.
        images: Number of test images, for the message.
        min_accuracy: Minimum accuracy.

    Raises:
        KerasTransferError: If the accuracy is lower.
    """
    if accuracy < min_accuracy:
        raise KerasTransferError(
            f"The model is not good enough: its accuracy on the {images:,} test images "
            f"is {accuracy:.4f}. Received: min_accuracy={min_accuracy}. Nothing was "
            "exported."
        )


def sample_of_run(run: Run, model: keras.Model, listener: Listener) -> Sample:
    """Samples up to 9 of a run's training images, or noise if none can be read."""
    image_size, count = model.input_shape[1], sum(BATCHES)
    try:
        images = sample_images(run_splits(run), image_size, count)
    except KerasTransferError as error:
        listener.note(
            f"Verified on noise, for the run's images cannot be read: {error}"
        )
        images = []
    digests = {name: image_digest(encoded) for name, encoded, _ in images}
    known = known_images(run.images_path, listener)
    if changed := changed_images(known, digests):
        listener.note(
            f"{len(changed)} of the {len(digests)} images that the export is verified "
            f"on have changed since the run was made, such as {changed[0]}"
        )
    if images:
        files = [to_png(encoded) for _, encoded, _ in images]
        pixels = np.stack([decoded for _, _, decoded in images])
    else:
        shape = (count, image_size, image_size, 3)
        pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        files = [tf.io.encode_png(image).numpy() for image in pixels]
    said = with_features(model)(pixels.astype(np.float32), training=False)
    expected = {name: keras.ops.convert_to_numpy(rows) for name, rows in said.items()}
    return Sample(files, pixels, expected)
