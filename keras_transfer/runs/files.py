"""Files that are there whole or not at all, whoever is killed meanwhile."""

import contextlib
import csv
import errno
import io
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

from keras_transfer.errors import KerasTransferError, explaining_full_disk

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

UNFINISHED = ".kt-unfinished."
"""How the names begin of hidden files and folders that a process is making."""
_NO_LOCKS = {errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def numbered(path: Path) -> Iterator[Path]:
    """PATH, PATH-2, PATH-3 and so on."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}")


def rename_to_first_free(directory: Path, paths: Iterable[Path]) -> Path:
    """Gives a directory the first of these names that nothing has.

    Two processes never get the same.

    Returns:
        The name.
    """
    for path in paths:
        try:
            directory.rename(path)
        except OSError:
            if not os.path.lexists(path):
                raise
        else:
            sync(path.parent)
            return path
    raise AssertionError("there is always a free name")


@contextlib.contextmanager
def temporary_directory(parent: Path) -> Iterator[Path]:
    """A hidden directory to build something in, which is renamed when it is complete.

    What has not been renamed by the end of the block is removed.
    """
    with _unfinished(
        parent, lambda: tempfile.mkdtemp(dir=parent, prefix=UNFINISHED)
    ) as path:
        yield path


@contextlib.contextmanager
def _unfinished(parent: Path, make: Callable[[], str]) -> Iterator[Path]:
    """A file or directory that is locked while its process lives, then removed."""
    remove_left_overs(parent)
    with explaining_full_disk(parent), contextlib.ExitStack() as stack:
        while True:
            path = Path(make())
            stack.callback(remove, path)
            # Another process may have removed it before it was locked.
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                stack.enter_context(locked(path))
                if path.exists():
                    break
        yield path


def remove_left_overs(parent: Path) -> None:
    """Removes what killed processes left unfinished in a directory.

    What a process still works on it has locked.
    """
    for left_over in parent.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError), locked(left_over) as is_held:
            if is_held:
                remove(left_over)


def remove(path: Path) -> None:
    """Deletes a file or a directory, as far as it is there and can be deleted."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def settle(directory: Path) -> None:
    """Lets everyone read what is in a directory, and waits until it is on the disk.

    Servers run as other users, and umask may be anything.
    """
    for path in (*directory.rglob("*"), directory):
        path.chmod(0o755 if path.is_dir() else 0o644)
        sync(path)


@contextlib.contextmanager
def only_process(run_dir: Path) -> Iterator[None]:
    """Keeps a second process from changing the run meanwhile.

    Raises:
        KerasTransferError: If another process is changing it.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(run_dir))
        except BlockingIOError:
            raise KerasTransferError(
                f"Another process is changing this run. Received: {run_dir}. Wait for "
                "it, or stop it."
            ) from None
        yield


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Holds a lock on a file or directory, which a killed process gives back.

    Args:
        path: The file or directory.
        wait: Whether to wait for a process that holds it.

    Yields:
        Whether it does: NFS among others, and Windows, lock no directories.

    Raises:
        BlockingIOError: If another process holds it.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        is_held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            is_held = False
        yield is_held
    finally:
        os.close(descriptor)  # and with it the lock


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    data = content
    if isinstance(data, str):
        data = data.encode(errors="surrogateescape")  # names need not be UTF-8
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its place whole, when the block ends well."""

    def make() -> str:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=UNFINISHED)
        os.close(descriptor)
        return name

    with _unfinished(path.parent, make) as temporary:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        sync(path.parent)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The text of a CSV file."""
    return "".join(f"{csv_line(cells)}\n" for cells in (header, *rows))


def csv_line(cells: Sequence[object]) -> str:
    """A line of a CSV file, without its end.

    It reads back to the same cells, whatever they hold.
    """
    # Where lines end in a line feed, csv does not quote a carriage return by itself,
    # and takes it for the end of a line when it reads it.
    has_return = any("\r" in str(cell) for cell in cells)
    quoting: Literal[0, 1] = csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", quoting=quoting).writerow(cells)
    return text.getvalue().removesuffix("\n")


def nearest_directory(path: Path) -> Path:
    """A path, or the nearest of its parents that exists."""
    return next(x for x in (path, *path.absolute().parents) if x.exists())


def is_writable(directory: Path) -> bool:
    """Whether a directory can be written, or made where it is not there yet."""
    existing = nearest_directory(directory)
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def sync(path: Path) -> None:
    """Waits until a file or a directory is on the disk."""
    if os.name == "nt":  # where a directory cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
