"""A config -> the frozen base that it names, with its cache."""

from keras_transfer.config import Config
from keras_transfer.features.cache import FeatureCache
from keras_transfer.features.extraction import FrozenPart
from keras_transfer.models.bases import get_base
from keras_transfer.models.classifier import POOL, build_base, weights_digest


def frozen_base(config: Config) -> FrozenPart:
    """A resolved config's base, as what is computed once of every image."""
    row = get_base(config.base)
    base = build_base(row, config.weights, image_size_of(config), config.seed)
    cache = FeatureCache(config.cache_dir)
    return FrozenPart(base, base.name, weights_digest(base), POOL, config.seed, cache)


def image_size_of(config: Config) -> int:
    """The side of the images in pixels, of a resolved config."""
    assert config.image_size is not None
    return config.image_size
