"""Loads a run's model, its splits and its held-out images."""

from dataclasses import replace
from pathlib import Path

import keras

from keras_transfer.data.listing import read_table
from keras_transfer.data.loading import load, load_all
from keras_transfer.data.reading import Reader
from keras_transfer.data.tables import Splits, Table
from keras_transfer.errors import KerasTransferError
from keras_transfer.evaluation.out_of_distribution import OutOfDistribution
from keras_transfer.runs.manifest import Phase
from keras_transfer.runs.run import METRICS, Run


def load_model(run: Run, phase: Phase | None = None) -> keras.Model:
    """Loads a run's Keras model, from [0, 255] RGB pixels to probabilities.

    Args:
        run: The run.
        phase: `fit` or `finetune`; None for the run's current model, `model.keras`.

    Raises:
        UsageError: If the run was not fine-tuned and `phase` is `finetune`.
        KerasTransferError: If the file is missing or damaged, or its number of outputs
            is not the number of classes.
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


def load_detector(run: Run) -> OutOfDistribution | None:
    """Loads what tells images that are far from a run's training images.

    Returns:
        The detector for the run's current model; None for a run of an earlier version,
        which has none.

    Raises:
        KerasTransferError: If the file is damaged.
    """
    try:
        return OutOfDistribution.load(run.far_path)
    except FileNotFoundError:
        return None


def labelled_images(
    run: Run, source: str | Path | None, data_dir: Path | None
) -> tuple[str, Table, Reader]:
    """Lists labeled images to evaluate a run's model on.

    Args:
        run: The run.
        source: DATA, as for `loading.load`; None for the run's test images.
        data_dir: Directory where tensorflow-datasets keeps prepared data sets.

    Returns:
        (name of the split or of DATA, table, reader of its images).
    """
    if source is None:
        return held_out_images(run)
    name, multi_label = str(source), run.manifest.multi_label
    return name, *load_all(name, run.class_names, multi_label, data_dir)


def held_out_images(run: Run) -> tuple[str, Table, Reader]:
    """Lists a run's test images.

    Of runs of version 0.1.0 without test images, these are the validation images.

    Returns:
        (name of the split, table, reader of its images).

    Raises:
        KerasTransferError: If the data no longer exist, or the run has no such images.
    """
    splits = run_splits(run)
    for name in ("test", "val"):
        table = getattr(splits, name)
        if len(table):
            return name, table, splits.read
    raise KerasTransferError(
        f"The run has no test images. Received: {run.run_dir}. Name labeled images: kt "
        "evaluate RUN DATA. Figures of the training images, out of fold, are in "
        f"{METRICS}; kt fit shows them too."
    )


def run_splits(run: Run) -> Splits:
    """Lists the images of a run that still exist, in their original splits.

    Raises:
        KerasTransferError: If the data no longer exist, or an image has a new class.
    """
    config, class_names = run.config, run.class_names
    splits = load(
        config.data,
        config.splits.model_copy(update={"file": run.splits_path}),
        config.seed,
        config.data_dir,
    )
    split_of = {row["path"]: row["split"] for _, row in read_table(run.splits_path)}
    splits = splits.keep(split_of).relabel(class_names)
    # Version 0.1.0 chose models by validation images, which `load` gives another split.
    val = {source for source, name in split_of.items() if name == "val"}
    if not val:
        return splits
    found = splits.train if val & {*splits.train.sources} else splits.test
    return replace(splits.keep({*split_of} - val), val=found.keep(val))
