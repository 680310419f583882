"""A cache on disk, so that features of an image are computed only once.

A cache directory contains a folder for each way of computing features (`FeatureSpec`:
base, weights, image size, ...). A folder contains shards. A shard is two files: the
rows as `.npy`, and an index with the image's digest and a checksum for each row. A
shard is written under temporary names, which are then replaced, the index's last, and
never changes afterwards. So a killed process loses at most the shard it was filling,
any number of processes may read and write the same folder, and rows that were damaged
on disk are detected and computed again. A shard is written every few seconds; when
there are many small shards, they are merged.
"""

import contextlib
import errno
import functools
import itertools
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.features.index import DAMAGED, SOUND, UNKNOWN, Index, as_digests
from keras_transfer.features.shards import (
    INDEX_DTYPE,
    OWN_FILE,
    SPEC,
    FeatureSpec,
    ShardStore,
    count_rows,
    explaining_errors,
    file_sizes,
)
from keras_transfer.runs.files import is_writable, locked, nearest_directory

if TYPE_CHECKING:
    from keras_transfer.features.file_index import FileIndex

SHARD_BYTES = 32 * 2**20
"""Size in bytes at which a shard is written."""

SHARD_SECONDS = 10.0
"""Longest time in seconds between two shards while features are computed."""

MOST_SMALL_SHARDS = 32
"""Number of shards below half of `SHARD_BYTES` that triggers merging."""

_LARGEST_FLOAT16 = 65504.0
_FILES = "files"  # folder of the file indices
_TABLE_NAME = re.compile(r"[0-9a-f]{32}")


class Features(Protocol):
    """Rows of features, read on demand.

    `features[start:stop]` is an array `[stop - start, ...]`.

    Attributes:
        dtype: Data type of the rows.
        shape: `(N, ...)`, the shape of all rows together.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Size of all rows together in bytes."""

    def __getitem__(self, picked: slice | np.ndarray) -> np.ndarray: ...


class JoinedFeatures:
    """Rows of one or several features `[N, .]` side by side; see `Features`."""

    def __init__(self, parts: Sequence[Features], widths: Sequence[int]):
        """Joins the last columns of features, as many of each as `widths` says."""
        self._parts = parts
        self._widths = widths
        self.dtype = parts[0].dtype
        self.shape: tuple[int, ...] = (len(parts[0]), sum(widths))

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Size of all rows together in bytes."""
        return self.dtype.itemsize * int(np.prod(self.shape))

    def __getitem__(self, picked: slice | np.ndarray) -> np.ndarray:
        if not len(self):
            return np.zeros(self.shape, self.dtype)
        pairs = zip(self._parts, self._widths, strict=True)
        return np.concatenate([x[picked][:, x.shape[1] - n :] for x, n in pairs], 1)


class CachedFeatures:
    """Rows of a table of the cache; see `Features`."""

    def __init__(self, table: "FeatureTable", digests: np.ndarray):
        """Locates the rows; see `FeatureTable.features`."""
        self._table = table
        self._index, self._entries = table.locate(digests)
        self.dtype: np.dtype[Any] = np.dtype(table.spec.dtype)
        self.shape: tuple[int, ...] = (len(digests),)
        self.shape += self[:1].shape[1:]

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Size of all rows together in bytes."""
        return self.dtype.itemsize * int(np.prod(self.shape))

    def __getitem__(self, picked: slice | np.ndarray) -> np.ndarray:
        entries = self._entries[picked]
        out = np.empty((0, *self.shape[1:]), self.dtype)
        try:
            for rows, places in self._table.read(self._index, entries):
                if not len(out):
                    out = np.empty((len(entries), *rows.shape[1:]), self.dtype)
                out[places] = rows
        except FileNotFoundError:  # shards were merged, or pruned
            digests = self._index.entries["digest"][self._entries]
            self._table.reload()
            self._index, self._entries = self._table.locate(digests)
            return self[picked]
        return out


class FeatureTable:
    """The cached features of one specification, backed by a store of shards.

    Attributes:
        spec: What the features depend on.
    """

    def __init__(self, store: ShardStore, spec: FeatureSpec):
        self.spec = spec
        self._store = store
        self._index = Index.read(store)
        self._pending: dict[bytes, np.ndarray] = {}
        self._flushed = time.monotonic()

    def __contains__(self, digest: bytes) -> bool:
        """Returns whether an image's features are in the table and undamaged."""
        if digest in self._pending:
            return True
        while True:
            index = self._index
            try:  # `_find` would take six times as long for a single digest
                return any(self._is_sound(index, e) for e in index.candidates(digest))
            except FileNotFoundError:  # shards were merged, or pruned
                self.reload()

    def contains(self, digests: Sequence[bytes]) -> np.ndarray:
        """Tells which images have flushed, undamaged features, as bool `[N]`."""
        _, entries = self._find(as_digests(digests))
        return entries >= 0

    def prepare(self) -> None:
        """Checks that features can be stored, before any are computed.

        Raises:
            KerasTransferError: If the cache cannot be written.
        """
        self._store.prepare()

    def add(self, digest: bytes, row: np.ndarray) -> None:
        """Adds the features of an image, which are written to disk in batches.

        Args:
            digest: SHA-256 of the image's bytes.
            row: The features, which are converted to the spec's dtype.
        """
        if self.spec.dtype == "float16":
            row = np.clip(row, -_LARGEST_FLOAT16, _LARGEST_FLOAT16)
        row = row.astype(self.spec.dtype, copy=False)
        self._pending[digest] = row
        size = len(self._pending) * row.nbytes
        if size > SHARD_BYTES or time.monotonic() - self._flushed > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes all added features to disk as a new shard."""
        self._flushed = time.monotonic()
        if self._pending:
            rows = np.stack(list(self._pending.values()))
            index = np.empty(len(rows), INDEX_DTYPE)
            index["digest"] = as_digests(list(self._pending))
            index["checksum"] = [zlib.crc32(row) for row in rows]
            name = self._store.put(index, rows)
            self._index = self._index.extended(name, index)
            self._pending.clear()
            self._merge_small_shards()

    def features(self, digests: Sequence[bytes]) -> Features:
        """Returns the features of images in the given order.

        Args:
            digests: SHA-256 of the images' bytes.

        Raises:
            KerasTransferError: If an image's features are missing, damaged or not
                flushed yet.
        """
        return CachedFeatures(self, as_digests(digests))

    def locate(self, digests: np.ndarray) -> tuple[Index, np.ndarray]:
        """Returns an index and int64 `[n]` its entries for digests; see `features`."""
        index, entries = self._find(digests)
        missing = np.count_nonzero(entries < 0)
        if missing:
            raise KerasTransferError(
                f"{missing:,} of {len(digests):,} features are not in the cache, or "
                f"not any more. Received: {self._store}. Run the command again: they "
                "are computed again."
            )
        return index, entries

    def read(
        self, index: Index, entries: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Reads rows, one shard at a time.

        Args:
            index: The index that the entries refer to.
            entries: `[n]` indices of entries.

        Yields:
            (rows, their positions in `entries`).

        Raises:
            FileNotFoundError: If a shard no longer exists or is damaged.
        """
        for name, rows, places in index.by_shard(entries):
            try:
                yield self._store.read(name, rows), places
            except ValueError:  # damaged since it was checked
                index.states[entries[places]] = DAMAGED
                raise FileNotFoundError(name) from None

    def reload(self) -> None:
        """Reads the list of shards and their indices again."""
        index = Index.read(self._store)
        index.take_states(self._index)
        self._index = index

    def _find(self, digests: np.ndarray) -> tuple[Index, np.ndarray]:
        """Returns an index and the entry of each digest in it; -1 if missing."""
        while True:
            index = self._index
            try:
                return index, index.find(
                    digests, functools.partial(self._are_sound, index)
                )
            except FileNotFoundError:  # shards were merged, or pruned
                self.reload()

    def _is_sound(self, index: Index, entry: int) -> bool:
        if index.states[entry] == UNKNOWN:
            shard = int(index.starts.searchsorted(entry, "right")) - 1
            row = entry - index.starts[shard : shard + 1]
            checksum = index.entries["checksum"][entry : entry + 1]
            is_sound = self._check(index.names[shard], row, checksum)
            index.states[entry] = SOUND if is_sound[0] else DAMAGED
        return bool(index.states[entry] == SOUND)

    def _are_sound(self, index: Index, entries: np.ndarray) -> np.ndarray:
        unknown = entries[index.states[entries] == UNKNOWN]
        for name, rows, places in index.by_shard(unknown):
            checked = unknown[places]
            is_sound = self._check(name, rows, index.entries["checksum"][checked])
            index.states[checked] = np.where(is_sound, SOUND, DAMAGED)
        return index.states[entries] == SOUND

    def _check(self, name: str, rows: np.ndarray, checksums: np.ndarray) -> np.ndarray:
        """Returns whether each row of a shard matches its checksum."""
        try:
            found = self._store.read(name, rows)
        except ValueError:
            return np.zeros(len(rows), bool)
        if found.dtype != self.spec.dtype:
            return np.zeros(len(rows), bool)
        return np.array([zlib.crc32(row) for row in found], np.uint32) == checksums

    def _merge_small_shards(self) -> None:
        """Merges small shards into large ones if there are many, from any process."""
        sizes = self._store.list()
        small = [name for name, size in sizes.items() if size < SHARD_BYTES // 2]
        if len(small) < MOST_SMALL_SHARDS:
            return
        ends = itertools.accumulate(sizes[name] for name in small)
        number_of = dict(zip(small, (end // SHARD_BYTES for end in ends), strict=True))
        for _, group in itertools.groupby(small, number_of.__getitem__):
            self._merge(list(group))
        self.reload()

    def _merge(self, names: Sequence[str]) -> None:
        """Merges shards into one and then deletes them; damaged rows are dropped."""
        indices, parts = [], []
        for name in names:
            with contextlib.suppress(FileNotFoundError, ValueError):  # merged, damaged
                index = self._store.index(name)
                is_sound = self._check(name, np.arange(len(index)), index["checksum"])
                if is_sound.any():
                    parts.append(self._store.read(name, np.flatnonzero(is_sound)))
                    indices.append(index[is_sound])
        merged = ""
        if parts:
            index, rows = np.concatenate(indices), np.concatenate(parts)
            digests = np.ascontiguousarray(index["digest"]).view("S32")
            _, firsts = np.unique(digests, return_index=True)
            firsts.sort()
            merged = self._store.put(index[firsts], rows[firsts])
        for name in names:
            if name != merged:
                self._store.delete(name)


class FeatureCache:
    """All cached feature tables.

    Attributes:
        directory: Directory of the tables.
        trusts_files: Whether files that appear to be unchanged need not be read again.
    """

    def __init__(self, directory: Path | None = None, trusts_files: bool = True):
        self.trusts_files = trusts_files
        self.directory = (directory or default_directory()).expanduser() / "features"

    def check_usable(self) -> None:
        """Checks early that the cache is writable or has content that can be read.

        Raises:
            UsageError: If the cache is empty and cannot be written.
        """
        if not is_writable(self.directory) and next(self.list(), None) is None:
            raise UsageError(
                f"The feature cache cannot be written. Received: {self.directory}. "
                "Choose another cache_dir."
            )

    def table(self, spec: FeatureSpec) -> FeatureTable:
        """Opens the table of a specification; it is empty if nothing is cached yet.

        Raises:
            KerasTransferError: If the cache directory cannot be read.
        """
        folder = self.directory / spec.key()
        store = ShardStore(folder, spec)
        store.remove_left_overs()
        with contextlib.suppress(OSError):  # missing or read-only
            os.utime(folder)  # marks it as used, for `prune`
        return FeatureTable(store, spec)

    def file_index(self, root: Path, sources: Sequence[str]) -> "FileIndex":
        """Opens the index of known digests of files; see `FileIndex`."""
        from keras_transfer.features.file_index import FileIndex  # imports pyarrow

        return FileIndex(self.directory / _FILES, root, sources)

    def free_bytes(self) -> int:
        """Returns the free space in bytes on the disk of the cache.

        Raises:
            KerasTransferError: If the cache directory cannot be used.
        """
        with explaining_errors(self.directory, "read"):
            return shutil.disk_usage(nearest_directory(self.directory)).free

    def rows(self, spec: FeatureSpec) -> int:
        """Returns the number of cached rows of a specification, without reading them.

        Raises:
            KerasTransferError: If the cache directory cannot be read.
        """
        with explaining_errors(self.directory, "read"):
            return count_rows(file_sizes(self.directory / spec.key()))

    def list(self) -> Iterator[dict[str, Any]]:
        """Yields one dict per table: its spec, `images`, `bytes` and `days_unused`."""
        for folder in self._folders():
            if folder.spec:
                yield asdict(folder.spec) | {
                    "images": count_rows(folder.sizes),
                    "bytes": folder.nbytes,
                    "days_unused": folder.days_unused,
                }

    def prune(
        self, unused_days: float | None = None, max_bytes: int | None = None
    ) -> tuple[int, int]:
        """Deletes tables by age or total size.

        Args:
            unused_days: Delete tables that were not used for at least this many days;
                None for no age limit.
            max_bytes: Delete the least recently used tables until the others take no
                more than this; None for no size limit.

        Returns:
            (number of tables deleted, bytes freed).

        Raises:
            KerasTransferError: If a file cannot be deleted.
        """
        folders = sorted(self._folders(), key=lambda folder: -folder.days_unused)
        size = sum(folder.nbytes for folder in folders)
        deleted = freed = 0
        for folder in folders:
            is_old = unused_days is not None and folder.days_unused >= unused_days
            if is_old or (max_bytes is not None and size - freed > max_bytes):
                freed += folder.delete()
                deleted += 1
            elif folder.spec:
                ShardStore(folder.path, folder.spec).remove_left_overs()
        if unused_days is not None:
            freed += self._prune_file_indices(unused_days)
        return deleted, freed

    def _prune_file_indices(self, unused_days: float) -> int:
        """Deletes file indices not used for some days; returns the bytes freed."""
        freed = 0
        for path in (self.directory / _FILES).glob("*.parquet"):
            with (
                explaining_errors(path, "pruned"),
                contextlib.suppress(FileNotFoundError),  # another process deleted it
            ):
                found = path.stat()
                if time.time() - found.st_mtime >= unused_days * 86_400:
                    path.unlink()
                    freed += found.st_size
        with contextlib.suppress(OSError):  # missing, or not empty
            (self.directory / _FILES).rmdir()
        return freed

    def _folders(self) -> "Iterator[_Folder]":
        """Yields the folders that are tables, ignoring all others."""
        with explaining_errors(self.directory, "read"):
            paths = sorted(self.directory.iterdir()) if self.directory.exists() else ()
        for path in paths:
            if not _TABLE_NAME.fullmatch(path.name):
                continue
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(FileNotFoundError):  # it is being pruned
                    found = _as_table(path)
                    if found:
                        yield found


@dataclass(frozen=True)
class _Folder:
    """A folder that contains a table.

    Attributes:
        path: Path of the folder.
        spec: The table's specification; None if it is missing, because the table was
            not filled yet or is being deleted.
        sizes: Size in bytes of each of the table's files, by name.
        days_unused: Days since the table was last used.
    """

    path: Path
    spec: FeatureSpec | None
    sizes: Mapping[str, int]
    days_unused: float

    @property
    def nbytes(self) -> int:
        """Size of all files together in bytes."""
        return sum(self.sizes.values())

    def delete(self) -> int:
        """Deletes the table, and its folder if that is empty; returns the bytes freed.

        Raises:
            KerasTransferError: If a file cannot be deleted.
        """
        freed = 0
        # Delete indices first and the spec last: a shard exists while it has an index,
        # and a table while it has a spec.
        order = {".index": 0, ".json": 2}
        with explaining_errors(self.path, "pruned"):
            for name in sorted(self.sizes, key=lambda x: order.get(Path(x).suffix, 1)):
                path = self.path / name
                # Another process may have deleted it or may be writing it.
                with contextlib.suppress(FileNotFoundError, BlockingIOError):
                    with locked(path):
                        path.unlink()
                    freed += self.sizes[name]
            try:
                self.path.rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                    raise
        return freed


def _as_table(path: Path) -> _Folder | None:
    """Recognizes a table by its files; None if the folder may be something else."""
    with explaining_errors(path, "read"):
        sizes = file_sizes(path)
        unused = time.time() - path.stat().st_mtime
        text = (path / SPEC).read_bytes() if SPEC in sizes else b""
    own = {name: sizes[name] for name in sizes if OWN_FILE.fullmatch(name)}
    if not text:
        is_own, spec = own.keys() == {entry.name for entry in path.iterdir()}, None
    else:
        try:
            spec = FeatureSpec(**json.loads(text))
        except (TypeError, ValueError):
            return None
        is_own = spec.key() == path.name
    return _Folder(path, spec, own, max(unused / 86_400, 0.0)) if is_own else None


def default_directory() -> Path:
    """Returns the user's cache directory for this package.

    It is `keras_transfer` in `$XDG_CACHE_HOME`, in `%LOCALAPPDATA%` on Windows, or else
    in `~/.cache`.
    """
    if "XDG_CACHE_HOME" in os.environ:
        return Path(os.environ["XDG_CACHE_HOME"]) / "keras_transfer"
    if os.name == "nt" and "LOCALAPPDATA" in os.environ:
        return Path(os.environ["LOCALAPPDATA"]) / "keras_transfer"
    return Path.home() / ".cache" / "keras_transfer"
