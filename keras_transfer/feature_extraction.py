"""The workflow of `kt fit`: feature extraction with a frozen base."""

import csv
import io
import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_transfer.augment import AUGMENT_VERSION, make_augmenter
from keras_transfer.bases import get_base
from keras_transfer.config import Config, Precision, load_config, to_yaml
from keras_transfer.data import Splits, Table, count_classes
from keras_transfer.data import load as load_data
from keras_transfer.decode import DECODER_VERSION, make_decoder
from keras_transfer.errors import KerasTransferError
from keras_transfer.evaluation import evaluate
from keras_transfer.extract import Engine, Extraction, Extractor, extract_features
from keras_transfer.features import FeatureCache, Features, FeatureSpec
from keras_transfer.head import (
    TrainedHead,
    class_weights,
    label_features,
    predict_head,
    train_head,
)
from keras_transfer.model import POOL, attach_head, build_base, weights_digest
from keras_transfer.prediction import Predictor
from keras_transfer.run import (
    CONFIG,
    HISTORY,
    LABELS,
    MANIFEST,
    METRICS,
    MODEL,
    SKIPPED,
    SPLITS,
    Manifest,
    Run,
    building,
    host,
    now,
    run_path,
    versions,
    write_atomic,
)
from keras_transfer.savedmodel import export_model

PARITY_IMAGES = 64
PARITY_AGREEMENT = 0.99
PARITY_TOLERANCE = {"f32": 1e-3, "bf16": 0.05}
"""How far model.keras may be from the cached features' predictions, in probability."""

_WAITING_BYTES = 2**26

OnProgress = Callable[[str, int, int], object]
"""Called with (what is being done, how much is done, of how much)."""


def fit(
    data: str | None = None,
    *,
    config: Config | str | Path | None = None,
    on_progress: OnProgress = lambda *_: None,
    **options: Any,
) -> Run:
    """Trains a new head on a frozen base's features, and evaluates the classifier.

    Args:
        data: A folder of class folders, a CSV/TSV file, `tfds:NAME` or `digits`.
        config: A `Config`, or a YAML file of config keys.
        on_progress: Told how the work goes on.
        **options: Config keys that override the config's: `base="MobileNetV2"`,
            `head={"kind": "mlp"}`.

    Returns:
        The finished run.

    Raises:
        UsageError: If an option, the data or the run's name is not usable.
        KerasTransferError: If the data or the weights are not good enough to train.
    """
    if isinstance(config, Config):
        options = config.model_dump() | options
        config = None
    if data is not None:
        options["data"] = data
    file = None if config is None else Path(config)
    return _fit(load_config(file, options), on_progress)


def _fit(config: Config, on_progress: OnProgress) -> Run:
    started = time.perf_counter()
    config, run_dir = _resolve(config)

    # Who trains, who validates, who tests
    splits = load_data(config.data, config.splits, config.seed, config.data_dir)

    # The frozen base; every image goes through it once
    row = get_base(config.base)
    base = build_base(row, config.weights, _image_size(config), config.seed)
    digest = weights_digest(base)
    notes: list[str] = []
    for precision, engine in _ATTEMPTS[config.precision]:
        features = _frozen_features(
            config, base, digest, splits, precision, engine, on_progress
        )
        extraction, extractor = features.extraction, features.extraction.extractor
        notes += extractor.notes if extractor else []
        usable = _usable(config, splits, extraction)

        # A new head on the features
        head_started = time.perf_counter()
        head = _train(config, usable, features, on_progress)
        head_seconds = time.perf_counter() - head_started

        # One model of both, which must say what the features said
        model_started = time.perf_counter()
        model = attach_head(base, head.model)
        sample = _sample(usable, _image_size(config))
        parity, expected = _compare(model, head, features, sample)
        if (
            parity["top1_agreement"] >= PARITY_AGREEMENT
            and parity["max_probability_difference"] <= parity["tolerance"]
        ):
            break
        notes.append(
            f"{features.precision} was given up: on {parity['images']} images the "
            f"Keras model agrees on {parity['top1_agreement']:.1%} of the classes "
            f"and differs by up to {parity['max_probability_difference']:.2g}"
        )
    else:
        raise KerasTransferError(
            "The stitched Keras model does not agree with the features its head was "
            f"trained on: {notes[-1]}. Please report this."
        )

    # Figures of what the head never saw, and everything on disk at once
    with building(run_dir) as staging:
        model.save(staging / MODEL)
        for name, text in {
            CONFIG: to_yaml(config),
            LABELS: "".join(f"{label}\n" for label in usable.class_names),
            SPLITS: usable.to_csv(),
            SKIPPED: _csv(("path", "reason"), extraction.skipped.items()),
            HISTORY: _history(head),
            METRICS: _metrics(usable, head, features),
        }.items():
            write_atomic(staging / name, text)
        if config.export:
            images = [encoded for _, encoded, _ in sample]
            export_model(Run(staging), model, images, expected)
        finished = time.perf_counter()
        manifest = Manifest(
            created=now(),
            data=config.data,
            data_fingerprint=usable.fingerprint(extraction.digests),
            class_counts=usable.class_counts(),
            skipped=len(extraction.skipped),
            multi_label=usable.multi_label,
            base=row.name,
            weights=config.weights,
            weights_digest=digest,
            image_size=_image_size(config),
            decoder_version=DECODER_VERSION,
            engine=extractor.engine if extractor else "cache",
            precision=features.precision,
            notes=[*usable.warnings, *_doubts(usable, extraction), *notes],
            parity=parity,
            l2=head.l2,
            seed=config.seed,
            versions=versions(),
            host=host(),
            timings={
                "decode": extraction.decode_seconds,
                "forward": extractor.seconds if extractor else 0.0,
                "features": features.seconds,
                "head": head_seconds,
                "model": finished - model_started,
                "total": finished - started,
            },
            images_decoded=extraction.decoded,
            images_forwarded=extractor.images if extractor else 0,
        )
        write_atomic(staging / MANIFEST, manifest.model_dump_json(indent=1))
    return Run(run_dir)


_ATTEMPTS: dict[str, list[tuple[Precision, Engine | None]]] = {
    "auto": [("auto", None), ("f32", None), ("f32", "keras")],
    "bf16": [("bf16", None), ("f32", None), ("f32", "keras")],
    "f32": [("f32", None), ("f32", "keras")],
}
"""How features are computed; a later way only if the model disagrees with them."""


@dataclass(frozen=True)
class _FrozenFeatures:
    """The features of all images, plain and augmented, and what they cost."""

    extraction: Extraction
    precision: str
    seconds: float

    def rows(self, sources: Sequence[str], view: int = 0) -> Features:
        digests = [self.extraction.digests[source] for source in sources]
        return self.extraction.tables[view].features(digests)


def _frozen_features(
    config: Config,
    base: keras.Model,
    digest: str,
    splits: Splits,
    precision: Precision,
    engine: Engine | None,
    on_progress: OnProgress,
) -> _FrozenFeatures:
    started = time.perf_counter()
    image_size = _image_size(config)
    cache = FeatureCache(config.cache_dir)

    def spec(precision: str, view: int) -> FeatureSpec:
        return FeatureSpec(
            base=base.name,
            weights_digest=digest,
            image_size=image_size,
            split_point=POOL,
            # Only asked for when OpenVINO's float32 was found to disagree.
            precision="f32-keras" if engine == "keras" else precision,
            decoder_version=DECODER_VERSION,
            view=view,
            augmentation=f"{AUGMENT_VERSION}:{config.seed}" if view else "",
        )

    cached: Precision | None = precision
    if precision == "auto":  # what was measured before stands
        f32, bf16 = (cache.rows(spec(name, view=0)) for name in ("f32", "bf16"))
        cached = None if not f32 + bf16 else "f32" if f32 >= bf16 else "bf16"
    sources = [source for _, table in splits.items() for source in table.sources]
    seen = itertools.count(1)
    extraction = extract_features(
        sources,
        splits.read,
        make_decoder(image_size),
        lambda sample: Extractor(base, cached or "auto", sample, engine),
        lambda name: [cache.table(spec(name, v)) for v in range(config.augment + 1)],
        cached,
        make_augmenter(image_size, config.seed) if config.augment else None,
        dict.fromkeys(splits.train.sources, config.augment),
        lambda: on_progress("features", next(seen), len(sources)),
        decoded_ahead=_WAITING_BYTES // (3 * image_size**2),
    )
    return _FrozenFeatures(
        extraction,
        cached or (extraction.extractor.precision if extraction.extractor else "f32"),
        time.perf_counter() - started,
    )


def _usable(config: Config, splits: Splits, extraction: Extraction) -> Splits:
    """The splits without the images that could not be used."""
    skipped = extraction.skipped
    total = len(skipped) + len(extraction.digests)
    if len(skipped) > config.max_skipped * total:
        path, reason = next(iter(skipped.items()))
        raise KerasTransferError(
            f"{len(skipped)} of {total} images cannot be used, more than "
            f"{config.max_skipped:.0%}. The first is {path}: {reason}. Mend them, or "
            "allow more with --max-skipped."
        )
    usable = splits.keep(extraction.digests)
    shown = count_classes(usable.train.targets, len(usable.class_names)) > 0
    if shown.sum() < (1 if usable.multi_label else 2):
        raise KerasTransferError(
            "Too few classes have a usable training image. Received: "
            f"{len(usable.train)} usable training images."
        )
    return usable


def _train(
    config: Config, splits: Splits, features: _FrozenFeatures, on_progress: OnProgress
) -> TrainedHead:
    num_classes = len(splits.class_names)
    weights = class_weights(
        splits.train.targets, num_classes, config.head.class_weight == "balanced"
    )
    done = itertools.count(1)
    return train_head(
        config.head,
        label_features(
            [
                features.rows(splits.train.sources, view)
                for view in range(config.augment + 1)
            ],
            splits.train.targets,
            num_classes,
            weights,
        ),
        label_features(
            [features.rows(splits.val.sources)],
            splits.val.targets,
            num_classes,
            weights,
        ),
        config.seed,
        lambda: on_progress("head", next(done), 0),
    )


def _sample(splits: Splits, image_size: int) -> list[tuple[str, bytes, np.ndarray]]:
    """(source, bytes, pixels) of some validation images, decoded anew."""
    table = next(t for t in (splits.val, splits.test, splits.train) if len(t))
    decode = make_decoder(image_size)
    return [
        (source, encoded, decode(encoded))
        for source, encoded in splits.read(_spread(table.sources, PARITY_IMAGES))
        if isinstance(encoded, bytes)
    ]


def _compare(
    model: keras.Model,
    head: TrainedHead,
    features: _FrozenFeatures,
    sample: Sequence[tuple[str, bytes, np.ndarray]],
) -> tuple[dict[str, float], np.ndarray]:
    """(parity for the manifest, the model's own probabilities of the sample)."""
    actual = Predictor(model)([pixels for _, _, pixels in sample])
    rows = features.rows([source for source, _, _ in sample])
    from_features = predict_head(head.model, rows)
    agreement = float((actual.argmax(1) == from_features.argmax(1)).mean())
    difference = float(np.abs(actual - from_features).max())
    return {
        "images": len(sample),
        "top1_agreement": agreement,
        "max_probability_difference": difference,
        "tolerance": PARITY_TOLERANCE[features.precision],
    }, actual


def _metrics(splits: Splits, head: TrainedHead, features: _FrozenFeatures) -> str:
    """The text of metrics.json: figures of the images that were held out."""
    evaluations = {}
    for name, table in splits.items():
        if name != "train" and len(table):
            rows = features.rows(table.sources)
            probabilities = predict_head(head.model, rows)
            evaluation = evaluate(table.targets, probabilities, splits.class_names)
            evaluations[name] = evaluation.model_dump()
    return json.dumps({"fit": evaluations}, indent=1, ensure_ascii=False) + "\n"


def _history(head: TrainedHead) -> str:
    rows = [("fit", *epoch.values()) for epoch in head.history]
    return _csv(("phase", *head.history[0]), rows)


def _doubts(splits: Splits, extraction: Extraction) -> list[str]:
    """What in the data makes figures look better or worse than they are."""
    doubts = splits.absent_classes()
    train = {extraction.digests[source] for source in splits.train.sources}
    for name in ("val", "test"):
        table: Table = getattr(splits, name)
        copies = sum(extraction.digests[source] in train for source in table.sources)
        if copies:
            doubts.append(
                f"{copies} of {len(table)} {name} images are byte for byte in train "
                "too: their figures flatter."
            )
    return doubts


def _resolve(config: Config) -> tuple[Config, Path]:
    """The config with every None that depends on others filled in, and the run."""
    base = get_base(config.base)
    path = Path(config.data).expanduser()
    if config.data == "digits" or config.data.startswith("tfds:"):
        data, stem = config.data, config.data.removeprefix("tfds:").replace(":", "-")
    else:
        data, stem = str(path.resolve() if path.exists() else path), path.resolve().stem
    plain_stem = "".join(c if c.isalnum() or c in "_.-" else "_" for c in stem)
    name = config.name or f"{plain_stem.strip('.-') or 'run'}-{base.name}"
    run_dir = run_path(config.runs_dir, name, config.overwrite)
    resolved = config.model_copy(
        update={
            "data": data,
            "data_dir": config.data_dir and config.data_dir.expanduser().resolve(),
            "base": base.name,
            "image_size": config.image_size or base.image_size,
            "name": name,
            "overwrite": False,
        }
    )
    return resolved, run_dir


def _image_size(config: Config) -> int:
    assert config.image_size is not None
    return config.image_size


def _spread(sources: Sequence[str], count: int) -> list[str]:
    """At most `count` sources, evenly spread over all."""
    picks = np.linspace(0, len(sources) - 1, min(count, len(sources))).astype(int)
    return [sources[i] for i in picks]


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
