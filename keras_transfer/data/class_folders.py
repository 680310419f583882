"""Lists a folder of class folders, or of train/ val/ test/ folders of them."""

import contextlib
import os
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from keras_transfer.data.folders import (
    IMAGE_SUFFIXES,
    folder_entries,
    is_folder,
    may_be_image,
    walk_folder,
)
from keras_transfer.data.reading import read_files
from keras_transfer.data.tables import Listing, split_of
from keras_transfer.errors import KerasTransferError, UsageError


def list_folder(folder: Path) -> Listing:
    """Lists the images of a folder; the folders in it are classes or splits.

    Raises:
        UsageError: If the folder cannot be read.
        KerasTransferError: If it is ambiguous which folders are the classes.
    """
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UsageError(f"DATA cannot be read. Received: {folder} (no permission).")
    listing = Listing(read=lambda paths: read_files(paths, folder), root=folder)
    contents = _contents(folder)
    parts = {x: split for x in contents.folders if (split := split_of(x.name))}
    if not _is_split_layout(contents, parts):
        _list_class_folders(listing, folder, contents, split="")
        return listing
    if others := [path for path in contents.folders if path not in parts]:
        listing.warnings.append(
            f"{_shown(others)} beside {_shown(parts)} is no split and was left out."
        )
    for path, split in parts.items():
        _list_class_folders(listing, folder, _contents(path), split)
    return listing


def _is_split_layout(contents: "_Contents", parts: Mapping[Path, str]) -> bool:
    """Returns whether the folders are train/, val/, test/ rather than classes.

    Raises:
        KerasTransferError: If that is ambiguous.
    """
    if "train" in parts.values() and (len(parts) > 1 or len(contents.folders) == 1):
        return True
    if parts:
        what = "is a split or a class" if len(parts) == 1 else "are splits or classes"
        raise KerasTransferError(
            f"It cannot be told whether {_shown(parts)} {what}. Received: "
            f"{contents.path} with {_shown(contents.folders)}. Of splits, one must be "
            "called train and another val or test; for classes, choose other names, or "
            "list the images in a CSV file with the columns path,label."
        )
    return False


def _list_class_folders(
    listing: Listing, root: Path, contents: "_Contents", split: str
) -> None:
    parent, class_folders, loose = contents
    if loose and not class_folders and split in ("", "train"):
        raise KerasTransferError(
            f"The {len(loose)} images lie in no class folders. Received: {parent}, "
            f"which holds {loose[0].name} itself. Put the images of each class into a "
            "folder of its own, or list them in a CSV file with the columns path,label."
        )
    _check_class_folders(contents)
    if loose:
        listing.warnings.append(
            f"{len(loose)} images lie outside the class folders and were left out, "
            f"such as {loose[0].relative_to(root)}."
        )
    left_out = defaultdict(list)
    for class_folder in class_folders:
        images = 0
        for found in walk_folder(class_folder, {os.path.realpath(parent)}):
            if found.problem:
                left_out[found.problem].append(found.path)
            elif may_be_image(found.path):
                source = found.path.relative_to(root).as_posix()
                listing.add(source, (class_folder.name,), split)
                images += 1
            else:
                left_out["a file that is no image by its name"].append(found.path)
        if not images:
            shown = class_folder.relative_to(root)
            listing.warnings.append(f"Class folder {str(shown)!r} holds no images.")
    for problem, paths in left_out.items():
        more = len(paths) - 1
        listing.warnings.append(
            f"{paths[0].relative_to(root)} "
            + (
                f"and {more:,} more were left out: each is "
                if more
                else "was left out: "
            )
            + f"{problem}."
        )


def _check_class_folders(contents: "_Contents") -> None:
    """Rejects folders that are in the place of class folders but are not classes.

    Raises:
        KerasTransferError: If there is only one folder and it contains several folders,
            or if all folders contain the same subfolders. The classes or splits are
            then probably at a lower level.
    """
    parent, class_folders, _ = contents
    inside = [_contents(folder) for folder in class_folders]
    below = [_below_wrappers(one) for one in inside]
    if len(below) == 1 and len(below[0].folders) > 1 and not below[0].images:
        raise KerasTransferError(
            f"There is one folder only, and the classes seem to be the folders in it. "
            f"Received: {parent}, which holds {class_folders[0].name} alone. Name "
            f"{below[0].path} instead."
        )
    if len(below) < 2:
        return
    shared = set.intersection(*(one.names for one in inside))
    splits = sorted(name for name in shared if split_of(name))
    if splits:
        raise KerasTransferError(
            f"Splits are folders of classes, not the other way round. Received: "
            f"{parent}, in which each of {_shown(class_folders)} holds "
            f"{', '.join(splits)}. Arrange the images as train/CLASS/ and "
            "test/CLASS/, or list them in a CSV file with the columns path,label,split."
        )
    names = [one.names for one in below if one.folders]
    is_same = len(names) > 1 and all(x == names[0] for x in names)
    if is_same and len(names[0]) > 1 and not any(one.images for one in below):
        raise KerasTransferError(
            f"Folders that all hold the same folders are no classes. Received: "
            f"{parent}, in which each of {_shown(class_folders)} holds "
            f"{', '.join(sorted(names[0])[:5])}. Name one of them, such as "
            f"{below[0].path}, or list the images in a CSV file with the columns "
            "path,label."
        )


def _shown(paths: Collection[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:5]) + (", ..." if names[5:] else "")


class _Contents(NamedTuple):
    """The subfolders of a folder, and its files with the suffix of an image."""

    path: Path
    folders: list[Path]
    images: list[Path]

    @property
    def names(self) -> set[str]:
        """The subfolders' names."""
        return {path.name for path in self.folders}


def _contents(folder: Path) -> _Contents:
    """Lists a folder; empty if it is unreadable, which `walk_folder` reports."""
    contents = _Contents(folder, [], [])
    with contextlib.suppress(OSError):
        for entry in folder_entries(folder):
            path = Path(entry.path)
            if is_folder(entry):
                contents.folders.append(path)
            elif path.suffix.lower() in IMAGE_SUFFIXES:
                contents.images.append(path)
    return contents


def _below_wrappers(contents: _Contents) -> _Contents:
    """Descends through folders that contain a single folder and no images.

    Archives often wrap their content in one or two folders of the same name.
    """
    while len(contents.folders) == 1 and not contents.images:
        contents = _contents(contents.folders[0])
    return contents
