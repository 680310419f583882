"""Which columns of a table are the paths, labels, splits, groups and weights."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from keras_transfer.config import USUAL_NAMES, ListingConfig
from keras_transfer.data.cells import Cells, check_repeated
from keras_transfer.data.tables import split_of
from keras_transfer.errors import UsageError

SAMPLE_WEIGHT = "sample_weight"
"""Name of the column with the weights of the images in the loss."""

_REQUIRED = ("path", "label")
_INDEX = re.compile(r"__index_level_\d+__")  # what pandas calls an index without name
_MOST_SHOWN = 8  # columns in a message, of up to thousands


@dataclass(frozen=True)
class Columns:
    """Indices of a table's columns.

    Attributes:
        path: Paths of the images.
        label: Labels of the images.
        split: Splits of the images; None without.
        group: Groups of the images; None without.
        sample_weight: Weights of the images in the loss; None without.
        further: Columns that are only kept.
        notes: One line for each thing about the choice that the user should know.
    """

    path: int
    label: int
    split: int | None
    group: int | None
    sample_weight: int | None
    further: tuple[int, ...]
    notes: tuple[str, ...]


def known_names(options: ListingConfig) -> set[str]:
    """Returns all names in lower case by which columns are found."""
    names = {name for names in USUAL_NAMES.values() for name in names} | {SAMPLE_WEIGHT}
    given = (_option(options, role) for role in USUAL_NAMES)
    return names | {name.strip().lower() for name in given if name}


def find_columns(
    cells: Cells, options: ListingConfig, usual: ListingConfig | None = None
) -> Columns:
    """Finds the columns by the names in the options, or else by usual names.

    A column is for one thing: one that is chosen by a name is no longer found by
    another.

    Args:
        cells: The table.
        options: Names of columns that must be there.
        usual: Names that are used if the table has them and the options name no other.
            They go before the names that columns are otherwise found by.

    Raises:
        UsageError: If a column is missing, named twice, could be one of several, or
            holds values that cannot be what it is for.
    """
    chosen = _named(cells, options)
    if usual:
        _add_usual(cells, usual, chosen)
    candidates = {
        role: [i for i in _candidates(cells, role) if i not in chosen.values()]
        for role in USUAL_NAMES
        if role not in chosen
    }
    for role in _REQUIRED:
        if role not in chosen and not candidates[role]:
            raise _missing(cells, role, chosen)
    check_repeated(cells)
    notes: list[str] = []
    for role, found in candidates.items():
        if role == "split":
            found, notes = _real_splits(cells, found)
        if len(found) > 1:
            raise _ambiguous(cells, role, found)
        if found:
            chosen[role] = found[0]
    for column, name in enumerate(cells.names):
        if name.lower() == SAMPLE_WEIGHT and column not in chosen.values():
            first = chosen.setdefault(SAMPLE_WEIGHT, column)
            if first != column:
                raise _ambiguous(cells, SAMPLE_WEIGHT, (first, column))
    for role, column in chosen.items():
        _check_kind(cells, role, column)
    others = [
        i
        for i, name in enumerate(cells.names)
        if name and i not in chosen.values() and not _INDEX.fullmatch(name)
    ]
    further = tuple(i for i in others if cells.is_keepable(i))
    return Columns(
        path=chosen["path"],
        label=chosen["label"],
        split=chosen.get("split"),
        group=chosen.get("group"),
        sample_weight=chosen.get(SAMPLE_WEIGHT),
        further=further,
        notes=(*_told(cells, chosen, others), *notes),
    )


def _option(options: ListingConfig, role: str) -> str | None:
    name: str | None = getattr(options, f"{role}_column")
    return name


def _named(cells: Cells, options: ListingConfig) -> dict[str, int]:
    """Finds the columns that the options name, by role."""
    chosen: dict[str, int] = {}
    for role in USUAL_NAMES:
        name = _option(options, role)
        if name is None:
            continue
        found = _matching(cells, name)
        if not found:
            near = difflib.get_close_matches(name, filter(None, cells.names), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(
                f"{cells.place} has no such column. Received: {_choice(role, name)}."
                f"{hint} Its columns are {_listed(cells.names)}."
            )
        if len(found) > 1 and len({cells.names[i] for i in found}) > 1:
            raise _ambiguous(cells, role, found)
        for other, column in chosen.items():
            if column == found[0]:
                raise UsageError(
                    f"A column is for one thing. Received: {_choice(other, name)} and "
                    f"{_choice(role, name)}. Name another for one of them."
                )
        chosen[role] = found[0]
    return chosen


def _matching(cells: Cells, name: str) -> list[int]:
    """Finds columns by a name: exactly, or else in any case."""
    name = name.strip()
    exact = [i for i, other in enumerate(cells.names) if other == name]
    return exact or [
        i for i, other in enumerate(cells.names) if other.lower() == name.lower()
    ]


def _add_usual(cells: Cells, usual: ListingConfig, chosen: dict[str, int]) -> None:
    """Adds the columns that have the name of another table, where there is one."""
    for role in USUAL_NAMES:
        name = _option(usual, role)
        if name is None or role in chosen:
            continue
        found = [i for i in _matching(cells, name) if i not in chosen.values()]
        if len(found) == 1 and _suits(cells, role, found[0]):
            chosen[role] = found[0]


def _candidates(cells: Cells, role: str) -> list[int]:
    """Finds the columns that could be for a role by their names and values."""
    named = [
        i for i, name in enumerate(cells.names) if name.lower() in USUAL_NAMES[role]
    ]
    suited = [i for i in named if _suits(cells, role, i)]
    return suited or (named if role in _REQUIRED else [])


def _suits(cells: Cells, role: str, column: int) -> bool:
    return cells.kind(column) in ("text", "list" if role == "label" else "text")


def _real_splits(cells: Cells, found: Sequence[int]) -> tuple[list[int], list[str]]:
    """Leaves out columns with other values than splits, such as numbers of folds.

    A column called `split` is one whatever it holds, so that a mistake is an error.

    Returns:
        (columns, one line for each that was left out).
    """
    real, notes = [], []
    for column in found:
        names = {*cells.text(column)} - {""}
        other = min((name for name in names if not split_of(name)), default="")
        if other and cells.names[column].lower() != "split":
            notes.append(
                f"Column {cells.names[column]!r} is not used as the split: a split is "
                f"train, val or test. Received: {other!r}."
            )
        else:
            real.append(column)
    return real, notes


def _check_kind(cells: Cells, role: str, column: int) -> None:
    if _suits(cells, role, column):
        return
    what, fix = "text or numbers", "Remove or convert it."
    if role == "path":
        what = "paths of image files"
        fix = "Write the images to files, and name the column with their paths: "
    if role in USUAL_NAMES:
        fix = fix.removesuffix("Remove or convert it.") + f"{role}_column=NAME."
        fix = fix if role == "path" else f"Name another with {fix}"
    raise UsageError(
        f"{cells.place}: column {cells.names[column]!r} holds no {what}. Received: "
        f"{cells.type_name(column)}. {fix}"
    )


def _missing(cells: Cells, role: str, chosen: dict[str, int]) -> UsageError:
    *names, last = USUAL_NAMES[role]
    taken = [
        f"{cells.names[column]!r}, the {other}"
        for other, column in chosen.items()
        if cells.names[column].lower() in USUAL_NAMES[role]
    ]
    beside = f" beside {' and '.join(taken)}" if taken else ""
    header = ",".join(cells.names)
    header = header if len(header) <= 80 else f"{header[:80]}..."
    return UsageError(
        "A table of images starts with the names of its columns, such as path,label. "
        f"Received: {cells.place}, which starts with {header!r} and has no column "
        f"{', '.join(names)} or {last}{beside}. Name the column of the {role}s with "
        f"{role}_column=NAME."
    )


def _ambiguous(cells: Cells, role: str, found: Sequence[int]) -> UsageError:
    names = [cells.names[i] for i in found]
    fix = f"Choose one with {_choice(role, names[0])}."
    if role == SAMPLE_WEIGHT:
        fix = "Remove or rename all but one."
    return UsageError(
        f"{len(names)} columns could be the {role}. Received: {cells.place} with "
        f"{_listed(names)}. {fix}"
    )


def _choice(role: str, name: str) -> str:
    """Formats an option as in a call."""
    return f"{role}_column={name if name.isidentifier() else repr(name)}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_MOST_SHOWN])
    rest = len(names) - _MOST_SHOWN
    return f"{shown} and {rest:,} more" if rest > 0 else shown


def _told(
    cells: Cells, chosen: dict[str, int], others: Sequence[int]
) -> tuple[str, ...]:
    """Says in one line what became of the columns, unless that goes without saying."""
    roles = [role for role in (*USUAL_NAMES, SAMPLE_WEIGHT) if role in chosen]
    names = {role: cells.names[chosen[role]] for role in roles}
    if not others and all(
        role in USUAL_NAMES and name.lower() == role for role, name in names.items()
    ):
        return ()
    taken = ", ".join(f"{name!r} is the {role}" for role, name in names.items())
    line = f"Of the columns, {taken}"
    for is_kept, words in ((True, "kept for reports"), (False, "not kept")):
        found = [cells.names[i] for i in others if cells.is_keepable(i) == is_kept]
        line += f"; {words}: {_listed(found)}" if found else ""
    return (f"{line}.",)
