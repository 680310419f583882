"""A run's model on images: predictions as a stream, and evaluation."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_transfer import data
from keras_transfer.decode import make_decoder
from keras_transfer.errors import DecodeError, KerasTransferError
from keras_transfer.evaluation import Evaluation, evaluate
from keras_transfer.run import Phase, Run, open_run, read_together

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


def load_model(run: Run, phase: Phase | None = None) -> keras.Model:
    """Loads a model from [0, 255] RGB pixels to probabilities.

    Args:
        run: The run.
        phase: `fit` or `finetune`; None for the run's model, `model.keras`.

    Raises:
        UsageError: If the run has no such phase.
        KerasTransferError: If the file is missing or damaged.
    """
    path = run.phase_model_path(phase) if phase else run.model_path
    try:
        model = keras.saving.load_model(path, compile=False)
    except Exception as error:  # zip, HDF5 and JSON each raise their own types
        cause = str(error).strip().splitlines()
        raise KerasTransferError(
            f"{path} cannot be loaded ({cause[0] if cause else error!r}). "
            "Train the run again."
        ) from None
    outputs, names = model.output_shape[-1], len(run.class_names)
    if outputs != names:
        raise KerasTransferError(
            f"{run.run_dir} names {names} classes in labels.txt, but its model has "
            f"{outputs} outputs. Train the run again."
        )
    return model


def predict(
    run: str | Path | Run,
    paths: str | Path | Iterable[str | Path],
    recursive: bool = False,
) -> Iterator[data.Prediction]:
    """Predicts images as they are read, in order, with bounded memory.

    Args:
        run: A run or its directory.
        paths: Image files, and folders of them; or one.
        recursive: Whether folders inside folders are searched too.

    Yields:
        A prediction an image; of an unusable one it holds the reason.

    Raises:
        UsageError: If there is no such run or path.
    """
    _, predictions = predict_run(run, paths, recursive)
    yield from predictions


def predict_run(
    run: str | Path | Run,
    paths: str | Path | Iterable[str | Path],
    recursive: bool = False,
) -> tuple[list[str], Iterator[data.Prediction]]:
    """Predicts images; see `predict`.

    Returns:
        (class names in the order of the probabilities, a prediction an image).
    """
    run = open_run(run)
    sources = list(data.image_files(paths, recursive))
    model, class_names = read_together(run, lambda: (load_model(run), run.class_names))
    return class_names, predict_sources(
        model, sources, lambda names: data.read_files(names, Path())
    )


def predict_sources(
    model: keras.Model, sources: Sequence[str], read: data.Reader
) -> Iterator[data.Prediction]:
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

    def flush() -> Iterator[data.Prediction]:
        usable = [pixels for _, pixels, _ in batch if pixels is not None]
        rows = iter(predictor(usable)) if usable else iter(())
        for source, pixels, error in batch:
            yield data.Prediction(source, None if pixels is None else next(rows), error)

    batch: list[tuple[str, np.ndarray | None, str]] = []
    for item in data.map_ahead(decoded, read(sources), threads=2):
        batch.append(item)
        if len(batch) == _BATCH:
            yield from flush()
            batch = []
    yield from flush()


def evaluate_run(
    run: str | Path | Run,
    source: str | Path | None = None,
    data_dir: Path | None = None,
    on_image: Callable[[], object] = lambda: None,
    phase: Phase | None = None,
) -> tuple[Evaluation, str, dict[str, str]]:
    """Evaluates a run's model on its test split, or on other labelled images.

    Args:
        run: A run or its directory.
        source: Labelled images as for `fit`, all of them used; None for the run's
            test split (validation split, if it has no test split).
        data_dir: Where tensorflow-datasets keeps prepared data.
        on_image: Called once an image, as work goes on.
        phase: `fit` or `finetune`; None for the run's model.

    Returns:
        (figures, what they are of, reason of each image left out).

    Raises:
        UsageError: If there is no such run, phase or data, or a label is none of the
            run's.
    """
    run = open_run(run)
    model, class_names, (name, table, read) = read_together(
        run,
        lambda: (
            load_model(run, phase),
            run.class_names,
            _labelled_images(run, source, data_dir),
        ),
    )
    by_source = {}
    skipped = {}
    for prediction in predict_sources(model, table.sources, read):
        on_image()
        if prediction.probabilities is None:
            skipped[prediction.source] = prediction.error
        else:
            by_source[prediction.source] = prediction.probabilities
    if not by_source:
        raise KerasTransferError(f"None of the {len(table)} images can be read.")
    table = table.keep(by_source)
    probabilities = np.stack([by_source[source] for source in table.sources])
    return evaluate(table.targets, probabilities, class_names), name, skipped


def _labelled_images(
    run: Run, source: str | Path | None, data_dir: Path | None
) -> tuple[str, data.Table, data.Reader]:
    """The images that `evaluate_run` is asked for: (what they are, table, reader)."""
    if source is None:
        return held_out_images(run)
    name, multi_label = str(source), run.manifest.multi_label
    return name, *data.load_all(name, run.class_names, multi_label, data_dir)


def held_out_images(run: Run) -> tuple[str, data.Table, data.Reader]:
    """The images a run was not trained on: (split name, table, reader).

    Raises:
        KerasTransferError: If the data are gone, or the run held no image back.
    """
    splits = run_splits(run)
    for name in ("test", "val"):
        table = getattr(splits, name)
        if len(table):
            return name, table, splits.read
    raise KerasTransferError(
        f"The run has no held-out images. Received: {run.run_dir}. Name labelled "
        "images: kt evaluate RUN DATA."
    )


def run_splits(run: Run) -> data.Splits:
    """The images of a run, in the splits they were in, as far as they still exist.

    Raises:
        KerasTransferError: If the data are gone, or an image has a new class.
    """
    config, class_names = run.config, run.class_names
    splits = data.load(
        config.data,
        config.splits.model_copy(update={"file": run.splits_path}),
        config.seed,
        config.data_dir,
    )
    used = {row["path"] for _, row in data.read_table(run.splits_path)}
    return splits.keep(used).relabel(class_names)


def sample_images(
    splits: data.Splits, image_size: int, count: int
) -> list[tuple[str, bytes, np.ndarray]]:
    """(source, bytes, pixels) of some training images, decoded anew.

    They are spread evenly; unusable ones are left out. What is decided on them (a
    precision, whether two models agree) must not be decided on images that figures
    are of.
    """
    table = splits.train
    picks = np.linspace(0, len(table) - 1, min(count, len(table))).astype(int)
    decode = make_decoder(image_size)
    sample = []
    for source, encoded in splits.read([table.sources[i] for i in picks]):
        if isinstance(encoded, bytes):
            with contextlib.suppress(DecodeError):
                sample.append((source, encoded, decode(encoded)))
    return sample


PARITY_IMAGES = 64
PARITY_AGREEMENT = 0.99
PARITY_TOLERANCE = {"f32": 1e-3, "bf16": 0.05}
"""How far a model may be from what cached features say, in probability, by the
arithmetic of the features."""


def parity(
    expected: np.ndarray, actual: np.ndarray, tolerance: float
) -> dict[str, float]:
    """How far two `[N, num_classes]` probabilities of the same images are apart.

    Returns:
        `images`, `top1_agreement` (0 to 1), `max_probability_difference`, `tolerance`;
        of no images, full agreement. Classes agree if they are the same, or as likely
        as each other but for the tolerance: which of these comes first is chance, and
        several classes of multi-label data may be certain.
    """
    images = len(expected)
    if not images:
        expected = actual = np.zeros((1, 1), np.float32)
    said = np.take_along_axis(expected, actual.argmax(1)[:, None], axis=1)[:, 0]
    return {
        "images": images,
        "top1_agreement": float((expected.max(1) - said <= tolerance).mean()),
        "max_probability_difference": float(np.abs(expected - actual).max()),
        "tolerance": tolerance,
    }


def is_close(parity: dict[str, float]) -> bool:
    """Whether a parity is good enough."""
    return (
        parity["top1_agreement"] >= PARITY_AGREEMENT
        and parity["max_probability_difference"] <= parity["tolerance"]
    )
