"""Reads the bytes of images ahead of the decoder."""

import errno
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from keras_transfer.data.formats.convert import image_digest

_T = TypeVar("_T")
_R = TypeVar("_R")
_READ_THREADS = 4

MOST_BYTES_AHEAD = 2**26
"""Maximum bytes of encoded images that may wait to be processed; see `map_ahead`."""

Reader = Callable[[Sequence[str]], Iterator[tuple[str, bytes | OSError]]]
"""Takes sources and yields (source, encoded bytes or an `OSError`), each source once
but not necessarily in the given order."""


def is_on_disk(data: str) -> bool:
    """Returns whether DATA is a path, not a package's data set or in memory."""
    return data != "digits" and not data.startswith(("tfds:", "memory:"))


def hashing(read: Reader, digests: dict[str, bytes]) -> Reader:
    """Wraps a reader so that it records the digest of each source it yields.

    Args:
        read: The reader.
        digests: Receives `formats.image_digest` of each source that could be read.
    """

    def read_and_hash(sources: Sequence[str]) -> Iterator[tuple[str, bytes | OSError]]:
        for source, encoded in read(sources):
            if isinstance(encoded, bytes):
                digests[source] = image_digest(encoded)
            yield source, encoded

    return read_and_hash


def read_files(
    paths: Sequence[str], root: Path
) -> Iterator[tuple[str, bytes | OSError]]:
    """Reads files ahead in a few threads.

    Args:
        paths: Paths relative to `root`.
        root: The folder of the files.

    Yields:
        (path, the file's bytes or the error), in order.
    """

    def size(path: str) -> int:
        try:
            return os.path.getsize(os.path.join(root, path))
        except (OSError, ValueError):  # `read` reports the problem
            return 0

    def read(path: str) -> tuple[str, bytes | OSError]:
        try:
            return path, _read_file(root / path)
        except OSError as error:
            return path, error

    return map_ahead(read, paths, _READ_THREADS, weigh=size)


def _read_file(path: Path) -> bytes:
    """Reads a regular file; pipes and devices, which may never end, are refused."""
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
    """Maps a function over items in threads, in order and a bounded distance ahead.

    A result is yielded as soon as it is ready, even if fewer items than the bounds
    allow have been taken. If results are ready before the consumer asks for them, two
    items are taken per result, so that the bounds are reached eventually.

    Args:
        function: Called in the threads, once per item.
        items: The items, which are taken one by one.
        threads: Number of threads.
        ahead: Maximum number of items taken ahead of the consumer; None for four per
            thread.
        weigh: Returns the size of an item in bytes. No more items are taken once the
            items taken ahead reach `MOST_BYTES_AHEAD`.

    Yields:
        Results in the order of the items.
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
