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
import shutil
import tempfile
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.run import is_writable, locked, nearest_directory, sync

_SHARD_BYTES = 32 * 2**20
_SHARD_SECONDS = 10.0
_MOST_SMALL = 32  # shards of less than half that size, before they are merged
_MOST_ATTEMPTS = 10  # to write a shard, while others prune its table
_LARGEST_FLOAT16 = 65504.0
_INDEX = np.dtype([("digest", "V32"), ("checksum", "<u4")])
_KEYED = np.dtype([("key", "<u8"), ("rest", "V24")])  # a digest
_UNKNOWN, _SOUND, _DAMAGED = range(3)
_VERSION = 1

_SPEC = "spec.json"
_SHARD = r"(?:[0-9a-f]{64}|\d{20}-[0-9a-f]{8})"  # by content; once, by time
_TABLE_NAME = re.compile(r"[0-9a-f]{32}")
_SHARD_NAME = re.compile(_SHARD)
_OWN_FILE = re.compile(
    rf"spec\.json|{_SHARD}\.(npy|index|tmp)|\.\w+\.tmp"
    rf"|\.(spec\.json|{_SHARD}\.index)\.\w+"
)

_OTHER_FIX = "Choose another with --cache-dir."
_FIXES = {
    errno.EMFILE: "Allow more open files with ulimit -n.",
    errno.ENFILE: "Close some programs.",
    errno.ENOSPC: "Make room with kt cache prune, or choose another with --cache-dir.",
}


@dataclass(frozen=True)
class FeatureSpec:
    """All that features depend on, besides the image's bytes.

    Attributes:
        base: Name of the base.
        weights_digest: SHA-256 of the weights below the split point.
        image_size: Side of the images in pixels.
        split_point: Layer whose output the features are.
        precision: `f32` or `bf16`.
        decoder_version: `decode.DECODER_VERSION`.
        view: 0 for the plain image, else the number of the augmented view.
        augmentation: Seed and version of the augmentation; "" for the plain image.
        dtype: How they are kept: `float32`, `float16` or `uint8`.
    """

    base: str
    weights_digest: str
    image_size: int
    split_point: str
    precision: str
    decoder_version: int
    view: int = 0
    augmentation: str = ""
    dtype: str = "float32"

    def key(self) -> str:
        """The name of the folder."""
        text = json.dumps(asdict(self) | {"version": _VERSION}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class ShardStore:
    """Where the shards of one table are kept: a folder.

    A shard is rows `[n, ...]` and an index `[n]` of `_INDEX`. Its name is the SHA-256
    of the index, so that shards with one name have the same rows, and whoever writes
    one again only mends it.
    """

    def __init__(self, folder: Path, spec: FeatureSpec):
        self._folder = folder
        self._spec = spec
        self._maps: dict[str, np.ndarray] = {}

    def __str__(self) -> str:
        return str(self._folder)

    def list(self) -> dict[str, int]:
        """Names of the complete shards in order, and how many bytes each has."""
        with _explained(self._folder, "read"):
            return _shard_sizes(_file_sizes(self._folder))

    def index(self, name: str) -> np.ndarray:
        """The index of a shard.

        Raises:
            FileNotFoundError: If the shard is not there any more.
            ValueError: If it is damaged.
            KerasTransferError: If it cannot be read.
        """
        path = self._folder / f"{name}.index"
        with _explained(path, "read"):
            content = path.read_bytes()
        if len(name) == 64 and hashlib.sha256(content).hexdigest() != name:
            raise ValueError(f"{path} is damaged")
        return np.frombuffer(content, _INDEX)

    def read(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows of a shard, in any order, which are not checked.

        Raises:
            FileNotFoundError: If the shard is not there any more.
            ValueError: If it is damaged.
            KerasTransferError: If it cannot be read.
        """
        path = self._folder / f"{name}.npy"
        with _explained(path, "read"):
            try:
                if name not in self._maps:
                    self._maps[name] = _mapped(path)
                return self._maps[name][rows]
            except (OSError, MemoryError):
                raise
            except Exception as error:  # whatever a damaged header causes
                raise ValueError(f"{path} is damaged") from error

    def prepare(self) -> None:
        """Finds out whether shards can be written, before there are any.

        Raises:
            KerasTransferError: If they cannot.
        """
        with _explained(self._folder, "written"):
            self._describe()
            if not os.access(self._folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def put(self, index: np.ndarray, rows: np.ndarray) -> str:
        """Writes a shard, so that it is there whole or not at all; returns its name.

        Raises:
            KerasTransferError: If it cannot be written.
        """
        content = index.tobytes()
        name = hashlib.sha256(content).hexdigest()
        files: dict[str, Sequence[bytes | memoryview]] = {
            f"{name}.npy": [_npy_header(rows), rows.data],
            f"{name}.index": [content],
        }
        with _explained(self._folder, "written"):
            for attempt in itertools.count(1):
                try:
                    self._describe()
                    self._write(files)
                    self._describe()
                    break
                except (FileNotFoundError, FileExistsError):  # it is being pruned
                    if attempt == _MOST_ATTEMPTS:
                        raise
        self._maps.pop(name, None)  # what it replaced
        return name

    def delete(self, name: str) -> None:
        """Deletes a shard, which another process may have done already."""
        self._maps.pop(name, None)
        with _explained(self._folder, "written"):
            for suffix in (".index", ".npy"):
                (self._folder / f"{name}{suffix}").unlink(missing_ok=True)

    def remove_left_overs(self) -> None:
        """Removes what writers that were killed did not finish."""
        with _explained(self._folder, "read"):
            sizes = _file_sizes(self._folder)
        shards = _shard_sizes(sizes)
        for name in filter(_OWN_FILE.fullmatch, sizes):
            path = self._folder / name
            if path.stem in shards or name == _SPEC:
                continue
            # What cannot be locked is being written. What has an index now is finished.
            with contextlib.suppress(OSError), locked(path) as is_held:
                if is_held and not path.with_suffix(".index").exists():
                    path.unlink()

    def _describe(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self._spec), indent=1).encode()
        with contextlib.suppress(FileNotFoundError):
            if (self._folder / _SPEC).read_bytes() == text:
                return
        self._write({_SPEC: [text]})

    def _write(self, files: Mapping[str, Sequence[bytes | memoryview]]) -> None:
        """Writes files in full, and only then gives them their names, in this order."""
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
        """A new file, locked until the stack is closed, and then removed."""
        while True:
            descriptor, name = tempfile.mkstemp(".tmp", ".", self._folder)
            os.close(descriptor)
            path = Path(name)
            stack.callback(path.unlink, missing_ok=True)
            # Until it is locked another process may take it for a left-over.
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                stack.enter_context(locked(path))
                if path.exists():
                    return path


@dataclass(frozen=True, eq=False)
class _Index:
    """Which row of which shard an image's features are in.

    An image may have several entries, such as one whose row is damaged and a later one.

    Attributes:
        names: Of the shards.
        starts: int64 `[len(names) + 1]`: where the entries of each shard start.
        entries: `[N]` of `_INDEX`, one for each row of each shard.
        states: uint8 `[N]`: whether the row is `_UNKNOWN`, `_SOUND` or `_DAMAGED`.
        keys: uint64 `[N]`, sorted: first 8 bytes of the digests, which are random.
        order: uint32 `[N]`: the entry of each key.
    """

    names: tuple[str, ...]
    starts: np.ndarray
    entries: np.ndarray
    states: np.ndarray
    keys: np.ndarray
    order: np.ndarray

    @classmethod
    def read(cls, store: ShardStore) -> "_Index":
        """Reads the indices of all shards."""
        names, starts, content = [], [0], bytearray()
        for name in store.list():
            with contextlib.suppress(FileNotFoundError, ValueError):
                index = store.index(name)
                content += index.tobytes()
                names.append(name)
                starts.append(starts[-1] + len(index))
        entries = np.frombuffer(content, _INDEX)
        keys = _keys(entries["digest"])
        order = np.argsort(keys)
        return cls(
            tuple(names),
            np.array(starts),
            entries,
            np.full(len(entries), _UNKNOWN, np.uint8),
            keys[order],
            order.astype(np.uint32),
        )

    def extended(self, name: str, index: np.ndarray) -> "_Index":
        """The same with one more shard, all of whose rows are sound."""
        keys = _keys(index["digest"])
        order = np.argsort(keys)
        places = np.searchsorted(self.keys, keys[order])
        count = len(self.entries)
        return _Index(
            (*self.names, name),
            np.append(self.starts, count + len(index)),
            np.concatenate([self.entries, index]),
            np.append(self.states, np.full(len(index), _SOUND, np.uint8)),
            np.insert(self.keys, places, keys[order]),
            np.insert(self.order, places, (count + order).astype(np.uint32)),
        )

    def take_states(self, other: "_Index") -> None:
        """Takes over what is known of the rows of the shards that both have."""
        spans = itertools.pairwise(other.starts)
        known = dict(zip(other.names, spans, strict=True))
        for name, (start, stop) in zip(
            self.names, itertools.pairwise(self.starts), strict=True
        ):
            if name in known:
                self.states[start:stop] = other.states[slice(*known[name])]

    def find(
        self, digests: np.ndarray, are_sound: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """int64 `[n]`: a sound entry of each digest, -1 where there is none."""
        found = np.full(len(digests), -1, np.int64)
        wanted = _keys(digests)
        places = np.searchsorted(self.keys, wanted)
        asked = np.arange(len(digests))
        while len(asked):
            asked = asked[places[asked] < len(self.keys)]
            asked = asked[self.keys[places[asked]] == wanted[asked]]
            entries = self.order[places[asked]]
            is_hit = self.entries["digest"][entries] == digests[asked]
            is_hit[is_hit] = are_sound(entries[is_hit])
            found[asked[is_hit]] = entries[is_hit]
            asked = asked[~is_hit]
            places[asked] += 1
        return found

    def candidates(self, digest: bytes) -> Iterator[int]:
        """The entries of one digest, sound or not."""
        key = np.uint64(int.from_bytes(digest[:8], "little"))
        for place in range(int(self.keys.searchsorted(key)), len(self.keys)):
            if self.keys[place] != key:
                return
            entry = int(self.order[place])
            if self.entries[entry]["digest"].tobytes() == digest:
                yield entry

    def by_shard(
        self, entries: np.ndarray
    ) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(name, rows in ascending order, where each is in `entries`) of each shard."""
        places = np.argsort(entries, kind="stable")
        ordered = entries[places].astype(np.int64)
        shards = np.searchsorted(self.starts, ordered, side="right") - 1
        rows = ordered - self.starts[shards]
        changes = np.flatnonzero(shards[1:] != shards[:-1]) + 1
        for first, last in itertools.pairwise([0, *changes, len(shards)]):
            if first < last:
                name = self.names[shards[first]]
                yield name, rows[first:last], places[first:last]


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
        self._index = _Index.read(store)
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
            index = np.empty(len(rows), _INDEX)
            index["digest"] = _digests(list(self._pending))
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
        return Features(self, _digests(digests))

    def locate(self, digests: np.ndarray) -> tuple[_Index, np.ndarray]:
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
        self, index: _Index, entries: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows, where they are in `entries`) of each shard.

        Raises:
            FileNotFoundError: If a shard is not there any more.
        """
        for name, rows, places in index.by_shard(entries):
            try:
                yield self._store.read(name, rows), places
            except ValueError:  # damaged since it was checked
                index.states[entries[places]] = _DAMAGED
                raise FileNotFoundError(name) from None

    def reload(self) -> None:
        """Looks anew which shards there are."""
        index = _Index.read(self._store)
        index.take_states(self._index)
        self._index = index

    def _find(self, digests: np.ndarray) -> tuple[_Index, np.ndarray]:
        """An index, and the entry in it of each digest; -1 for those it has not."""
        while True:
            index = self._index
            try:
                return index, index.find(
                    digests, functools.partial(self._are_sound, index)
                )
            except FileNotFoundError:  # shards were merged, or pruned
                self.reload()

    def _is_sound(self, index: _Index, entry: int) -> bool:
        if index.states[entry] == _UNKNOWN:
            shard = int(index.starts.searchsorted(entry, "right")) - 1
            row = entry - index.starts[shard : shard + 1]
            checksum = index.entries["checksum"][entry : entry + 1]
            is_sound = self._check(index.names[shard], row, checksum)
            index.states[entry] = _SOUND if is_sound[0] else _DAMAGED
        return bool(index.states[entry] == _SOUND)

    def _are_sound(self, index: _Index, entries: np.ndarray) -> np.ndarray:
        unknown = entries[index.states[entries] == _UNKNOWN]
        for name, rows, places in index.by_shard(unknown):
            checked = unknown[places]
            is_sound = self._check(name, rows, index.entries["checksum"][checked])
            index.states[checked] = np.where(is_sound, _SOUND, _DAMAGED)
        return index.states[entries] == _SOUND

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
        with _explained(self.directory, "read"):
            return shutil.disk_usage(nearest_directory(self.directory)).free

    def rows(self, spec: FeatureSpec) -> int:
        """How many images a spec has features of, without reading them."""
        with _explained(self.directory, "read"):
            return _count_rows(_file_sizes(self.directory / spec.key()))

    def list(self) -> Iterator[dict]:
        """A dict a table: its spec, `images`, `bytes` and `days_unused`."""
        for folder in self._folders():
            if folder.spec:
                yield asdict(folder.spec) | {
                    "images": _count_rows(folder.sizes),
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
        with _explained(self.directory, "read"):
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
        with _explained(self.path, "pruned"):
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
    with _explained(path, "read"):
        sizes = _file_sizes(path)
        unused = time.time() - path.stat().st_mtime
        text = (path / _SPEC).read_bytes() if _SPEC in sizes else b""
    own = {name: sizes[name] for name in sizes if _OWN_FILE.fullmatch(name)}
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


@contextlib.contextmanager
def _explained(place: Path | str, verb: str) -> Iterator[None]:
    """Makes an error of the system one of ours; what is not there to be read is none.

    Raises:
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
    """The array of an `.npy` file, mapped into memory without a file descriptor.

    NumPy's and Python's own maps hold one each (Python's can do without from 3.13 on),
    and there are not enough of them for all shards of a large cache.

    Raises:
        ValueError: If the file is damaged.
    """
    if os.name == "nt":  # where they are not scarce
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
    # `np.save` would not say why it cannot write.
    file = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(rows)
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def _digests(digests: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), _INDEX["digest"])


def _keys(digests: np.ndarray) -> np.ndarray:
    return digests.view(_KEYED)["key"].astype(np.uint64)


def _file_sizes(folder: Path) -> dict[str, int]:
    """Name -> size of the files of a folder, none if it is not there."""
    sizes = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # merged, or pruned
                if entry.is_file():
                    sizes[entry.name] = entry.stat().st_size
    return sizes


def _shard_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Name -> size of the complete shards among files, sorted."""
    names = sorted(name.removesuffix(".index") for name in sizes)
    return {
        name: sizes[f"{name}.npy"] + sizes[f"{name}.index"]
        for name in names
        if _SHARD_NAME.fullmatch(name)
        and f"{name}.npy" in sizes
        and f"{name}.index" in sizes
    }


def _count_rows(sizes: Mapping[str, int]) -> int:
    names = _shard_sizes(sizes)
    return sum(sizes[f"{name}.index"] for name in names) // _INDEX.itemsize
