"""Builds the frozen base that a config names, or takes it from a model."""

import keras

from keras_transfer.config import Config
from keras_transfer.features.cache import FeatureCache
from keras_transfer.features.frozen_part import FrozenPart
from keras_transfer.models.bases import get_base
from keras_transfer.models.classifier import POOL, build_base, cut, weights_digest


def frozen_base(config: Config) -> FrozenPart:
    """Builds the base of a resolved config as a frozen part, cut after its pooling."""
    row = get_base(config.base)
    base = build_base(row, config.weights, image_size_of(config), config.seed)
    cache = FeatureCache(config.cache_dir, trusts_files=not config.reread)
    return FrozenPart(base, base.name, weights_digest(base), POOL, config.seed, cache)


def frozen_base_of(
    model: keras.Model, config: Config, weights_digest: str
) -> FrozenPart:
    """Takes the frozen base from a classifier whose head was trained on its features.

    Args:
        model: The model of a run's `fit` phase.
        config: The run's config.
        weights_digest: The digest of the base's weights in the run's manifest.
    """
    name, cache = get_base(config.base).name, FeatureCache(config.cache_dir)
    base, _ = cut(model, POOL)
    return FrozenPart(base, name, weights_digest, POOL, config.seed, cache)


def image_size_of(config: Config) -> int:
    """Returns the side of the images in pixels from a resolved config."""
    assert config.image_size is not None
    return config.image_size
