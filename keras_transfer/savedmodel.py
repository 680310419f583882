"""A run's model -> a SavedModel version directory for TensorFlow Serving, verified.

The graph holds the decoder of `decode.py` and calls the model with `training=False`:
a file's bytes go in, and the same probabilities come out as in training.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_transfer.decode import decode_image, make_decoder
from keras_transfer.errors import KerasTransferError
from keras_transfer.prediction import Predictor, held_out_images, load_model
from keras_transfer.run import Run, open_run

TOLERANCE = 1e-5
_TOP = 5
_VERIFIED_IMAGES = 16


class ServingBundle(tf.Module):
    """A classifier with its decoder, as one TensorFlow function of bytes."""

    def __init__(self, model: keras.Model, class_names: Sequence[str]):
        super().__init__(name="serving_bundle")
        self._model = model
        self._variables = model.variables  # tracked: saved once each
        self._class_names = tf.constant(list(class_names))

    @tf.function(
        input_signature=[tf.TensorSpec((None,), tf.string, name="image_bytes")],
        autograph=False,
    )
    def serving_default(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        """Classifies encoded images.

        Args:
            image_bytes: string `[N]`, files as `decode.decode_image` takes them.

        Returns:
            `probabilities` float32 `[N, C]`, and the k = min(5, C) likeliest classes:
            `classes` string `[N, k]`, `scores` float32 `[N, k]`, `indices` int32
            `[N, k]`.
        """
        image_bytes = tf.ensure_shape(image_bytes, (None,))
        image_size = self._model.input_shape[1]
        pixels = tf.map_fn(
            lambda encoded: decode_image(encoded, image_size),
            image_bytes,
            fn_output_signature=tf.TensorSpec((image_size, image_size, 3), tf.uint8),
        )
        probabilities = self._model(tf.cast(pixels, tf.float32), training=False)
        top = min(_TOP, len(self._class_names))
        scores, indices = tf.math.top_k(probabilities, top)
        return {
            "probabilities": probabilities,
            "classes": tf.gather(self._class_names, indices),
            "scores": scores,
            "indices": indices,
        }


def export(
    run: str | Path | Run, on_note: Callable[[str], object] = lambda _: None
) -> Path:
    """Publishes a run's model.keras as its next version directory.

    Args:
        run: A run or its directory.
        on_note: Told what the user should know.

    Returns:
        The version directory.

    Raises:
        UsageError: If there is no such run.
        KerasTransferError: If the bundle does not agree with the model.
    """
    run = open_run(run)
    model = load_model(run)
    image_size = model.input_shape[1]
    try:
        _, table, read = held_out_images(run)
        names = table.sources[:_VERIFIED_IMAGES]
        images = [data for _, data in read(names) if isinstance(data, bytes)]
    except KerasTransferError as error:
        on_note(f"Verified on noise, since the run's images cannot be read: {error}")
        images = []
    if not images:
        noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
        images = [tf.io.encode_png(image).numpy() for image in noise]
    decode = make_decoder(image_size)
    expected = Predictor(model)([decode(encoded) for encoded in images])
    return export_model(run, model, images, expected)


def export_model(
    run: Run, model: keras.Model, images: Sequence[bytes], expected: np.ndarray
) -> Path:
    """Publishes a model as the next version directory of its run.

    Args:
        run: The run; `run_dir` may still be under construction.
        model: Its model, from [0, 255] pixels to probabilities.
        images: Encoded images to verify the bundle on.
        expected: float32 `[len(images), C]`, what the model says of them.

    Returns:
        The version directory, complete: it appears under its number only after what
        was saved has been loaded again and agreed with the model.

    Raises:
        KerasTransferError: If the bundle does not agree; nothing is published.
    """
    bundle = ServingBundle(model, run.class_names)
    staging = Path(tempfile.mkdtemp(dir=run.run_dir, prefix=".export."))
    try:
        tf.saved_model.save(
            bundle, str(staging), signatures={"serving_default": bundle.serving_default}
        )
        _verify(staging, images, expected)
        staging.chmod(0o755)  # mkdtemp's 0700 would lock TensorFlow Serving out
        return _publish(staging, run.run_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _verify(saved: Path, images: Sequence[bytes], expected: np.ndarray) -> None:
    loaded = tf.saved_model.load(str(saved))
    serve = loaded.signatures["serving_default"]
    actual = serve(image_bytes=tf.constant(list(images)))["probabilities"].numpy()
    difference = float(np.abs(actual - expected).max())
    if not difference <= TOLERANCE:
        raise KerasTransferError(
            f"The exported graph does not agree with the model: probabilities differ "
            f"by {difference:.2g}, at most {TOLERANCE} is allowed. Nothing was "
            "published."
        )


def _publish(staging: Path, run_dir: Path) -> Path:
    while True:
        taken = [int(path.name) for path in run_dir.iterdir() if path.name.isdigit()]
        version = run_dir / str(max(taken, default=0) + 1)
        try:
            os.rename(staging, version)
        except OSError:
            if not version.exists():
                raise
        else:
            return version
