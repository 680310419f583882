"""DATA -> Splits: which images there are, what they show, who trains on them.

Images stay encoded here. A `Splits` holds three tables of names and labels, and a
reader that yields the encoded bytes of any of them. Nothing of TensorFlow is imported
unless the data are `digits` (encoded to PNG) or `tfds:`.
"""

import csv
import hashlib
import io
import os
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from keras_transfer.config import SplitsConfig
from keras_transfer.errors import KerasTransferError, UsageError

_T = TypeVar("_T")
_R = TypeVar("_R")

SPLIT_NAMES = ("train", "val", "test")
LABEL_SEPARATOR = "|"

_SPLIT_FOLDERS = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .gif .bmp .webp .tif .tiff .avif .heic .heif".split()
)
_READ_THREADS = 4

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
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("path", "label", "split", "group"))
        for name, table in self.items():
            rows = zip(table.sources, table.targets, table.groups, strict=True)
            for source, target, group in rows:
                writer.writerow((source, self._label(target), name, group))
        return text.getvalue()

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
    return _to_splits(listing, tuple(class_names))


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
    listing = _list(data, data_dir)
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


def image_files(paths: Iterable[str | Path], recursive: bool) -> Iterator[str]:
    """The image files that are named, or are in folders that are.

    Args:
        paths: Image files, and folders of them.
        recursive: Whether folders inside folders are searched too.

    Raises:
        UsageError: If there is no image in a folder.
    """
    for path in map(Path, paths):
        if path.is_dir():
            found = [
                str(image)
                for image in find_images(path)
                if recursive or image.parent == path
            ]
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
            return path, (root / path).read_bytes()
        except OSError as error:
            return path, error

    return map_ahead(read, paths, _READ_THREADS, weigh=size)


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


def find_images(folder: Path) -> Iterator[Path]:
    """Image files below a folder, sorted, hidden ones left out, no folder twice."""
    return filter(_may_be_image, _walk(folder, set()))


def _is_loose_image(path: Path) -> bool:
    hidden = path.name.startswith(".")
    return path.suffix.lower() in _IMAGE_SUFFIXES and not hidden and path.is_file()


def _may_be_image(path: Path) -> bool:
    return path.suffix.lower() in _IMAGE_SUFFIXES or not path.suffix


def _list(data: str, data_dir: Path | None) -> _Listing:
    if data == "digits":
        return _list_digits()
    if data.startswith("tfds:"):
        return _list_tfds(data.removeprefix("tfds:"), data_dir)
    path = Path(data).expanduser()
    if path.is_dir():
        return _list_folder(path)
    if path.is_file():
        return _list_csv(path)
    raise UsageError(
        f"DATA does not exist. Received: {data}. Expected a folder of class folders, a "
        "CSV/TSV file, tfds:NAME or digits."
    )


def _list_folder(folder: Path) -> _Listing:
    listing = _Listing(read=lambda paths: read_files(paths, folder))
    names = {path.name.lower() for path in _subfolders(folder)}
    if "train" in names and names <= set(_SPLIT_FOLDERS):
        for split_folder in _subfolders(folder):
            split = _SPLIT_FOLDERS[split_folder.name.lower()]
            _list_class_folders(listing, folder, split_folder, split)
        if "test" not in listing.splits and "val" in listing.splits:
            listing.warnings.append(
                "There is no test split: figures are of the validation images, which "
                "also chose the L2 strength."
            )
    else:
        _list_class_folders(listing, folder, folder, split="")
    return listing


def _list_class_folders(
    listing: _Listing, root: Path, parent: Path, split: str
) -> None:
    others = [path for path in sorted(parent.iterdir()) if _is_loose_image(path)]
    if others:
        listing.warnings.append(
            f"{len(others)} images lie outside the class folders and were left out, "
            f"such as {others[0].relative_to(root)}."
        )
    others = []
    for class_folder in _subfolders(parent):
        found = 0
        for path in _walk(class_folder, {os.path.realpath(parent)}):
            if _may_be_image(path):
                source = path.relative_to(root).as_posix()
                listing.add(source, (class_folder.name,), split)
                found += 1
            else:
                others.append(path)
        if not found:
            shown = class_folder.relative_to(root)
            listing.warnings.append(f"Class folder {str(shown)!r} holds no images.")
    if others:
        listing.warnings.append(
            f"{len(others)} files are no images by their names and were left out, such "
            f"as {others[0].relative_to(root)}."
        )


def _subfolders(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith(".")
    )


def _walk(folder: Path, seen: set[str]) -> Iterator[Path]:
    """Files below a folder; links are followed, but no real folder is entered twice."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path, seen)
        elif path.is_file() or path.is_symlink():  # a dangling link is reported later
            yield path


def _list_csv(file: Path) -> _Listing:
    root = file.parent
    listing = _Listing(read=lambda paths: read_files(paths, root))
    rows = read_table(file)
    listing.multi_label = any(LABEL_SEPARATOR in row["label"] for _, row in rows)
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

    Raises:
        UsageError: If the file is no text, or has no such columns.
    """
    try:  # a path need not be UTF-8, and is kept as it is
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}).") from None
    header = text.partition("\n")[0]
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter="\t" if "\t" in header else ","
    )
    columns = [name.strip().lower() for name in reader.fieldnames or ()]
    if not {"path", "label"} <= set(columns):
        raise UsageError(
            f"A data file starts with a line of column names: path,label[,split]"
            f"[,group]. Received: {file}, which starts with {header.strip()[:80]!r}."
        )
    reader.fieldnames = columns
    rows = []
    try:
        for row in reader:
            values = {name: (row.get(name) or "").strip() for name in columns}
            rows.append((reader.line_num, values))
    except csv.Error as error:
        raise UsageError(f"{file}, line {reader.line_num}: {error}.") from None
    return rows


def _split_name(file: Path, line: int, row: dict[str, str]) -> str:
    split = row.get("split", "").lower()
    if split and split not in _SPLIT_FOLDERS:
        raise KerasTransferError(
            f"{file}, line {line}: a split is train, val or test. Received: {split!r}."
        )
    return _SPLIT_FOLDERS.get(split, "")


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
    known_splits = [split for split in builder.info.splits if split in _SPLIT_FOLDERS]
    for split in known_splits:
        given = "" if len(known_splits) == 1 else _SPLIT_FOLDERS[split]
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
        if LABEL_SEPARATOR in name or categories & {"Cc", "Cs"}:
            raise KerasTransferError(
                f"A class name is UTF-8 without {LABEL_SEPARATOR!r} and control "
                f"characters. Received: {name!r}. Rename the class."
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
    old = {row["path"]: (line, row) for line, row in read_table(file)}
    for i, source in enumerate(listing.sources):
        if source in old:
            listing.splits[i] = _split_name(file, *old[source])
    if not set(listing.sources) & set(old):
        raise UsageError(
            f"--splits names none of these images. Received: {file}, whose first path "
            f"is {next(iter(old), '(none)')}; the data's first is {listing.sources[0]}."
        )


def _assign_splits(
    listing: _Listing, config: SplitsConfig, seed: int, held_out: Set[str]
) -> None:
    """Gives every image that has none a split, in place.

    Splits that the data hold out themselves get no more images.

    Per class, in seeded order, each group of images (an image without a group is its
    own) goes to the split that is furthest below its share of that class; train is
    served first, so that a class with one image is trained on. A group with a split
    already stays with it. Images of several classes count for their rarest one.
    """
    if all(listing.splits):
        return
    shares = {
        "train": 1 - config.val - config.test,
        "val": config.val,
        "test": config.test,
    }
    shares = {name: share for name, share in shares.items() if name not in held_out}
    shares = {name: share / sum(shares.values()) for name, share in shares.items()}

    frequency = Counter(name for labels in listing.labels for name in labels)
    members = defaultdict(list)
    for i, group in enumerate(listing.groups):
        members[(group, -1) if group else ("", i)].append(i)

    strata = defaultdict(list)
    taken: dict[str, Counter] = defaultdict(Counter)
    for indices in members.values():
        names = [name for i in indices for name in listing.labels[i]]
        stratum = min(set(names), key=lambda name: (frequency[name], name), default="")
        fixed = {listing.splits[i] for i in indices} - {""}
        if fixed:
            split = min(fixed)
            for i in indices:
                listing.splits[i] = listing.splits[i] or split
                if listing.splits[i] in shares:
                    taken[stratum][listing.splits[i]] += 1
        else:
            strata[stratum].append(indices)

    rng = np.random.default_rng(seed)
    overall = Counter(name for name in listing.splits if name in shares)
    divided = sum(name == "" or name in shares for name in listing.splits)
    for stratum in sorted(strata):
        count = taken[stratum]
        total = sum(map(len, strata[stratum])) + count.total()
        for position in rng.permutation(len(strata[stratum])):
            indices = strata[stratum][position]
            split = max(
                (name for name in shares if shares[name] > 0),
                key=lambda name: (
                    name == "train" and not count["train"],
                    shares[name] * total - count[name],
                    shares[name] * divided - overall[name],
                ),
            )
            count[split] += len(indices)
            overall[split] += len(indices)
            for i in indices:
                listing.splits[i] = split


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
