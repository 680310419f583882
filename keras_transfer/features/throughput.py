"""Remembers how fast bases were on this machine, beside the cached features.

Importing this module imports neither TensorFlow nor Keras.
"""

import contextlib
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

from keras_transfer.features.cache import FeatureCache
from keras_transfer.runs.files import write_atomic


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """A measured throughput of a base.

    Attributes:
        base: Name of the base.
        image_size: Side of the images in pixels.
        engine: `openvino` or `keras`.
        precision: Precision of the arithmetic: `f32` or `bf16`.
        device: The CPU's instruction set, or the GPU's name.
        images_per_second: Decoded images per second.
        machine: Network name of the machine.
    """

    base: str
    image_size: int
    engine: str
    precision: str
    device: str
    images_per_second: float
    machine: str = field(default_factory=platform.node)


def remember(cache: FeatureCache, measured: Throughput) -> None:
    """Adds a measurement; it replaces an earlier one of the same kind.

    A cache that cannot be written is left as it is.
    """
    kept = [one for one in _read(cache) if _kind(one) != _kind(measured)]
    content = json.dumps([asdict(one) for one in [*kept, measured]], indent=1)
    with contextlib.suppress(OSError):
        cache.directory.mkdir(parents=True, exist_ok=True)
        write_atomic(_path(cache), content)


def remembered(cache: FeatureCache) -> list[Throughput]:
    """Lists the measurements that were made on this machine, the latest one last."""
    return [one for one in _read(cache) if one.machine == platform.node()]


def _kind(measured: Throughput) -> dict[str, object]:
    return asdict(measured) | {"images_per_second": None}


def _path(cache: FeatureCache) -> Path:
    return cache.directory / "throughput.json"


def _read(cache: FeatureCache) -> list[Throughput]:
    try:
        return [Throughput(**one) for one in json.loads(_path(cache).read_bytes())]
    except (OSError, ValueError, TypeError):  # none yet, or damaged
        return []
