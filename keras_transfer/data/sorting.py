"""Sorts classified images into folders named after their classes."""

import contextlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from keras_transfer.data.tables import Prediction
from keras_transfer.errors import KerasTransferError

UNSURE = "_unsure"
"""Folder for images whose prediction is not sure."""

NO_CLASS = "_none"
"""Folder for images of multi-label data none of whose classes is predicted."""

_MOST_BYTES = 200  # of a folder's name; file systems allow 255

# What no file system, or not all of them, allows in the name of a folder.
_NOT_IN_NAMES = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')


class SortedFolders:
    """Puts images into class folders below a directory, as hard links or copies.

    An image is linked if the directory is on its file system, which takes no space;
    both names are then the same file. Else it is copied, with its times. No existing
    file is changed: if the name is taken, a number is added, as in `photo-2.jpg`,
    unless the file there is the image itself.

    Images go to the folder of their class; if they are not sure, to `_unsure/`. Those
    of several classes go to each of their folders, and those of none to `_none/`.
    Unusable images stay where they are.

    Attributes:
        directory: The directory.
        counts: Number of images put into each folder so far, by its name.
    """

    def __init__(self, directory: Path, class_names: Sequence[str]):
        self.directory = directory
        self.counts = Counter[str]()
        self._folders = folder_names(class_names)

    def put(self, prediction: Prediction) -> list[Path]:
        """Puts an image into the folders that its prediction names.

        Returns:
            The paths that the image has there; empty if it is unusable.

        Raises:
            KerasTransferError: If a file cannot be written.
        """
        if prediction.probabilities is None:
            return []
        folders = [self._folders[name] for name in prediction.classes] or [NO_CLASS]
        if prediction.sure is False:
            folders = [UNSURE]
        source = Path(prediction.source)
        try:
            found = [_place(source, self.directory / folder) for folder in folders]
        except OSError as error:
            raise KerasTransferError(
                f"An image cannot be put into {self.directory}. Received: {source} "
                f"({error.strerror})."
            ) from None
        self.counts.update(folders)
        return found


def folder_names(class_names: Iterable[str]) -> dict[str, str]:
    """Returns a folder name for each class, safe and different from all others.

    Class names are any text, such as `../x` or `a/b`. Characters that have a meaning in
    paths become `_`, as do dots and spaces at either end; long names are cut. If two
    classes would share a folder, also on file systems that ignore case, a number is
    added.
    """
    taken = {UNSURE, NO_CLASS}
    folders = {}
    for name in class_names:
        safe = _NOT_IN_NAMES.sub("_", name)
        inner = safe.strip(". ")
        start = len(safe) - len(safe.lstrip(". "))
        safe = "_" * start + inner + "_" * (len(safe) - start - len(inner))
        safe = safe.encode(errors="replace")[:_MOST_BYTES].decode(errors="ignore")
        folders[name] = next(
            x for x in _numbered(safe or "_") if x.lower() not in taken
        )
        taken.add(folders[name].lower())
    return folders


def _place(source: Path, folder: Path) -> Path:
    """Links or copies a file into a folder under the first name that is free."""
    folder.mkdir(parents=True, exist_ok=True)
    real = source.resolve()  # else a link to the image would be linked
    for stem in _numbered(source.stem):
        target = folder / f"{stem}{source.suffix}"
        with contextlib.suppress(FileExistsError):
            _link_or_copy(real, target)
            return target
        if target.exists() and target.samefile(real):
            return target
    raise AssertionError("there is always a free name")


def _link_or_copy(source: Path, target: Path) -> None:
    """Makes a new file of another's content.

    Raises:
        FileExistsError: If the target exists.
    """
    try:
        os.link(source, target)
        return
    except FileExistsError:
        raise
    except OSError:  # another file system, or one without links
        pass
    with source.open("rb") as read, target.open("xb") as written:
        try:
            shutil.copyfileobj(read, written)
        except BaseException:
            target.unlink()
            raise
    with contextlib.suppress(OSError):  # not every file system keeps times
        shutil.copystat(source, target)


def _numbered(name: str) -> Iterator[str]:
    """Yields NAME, NAME-2, NAME-3 and so on."""
    yield name
    number = 2
    while True:
        yield f"{name}-{number}"
        number += 1
