"""Measures `kt audit` on many images, with cached features.

    python tests/benchmarks/audit.py PHOTOS --images 10000

Parts of the photos, which show two fifths of a side at random places, are written to a
temporary folder: they differ, as most photos of a collection do. The second audit has
all features in the cache but those of hidden centers, the third has all.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 160  # pixels


def write_parts(photos: Path, folder: Path, images: int) -> None:
    """Writes parts of photos, in the class folders of the photos."""
    rng = np.random.default_rng(0)
    files = sorted(path for path in photos.rglob("*.jpg") if path.is_file())
    for number in range(images):
        file = files[number % len(files)]
        with Image.open(file) as photo:
            width, height = (int(0.4 * side) for side in photo.size)
            x = int(rng.integers(0, photo.width - width + 1))
            y = int(rng.integers(0, photo.height - height + 1))
            part = photo.convert("RGB").crop((x, y, x + width, y + height))
        path = folder / file.parent.name / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        part.resize((SIDE, SIDE)).save(path, quality=90)


def measure(command: list[str], environment: dict[str, str]) -> None:
    """Runs a command and prints its wall-clock and CPU seconds and its memory."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(
        getattr(after, name) - getattr(before, name)
        for name in ("ru_utime", "ru_stime")
    )
    print(
        f"{command[3]}: {seconds:.1f} s, CPU {cpu:.1f} s, largest "
        f"process so far {after.ru_maxrss / 1e3:,.0f} MB",
        flush=True,
    )


def main() -> None:
    """Fits once, to cache features, and audits twice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--images", type=int, default=10_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_parts(given.photos, folder / "parts", given.images)
        environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
        kt = [sys.executable, "-m", "keras_transfer"]
        data, output = str(folder / "parts"), str(folder / "audit")
        runs = ["--runs-dir", str(folder / "runs"), "--overwrite"]
        measure([*kt, "fit", data, *runs, "--name", "a", "--no-report"], environment)
        measure([*kt, "fit", data, *runs, "--name", "a", "--no-report"], environment)
        measure([*kt, "fit", data, *runs, "--name", "a", "--report"], environment)
        for _ in range(2):
            measure([*kt, "audit", data, "--output", output], environment)


if __name__ == "__main__":
    main()
