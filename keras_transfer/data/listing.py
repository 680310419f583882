"""Lists the images of DATA: a folder, a CSV file, digits or tensorflow-datasets."""

import contextlib
import csv
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_transfer.data.folders import (
    IMAGE_SUFFIXES,
    folder_entries,
    is_folder,
    may_be_image,
    walk_folder,
)
from keras_transfer.data.reading import Reader, read_files
from keras_transfer.data.tables import LABEL_SEPARATOR
from keras_transfer.errors import KerasTransferError, UsageError

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


@dataclass
class Listing:
    """The images that were found, before they are assigned to splits.

    Attributes:
        read: Reads the encoded bytes of sources.
        root: Folder that the sources are relative to; None if they are not files.
        sources: Identifier of each image: a path relative to the data, or an id.
        labels: Names of the classes that each image shows.
        splits: `train`, `val` or `test` for each image; "" if the data do not define
            it.
        groups: Group of each image; "" for none.
        class_names: Class names in the order of the outputs; None for the sorted
            labels.
        multi_label: Whether an image may show several classes, or none.
        warnings: One line for each problem in the data that the user should know about.
    """

    read: Reader
    root: Path | None = None
    sources: list[str] = field(default_factory=list)
    labels: list[tuple[str, ...]] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    class_names: list[str] | None = None
    multi_label: bool = False
    warnings: list[str] = field(default_factory=list)

    def add(
        self, source: str, labels: tuple[str, ...], split: str = "", group: str = ""
    ) -> None:
        """Adds an image; "" stands for an unknown split or no group."""
        self.sources.append(source)
        self.labels.append(labels)
        self.splits.append(split)
        self.groups.append(group)


def list_data(data: str, data_dir: Path | None, multi_label: bool = False) -> Listing:
    """Lists the images of DATA.

    Args:
        data: As in `loading.load`.
        data_dir: As in `loading.load`.
        multi_label: Whether to treat a CSV file as multi-label even if no row has
            several labels.

    Raises:
        UsageError: If DATA does not exist or is not in a supported form.
        KerasTransferError: If its layout or one of its rows is not valid.
    """
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
    """Maps the name of a folder or a table cell to a split; "" if it is not one."""
    return _SPLIT_OF.get(name.strip().lower().replace("-", "_").replace(" ", "_"), "")


def _list_folder(folder: Path) -> Listing:
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UsageError(f"DATA cannot be read. Received: {folder} (no permission).")
    listing = Listing(read=lambda paths: read_files(paths, folder), root=folder)
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


def _list_csv(file: Path, multi_label: bool) -> Listing:
    root = file.parent
    listing = Listing(read=lambda paths: read_files(paths, root), root=root)
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
        listing.add(source, names, split_name(file, line, row), row.get("group", ""))
    return listing


def read_table(file: Path) -> list[tuple[int, dict[str, str]]]:
    """Reads a CSV or TSV file that has the columns path and label.

    Args:
        file: The file; it is tab-separated if its first line contains a tab.

    Returns:
        (line number, cells by column name) for each line. Column names are stripped and
        in lower case. Cells are exactly as in the file, including spaces.

    Raises:
        UsageError: If the file cannot be read or parsed, a required column is missing,
            a column name is repeated, or a line has more cells than columns.
    """
    try:  # paths that are not valid UTF-8 must be preserved
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


def split_name(file: Path, line: int, row: dict[str, str]) -> str:
    """Returns the split in a row of a table; "" if the row has none.

    Args:
        file: The table, for the error message.
        line: Line number of the row, for the error message.
        row: Cells by column name.

    Raises:
        KerasTransferError: If the cell is not the name of a split.
    """
    name = row.get("split", "").strip()
    split = _split_of(name)
    if name and not split:
        raise KerasTransferError(
            f"{file}, line {line}: a split is train, val or test. Received: {name!r}."
        )
    return split


def _list_digits() -> Listing:
    """Lists scikit-learn's 1,797 scanned 8x8 digits, encoded as grayscale PNGs.

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
    listing = Listing(read=lambda names: ((name, encoded[name]) for name in names))
    for source, digit in zip(encoded, bunch.target, strict=True):
        listing.add(source, (str(digit),))
    return listing


def _list_tfds(name: str, data_dir: Path | None) -> Listing:
    """Lists a tensorflow-datasets data set; images stay encoded as they are stored."""
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

    listing = Listing(read=read)
    known_splits = [split for split in builder.info.splits if _split_of(split)]
    for split in known_splits:
        given = "" if len(known_splits) == 1 else _split_of(split)
        for source, _, label in stream(split):
            listing.add(source, (label_names[label],), given)
    present = {names[0] for names in listing.labels}
    listing.class_names = [label for label in label_names if label in present]
    return listing


def _tfds_builder(name: str, data_dir: Path | None) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # tfds raises many types for an unknown name
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
            "network, copy it there, and name its parent as data_dir."
        ) from None
    return builder


def _tfds_keys(builder: Any, name: str) -> tuple[str, str]:
    """Finds the feature keys of the image and the class label of an example."""
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
