"""Lists the images of DATA, in whatever form they are."""

import os
from pathlib import Path

from keras_transfer.config import USUAL_NAMES, ListingConfig
from keras_transfer.data.class_folders import list_folder
from keras_transfer.data.grouping import group_by_name
from keras_transfer.data.in_memory.forms import NOT_KEPT, list_memory, name_of
from keras_transfer.data.packaged import list_digits, list_tfds
from keras_transfer.data.reading import is_on_disk
from keras_transfer.data.table_files import list_table_file
from keras_transfer.data.tables import Listing
from keras_transfer.errors import UsageError


def list_data(
    data: object,
    options: ListingConfig,
    multi_label: bool = False,
    usual: ListingConfig | None = None,
) -> Listing:
    """Lists the images of DATA.

    Args:
        data: As in `loading.load`.
        options: As in `loading.load`.
        multi_label: Whether to treat a table as multi-label even if no row has several
            labels.
        usual: Options that apply where they fit the data and `options` says nothing
            else.

    Raises:
        UsageError: If DATA does not exist, is not in a supported form, or does not fit
            the options.
        KerasTransferError: If its layout or one of its rows is not valid.
    """
    name = name_of(data)
    if not isinstance(data, (str, os.PathLike)):
        if name in NOT_KEPT:
            _check_no_columns(name, options)
        listing = list_memory(data, options, multi_label, usual)
    elif name.startswith("memory:"):
        raise UsageError(
            "Images that were given in Python cannot be named. Received: "
            f"{name}. Give the images themselves, as fit(data, config=config)."
        )
    elif is_on_disk(name) and (path := Path(name).expanduser()).is_file():
        listing = list_table_file(path, options, multi_label, usual)
    else:
        _check_no_columns(name, options)
        data_dir = options.data_dir or (usual.data_dir if usual else None)
        listing = _list_named(name, data_dir)
    if options.group_regex:
        group_by_name(listing, options.group_regex, options.group_column)
    elif usual and usual.group_regex and not any(listing.groups):
        group_by_name(listing, usual.group_regex, strict=False)
    return listing


def _list_named(name: str, data_dir: Path | None) -> Listing:
    """Lists a folder, or a data set of a package."""
    if name == "digits":
        return list_digits()
    if name.startswith("tfds:"):
        return list_tfds(name.removeprefix("tfds:"), data_dir)
    path = Path(name).expanduser()
    if path.is_dir():
        return list_folder(path)
    raise UsageError(
        f"DATA does not exist. Received: {name}. Expected a folder of class folders, a "
        "table of images, tfds:NAME or digits."
    )


def _check_no_columns(name: str, options: ListingConfig) -> None:
    """Refuses names of columns for images that are not in a table.

    Raises:
        UsageError: If there is one.
    """
    for role in USUAL_NAMES:
        option = f"{role}_column"
        if column := getattr(options, option):
            raise UsageError(
                f"Only tables have columns. Received: {option}={column} and {name}. "
                "Leave it out."
            )
