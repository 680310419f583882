"""Files that exist completely or not at all, even if a process is killed."""

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

from keras_transfer.errors import KerasTransferError, UsageError, explaining_full_disk

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

UNFINISHED = ".kt-unfinished."
"""Name prefix of hidden files and folders that a process is still writing."""
SUSPECT = "suspect"
"""Column of a cleaned table: the kinds of the findings that an image is in."""
MOST_THUMBNAILS = 1000
"""Number of pictures of a report page: with more it would have more than 5 MB."""

_NO_LOCKS = {errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def numbered(path: Path) -> Iterator[Path]:
    """Yields PATH, PATH-2, PATH-3 and so on."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}")


def rename_to_first_free(directory: Path, paths: Iterable[Path]) -> Path:
    """Renames a directory to the first path that is not taken.

    Two processes never get the same path.

    Args:
        directory: The directory to rename.
        paths: Candidates in order; one of them must be free.

    Returns:
        The new path.
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
    """Yields a hidden directory to build something in and rename when complete.

    If it has not been renamed by the end of the block, it is removed.
    """
    with _unfinished(
        parent, lambda: tempfile.mkdtemp(dir=parent, prefix=UNFINISHED)
    ) as path:
        yield path


@contextlib.contextmanager
def _unfinished(parent: Path, make: Callable[[], str]) -> Iterator[Path]:
    """Yields a file or directory that is locked during the block and then removed."""
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
    """Removes unfinished files and folders that killed processes left in a directory.

    Those of running processes are locked and are left alone.
    """
    for left_over in parent.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError), locked(left_over) as is_held:
            if is_held:
                remove(left_over)


def remove(path: Path) -> None:
    """Deletes a file or a directory if it exists, ignoring errors."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def settle(directory: Path) -> None:
    """Makes a directory and its contents readable by everyone and syncs them to disk.

    Servers run as other users, and the umask may be anything.
    """
    for path in (*directory.rglob("*"), directory):
        path.chmod(0o755 if path.is_dir() else 0o644)
        sync(path)


@contextlib.contextmanager
def only_process(run_dir: Path) -> Iterator[None]:
    """Keeps other processes from changing a run during the block.

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
    """Locks a file or directory for the block; the lock is released if killed.

    Args:
        path: The file or directory.
        wait: Whether to wait while another process holds the lock.

    Yields:
        Whether the lock is held. It is not on Windows, nor on file systems that cannot
        lock the path, such as directories on NFS.

    Raises:
        BlockingIOError: If another process holds the lock and `wait` is False.
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
        os.close(descriptor)  # releases the lock


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file atomically; text is encoded as UTF-8."""
    data = content
    if isinstance(data, str):
        # The text may contain file names that are not valid UTF-8.
        data = data.encode(errors="surrogateescape")
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a file to write that replaces `path` atomically if the block succeeds."""

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
    """Formats a header and rows as the text of a CSV file."""
    return "".join(f"{csv_line(cells)}\n" for cells in (header, *rows))


def csv_line(cells: Sequence[object]) -> str:
    """Formats cells as a line of a CSV file, without the line terminator.

    It reads back as the same cells, whatever they contain.
    """
    # With "\n" as the line terminator, csv does not quote a lone carriage return, but
    # when reading it treats one as the end of a line.
    has_return = any("\r" in str(cell) for cell in cells)
    quoting: Literal[0, 1] = csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", quoting=quoting).writerow(cells)
    return text.getvalue().removesuffix("\n")


def nearest_directory(path: Path) -> Path:
    """Returns the path if it exists, else its nearest parent that does."""
    return next(x for x in (path, *path.absolute().parents) if x.exists())


def is_writable(directory: Path) -> bool:
    """Returns whether a directory can be written to, or created if it is missing."""
    existing = nearest_directory(directory)
    try:
        # Permissions do not say it of every file system.
        tempfile.TemporaryDirectory(dir=existing, prefix=UNFINISHED).cleanup()
    except OSError:
        return False
    return True


def check_sort_into(directory: Path) -> None:
    """Checks that images can be sorted into a directory, which may not exist yet.

    Raises:
        UsageError: If it is not a directory or cannot be written.
    """
    if not is_writable(directory):
        raise UsageError(
            f"Images are sorted into a directory that can be written. Received: "
            f"sort_into={directory}. Name another."
        )


def check_output(file: Path) -> None:
    """Checks that a file can be written by `replacing`, before any work is done.

    Raises:
        UsageError: If its folder does not exist or cannot be written, or there is
            something else than a regular file in its place.
    """
    folder = file.absolute().parent
    if not folder.is_dir() or not is_writable(folder):
        raise UsageError(
            f"output names a file in a folder that exists and can be written. "
            f"Received: output={file}. Name another."
        )
    if file.exists() and not file.is_file():  # a device or pipe would be replaced
        raise UsageError(
            f"output names a regular file. Received: output={file}, which is none. "
            "Name another, or leave it out."
        )


def check_fix(file: Path, data: str, splits: Path | None) -> None:
    """Checks that a cleaned table can be written, before any work is done.

    Args:
        file: The file to write.
        data: DATA.
        splits: The file with old splits, if any.

    Raises:
        UsageError: If the file is DATA itself or the old splits, has another suffix
            than .csv, its folder does not exist or cannot be written, or there is
            something else than an earlier cleaned table in its place.
    """
    if file.suffix.lower() != ".csv":  # an image could be replaced by mistake
        raise UsageError(f"fix names a .csv file. Received: fix={file}. Rename it.")
    for used, name in ((data, "DATA itself"), (splits, "splits.file")):
        if used and file.exists() and os.path.exists(used):
            if os.path.samefile(file, used):
                raise UsageError(
                    f"fix would replace {name}. Received: fix={file}. Name another "
                    "file."
                )
    folder = file.absolute().parent
    is_regular = file.is_file() or not os.path.lexists(file)
    if not folder.is_dir() or not is_writable(folder) or not is_regular:
        raise UsageError(
            "fix names a regular file in a folder that exists and can be written. "
            f"Received: fix={file}. Name another."
        )
    if file.exists() and not _is_cleaned(file):
        raise UsageError(
            "fix names a new file, or an earlier cleaned table to replace. Received: "
            f"fix={file}, which is something else. Name another, or remove it."
        )


def _is_cleaned(file: Path) -> bool:
    """Returns whether a file has the first and the marking columns of such a table."""
    try:
        # Not every path in it is valid UTF-8.
        with file.open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
            names = next(csv.reader(lines), [])
    except (OSError, csv.Error):
        return False
    return names[:2] == ["path", "label"] and {"group", SUSPECT} <= {*names}


def check_directory(directory: Path) -> None:
    """Checks that files can be written to a directory, which may not exist yet.

    Raises:
        UsageError: If they cannot.
    """
    if not is_writable(directory):
        raise UsageError(
            f"output names a directory that can be written. Received: "
            f"output={directory}. Name another."
        )


def check_report(runs: int, form: str, thumbnails: int, output: Path | None) -> None:
    """Checks what is asked of a report, before any work is done.

    Raises:
        UsageError: If there are too many thumbnails, charts are asked of several runs,
            or the file cannot be written.
    """
    if not 0 <= thumbnails <= MOST_THUMBNAILS:
        raise UsageError(
            f"A page has at most {MOST_THUMBNAILS:,} pictures. Received: "
            f"thumbnails={thumbnails}. Ask for fewer."
        )
    if form == "png" and runs > 1:
        raise UsageError(
            f"Charts are drawn of one run. Received: format=png and {runs} runs. "
            "Draw them one by one."
        )
    if form == "html" and output is not None:
        check_output(output)


def sync(path: Path) -> None:
    """Flushes a file or a directory to disk; does nothing on Windows."""
    if os.name == "nt":  # a directory cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
