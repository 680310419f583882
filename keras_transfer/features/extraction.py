"""Images -> features: the frozen part of a model, as fast as this machine runs it.

On a CPU that is OpenVINO, with several requests in flight, so that images are decoded
while others go through the base. Where there is a GPU, or where OpenVINO cannot
convert the model, it is Keras. Either way the model runs in inference mode: random
layers are off and BatchNormalization uses its stored statistics.
"""

import contextlib
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import keras
import numpy as np

from keras_transfer.config import Precision
from keras_transfer.data.augment import AUGMENT_VERSION, make_augmenter
from keras_transfer.data.decode import (
    DECODER_VERSION,
    is_16_bit_png,
    is_nearly_black,
    make_decoder,
)
from keras_transfer.data.reading import Reader, map_ahead
from keras_transfer.data.tables import Splits
from keras_transfer.errors import DecodeError, UsageError
from keras_transfer.features.cache import FeatureCache, Features, FeatureTable
from keras_transfer.features.engine import BATCH_SIZE, Engine, Extractor
from keras_transfer.features.shards import FeatureSpec

_WAITING_BYTES = 2**26
_MOST_CHECKED = 64  # 16-bit PNGs that are decoded for no other reason
_ImageTag = tuple[bytes, int, bool]  # digest, view, whether it is the image's last view


@dataclass
class Extraction:
    """What happened while features were computed.

    Attributes:
        tables: Of the plain images, then of views 1, 2, ...
        extractor: What ran the base; None if nothing was missing.
        digests: SHA-256 of the bytes of each image that has features.
        skipped: Why each image that has none could not be used.
        nearly_black: Digests of 16-bit PNGs that use 12 bits or fewer; of images whose
            features were cached, only the first `_MOST_CHECKED` are looked at.
        decoded: Number of images decoded for their features.
        decode_seconds: How long was waited for images to be read and decoded.
    """

    tables: Sequence[FeatureTable] = ()
    extractor: Extractor | None = None
    digests: dict[str, bytes] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    nearly_black: set[bytes] = field(default_factory=set)
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
        on_image: Called once an image, when it is done with.
        decoded_ahead: How many decoded images may wait, the first of them while the
            extractor is being made.
    """
    extraction = Extraction(tables=make_tables(precision) if precision else ())
    unusable: dict[bytes, str] = {}
    started: set[tuple[bytes, int]] = set()
    checked = itertools.count()

    def missing() -> Iterator[tuple[bytes, list[int], bytes]]:
        for source, encoded in read(sources):
            if isinstance(encoded, OSError):
                extraction.skipped[source] = f"cannot be read: {encoded.strerror}"
                on_image()
                continue
            digest = hashlib.sha256(encoded).digest()
            extraction.digests[source] = digest
            wanted = [
                view
                for view in range(1 + (views or {}).get(source, 0))
                if (digest, view) not in started
                and not (precision and digest in extraction.tables[view])
            ]
            started.update((digest, view) for view in wanted)
            if wanted or (is_16_bit_png(encoded) and next(checked) < _MOST_CHECKED):
                yield digest, wanted, encoded
            else:
                on_image()

    def decoded(
        item: tuple[bytes, list[int], bytes],
    ) -> tuple[bytes, list[int], np.ndarray | DecodeError]:
        digest, wanted, encoded = item
        try:
            pixels = decode(encoded)
        except DecodeError as error:
            return digest, wanted, error
        if is_nearly_black(encoded, pixels):
            extraction.nearly_black.add(digest)
        return digest, wanted, pixels

    def usable() -> Iterator[tuple[_ImageTag, np.ndarray]]:
        threads = os.cpu_count() or 1
        items = map_ahead(
            decoded, missing(), threads, decoded_ahead, weigh=lambda item: len(item[2])
        )
        start = time.perf_counter()
        for digest, wanted, image in items:
            extraction.decode_seconds += time.perf_counter() - start
            if isinstance(image, DecodeError):
                unusable[digest] = str(image)
                on_image()
            elif not wanted:
                on_image()
            else:
                extraction.decoded += 1
                for view in wanted:
                    pixels = augment(image, digest, view) if view and augment else image
                    yield (digest, view, view == wanted[-1]), pixels
            start = time.perf_counter()

    batches = _batches(usable())
    first = next(batches, None)
    if first is not None:
        extractor = make_extractor(first[1])
        extraction.extractor = extractor
        extraction.tables = extraction.tables or make_tables(extractor.precision)
        with contextlib.ExitStack() as stack:
            for table in extraction.tables:
                table.prepare()
                stack.callback(table.flush)
            for tags, outputs in extractor.run(itertools.chain([first], batches)):
                for (digest, view, is_last), row in zip(tags, outputs, strict=True):
                    extraction.tables[view].add(digest, row)
                    if is_last:
                        on_image()
    extraction.tables = extraction.tables or make_tables("f32")  # of no images
    for source, digest in list(extraction.digests.items()):
        if digest in unusable:
            extraction.skipped[source] = unusable[digest]
            del extraction.digests[source]
    return extraction


@dataclass(frozen=True)
class FrozenPart:
    """A model that is not trained, and what its features depend on.

    Attributes:
        model: From `[N, image_size, image_size, 3]` pixels in [0, 255] to features.
        base: Name of the base it belongs to.
        weights_digest: SHA-256 of its weights.
        split_point: What its last layer is called.
        seed: Of augmented views.
        cache: Where features are kept.
    """

    model: keras.Model
    base: str
    weights_digest: str
    split_point: str
    seed: int
    cache: FeatureCache

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.model.input_shape[1]

    def spec(
        self, precision: str, view: int, dtype: str, engine: Engine | None = None
    ) -> FeatureSpec:
        """What its features of a view of images are known by in the cache."""
        # Keras is only asked for when OpenVINO's float32 was found to disagree.
        if engine == "keras":
            precision = "f32-keras"
        return FeatureSpec(
            base=self.base,
            weights_digest=self.weights_digest,
            image_size=self.image_size,
            split_point=self.split_point,
            precision=precision,
            decoder_version=DECODER_VERSION,
            view=view,
            augmentation=f"{AUGMENT_VERSION}:{self.seed}" if view else "",
            dtype=dtype,
        )


@dataclass(frozen=True)
class FrozenFeatures:
    """The features of all images, plain and augmented, and what they cost.

    Attributes:
        extraction: What happened.
        precision: Arithmetic of the frozen part, `f32` or `bf16`.
        seconds: Wall time.
    """

    extraction: Extraction
    precision: Precision
    seconds: float

    def rows(self, sources: Sequence[str], view: int = 0) -> Features:
        """Features of images, in this order."""
        digests = [self.extraction.digests[source] for source in sources]
        return self.extraction.tables[view].features(digests)


def frozen_features(
    part: FrozenPart,
    splits: Splits,
    views: int,
    precision: Precision,
    engine: Engine | None = None,
    dtype: str = "float32",
    on_extractor: Callable[[Extractor, np.ndarray], object] = lambda *_: None,
    on_progress: Callable[[str, int, int], object] = lambda *_: None,
    extractor: Extractor | None = None,
) -> FrozenFeatures:
    """The features of all images of all splits; cached ones are not computed again.

    Args:
        part: What computes them.
        splits: The images.
        views: Augmented views of every training image, beside the plain one.
        precision: `auto` takes what was measured before, or measures.
        engine: None for the fastest here.
        dtype: How features are kept: `float32`, `float16` or `uint8`.
        on_extractor: Told what will compute them and a first batch of pixels, if
            anything has to be computed.
        on_progress: Called with ("features", images done with, of how many).
        extractor: One that was made for this part, engine and precision before.
    """
    started = time.perf_counter()

    def spec(precision: str, view: int) -> FeatureSpec:
        return part.spec(precision, view, dtype, engine)

    sources = [source for _, table in splits.items() for source in table.sources]

    views_of = dict.fromkeys(splits.train.sources, views)

    def read(sources: Sequence[str]) -> Iterator[tuple[str, bytes | OSError]]:
        """Training images first: what the first ones decide, no others may decide."""
        yield from splits.read([source for source in sources if source in views_of])
        yield from splits.read([source for source in sources if source not in views_of])

    def extract(cached: Precision | None, notes: Sequence[str] = ()) -> Extraction:
        def make_extractor(sample: np.ndarray) -> Extractor:
            sample = sample[: max(len(views_of), 1)]
            made = extractor or Extractor(part.model, cached or "auto", sample, engine)
            made.notes.extend(notes)
            on_extractor(made, sample)
            return made

        seen = itertools.count(1)
        return extract_features(
            sources,
            read,
            make_decoder(part.image_size),
            make_extractor,
            lambda name: [part.cache.table(spec(name, v)) for v in range(views + 1)],
            cached,
            make_augmenter(part.image_size, part.seed) if views else None,
            views_of,
            lambda: on_progress("features", next(seen), len(sources)),
            decoded_ahead=_WAITING_BYTES // (3 * part.image_size**2),
        )

    cached: Precision | None = precision
    if precision == "auto":  # what was measured before stands
        cached = _cached_precision(part.cache, spec("f32", 0), spec("bf16", 0))
    try:
        extraction = extract(cached)
    except UsageError:
        if precision != "auto" or cached != "bf16":
            raise
        cached = "f32"
        note = "precision f32: what is cached as bfloat16 cannot be added to here"
        extraction = extract(cached, [note])
    return FrozenFeatures(
        extraction,
        cached or (extraction.extractor.precision if extraction.extractor else "f32"),
        time.perf_counter() - started,
    )


def _cached_precision(
    cache: FeatureCache, f32: FeatureSpec, bf16: FeatureSpec
) -> Literal["f32", "bf16"] | None:
    """The precision of which more rows are cached; None if there are no rows."""
    rows, bf16_rows = cache.rows(f32), cache.rows(bf16)
    if not rows + bf16_rows:
        return None
    return "f32" if rows >= bf16_rows else "bf16"


def _batches(
    images: Iterable[tuple[_ImageTag, np.ndarray]],
) -> Iterator[tuple[list[_ImageTag], np.ndarray]]:
    iterator = iter(images)
    while batch := list(itertools.islice(iterator, BATCH_SIZE)):
        yield [tag for tag, _ in batch], np.stack([image for _, image in batch])
