"""Folders of images: what is looked into, and what in them may be an image."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from keras_transfer.errors import UsageError

# What archivers, network drives and desktops leave behind, in lower case.
_NEVER_DATA = frozenset(
    ("__macosx", "@eadir", "$recycle.bin", "thumbs.db", "desktop.ini")
)
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .gif .bmp .webp .tif .tiff .avif .heic .heif".split()
)


def image_files(
    paths: str | Path | Iterable[str | Path], recursive: bool
) -> Iterator[str]:
    """The image files that are named, or are in folders that are.

    Args:
        paths: Image files, and folders of them; or one.
        recursive: Whether folders inside folders are searched too.

    Raises:
        UsageError: If there is no image in a folder.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    for path in map(Path, paths):
        if path.is_dir():
            found = [str(image) for image in find_images(path, recursive)]
            if not found:
                raise UsageError(
                    f"There are no images. Received: {path}. "
                    + ("" if recursive else "Search folders inside with --recursive.")
                )
            yield from found
        else:
            yield str(path)


def find_images(folder: Path, recursive: bool = True) -> Iterator[Path]:
    """Image files in a folder, sorted, hidden ones left out.

    A folder that cannot be read is yielded itself, and is an unusable image to whoever
    reads it; no folder is entered twice.

    Args:
        folder: Where to look.
        recursive: Whether folders inside it are searched too.
    """
    for found in walk_folder(folder, set(), recursive):
        if found.problem == _UNREADABLE or (
            not found.problem and may_be_image(found.path)
        ):
            yield found.path


def may_be_image(path: Path) -> bool:
    """Whether a file is called like an image, or has no suffix at all."""
    return path.suffix.lower() in IMAGE_SUFFIXES or not path.suffix


def folder_entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, sorted; nothing of what no one means by data."""
    with os.scandir(folder) as entries:
        kept = [
            entry
            for entry in entries
            if not entry.name.startswith(".") and entry.name.lower() not in _NEVER_DATA
        ]
    return sorted(kept, key=lambda entry: entry.name)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one; False where that cannot be told."""
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere, in a circle for one
        return False


_UNREADABLE = "folders cannot be read"


class _Found(NamedTuple):
    """A file below a folder; or a folder that is not entered, and why."""

    path: Path
    problem: str = ""


def walk_folder(
    folder: Path, seen: set[str], recursive: bool = True
) -> Iterator[_Found]:
    """Files below a folder; links are followed, but no real folder is entered twice.

    What is neither a file nor a folder, and a link to nowhere, is yielded as a file:
    whoever reads it finds out.
    """
    real = os.path.realpath(folder)
    if real in seen:
        yield _Found(folder, "folders are links to others that were read already")
        return
    seen.add(real)
    try:
        entries = folder_entries(folder)
    except OSError:
        yield _Found(folder, _UNREADABLE)
        return
    for entry in entries:
        if not is_folder(entry):
            yield _Found(Path(entry.path))
        elif recursive:
            yield from walk_folder(Path(entry.path), seen)
