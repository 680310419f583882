"""`kt fit` beside the keras.io recipe, on photos made from any folder of photos.

    python tests/benchmarks/fit_vs_recipe.py PHOTOS

PHOTOS holds class folders, or train/ and val/ (or test/) folders of them. From its
JPEGs --images distinct photos of about 43 KB are made (seeded crops, encoded again; all
crops of a photo stay in one split), and twice as many for the memory figure. Reported,
medians of --repeats alternating runs in one process order:

1. the whole `kt fit` process, fresh cache, against one epoch of the recipe's training
   on the same base, size and split; and test accuracy on PHOTOS itself against the
   recipe's after 10 epochs;
2. decode + forward throughput against 1 / (1 / decode + 1 / forward), each alone;
3. a second `kt fit` with another head against the first, imports not counted;
4. peak memory with half as many images and with twice as many;
5. `kt --help`.
"""

import argparse
import io
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
SPLITS = {"train": 0.8, "val": 0.1, "test": 0.1}
TARGET_BYTES = 43_000

QUIET = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": "ignore"}


def find_photos(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its JPEGs, whatever split folders lie between."""
    photos: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.jp*g")):
        photos.setdefault(path.parent.name, []).append(path)
    return photos


def make_photos(photos: dict[str, list[Path]], count: int, target: Path) -> int:
    """Writes distinct crops into train/, val/ and test/; returns their mean size."""
    rng = np.random.default_rng(0)
    written = []
    for name, paths in photos.items():
        order = rng.permutation(len(paths))
        bounds = np.cumsum([round(share * len(paths)) for share in SPLITS.values()])
        for split, part in zip(SPLITS, np.split(order, bounds[:-1]), strict=True):
            folder = target / split / name
            folder.mkdir(parents=True)
            wanted = round(count * SPLITS[split] / len(photos))
            for index, position in zip(range(wanted), itertools.cycle(part)):
                encoded = crop(Image.open(paths[position]), rng)
                (folder / f"{index:05d}.jpg").write_bytes(encoded)
                written.append(len(encoded))
    return round(statistics.mean(written))


def crop(image: Image.Image, rng: np.random.Generator) -> bytes:
    """A random 70 to 100% of the image, long side 500, encoded to about 43 KB."""
    image = image.convert("RGB")
    share = rng.uniform(0.7, 1.0)
    width, height = (round(side * share) for side in image.size)
    left = rng.integers(0, image.width - width + 1)
    top = rng.integers(0, image.height - height + 1)
    part = image.crop((left, top, left + width, top + height))
    scale = 500 / max(part.size)
    part = part.resize([round(side * scale) for side in part.size], Image.LANCZOS)
    best = b""
    for quality in (70, 80, 85, 90, 95):
        buffer = io.BytesIO()
        part.save(buffer, "JPEG", quality=quality)
        if best and abs(buffer.tell() - TARGET_BYTES) > abs(len(best) - TARGET_BYTES):
            break
        best = buffer.getvalue()
    return best


def run(*command: object) -> tuple[float, int, str]:
    """(seconds, peak memory in bytes, stdout) of a whole process."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command],
        env=QUIET,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed: {output}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024, output


def kt_fit(data: Path, work: Path, name: str, cache: str, *options: object) -> dict:
    """Runs `kt fit`; its manifest and metrics, with `seconds` and `peak`."""
    kt = Path(sys.executable).with_name("kt")
    where = ["--runs-dir", work / "runs", "--cache-dir", work / cache]
    command = [kt, "fit", data, "--name", name, "--overwrite", *where, *options]
    seconds, peak, _ = run(*command)
    run_dir = work / "runs" / name
    manifest = json.loads((run_dir / "manifest.json").read_text())
    metrics = json.loads((run_dir / "metrics.json").read_text())
    return {"seconds": seconds, "peak": peak, "metrics": metrics, **manifest}


def recipe(data: Path, base: str, epochs: int) -> dict:
    script = HERE / "recipe.py"
    _, _, output = run(sys.executable, script, data, "--base", base, "--epochs", epochs)
    return json.loads(output.splitlines()[-1])


def throughput(data: Path, base: str) -> dict[str, float]:
    """Images a second: decoding alone, forward alone, and both as `kt fit` does."""
    command = [sys.executable, HERE / "throughput.py", data, "--base", base]
    return json.loads(run(*command)[2].splitlines()[-1])


def as_three_splits(photos: Path, target: Path) -> None:
    """PHOTOS itself: its val/ (or test/) is the test split; a tenth of train is val."""
    held_out = photos / "test" if (photos / "test").is_dir() else photos / "val"
    rng = np.random.default_rng(0)
    for class_folder in sorted((photos / "train").iterdir()):
        paths = sorted(class_folder.iterdir())
        chosen = set(rng.permutation(len(paths))[: len(paths) // 10].tolist())
        for split in ("train", "val"):
            folder = target / split / class_folder.name
            folder.mkdir(parents=True)
            for index, path in enumerate(paths):
                if (index in chosen) == (split == "val"):
                    shutil.copy(path, folder)
        shutil.copytree(
            held_out / class_folder.name, target / "test" / class_folder.name
        )
    for path in target.rglob("*.gif"):
        path.unlink()  # the recipe stops at the placeholder that is no photo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--base", default="MobileNetV2")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    base, images = arguments.base, arguments.images
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        photos = find_photos(arguments.photos)
        data = work / "photos"
        size = make_photos(photos, images, data)
        print(f"{images:,} photos of {size:,} bytes on average")

        first, recipes, options = [], [], ["--base", base]
        for index in range(arguments.repeats):
            recipes.append(recipe(data, base, epochs=2))
            first.append(kt_fit(data, work, "first", f"cache{index}", *options))
        epochs = [run["train_seconds"][0] for run in recipes]
        later = [run["train_seconds"][1] for run in recipes]
        whole = [run["epoch_seconds"][0] for run in recipes]
        fits = [fit["seconds"] for fit in first]
        ratio = [fit / epoch for fit, epoch in zip(fits, epochs, strict=True)]
        print(f"1. whole kt fit process: {shown(fits)} s")
        print(f"   recipe, first epoch: {shown(epochs)} s (validated {shown(whole)} s)")
        print(f"   recipe, second epoch: {shown(later)} s")
        print(f"   kt fit / first epoch: {shown(ratio)}")
        print(f"   precision {first[0]['precision']}: {first[0]['notes']}")

        if (arguments.photos / "train").is_dir():
            as_three_splits(arguments.photos, work / "itself")
            theirs = recipe(work / "itself", base, epochs=10)
            ours = kt_fit(work / "itself", work, "itself", "cache", *options)
            print(
                f"   test accuracy on {arguments.photos.name}: kt fit "
                f"{ours['metrics']['fit']['test']['accuracy']:.4f} in "
                f"{ours['seconds']:.1f} s, recipe after 10 epochs "
                f"{theirs['test_accuracy']:.4f} in "
                f"{sum(theirs['epoch_seconds']):.1f} s"
            )

        rates = [throughput(data, base) for _ in range(arguments.repeats)]
        for name in ("decode", "forward", "both", "share"):
            print(f"2. {name}: {shown([rate[name] for rate in rates])}")

        again = {
            head: [
                kt_fit(data, work, "second", f"cache{i}", *options, *head.split())
                for i in range(arguments.repeats)
            ]
            for head in ("--class-weight balanced", "--head mlp")
        }
        for head, seconds in again.items():
            shares = [
                second["timings"]["total"] / fit["timings"]["total"]
                for second, fit in zip(seconds, first, strict=True)
            ]
            print(
                f"3. second kt fit ({head}) / first, imports not counted: "
                f"{shown(shares)}; decoded {seconds[0]['images_decoded']}, "
                f"forwarded {seconds[0]['images_forwarded']}"
            )

        peaks = {}
        for count in (images // 2, 2 * images):
            make_photos(photos, count, work / f"photos_{count}")
            fit = kt_fit(
                work / f"photos_{count}", work, "memory", f"memory{count}", *options
            )
            peaks[count] = fit["peak"]
        (few, low), (many, high) = peaks.items()
        print(
            f"4. peak memory: {low / 1e6:.0f} MB with {few:,} images, "
            f"{high / 1e6:.0f} MB with {many:,}: {(high - low) / 1e6:.0f} MB more"
        )
        kt = Path(sys.executable).with_name("kt")
        print(f"5. kt --help: {shown([run(kt, '--help')[0] for _ in range(5)])} s")


def shown(values: list[float]) -> str:
    """Median, and the range it is the middle of."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
