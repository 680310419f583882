"""DATA -> Splits: which images there are, what they show, who trains on them.

Images stay encoded here. A `Splits` holds three tables of names and labels, and a
reader that yields the encoded bytes of any of them. Nothing of TensorFlow is imported
unless the data are `digits` (encoded to PNG) or `tfds:`.
"""

import contextlib
import csv
import errno
import hashlib
import io
import os
import re
import stat
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import (
    Callable,
    Collection,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Set,
)
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from keras_transfer.config import SplitsConfig
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.run import csv_text

_T = TypeVar("_T")
_R = TypeVar("_R")

SPLIT_NAMES = ("train", "val", "test")
LABEL_SEPARATOR = "|"

_SPLIT_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {
    f"{word}{suffix}": split
    for split, words in _SPLIT_WORDS.items()
    for word in words
    for suffix in ("", "_set")
}
# What archivers, network drives and desktops leave behind, in lower case.
_NEVER_DATA = frozenset(
    ("__macosx", "@eadir", "$recycle.bin", "thumbs.db", "desktop.ini")
)
_IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .gif .bmp .webp .tif .tiff .avif .heic .heif".split()
)
_READ_THREADS = 4
_ROUNDING = 1e-6  # images

MOST_BYTES_AHEAD = 2**26
"""How many bytes of encoded images may wait to be worked on; see `map_ahead`."""

Reader = Callable[[Sequence[str]], Iterator[tuple[str, bytes | OSError]]]
"""Yields (source, encoded bytes, or why they cannot be read) of the sources asked
for, each once, not always in the order asked."""


@dataclass(frozen=True)
class Table:
    """The images of one split.

    Attributes:
        sources: What names each image: a path relative to the data, or an id.
        targets: int64 `[N]` indices into the class names; of multi-label data uint8
            `[N, num_classes]`, 1 where the class is present.
        groups: The group of each image (a patient, a burst of photos), "" for none.
    """

    sources: tuple[str, ...]
    targets: np.ndarray
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sources)

    def keep(self, sources: Iterable[str]) -> "Table":
        """The same table with only the images named."""
        wanted = set(sources)
        rows = [i for i, source in enumerate(self.sources) if source in wanted]
        return Table(
            tuple(self.sources[i] for i in rows),
            self.targets[rows],
            tuple(self.groups[i] for i in rows),
        )


@dataclass(frozen=True)
class Splits:
    """Labelled images in three parts that share no image and no group.

    Attributes:
        class_names: In the order of the model's outputs.
        read: Yields the encoded bytes of the sources given to it.
        warnings: What the user should know about the data, a line each.
    """

    train: Table
    val: Table
    test: Table
    class_names: tuple[str, ...]
    multi_label: bool
    read: Reader
    warnings: tuple[str, ...]

    def items(self) -> Iterator[tuple[str, Table]]:
        """(split name, table) of train, val and test."""
        for name in SPLIT_NAMES:
            yield name, getattr(self, name)

    def class_counts(self) -> dict[str, dict[str, int]]:
        """For each split, how many images show each class."""
        counts = {}
        for name, table in self.items():
            of_class = count_classes(table.targets, len(self.class_names)).tolist()
            counts[name] = dict(zip(self.class_names, of_class, strict=True))
        return counts

    def absent_classes(self) -> list[str]:
        """A line for each split that has images, but none of some classes."""
        lines = []
        for split, counts in self.class_counts().items():
            absent = [repr(name) for name, count in counts.items() if count == 0]
            if absent and len(getattr(self, split)):
                shown = ", ".join(absent[:5]) + (", ..." if absent[5:] else "")
                lines.append(
                    f"The {split} split has no image of {len(absent)} of "
                    f"{len(counts)} classes: {shown}."
                )
        return lines

    def shared(self, keys: Mapping[str, Hashable], what: str) -> list[str]:
        """A line for each two splits that have images with the same key.

        Args:
            keys: The key of each source that has one.
            what: Ends the line, after "3 of 10 test images".
        """
        lines = []
        for one, other in (("val", "train"), ("test", "train"), ("test", "val")):
            table, others = getattr(self, one), getattr(self, other)
            known = {keys[source] for source in others.sources if source in keys}
            found = sum(keys.get(source) in known for source in table.sources)
            if found:
                lines.append(
                    f"{found} of {len(table)} {one} images {what} {other} too: their "
                    "figures flatter."
                )
        return lines

    def keep(self, sources: Iterable[str]) -> "Splits":
        """The same splits with only the images named."""
        kept = set(sources)
        return replace(
            self,
            train=self.train.keep(kept),
            val=self.val.keep(kept),
            test=self.test.keep(kept),
        )

    def relabel(self, class_names: Sequence[str]) -> "Splits":
        """The same splits with targets that are indices into other class names.

        Raises:
            KerasTransferError: If an image shows a class that has no name there.
        """
        position = {name: index for index, name in enumerate(class_names)}
        columns = np.array([position.get(name, -1) for name in self.class_names])

        def relabelled(table: Table) -> Table:
            shown = count_classes(table.targets, len(columns)) > 0
            for index in np.flatnonzero(shown & (columns < 0)):
                raise KerasTransferError(
                    "The classes of the data are not those that were trained on. "
                    f"Received: {self.class_names[index]!r}, which is none of "
                    f"{', '.join(class_names)}. Train again with kt fit."
                )
            if not self.multi_label:
                return replace(table, targets=columns[table.targets])
            targets = np.zeros((len(table), len(class_names)), np.uint8)
            targets[:, columns[columns >= 0]] = table.targets[:, columns >= 0]
            return replace(table, targets=targets)

        return replace(
            self,
            class_names=tuple(class_names),
            train=relabelled(self.train),
            val=relabelled(self.val),
            test=relabelled(self.test),
        )

    def to_csv(self) -> str:
        """The text of splits.csv: path,label,split,group, an image a line."""
        rows = (
            (source, self._label(target), name, group)
            for name, table in self.items()
            for source, target, group in zip(
                table.sources, table.targets, table.groups, strict=True
            )
        )
        return csv_text(("path", "label", "split", "group"), rows)

    def fingerprint(self, digests: Mapping[str, bytes]) -> str:
        """SHA-256 over split, name, bytes and labels of every image."""
        digest = hashlib.sha256()
        for name, table in self.items():
            for source, target in zip(table.sources, table.targets, strict=True):
                row = (name, source, digests[source].hex(), self._label(target))
                digest.update("\0".join(row).encode(errors="surrogateescape") + b"\n")
        return digest.hexdigest()

    def _label(self, target: np.ndarray) -> str:
        indices = np.flatnonzero(target) if self.multi_label else [int(target)]
        return LABEL_SEPARATOR.join(self.class_names[i] for i in indices)


@dataclass
class _Listing:
    """What was found, before images are assigned to splits."""

    read: Reader
    sources: list[str] = field(default_factory=list)
    labels: list[tuple[str, ...]] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)  # "" where the data do not say
    groups: list[str] = field(default_factory=list)
    class_names: list[str] | None = None  # None: the labels, sorted
    multi_label: bool = False
    warnings: list[str] = field(default_factory=list)

    def add(
        self, source: str, labels: tuple[str, ...], split: str = "", group: str = ""
    ) -> None:
        self.sources.append(source)
        self.labels.append(labels)
        self.splits.append(split)
        self.groups.append(group)


def is_on_disk(data: str) -> bool:
    """Whether DATA is a path, and not a data set that a package brings."""
    return data != "digits" and not data.startswith("tfds:")


def load(
    data: str,
    config: SplitsConfig | None = None,
    seed: int = 0,
    data_dir: Path | None = None,
) -> Splits:
    """Finds the images that DATA names and divides them into train, val and test.

    Splits that the data name are kept. Where they name none, images are divided per
    class in the shares of `config`, seeded, a group always staying whole. A train/
    folder without a val/ gives up a part of itself for validation.

    Args:
        data: A folder of class folders, a folder of train/ val/ [test/] folders of
            class folders, a CSV/TSV file, `tfds:NAME[:VERSION]` or `digits`.
        config: Shares, and a splits.csv whose assignment is kept.
        seed: Decides which images go where.
        data_dir: Where tensorflow-datasets keeps prepared data.

    Raises:
        UsageError: If DATA is not one of these.
        KerasTransferError: If there is no image, only one class, or a line of the
            file is wrong.
    """
    config = config or SplitsConfig()
    listing = _list(data, data_dir)
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
    held_out = {*listing.splits} - {"", "train"}
    if "val" not in held_out:
        _free_train(listing)
    if config.file is not None:
        _keep_old_splits(listing, config.file)
    _assign_splits(listing, config, seed, held_out)
    splits = _to_splits(listing, tuple(class_names))
    return replace(splits, warnings=(*splits.warnings, *_doubts(splits)))


def load_all(
    data: str,
    class_names: Sequence[str],
    multi_label: bool,
    data_dir: Path | None = None,
) -> tuple[Table, Reader]:
    """All images that DATA names as one table, labelled as a model's classes.

    Raises:
        UsageError: If DATA is not what `load` takes.
        KerasTransferError: If there is no image, or a label is none of the classes.
    """
    listing = _list(data, data_dir, multi_label)
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


def one_hot(targets: np.ndarray, num_classes: int) -> np.ndarray:
    """float32 `[N, num_classes]` of a table's targets, single- or multi-label."""
    if targets.ndim == 2:
        return targets.astype(np.float32)
    encoded = np.zeros((len(targets), num_classes), np.float32)
    encoded[np.arange(len(targets)), targets] = 1
    return encoded


def count_classes(targets: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 `[num_classes]`: how many of a table's images show each class."""
    if targets.ndim == 2:
        return targets.sum(0, dtype=np.int64)
    return np.bincount(targets, minlength=num_classes)


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


@dataclass(frozen=True)
class Prediction:
    """What a run's model says of one image.

    Attributes:
        source: The image's path, or its id in the data.
        probabilities: float32 `[num_classes]`; None if the image is unusable.
        error: Why it is unusable, or "".
    """

    source: str
    probabilities: np.ndarray | None
    error: str = ""


def read_files(
    paths: Sequence[str], root: Path
) -> Iterator[tuple[str, bytes | OSError]]:
    """Reads files ahead in a few threads; yields (path, bytes or the error)."""

    def size(path: str) -> int:
        try:
            return os.path.getsize(os.path.join(root, path))
        except (OSError, ValueError):  # `read` tells
            return 0

    def read(path: str) -> tuple[str, bytes | OSError]:
        try:
            return path, _read_file(root / path)
        except OSError as error:
            return path, error

    return map_ahead(read, paths, _READ_THREADS, weigh=size)


def _read_file(path: Path) -> bytes:
    """The bytes of a regular file; a pipe or a device, which may never end, is none."""
    try:
        is_regular = stat.S_ISREG(path.stat().st_mode)
    except ValueError:
        raise OSError(errno.EINVAL, "its path has a NUL character") from None
    if not is_regular:
        raise OSError(errno.EINVAL, "it is not a regular file")
    return path.read_bytes()


def map_ahead(
    function: Callable[[_T], _R],
    items: Iterable[_T],
    threads: int,
    ahead: int | None = None,
    weigh: Callable[[_T], int] = lambda _: 0,
) -> Iterator[_R]:
    """`map` in threads, in order, within bounds before the consumer.

    A result is given away as soon as it is there: the first one does not wait until the
    bounds are reached. Two items are taken for each result that nobody waited for, so
    that they are reached all the same where the consumer is slower.

    Args:
        function: Called in the threads.
        items: What it is called with, one after the other.
        threads: How many.
        ahead: The most items that are taken before they are asked for.
        weigh: From an item to its bytes. No more items are taken once those that were
            not asked for yet come to `MOST_BYTES_AHEAD`.
    """
    limit = 4 * threads if ahead is None else ahead
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[tuple[Future[_R], int]] = deque()
        weight = taken = 0
        try:
            for item in items:
                pending.append((pool.submit(function, item), weigh(item)))
                weight += pending[-1][1]
                taken += 1
                while pending and (
                    len(pending) > limit
                    or weight - pending[0][1] >= MOST_BYTES_AHEAD
                    or (taken > 1 and pending[0][0].done())
                ):
                    future, size = pending.popleft()
                    weight -= size
                    taken = 0
                    yield future.result()
            while pending:
                yield pending.popleft()[0].result()
        finally:
            for future, _ in pending:
                future.cancel()


def find_images(folder: Path, recursive: bool = True) -> Iterator[Path]:
    """Image files in a folder, sorted, hidden ones left out.

    A folder that cannot be read is yielded itself, and is an unusable image to whoever
    reads it; no folder is entered twice.

    Args:
        folder: Where to look.
        recursive: Whether folders inside it are searched too.
    """
    for found in _walk(folder, set(), recursive):
        if found.problem == _UNREADABLE or (
            not found.problem and _may_be_image(found.path)
        ):
            yield found.path


def _may_be_image(path: Path) -> bool:
    return path.suffix.lower() in _IMAGE_SUFFIXES or not path.suffix


def _list(data: str, data_dir: Path | None, multi_label: bool = False) -> _Listing:
    if data == "digits":
        return _list_digits()
    if data.startswith("tfds:"):
        return _list_tfds(data.removeprefix("tfds:"), data_dir)
    path = Path(data).expanduser()
    if path.is_dir():
        return _list_folder(path)
    if path.is_file():
        return _list_csv(path, multi_label)
    raise UsageError(
        f"DATA does not exist. Received: {data}. Expected a folder of class folders, a "
        "CSV/TSV file, tfds:NAME or digits."
    )


def _split_of(name: str) -> str:
    """The split that a folder or a table means by this name; "" if it means none."""
    return _SPLIT_OF.get(name.strip().lower().replace("-", "_").replace(" ", "_"), "")


def _list_folder(folder: Path) -> _Listing:
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UsageError(f"DATA cannot be read. Received: {folder} (no permission).")
    listing = _Listing(read=lambda paths: read_files(paths, folder))
    contents = _contents(folder)
    parts = {x: split for x in contents.folders if (split := _split_of(x.name))}
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
    """Whether folders are train/, val/, test/ and not classes.

    Raises:
        KerasTransferError: If that cannot be told.
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
    listing: _Listing, root: Path, contents: "_Contents", split: str
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
        for found in _walk(class_folder, {os.path.realpath(parent)}):
            if found.problem:
                left_out[found.problem].append(found.path)
            elif _may_be_image(found.path):
                source = found.path.relative_to(root).as_posix()
                listing.add(source, (class_folder.name,), split)
                images += 1
            else:
                left_out["files are no images by their names"].append(found.path)
        if not images:
            shown = class_folder.relative_to(root)
            listing.warnings.append(f"Class folder {str(shown)!r} holds no images.")
    for problem, paths in left_out.items():
        listing.warnings.append(
            f"{len(paths)} {problem} and were left out, such as "
            f"{paths[0].relative_to(root)}."
        )


def _check_class_folders(contents: "_Contents") -> None:
    """Refuses folders that are classes by their place only.

    Raises:
        KerasTransferError: If there is one, which holds folders, or if each holds the
            same folders: the classes, or the splits, are a level further down.
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
    splits = sorted(name for name in shared if _split_of(name))
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
    """A folder, and what it holds: folders, and files whose suffix is an image's."""

    path: Path
    folders: list[Path]
    images: list[Path]

    @property
    def names(self) -> set[str]:
        """Of the folders."""
        return {path.name for path in self.folders}


def _contents(folder: Path) -> _Contents:
    """What a folder holds; nothing where it cannot be read, which `_walk` reports."""
    contents = _Contents(folder, [], [])
    with contextlib.suppress(OSError):
        for entry in _entries(folder):
            path = Path(entry.path)
            if _is_folder(entry):
                contents.folders.append(path)
            elif path.suffix.lower() in _IMAGE_SUFFIXES:
                contents.images.append(path)
    return contents


def _below_wrappers(contents: _Contents) -> _Contents:
    """The first folder below that holds more than one other folder, and nothing else.

    Archives often wrap what they hold in a folder or two of the same name.
    """
    while len(contents.folders) == 1 and not contents.images:
        contents = _contents(contents.folders[0])
    return contents


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, sorted; nothing of what no one means by data."""
    with os.scandir(folder) as entries:
        kept = [
            entry
            for entry in entries
            if not entry.name.startswith(".") and entry.name.lower() not in _NEVER_DATA
        ]
    return sorted(kept, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere, in a circle for one
        return False


_UNREADABLE = "folders cannot be read"


class _Found(NamedTuple):
    """A file below a folder; or a folder that is not entered, and why."""

    path: Path
    problem: str = ""


def _walk(folder: Path, seen: set[str], recursive: bool = True) -> Iterator[_Found]:
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
        entries = _entries(folder)
    except OSError:
        yield _Found(folder, _UNREADABLE)
        return
    for entry in entries:
        if not _is_folder(entry):
            yield _Found(Path(entry.path))
        elif recursive:
            yield from _walk(Path(entry.path), seen)


def _list_csv(file: Path, multi_label: bool) -> _Listing:
    root = file.parent
    listing = _Listing(read=lambda paths: read_files(paths, root))
    rows = [
        (line, {name: cell.strip() for name, cell in row.items()})
        for line, row in read_table(file)
    ]
    listing.multi_label = multi_label or any(
        LABEL_SEPARATOR in row["label"] for _, row in rows
    )
    seen: dict[str, int] = {}
    for line, row in rows:
        if not row["path"]:
            raise KerasTransferError(f"{file}, line {line}: the path is empty.")
        source, label = Path(row["path"]).as_posix(), row["label"]
        if source in seen:
            raise KerasTransferError(
                f"{file}, line {line}: {source} is on line {seen[source]} already. "
                f"Several labels go into one line, separated by {LABEL_SEPARATOR!r}."
            )
        seen[source] = line
        labels = [name.strip() for name in label.split(LABEL_SEPARATOR)]
        names = tuple(dict.fromkeys(name for name in labels if name))
        if not names and not listing.multi_label:
            raise KerasTransferError(
                f"{file}, line {line}: {source} has no label. Add one, or remove it."
            )
        listing.add(source, names, _split_name(file, line, row), row.get("group", ""))
    return listing


def read_table(file: Path) -> list[tuple[int, dict[str, str]]]:
    """(line number, row) of each line of a CSV or TSV file with path and label.

    Cells are as they are in the file, spaces and all; column names are in lower case.

    Raises:
        UsageError: If the file is no text, has no such columns, names a column twice,
            or a line has more cells than there are columns.
    """
    try:  # a path need not be UTF-8, and is kept as it is
        text = file.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}).") from None
    header = re.split("[\r\n]", text, maxsplit=1)[0]
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter="\t" if "\t" in header else ","
    )
    rows = []
    try:
        columns = [name.strip().lower() for name in next(reader, [])]
        if not {"path", "label"} <= set(columns):
            raise UsageError(
                f"A data file starts with a line of column names: path,label[,split]"
                f"[,group]. Received: {file}, which starts with "
                f"{header.strip()[:80]!r}."
            )
        for name, count in Counter(columns).items():
            if name and count > 1:
                raise UsageError(
                    f"{file}, line 1: column {name!r} is there {count} times. Remove "
                    "or rename all but one."
                )
        for cells in filter(None, reader):
            if len(cells) > len(columns):
                raise UsageError(
                    f"{file}, line {reader.line_num}: {len(cells)} cells for "
                    f"{len(columns)} columns. Received: {cells!r}. A cell that holds "
                    f"{reader.dialect.delimiter!r} goes into double quotes."
                )
            cells += [""] * (len(columns) - len(cells))
            rows.append((reader.line_num, dict(zip(columns, cells, strict=True))))
    except csv.Error as error:
        raise UsageError(f"{file}, line {reader.line_num}: {error}.") from None
    return rows


def _split_name(file: Path, line: int, row: dict[str, str]) -> str:
    name = row.get("split", "").strip()
    split = _split_of(name)
    if name and not split:
        raise KerasTransferError(
            f"{file}, line {line}: a split is train, val or test. Received: {name!r}."
        )
    return split


def _list_digits() -> _Listing:
    """The 1,797 scanned 8x8 digits that scikit-learn ships, as grayscale PNGs.

    Source: UCI Optical Recognition of Handwritten Digits (test set).
    """
    import tensorflow as tf
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    encoded = {
        f"digits/{i:04d}.png": tf.io.encode_png(image).numpy()
        for i, image in enumerate(pixels)
    }
    listing = _Listing(read=lambda names: ((name, encoded[name]) for name in names))
    for source, digit in zip(encoded, bunch.target, strict=True):
        listing.add(source, (str(digit),))
    return listing


def _list_tfds(name: str, data_dir: Path | None) -> _Listing:
    """A data set of tensorflow-datasets; its images stay encoded as they are stored."""
    import tensorflow_datasets as tfds

    builder = _tfds_builder(name, data_dir)
    image_key, label_key = _tfds_keys(builder, name)
    label_names = builder.info.features[label_key].names

    def stream(split: str) -> Iterator[tuple[str, bytes, int]]:
        dataset = builder.as_dataset(
            split=split,
            decoders={image_key: tfds.decode.SkipDecoding()},
            read_config=tfds.ReadConfig(add_tfds_id=True, try_autocache=False),
        )
        for example in dataset.as_numpy_iterator():
            source = f"{split}/{example['tfds_id'].decode()}"
            yield source, example[image_key], int(example[label_key])

    def read(sources: Sequence[str]) -> Iterator[tuple[str, bytes | OSError]]:
        wanted = set(sources)
        for split in builder.info.splits:
            if any(source.startswith(f"{split}/") for source in wanted):
                for source, encoded, _ in stream(split):
                    if source in wanted:
                        yield source, encoded

    listing = _Listing(read=read)
    known_splits = [split for split in builder.info.splits if _split_of(split)]
    for split in known_splits:
        given = "" if len(known_splits) == 1 else _split_of(split)
        for source, _, label in stream(split):
            listing.add(source, (label_names[label],), given)
    present = {names[0] for names in listing.labels}
    listing.class_names = [label for label in label_names if label in present]
    return listing


def _tfds_builder(name: str, data_dir: Path | None):
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # tfds raises many types for one cause: no such name
        raise UsageError(
            f"tensorflow-datasets has no such data set. Received: {name!r} "
            f"({str(error).strip().splitlines()[0]})."
        ) from None
    try:
        builder.download_and_prepare()
    except Exception as error:
        raise KerasTransferError(
            f"The data set {name!r} is not prepared in {builder.data_path} and could "
            f"not be downloaded ({type(error).__name__}). Prepare it where there is a "
            "network, copy it there, and name its parent with --data-dir."
        ) from None
    return builder


def _tfds_keys(builder, name: str) -> tuple[str, str]:
    """The names of the one image and the one class label of each example."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    images = [k for k, v in features.items() if isinstance(v, tfds.features.Image)]
    labels = [k for k, v in features.items() if isinstance(v, tfds.features.ClassLabel)]
    if builder.info.supervised_keys:
        image, label, *_ = builder.info.supervised_keys
        if image in images and label in labels:
            return image, label
    if len(images) == len(labels) == 1:
        return images[0], labels[0]
    raise UsageError(
        f"A data set needs one image and one class label. Received: {name!r} with "
        f"{', '.join(features)}."
    )


def _check_class_names(class_names: Sequence[str], listing: _Listing) -> None:
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


def _free_train(listing: _Listing) -> None:
    """Lets train give up a part of itself, but no group that is held out elsewhere."""
    pairs = list(zip(listing.splits, listing.groups, strict=True))
    torn = {group for split, group in pairs if group and split not in ("", "train")}
    listing.splits = [
        "" if split == "train" and group not in torn else split
        for split, group in pairs
    ]


def _keep_old_splits(listing: _Listing, file: Path) -> None:
    rows = read_table(file)
    # A table that a person wrote may have spaces around its cells, as DATA may.
    old = {row["path"].strip(): (line, row) for line, row in rows}
    old |= {row["path"]: (line, row) for line, row in rows}
    for i, source in enumerate(listing.sources):
        if source in old:
            listing.splits[i] = _split_name(file, *old[source])
    if not set(listing.sources) & set(old):
        raise UsageError(
            f"--splits names none of these images. Received: {file}, whose first path "
            f"is {next(iter(old), '(none)')}; the data's first is {listing.sources[0]}."
        )


@dataclass
class _Shares:
    """How many images the splits that are being filled have, and shall have.

    Attributes:
        shares: Split to its share of the images, above 0.
        total: How many images are divided.
        count: Split to how many it has.
    """

    shares: Mapping[str, float]
    total: int
    count: Counter[str]

    def missing(self, split: str) -> float:
        """How many images a split lacks; below 0 if it has too many."""
        return self.shares[split] * self.total - self.count[split]


class _Unit(NamedTuple):
    """Images that go into one split together: a group, or one without a group."""

    indices: list[int]
    of_class: _Shares


def _assign_splits(
    listing: _Listing, config: SplitsConfig, seed: int, held_out: Set[str]
) -> None:
    """Gives every image that has none a split, in place.

    Splits that the data hold out themselves get no more images. A group is never
    divided (an image without one is its own), and one with a split already stays with
    it. Images of several classes count for their rarest one.

    Each class is divided in the shares of `config` as far as whole groups go, the first
    of them to train, so that a class with one image is trained on. What is left over of
    all classes then goes where most images are missing over all of them: where classes
    are too small to be divided, the splits are as large as they shall be all the same.
    """
    if all(listing.splits):
        return
    wanted = {
        "train": 1 - config.val - config.test,
        "val": config.val,
        "test": config.test,
    }
    wanted = {x: share for x, share in wanted.items() if x not in held_out and share}
    shares = {name: share / sum(wanted.values()) for name, share in wanted.items()}

    strata, taken = _strata(listing, set(shares))
    divided = sum(name == "" or name in shares for name in listing.splits)
    overall = _Shares(shares, divided, sum(taken.values(), Counter()))
    rng = np.random.default_rng(seed)
    left_over: list[_Unit] = []

    def assign(unit: _Unit, split: str) -> None:
        for shares in (unit.of_class, overall):
            shares.count[split] += len(unit.indices)
        for i in unit.indices:
            listing.splits[i] = split

    for stratum in sorted(strata):
        total = sum(map(len, strata[stratum])) + taken[stratum].total()
        of_class = _Shares(shares, total, taken[stratum])
        for unit in _largest_first([_Unit(x, of_class) for x in strata[stratum]], rng):
            neediest = max(shares, key=of_class.missing)
            if not of_class.count["train"]:
                assign(unit, "train")
            elif of_class.missing(neediest) >= len(unit.indices) - _ROUNDING:
                assign(unit, neediest)
            else:
                left_over.append(unit)

    for unit in _largest_first(left_over, rng):
        if "test" in shares and not overall.count["test"]:
            split = "test"  # to test on more than its share is better than on nothing
        else:
            lacking = [name for name in shares if unit.of_class.missing(name) > 0]
            split = max(lacking or shares, key=overall.missing)
        assign(unit, split)


def _largest_first(units: Sequence[_Unit], rng: np.random.Generator) -> list[_Unit]:
    """Groups by their size, equal ones in random order."""
    shuffled = [units[i] for i in rng.permutation(len(units))]
    return sorted(shuffled, key=lambda unit: len(unit.indices), reverse=True)


def _strata(
    listing: _Listing, shares: Set[str]
) -> tuple[dict[str, list[list[int]]], dict[str, Counter[str]]]:
    """The groups of images that have no split yet, by their rarest class.

    Images without a split join those of their group that have one.

    Returns:
        (class to groups of indices, class to how many images each of `shares` has).
    """
    frequency = Counter(name for labels in listing.labels for name in labels)
    members = defaultdict(list)
    for i, group in enumerate(listing.groups):
        members[(group, -1) if group else ("", i)].append(i)
    strata = defaultdict(list)
    taken: dict[str, Counter[str]] = defaultdict(Counter)
    for indices in members.values():
        names = {name for i in indices for name in listing.labels[i]}
        stratum = min(names, key=lambda name: (frequency[name], name), default="")
        fixed = {listing.splits[i] for i in indices} - {""}
        if not fixed:
            strata[stratum].append(indices)
            continue
        split = min(fixed)
        for i in indices:
            listing.splits[i] = listing.splits[i] or split
            if listing.splits[i] in shares:
                taken[stratum][listing.splits[i]] += 1
    return strata, taken


def _doubts(splits: Splits) -> list[str]:
    """What makes figures flatter or fail, as far as names and labels show it."""
    doubts = []
    if not len(splits.test):
        figures = (
            "figures are of the validation images, which also chose the L2 strength"
            if len(splits.val)
            else "no image is held out to measure the model on"
        )
        doubts.append(f"There is no test split: {figures}.")
    elif not len(splits.val):
        doubts.append("There is no validation split: the L2 strength is not chosen.")
    groups = {
        source: group
        for _, table in splits.items()
        for source, group in zip(table.sources, table.groups, strict=True)
        if group
    }
    return [
        *doubts,
        *splits.absent_classes(),
        *splits.shared(groups, "are of a group that is in"),
    ]


def _to_splits(listing: _Listing, class_names: tuple[str, ...]) -> Splits:
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
