"""Images -> features: the output of the frozen part of a model, computed once."""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np

from keras_transfer.data.decode import DecodedImage
from keras_transfer.data.quality import QUALITY_DTYPE, measure_quality
from keras_transfer.data.reading import Reader, hashing, map_ahead
from keras_transfer.errors import DecodeError, KerasTransferError
from keras_transfer.events import Listener
from keras_transfer.features.cache import FeatureTable
from keras_transfer.features.engine import BATCH_SIZE, Engine

_QUALITY = -1  # pseudo view number that stands for the quality measures

_T = TypeVar("_T")


@dataclass
class Extraction:
    """The result of computing features.

    Attributes:
        tables: Feature tables of the plain images, then of views 1, 2, ...
        engine: Engine that ran the base; None if nothing was missing.
        digests: SHA-256 of the bytes of each image that has features, by source.
        skipped: Reason why an image could not be used, by source.
        quality_table: Table of quality measures; None if nothing is measured.
        decoded: Number of images decoded for their features.
        decode_seconds: Seconds spent waiting for images to be read and decoded.
        forwarded: Number of images that went through the base, including views.
        forward_seconds: Seconds spent waiting for the base.
    """

    tables: Sequence[FeatureTable] = ()
    engine: Engine | None = None
    digests: dict[str, bytes] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    quality_table: FeatureTable | None = None
    decoded: int = 0
    decode_seconds: float = 0.0
    forwarded: int = 0
    forward_seconds: float = 0.0

    def join(self, other: "Extraction") -> None:
        """Adds the work of another extraction, and leaves out what it skipped."""
        self.engine = self.engine or other.engine
        self.skipped |= other.skipped
        for source in other.skipped:
            self.digests.pop(source, None)
        self.decoded += other.decoded
        self.decode_seconds += other.decode_seconds
        self.forwarded += other.forwarded
        self.forward_seconds += other.forward_seconds

    def quality(self, sources: Sequence[str]) -> np.ndarray:
        """Returns quality measures, `[N]` of `QUALITY_DTYPE`; zeros if not measured."""
        rows = np.zeros(len(sources), QUALITY_DTYPE)
        table = self.quality_table
        if table is None:
            return rows
        places = np.array([i for i, x in enumerate(sources) if x in self.digests], int)
        digests = [self.digests[sources[i]] for i in places]
        is_measured = table.contains(digests)
        places = places[is_measured]
        if len(places):
            with contextlib.suppress(KerasTransferError):  # pruned meanwhile
                found = table.features([*itertools.compress(digests, is_measured)])[:]
                rows[places] = np.ascontiguousarray(found).view(QUALITY_DTYPE)[:, 0]
        return rows


@dataclass(frozen=True)
class Images:
    """Images to compute features of, and how to read, decode and augment them.

    Attributes:
        sources: Identifiers of the images.
        read: Reads their encoded bytes.
        decode: Converts encoded bytes to a decoded image; raises `DecodeError`.
        augment: Computes a view's pixels from pixels, digest and view number.
        views: Number of augmented views by source; 0 for sources that are missing.
        known: SHA-256 by source of images that need not be read to compute it.
        remember: Called with SHA-256 by source in the end, even if interrupted.
        quality_table: Table for quality measures; None if they are not needed.
        measures_quality: Whether to measure images that the table does not have.
        decoded_ahead: Maximum number of decoded images that may wait for the engine,
            including while it is being created.
    """

    sources: Sequence[str]
    read: Reader
    decode: Callable[[bytes], DecodedImage]
    augment: Callable[[np.ndarray, bytes, int], np.ndarray] | None = None
    views: Mapping[str, int] = field(default_factory=dict)
    known: Mapping[str, bytes] = field(default_factory=dict)
    remember: Callable[[Mapping[str, bytes]], object] = lambda _: None
    quality_table: FeatureTable | None = None
    measures_quality: bool = False
    decoded_ahead: int = 256


class _View(NamedTuple):
    """A view of an image on its way through the base; view 0 is the plain image."""

    digest: bytes
    number: int
    is_last: bool


class _Missing(NamedTuple):
    """An image to decode, and its views that are needed, with `_QUALITY` last."""

    digest: bytes
    wanted: list[int]
    encoded: bytes


def extract_features(
    images: Images,
    tables: Sequence[FeatureTable],
    make_engine: Callable[[np.ndarray], Engine],
    make_tables: Callable[[Engine], Sequence[FeatureTable]],
    listener: Listener,
) -> Extraction:
    """Computes the features of all images that are not in the cache yet.

    Images whose digests are unknown are read. Only those whose features are missing are
    decoded, in threads, and go through the base at the same time. If the process is
    interrupted, finished features are kept.

    Args:
        images: The images.
        tables: Cached features of the plain images and of each view.
        make_engine: Called with the pixels of the first batch, only if features are
            missing.
        make_tables: Returns the tables for features that an engine computes.
        listener: Receives progress after each image.
    """
    walk = _Walk(images, tables, listener)
    extraction = walk.extraction
    with contextlib.ExitStack() as stack:
        stack.callback(images.remember, extraction.digests)
        if images.quality_table is not None:
            stack.callback(images.quality_table.flush)
        batches = _Timed(walk.batches())
        first = next(batches, None)
        if first is not None:
            engine = extraction.engine = make_engine(first[1])
            extraction.tables = make_tables(engine)
            for table in extraction.tables:
                table.prepare()
                stack.callback(table.flush)
            outputs = _Timed(engine.run(itertools.chain([first], batches)))
            before = batches.seconds
            for views, rows in outputs:
                extraction.forwarded += len(rows)
                for view, row in zip(views, rows, strict=True):
                    extraction.tables[view.number].add(view.digest, row)
                    if view.is_last:
                        walk.finish_one()
            extraction.forward_seconds = outputs.seconds - (batches.seconds - before)
    walk.leave_out_unusable()
    return extraction


class _Walk:
    """One pass over images, which reads each and decodes it if features are missing.

    Attributes:
        extraction: The result, which is filled in during the pass.
    """

    def __init__(
        self, images: Images, tables: Sequence[FeatureTable], listener: Listener
    ):
        self.extraction = Extraction(tables=tables, quality_table=images.quality_table)
        self._images = images
        self._tables = dict(enumerate(tables))
        if images.measures_quality and images.quality_table is not None:
            self._tables[_QUALITY] = images.quality_table
        self._listener = listener
        self._done = itertools.count(1)
        self._started: set[tuple[bytes, int]] = set()
        self._unusable: dict[bytes, str] = {}

    def batches(self) -> Iterator[tuple[list[_View], np.ndarray]]:
        """Yields batches of views whose features are missing, with their pixels."""
        views = self._views()
        while batch := list(itertools.islice(views, BATCH_SIZE)):
            yield [view for view, _ in batch], np.stack([pixels for _, pixels in batch])

    def finish_one(self) -> None:
        """Reports that an image is finished."""
        total = len(self._images.sources)
        self._listener.progress("features", next(self._done), total)

    def leave_out_unusable(self) -> None:
        """Moves images that could not be decoded to `extraction.skipped`."""
        digests = self.extraction.digests
        for source in [x for x, digest in digests.items() if digest in self._unusable]:
            self.extraction.skipped[source] = self._unusable[digests.pop(source)]

    def _missing(self) -> Iterator[_Missing]:
        """Yields images with missing features; reads only images that it has to."""
        unread = []
        for source in self._images.sources:
            digest = self._images.known.get(source)
            if digest is None or self._wanted(source, digest):
                unread.append(source)
            else:
                self.extraction.digests[source] = digest
                self.finish_one()
        read = hashing(self._images.read, self.extraction.digests)
        for source, encoded in read(unread):
            if isinstance(encoded, OSError):
                reason = f"cannot be read: {encoded.strerror}"
                self.extraction.skipped[source] = reason
                self.finish_one()
                continue
            digest = self.extraction.digests[source]
            wanted = self._wanted(source, digest)
            self._started.update((digest, view) for view in wanted)
            if wanted:
                yield _Missing(digest, wanted, encoded)
            else:
                self.finish_one()

    def _wanted(self, source: str, digest: bytes) -> list[int]:
        """Lists the views of an image that are neither cached nor in progress."""
        views = [*range(1 + self._images.views.get(source, 0))]
        views += [_QUALITY] if _QUALITY in self._tables else []
        return [
            view
            for view in views
            if (digest, view) not in self._started and digest not in self._tables[view]
        ]

    def _decoded(
        self, item: _Missing
    ) -> tuple[_Missing, DecodedImage | DecodeError, np.ndarray | None]:
        try:
            image = self._images.decode(item.encoded)
        except DecodeError as error:
            return item, error, None
        if _QUALITY in item.wanted:
            return item, image, measure_quality(item.encoded, image)
        return item, image, None

    def _views(self) -> Iterator[tuple[_View, np.ndarray]]:
        """Yields views with pixels; decodes in threads, one image after the other."""
        images = self._images
        items = _Timed(
            map_ahead(
                self._decoded,
                self._missing(),
                os.cpu_count() or 1,
                images.decoded_ahead,
                weigh=lambda item: len(item.encoded),
            )
        )
        for item, image, quality in items:
            self.extraction.decode_seconds = items.seconds
            if isinstance(image, DecodeError):
                self._unusable[item.digest] = str(image)
                self.finish_one()
                continue
            if quality is not None:
                row = np.frombuffer(quality.tobytes(), np.uint8)
                self._tables[_QUALITY].add(item.digest, row)
            numbers = [number for number in item.wanted if number != _QUALITY]
            if not numbers:
                self.finish_one()
                continue
            self.extraction.decoded += 1
            for number in numbers:
                view = _View(item.digest, number, number == numbers[-1])
                if number and images.augment:
                    yield view, images.augment(image.pixels, item.digest, number)
                else:
                    yield view, image.pixels


class _Timed(Iterator[_T]):
    """An iterator that measures the time spent waiting for its items.

    Attributes:
        seconds: Total wall-clock time so far.
    """

    def __init__(self, iterable: Iterable[_T]):
        self.seconds = 0.0
        self._iterator = iter(iterable)

    def __next__(self) -> _T:
        start = time.perf_counter()
        try:
            return next(self._iterator)
        finally:
            self.seconds += time.perf_counter() - start
