"""How often planted shortcuts are found, and how often there is nothing to find.

    python tests/benchmarks/shortcuts.py DATA [DATA ...] --seeds 3 --images 300

DATA are folders of class folders, or tables. From each, as many images are drawn and
saved anew, as JPEGs of one size, quality and camera. A shortcut is then given to a part
of the images of one class: another size, JPEG quality or camera, or a white letter in a
corner. The table shows how many of the seeds give the finding that belongs to it, and
how many of high severity. Before that: how often any finding comes up with permuted
labels, for columns of random sources, and for the border with permuted labels.

A border is found if it is of more than low severity: in photos the surroundings always
tell something. Features are those of MobileNetV2 with ImageNet weights.
"""

import argparse
import io
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from keras_transfer.config import Config
from keras_transfer.data.tables import Splits
from keras_transfer.errors import DecodeError
from keras_transfer.features.base import frozen_base
from keras_transfer.features.frozen_part import FrozenPart, Storage, frozen_features
from keras_transfer.features.usable import usable_splits
from keras_transfer.findings.borders import border_findings
from keras_transfer.findings.exif import source_properties
from keras_transfer.findings.finding import Finding
from keras_transfer.findings.images import AuditedImages
from keras_transfer.findings.shortcuts import shortcut_findings
from keras_transfer.findings.sources import source_findings
from keras_transfer.workflows.inputs import prepare

STRENGTHS = (1.0, 0.6, 0.3)
SIDE = 256
CHEAP = {"base": "alexnet", "weights": "none", "image_size": 64}  # features unused
ROUNDS = 20  # of permuted labels, which compute no features


class Loaded(NamedTuple):
    config: Config
    splits: Splits
    part: FrozenPart
    images: AuditedImages


def loaded(data: str, **options: object) -> Loaded:
    config = Config.model_validate({"data": data, "base": "MobileNetV2"} | options)
    inputs = prepare(config, makes_run=False)
    part = frozen_base(inputs.config)
    found = frozen_features(part, inputs.splits, 0, Storage(quality=True))
    splits = usable_splits(inputs.config, inputs.splits, found.extraction)
    return Loaded(inputs.config, splits, part, AuditedImages.of(splits, found))


def saved(image: Image.Image, quality: int = 90, camera: str = "Canon EOS") -> bytes:
    exif = Image.Exif()
    exif[271], exif[272] = camera.split(" ", 1)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, exif=exif)
    return buffer.getvalue()


def marked(image: Image.Image) -> bytes:
    """A white letter with a width of about 5% of the image in its upper left corner."""
    image = image.copy()
    ImageDraw.Draw(image).text((8, 6), "R", fill="white", font_size=SIDE // 12)
    return saved(image)


PLANTED: dict[str, tuple[Callable[[Image.Image], bytes], str]] = {
    "size": (
        lambda image: saved(image.resize((SIDE - 26, SIDE))),
        "class told from the size of the image",
    ),
    "JPEG quality": (
        lambda image: saved(image, quality=75),
        "class told from the JPEG quality",
    ),
    "camera": (
        lambda image: saved(image, camera="NIKON D90"),
        "class told from the camera",
    ),
    "corner": (marked, "class told from the border"),
}


def pictures(data: Loaded, most: int, seed: int) -> list[tuple[str, Image.Image]]:
    """Draws (class name, image), from the two largest classes in equal parts."""
    table, names = data.images.table, data.images.class_names
    rng = np.random.default_rng(seed)
    largest = np.argsort(-np.bincount(table.targets), kind="stable")[:2]
    rows = np.concatenate(
        [
            rng.permutation(np.flatnonzero(table.targets == c))[: most // 2]
            for c in largest
        ]
    )
    label = {table.sources[i]: names[table.targets[i]] for i in rows}
    found = []
    for source, encoded in data.images.read([*label]):
        if isinstance(encoded, bytes):
            try:
                with Image.open(io.BytesIO(encoded)) as image:
                    picture = image.convert("RGB").resize((SIDE, SIDE))
            except (OSError, DecodeError):
                continue
            found.append((label[source], picture))
    return found


def planted(
    drawn: list[tuple[str, Image.Image]], what: str, strength: float, seed: int
) -> list[Finding]:
    """Plants a shortcut in the first class and looks for it."""
    change, kind = PLANTED[what]
    rng = np.random.default_rng(seed)
    first = drawn[0][0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index, (label, picture) in enumerate(drawn):
            is_changed = label == first and rng.random() < strength
            path = folder / label / f"{index}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(change(picture) if is_changed else saved(picture))
        options = {} if what == "corner" else CHEAP
        config, splits, part, images = loaded(name, **options)
        if what == "corner":
            found = border_findings(images, splits, part, config)
        else:
            devices = source_properties(images, seed) if what == "camera" else []
            found = shortcut_findings(images, None, seed, devices)
    is_low = what == "corner"  # in photos, surroundings tell the class to some degree
    return [
        one
        for one in found
        if one.kind == kind and not (is_low and one.severity == "low")
    ]


def permuted(images: AuditedImages, seed: int) -> AuditedImages:
    order = np.random.default_rng(seed).permutation(len(images))
    table = replace(images.table, targets=images.table.targets[order])
    return replace(images, table=table)


def false_alarms(data: Loaded, seeds: int) -> dict[str, str]:
    images = data.images
    cheap = [
        bool(shortcut_findings(permuted(images, s), None, s)) for s in range(ROUNDS)
    ]
    sources = []
    for seed in range(seeds):
        names = np.random.default_rng(seed).integers(0, 3, len(images))
        column = pa.table({"hospital": [f"hospital {i}" for i in names]})
        sources.append(bool(source_findings(replace(images, extra=column), seed)))
    border = [
        any(
            one.severity != "low"
            for one in border_findings(
                permuted(images, seed), data.splits, data.part, data.config
            )
        )
        for seed in range(seeds)
    ]
    found = {"properties": cheap, "random sources": sources, "border": border}
    return {name: f"{sum(x)} of {len(x)}" for name, x in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=300)
    arguments = parser.parse_args()
    print("data | false alarms with permuted labels and random sources")
    everything = {data: loaded(data) for data in arguments.data}
    for name, data in everything.items():
        print(Path(name).name, false_alarms(data, arguments.seeds), sep=" | ")
    print("\ndata | planted | part of the class | found | of high severity")
    for name, data in everything.items():
        for what in PLANTED:
            for strength in STRENGTHS:
                found = [
                    planted(pictures(data, arguments.images, s), what, strength, s)
                    for s in range(arguments.seeds)
                ]
                high = sum(any(x.severity == "high" for x in one) for one in found)
                print(
                    Path(name).name,
                    what,
                    f"{strength:.0%}",
                    f"{sum(map(bool, found))} of {len(found)}",
                    high,
                    sep=" | ",
                    flush=True,
                )


if __name__ == "__main__":
    main()
