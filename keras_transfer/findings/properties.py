"""What is known of images besides what they show: their files, folders and columns."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa

from keras_transfer.data.quality import FILE_TYPES
from keras_transfer.data.tables import split_of
from keras_transfer.findings.images import FEWEST_IMAGES, AuditedImages
from keras_transfer.runs.files import SUSPECT

Nature = Literal["file", "content", "folder", "name", "column"]
"""Where a property comes from. What is shown has no part in how a file was made
(`file`), but may be the reason for brightness and the like (`content`). Models do not
see folders, names and columns, which tell where images come from."""

FEWEST_OF_VALUE = 10
"""Images that a value needs to count; rarer values count as one."""

MOST_VALUES = 50
"""Columns and folders with more values tell patients or objects apart, not sources."""

_FEW_NUMBERS = 10  # whole numbers that are names, such as 1 to 3 for hospitals
_MOST_LEVELS = 3  # of folders
_TOKEN = re.compile(r"[^\W_]+")
_SOURCE_WORDS = re.compile(
    r"\b(?:(?:data|image)?source|site|hospital|cent(?:er|re)|clinic|institut\w*"
    r"|scanner|camera|device|maker|manufacturer|vendor|machine|station|data ?set"
    r"|collection|origin|lab|country|city|photographer|project|stud(?:y|ie))"
    r"(?:s|ids?|names?|codes?)?\b",
    re.IGNORECASE,
)
_BETWEEN_WORDS = re.compile(
    r"[\W_]+|(?<=[a-z])(?=[A-Z\d])|(?<=[A-Z])(?=[A-Z][a-z]|\d)"
)  # as in study_id, StudyID, MRIScanner and site2
_ID_WORDS = re.compile(r"(?:.*_)?(?:id|idx|index|number|no|unnamed: ?\d+)", re.I)


@dataclass(frozen=True, eq=False)
class Property:
    """A property of N images from which one may try to tell the class.

    Attributes:
        name: What it is, to follow "told from", such as `the file type`.
        nature: Where it comes from.
        values: float64 `[N, K]` numbers; or int64 `[N]` values of a category, -1 for
            one that is rare.
        is_known: bool `[N]`, whether the image has it.
        labels: Names of a category's values (for the nature `name`, a file name of each
            form); of numbers, their names.
        advice: What to do about it, a sentence.
    """

    name: str
    nature: Nature
    values: np.ndarray
    is_known: np.ndarray
    labels: tuple[str, ...]
    advice: str = ""

    @property
    def is_category(self) -> bool:
        """Whether the values have no order."""
        return self.values.ndim == 1

    @property
    def is_source(self) -> bool:
        """Whether its name says that it tells where an image comes from."""
        return _SOURCE_WORDS.search(_BETWEEN_WORDS.sub(" ", self.name)) is not None


def category(
    name: str,
    nature: Nature,
    values: Sequence[str | None],
    advice: str = "",
    most: int | None = None,
) -> Property | None:
    """Creates a property of texts; None stands for images without it.

    Args:
        name: What it is.
        nature: Where it comes from.
        values: The text of each image.
        advice: What to do about it.
        most: Largest number of values that make a category; None to leave out the
            rarest ones instead.

    Returns:
        The property; None if it is the same for all images, of fewer than 30 images, or
        (almost) another one for each.
    """
    counts = Counter(value for value in values if value is not None)
    frequent = [x for x, count in counts.most_common() if count >= FEWEST_OF_VALUE]
    rare = counts.total() - sum(counts[value] for value in frequent)
    if counts.total() < FEWEST_IMAGES or rare > counts.total() / 2:
        return None
    if len(frequent) + (rare > 0) < 2 or (most is not None and len(frequent) > most):
        return None
    frequent = frequent[:MOST_VALUES]
    place = {value: index for index, value in enumerate(frequent)}
    return Property(
        name,
        nature,
        np.array([place.get(x, -1) if x is not None else -1 for x in values], np.int64),
        np.array([value is not None for value in values]),
        tuple(frequent),
        advice,
    )


def numbers(
    name: str, nature: Nature, columns: dict[str, np.ndarray], advice: str = ""
) -> Property | None:
    """Creates a property of numbers; images with one that is not finite lack it.

    Args:
        name: What it is.
        nature: Where it comes from.
        columns: float64 `[N]` numbers by name.
        advice: What to do about it.

    Returns:
        The property; None if it is the same for all images, or of fewer than 30.
    """
    values = np.stack([*columns.values()], 1).astype(np.float64)
    is_known = np.asarray(np.isfinite(values).all(1))
    known = values[is_known]
    if len(known) < FEWEST_IMAGES or (known == known[0]).all():
        return None
    return Property(name, nature, values, is_known, tuple(columns), advice)


def file_properties(images: AuditedImages) -> list[Property]:
    """Returns what is known of the images' files and pixels, if it was measured."""
    rows = images.quality
    unknown = rows["bytes"] == 0

    def measured(name: str) -> np.ndarray:
        return np.where(unknown, np.nan, rows[name].astype(np.float64))

    width, height = measured("width"), measured("height")
    shape = width / np.maximum(height, 1)
    quality = np.where(rows["jpeg_quality"] == 0, np.nan, measured("jpeg_quality"))
    types = [
        None if is_unknown else FILE_TYPES[index]
        for index, is_unknown in zip(
            rows["file_type"].tolist(), unknown.tolist(), strict=True
        )
    ]
    gray = [
        None if is_unknown else "gray" if is_gray else "color"
        for is_gray, is_unknown in zip(
            rows["is_gray"].tolist(), unknown.tolist(), strict=True
        )
    ]
    alike = "Collect all classes from the same sources"
    found = (
        numbers(
            "the size of the image",
            "file",
            {"width": width, "height": height, "width by height": shape},
            f"{alike}, or crop all alike.",
        ),
        category(
            "the file type",
            "file",
            types,
            f"{alike}; saving all in one format leaves traces.",
        ),
        numbers(
            "the JPEG quality",
            "file",
            {"JPEG quality": quality},
            f"{alike}; saving all alike leaves traces.",
        ),
        category(
            "color or grayscale",
            "file",
            gray,
            f"{alike}, or make all gray.",
        ),
        numbers("the file size", "content", {"bytes": measured("bytes")}),
        *(
            numbers(f"the {name}", "content", {name: measured(name)})
            for name in ("brightness", "contrast", "sharpness")
        ),
    )
    return [one for one in found if one is not None]


def path_properties(images: AuditedImages) -> list[Property]:
    """Returns what folders and the form of file names say; nothing without paths.

    Folders called like a class or a split are left out, as is a class's name within the
    name of a file: they are how the label is written down.
    """
    if not images.is_file:
        return []
    classes = {name.casefold() for name in images.class_names}
    paths = [PurePosixPath(source) for source in images.table.sources]
    folders = [
        [x for x in path.parts[:-1] if x.casefold() not in classes and not split_of(x)]
        for path in paths
    ]
    has_class = any(
        part.casefold() in classes for path in paths for part in path.parts[:-1]
    )
    found: list[Property] = []
    for level in range(min(max(map(len, folders), default=0), _MOST_LEVELS)):
        values = [parts[level] if level < len(parts) else "" for parts in folders]
        one = category("the folder", "folder", values, most=MOST_VALUES)
        # Folders within those of classes are subclasses, unless classes share them.
        if one is not None and not (has_class and goes_with_class(one, images)):
            found.append(one)
    names = sorted(classes, key=len, reverse=True)
    within = re.compile("|".join(map(re.escape, names)))
    shapes = [_shape(within.sub("", path.stem.casefold())) for path in paths]
    one = category("the form of the file name", "name", shapes)
    if one is None:
        return found
    examples = {x: path.name for x, path in zip(shapes, paths, strict=True)}
    return [*found, replace(one, labels=tuple(examples[x] for x in one.labels))]


def _shape(name: str) -> str:
    """Writes a name with 0 for digits, a for letters and x for a mix of both."""
    return _TOKEN.sub(
        lambda found: "0" if found[0].isdigit() else "a" if found[0].isalpha() else "x",
        name,
    )


def column_properties(images: AuditedImages) -> list[Property]:
    """Returns the further columns of the data that hold few texts, or numbers.

    Columns that name each image, those that repeat the label, and the one in which
    `cleaned_table` marks suspects are left out.
    """
    if images.extra is None:
        return []
    columns = zip(images.extra.column_names, images.extra.columns, strict=True)
    found = (
        _column(name, cells, {*images.class_names})
        for name, cells in columns
        if name.strip().lower() != SUSPECT
    )
    return [one for one in found if one is not None]


def _column(name: str, cells: pa.ChunkedArray, classes: set[str]) -> Property | None:
    shown = f"the column {name!r}"
    if pa.types.is_dictionary(cells.type):
        cells = cells.cast(cells.type.value_type)
    if _is_date(cells.type):
        cells = cells.cast(pa.int32() if cells.type.bit_width == 32 else pa.int64())
    if _is_number(cells.type):
        values = np.array(
            [np.nan if x is None else float(x) for x in cells.to_pylist()], np.float64
        )
        return _number_column(name, shown, values)
    if not _is_text(cells.type):
        return None
    try:
        texts = [None if x is None else str(x).strip() for x in cells.to_pylist()]
    except UnicodeDecodeError:
        return None
    if {x for x in texts if x} <= classes:  # the label once more
        return None
    return category(shown, "column", texts, most=MOST_VALUES)


def _number_column(name: str, shown: str, values: np.ndarray) -> Property | None:
    known = values[np.isfinite(values)]
    is_whole, different = bool((known == known.round()).all()), len(np.unique(known))
    if is_whole and different <= _FEW_NUMBERS:
        texts = [f"{x:.0f}" if np.isfinite(x) else None for x in values.tolist()]
        return category(shown, "column", texts)
    # A number for each image is its name; those of a class may follow one another.
    if is_whole and (different == len(known) or _ID_WORDS.fullmatch(name.strip())):
        return None
    return numbers(shown, "column", {name: values})


def _is_date(kind: pa.DataType) -> bool:
    return pa.types.is_date(kind) or pa.types.is_timestamp(kind)


def _is_number(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or kind == pa.bool_()


def goes_with_class(one: Property, images: AuditedImages) -> bool:
    """Returns whether each frequent value of a category occurs in a single class."""
    if not one.is_category or images.multi_label:
        return False
    for value in range(len(one.labels)):
        targets = images.table.targets[one.values == value]
        if len(targets) and (targets != targets[0]).any():
            return False
    return True
