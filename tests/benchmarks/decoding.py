"""The decoder's speed and accuracy beside a full decode with an antialiased resize.

    python tests/benchmarks/decoding.py PHOTOS

PHOTOS holds class folders, or split folders of them. Speed: on photos of about 43 KB
and on 12-megapixel photos, both made from PHOTOS. Accuracy: 5-fold cross-validated
linear probes, five seeds, on MobileNetV2 features (--base) of PHOTOS as they are and
of the 12-megapixel ones, both ways of decoding. Medians of alternating runs.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow as tf
from fit_vs_recipe import crop, find_photos, shown
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from keras_transfer.data.decode import make_decoder
from keras_transfer.features.engine import make_engine, predict
from keras_transfer.models.bases import get_base
from keras_transfer.models.classifier import build_base

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("photos", type=Path)
parser.add_argument("--base", default="MobileNetV2")
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--large", type=int, default=60, help="12-megapixel photos timed")
arguments = parser.parse_args()
SIZE = 224

ours = make_decoder(SIZE)


@tf.function(input_signature=[tf.TensorSpec((), tf.string)], autograph=False)
def antialiased(encoded: tf.Tensor) -> tf.Tensor:
    image = tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")
    image = tf.image.resize(image, (SIZE, SIZE), antialias=True)
    return tf.cast(tf.round(tf.clip_by_value(image, 0, 255)), tf.uint8)


def full(encoded: bytes) -> np.ndarray:
    return antialiased(tf.constant(encoded)).numpy()


def decode_all(decode: Callable[[bytes], np.ndarray], files: list[bytes]) -> np.ndarray:
    with ThreadPoolExecutor(2) as pool:
        return np.stack(list(pool.map(decode, files)))


def enlarge(path: Path) -> bytes:
    """The photo at 4000 x 3000, with the grain that a sensor adds."""
    image = Image.open(path).convert("RGB").resize((4000, 3000), Image.LANCZOS)
    noise = np.random.default_rng(0).normal(0, 4, (3000, 4000, 1))
    pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


photos = find_photos(arguments.photos)
paths = [path for group in photos.values() for path in group]
labels = np.array([name for name, group in photos.items() for _ in group])
rng = np.random.default_rng(0)
small = [crop(Image.open(paths[i % len(paths)]), rng) for i in range(1000)]
picks = np.linspace(0, len(paths) - 1, min(arguments.large, len(paths))).astype(int)
large = [enlarge(paths[i]) for i in picks]
for name, files in (("small", small), ("12-megapixel", large)):
    size = statistics.mean(len(encoded) for encoded in files)
    rates: dict[str, list[float]] = {"ours": [], "antialiased": []}
    for repeat in range(arguments.repeats + 1):
        for way, decode in (("ours", ours), ("antialiased", full)):
            start = time.perf_counter()
            decode_all(decode, files)
            if repeat:  # the first does not count
                rates[way].append(len(files) / (time.perf_counter() - start))
    pairs = zip(rates["ours"], rates["antialiased"], strict=True)
    ratio = [a / b for a, b in pairs]
    print(
        f"{name} ({size:,.0f} bytes): ours {shown(rates['ours'])} img/s, antialiased "
        f"{shown(rates['antialiased'])} img/s, ratio {shown(ratio)}",
        flush=True,
    )

base = build_base(get_base(arguments.base), "imagenet", SIZE, seed=0)
engine = make_engine(base, "f32")


def probe(pixels: np.ndarray, targets: np.ndarray) -> float:
    features = predict(engine, pixels)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    folds = [StratifiedKFold(5, shuffle=True, random_state=s) for s in range(5)]
    scores = [cross_val_score(model, features, targets, cv=cv) for cv in folds]
    return 100 * float(np.mean(scores))


originals = [path.read_bytes() for path in paths]
for name, encode in (("photos", None), ("12-megapixel", enlarge)):
    pixels: dict[str, list[np.ndarray]] = {"ours": [], "antialiased": []}
    for path, encoded in zip(paths, originals, strict=True):
        data = encoded if encode is None else encode(path)
        pixels["ours"].append(ours(data))
        pixels["antialiased"].append(full(data))
    a, b = (probe(np.stack(pixels[way]), labels) for way in ("ours", "antialiased"))
    print(
        f"linear probe on {len(labels)} {name}: ours {a:.2f}, antialiased {b:.2f}, "
        f"difference {a - b:+.2f} points",
        flush=True,
    )
