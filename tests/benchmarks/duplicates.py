"""How many edited copies of images are found, and which images are called copies.

    python tests/benchmarks/duplicates.py DATA [DATA ...] --seeds 0 1 --images 300
        [--sheets FOLDER] [--least 0.7]

For each DATA and seed a random sample of images is edited in one way after the other,
and the copies are put in the test split, with all images of DATA in the training split.
Ways to find them: `hash` and `neighbors` alone (8 bits; cosine 0.9), the package's
cheap and thorough ways, and how often the original is among the nearest `rank<5` by
features, plain and as the package compares them. Numbers are the fraction of copies
found, and of wrong pairs: of a copy with another image.

Pairs among the images of DATA are counted, and drawn on contact sheets in FOLDER, to
look at; `--least` draws those below the threshold too. So are 10 random pairs with an
edited copy, of those found.
"""

import argparse
import io
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from keras_transfer.config import Config
from keras_transfer.data.tables import Splits, Table
from keras_transfer.features.base import frozen_base
from keras_transfer.features.copies import hash_pairs
from keras_transfer.features.frozen_part import Storage, frozen_features
from keras_transfer.findings import duplicates
from keras_transfer.findings.duplicates import find_copies
from keras_transfer.findings.images import AuditedImages
from keras_transfer.findings.neighbors import nearest_pairs
from keras_transfer.workflows.inputs import prepare

KINDS = (
    *("re-encoded", "resized", "cropped 10%", "cropped 5%", "one side 15%"),
    *("flipped", "brightened", "gray", "cropped, flipped"),
)
SIDE = 144  # of a picture on a sheet
Pairs = set[tuple[int, int]]


def opened(encoded: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(encoded))
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.float32)
        image = Image.fromarray(np.uint8(pixels / max(pixels.max(), 1) * 255))
    return image.convert("RGB")


def cropped(image: Image.Image, left: float, right: float, top: float) -> Image.Image:
    """Cuts fractions off the left, the right, and both top and bottom."""
    width, height = image.size
    return image.crop(
        (
            round(width * left),
            round(height * top),
            width - round(width * right),
            height - round(height * top),
        )
    )


def edited(encoded: bytes, kind: str, rng: np.random.Generator) -> bytes:
    image = opened(encoded)
    small = [max(1, round(0.7 * x)) for x in image.size]
    made = {
        "re-encoded": lambda: image,
        "resized": lambda: image.resize(small, Image.Resampling.BICUBIC),
        "cropped 10%": lambda: cropped(image, 0.1, 0.1, 0.1),
        "cropped 5%": lambda: cropped(image, 0.05, 0.05, 0.05),
        "one side 15%": lambda: cropped(image, 0.15, 0, 0),
        "flipped": lambda: ImageOps.mirror(image),
        "brightened": lambda: ImageEnhance.Brightness(image).enhance(1.3),
        "gray": lambda: image.convert("L"),
        "cropped, flipped": lambda: ImageOps.mirror(cropped(image, 0.1, 0.1, 0.1)),
    }[kind]()
    quality = int(rng.integers(50, 96)) if kind == "re-encoded" else 90
    file = io.BytesIO()
    made.save(file, "JPEG", quality=quality)
    return file.getvalue()


def with_copies(
    data: str, seed: int, count: int
) -> Iterator[tuple[str, AuditedImages, np.ndarray, dict[str, bytes]]]:
    """Yields (kind, images, original of each copy, bytes by source)."""
    config = Config(data=data, name="copies", seed=seed)
    inputs = prepare(config, makes_run=False)
    splits = inputs.splits
    everything = splits.train.joined(splits.val).joined(splits.test)
    known = {x: y for x, y in splits.read(everything.sources) if isinstance(y, bytes)}
    part = frozen_base(inputs.config)
    for kind in KINDS:
        rng = np.random.default_rng(seed)
        originals = everything.keep(known)
        encoded = dict(known)
        chosen = np.sort(rng.permutation(len(originals))[:count])
        names = []
        for i in chosen:
            names.append(f"{kind}|{originals.sources[i]}")
            encoded[names[-1]] = edited(known[originals.sources[i]], kind, rng)
        copies = Table(
            tuple(names), originals.targets[chosen], ("",) * len(names), None
        )
        made = Splits(
            replace(originals, groups=("",) * len(originals), sample_weight=None),
            originals.keep(()),
            copies,
            splits.class_names,
            splits.multi_label,
            lambda sources, encoded=encoded: ((x, encoded[x]) for x in sources),
            (),
        )
        found = frozen_features(part, made, 0, Storage("auto", quality=True))
        made = made.keep(found.extraction.digests)
        rows = {source: i for i, source in enumerate(made.train.sources)}
        parents = [rows[x.partition("|")[2]] for x in made.test.sources]
        yield kind, AuditedImages.of(made, found), np.array(parents), encoded


def as_set(pairs: np.ndarray) -> Pairs:
    return {(int(i), int(j)) for i, j in np.sort(pairs, axis=1)}


def told(pairs: Pairs, parents: np.ndarray, first: int) -> str:
    """Formats (fraction of copies found, wrong pairs of copies, other pairs)."""
    right = {(int(parent), first + i) for i, parent in enumerate(parents)}
    wrong = sum(j >= first and (i, j) not in right for i, j in pairs)
    others = sum(j < first for _, j in pairs)
    return f"{len(right & pairs) / len(right):.3f} ({wrong}, {others})"


def sheet(
    images: AuditedImages,
    encoded: dict[str, bytes],
    pairs: list[tuple[float, int, int]],
    path: Path,
) -> None:
    """Draws pairs side by side, with their similarity."""
    columns = 5
    lines = -(-len(pairs) // columns)
    canvas = Image.new("RGB", (columns * (2 * SIDE + 12), lines * (SIDE + 16)), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (score, *both) in enumerate(pairs):
        y, x = divmod(number, columns)
        left, top = x * (2 * SIDE + 12), y * (SIDE + 16)
        for place, row in enumerate(both):
            image = opened(encoded[images.table.sources[row]])
            canvas.paste(
                ImageOps.contain(image, (SIDE, SIDE)), (left + place * SIDE, top)
            )
        draw.text((left, top + SIDE + 1), f"{number}: {score:.3f}", fill="black")
    canvas.save(path)


def nearest(x: np.ndarray, parents: np.ndarray, first: int) -> float:
    """Fraction of copies whose original is among the 5 nearest by the cosine."""
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    copies = np.arange(first, len(x))
    alike = unit[first:] @ unit.T
    own = alike[copies - first, parents][:, None]
    alike[copies - first, copies] = -1
    return float(((alike > own).sum(1) < 5).mean())


def measure(data: str, seed: int, arguments: argparse.Namespace) -> None:
    for kind, images, parents, encoded in with_copies(data, seed, arguments.images):
        first = len(images) - len(parents)
        x = images.features[:]
        unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
        alike = np.triu(unit @ unit.T, 1)
        by_package = as_set(nearest_pairs(images.features, np.arange(len(images)), 5))
        reached = [(int(p), first + i) in by_package for i, p in enumerate(parents)]
        started = time.process_time()
        cheap = find_copies(images, thorough=False)
        cheap_seconds = time.process_time() - started
        started = time.process_time()
        thorough = find_copies(images)
        seconds = time.process_time() - started
        ways = {
            "hash": as_set(hash_pairs(images.quality, 8)[0]),
            "neighbors": as_set(np.argwhere(alike >= 0.9)),
            "cheap": as_set(cheap.pairs),
            "thorough": as_set(thorough.pairs),
        }
        print(
            f"{Path(data).name} seed {seed} | {kind:16} | "
            + " | ".join(f"{k} {told(v, parents, first)}" for k, v in ways.items())
            + f" | rank<5 {nearest(x, parents, first):.3f}, whitened, with mutual "
            f"{np.mean(reached):.3f} | {len(images):,} images, CPU "
            f"{cheap_seconds:.2f} s cheap, {seconds:.1f} s thorough",
            flush=True,
        )
        if arguments.sheets:
            draw_some(images, encoded, thorough, first, arguments.sheets, kind, seed)
        if arguments.sheets and kind == KINDS[0]:
            least, duplicates.LEAST_LIKENESS = (
                duplicates.LEAST_LIKENESS,
                arguments.least,
            )
            loose = find_copies(images)
            duplicates.LEAST_LIKENESS = least
            draw_sheets(images, encoded, loose, first, data, seed, arguments.sheets)


def draw_some(
    images: AuditedImages,
    encoded: dict[str, bytes],
    copies: duplicates.Copies,
    first: int,
    folder: Path,
    kind: str,
    seed: int,
) -> None:
    """Draws 10 random pairs that an edited copy is in."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.flatnonzero((copies.pairs >= first).any(1) & ~copies.exact)
    rows = np.random.default_rng(seed).permutation(rows)[:10]
    pairs = [(float(copies.similarity[k]), *copies.pairs[k].tolist()) for k in rows]
    name = f"{len(images)}-{seed}-copies-{kind.replace(' ', '-')}.png"
    if pairs:
        sheet(images, encoded, pairs, folder / name)


def draw_sheets(
    images: AuditedImages,
    encoded: dict[str, bytes],
    copies: duplicates.Copies,
    first: int,
    data: str,
    seed: int,
    folder: Path,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    own = (copies.pairs < first).all(1) & ~copies.exact
    found = [
        (float(s), int(i), int(j))
        for s, (i, j) in zip(copies.similarity[own], copies.pairs[own], strict=True)
    ]
    found.sort(reverse=True)
    for start in range(0, len(found), 50):
        path = folder / f"{Path(data).stem}-{seed}-{start:04}.png"
        sheet(images, encoded, found[start : start + 50], path)
    print(f"  {len(found)} pairs of different files drawn in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--sheets", type=Path)
    parser.add_argument("--least", type=float, default=duplicates.LEAST_LIKENESS)
    arguments = parser.parse_args()
    for data in arguments.data:
        for seed in arguments.seeds:
            measure(data, seed, arguments)


if __name__ == "__main__":
    main()
