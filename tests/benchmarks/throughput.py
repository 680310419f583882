"""Images a second of decoding, of the frozen base, and of both at once, as JSON.

    python tests/benchmarks/throughput.py FOLDER --base MobileNetV2

`share` is what both reach of 1 / (1 / decode + 1 / forward).
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from keras_transfer.data.decode import make_decoder
from keras_transfer.data.loading import load
from keras_transfer.data.reading import map_ahead
from keras_transfer.events import SILENT
from keras_transfer.features.cache import FeatureCache
from keras_transfer.features.engine import BATCH_SIZE, make_engine
from keras_transfer.features.extraction import Images, extract_features
from keras_transfer.features.frozen_part import FrozenPart
from keras_transfer.models.bases import get_base
from keras_transfer.models.classifier import POOL, build_base, weights_digest

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder")
parser.add_argument("--base", default="MobileNetV2")
parser.add_argument("--precision", choices=("f32", "bf16"), default="f32")
parser.add_argument("--threads", type=int, default=2)
arguments = parser.parse_args()

row = get_base(arguments.base)
splits = load(arguments.folder)
sources = [source for _, table in splits.items() for source in table.sources]
encoded = [data for _, data in splits.read(sources) if isinstance(data, bytes)]
decode = make_decoder(row.image_size)
base = build_base(row, "imagenet", row.image_size, seed=0)
engine = make_engine(base, arguments.precision)
batch = np.stack([decode(data) for data in encoded[:BATCH_SIZE]])


def rate(work: Callable[[], object]) -> float:
    """Median images a second of three runs after one that does not count."""
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return len(encoded) / statistics.median(seconds[1:])


def decode_all() -> None:
    for _ in map_ahead(decode, encoded, arguments.threads):
        pass


def forward_all() -> None:
    batches = ((index, batch) for index in range(len(encoded) // BATCH_SIZE))
    for _ in engine.run(batches):
        pass


def both() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(Path(folder))
        part = FrozenPart(base, row.name, weights_digest(base), POOL, 0, cache)
        tables = [cache.table(part.spec_of(engine, "float32"))]
        extract_features(
            Images(sources, splits.read, decode),
            tables,
            lambda _: engine,
            lambda _: tables,
            SILENT,
        )


decoded, forwarded, together = rate(decode_all), rate(forward_all), rate(both)
print(
    json.dumps(
        {
            "decode": decoded,
            "forward": forwarded,
            "both": together,
            "share": together * (1 / decoded + 1 / forwarded),
        }
    )
)
