"""The workflow of `kt evaluate`: a run's model on labelled images."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from keras_transfer.errors import KerasTransferError
from keras_transfer.evaluation.metrics import Evaluation, evaluate
from keras_transfer.evaluation.of_run import labelled_images, load_model
from keras_transfer.evaluation.prediction import predict_sources
from keras_transfer.runs.manifest import Phase
from keras_transfer.runs.run import Run, open_run, read_together


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
            labelled_images(run, source, data_dir),
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
