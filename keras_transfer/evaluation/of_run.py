"""A run -> its model, its splits, its held-out images."""

from pathlib import Path

import keras

from keras_transfer.data.listing import read_table
from keras_transfer.data.loading import load, load_all
from keras_transfer.data.reading import Reader
from keras_transfer.data.tables import Splits, Table
from keras_transfer.errors import KerasTransferError
from keras_transfer.runs.manifest import Phase
from keras_transfer.runs.run import Run


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


def labelled_images(
    run: Run, source: str | Path | None, data_dir: Path | None
) -> tuple[str, Table, Reader]:
    """The images that `evaluate_run` is asked for: (what they are, table, reader)."""
    if source is None:
        return held_out_images(run)
    name, multi_label = str(source), run.manifest.multi_label
    return name, *load_all(name, run.class_names, multi_label, data_dir)


def held_out_images(run: Run) -> tuple[str, Table, Reader]:
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


def run_splits(run: Run) -> Splits:
    """The images of a run, in the splits they were in, as far as they still exist.

    Raises:
        KerasTransferError: If the data are gone, or an image has a new class.
    """
    config, class_names = run.config, run.class_names
    splits = load(
        config.data,
        config.splits.model_copy(update={"file": run.splits_path}),
        config.seed,
        config.data_dir,
    )
    used = {row["path"] for _, row in read_table(run.splits_path)}
    return splits.keep(used).relabel(class_names)
