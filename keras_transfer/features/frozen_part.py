"""The frozen part of a model, and its features of all images of all splits."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import keras
import numpy as np

from keras_transfer.config import AugmentPolicy, Precision
from keras_transfer.data.augment import make_augmenter, views_key
from keras_transfer.data.decode import DECODER_VERSION, make_measuring_decoder
from keras_transfer.data.quality import QUALITY_VERSION
from keras_transfer.data.tables import Splits
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.events import SILENT, Listener
from keras_transfer.features.cache import (
    FeatureCache,
    Features,
    FeatureTable,
    JoinedFeatures,
)
from keras_transfer.features.engine import (
    Engine,
    EngineName,
    likely_device,
    likely_names,
    make_engine,
)
from keras_transfer.features.extraction import Extraction, Images, extract_features
from keras_transfer.features.shards import FeatureSpec
from keras_transfer.models.classifier import POOL

_WAITING_BYTES = 2**26  # of decoded images that wait for the engine


@dataclass(frozen=True)
class Storage:
    """How features are computed and stored.

    Attributes:
        precision: Precision of the arithmetic; `auto` reuses an earlier choice, or
            chooses by measuring.
        engine: Name of the engine; None for the fastest on this machine.
        dtype: Data type in the cache: `float32`, `float16` or `uint8`.
        quality: Whether to measure the quality of the images too.
    """

    precision: Precision = "auto"
    engine: EngineName | None = None
    dtype: str = "float32"
    quality: bool = False


@dataclass(frozen=True)
class Views:
    """Changed copies of each training image, whose features are computed too.

    Attributes:
        count: Number of views per training image, in addition to the plain image.
        key: Stands for the change in the cache, with its version; views that differ in
            it are computed anew.
        make: Creates the function from (uint8 `[S, S, 3]` pixels, the image's SHA-256
            digest, the view's number from 1 on) to the view's pixels. The result must
            depend on nothing else. It is called only if there are views.
    """

    count: int
    key: str
    make: Callable[[], Callable[[np.ndarray, bytes, int], np.ndarray]]

    def spec(self, plain: FeatureSpec, number: int) -> FeatureSpec:
        """Returns the cache's specification of a view; 0 is the plain image."""
        return replace(plain, view=number, augmentation=self.key) if number else plain

    def tables(self, cache: FeatureCache, plain: FeatureSpec) -> list[FeatureTable]:
        """Returns the cache's tables of the plain images and of each view."""
        numbers = range(self.count + 1)
        return [cache.table(self.spec(plain, number)) for number in numbers]


@dataclass(frozen=True)
class FrozenPart:
    """A model that is not trained, with everything that its features depend on.

    Attributes:
        model: Model from `[N, image_size, image_size, 3]` pixels in [0, 255] to
            features.
        base: Name of the base that it belongs to.
        weights_digest: SHA-256 of its weights.
        split_point: Name of its last layer, for the cache.
        seed: Seed of augmented views.
        cache: Cache of its features.
        policy: How augmented views are made.
        widths: For a base, the numbers of values of the pooled outputs that its
            features consist of; the last one is the base's own. Empty for another part.
        others: Further bases whose features a head reads beside.
    """

    model: keras.Model
    base: str
    weights_digest: str
    split_point: str
    seed: int
    cache: FeatureCache
    policy: AugmentPolicy = "standard"
    widths: tuple[int, ...] = ()
    others: tuple["FrozenPart", ...] = ()

    @property
    def models(self) -> list[keras.Model]:
        """The models of this part and of the others."""
        return [self.model, *(other.model for other in self.others)]

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels."""
        return self.model.input_shape[1]

    def spec(
        self, precision: Literal["f32", "bf16"], engine: str, device: str, dtype: str
    ) -> FeatureSpec:
        """Returns the cache's specification of features of plain images."""
        return FeatureSpec(
            base=self.base,
            weights_digest=self.weights_digest,
            image_size=self.image_size,
            split_point=self.split_point,
            precision=precision,
            decoder_version=DECODER_VERSION,
            dtype=dtype,
            engine=engine,
            device=device,
        )

    def spec_of(self, engine: Engine, dtype: str) -> FeatureSpec:
        """Returns the specification of features that an engine computes."""
        return self.spec(engine.precision, engine.name, engine.device, dtype)

    def augmented(self, count: int) -> Views:
        """Returns a number of randomly augmented views."""
        return Views(
            count,
            views_key(self.policy, self.seed),
            partial(make_augmenter, self.image_size, self.seed, self.policy),
        )

    def most_cached(self, storage: Storage) -> tuple[FeatureSpec, int]:
        """Returns the specification with the most cached features, and their number.

        Only specifications that `storage` allows are considered. In this way, earlier
        choices of an engine and a precision remain in effect.
        """
        names = [storage.engine] if storage.engine else likely_names()
        precisions: list[Literal["f32", "bf16"]] = ["f32", "bf16"]
        if storage.precision != "auto":
            precisions = [storage.precision]
        specs = [
            self.spec(precision, name, likely_device(name), storage.dtype)
            for name in names
            for precision in precisions
        ]
        best = max(specs, key=self.cache.rows)
        return best, self.cache.rows(best)


@dataclass(frozen=True)
class FrozenFeatures:
    """The features of all images, and those of views of the training images.

    Attributes:
        extraction: Details of the computation.
        precision: Arithmetic of the frozen part: `f32` or `bf16`.
        seconds: Wall-clock seconds that the computation took.
        widths: As in `FrozenPart`.
        others: Features of the same images by further bases.
    """

    extraction: Extraction
    precision: Precision
    seconds: float
    widths: tuple[int, ...] = ()
    others: tuple["FrozenFeatures", ...] = ()

    def rows(self, sources: Sequence[str], view: int = 0) -> Features:
        """Returns the features of images in the given order; view 0 is the plain one.

        All of them must be usable. Of a base, these are its own pooled outputs, whether
        or not there are others.
        """
        if self.widths:
            return JoinedFeatures([self._all_rows(sources, view)], [self.widths[-1]])
        return self._all_rows(sources, view)

    def head_inputs(
        self, sources: Sequence[str], stages: bool, view: int = 0
    ) -> Features:
        """Returns what a head reads of images: the features of all bases.

        Args:
            sources: The images, all usable.
            stages: Whether pooled outputs of stages below the top are among them.
            view: The view; 0 is the plain image.
        """
        each = (self, *self.others)
        rows = [one._all_rows(sources, view) for one in each]
        return JoinedFeatures(rows, [sum(one._own_widths(stages)) for one in each])

    def head_widths(self, stages: bool) -> tuple[int, ...]:
        """Returns the numbers of values of the pooled outputs that a head reads."""
        each = (self, *self.others)
        return sum((one._own_widths(stages) for one in each), ())

    def _own_widths(self, stages: bool) -> tuple[int, ...]:
        return self.widths if stages else self.widths[-1:]

    def _all_rows(self, sources: Sequence[str], view: int) -> Features:
        digests = [self.extraction.digests[source] for source in sources]
        return self.extraction.tables[view].features(digests)


def frozen_features(
    part: FrozenPart,
    splits: Splits,
    views: int | Views,
    storage: Storage = Storage(),  # noqa: B008
    listener: Listener = SILENT,
    check: Callable[[Engine, np.ndarray], object] = lambda *_: None,
    engine: Engine | None = None,
) -> FrozenFeatures:
    """Returns the features of all images in all splits, computing only missing ones.

    Args:
        part: The frozen part that computes the features.
        splits: The images.
        views: Views of the training images, in addition to the plain images; a number
            stands for as many augmented ones.
        storage: How the features are computed and stored.
        listener: Receives notes, and progress after each image.
        check: Called with the engine and a first batch of pixels before anything is
            computed; an exception that it raises ends the computation.
        engine: An engine that was created for the same part and storage, if any.

    Raises:
        KerasTransferError: If cached features were computed by an engine that is not
            available, or the cache cannot be used.
        UsageError: If bfloat16 is requested but is not available here.
    """
    started = time.perf_counter()
    if isinstance(views, int):
        views = part.augmented(views)
    try:
        own = _own_features(part, splits, views, storage, listener, check, engine)
        plain = replace(storage, precision=own.precision, quality=False)
        others = tuple(
            frozen_features(other, splits, views, plain, listener)
            for other in part.others
        )
    except UsageError:
        cached, _ = part.most_cached(storage)
        if storage.precision != "auto" or cached.precision != "bf16":
            raise
        listener.note(
            "precision f32: what is cached as bfloat16 cannot be added to here"
        )
        storage = replace(storage, precision="f32")
        return frozen_features(part, splits, views, storage, listener, check, engine)
    for other in others:
        own.extraction.join(other.extraction)
    return replace(own, others=others, seconds=time.perf_counter() - started)


def _own_features(
    part: FrozenPart,
    splits: Splits,
    views: Views,
    storage: Storage,
    listener: Listener,
    check: Callable[[Engine, np.ndarray], object],
    engine: Engine | None,
) -> FrozenFeatures:
    """Returns the features of one part alone; see `frozen_features`."""
    spec, rows = part.most_cached(storage)
    if not rows:
        _note_old_features(part, storage, listener)

    def make(sample: np.ndarray) -> Engine:
        # Decisions that are based on the sample must use training images only.
        sample = sample[: max(len(splits.train), 1)]
        cached = spec if rows else None
        made = engine or _make_engine(part, storage, cached, sample, listener)
        check(made, sample)
        return made

    extraction = extract_features(
        _images(part, splits, views, storage.quality),
        views.tables(part.cache, spec),
        make,
        lambda made: views.tables(part.cache, part.spec_of(made, storage.dtype)),
        listener,
    )
    precision = (extraction.engine or spec).precision
    return FrozenFeatures(extraction, precision, 0.0, part.widths)


def _make_engine(
    part: FrozenPart,
    storage: Storage,
    cached: FeatureSpec | None,
    sample: np.ndarray,
    listener: Listener,
) -> Engine:
    """Creates an engine; if features are cached, one that computes them the same way.

    Raises:
        KerasTransferError: If that is not possible on this machine.
    """
    precision = cached.precision if cached else storage.precision
    name = "keras" if cached and cached.engine == "keras" else storage.engine
    made = make_engine(part.model, precision, sample, name, listener)
    if cached and part.spec_of(made, storage.dtype) != cached:
        raise KerasTransferError(
            f"Cached features of {part.base} were computed by {cached.engine} in "
            f"{cached.precision}, which cannot run here. Received: {made.name} in "
            f"{made.precision}. Delete them with kt cache prune --unused-days 0."
        )
    return made


def _images(part: FrozenPart, splits: Splits, views: Views, quality: bool) -> Images:
    """Returns the images of all splits, and how to read, decode and measure them."""
    sources = [source for _, table in splits.items() for source in table.sources]
    images = Images(
        sources,
        partial(_read_training_images_first, splits),
        make_measuring_decoder(part.image_size),
        views.make() if views.count else None,
        dict.fromkeys(splits.train.sources, views.count),
        decoded_ahead=_WAITING_BYTES // (3 * part.image_size**2),
    )
    if splits.root:
        files = part.cache.file_index(splits.root, sources)
        known = files.known() if part.cache.trusts_files else {}
        images = replace(images, known=known, remember=files.remember)
    if quality:
        table = part.cache.table(_quality_spec(part.image_size))
        is_writable = True
        try:
            table.prepare()
        except KerasTransferError:  # a read-only cache may have it already
            is_writable = False
        images = replace(images, quality_table=table, measures_quality=is_writable)
    return images


def _quality_spec(image_size: int) -> FeatureSpec:
    """Returns the specification of the table of quality measures."""
    return FeatureSpec(
        base="(image quality)",
        weights_digest=f"version {QUALITY_VERSION}",
        image_size=image_size,
        split_point="",
        precision="f32",
        decoder_version=DECODER_VERSION,
        dtype="uint8",
    )


def _read_training_images_first(
    splits: Splits, sources: Sequence[str]
) -> Iterator[tuple[str, bytes | OSError]]:
    """Reads training images first, since decisions are based on the first batch."""
    training = set(splits.train.sources)
    yield from splits.read([source for source in sources if source in training])
    yield from splits.read([source for source in sources if source not in training])


def _note_old_features(part: FrozenPart, storage: Storage, listener: Listener) -> None:
    precisions: tuple[Literal["f32", "bf16"], ...] = ("f32", "bf16")
    specs = [part.spec(p, "", "", storage.dtype) for p in precisions]
    if part.widths:  # with those of one pooled output
        devices = [("", ""), *((name, likely_device(name)) for name in likely_names())]
        specs = [
            replace(part.spec(p, *device, storage.dtype), split_point=POOL)
            for p in precisions
            for device in devices
        ]
    rows = sum(part.cache.rows(spec) for spec in specs)
    if rows:
        listener.note(
            f"{rows:,} features that an earlier version cached are not used, for they "
            "lack what is needed now; kt cache prune deletes them in time"
        )
