"""Labels that are given as arrays: indices, names, one-hot or several to an image."""

import math
import reprlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keras_transfer.data.in_memory.pixels import described
from keras_transfer.data.tables import sorted_classes
from keras_transfer.data.weights import check_weights
from keras_transfer.errors import KerasTransferError, UsageError

_TAKEN = (
    "Labels are one integer or string for each image, or 0 and 1 for each image and "
    "class."
)
_MOST_WHOLE = 2**53  # from which floats no longer tell integers apart


@dataclass(frozen=True)
class ClassLabels:
    """The classes of images.

    Attributes:
        of_image: Names of the classes that each image shows.
        class_names: Names of the classes that some image shows, in order.
        multi_label: Whether an image may show several classes, or none.
        warnings: One line for each oddity that the user should know about.
    """

    of_image: list[tuple[str, ...]]
    class_names: list[str]
    multi_label: bool
    warnings: list[str]


def read_labels(
    y: np.ndarray, names: Sequence[str] | None = None, multi_label: bool = False
) -> ClassLabels:
    """Reads labels.

    Args:
        y: `[N]` or `[N, 1]` integers, whole floats, strings, bytes or booleans, which
            name a class each; or `[N, K]` of 0 and 1, for K classes. If each row of the
            latter has exactly one 1, it is one-hot, else multi-label. N is at least 1.
        names: Names of the classes by index; None names them by their integers. They do
            not apply to strings.
        multi_label: Whether to treat `[N, K]` as multi-label even if it is one-hot.

    Returns:
        The labels, with classes in the order of `names` or of `sorted_classes`.

    Raises:
        UsageError: If the labels have another shape or dtype.
        KerasTransferError: If a label is not valid, or two of `names` are the same.
    """
    given = described(y)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim not in (1, 2) or not y.size:
        raise UsageError(f"{_TAKEN} Received: labels of {given}.")
    y = _plain(y, given)
    if names is not None and len({*names} - {""}) < len(names):
        raise KerasTransferError(
            f"Names of classes are different, and not empty. Received: class_names "
            f"{reprlib.repr([*names])}."
        )
    if y.ndim == 2:
        return _read_binary(y, given, names, multi_label)
    if y.dtype.kind == "f":
        is_whole = (np.abs(y) < _MOST_WHOLE) & (y == np.round(y))
        if not is_whole.all():
            _refuse(y, ~is_whole, given)
        y = y.astype(np.int64)
    if names is not None and y.dtype.kind in "iub":
        return _read_indices(y, names, multi_label)
    values, indices = np.unique(y, return_inverse=True)
    of_value = [str(value) for value in values.tolist()]
    if "" in of_value:
        row = int(np.argmax(indices == of_value.index("")))
        raise KerasTransferError(f"A label is not empty. Received: '' for image {row}.")
    of_image = _singles(of_value, indices)
    return ClassLabels(of_image, sorted_classes(of_value), multi_label, [])


def _singles(of_value: Sequence[str], indices: np.ndarray) -> list[tuple[str, ...]]:
    singles = [(name,) for name in of_value]
    return [singles[index] for index in indices.tolist()]


def _read_indices(
    y: np.ndarray, names: Sequence[str], multi_label: bool
) -> ClassLabels:
    """Reads `[N]` indices into names of classes."""
    is_known = (y >= 0) & (y < len(names))
    if not is_known.all():
        row = int(np.argmin(is_known))
        raise KerasTransferError(
            f"A label is an index of the {len(names)} class_names. Received: {y[row]} "
            f"for image {row}."
        )
    indices = y.astype(np.int64)
    present, warnings = _present(names, np.bincount(indices, minlength=len(names)) > 0)
    return ClassLabels(_singles(names, indices), present, multi_label, warnings)


def _present(
    names: Sequence[str], is_present: np.ndarray
) -> tuple[list[str], list[str]]:
    """Returns (names of the classes that have images, a warning about the others)."""
    present = [name for name, here in zip(names, is_present, strict=True) if here]
    absent = [name for name, here in zip(names, is_present, strict=True) if not here]
    if not absent:
        return present, []
    shown = ", ".join(absent[:5]) + (", ..." if absent[5:] else "")
    return present, [
        f"{len(absent)} of {len(names)} classes have no image and were left out: "
        f"{shown}."
    ]


def _read_binary(
    y: np.ndarray, given: str, names: Sequence[str] | None, multi_label: bool
) -> ClassLabels:
    """Reads `[N, K]` of 0 and 1."""
    if y.dtype.kind not in "iubf":
        raise UsageError(
            f"{_TAKEN} Received: labels of {given}. Give several names to an image "
            "with paths: a list of strings for each path."
        )
    is_binary = (y == 0) | (y == 1)
    if not is_binary.all():
        _refuse(y, ~is_binary, given)
    if names is not None and len(names) != y.shape[1]:
        raise UsageError(
            f"Labels of {given} have a column for each class. Received: {len(names)} "
            "class_names."
        )
    names = names or [str(column) for column in range(y.shape[1])]
    shown = y == 1
    rows, columns = np.nonzero(shown)
    of_image: list[tuple[str, ...]] = [()] * len(y)
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        of_image[row] += (names[column],)
    present, warnings = _present(names, shown.any(0))
    others = np.flatnonzero(shown.sum(1) != 1)
    if len(others) and not multi_label:
        rows_do = "rows does" if len(others) == 1 else "rows do"
        warnings.append(
            f"Labels are read as multi-label: {len(others):,} of {len(y):,} {rows_do} "
            f"not have exactly one 1, such as image {others[0]}."
        )
    return ClassLabels(of_image, present, multi_label or len(others) > 0, warnings)


def _plain(y: np.ndarray, given: str) -> np.ndarray:
    """Converts objects and bytes to strings or integers.

    Raises:
        UsageError: If they are of several types, or of another one.
        KerasTransferError: If one is missing, or bytes are not UTF-8.
    """
    if y.dtype.kind in "iubfU":
        return y
    cells = y.ravel().tolist()
    for row, cell in enumerate(cells if y.ndim == 1 else ()):
        if is_missing(cell):
            raise KerasTransferError(
                f"Image {row} has no label. Received: {cell}. Add one, or remove it."
            )
    if y.dtype.kind not in "OST":
        raise UsageError(f"{_TAKEN} Received: labels of {given}.")
    for kind in (bool, str, bytes, (int, np.integer)):
        if all(isinstance(cell, kind) for cell in cells):
            break
    else:
        types = sorted({type(cell).__name__ for cell in cells})
        raise UsageError(
            f"Labels are all of one type, strings or integers. Received: labels of "
            f"{given} with {', '.join(types)}."
        )
    if kind is bytes:
        try:
            cells = [cell.decode() for cell in cells]
        except UnicodeDecodeError as error:
            raise KerasTransferError(
                f"Labels are UTF-8. Received: {error.object[:80]!r}."
            ) from None
    return np.array(cells).reshape(y.shape)


def is_missing(cell: object) -> bool:
    """Returns whether a value is None, NaN, or a missing value of pandas."""
    if isinstance(cell, float):
        return math.isnan(cell)
    pandas = sys.modules.get("pandas")
    return cell is None or (
        pandas is not None and (cell is pandas.NA or cell is pandas.NaT)
    )


def _refuse(y: np.ndarray, is_bad: np.ndarray, given: str) -> None:
    index = np.unravel_index(np.argmax(is_bad), y.shape)
    value = y[index]
    hint = ""
    if 0 < value < 1:
        hint = " Soft labels are not taken: give the class, such as y.argmax(1)."
    raise KerasTransferError(
        f"{_TAKEN} Received: {value} for image {int(index[0])} (labels of {given})."
        f"{hint}"
    )


def read_weights(weights: np.ndarray, count: int) -> list[float]:
    """Checks the weights of images.

    Args:
        weights: `[N]` or `[N, 1]` numbers.
        count: Number of images.

    Returns:
        A weight for each image.

    Raises:
        UsageError: If there is not one number for each image.
        KerasTransferError: If a number is not valid; see `check_weights`.
    """
    given = described(weights)
    if weights.ndim == 2 and weights.shape[1] == 1:
        weights = weights[:, 0]
    if weights.dtype.kind not in "iubf" or weights.shape != (count,):
        raise UsageError(
            f"sample_weight is a number for each of the {count} images. Received: "
            f"{given}."
        )
    numbers = weights.astype(np.float64)
    values: list[float] = numbers.tolist()
    check_weights(numbers, values, lambda row: f"Image {row}")
    return values
