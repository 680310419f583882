"""DATA -> Splits: lists the images and divides them into train and test.

Images stay encoded. A `Splits` contains three tables of names and labels, and a reader
that yields the encoded bytes of any image. TensorFlow is imported only for `digits`
(which are encoded as PNG) and `tfds:` data.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from keras_transfer.config import SplitsConfig
from keras_transfer.data.listing import Listing, list_data
from keras_transfer.data.reading import Reader
from keras_transfer.data.splitting import (
    assign_splits,
    keep_old_splits,
    settle_validation,
)
from keras_transfer.data.tables import LABEL_SEPARATOR, SPLIT_NAMES, Splits, Table
from keras_transfer.errors import KerasTransferError


def load(
    data: str,
    config: SplitsConfig | None = None,
    seed: int = 0,
    data_dir: Path | None = None,
) -> Splits:
    """Lists the images of DATA and divides them into train and test.

    A test split that the data define is kept. A validation split is trained on too if
    there is a test split, and is the test split otherwise. If the data define neither,
    images are divided per class in the proportion of `config`, without dividing groups.

    Args:
        data: A folder of class folders, a folder of train/ val/ [test/] folders of
            class folders, a CSV/TSV file, `tfds:NAME[:VERSION]` or `digits`.
        config: Fraction of the test split, and a splits.csv whose assignments are kept;
            None for the defaults.
        seed: Seed of the assignment of images to splits.
        data_dir: Directory where tensorflow-datasets keeps prepared data sets.

    Raises:
        UsageError: If DATA does not exist or is not in a supported form.
        KerasTransferError: If there are no images, fewer than two classes or no
            training images, or if a layout, a class name or a line is not valid.
    """
    config = config or SplitsConfig()
    listing = list_data(data, data_dir)
    if not listing.sources:
        raise KerasTransferError(
            f"There are no images. Received: {data}. Expected class folders that hold "
            "JPEG, PNG, GIF, BMP or WebP files."
        )
    class_names = listing.class_names or sorted(
        {name for labels in listing.labels for name in labels}
    )
    _check_class_names(class_names, listing)
    if len(class_names) < 2:
        raise KerasTransferError(
            f"A classifier needs at least two classes. Received: {data} with "
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
    data: str,
    class_names: Sequence[str],
    multi_label: bool,
    data_dir: Path | None = None,
) -> tuple[Table, Reader]:
    """Lists all images of DATA in one table, ignoring splits.

    Args:
        data: As in `load`.
        class_names: The model's classes, which targets refer to.
        multi_label: Whether the model is multi-label.
        data_dir: As in `load`.

    Returns:
        (table, reader of its images).

    Raises:
        UsageError: If DATA does not exist or is not in a supported form.
        KerasTransferError: If there are no images, a label is not one of the classes,
            or an image does not have exactly one label and the model is single-label.
    """
    listing = list_data(data, data_dir, multi_label)
    if not listing.sources:
        raise KerasTransferError(f"There are no images. Received: {data}.")
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
    targets = _targets(listing.labels, class_names, multi_label)
    table = Table(tuple(listing.sources), targets, tuple(listing.groups))
    return table, listing.read


def _check_class_names(class_names: Sequence[str], listing: Listing) -> None:
    for name in class_names:
        categories = {unicodedata.category(character) for character in name}
        if LABEL_SEPARATOR in name or categories & {"Cc", "Cs", "Zl", "Zp"}:
            raise KerasTransferError(
                f"A class name is UTF-8 without {LABEL_SEPARATOR!r}, control "
                f"characters and line separators. Received: {name!r}. Rename the class."
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
    ]


def _to_splits(listing: Listing, class_names: tuple[str, ...]) -> Splits:
    targets = _targets(listing.labels, class_names, listing.multi_label)
    tables = {}
    for split in SPLIT_NAMES:
        rows = [i for i, name in enumerate(listing.splits) if name == split]
        tables[split] = Table(
            tuple(listing.sources[i] for i in rows),
            targets[rows],
            tuple(listing.groups[i] for i in rows),
        )
    if not len(tables["train"]):
        raise KerasTransferError(
            "No image is in the train split: nothing to learn from."
        )
    return Splits(
        train=tables["train"],
        val=tables["val"],
        test=tables["test"],
        class_names=class_names,
        multi_label=listing.multi_label,
        read=listing.read,
        warnings=tuple(listing.warnings),
        root=listing.root,
    )


def _targets(
    labels: Sequence[tuple[str, ...]], class_names: Sequence[str], multi_label: bool
) -> np.ndarray:
    index = {name: i for i, name in enumerate(class_names)}
    if not multi_label:
        return np.array([index[names[0]] for names in labels], np.int64)
    targets = np.zeros((len(labels), len(class_names)), np.uint8)
    for row, names in enumerate(labels):
        targets[row, [index[name] for name in names]] = 1
    return targets
