"""Builds the frozen base that a config names, or takes it from a model."""

from collections.abc import Sequence
from dataclasses import replace

import keras

from keras_transfer.config import Config
from keras_transfer.features.cache import FeatureCache
from keras_transfer.features.frozen_part import FrozenPart
from keras_transfer.models.bases import Base, get_bases
from keras_transfer.models.classifier import (
    build_base,
    pooled_outputs,
    weights_digest,
    with_stages,
)


def frozen_base(config: Config) -> FrozenPart:
    """Builds the base of a resolved config, or several, cut after the pooling."""
    rows, size = get_bases(config.base), image_size_of(config)
    models = [build_base(row, config.weights, size, config.seed) for row in rows]
    digests = [weights_digest(model) for model in models]
    return _frozen(config, rows, models, digests, not config.reread)


def frozen_base_of(
    model: keras.Model, config: Config, weights_digest: str
) -> FrozenPart:
    """Takes the frozen base from a classifier whose head was trained on its features.

    Args:
        model: The model of a run's `fit` phase.
        config: The run's config.
        weights_digest: The digest of the base's weights in the run's manifest.
    """
    rows = get_bases(config.base)
    models = [model, *(model.get_layer(row.name) for row in rows[1:])]
    return _frozen(config, rows, models, weights_digest.split("+"), True)


def digest_of(part: FrozenPart) -> str:
    """Returns the digest of the weights of a base, or those of several."""
    return "+".join(x.weights_digest for x in (part, *part.others))


def image_size_of(config: Config) -> int:
    """Returns the side of the images in pixels from a resolved config."""
    assert config.image_size is not None
    return config.image_size


def _frozen(
    config: Config,
    rows: Sequence[Base],
    models: Sequence[keras.Model],
    digests: Sequence[str],
    trusts_files: bool,
) -> FrozenPart:
    """Makes the first base a frozen part, with the further ones as its others."""
    parts: list[FrozenPart] = []
    for row, model, digest in zip(rows, models, digests, strict=True):
        extended = with_stages(model, row)
        widths = tuple(x.shape[-1] for x in pooled_outputs(extended))
        parts.append(
            FrozenPart(
                extended,
                row.name,
                digest,
                f"{len(widths)} pooled outputs",
                config.seed,
                FeatureCache(config.cache_dir, trusts_files),
                config.augment_policy,
                widths,
            )
        )
    first, *others = parts
    return replace(first, others=tuple(others))
