"""Streams predictions of a model for images."""

import itertools
from collections.abc import Iterator, Sequence

import keras
import numpy as np

from keras_transfer.data.decode import make_decoder
from keras_transfer.data.reading import Reader, map_ahead
from keras_transfer.data.tables import Prediction, Table
from keras_transfer.errors import DecodeError
from keras_transfer.evaluation.decisions import DecisionRule
from keras_transfer.evaluation.out_of_distribution import OutOfDistribution
from keras_transfer.events import Listener
from keras_transfer.features.engine import KerasEngine
from keras_transfer.models.classifier import with_features
from keras_transfer.models.flip import flip_averaged, flip_averaged_with_features

_BATCH_SIZE = 16

_Decoded = tuple[str, np.ndarray | None, str]  # source, pixels or else the reason


def prediction_engine(model: keras.Model) -> KerasEngine:
    """Creates the engine for predictions, which does not pad incomplete batches."""
    return KerasEngine(model, _BATCH_SIZE, pads=False)


def predict_sources(
    model: keras.Model,
    sources: Sequence[str],
    read: Reader,
    detector: OutOfDistribution | None = None,
    engine: KerasEngine | None = None,
    flip_tta: bool = False,
) -> Iterator[Prediction]:
    """Predicts images in the order in which a reader yields them.

    Args:
        model: Keras model from [0, 255] RGB pixels to probabilities.
        sources: Identifiers of the images.
        read: Reads their encoded bytes.
        detector: Tells from the model's features whether an image is far from the
            training images; None leaves that unknown.
        engine: The model's `prediction_engine`, if it is used several times; it uses
            the model's current weights. Only without a detector and `flip_tta`.
        flip_tta: Whether probabilities are averaged over each image and its mirror
            image, at twice the cost. The detector sees the image alone.

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

    num_classes = model.output_shape[-1]
    joined = _features_beside(model, flip_tta) if detector else model
    if flip_tta and not detector:
        joined = flip_averaged(model)
    for batch, outputs in (engine or prediction_engine(joined)).run(batches()):
        far = detector.is_far(outputs[:, num_classes:]) if detector else None
        row = 0
        for source, pixels, error in batch:
            if pixels is None:
                yield Prediction(source, None, error)
                continue
            is_far = None if far is None else bool(far[row])
            yield Prediction(source, outputs[row, :num_classes], far=is_far)
            row += 1


def _features_beside(model: keras.Model, flip_tta: bool) -> keras.Model:
    """Joins probabilities and features to one output `[N, num_classes + D]`."""
    both = (flip_averaged_with_features if flip_tta else with_features)(model)
    joined = keras.layers.Concatenate()(
        [both.output["probabilities"], both.output["features"]]
    )
    return keras.Model(both.input, joined)


def note_flip_tta(rule: DecisionRule, listener: Listener) -> None:
    """Notes that averaged predictions are decided by thresholds of others, if any."""
    if rule.columns:
        listener.note(
            "thresholds are those of the run, chosen on predictions that are not "
            "averaged over flips: their promised accuracy is not that of averaged ones"
        )


def predict_table(
    model: keras.Model, table: Table, read: Reader, engine: KerasEngine | None = None
) -> np.ndarray:
    """Predicts a table's images, all usable, as float32 `[N, num_classes]`.

    Args:
        model: As for `predict_sources`.
        table: The images.
        read: Reads their encoded bytes.
        engine: As for `predict_sources`.
    """
    by_source = {
        prediction.source: prediction.probabilities
        for prediction in predict_sources(model, table.sources, read, engine=engine)
    }
    return np.stack([by_source[source] for source in table.sources])  # type: ignore[misc]
