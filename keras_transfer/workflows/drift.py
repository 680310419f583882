"""The workflow of `kt evaluate --drift`: how new images differ from a run's own."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from keras_transfer.data.folders import image_files
from keras_transfer.data.reading import read_files
from keras_transfer.errors import KerasTransferError
from keras_transfer.evaluation.decisions import DecisionRule
from keras_transfer.evaluation.drift import Drift, Judged, compare_sets
from keras_transfer.evaluation.of_run import load_detector, load_model
from keras_transfer.evaluation.out_of_distribution import OutOfDistribution
from keras_transfer.evaluation.prediction import predict_sources
from keras_transfer.events import SILENT, Listener
from keras_transfer.reporting.predictions import read_predictions
from keras_transfer.runs.run import Run, read_together

_HOW = ("test", "out of fold")  # predictions that were not trained on the image


@dataclass(frozen=True, repr=False)
class RunDrift(Drift):
    """How new images differ from a run's held-out images; see `Drift`.

    Attributes:
        data: The new images as they were named.
        reference: Which of the run's predictions they are compared with: `test`, or
            `out of fold` for a run without test images.
        skipped: Reason why a new image was left out, by source.
    """

    data: str
    reference: str
    skipped: dict[str, str]


def measure_drift(
    run: Run, paths: str | Path | Iterable[str | Path], listener: Listener = SILENT
) -> RunDrift:
    """Implements `api.drift`.

    Args:
        run: The run.
        paths: An image file or a folder of images, searched recursively, or several of
            them. No labels are needed.
        listener: Receives progress after each image.

    Raises:
        UsageError: If a folder contains no images.
        KerasTransferError: If the run has nothing to compare with, or no image can be
            read.
    """
    sources = list(image_files(paths, recursive=True))
    (detector, how, judged), model, names, manifest = read_together(
        run,
        lambda: (
            _kept(run),
            load_model(run),
            run.class_names,
            run.manifest,
        ),
    )
    probabilities, far, skipped = [], [], {}
    found = predict_sources(
        model, sources, lambda names: read_files(names, Path()), detector
    )
    for done, prediction in enumerate(found, start=1):
        listener.progress("drift", done, len(sources))
        if prediction.probabilities is None:
            skipped[prediction.source] = prediction.error
        else:
            probabilities.append(prediction.probabilities)
            far.append(prediction.far)
    if not far:
        raise KerasTransferError(f"None of the {len(sources)} images can be read.")
    rule = DecisionRule.of(manifest, names)
    new = Judged(rule.predicted(np.stack(probabilities)), np.array(far, bool))
    drift = compare_sets(judged, new, names)
    name = str(paths) if isinstance(paths, (str, Path)) else f"{len(sources)} images"
    return RunDrift(**vars(drift), data=name, reference=how, skipped=skipped)


def _kept(run: Run) -> tuple[OutOfDistribution, str, Judged]:
    """Reads a run's predictions of images that the model was not trained on.

    Returns:
        (what tells far images, how the predictions were made, the predictions).

    Raises:
        KerasTransferError: If the run keeps none.
    """
    detector = load_detector(run)
    if detector and run.predictions_path.exists():
        kept = read_predictions(
            run.predictions_path, run.class_names, run.manifest.multi_label
        )
        for how in _HOW:
            found = kept.select((kept.how == how) & (kept.far >= 0))
            if len(found):
                return detector, how, Judged(found.is_predicted, found.far > 0)
    raise KerasTransferError(
        "Drift is measured against predictions that a run keeps. Received: "
        f"{run.run_dir}, which has none. Train it again with kt fit."
    )
