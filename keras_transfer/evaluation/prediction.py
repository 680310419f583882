"""Streams predictions of a model for images."""

import itertools
from collections.abc import Iterator, Sequence

import keras
import numpy as np

from keras_transfer.data.decode import make_decoder
from keras_transfer.data.reading import Reader, map_ahead
from keras_transfer.data.tables import Prediction, Table
from keras_transfer.errors import DecodeError
from keras_transfer.features.engine import KerasEngine

_BATCH_SIZE = 16

_Decoded = tuple[str, np.ndarray | None, str]  # source, pixels or else the reason


def prediction_engine(model: keras.Model) -> KerasEngine:
    """Creates the engine for predictions, which does not pad incomplete batches."""
    return KerasEngine(model, _BATCH_SIZE, pads=False)


def predict_sources(
    model: keras.Model, sources: Sequence[str], read: Reader
) -> Iterator[Prediction]:
    """Predicts images in the order in which a reader yields them.

    Args:
        model: Keras model from [0, 255] RGB pixels to probabilities.
        sources: Identifiers of the images.
        read: Reads their encoded bytes.

    Yields:
        One prediction per image. For an unusable image it contains the reason instead
        of probabilities.
    """
    size = model.input_shape[1]
    decode = make_decoder(size)

    def decoded(item: tuple[str, bytes | OSError]) -> _Decoded:
        source, encoded = item
        if isinstance(encoded, OSError):
            return source, None, f"cannot be read: {encoded.strerror}"
        try:
            return source, decode(encoded), ""
        except DecodeError as error:
            return source, None, str(error)

    def batches() -> Iterator[tuple[list[_Decoded], np.ndarray]]:
        items = iter(map_ahead(decoded, read(sources), threads=2))
        while batch := list(itertools.islice(items, _BATCH_SIZE)):
            usable = [pixels for _, pixels, _ in batch if pixels is not None]
            yield batch, np.reshape(usable, (-1, size, size, 3)).astype(np.uint8)

    for batch, probabilities in prediction_engine(model).run(batches()):
        rows = iter(probabilities)
        for source, pixels, error in batch:
            yield Prediction(source, None if pixels is None else next(rows), error)


def predict_table(model: keras.Model, table: Table, read: Reader) -> np.ndarray:
    """Predicts a table's images, all usable, as float32 `[N, num_classes]`."""
    by_source = {
        prediction.source: prediction.probabilities
        for prediction in predict_sources(model, table.sources, read)
    }
    return np.stack([by_source[source] for source in table.sources])  # type: ignore[misc]
