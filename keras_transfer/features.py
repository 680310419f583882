"""Features of an image are computed once, ever.

A cache directory holds a folder for each way of computing features (`FeatureSpec`:
base, weights, image size, ...). A folder holds shards, and a shard is two files: the
rows as `.npy`, and an index of the images' digests with a checksum of each row. A shard
is written under a temporary name and never changed afterwards, the index last. So a
killed process loses at most the shard it was filling, any number of processes may read
and write one folder, and what was damaged on disk is noticed and computed again.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.run import write_atomic

_SHARD_BYTES = 32 * 2**20
_SHARD_SECONDS = 10.0
_LARGEST_FLOAT16 = 65504.0
_INDEX = np.dtype([("digest", "V32"), ("checksum", "<u4")])
_VERSION = 1


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


class Features:
    """Rows of cached features, read from memory-mapped shards when they are needed.

    `features[start:stop]` is an array `[stop - start, ...]` of the spec's dtype.
    """

    def __init__(self, shards: Sequence[np.ndarray], rows: np.ndarray, dtype: str):
        """Addresses rows.

        Args:
            shards: Memory-mapped arrays `[n, ...]`.
            rows: int64 `[N, 2]`: shard and row of each image.
            dtype: Of the arrays.
        """
        self._shards = shards
        self._rows = rows
        self.dtype = np.dtype(dtype)
        row_shape = shards[rows[0, 0]].shape[1:] if len(rows) else ()
        self.shape = (len(rows), *row_shape)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Size of all rows in bytes."""
        return self.dtype.itemsize * int(np.prod(self.shape))

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        rows = self._rows[index]
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for shard in np.unique(rows[:, 0]):
            here = rows[:, 0] == shard
            out[here] = self._shards[shard][rows[here, 1]]
        return out


class FeatureTable:
    """The features of one spec: a folder of shards."""

    def __init__(self, folder: Path, spec: FeatureSpec):
        self.folder = folder
        self._spec = spec
        self._shards: list[np.ndarray] = []
        self._rows: dict[bytes, tuple[int, int]] = {}
        self._unverified: dict[bytes, tuple[int, int, int]] = {}
        self._pending: dict[bytes, np.ndarray] = {}
        self._flushed = time.monotonic()
        for index_path in sorted(folder.glob("*.index")):
            self._open_shard(index_path)

    def __contains__(self, digest: bytes) -> bool:
        """Whether an image's features are here, and undamaged."""
        if digest in self._unverified:
            shard, row, checksum = self._unverified.pop(digest)
            if zlib.crc32(self._shards[shard][row].tobytes()) == checksum:
                self._rows[digest] = shard, row
        return digest in self._rows or digest in self._pending

    def add(self, digest: bytes, row: np.ndarray) -> None:
        """Keeps the float32 features of an image; on disk within some seconds."""
        if self._spec.dtype == "float16":
            row = np.clip(row, -_LARGEST_FLOAT16, _LARGEST_FLOAT16)
        row = row.astype(self._spec.dtype, copy=False)
        self._pending[digest] = row
        size = len(self._pending) * row.nbytes
        if size > _SHARD_BYTES or time.monotonic() - self._flushed > _SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what was added as a shard of its own."""
        self._flushed = time.monotonic()
        if self._pending:
            with _writing(self.folder):
                self._write_shard()

    def _write_shard(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        spec_path = self.folder / "spec.json"
        if not spec_path.exists():
            write_atomic(spec_path, json.dumps(asdict(self._spec), indent=1))
        rows = np.stack(list(self._pending.values()))
        index = np.array(
            [
                (np.void(digest), zlib.crc32(row.tobytes()))
                for digest, row in zip(self._pending, rows, strict=True)
            ],
            _INDEX,
        )
        # The process's own name: no other process ever writes this shard.
        path = self.folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.npy"
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.save(file, rows)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        write_atomic(path.with_suffix(".index"), index.tobytes())
        self._pending.clear()
        self._open_shard(path.with_suffix(".index"))

    def features(self, digests: Sequence[bytes]) -> Features:
        """The rows of images, in this order.

        Raises:
            KeyError: If an image is not in the table, or damaged, or not flushed yet.
        """
        for digest in digests:
            if digest not in self:
                raise KeyError(digest.hex())
        rows = [self._rows[digest] for digest in digests]
        return Features(
            self._shards, np.array(rows, np.int64).reshape(-1, 2), self._spec.dtype
        )

    def _open_shard(self, index_path: Path) -> None:
        try:
            index = np.frombuffer(index_path.read_bytes(), _INDEX)
            rows = np.load(index_path.with_suffix(".npy"), mmap_mode="r")
        except Exception:  # pruned a moment ago, or whatever a damaged header causes
            return
        if rows.dtype != self._spec.dtype or len(rows) != len(index):
            return
        shard = len(self._shards)
        self._shards.append(rows)
        checksums = index["checksum"].tolist()
        for row, (digest, checksum) in enumerate(
            zip(index["digest"], checksums, strict=True)
        ):
            self._unverified[digest.tobytes()] = shard, row, checksum


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
        places = (self.directory, *self.directory.absolute().parents)
        existing = next(path for path in places if path.exists())
        is_writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
        if not is_writable and next(self.list(), None) is None:
            raise UsageError(
                f"The feature cache cannot be written. Received: {self.directory}. "
                "Choose another with --cache-dir."
            )

    def table(self, spec: FeatureSpec) -> FeatureTable:
        """The table of a spec, empty if nothing was cached for it yet.

        Raises:
            KerasTransferError: If the cache directory cannot be used.
        """
        folder = self.directory / spec.key()
        with _writing(self.directory):
            folder.mkdir(parents=True, exist_ok=True)
            os.utime(folder)  # its age, for `prune`
        return FeatureTable(folder, spec)

    def free_bytes(self) -> int:
        """Room that is left on the disk.

        Raises:
            KerasTransferError: If the cache directory cannot be used.
        """
        with _writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            return shutil.disk_usage(self.directory).free

    def rows(self, spec: FeatureSpec) -> int:
        """How many images a spec has features of, without reading them."""
        folder = self.directory / spec.key()
        sizes = (path.stat().st_size for path in folder.glob("*.index"))
        return sum(sizes) // _INDEX.itemsize

    def list(self) -> Iterator[dict]:
        """A dict a table: its spec, `images`, `bytes` and `days_unused`."""
        for spec_path in sorted(self.directory.glob("*/spec.json")):
            folder = spec_path.parent
            try:
                spec = FeatureSpec(**json.loads(spec_path.read_text()))
            except (OSError, TypeError, ValueError):  # damaged, or being pruned
                continue
            size = sum(path.stat().st_size for path in folder.iterdir())
            yield asdict(spec) | {
                "images": self.rows(spec),
                "bytes": size,
                "days_unused": (time.time() - folder.stat().st_mtime) / 86_400,
            }

    def prune(self, unused_days: float) -> tuple[int, int]:
        """Deletes tables that were not used for some days.

        Returns:
            (tables deleted, bytes freed).
        """
        deleted = freed = 0
        for folder in self.directory.glob("*/"):
            if time.time() - folder.stat().st_mtime < unused_days * 86_400:
                continue
            freed += sum(path.stat().st_size for path in folder.iterdir())
            shutil.rmtree(folder, ignore_errors=True)  # another may be pruning too
            deleted += 1
        return deleted, freed


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KerasTransferError(
            f"The feature cache cannot be written. Received: {directory} "
            f"({error.strerror}). Choose another with --cache-dir."
        ) from None


def default_directory() -> Path:
    """The user's cache directory: `$XDG_CACHE_HOME/keras_transfer` or the like."""
    if "XDG_CACHE_HOME" in os.environ:
        return Path(os.environ["XDG_CACHE_HOME"]) / "keras_transfer"
    if os.name == "nt" and "LOCALAPPDATA" in os.environ:
        return Path(os.environ["LOCALAPPDATA"]) / "keras_transfer"
    return Path.home() / ".cache" / "keras_transfer"
