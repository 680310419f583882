"""The workflow of `kt bases`: what is known of each base, here and from elsewhere.

Importing this module imports neither TensorFlow nor Keras.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from keras_transfer.features.cache import FeatureCache
from keras_transfer.features.throughput import remembered
from keras_transfer.models.bases import BASES, Base, weights_path


def describe_bases(cache_dir: Path | None) -> list[dict[str, Any]]:
    """Describes every base.

    Args:
        cache_dir: The cache directory; None for the default.

    Returns:
        One dict per base: `base`, `parameters`, `image_size`, `scaling`, `top_1` in
        percent and `top_1_source` (None if there is no figure), `weights`, and
        `throughput`, the measurements on this machine, the latest one last.
    """
    measured = remembered(FeatureCache(cache_dir))
    return [
        {
            "base": base.name,
            "parameters": base.parameters,
            "image_size": base.image_size,
            "scaling": base.scaling.name,
            "top_1": base.accuracy.top_1 if base.accuracy else None,
            "top_1_source": base.accuracy.source if base.accuracy else None,
            "weights": _where(base),
            "throughput": [asdict(one) for one in measured if one.base == base.name],
        }
        for base in BASES
    ]


def _where(base: Base) -> str:
    if weights_path(base).is_file():
        return "here"
    if base.weights_package:
        return "package not installed"
    if base.weights_url and not base.weights_sha256:
        return "download by hand"
    return "to download"
