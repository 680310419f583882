"""Sources of images -> their bytes, read ahead of whoever decodes them."""

import errno
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")
_READ_THREADS = 4

MOST_BYTES_AHEAD = 2**26
"""How many bytes of encoded images may wait to be worked on; see `map_ahead`."""

Reader = Callable[[Sequence[str]], Iterator[tuple[str, bytes | OSError]]]
"""Yields (source, encoded bytes, or why they cannot be read) of the sources asked
for, each once, not always in the order asked."""


def is_on_disk(data: str) -> bool:
    """Whether DATA is a path, and not a data set that a package brings."""
    return data != "digits" and not data.startswith("tfds:")


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
