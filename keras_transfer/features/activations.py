"""Input of the tail of a model: the frozen part's outputs, computed once.

Activations at the split point are cached like the features of `kt fit`, within a disk
budget, and in half precision if that does not change predictions. If everything is
unfrozen, the decoded pixels are cached instead. With online augmentation, training
images are kept as pixels and go through augmentation and the frozen part in every
epoch.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import keras
import numpy as np

from keras_transfer.config import Config
from keras_transfer.data.augment import make_augmenter
from keras_transfer.data.tables import Splits
from keras_transfer.errors import KerasTransferError
from keras_transfer.events import Broadcast, Listener
from keras_transfer.features.cache import Features
from keras_transfer.features.engine import (
    Engine,
    make_engine,
    predict,
    seconds_per_image,
)
from keras_transfer.features.extraction import Extraction
from keras_transfer.features.frozen_part import (
    FrozenFeatures,
    FrozenPart,
    Storage,
    frozen_features,
)
from keras_transfer.features.parity import PARITY_TOLERANCE, is_close
from keras_transfer.features.usable import tell_of_unusable, usable_splits
from keras_transfer.models.classifier import weights_digest
from keras_transfer.models.cut import PACKED, cut

HALF_TOLERANCE = 0.01
"""Largest change of a probability that half-precision activations may cause."""

FREE_BYTES = 10**9
"""Bytes to leave free on the disk."""

_STORAGE = (
    Storage("auto", None, "float16"),
    Storage("f32", None, "float16"),
    Storage("f32", None, "float32"),
    Storage("f32", "keras", "float32"),
)
"""Options in order; the next one is used if the previous one changes predictions."""
_PIXELS = Storage("f32", "keras", "uint8")

Compare = Callable[[FrozenFeatures, float], dict[str, float]]
"""Takes activations and a tolerance; returns the `parity.parity` of the tail's
predictions from them with the whole model's predictions from pixels."""

Change = Callable[[np.ndarray], np.ndarray]
"""Changes the uint8 `[n, S, S, 3]` pixels of a batch."""

Transform = Callable[[np.ndarray, np.ndarray, int, Change | None], np.ndarray]
"""Takes rows `[n, ...]`, the int64 `[n]` indices of their training images, the epoch
(from 0) and how the augmented pixels are changed, if at all; returns the tail's input.
It does the work that is repeated in every epoch."""


class ComputedRows:
    """Rows of images that are computed from their pixels whenever they are read."""

    def __init__(self, pixels: Features, engine: Engine | None):
        """Keeps what is needed.

        Args:
            pixels: uint8 `[N, S, S, 3]` pixels.
            engine: Runs the frozen part; None if the rows are the pixels.
        """
        self._pixels, self._engine = pixels, engine

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, rows: slice) -> np.ndarray:
        pixels = self._pixels[rows]
        return predict(self._engine, pixels) if self._engine else pixels


@dataclass(frozen=True)
class Activations:
    """Cached inputs of the tail.

    Attributes:
        splits: The usable images.
        train: Rows of the training images, one entry per view, the plain images first.
        transform: Applied to rows of `train` in every epoch; None if they are the
            tail's input already.
        digests: SHA-256 of the bytes of each image, by source.
        features: Activations of all images; if there is a `transform`, only of the
            held-out images and the sample; see `rows`.
        parity: Agreement of the tail's predictions from activations with the whole
            model's; see `parity.parity`.
        nbytes: Size of one image's activation in bytes.
        engine: Engine that ran the frozen part: `openvino` or `keras`; `cache` if none
            had to run.
        compute: Computes the tail's inputs of training images that have no cached
            ones; None if all have.
    """

    splits: Splits
    train: Sequence[Features]
    transform: Transform | None
    digests: Mapping[str, bytes]
    features: FrozenFeatures
    parity: Mapping[str, float]
    nbytes: int
    engine: str
    compute: Callable[[Sequence[str]], ComputedRows] | None = None

    def rows(self, sources: Sequence[str]) -> Features | ComputedRows:
        """Returns the tail's inputs of plain images in the given order."""
        known = self.features.extraction.digests
        if self.compute and not all(source in known for source in sources):
            return self.compute(sources)
        return self.features.rows(sources)


def frozen_activations(
    part: FrozenPart,
    splits: Splits,
    config: Config,
    sample: Collection[str],
    compare: Compare,
    listener: Listener,
) -> Activations:
    """Computes the tail's inputs in the cheapest way that preserves predictions.

    Args:
        part: The model below the split point; one without weights passes pixels on.
        splits: The images.
        config: The resolved config; its `finetune` section gives `augment`,
            `disk_budget_gb` and `precision`.
        sample: Sources of the images on which predictions are compared.
        compare: Measures how much predictions change.
        listener: Receives progress, and notes on decisions and costs before the work is
            done.

    Raises:
        KerasTransferError: If the activations exceed the disk budget or the free space,
            if no option preserves the model's predictions, or if too many images are
            unusable.
    """
    work = _Work(part, splits, config, listener)
    storage, parity, engine = work.choose_storage(sample, compare)
    features = work.compute(work.cached(sample), storage, engine)
    extraction = features.extraction
    engine = extraction.engine or engine
    if work.online:
        pixels = work.decode_training_images()
        extraction = _both(extraction, pixels.extraction)
    usable = usable_splits(config, splits, extraction)
    tell_of_unusable(extraction, listener)
    sources, transform, compute = usable.train.sources, None, None
    if work.online:
        train = [pixels.rows(sources)]
        engine = make_engine(part.model) if part.model.weights else None
        digests = [extraction.digests[source] for source in sources]
        transform = _make_transform(part, engine, digests)
        compute = partial(_computed_rows, pixels, engine)
    else:
        train = [features.rows(sources, view) for view in range(work.views + 1)]
    return Activations(
        splits=usable,
        train=train,
        transform=transform,
        digests=extraction.digests,
        features=features,
        parity=parity,
        nbytes=work.row_bytes(storage),
        engine=engine.name if engine else "cache",
        compute=compute,
    )


def split_point_id(model: keras.Model) -> str:
    """Returns the name by which the cache identifies a model's split point."""
    # Keras numbers unnamed layers, so the position is needed for a unique name.
    return f"{model.layers[-1].name}#{len(model.operations)}"


_FIX = (
    "Unfreeze fewer stages, use fewer views or augment=online, or allow more with "
    "disk_budget_gb."
)


@dataclass(frozen=True)
class _Work:
    """The steps of computing the activations of a frozen part."""

    part: FrozenPart
    splits: Splits
    config: Config
    listener: Listener

    @property
    def online(self) -> bool:
        """Whether training images get a new augmented view in every epoch."""
        return self.config.finetune.augment == "online"

    @property
    def views(self) -> int:
        """Number of augmented views that are cached per training image."""
        augment = self.config.finetune.augment
        return 0 if augment == "online" else augment

    def cached(self, sample: Collection[str]) -> Splits:
        """Returns the images to cache activations of; online, train is the sample."""
        if not self.online:
            return self.splits
        return replace(self.splits, train=self.splits.train.keep(sample))

    def choose_storage(
        self, sample: Collection[str], compare: Compare
    ) -> tuple[Storage, dict[str, float], Engine | None]:
        """Chooses the cheapest option that preserves predictions on the sample.

        Returns:
            (the option, its parity, the engine that computed the sample; None if all
            of it was cached).
        """
        told: set[str] = set()
        rejected: list[Storage] = []
        for storage in self._options():
            if storage in rejected:  # `auto` may have led to the same
                continue
            self._check_budget(storage)
            notes = Broadcast([])  # the progress on the sample is not reported
            # Compute only the sample, as the option may be rejected.
            first = frozen_features(
                self.part, self.cached(sample).keep(sample), 0, storage, notes
            )
            for note in notes.notes:
                if note not in told:  # it may repeat that of an earlier option
                    self.listener.note(note)
                    told.add(note)
            storage = replace(storage, precision=first.precision)
            tolerance = PARITY_TOLERANCE[first.precision]
            if storage.dtype == "float16":
                tolerance = max(tolerance, HALF_TOLERANCE)
            parity = compare(first, tolerance)
            if is_close(parity):
                return storage, parity, first.extraction.engine
            rejected.append(storage)
            self.listener.note(
                f"{storage.precision} activations kept as {storage.dtype} were given "
                f"up: on {parity['images']} images {parity['top1_agreement']:.1%} of "
                "the classes are the same and probabilities change by up to "
                f"{parity['max_probability_difference']:.2g}"
            )
        raise KerasTransferError(
            "What cached activations say does not agree with the model: "
            f"{parity}. Please report this."
        )

    def _options(self) -> Sequence[Storage]:
        model = self.part.model
        if not model.weights:
            self.listener.note("everything is trained: only decoding can be done once")
            return (_PIXELS,)
        last = model.layers[-1].name.removesuffix(PACKED)
        self.listener.note(
            f"the {model.count_params():,} weights up to {last} are "
            "frozen: what they say of an image is computed once"
        )
        is_f32 = self.config.finetune.precision == "f32"
        return _STORAGE[1:] if is_f32 else _STORAGE

    def compute(
        self, splits: Splits, storage: Storage, engine: Engine | None = None
    ) -> FrozenFeatures:
        """Computes the activations that are not cached, if the disk has room."""

        def check(engine: Engine, sample: np.ndarray) -> None:
            self._check_free_space(splits, storage, engine, sample)

        return frozen_features(
            self.part, splits, self.views, storage, self.listener, check, engine
        )

    def decode_training_images(self) -> FrozenFeatures:
        """Decodes all training images and caches their pixels like activations."""
        self.listener.note(
            "augment online: training images go through augmentation and the frozen "
            "part in every epoch, as in the usual recipe"
        )
        model, _ = cut(self.part.model, self.part.model.layers[0].name)
        part = replace(
            self.part,
            model=model,
            weights_digest=weights_digest(model),
            split_point=split_point_id(model),
        )
        nothing = self.splits.train.keep(())
        only_train = replace(self.splits, val=nothing, test=nothing)
        return replace(self, part=part).compute(only_train, _PIXELS)

    def row_bytes(self, storage: Storage) -> int:
        """Returns the size of one image's activation in bytes."""
        values = int(np.prod(self.part.model.output_shape[1:]))
        return values * np.dtype(storage.dtype).itemsize

    def _counts(self, splits: Splits) -> list[int]:
        """Returns the numbers of rows: of the plain images, then of each view."""
        images = sum(len(table) for _, table in splits.items())
        return [images, *[len(splits.train)] * self.views]

    def _check_budget(self, storage: Storage) -> None:
        tuning, size = self.config.finetune, self.row_bytes(storage)
        count = sum(self._counts(self.splits))
        total = count * size
        if self.online:  # pixels of the training images
            total += len(self.splits.train) * (3 * self.part.image_size**2 - size)
        if total > tuning.disk_budget_gb * 1e9:
            raise KerasTransferError(
                f"{count:,} activations would take {total / 1e9:.2f} GB, more than the "
                f"disk budget. Received: disk_budget_gb={tuning.disk_budget_gb:g}, "
                f"augment={tuning.augment}, unfreeze={tuning.unfreeze}. {_FIX}"
            )

    def _check_free_space(
        self, splits: Splits, storage: Storage, engine: Engine, sample: np.ndarray
    ) -> None:
        """Sends a note on what will be computed; fails if the disk cannot hold it."""
        cache, counts, size = (
            self.part.cache,
            self._counts(splits),
            self.row_bytes(storage),
        )
        spec = self.part.spec_of(engine, storage.dtype)
        # An upper bound, as the cached rows may belong to other images.
        there = sum(
            min(count, cache.rows(self.part.augmented(self.views).spec(spec, view)))
            for view, count in enumerate(counts)
        )
        missing, free = sum(counts) - there, cache.free_bytes()
        seconds = missing * seconds_per_image(engine, sample)
        self.listener.note(
            f"{sum(counts):,} rows of {size / 1e3:,.0f} KB as {storage.dtype}: "
            f"{sum(counts) * size / 1e6:,.0f} MB in {cache.directory}; up to "
            f"{there:,} are there, the others take about {seconds:.0f} s"
        )
        if missing * size > free - FREE_BYTES:
            raise KerasTransferError(
                f"{missing:,} activations take {missing * size / 1e9:.2f} GB, and "
                f"{cache.directory} has {free / 1e9:.2f} GB left. {_FIX}"
            )


def _computed_rows(
    pixels: FrozenFeatures, engine: Engine | None, sources: Sequence[str]
) -> ComputedRows:
    return ComputedRows(pixels.rows(sources), engine)


def _both(extraction: Extraction, other: Extraction) -> Extraction:
    """Adds another extraction's usable and skipped images to an extraction."""
    return replace(
        extraction,
        digests=extraction.digests | other.digests,
        skipped=extraction.skipped | other.skipped,
    )


def _make_transform(
    part: FrozenPart, engine: Engine | None, digests: Sequence[bytes]
) -> Transform:
    """Creates a transform that augments pixels and runs the frozen part on them.

    Args:
        part: The frozen part.
        engine: Runs the frozen part; None if the tail reads pixels.
        digests: SHA-256 of the training images, in order.
    """
    augment = make_augmenter(part.image_size, part.seed, part.policy)

    def transform(
        rows: np.ndarray, picked: np.ndarray, epoch: int, change: Change | None
    ) -> np.ndarray:
        views = [
            augment(pixels, digests[index], epoch + 1)
            for pixels, index in zip(rows, picked, strict=True)
        ]
        pixels = np.stack(views)
        pixels = change(pixels) if change else pixels
        return predict(engine, pixels) if engine else pixels

    return transform
