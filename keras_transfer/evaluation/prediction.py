"""A run's model on images: predictions as a stream, and evaluation."""

from collections.abc import Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_transfer.data.decode import make_decoder
from keras_transfer.data.reading import Reader, map_ahead
from keras_transfer.data.tables import Prediction
from keras_transfer.errors import DecodeError

_BATCH = 16


class Predictor:
    """Probabilities of pixel batches, computed by Keras in float32."""

    def __init__(self, model: keras.Model):
        self._function = tf.function(
            lambda pixels: model(tf.cast(pixels, tf.float32), training=False),
            input_signature=[tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8)],
            autograph=False,
        )

    def __call__(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """float32 `[n, num_classes]` of n uint8 `[H, W, 3]` images."""
        starts = range(0, len(pixels), _BATCH)
        batches = (np.stack(pixels[start : start + _BATCH]) for start in starts)
        return np.concatenate([self._function(tf.constant(b)) for b in batches])


def predict_sources(
    model: keras.Model, sources: Sequence[str], read: Reader
) -> Iterator[Prediction]:
    """Predicts what a reader yields; see `predict`."""
    predictor = Predictor(model)
    decode = make_decoder(model.input_shape[1])

    def decoded(
        item: tuple[str, bytes | OSError],
    ) -> tuple[str, np.ndarray | None, str]:
        source, encoded = item
        if isinstance(encoded, OSError):
            return source, None, f"cannot be read: {encoded.strerror}"
        try:
            return source, decode(encoded), ""
        except DecodeError as error:
            return source, None, str(error)

    def flush() -> Iterator[Prediction]:
        usable = [pixels for _, pixels, _ in batch if pixels is not None]
        rows = iter(predictor(usable)) if usable else iter(())
        for source, pixels, error in batch:
            yield Prediction(source, None if pixels is None else next(rows), error)

    batch: list[tuple[str, np.ndarray | None, str]] = []
    for item in map_ahead(decoded, read(sources), threads=2):
        batch.append(item)
        if len(batch) == _BATCH:
            yield from flush()
            batch = []
    yield from flush()
