"""Features of an image are computed once, ever.

A cache directory holds a folder for each way of computing features (`FeatureSpec`:
base, weights, image size, ...). A folder holds shards, and a shard is two files: the
rows as `.npy`, and an index of the images' digests with a checksum of each row. A shard
is written under a temporary name and never changed afterwards, the index last. So a
killed process loses at most the shard it was filling, any number of processes may read
and write one folder, and what was damaged on disk is noticed and computed again. Shards
are written every few seconds, and when there are many small ones they are merged.
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

_SHARD_BYTES = 32 * 2**20
_SHARD_SECONDS = 10.0
_MOST_SMALL = 32  # shards of less than half that size, before they are merged
_LARGEST_FLOAT16 = 65504.0
_TABLE_NAME = re.compile(r"[0-9a-f]{32}")


class Features:
    """Rows of cached features, read when they are needed.

    `features[start:stop]` is an array `[stop - start, ...]` of the spec's dtype.
    """

    def __init__(self, table: "FeatureTable", digests: np.ndarray):
        """Finds rows; see `FeatureTable.features`."""
        self._table = table
        self._index, self._entries = table.locate(digests)
        self.dtype = np.dtype(table.spec.dtype)
        self.shape: tuple[int, ...] = (len(digests),)
        self.shape += self[:1].shape[1:]

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Size of all rows in bytes."""
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
    """The features of one spec: the shards of a store."""

    def __init__(self, store: ShardStore, spec: FeatureSpec):
        self.spec = spec
        self._store = store
        self._index = Index.read(store)
        self._pending: dict[bytes, np.ndarray] = {}
        self._flushed = time.monotonic()

    def __contains__(self, digest: bytes) -> bool:
        """Whether an image's features are here, and undamaged."""
        if digest in self._pending:
            return True
        while True:
            index = self._index
            try:  # as `_find` does for many, which takes six times as long for one
                return any(self._is_sound(index, e) for e in index.candidates(digest))
            except FileNotFoundError:  # shards were merged, or pruned
                self.reload()

    def prepare(self) -> None:
        """Finds out whether features can be kept, before any are computed.

        Raises:
            KerasTransferError: If they cannot.
        """
        self._store.prepare()

    def add(self, digest: bytes, row: np.ndarray) -> None:
        """Keeps the float32 features of an image; on disk within some seconds."""
        if self.spec.dtype == "float16":
            row = np.clip(row, -_LARGEST_FLOAT16, _LARGEST_FLOAT16)
        row = row.astype(self.spec.dtype, copy=False)
        self._pending[digest] = row
        size = len(self._pending) * row.nbytes
        if size > _SHARD_BYTES or time.monotonic() - self._flushed > _SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what was added as a shard of its own."""
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
        """The rows of images, in this order.

        Raises:
            KerasTransferError: If an image is not in the table, or damaged, or not
                flushed yet.
        """
        return Features(self, as_digests(digests))

    def locate(self, digests: np.ndarray) -> tuple[Index, np.ndarray]:
        """An index and the entries in it of images, in this order; see `features`."""
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
        """(rows, where they are in `entries`) of each shard.

        Raises:
            FileNotFoundError: If a shard is not there any more.
        """
        for name, rows, places in index.by_shard(entries):
            try:
                yield self._store.read(name, rows), places
            except ValueError:  # damaged since it was checked
                index.states[entries[places]] = DAMAGED
                raise FileNotFoundError(name) from None

    def reload(self) -> None:
        """Looks anew which shards there are."""
        index = Index.read(self._store)
        index.take_states(self._index)
        self._index = index

    def _find(self, digests: np.ndarray) -> tuple[Index, np.ndarray]:
        """An index, and the entry in it of each digest; -1 for those it has not."""
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
        """Which rows of a shard are as they were written."""
        try:
            found = self._store.read(name, rows)
        except ValueError:
            return np.zeros(len(rows), bool)
        if found.dtype != self.spec.dtype:
            return np.zeros(len(rows), bool)
        return np.array([zlib.crc32(row) for row in found], np.uint32) == checksums

    def _merge_small_shards(self) -> None:
        """Makes large shards of small ones, if there are many, whoever wrote them."""
        sizes = self._store.list()
        small = [name for name, size in sizes.items() if size < _SHARD_BYTES // 2]
        if len(small) < _MOST_SMALL:
            return
        ends = itertools.accumulate(sizes[name] for name in small)
        number_of = dict(zip(small, (end // _SHARD_BYTES for end in ends), strict=True))
        for _, group in itertools.groupby(small, number_of.__getitem__):
            self._merge(list(group))
        self.reload()

    def _merge(self, names: Sequence[str]) -> None:
        """Makes one shard of several, which are deleted when it is on the disk."""
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
    """All feature tables of a machine's user.

    Attributes:
        directory: Where they are.
    """

    def __init__(self, directory: Path | None = None):
        self.directory = (directory or default_directory()).expanduser() / "features"

    def check_usable(self) -> None:
        """Finds out early that nothing can be written where nothing is cached yet.

        A cache that has features is good enough to be read, as far as they go.

        Raises:
            UsageError: If the directory cannot be used.
        """
        if not is_writable(self.directory) and next(self.list(), None) is None:
            raise UsageError(
                f"The feature cache cannot be written. Received: {self.directory}. "
                "Choose another with --cache-dir."
            )

    def table(self, spec: FeatureSpec) -> FeatureTable:
        """The table of a spec, empty if nothing was cached for it yet.

        Raises:
            KerasTransferError: If the cache directory cannot be read.
        """
        folder = self.directory / spec.key()
        store = ShardStore(folder, spec)
        store.remove_left_overs()
        with contextlib.suppress(OSError):  # not there yet, or read-only
            os.utime(folder)  # its age, for `prune`
        return FeatureTable(store, spec)

    def free_bytes(self) -> int:
        """Room that is left on the disk.

        Raises:
            KerasTransferError: If the cache directory cannot be used.
        """
        with explaining_errors(self.directory, "read"):
            return shutil.disk_usage(nearest_directory(self.directory)).free

    def rows(self, spec: FeatureSpec) -> int:
        """How many images a spec has features of, without reading them."""
        with explaining_errors(self.directory, "read"):
            return count_rows(file_sizes(self.directory / spec.key()))

    def list(self) -> Iterator[dict]:
        """A dict a table: its spec, `images`, `bytes` and `days_unused`."""
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
        """Deletes tables that were not used for some days, or the longest.

        Args:
            unused_days: Tables not used for so long are deleted; None for no age limit.
            max_bytes: The tables that were not used for the longest time are deleted
                until the others take no more; None for no limit.

        Returns:
            (tables deleted, bytes freed).

        Raises:
            KerasTransferError: If something cannot be deleted.
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
        return deleted, freed

    def _folders(self) -> "Iterator[_Folder]":
        """The folders that are tables, and nobody else's."""
        with explaining_errors(self.directory, "read"):
            paths = sorted(self.directory.iterdir()) if self.directory.exists() else ()
        for path in paths:
            if not _TABLE_NAME.fullmatch(path.name):
                continue
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(FileNotFoundError):  # being pruned
                    found = _as_table(path)
                    if found:
                        yield found


@dataclass(frozen=True)
class _Folder:
    """A folder that is a table.

    Attributes:
        path: Where it is.
        spec: What it says that it is; None if it was not filled, or is being deleted.
        sizes: The bytes of each of its files.
        days_unused: How long ago it was used.
    """

    path: Path
    spec: FeatureSpec | None
    sizes: Mapping[str, int]
    days_unused: float

    @property
    def nbytes(self) -> int:
        """Size of all its files."""
        return sum(self.sizes.values())

    def delete(self) -> int:
        """Deletes its files, and it if there are no others; returns the bytes freed."""
        freed = 0
        # Without its index a shard is not there, without its spec the table is not.
        order = {".index": 0, ".json": 2}
        with explaining_errors(self.path, "pruned"):
            for name in sorted(self.sizes, key=lambda x: order.get(Path(x).suffix, 1)):
                path = self.path / name
                # Another may have pruned it, or may be writing it.
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
    """A folder as the table that it is; None if it may be somebody else's."""
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
    """The user's cache directory: `$XDG_CACHE_HOME/keras_transfer` or the like."""
    if "XDG_CACHE_HOME" in os.environ:
        return Path(os.environ["XDG_CACHE_HOME"]) / "keras_transfer"
    if os.name == "nt" and "LOCALAPPDATA" in os.environ:
        return Path(os.environ["LOCALAPPDATA"]) / "keras_transfer"
    return Path.home() / ".cache" / "keras_transfer"
