"""Compares images that are given in Python again with those that a run was made from.

Arrays and data sets are not kept. What is kept of each image is its name, its label,
its split and a digest of its pixels.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, NoReturn

from keras_transfer.data.in_memory.forms import DATASET
from keras_transfer.data.reading import Reader, hashing
from keras_transfer.data.tables import Splits, Table, label_text
from keras_transfer.data.text_cells import read_table
from keras_transfer.errors import KerasTransferError
from keras_transfer.events import SILENT
from keras_transfer.features.image_table import known_images
from keras_transfer.runs.run import Run


class GivenAgain(NamedTuple):
    """What images turn out to be beside those of a run.

    Attributes:
        test: The run's test images; None if these are other images.
        warnings: What the user should know, a line each.
    """

    test: Table | None
    warnings: Sequence[str] = ()


def find_test_images(
    run: Run, table: Table, read: Reader, class_names: Sequence[str]
) -> GivenAgain:
    """Finds a run's test images if a table has exactly the images of the run.

    These have the same names, and the test images the same pixels.

    Args:
        run: The run.
        table: The images that were given.
        read: Reads them.
        class_names: The classes that the table's targets refer to.
    """
    known = known_images(run.images_path, SILENT)
    is_complete = len(table) == len(known) + run.manifest.skipped
    test = {name: digest for name, (split, digest) in known.items() if split == "test"}
    digests: dict[str, bytes] = {}
    if is_complete and test and known.keys() <= {*table.sources}:
        for _ in hashing(read, digests)(list(test)):
            pass
    if not digests or digests != test:
        is_other = is_complete and run.config.data == DATASET
        return GivenAgain(None, [_DIFFERS] if is_other else [])
    found = table.keep(test)
    label_of = {row["path"]: row["label"] for _, row in read_table(run.splits_path)}
    differs = _relabelled(label_of, [found], class_names)
    return GivenAgain(found, [f"Labels of the run differ: {differs}."] * bool(differs))


_DIFFERS = (
    "If this is the data set that the run was made from, its images are others in each "
    "pass, as augmented ones are: the figures are also of images that were trained on."
)


def check_names(names: Collection[str], sources: Collection[str], data: str) -> None:
    """Checks that no image of a run is missing among images that are given again.

    Args:
        names: Names of the run's images.
        sources: Names of the images that were given.
        data: Name of the data, for the message.

    Raises:
        KerasTransferError: If one is missing.
    """
    if missing := {*names} - {*sources}:
        _refuse(
            data,
            f"{len(missing):,} of {len(names):,} are missing, such as {min(missing)}",
        )


def check_labels(label_of: Mapping[str, str], splits: Splits, data: str) -> None:
    """Checks that images that are given again have the labels of the run.

    Args:
        label_of: Label of each of the run's images.
        splits: The images.
        data: Name of the data, for the message.

    Raises:
        KerasTransferError: If one has another label.
    """
    tables = [table for _, table in splits.items()]
    if differs := _relabelled(label_of, tables, splits.class_names):
        _refuse(data, differs)


def _refuse(data: str, differs: str) -> NoReturn:
    raise KerasTransferError(
        f"These are not the images that the run was made from. Received: {data}, in "
        f"which {differs}. Give the same images and labels again; a data set has to "
        "give the same images in each pass."
    )


def _relabelled(
    label_of: Mapping[str, str], tables: Iterable[Table], class_names: Sequence[str]
) -> str:
    """Says how many images have other labels than in a run; "" if none has."""
    found = [
        (source, label_text(target, class_names))
        for table in tables
        for source, target in zip(table.sources, table.targets, strict=True)
    ]
    others = [(source, label) for source, label in found if label != label_of[source]]
    if not others:
        return ""
    source, label = others[0]
    return (
        f"{len(others):,} of {len(found):,} labels are others, such as {label!r} "
        f"instead of {label_of[source]!r} for {source}"
    )
