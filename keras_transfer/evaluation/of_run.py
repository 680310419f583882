"""Loads a run's model, its splits and its held-out images."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import keras

from keras_transfer.config import ListingConfig
from keras_transfer.data.in_memory.forms import NOT_KEPT, PATHS, name_of
from keras_transfer.data.listing import list_data
from keras_transfer.data.loading import load, load_all
from keras_transfer.data.reading import Reader
from keras_transfer.data.tables import Splits, Table
from keras_transfer.data.text_cells import read_table
from keras_transfer.errors import KerasTransferError, UsageError, first_line
from keras_transfer.evaluation.given_again import (
    check_labels,
    check_names,
    find_test_images,
)
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
        raise KerasTransferError(
            f"{path} cannot be loaded ({first_line(error)}). Train the run again."
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


class LabelledImages(NamedTuple):
    """Images that a run's model is evaluated on.

    Attributes:
        name: Name of the run's split, or of DATA.
        table: The images.
        read: Reads their encoded bytes.
        warnings: What the user should know about DATA, a line each.
    """

    name: str
    table: Table
    read: Reader
    warnings: Sequence[str] = ()


def labelled_images(
    run: Run, source: object | None, options: ListingConfig
) -> LabelledImages:
    """Lists labeled images to evaluate a run's model on.

    Args:
        run: The run.
        source: DATA, as for `loading.load`; None for the run's test images. If they
            are the images in memory that the run was made from, these are its test
            images too.
        options: How DATA are listed.
    """
    if source is None:
        return held_out_images(run)
    multi_label = run.manifest.multi_label
    table, listing = load_all(source, run.class_names, multi_label, options, run.config)
    name, warnings = name_of(source), listing.warnings
    if name in NOT_KEPT and name == run.config.data:
        again = find_test_images(run, table, listing.read, run.class_names)
        warnings = [*warnings, *again.warnings]
        if again.test is not None:
            name, table = "test", again.test
    return LabelledImages(name, table, listing.read, warnings)


def held_out_images(run: Run) -> LabelledImages:
    """Lists a run's test images.

    Of runs of version 0.1.0 without test images, these are the validation images.

    Raises:
        KerasTransferError: If the data no longer exist, or the run has no such images.
    """
    splits = run_splits(run)
    for name in ("test", "val"):
        table = getattr(splits, name)
        if len(table):
            return LabelledImages(name, table, splits.read)
    raise KerasTransferError(
        f"The run has no test images. Received: {run.run_dir}. Name labeled images: kt "
        "evaluate RUN DATA. Figures of the training images, out of fold, are in "
        f"{METRICS}; kt fit shows them too."
    )


def run_splits(run: Run, in_memory: object | None = None) -> Splits:
    """Lists the images of a run that still exist, in their original splits.

    Args:
        run: The run.
        in_memory: The images that the run was made from, if they were given in Python
            and are not files.

    Raises:
        UsageError: If they were given in Python, and are not given again.
        KerasTransferError: If the data no longer exist, or an image has a new class.
    """
    config, class_names = run.config, run.class_names
    if config.data in NOT_KEPT and in_memory is None:
        raise UsageError(
            "The run's images were given in Python and are not kept. Received: "
            f"{run.run_dir}. Give them again, to evaluate(run, data) or "
            "unfreeze_and_finetune(run, data=data); nothing else can have them."
        )
    rows = [row for _, row in read_table(run.splits_path)]
    split_of = {row["path"]: row["split"] for row in rows}
    options: ListingConfig = config
    data: object = config.data
    if in_memory is not None:
        data = in_memory
        check_names(split_of, list_data(data, options).sources, name_of(data))
    multi_label = False
    if config.data == PATHS:  # splits.csv names the files, in columns of its own
        data, options = run.splits_path, ListingConfig()
        multi_label = run.manifest.multi_label
    splits = load(
        data,
        config.splits.model_copy(update={"file": run.splits_path}),
        config.seed,
        options,
        multi_label,
    )
    splits = splits.keep(split_of).relabel(class_names)
    if in_memory is not None:
        label_of = {row["path"]: row["label"] for row in rows}
        check_labels(label_of, splits, name_of(in_memory))
    # Version 0.1.0 chose models by validation images, which `load` gives another split.
    val = {source for source, name in split_of.items() if name == "val"}
    if not val:
        return splits
    found = splits.train if val & {*splits.train.sources} else splits.test
    return replace(splits.keep({*split_of} - val), val=found.keep(val))
