"""What is exported, and the images that an export is verified with."""

from collections.abc import Sequence
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from keras_transfer.data.samples import sample_images
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.evaluation.of_run import load_model, run_splits
from keras_transfer.events import OnNote
from keras_transfer.runs.manifest import Manifest
from keras_transfer.runs.run import Run, read_together
from keras_transfer.runtime.c_api import Arrays
from keras_transfer.serving.signatures import with_features

BATCHES = (1, 8)  # images in the requests of verification and of warm-up


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
    image_size, count = model.input_shape[1], sum(BATCHES)
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
