"""The workflow of `kt predict`: classifies images with a run's model."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from keras_transfer.data.folders import image_files
from keras_transfer.data.reading import read_files
from keras_transfer.data.tables import Prediction
from keras_transfer.evaluation.of_run import load_model
from keras_transfer.evaluation.prediction import predict_sources
from keras_transfer.runs.run import Run, read_together


def predict_run(
    run: Run, paths: str | Path | Iterable[str | Path], recursive: bool = False
) -> tuple[list[str], Iterator[Prediction]]:
    """Implements `api.predict`.

    Args:
        run: The run.
        paths: An image file or a folder of images, or several of them.
        recursive: Whether to search subfolders too.

    Returns:
        (class names in the order of the probabilities, one prediction per image).

    Raises:
        UsageError: If a folder contains no images.
    """
    sources = list(image_files(paths, recursive))
    model, class_names = read_together(run, lambda: (load_model(run), run.class_names))
    return class_names, predict_sources(
        model, sources, lambda names: read_files(names, Path())
    )
