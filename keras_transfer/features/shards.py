"""The files of the feature cache: shards of rows, each written once, atomically."""

import contextlib
import ctypes
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import re
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from keras_transfer.errors import KerasTransferError
from keras_transfer.runs.files import locked, sync

_MOST_ATTEMPTS = 10  # to write a shard while other processes prune its table
INDEX_DTYPE = np.dtype([("digest", "V32"), ("checksum", "<u4")])
_VERSION = 1

SPEC = "spec.json"
_SHARD = r"(?:[0-9a-f]{64}|\d{20}-[0-9a-f]{8})"  # by content; formerly by time
_SHARD_NAME = re.compile(_SHARD)
OWN_FILE = re.compile(
    rf"spec\.json|{_SHARD}\.(npy|index|tmp)|\.\w+\.tmp"
    rf"|\.(spec\.json|{_SHARD}\.index)\.\w+"
)

_OTHER_FIX = "Choose another cache_dir."
_FIXES = {
    errno.EMFILE: "Allow more open files with ulimit -n.",
    errno.ENFILE: "Close some programs.",
    errno.ENOSPC: "Make room with kt cache prune, or choose another cache_dir.",
}


@dataclass(frozen=True)
class FeatureSpec:
    """Everything that features depend on besides the image's bytes.

    Attributes:
        base: Name of the base.
        weights_digest: SHA-256 of the weights below the split point.
        image_size: Side of the square images in pixels.
        split_point: Name of the layer whose outputs are the features.
        precision: Arithmetic: `f32` or `bf16`.
        decoder_version: `decode.DECODER_VERSION`.
        view: 0 for the plain image, else the number of the augmented view.
        augmentation: Version and seed of the augmentation; "" for the plain image.
        dtype: Data type of the stored features: `float32`, `float16` or `uint8`.
        engine: Engine that computed the features: `openvino` or `keras`; "" in old
            caches.
        device: The CPU's instruction set, or the GPU's name; "" in old caches.
    """

    base: str
    weights_digest: str
    image_size: int
    split_point: str
    precision: Literal["f32", "bf16"]
    decoder_version: int
    view: int = 0
    augmentation: str = ""
    dtype: str = "float32"
    engine: str = ""
    device: str = ""

    def key(self) -> str:
        """Returns the name of the table's folder, 32 hexadecimal digits."""
        values = asdict(self) | {"version": _VERSION}
        if not self.engine:  # old caches did not record it
            del values["engine"], values["device"]
        text = json.dumps(values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class ShardStore:
    """The folder with the shards of one table.

    A shard is rows `[n, ...]` and an index `[n]` of `INDEX_DTYPE`. Its name is the
    SHA-256 of the index, so shards with the same name have the same rows, and writing
    one again can only repair it.
    """

    def __init__(self, folder: Path, spec: FeatureSpec):
        self._folder = folder
        self._spec = spec
        self._maps: dict[str, np.ndarray] = {}

    def __str__(self) -> str:
        return str(self._folder)

    def list(self) -> dict[str, int]:
        """Returns the size in bytes of each complete shard, sorted by name."""
        with explaining_errors(self._folder, "read"):
            return _shard_sizes(file_sizes(self._folder))

    def index(self, name: str) -> np.ndarray:
        """Reads the index of a shard, `[n]` of `INDEX_DTYPE`.

        Raises:
            FileNotFoundError: If the shard no longer exists.
            ValueError: If the index is damaged.
            KerasTransferError: If the index cannot be read.
        """
        path = self._folder / f"{name}.index"
        with explaining_errors(path, "read"):
            content = path.read_bytes()
        if len(name) == 64 and hashlib.sha256(content).hexdigest() != name:
            raise ValueError(f"{path} is damaged")
        return np.frombuffer(content, INDEX_DTYPE)

    def read(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Reads rows of a shard in any order, without verifying their checksums.

        Args:
            name: Name of the shard.
            rows: `[n]` indices of rows.

        Raises:
            FileNotFoundError: If the shard no longer exists.
            ValueError: If the file is damaged.
            KerasTransferError: If the file cannot be read.
        """
        path = self._folder / f"{name}.npy"
        with explaining_errors(path, "read"):
            try:
                if name not in self._maps:
                    self._maps[name] = _mapped(path)
                return self._maps[name][rows]
            except (OSError, MemoryError):
                raise
            except Exception as error:  # a damaged header can cause any exception
                raise ValueError(f"{path} is damaged") from error

    def prepare(self) -> None:
        """Checks that shards can be written, before there are any.

        Raises:
            KerasTransferError: If they cannot.
        """
        with explaining_errors(self._folder, "written"):
            self._describe()
            if not os.access(self._folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def put(self, index: np.ndarray, rows: np.ndarray) -> str:
        """Writes a shard atomically.

        Args:
            index: `[n]` of `INDEX_DTYPE`.
            rows: `[n, ...]` features.

        Returns:
            The name of the shard.

        Raises:
            KerasTransferError: If the shard cannot be written.
        """
        content = index.tobytes()
        name = hashlib.sha256(content).hexdigest()
        files: dict[str, Sequence[bytes | memoryview]] = {
            f"{name}.npy": [_npy_header(rows), rows.data],
            f"{name}.index": [content],
        }
        with explaining_errors(self._folder, "written"):
            for attempt in itertools.count(1):
                try:
                    self._describe()
                    self._write(files)
                    self._describe()
                    break
                except (FileNotFoundError, FileExistsError):  # it is being pruned
                    if attempt == _MOST_ATTEMPTS:
                        raise
        self._maps.pop(name, None)  # a map of a file that was replaced
        return name

    def delete(self, name: str) -> None:
        """Deletes a shard if it still exists."""
        self._maps.pop(name, None)
        with explaining_errors(self._folder, "written"):
            for suffix in (".index", ".npy"):
                (self._folder / f"{name}{suffix}").unlink(missing_ok=True)

    def remove_left_overs(self) -> None:
        """Removes unfinished files of processes that were killed."""
        with explaining_errors(self._folder, "read"):
            sizes = file_sizes(self._folder)
        shards = _shard_sizes(sizes)
        for name in filter(OWN_FILE.fullmatch, sizes):
            path = self._folder / name
            if path.stem in shards or name == SPEC:
                continue
            # A locked file is being written. If an index has appeared, the shard was
            # completed in the meantime.
            with contextlib.suppress(OSError), locked(path) as is_held:
                if is_held and not path.with_suffix(".index").exists():
                    path.unlink()

    def _describe(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self._spec), indent=1).encode()
        with contextlib.suppress(FileNotFoundError):
            if (self._folder / SPEC).read_bytes() == text:
                return
        self._write({SPEC: [text]})

    def _write(self, files: Mapping[str, Sequence[bytes | memoryview]]) -> None:
        """Writes files completely, and only then renames them, in the given order."""
        with contextlib.ExitStack() as stack:
            temporaries = [self._temporary(stack) for _ in files]
            for path, chunks in zip(temporaries, files.values(), strict=True):
                with path.open("wb") as file:
                    for chunk in chunks:
                        file.write(chunk)
                    file.flush()
                    os.fsync(file.fileno())
                path.chmod(0o644)
            for path, name in zip(temporaries, files, strict=True):
                path.replace(self._folder / name)
            sync(self._folder)

    def _temporary(self, stack: contextlib.ExitStack) -> Path:
        """Creates a file that is locked until the stack is closed and then removed."""
        while True:
            descriptor, name = tempfile.mkstemp(".tmp", ".", self._folder)
            os.close(descriptor)
            path = Path(name)
            stack.callback(path.unlink, missing_ok=True)
            # Until it is locked, another process may remove it as a leftover.
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                stack.enter_context(locked(path))
                if path.exists():
                    return path


@contextlib.contextmanager
def explaining_errors(place: Path | str, verb: str) -> Iterator[None]:
    """Converts an `OSError` in the block to a `KerasTransferError`.

    Args:
        place: File or directory, for the message.
        verb: What was attempted: `read`, `written` or `pruned`.

    Raises:
        FileNotFoundError: If a file to be read does not exist; passed through.
        KerasTransferError: For every other `OSError`.
    """
    try:
        yield
    except OSError as error:
        if verb == "read" and isinstance(error, FileNotFoundError):
            raise
        raise KerasTransferError(
            f"The feature cache cannot be {verb}. Received: {place} "
            f"({error.strerror}). {_FIXES.get(error.errno or 0, _OTHER_FIX)}"
        ) from None


def _mapped(path: Path) -> np.ndarray:
    """Maps an `.npy` file into memory without keeping a file descriptor open.

    NumPy's and Python's own maps keep one each (Python's can do without only since
    3.13), and a large cache has more shards than a process may have open files.

    Raises:
        ValueError: If the file is damaged.
    """
    if os.name == "nt":  # open files are not scarce there
        return np.lib.format.open_memmap(path, mode="r")
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
        if fortran_order or size != offset + math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path} is damaged")
        address = _libc().mmap(
            None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0
        )
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    content = (ctypes.c_char * size).from_address(address)
    weakref.finalize(content, _libc().munmap, address, size).atexit = False
    view = memoryview(content).toreadonly()
    return np.frombuffer(view, dtype, offset=offset).reshape(shape)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = pointer
    libc.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_int64]
    libc.munmap.argtypes = [pointer, size]
    return libc


def _npy_header(rows: np.ndarray) -> bytes:
    # `np.save` would not report why a write failed.
    file = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(rows)
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def file_sizes(folder: Path) -> dict[str, int]:
    """Returns the size in bytes of a folder's files by name; empty if it is missing."""
    sizes = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # merged or pruned
                if entry.is_file():
                    sizes[entry.name] = entry.stat().st_size
    return sizes


def _shard_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Returns the size in bytes of each complete shard among files, sorted by name."""
    names = sorted(name.removesuffix(".index") for name in sizes)
    return {
        name: sizes[f"{name}.npy"] + sizes[f"{name}.index"]
        for name in names
        if _SHARD_NAME.fullmatch(name)
        and f"{name}.npy" in sizes
        and f"{name}.index" in sizes
    }


def count_rows(sizes: Mapping[str, int]) -> int:
    """Counts the rows in complete shards, given the files' sizes by name."""
    names = _shard_sizes(sizes)
    return sum(sizes[f"{name}.index"] for name in names) // INDEX_DTYPE.itemsize
