"""What the tail of a model reads: the frozen part's outputs, computed once.

Activations at the split point are cached like the features of `kt fit`, in half
precision where predictions do not change, within a disk budget. Where everything is
unfrozen they are the decoded pixels. With online augmentation training images stay
pixels, and go through augmentation and the frozen part in every epoch.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import keras
import numpy as np

from keras_transfer.config import Config, FinetuneConfig, Precision
from keras_transfer.data.augment import make_augmenter
from keras_transfer.data.tables import Splits
from keras_transfer.errors import KerasTransferError
from keras_transfer.events import OnNote, OnProgress
from keras_transfer.features.cache import Features
from keras_transfer.features.engine import Engine, Extractor
from keras_transfer.features.extraction import (
    FrozenFeatures,
    FrozenPart,
    frozen_features,
)
from keras_transfer.features.parity import PARITY_TOLERANCE, is_close
from keras_transfer.features.usable import usable_splits
from keras_transfer.models.classifier import cut, weights_digest

HALF_TOLERANCE = 0.01
"""What keeping activations in half precision may change in a probability."""

_FREE_BYTES = 10**9  # left on the disk

_Way = tuple[Precision, Engine | None, str]
_WAYS: tuple[_Way, ...] = (
    ("auto", None, "float16"),
    ("f32", None, "float16"),
    ("f32", None, "float32"),
    ("f32", "keras", "float32"),
)
"""Precision, engine and dtype; a later way only if the one before changes too much."""
_PIXELS: _Way = ("f32", "keras", "uint8")

Compare = Callable[[FrozenFeatures, float], dict[str, float]]
"""From activations and a tolerance to the `prediction.parity` of what is predicted from
them with what the whole model predicts."""

Transform = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""From rows `[n, ...]` of the training images at int64 `[n]`, and the epoch, to what
the tail reads: what has to be done anew in every epoch."""


@dataclass(frozen=True)
class Activations:
    """What the tail reads.

    Attributes:
        splits: The images that are usable.
        train: Views of the training images, the plain one first.
        transform: What is done to rows of `train` in every epoch.
        digests: SHA-256 of the bytes of each image.
        features: Of all images; of the held-out ones and the sample only if there is a
            `transform`.
        parity: Predictions from these against those of the whole model.
        nbytes: Of one image.
        engine: What ran the frozen part: `openvino` or `keras`; `cache` if nothing
            had to.
    """

    splits: Splits
    train: Sequence[Features]
    transform: Transform | None
    digests: Mapping[str, bytes]
    features: FrozenFeatures
    parity: Mapping[str, float]
    nbytes: int
    engine: str


def frozen_activations(
    part: FrozenPart,
    splits: Splits,
    config: Config,
    sample: Collection[str],
    compare: Compare,
    on_note: OnNote = lambda _: None,
    on_progress: OnProgress = lambda *_: None,
) -> Activations:
    """Computes what the tail reads, in the cheapest way that changes no prediction.

    Args:
        part: The model below the split point; one without weights passes pixels on.
        splits: The images.
        config: Of `finetune`, `augment`, `disk_budget_gb` and `precision` count.
        sample: The images that are compared.
        compare: How much predictions change.
        on_note: Told which way is taken, and what it costs, before it is.
        on_progress: Told how the work goes on.

    Raises:
        KerasTransferError: If they would take more than the disk budget or the free
            space, if in no way they give the model's own predictions, or if too many
            images cannot be used.
    """
    tuning = config.finetune
    online = tuning.augment == "online"
    views = 0 if tuning.augment == "online" else tuning.augment
    nothing = splits.train.keep(())
    # Online, of the training images only the sample has activations of its own.
    cached = replace(splits, train=splits.train.keep(sample)) if online else splits
    if not part.model.weights:
        on_note("everything is trained: only decoding can be done once")
        ways: Sequence[_Way] = (_PIXELS,)
    else:
        on_note(
            f"the {part.model.count_params():,} weights up to "
            f"{part.model.layers[-1].name} are frozen: what they say of an image is "
            "computed once"
        )
        ways = _WAYS[1:] if tuning.precision == "f32" else _WAYS
    for way in ways:
        _check_budget(part, splits, views, way, tuning)
        # Of a way that is given up, nothing but the sample is on the disk.
        first = frozen_features(part, cached.keep(sample), 0, *way)
        way = (first.precision, *way[1:])
        tolerance = PARITY_TOLERANCE[first.precision]
        if "float16" in way:
            tolerance = max(tolerance, HALF_TOLERANCE)
        parity = compare(first, tolerance)
        if is_close(parity):
            break
        on_note(
            f"{first.precision} activations kept as {way[-1]} were given up: on "
            f"{parity['images']} images {parity['top1_agreement']:.1%} of the classes "
            "are the same and probabilities change by up to "
            f"{parity['max_probability_difference']:.2g}"
        )
    else:
        raise KerasTransferError(
            "What cached activations say does not agree with the model: "
            f"{parity}. Please report this."
        )
    ran = first.extraction.extractor
    features = _cached(part, cached, views, way, on_note, on_progress, ran)
    extraction = features.extraction
    ran = extraction.extractor or ran
    transform = None
    if online:
        on_note(
            "--augment online: training images go through augmentation and the frozen "
            "part in every epoch, as in the usual recipe"
        )
        pixels_model, _ = cut(part.model, part.model.layers[0].name)
        pixels_part = replace(
            part,
            model=pixels_model,
            weights_digest=weights_digest(pixels_model),
            split_point=position(pixels_model),
        )
        only_train = replace(splits, val=nothing, test=nothing)
        pixels = _cached(pixels_part, only_train, 0, _PIXELS, on_note, on_progress)
        extraction = replace(
            extraction,
            digests=extraction.digests | pixels.extraction.digests,
            skipped=extraction.skipped | pixels.extraction.skipped,
        )
    usable = usable_splits(config, splits, extraction)
    if extraction.skipped:
        source, reason = next(iter(extraction.skipped.items()))
        on_note(
            f"{len(extraction.skipped):,} images cannot be used and are left out; the "
            f"first is {source}: {reason}"
        )
    digests, sources = extraction.digests, usable.train.sources
    if online:
        train = [pixels.rows(sources)]
        ran = Extractor(part.model) if part.model.weights else None
        transform = _make_transform(part, ran, [digests[source] for source in sources])
    else:
        train = [features.rows(sources, view) for view in range(views + 1)]
    nbytes = _row_bytes(part, way)
    engine = ran.engine if ran else "cache"
    return Activations(
        usable, train, transform, digests, features, parity, nbytes, engine
    )


def position(model: keras.Model) -> str:
    """What the end of a model that was cut off is known by in the cache."""
    # Keras numbers layers without a name of their own: positions are certain.
    return f"{model.layers[-1].name}#{len(model.operations)}"


_FIX = (
    "Unfreeze fewer stages, use fewer views or --augment online, or allow more with "
    "--disk-budget."
)


def _check_budget(
    part: FrozenPart, splits: Splits, views: int, way: _Way, config: FinetuneConfig
) -> None:
    count, size = sum(_counts(splits, views)), _row_bytes(part, way)
    total = count * size
    if config.augment == "online":  # pixels of the training images
        total += len(splits.train) * (3 * part.image_size**2 - size)
    if total > config.disk_budget_gb * 1e9:
        raise KerasTransferError(
            f"{count:,} activations would take {total / 1e9:.2f} GB, more than the "
            f"disk budget of {config.disk_budget_gb:g} GB. Received: --augment "
            f"{config.augment}, --unfreeze {config.unfreeze}. {_FIX}"
        )


def _cached(
    part: FrozenPart,
    splits: Splits,
    views: int,
    way: _Way,
    on_note: OnNote,
    on_progress: OnProgress,
    extractor: Extractor | None = None,
) -> FrozenFeatures:
    """Computes what is not in the cache, if the disk has room for it."""
    precision, engine, dtype = way
    counts, size = _counts(splits, views), _row_bytes(part, way)

    def on_extractor(extractor: Extractor, sample: np.ndarray) -> None:
        for text in extractor.notes:
            on_note(text)
        # The rows that are there may be of other images too.
        there = sum(
            min(
                count,
                part.cache.rows(part.spec(extractor.precision, view, dtype, engine)),
            )
            for view, count in enumerate(counts)
        )
        missing = sum(counts) - there
        directory, free = part.cache.directory, part.cache.free_bytes()
        on_note(
            f"{sum(counts):,} rows of {size / 1e3:,.0f} KB as {dtype}: "
            f"{sum(counts) * size / 1e6:,.0f} MB in {directory}; up to {there:,} are "
            f"there, the others take about {missing * extractor.measure(sample):.0f} s"
        )
        if missing * size > free - _FREE_BYTES:
            raise KerasTransferError(
                f"{missing:,} activations take {missing * size / 1e9:.2f} GB, and "
                f"{directory} has {free / 1e9:.2f} GB left. {_FIX}"
            )

    return frozen_features(
        part,
        splits,
        views,
        precision,
        engine,
        dtype,
        on_extractor,
        on_progress,
        extractor,
    )


def _counts(splits: Splits, views: int) -> list[int]:
    """How many rows there are: of the plain images, then of each view."""
    images = sum(len(table) for _, table in splits.items())
    return [images, *[len(splits.train)] * views]


def _row_bytes(part: FrozenPart, way: _Way) -> int:
    return int(np.prod(part.model.output_shape[1:])) * np.dtype(way[-1]).itemsize


def _make_transform(
    part: FrozenPart, extractor: Extractor | None, digests: Sequence[bytes]
) -> Transform:
    """Augments pixels, a new view in every epoch, and runs the frozen part on them."""
    augment = make_augmenter(part.image_size, part.seed)

    def transform(rows: np.ndarray, picked: np.ndarray, epoch: int) -> np.ndarray:
        views = [
            augment(pixels, digests[index], epoch + 1)
            for pixels, index in zip(rows, picked, strict=True)
        ]
        pixels = np.stack(views)
        return extractor.predict(pixels) if extractor else pixels

    return transform
