"""Lists images that are given in Python: arrays, data sets, paths and tables."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from keras_transfer.config import ListingConfig
from keras_transfer.data.in_memory.arrays import list_arrays
from keras_transfer.data.in_memory.datasets import is_dataset, read_dataset
from keras_transfer.data.in_memory.path_tables import (
    is_table,
    pairs_table,
    paths_table,
    to_arrow,
)
from keras_transfer.data.table_files import list_table
from keras_transfer.data.tables import Listing
from keras_transfer.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

ARRAYS, DATASET, PATHS = "memory:arrays", "memory:dataset", "memory:paths"
NOT_KEPT = (ARRAYS, DATASET)
"""Names of images that another process cannot read again."""


@dataclass(frozen=True)
class InMemory:
    """Images that are given in Python, in a form that can be listed several times.

    Attributes:
        name: See `name_of`.
        images: A table with their paths, or a function that takes `multi_label` and
            lists them.
    """

    name: str
    images: "pa.Table | Callable[[bool], Listing]"


def name_of(data: object) -> str:
    """Returns what DATA is called in messages, configs and reports.

    A path or a name stands for itself. Images that are given in Python are
    `memory:arrays`, `memory:dataset` or `memory:paths`; only the last can be read again
    by another process. Nothing is taken from an iterator.

    Raises:
        UsageError: If DATA is in none of the forms.
    """
    if isinstance(data, (str, os.PathLike)):
        return str(data)
    if isinstance(data, InMemory):
        return data.name
    if is_dataset(data):
        return DATASET
    if is_table(data):
        return PATHS
    if isinstance(data, tuple) and len(data) in (2, 3):
        return PATHS if _may_be_paths(data[0]) else ARRAYS
    is_other = isinstance(data, (bytes, Mapping)) or hasattr(data, "__array__")
    if isinstance(data, Iterable) and not is_other:
        return PATHS
    raise UsageError(
        "Images in Python are (x, y) arrays, a tf.data.Dataset of (image, label), "
        "(paths, labels), (path, label) pairs, or a table of pandas, polars or "
        f"pyarrow. Received: {type(data).__name__}."
    )


def settled(data: object) -> object:
    """Returns DATA in a form that can be listed several times.

    Iterators are consumed. A data set is read when it is listed for the first time, and
    never again.

    Args:
        data: A path or a name, which are returned as a string, or images as in
            `list_memory`.

    Raises:
        UsageError: If DATA is in none of the forms.
        KerasTransferError: If a path is there twice.
    """
    if isinstance(data, os.PathLike):
        return str(data)
    return data if isinstance(data, (str, InMemory)) else _in_memory(data)


def list_memory(
    data: object,
    options: ListingConfig,
    multi_label: bool,
    usual: ListingConfig | None = None,
) -> Listing:
    """Lists images that are given in Python.

    Args:
        data: One of

            - (x, y) or (x, y, sample_weight) arrays, as in `arrays.list_arrays`.
            - A `tf.data.Dataset`, as in `datasets.read_dataset`.
            - (paths, labels) or (paths, labels, sample_weight): a string, an integer or
              a list of strings for each path. A tuple of two or three is always this
              or arrays.
            - An iterable of (path, label) pairs.
            - A DataFrame of pandas or polars, a pyarrow table, or another table with an
              Arrow stream, as in `table_files.list_table`.
            - What `settled` made of one of these.
        options: How tables are read.
        multi_label: Whether to treat the data as multi-label even if no image has
            several labels.
        usual: As in `listing.list_data`.

    Raises:
        UsageError: If DATA is in none of the forms, or not valid.
        KerasTransferError: If a row of a table is not valid, or a data set fails.
    """
    given = data if isinstance(data, InMemory) else _in_memory(data)
    if callable(given.images):
        return given.images(multi_label)
    return list_table(given.images, options, multi_label, usual)


def _in_memory(data: Any) -> InMemory:
    name = name_of(data)
    if name == DATASET:
        images = functools.cache(lambda: read_dataset(data))
        return InMemory(name, lambda multi_label: images().list(multi_label))
    if name == ARRAYS:
        _check_columns(data)
        x, y, weight = data if len(data) == 3 else (*data, None)
        return InMemory(name, functools.partial(list_arrays, x, y, weight))
    if is_table(data):
        return InMemory(name, to_arrow(data))
    if isinstance(data, tuple) and len(data) in (2, 3):
        return InMemory(name, paths_table(*data))
    return InMemory(name, pairs_table(data))


def _may_be_paths(x: Any) -> bool:
    """Returns whether the first of two columns holds paths; of an iterator, True."""
    if isinstance(x, Iterator):
        return True
    kind = getattr(getattr(x, "dtype", None), "kind", "O")
    if kind not in "OUT" or isinstance(x, (str, bytes, Mapping)):
        return False
    try:
        first: Any = next(iter(x), None)
    except Exception:  # such as of scalar tensors; converting it will say more
        return False
    plain = first.as_py() if hasattr(first, "as_py") else first  # of pyarrow
    return isinstance(plain, (str, os.PathLike))


def _check_columns(columns: tuple[Any, ...]) -> None:
    """Refuses tuples that are neither arrays nor paths with labels.

    Raises:
        UsageError: If the first item is a string, or a tuple of arrays.
    """
    x = columns[0]
    if isinstance(x, (str, bytes, os.PathLike)):
        raise UsageError(
            "A tuple is (x, y) arrays, or (paths, labels), each a list. Received: "
            f"({', '.join(type(column).__name__ for column in columns)})."
        )
    if isinstance(x, tuple) and x and getattr(x[0], "ndim", 0) > 3:
        raise UsageError(
            "A tuple is (x, y) arrays. Received: tuples of arrays, as of (train, test)."
            " Give one of them."
        )
