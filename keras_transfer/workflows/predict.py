"""The workflow of `kt predict`: classifies images with a run's model."""

from collections.abc import Iterable
from pathlib import Path

from keras_transfer.data.folders import image_files
from keras_transfer.data.reading import read_files
from keras_transfer.data.tables import Predictions
from keras_transfer.evaluation.decisions import DecisionRule
from keras_transfer.evaluation.of_run import load_detector, load_model
from keras_transfer.evaluation.prediction import note_flip_tta, predict_sources
from keras_transfer.events import SILENT, Listener
from keras_transfer.runs.run import Run, read_together


def predict_run(
    run: Run,
    paths: str | Path | Iterable[str | Path],
    recursive: bool = False,
    flip_tta: bool = False,
    listener: Listener = SILENT,
) -> Predictions:
    """Implements `api.predict`.

    Args:
        run: The run.
        paths: An image file or a folder of images, or several of them.
        recursive: Whether to search subfolders too.
        flip_tta: Whether to average probabilities over each image and its mirror image,
            at twice the cost.
        listener: Receives a note if the run's thresholds were chosen without.

    Returns:
        One prediction per image.

    Raises:
        UsageError: If a folder contains no images.
    """
    sources = list(image_files(paths, recursive))
    model, names, manifest, detector = read_together(
        run,
        lambda: (
            load_model(run),
            run.class_names,
            run.manifest,
            load_detector(run),
        ),
    )
    rule = DecisionRule.of(manifest, names)
    if flip_tta:
        note_flip_tta(rule, listener)
    rows = predict_sources(
        model,
        sources,
        lambda paths: read_files(paths, Path()),
        detector,
        flip_tta=flip_tta,
    )
    columns = (*rule.columns, "far") if detector else rule.columns
    return Predictions(names, columns, len(sources), rule.decide(rows, names))
