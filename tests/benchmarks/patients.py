r"""What figures are worth if images of a patient are on both sides of the split.

    python tests/benchmarks/patients.py XRAYS --seeds 20

XRAYS is a folder of class folders of X-rays. Each X-ray becomes an invented patient
with five exposures (slight crops, shifts, brightness, contrast, noise and JPEG), as
files such as `00000013_005.png`. Of X-rays whose names begin with the same eight
digits, the first is used.

For each seed, a quarter of the patients is held out entirely, and all exposures of the
others are given to `fit` twice: as they are, and with `group_regex=r"^(\d{8})_"`. The
accuracy on the patients that were held out is the truth that figures are measured by.
"""

import argparse
import csv
import io
import os
import random
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import keras_transfer

REGEX = r"^(\d{8})_"
EXPOSURES = 5
SIZE = 320
HELD_OUT = 0.25

Patients = dict[str, list[Path]]
"""Paths of the exposures of each patient, by the patient's number."""


def exposures(xray: Image.Image, rng: np.random.Generator) -> Iterator[Image.Image]:
    """Yields images of one X-ray as they differ when it is taken several times."""
    width, height = xray.size
    for _ in range(EXPOSURES):
        side = rng.uniform(0.9, 1.0)
        left, top = rng.uniform(0, 1 - side, 2)
        box = (left * width, top * height)
        box += ((left + side) * width, (top + side) * height)
        small = xray.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box)
        pixels = np.asarray(small, np.float32)
        mean = pixels.mean()
        pixels = (pixels - mean) * rng.uniform(0.85, 1.15) + mean
        pixels += rng.uniform(-15, 15) + rng.normal(0, 4, pixels.shape)
        buffer = io.BytesIO()
        exposed = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        exposed.save(buffer, "JPEG", quality=int(rng.integers(70, 96)))
        yield Image.open(buffer)


def invent(xrays: Path, folder: Path) -> dict[str, Patients]:
    """Writes the exposures of all patients; returns them by class."""
    rng = np.random.default_rng(0)
    found, seen = [], set()
    for path in sorted(xrays.glob("*/*")):
        number = re.match(r"\d{8}_", path.name)
        if not number or number[0] not in seen:
            found.append(path)
        seen.update([number[0]] if number else [])
    patients: dict[str, Patients] = defaultdict(dict)
    ids = rng.choice(30_000, len(found), replace=False)
    for path, number in zip(found, ids, strict=True):
        files = []
        with Image.open(path) as xray:
            for index, image in enumerate(exposures(xray.convert("L"), rng)):
                files.append(folder / f"{number:08d}_{index:03d}.png")
                image.save(files[-1])
        patients[path.parent.name][f"{number:08d}"] = files
    return patients


def divide(patients: dict[str, Patients], folder: Path, seed: int) -> None:
    """Links a quarter of the patients into held_out/, and the others into pool/."""
    rng = random.Random(seed)
    for name, of_class in patients.items():
        order = sorted(of_class)
        rng.shuffle(order)
        held_out = round(HELD_OUT * len(order))
        for place, patient in enumerate(order):
            part = "held_out" if place < held_out else "pool"
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for file in of_class[patient]:
                os.link(file, folder / part / name / file.name)


def measure(folder: Path, regex: str | None, seed: int) -> dict[str, float]:
    """Trains on pool/ and returns the figures of the run, and the truth."""
    run = keras_transfer.fit(
        folder / "pool",
        group_regex=regex,
        seed=seed,
        name=f"run-{seed}-{bool(regex)}",
        runs_dir=folder / "runs",
        cache_dir=folder.parent / "cache",
    )
    figures = run.metrics["fit"]
    with run.splits_path.open() as file:
        rows = list(csv.DictReader(file))
    of_split = {
        split: [Path(x["path"]).name[:8] for x in rows if x["split"] == split]
        for split in ("train", "test")
    }
    shared = np.isin(of_split["test"], of_split["train"])
    low, high = figures["test"]["intervals"]["accuracy"]
    return {
        "test images": len(shared),
        "of them, with their patient in train": shared.mean(),
        "test accuracy": figures["test"]["accuracy"],
        "its interval, lower end": low,
        "its interval, upper end": high,
        "out-of-fold accuracy": figures["out_of_fold"]["accuracy"],
        "accuracy on patients held out": run.evaluate(folder / "held_out").accuracy,
    }


def show(without: list[dict[str, float]], grouped: list[dict[str, float]]) -> None:
    """Prints a table of means and standard deviations over seeds."""
    print("| mean (standard deviation over seeds) | without | with group_regex |")
    print("| --- | --- | --- |")
    both = [
        {name: np.array([row[name] for row in rows]) for name in rows[0]}
        for rows in (without, grouped)
    ]
    for figures in both:
        truth = figures["accuracy on patients held out"]
        for name in ("test accuracy", "out-of-fold accuracy"):
            figures[f"{name} minus that on patients held out"] = figures[name] - truth
    for name in both[0]:
        cells = [f"{x[name].mean():.3f} ({x[name].std(ddof=1):.3f})" for x in both]
        print(f"| {name} | {' | '.join(cells)} |")
    held = []
    for figures in both:
        truth = figures["accuracy on patients held out"].mean()
        ends = figures["its interval, lower end"], figures["its interval, upper end"]
        count = int(((ends[0] <= truth) & (truth <= ends[1])).sum())
        held.append(f"{count} of {len(ends[0])}")
    print(f"| intervals that hold the mean of it | {' | '.join(held)} |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("xrays", type=Path, metavar="XRAYS")
    parser.add_argument("--seeds", type=int, default=20)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "files").mkdir()
        patients = invent(given.xrays, folder / "files")
        counts = {name: len(of_class) for name, of_class in patients.items()}
        print(f"Patients: {counts}, each with {EXPOSURES} exposures.", flush=True)
        found: list[list[dict[str, float]]] = [[], []]
        for seed in range(given.seeds):
            divide(patients, folder / str(seed), seed)
            for rows, regex in zip(found, (None, REGEX), strict=True):
                rows.append(measure(folder / str(seed), regex, seed))
        show(*found)


if __name__ == "__main__":
    main()
