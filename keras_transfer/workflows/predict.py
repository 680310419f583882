"""The workflow of `kt predict`: a run's model on images."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from keras_transfer.data.folders import image_files
from keras_transfer.data.reading import read_files
from keras_transfer.data.tables import Prediction
from keras_transfer.evaluation.of_run import load_model
from keras_transfer.evaluation.prediction import predict_sources
from keras_transfer.runs.run import Run, open_run, read_together


def predict(
    run: str | Path | Run,
    paths: str | Path | Iterable[str | Path],
    recursive: bool = False,
) -> Iterator[Prediction]:
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
) -> tuple[list[str], Iterator[Prediction]]:
    """Predicts images; see `predict`.

    Returns:
        (class names in the order of the probabilities, a prediction an image).
    """
    run = open_run(run)
    sources = list(image_files(paths, recursive))
    model, class_names = read_together(run, lambda: (load_model(run), run.class_names))
    return class_names, predict_sources(
        model, sources, lambda names: read_files(names, Path())
    )
