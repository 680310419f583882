"""Tables of images with their labels, groups and splits."""

import hashlib
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from keras_transfer.data.reading import Reader
from keras_transfer.errors import KerasTransferError
from keras_transfer.runs.files import csv_text

if TYPE_CHECKING:
    import pyarrow as pa

SPLIT_NAMES = ("train", "val", "test")
LABEL_SEPARATOR = "|"

_INTEGER = re.compile(r"0|-?[1-9][0-9]{,17}", re.ASCII)

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


def split_of(name: str) -> str:
    """Maps the name of a folder or a table cell to a split; "" if it is not one."""
    return _SPLIT_OF.get(name.strip().lower().replace("-", "_").replace(" ", "_"), "")


def sorted_classes(names: Iterable[str]) -> list[str]:
    """Sorts the names of classes, each once.

    Integers are in numeric order if all names are integers as Python writes them, such
    as 10 or -1; otherwise names are in the order of text.
    """
    different = {*names}
    if all(map(_INTEGER.fullmatch, different)):
        return sorted(different, key=int)
    return sorted(different)


def splits_of(names: Sequence[str], place: Callable[[int], str]) -> list[str]:
    """Maps the cells of a column to splits; "" for an empty one.

    Args:
        names: The cells.
        place: Says where the cell of a row, which is counted from 0, is found.

    Raises:
        KerasTransferError: If a cell is not the name of a split.
    """
    found = {name: split_of(name) for name in {*names}}
    for row, name in enumerate(names):
        if not found[name] and name.strip():
            raise KerasTransferError(
                f"{place(row)}: a split is train, val or test. Received: "
                f"{name.strip()!r}."
            )
    return [found[name] for name in names]


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
        class_names: Class names in the order of the outputs; None for that of
            `sorted_classes`.
        multi_label: Whether an image may show several classes, or none.
        warnings: One line for each problem in the data that the user should know about.
        sample_weight: Weight of each image in the loss; None for equal weights.
        extra: Further columns of the data, with a row for each image; None for none.
        positions: Position of each image in the data; None if the listing has the order
            of the data.
        mistake: What is wrong with splits or weights, which are then left out. It is
            raised where they are used, but not where all images are evaluated.
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
    sample_weight: Sequence[float] | None = None
    extra: "pa.Table | None" = None
    positions: Sequence[int] | None = None
    mistake: KerasTransferError | None = None

    def add(
        self, source: str, labels: tuple[str, ...], split: str = "", group: str = ""
    ) -> None:
        """Adds an image; "" stands for an unknown split or no group."""
        self.sources.append(source)
        self.labels.append(labels)
        self.splits.append(split)
        self.groups.append(group)

    def classes(self) -> list[str]:
        """Returns the names of all classes in the order of the outputs."""
        return self.class_names or sorted_classes(
            name for labels in self.labels for name in labels
        )


@dataclass(frozen=True)
class Table:
    """The images of one split.

    Attributes:
        sources: Identifier of each image: a path relative to the data, or an id.
        targets: int64 `[N]` indices into the class names; for multi-label data, uint8
            `[N, num_classes]` with 1 where the class is present.
        groups: Group of each image (such as a patient or a burst of photos); "" for
            none.
        sample_weight: float32 `[N]` weights of the images in the loss; None for equal
            weights.
    """

    sources: tuple[str, ...]
    targets: np.ndarray
    groups: tuple[str, ...]
    sample_weight: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.sources)

    def keep(self, sources: Iterable[str]) -> "Table":
        """Returns a table with only the given images."""
        wanted = set(sources)
        return self.select(np.array([x in wanted for x in self.sources], bool))

    def select(self, rows: np.ndarray) -> "Table":
        """Returns a table of the images with the given indices or mask, in order."""
        picked = np.arange(len(self))[rows]
        return Table(
            tuple(self.sources[i] for i in picked),
            self.targets[picked],
            tuple(self.groups[i] for i in picked),
            None if self.sample_weight is None else self.sample_weight[picked],
        )

    def joined(self, other: "Table") -> "Table":
        """Returns a table of these images and then those of another split."""
        weights = [
            x.sample_weight for x in (self, other) if x.sample_weight is not None
        ]
        return Table(
            self.sources + other.sources,
            np.concatenate([self.targets, other.targets]),
            self.groups + other.groups,
            np.concatenate(weights) if weights else None,
        )


@dataclass(frozen=True)
class Extra:
    """Columns of the data that are neither path, label, split, group nor weight.

    Attributes:
        rows: Row of the table for each source.
        table: The columns, for reports.
    """

    rows: Mapping[str, int]
    table: "pa.Table"


@dataclass(frozen=True)
class Splits:
    """Labeled images divided into train and test.

    Attributes:
        train: Images to train on.
        val: Training images that fine-tuning set aside, or images that a run of version
            0.1.0 chose its model with; otherwise empty.
        test: Images for the final metrics; may be empty.
        class_names: Class names in the order of the model's outputs.
        multi_label: Whether an image may show several classes, or none.
        read: Reads the encoded bytes of the sources given to it.
        warnings: One line for each problem in the data that the user should know about.
        root: Folder that the sources are relative to; None if they are not files.
        extra: Further columns of the data, by source; None for none.
    """

    train: Table
    val: Table
    test: Table
    class_names: tuple[str, ...]
    multi_label: bool
    read: Reader
    warnings: tuple[str, ...]
    root: Path | None = None
    extra: "Extra | None" = None

    def items(self) -> Iterator[tuple[str, Table]]:
        """Yields (split name, table) for train, val and test."""
        for name in SPLIT_NAMES:
            yield name, getattr(self, name)

    def class_counts(self) -> dict[str, dict[str, int]]:
        """Counts the images by split and class name."""
        counts = {}
        for name, table in self.items():
            of_class = count_classes(table.targets, len(self.class_names)).tolist()
            counts[name] = dict(zip(self.class_names, of_class, strict=True))
        return counts

    def absent_classes(self) -> list[str]:
        """Returns one line for each non-empty split that lacks some classes."""
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
        """Returns one line for each pair of splits with images that share a key.

        Args:
            keys: Keys by source; a source may have none.
            what: Verb phrase for the line, which starts like "3 of 10 test images".
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
        """Returns splits with only the given images."""
        kept = set(sources)
        return replace(
            self,
            train=self.train.keep(kept),
            val=self.val.keep(kept),
            test=self.test.keep(kept),
        )

    def relabel(self, class_names: Sequence[str]) -> "Splits":
        """Returns splits whose targets refer to another list of class names.

        Raises:
            KerasTransferError: If an image shows a class that is not in the list.
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
        """Formats splits.csv: path,label,split,group[,sample_weight], a line each."""
        header = ("path", "label", "split", "group")
        is_weighted = self.train.sample_weight is not None
        rows = (
            (source, self.label(target), name, group, *weight)
            for name, table in self.items()
            for source, target, group, weight in zip(
                table.sources,
                table.targets,
                table.groups,
                [()] * len(table)
                if table.sample_weight is None
                else [(str(weight),) for weight in table.sample_weight],
                strict=True,
            )
        )
        return csv_text((*header, "sample_weight") if is_weighted else header, rows)

    def fingerprint(self, digests: Mapping[str, bytes]) -> str:
        """Computes the SHA-256 over split, name, bytes and labels of every image.

        Args:
            digests: SHA-256 of each image's bytes, by source.
        """
        digest = hashlib.sha256()
        for name, table in self.items():
            for source, target in zip(table.sources, table.targets, strict=True):
                row = (name, source, digests[source].hex(), self.label(target))
                digest.update("\0".join(row).encode(errors="surrogateescape") + b"\n")
        return digest.hexdigest()

    def label(self, target: np.ndarray) -> str:
        """Formats an image's target; see `label_text`."""
        return label_text(target, self.class_names)


def label_text(
    target: np.ndarray, class_names: Sequence[str], separator: str = LABEL_SEPARATOR
) -> str:
    """Formats an image's target: class names joined as in a data file, or otherwise."""
    indices = np.flatnonzero(target).tolist() if target.ndim else [int(target)]
    return separator.join(class_names[i] for i in indices)


def one_hot(targets: np.ndarray, num_classes: int) -> np.ndarray:
    """Converts single- or multi-label targets to float32 `[N, num_classes]`."""
    if targets.ndim == 2:
        return targets.astype(np.float32)
    encoded = np.zeros((len(targets), num_classes), np.float32)
    encoded[np.arange(len(targets)), targets] = 1
    return encoded


def count_classes(targets: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts how many images show each class, as int64 `[num_classes]`."""
    if targets.ndim == 2:
        return targets.sum(0, dtype=np.int64)
    return np.bincount(targets, minlength=num_classes)


@dataclass(frozen=True)
class Prediction:
    """A model's prediction for one image.

    Attributes:
        source: The image's path, or its id in the data.
        probabilities: float32 `[num_classes]` in the range 0 to 1; None if the image is
            unusable.
        error: Why the image is unusable; "" if it is usable.
        classes: Names of the predicted classes, most likely first: the most likely
            one, or for multi-label data those that reach their thresholds, if any.
        sure: Whether the largest probability reaches the run's threshold; None if it
            has none.
        far: Whether the image is far from the training images; None if unknown.
    """

    source: str
    probabilities: np.ndarray | None
    error: str = ""
    classes: tuple[str, ...] = ()
    sure: bool | None = None
    far: bool | None = None


@dataclass(frozen=True)
class Predictions:
    """Predictions of a model for images, made as they are asked for.

    Attributes:
        class_names: Class names in the order of the probabilities.
        columns: Those attributes of a `Prediction` that are shown beside the most
            likely classes: `classes` for multi-label data, `sure` with a threshold,
            `far` if that can be told.
        total: Number of images.
        rows: One prediction per image, in order.
    """

    class_names: Sequence[str]
    columns: tuple[str, ...]
    total: int
    rows: Iterator[Prediction]
