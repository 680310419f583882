"""DATA -> Splits: lists the images and divides them into train and test.

Images stay encoded. A `Splits` contains three tables of names and labels, and a reader
that yields the encoded bytes of any image. TensorFlow is imported only for `digits`
(which are encoded as PNG) and `tfds:` data.
"""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from keras_transfer.config import ListingConfig, SplitsConfig
from keras_transfer.data.grouping import hint_at_groups
from keras_transfer.data.in_memory.forms import name_of
from keras_transfer.data.listing import list_data
from keras_transfer.data.splitting import (
    assign_splits,
    keep_old_splits,
    settle_validation,
)
from keras_transfer.data.tables import (
    LABEL_SEPARATOR,
    SPLIT_NAMES,
    Extra,
    Listing,
    Splits,
    Table,
)
from keras_transfer.errors import KerasTransferError


def load(
    data: object,
    config: SplitsConfig | None = None,
    seed: int = 0,
    options: ListingConfig | None = None,
    multi_label: bool = False,
    fewest_classes: int = 2,
) -> Splits:
    """Lists the images of DATA and divides them into train and test.

    A test split that the data define is kept. A validation split is trained on too if
    there is a test split, and is the test split otherwise. If the data define neither,
    images are divided per class in the proportion of `config`, without dividing groups.

    Args:
        data: A folder of class folders, a folder of train/ val/ [test/] folders of
            class folders, a CSV, TSV or Parquet file, `tfds:NAME[:VERSION]` or
            `digits`; or images in Python, see `forms.list_memory`.
        config: Fraction of the test split, and a splits.csv whose assignments are kept;
            None for the defaults.
        seed: Seed of the assignment of images to splits.
        options: How the images are listed; None for the defaults.
        multi_label: Whether to treat a table as multi-label even if no row has several
            labels.
        fewest_classes: Number of classes that there must be: 2, or 1 if nothing is
            trained.

    Raises:
        UsageError: If DATA does not exist or is not in a supported form.
        KerasTransferError: If there are no images, too few classes or no
            training images, or if a layout, a class name or a line is not valid.
    """
    config = config or SplitsConfig()
    listing = list_data(data, options or ListingConfig(), multi_label)
    if listing.mistake:
        raise listing.mistake
    if not listing.sources:
        raise no_images(data)
    class_names = listing.classes()
    _check_class_names(class_names, listing)
    if len(class_names) < fewest_classes:
        raise KerasTransferError(
            f"A classifier needs at least two classes. Received: {name_of(data)} with "
            f"{repr(class_names[0]) + ' only' if class_names else 'none'}."
        )
    if said := settle_validation(listing.splits):
        listing.warnings.append(said)
    has_test = "test" in listing.splits
    if not has_test:
        listing.splits = [""] * len(listing.splits)
    if config.file is not None:
        keep_old_splits(listing, config.file)
    assign_splits(listing, config, seed, has_test)
    splits = _to_splits(listing, tuple(class_names))
    return replace(splits, warnings=(*splits.warnings, *_split_warnings(splits)))


def load_all(
    data: object,
    class_names: Sequence[str],
    multi_label: bool,
    options: ListingConfig | None = None,
    usual: ListingConfig | None = None,
) -> tuple[Table, Listing]:
    """Lists all images of DATA in one table, ignoring splits.

    Args:
        data: As in `load`.
        class_names: The model's classes, which targets refer to.
        multi_label: Whether the model is multi-label.
        options: As in `load`.
        usual: As in `list_data`.

    Returns:
        (table, the listing with the reader of its images and warnings).

    Raises:
        UsageError: If DATA does not exist or is not in a supported form.
        KerasTransferError: If there are no images, a label is not one of the classes,
            or an image does not have exactly one label and the model is single-label.
    """
    listing = list_data(data, options or ListingConfig(), multi_label, usual)
    if not listing.sources:
        raise no_images(data)
    unknown = {name for labels in listing.labels for name in labels} - {*class_names}
    if unknown:
        raise KerasTransferError(
            f"The model has no class {sorted(unknown)[0]!r}. Its classes are "
            f"{', '.join(class_names)}."
        )
    for source, names in zip(listing.sources, listing.labels, strict=True):
        if len(names) != 1 and not multi_label:
            raise KerasTransferError(
                f"The model gives each image one class. Received: {source} with "
                f"{len(names)} labels."
            )
    targets = targets_of(listing.labels, class_names, multi_label)
    return to_table(listing, targets, range(len(targets))), listing


def no_images(data: object) -> KerasTransferError:
    """Returns the error of DATA without images."""
    name = name_of(data)
    expected = "a row or a pair for each image"
    if isinstance(data, (str, os.PathLike)):
        expected = "a row for each image"
        if Path(name).expanduser().is_dir():
            expected = (
                "class folders that hold JPEG, PNG, GIF, BMP, WebP, TIFF, HEIC, AVIF "
                "or DICOM files"
            )
    return KerasTransferError(
        f"There are no images. Received: {name}. Expected {expected}."
    )


def _check_class_names(class_names: Sequence[str], listing: Listing) -> None:
    for name in class_names:
        categories = {unicodedata.category(character) for character in name}
        if LABEL_SEPARATOR in name or categories & {"Cc", "Cs", "Zl", "Zp"}:
            raise KerasTransferError(
                f"A class name is UTF-8 without {LABEL_SEPARATOR!r}, control "
                f"characters and line separators. Received: {name!r}. Rename the "
                "class, or save a table that names it as UTF-8."
            )
    alike = defaultdict(list)
    for name in class_names:
        alike[unicodedata.normalize("NFC", name).casefold()].append(name)
    for names in alike.values():
        if len(names) > 1:
            listing.warnings.append(
                f"Classes {' and '.join(map(repr, names))} differ only in case or in "
                "how their letters are encoded; they are kept apart."
            )


def _split_warnings(splits: Splits) -> list[str]:
    """Finds problems that bias metrics, as far as names and labels show them."""
    missing = []
    if not len(splits.test):
        missing.append("There is no test split: figures are of cross-validation.")
    groups = {
        source: group
        for _, table in splits.items()
        for source, group in zip(table.sources, table.groups, strict=True)
        if group
    }
    return [
        *missing,
        *splits.absent_classes(),
        *splits.shared(groups, "are of a group that is in"),
        *hint_at_groups(splits),
    ]


def _to_splits(listing: Listing, class_names: tuple[str, ...]) -> Splits:
    targets = targets_of(listing.labels, class_names, listing.multi_label)
    tables = {}
    for split in SPLIT_NAMES:
        rows = [i for i, name in enumerate(listing.splits) if name == split]
        tables[split] = to_table(listing, targets, rows)
    if not len(tables["train"]):
        raise KerasTransferError(
            "No image is in the train split: nothing to learn from."
        )
    weights = tables["train"].sample_weight
    if weights is not None and not weights.any():
        raise KerasTransferError(
            "Some training image has a sample_weight above 0. Received: "
            f"{len(weights)} training images, all with 0. Nothing would be learned."
        )
    extra = None
    if listing.extra is not None:
        rows_of = {source: row for row, source in enumerate(listing.sources)}
        extra = Extra(rows_of, listing.extra)
    return Splits(
        train=tables["train"],
        val=tables["val"],
        test=tables["test"],
        class_names=class_names,
        multi_label=listing.multi_label,
        read=listing.read,
        warnings=tuple(listing.warnings),
        root=listing.root,
        extra=extra,
    )


def to_table(listing: Listing, targets: np.ndarray, rows: Sequence[int]) -> Table:
    """Returns the images of a listing with the given indices, in order."""
    weights = listing.sample_weight
    return Table(
        tuple(listing.sources[i] for i in rows),
        targets[rows],
        tuple(listing.groups[i] for i in rows),
        None if weights is None else np.asarray(weights, np.float32)[rows],
    )


def targets_of(
    labels: Sequence[tuple[str, ...]], class_names: Sequence[str], multi_label: bool
) -> np.ndarray:
    """Converts names of classes to the targets of a `Table`."""
    index = {name: i for i, name in enumerate(class_names)}
    if not multi_label:
        return np.array([index[names[0]] for names in labels], np.int64)
    targets = np.zeros((len(labels), len(class_names)), np.uint8)
    for row, names in enumerate(labels):
        targets[row, [index[name] for name in names]] = 1
    return targets
