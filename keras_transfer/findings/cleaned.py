"""A cleaned table of DATA, which `kt fit` reads in place of DATA.

It has the rows of DATA, in order, without files that cannot be read or decoded, and
without images that are byte for byte copies of another with the same labels. Images
that a finding is about are marked, not dropped: whether they belong is for people to
say. Copies and near duplicates get one group, so that they are never divided between
splits.

Where DATA or a splits file say what is tested on, these splits are kept as far as
possible: of equal files the one in the test split stays, and an image that is a copy or
a near duplicate of a test image is tested on too. So the test images stay comparable,
and none of them has been learned from.
"""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from keras_transfer.config import USUAL_NAMES
from keras_transfer.data.columns import SAMPLE_WEIGHT
from keras_transfer.data.tables import LABEL_SEPARATOR, Listing
from keras_transfer.findings.finding import Finding, counted
from keras_transfer.findings.groups import united_groups
from keras_transfer.findings.images import AuditedImages
from keras_transfer.runs.files import SUSPECT, csv_text

_KEPT_FIRST = ("test", "val", "train", "")  # splits, of equal files
_TAKEN = {name for names in USUAL_NAMES.values() for name in names}
_TAKEN |= {SAMPLE_WEIGHT, SUSPECT}


@dataclass(frozen=True)
class Cleaned:
    """A cleaned table and what was changed in it.

    Attributes:
        text: The text of a CSV file: path,label[,split],group[,sample_weight],suspect
            and further columns of DATA.
        rows: Number of images in it.
        dropped: Number of copies that are left out.
        unusable: Number of files that are left out because they cannot be read or
            decoded.
        moved: Number of training images that are tested on, being near duplicates.
        marked: Number of images with a finding.
        groups: Number of groups of copies and near duplicates.
    """

    text: str
    rows: int
    dropped: int
    unusable: int
    moved: int
    marked: int
    groups: int

    def __str__(self) -> str:
        unusable = f" and {self.unusable:,} unusable" if self.unusable else ""
        moved = f", {self.moved:,} moved to the test split" if self.moved else ""
        return (
            f"{counted(self.rows, 'image')}: {counted(self.dropped, 'copy', 'copies')}"
            f"{unusable} left out{moved}, {counted(self.groups, 'group')} of copies "
            f"kept together, {self.marked:,} marked"
        )


def cleaned_table(
    listing: Listing,
    images: AuditedImages,
    copies: np.ndarray,
    findings: Iterable[Finding],
    folder: Path,
) -> Cleaned:
    """Builds the cleaned table of DATA.

    Args:
        listing: All images of DATA, with the splits that are defined.
        images: The usable ones of them, N.
        copies: int64 `[N]`, equal for copies and near duplicates of one another.
        findings: What was found.
        folder: Absolute path of the table's folder: paths of images below it are
            relative to it, others absolute.
    """
    row_of = {source: row for row, source in enumerate(listing.sources)}
    usable = [row_of[source] for source in images.table.sources]
    numbers = len(images) + np.arange(len(listing.sources))  # each by itself
    numbers[usable] = np.unique(copies, return_inverse=True)[1]
    digests = dict(zip(usable, images.digests, strict=True))
    dropped = _copies_to_drop(listing, digests)
    splits, moved = _honest_splits(listing.splits, numbers)
    suspects = _kinds(listing, findings)
    kept = [row for row in sorted(usable) if row not in dropped]
    groups = united_groups(listing.groups, numbers, kept)
    names = ["path", "label", "group"]
    columns: list[Sequence[object]] = [
        _paths(listing, folder),
        [LABEL_SEPARATOR.join(labels) for labels in listing.labels],
        groups,
    ]
    if any(splits):
        names.insert(2, "split")
        columns.insert(2, splits)
    if listing.sample_weight is not None:
        names.append(SAMPLE_WEIGHT)
        columns.append(listing.sample_weight)
    names.append(SUSPECT)
    columns.append(["; ".join(suspects[row]) for row in range(len(numbers))])
    for name, values in _further(listing):
        names.append(name)
        columns.append(values)
    text = csv_text(names, ([column[row] for column in columns] for row in kept))
    sizes = Counter(numbers[kept].tolist())
    return Cleaned(
        text=text,
        rows=len(kept),
        dropped=len(dropped),
        unusable=len(numbers) - len(usable),
        moved=len(moved - dropped),
        marked=sum(bool(suspects[row]) for row in kept),
        groups=sum(size > 1 for size in sizes.values()),
    )


def count_marked(file: Path) -> int:
    """Counts the images with a finding in a cleaned table that was written."""
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
        return sum(bool(row[SUSPECT]) for row in csv.DictReader(lines))


def _copies_to_drop(listing: Listing, digests: dict[int, bytes]) -> set[int]:
    """Returns rows whose bytes and labels are those of another row, which is kept."""
    same = defaultdict(list)
    for row in sorted(digests):
        same[digests[row], frozenset(listing.labels[row])].append(row)
    dropped: set[int] = set()
    for rows in same.values():
        rows.sort(key=lambda row: (_KEPT_FIRST.index(listing.splits[row]), row))
        dropped.update(rows[1:])
    return dropped


def _honest_splits(
    splits: Sequence[str], numbers: np.ndarray
) -> tuple[list[str], set[int]]:
    """Moves copies of test images from other splits to the test split.

    Without a test split, that is the validation split, which is tested on. Images
    without a split follow their group when they are assigned to one.

    Returns:
        (split of each row, rows that were moved).
    """
    judged = "test" if "test" in splits else "val"  # see `splitting`
    tested = {
        number for number, split in zip(numbers, splits, strict=True) if split == judged
    }
    moved = {
        row
        for row, split in enumerate(splits)
        if split not in ("", judged) and numbers[row] in tested
    }
    return [judged if row in moved else x for row, x in enumerate(splits)], moved


def _kinds(
    listing: Listing, findings: Iterable[Finding]
) -> defaultdict[int, list[str]]:
    """Returns the kinds of the findings of each row, each once."""
    kinds: dict[str, dict[str, None]] = defaultdict(dict)
    for found in findings:
        for one in found.suspects:
            kinds[one.path][found.kind] = None
    rows: defaultdict[int, list[str]] = defaultdict(list)
    for row, source in enumerate(listing.sources):
        if source in kinds:
            rows[row] = [*kinds[source]]
    return rows


def _paths(listing: Listing, folder: Path) -> list[str]:
    assert listing.root is not None
    paths = []
    for source in listing.sources:
        path = listing.root.absolute() / source
        if path.is_relative_to(folder):
            path = path.relative_to(folder)
        text = path.as_posix()
        # Where tables are read, spaces around cells are removed and ~ is the home.
        if text != text.lstrip() or text.startswith("~"):
            text = f"./{text}"
        paths.append(text if text == text.rstrip() else f"{text}/.")
    return paths


def _further(listing: Listing) -> Iterable[tuple[str, list[object]]]:
    """Yields the further columns of DATA, named so that they stay further ones.

    A column `suspect`, such as that of an earlier cleaned table, is replaced.
    """
    if listing.extra is None:
        return
    taken = {*_TAKEN}
    for name in listing.extra.column_names:
        if name.strip().lower() == SUSPECT:
            continue
        free = name
        while free.strip().lower() in taken:
            free = f"table_{free}"
        taken.add(free.strip().lower())
        values = listing.extra[name].to_pylist()
        yield free, ["" if value is None else value for value in values]
