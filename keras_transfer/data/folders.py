"""Folders of images: which subfolders are searched and which files may be images."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from keras_transfer.errors import UsageError

# Names that archivers, network drives and desktops leave behind, in lower case.
_NEVER_DATA = frozenset(
    ("__macosx", "@eadir", "$recycle.bin", "thumbs.db", "desktop.ini", "dicomdir")
)
IMAGE_SUFFIXES = frozenset(
    (
        ".jpg .jpeg .jpe .jfif .png .gif .bmp .webp .tif .tiff .avif .heic .heif .hif "
        ".dcm .dicom"
    ).split()
)


def image_files(
    paths: str | Path | Iterable[str | Path], recursive: bool
) -> Iterator[str]:
    """Yields the given files and the image files in the given folders.

    Args:
        paths: An image file or a folder of images, or several of them. Files are
            yielded as given, even if they do not exist.
        recursive: Whether to search subfolders too.

    Yields:
        Paths of image files.

    Raises:
        UsageError: If an item is no path, or a folder contains no images.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    for item in paths:
        if not isinstance(item, (str, os.PathLike)):
            raise UsageError(
                f"Images are named by paths. Received: {type(item).__name__}. Of "
                "pixels, the Keras model in model.keras gives probabilities."
            )
        path = Path(item)
        if path.is_dir():
            found = [str(image) for image in find_images(path, recursive)]
            if not found:
                raise UsageError(
                    f"There are no images. Received: {path}. "
                    + (
                        ""
                        if recursive
                        else "Search folders inside with recursive=True."
                    )
                )
            yield from found
        else:
            yield str(path)


def find_images(folder: Path, recursive: bool = True) -> Iterator[Path]:
    """Yields the image files in a folder in sorted order, skipping hidden ones.

    A folder that cannot be read is yielded itself, so that it is reported as an
    unusable image. No folder is entered twice.

    Args:
        folder: The folder to search.
        recursive: Whether to search subfolders too.
    """
    for found in walk_folder(folder, set(), recursive):
        if found.problem == _UNREADABLE or (
            not found.problem and may_be_image(found.path)
        ):
            yield found.path


def may_be_image(path: Path) -> bool:
    """Returns whether a file has an image's suffix or no suffix at all.

    A suffix of digits is the end of a DICOM's name that is a UID, such as
    1.2.840.113619.2.55.
    """
    suffix = path.suffix.lower()
    return not suffix or suffix in IMAGE_SUFFIXES or suffix[1:].isdecimal()


def folder_entries(folder: Path) -> list[os.DirEntry[str]]:
    """Lists a folder's entries by name, without hidden and system files."""
    with os.scandir(folder) as entries:
        kept = [
            entry
            for entry in entries
            if not entry.name.startswith(".") and entry.name.lower() not in _NEVER_DATA
        ]
    return sorted(kept, key=lambda entry: entry.name)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Returns whether an entry is a folder or a link to one; False if unknown."""
    try:
        return entry.is_dir()
    except OSError:  # a broken link, such as a circular one
        return False


_UNREADABLE = "a folder that cannot be read"


class _Found(NamedTuple):
    """A file below a folder, or a folder that was not entered, with the reason."""

    path: Path
    problem: str = ""


def walk_folder(
    folder: Path, seen: set[str], recursive: bool = True
) -> Iterator[_Found]:
    """Yields the files below a folder, following links.

    Broken links and other entries that are neither files nor folders are yielded as
    files; reading them will report the problem.

    Args:
        folder: The folder to walk.
        seen: Real paths of folders that were entered already and are not entered again;
            the function adds to it.
        recursive: Whether to walk subfolders too.
    """
    real = os.path.realpath(folder)
    if real in seen:
        yield _Found(folder, "a folder that is a link to one that was read already")
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
