"""Features of an image are computed once, ever.

A cache directory holds a folder for each way of computing features (`FeatureSpec`:
base, weights, image size, ...). A folder holds shards, and a shard is two files: the
rows as `.npy`, and an index of the images' digests with a checksum of each row. A shard
is written under a temporary name and never changed afterwards, the index last. So a
killed process loses at most the shard it was filling, any number of processes may read
and write one folder, and what was damaged on disk is noticed and computed again.
"""

import hashlib
import itertools
import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from keras_transfer.data import Reader, map_ahead
from keras_transfer.errors import DecodeError, KerasTransferError
from keras_transfer.extract import BATCH_SIZE, Extractor
from keras_transfer.run import write_atomic

_SHARD_BYTES = 32 * 2**20
_SHARD_SECONDS = 10.0
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
    """

    base: str
    weights_digest: str
    image_size: int
    split_point: str
    precision: str
    decoder_version: int
    view: int = 0
    augmentation: str = ""

    def key(self) -> str:
        """The name of the folder."""
        text = json.dumps(asdict(self) | {"version": _VERSION}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class Features:
    """Rows of cached features, read from memory-mapped shards when they are needed.

    `features[start:stop]` is a float32 array `[stop - start, ...]`.
    """

    def __init__(self, shards: Sequence[np.ndarray], rows: np.ndarray):
        """Addresses rows.

        Args:
            shards: Memory-mapped arrays `[n, ...]`.
            rows: int64 `[N, 2]`: shard and row of each image.
        """
        self._shards = shards
        self._rows = rows
        self.shape = (len(rows), *shards[0].shape[1:]) if shards else (0,)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Size of all rows in bytes."""
        return 4 * int(np.prod(self.shape))

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        rows = self._rows[index]
        out = np.empty((len(rows), *self.shape[1:]), np.float32)
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
        self._pending[digest] = row
        size = len(self._pending) * row.nbytes
        if size > _SHARD_BYTES or time.monotonic() - self._flushed > _SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what was added as a shard of its own."""
        self._flushed = time.monotonic()
        if not self._pending:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        spec_path = self.folder / "spec.json"
        if not spec_path.exists():
            write_atomic(spec_path, json.dumps(asdict(self._spec), indent=1))
        rows = np.stack(list(self._pending.values())).astype(np.float32, copy=False)
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
        """The rows of images, in this order; each was found to be in the table."""
        rows = [self._rows[digest] for digest in digests if digest in self]
        return Features(self._shards, np.array(rows, np.int64).reshape(-1, 2))

    def _open_shard(self, index_path: Path) -> None:
        try:
            index = np.frombuffer(index_path.read_bytes(), _INDEX)
            rows = np.load(index_path.with_suffix(".npy"), mmap_mode="r")
        except (OSError, ValueError):  # cut off, damaged, or pruned a moment ago
            return
        if rows.dtype != np.float32 or len(rows) != len(index):
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

    def table(self, spec: FeatureSpec) -> FeatureTable:
        """The table of a spec, empty if nothing was cached for it yet.

        Raises:
            KerasTransferError: If the cache directory cannot be used.
        """
        folder = self.directory / spec.key()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if folder.is_dir():
                os.utime(folder)  # its age, for `prune`
        except OSError as error:
            raise KerasTransferError(
                f"The feature cache cannot be written. Received: {self.directory} "
                f"({error.strerror}). Choose another with --cache-dir."
            ) from None
        return FeatureTable(folder, spec)

    def rows(self, spec: FeatureSpec) -> int:
        """How many images a spec has features of, without reading them."""
        folder = self.directory / spec.key()
        sizes = (path.stat().st_size for path in folder.glob("*.index"))
        return sum(sizes) // _INDEX.itemsize

    def list(self) -> Iterator[dict]:
        """A dict a table: its spec, `images`, `bytes` and `last_used` (POSIX time)."""
        for spec_path in sorted(self.directory.glob("*/spec.json")):
            folder = spec_path.parent
            spec = FeatureSpec(**json.loads(spec_path.read_text()))
            size = sum(path.stat().st_size for path in folder.iterdir())
            yield asdict(spec) | {
                "images": self.rows(spec),
                "bytes": size,
                "last_used": folder.stat().st_mtime,
            }

    def prune(self, unused_days: float) -> tuple[int, int]:
        """Deletes tables that were not used for some days.

        Returns:
            (tables deleted, bytes freed).
        """
        deleted = freed = 0
        for folder in self.directory.glob("*"):
            if time.time() - folder.stat().st_mtime < unused_days * 86_400:
                continue
            freed += sum(path.stat().st_size for path in folder.iterdir())
            shutil.rmtree(folder, ignore_errors=True)  # another may be pruning too
            deleted += 1
        return deleted, freed


def default_directory() -> Path:
    """The user's cache directory: `$XDG_CACHE_HOME/keras_transfer` or the like."""
    if "XDG_CACHE_HOME" in os.environ:
        return Path(os.environ["XDG_CACHE_HOME"]) / "keras_transfer"
    if os.name == "nt" and "LOCALAPPDATA" in os.environ:
        return Path(os.environ["LOCALAPPDATA"]) / "keras_transfer"
    return Path.home() / ".cache" / "keras_transfer"


@dataclass
class Extraction:
    """What happened while features were computed.

    Attributes:
        tables: Of the plain images, then of views 1, 2, ...
        extractor: What ran the base; None if nothing was missing.
        digests: SHA-256 of the bytes of each image that has features.
        skipped: Why each image that has none could not be used.
        decoded: Number of images decoded.
        decode_seconds: Time spent decoding, summed over threads.
    """

    tables: Sequence[FeatureTable] = ()
    extractor: Extractor | None = None
    digests: dict[str, bytes] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    decoded: int = 0
    decode_seconds: float = 0.0


def extract_features(
    sources: Sequence[str],
    read: Reader,
    decode: Callable[[bytes], np.ndarray],
    make_extractor: Callable[[np.ndarray], Extractor],
    make_tables: Callable[[str], Sequence[FeatureTable]],
    precision: str | None,
    augment: Callable[[np.ndarray, bytes, int], np.ndarray] | None = None,
    views: Mapping[str, int] | None = None,
    on_image: Callable[[], object] = lambda: None,
    decoded_ahead: int = 256,
) -> Extraction:
    """Computes the features of all images that are not in the cache yet.

    Every image is read, so that its bytes are known; only the missing ones are decoded
    and go through the base, decoding in threads while the base runs. What is finished
    when the process is interrupted is kept.

    Args:
        sources: The images.
        read: Yields their encoded bytes.
        decode: From encoded bytes to pixels; raises `DecodeError`.
        make_extractor: Called with the pixels of the first batch, and only if something
            is missing.
        make_tables: From a precision to the tables of the plain images and of views.
        precision: Of the tables to look into; None if nothing is cached and the
            extractor is to decide.
        augment: Makes views.
        views: How many augmented views an image has, where it has any.
        on_image: Called once an image, as work goes on.
        decoded_ahead: How many decoded images may wait, the first of them while the
            extractor is being made.
    """
    extraction = Extraction(tables=make_tables(precision) if precision else ())
    unusable: dict[bytes, str] = {}
    started: set[tuple[bytes, int]] = set()

    def missing() -> Iterator[tuple[bytes, list[int], bytes]]:
        for source, encoded in read(sources):
            on_image()
            if isinstance(encoded, OSError):
                extraction.skipped[source] = f"cannot be read: {encoded.strerror}"
                continue
            digest = hashlib.sha256(encoded).digest()
            extraction.digests[source] = digest
            wanted = [
                view
                for view in range(1 + (views or {}).get(source, 0))
                if (digest, view) not in started
                and not (precision and digest in extraction.tables[view])
            ]
            if wanted:
                started.update((digest, view) for view in wanted)
                yield digest, wanted, encoded

    def decoded(
        item: tuple[bytes, list[int], bytes],
    ) -> tuple[bytes, list[int], np.ndarray | DecodeError, float]:
        digest, wanted, encoded = item
        start = time.perf_counter()
        try:
            result: np.ndarray | DecodeError = decode(encoded)
        except DecodeError as error:
            result = error
        return digest, wanted, result, time.perf_counter() - start

    def pixels() -> Iterator[tuple[tuple[int, bytes], np.ndarray]]:
        threads = os.cpu_count() or 1
        items = map_ahead(decoded, missing(), threads, decoded_ahead)
        for digest, wanted, image, seconds in items:
            extraction.decode_seconds += seconds
            if isinstance(image, DecodeError):
                unusable[digest] = str(image)
                continue
            extraction.decoded += 1
            for view in wanted:
                if view and augment:
                    yield (view, digest), augment(image, digest, view)
                else:
                    yield (view, digest), image

    batches = _batches(pixels())
    first = next(batches, None)
    if first is not None:
        extractor = make_extractor(first[1])
        extraction.extractor = extractor
        extraction.tables = extraction.tables or make_tables(extractor.precision)
        try:
            for tags, outputs in extractor.run(itertools.chain([first], batches)):
                for (view, digest), row in zip(tags, outputs, strict=True):
                    extraction.tables[view].add(digest, row)
        finally:
            for table in extraction.tables:
                table.flush()
    for source, digest in list(extraction.digests.items()):
        if digest in unusable:
            extraction.skipped[source] = unusable[digest]
            del extraction.digests[source]
    return extraction


def _batches(
    images: Iterable[tuple[tuple[int, bytes], np.ndarray]],
) -> Iterator[tuple[list[tuple[int, bytes]], np.ndarray]]:
    iterator = iter(images)
    while batch := list(itertools.islice(iterator, BATCH_SIZE)):
        yield [tag for tag, _ in batch], np.stack([image for _, image in batch])
