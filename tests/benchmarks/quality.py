"""How good models are: of the keras.io recipe, of each way of this package.

    python tests/benchmarks/quality.py DATA [DATA ...] [--splits 5] [--budget 10]
        [--trials N] [--ways fit,stages,...] [--cache FOLDER]

DATA is a folder of class folders (whatever split folders lie between), a table with
paths and labels, or `digits`. Its images are divided into --splits stratified parts;
each part in turn is the test images, and the others train. Ways:

recipe      the keras.io recipe: MobileNetV2, ten epochs of a head, then five of all
            layers at 1e-5, from tests/benchmarks/recipe.py
fit         `kt fit --features last`
stages      `kt fit` with its defaults
two         `kt fit --base efficientnet_lite0+efficientnet_lite2`
finetuned   `stages`, then `kt unfreeze-and-finetune` with its defaults; the model that
            the command keeps
search      `kt search` for --budget minutes, or for --trials ways

Printed are means over the splits, with 95% intervals of the mean of the accuracies (of
`crossvalidation.estimate`), and for each way the paired difference from `finetuned`.
Features are computed anew for each way and split, so minutes are whole ones; with
--cache they are kept for all, and minutes are of what is left.
"""

import argparse
import csv
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.stats
from PIL import Image

import keras_transfer
from keras_transfer.config import load_config
from keras_transfer.evaluation.crossvalidation import estimate, fold_numbers
from keras_transfer.evaluation.metrics import Evaluation, evaluate
from keras_transfer.workflows.inputs import prepare

HERE = Path(__file__).parent
WAYS = ("recipe", "fit", "stages", "two", "finetuned", "search")
FIGURES = ("accuracy", "macro_f1", "log_loss", "ece")


def divide(data: str, count: int, work: Path) -> list[Path]:
    """Writes a table of all images for each split; returns their paths."""
    inputs = prepare(load_config(None, {"data": data}), makes_run=False)
    splits = inputs.splits
    table = splits.train.joined(splits.val).joined(splits.test)
    names, files = splits.class_names, []
    for index, (source, encoded) in enumerate(splits.read(table.sources)):
        if isinstance(encoded, OSError):
            continue
        path = work / "images" / f"{index:05d}{Path(source).suffix or '.png'}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded)
        try:
            Image.open(path).load()
        except Exception:
            continue
        files.append((path, source))
    target = dict(zip(table.sources, table.targets.tolist(), strict=True))
    kept = table.keep([source for _, source in files])
    place = dict(zip(kept.sources, range(len(kept)), strict=True))
    numbers = fold_numbers(kept, len(names), count, 0)
    tables = []
    for split in range(count):
        path = work / f"split{split}.csv"
        with path.open("w", newline="") as opened:
            writer = csv.writer(opened)
            writer.writerow(["path", "label", "split"])
            for file, source in files:
                part = "test" if numbers[place[source]] == split else "train"
                writer.writerow([file, names[target[source]], part])
        tables.append(path)
    return tables


def figures_of(found: Evaluation) -> dict[str, float]:
    return {name: float(getattr(found, name)) for name in FIGURES}


def ours(
    way: str, table: Path, work: Path, asked: argparse.Namespace
) -> dict[str, float]:
    """Figures of one of this package's ways on the test images."""
    shared = {
        "runs_dir": work / "runs",
        "cache_dir": asked.cache or work / "cache" / f"{way}-{table.stem}",
        "name": f"{way}-{table.stem}",
        "overwrite": True,
    }
    if way == "search":
        limits = {"budget": None if asked.trials else asked.budget}
        found = keras_transfer.search(
            str(table), trials=asked.trials, **limits, **shared
        )
        for one in found.outcomes:
            print(f"{one.value:.4f} in {one.seconds:.0f} s: {one}", file=sys.stderr)
        run = keras_transfer.open_run(found.run.run_dir)
    else:
        options = {
            "fit": {"features": "last"},
            "two": {"base": "efficientnet_lite0+efficientnet_lite2"},
        }.get(way, {})
        run = keras_transfer.fit(str(table), report=False, **shared, **options)
        if way == "finetuned":
            run.unfreeze_and_finetune(report=False)
    found = run.metrics[run.manifest.phase]["test"]
    return {name: found[name] for name in FIGURES}


def recipe(table: Path, work: Path) -> dict[str, float]:
    """Figures of the recipe on the test images."""
    folder = work / "recipe"
    shutil.rmtree(folder, ignore_errors=True)
    with table.open() as opened:
        rows = list(csv.DictReader(opened))
    names = sorted({row["label"] for row in rows})
    rng = np.random.default_rng(0)
    for row in rows:
        part = row["split"]
        if part == "train" and rng.random() < 0.1:
            part = "val"
        target = folder / part / row["label"]
        target.mkdir(parents=True, exist_ok=True)
        (target / Path(row["path"]).name).symlink_to(row["path"])
    for part in ("train", "val", "test"):
        for name in names:
            (folder / part / name).mkdir(parents=True, exist_ok=True)
    said = work / "said.npz"
    command = [sys.executable, HERE / "recipe.py", folder, "--epochs", "10"]
    command += ["--finetune-epochs", "5", "--predictions", said]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    with np.load(said) as file:
        return figures_of(evaluate(file["labels"], file["probabilities"], names))


def measure(data: str, asked: argparse.Namespace) -> None:
    ways = asked.ways.split(",")
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for table in divide(data, asked.splits, work):
            for way in ways:
                started = time.perf_counter()
                if way == "recipe":
                    figures = recipe(table, work)
                else:
                    figures = ours(way, table, work, asked)
                minutes = (time.perf_counter() - started) / 60
                found[way].append({**figures, "minutes": minutes})
                print(
                    json.dumps(
                        {"data": data, "split": table.stem, "way": way} | found[way][-1]
                    ),
                    flush=True,
                )
    show(data, found, asked.splits)


def show(data: str, found: dict[str, list[dict[str, float]]], splits: int) -> None:
    """Prints a table of means, and paired differences from `finetuned`."""
    print(f"\n{data}")
    print("| way | accuracy | from `finetuned` | macro F1 | log loss | ECE | minutes |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    base = [one["accuracy"] for one in found.get("finetuned", [])]
    for way, rows in found.items():
        values = [one["accuracy"] for one in rows]
        apart = ""
        if base and way != "finetuned" and len(base) > 1:
            more = np.array(values) - base
            half = scipy.stats.t.ppf(0.975, len(more) - 1)
            half *= more.std(ddof=1) * math.sqrt(1 / len(more) + 1 / (splits - 1))
            apart = f"{more.mean():+.3f} ± {half:.3f}"
        others = [np.mean([one[name] for one in rows]) for name in FIGURES[1:]]
        minutes = np.median([one["minutes"] for one in rows])
        print(
            f"| {way} | {estimate(values, 1 / splits)} | {apart} | "
            + " | ".join(f"{value:.3f}" for value in others)
            + f" | {minutes:.1f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--budget", type=float, default=10.0)
    parser.add_argument("--trials", type=int)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--cache", type=Path)
    asked = parser.parse_args()
    for data in asked.data:
        measure(data, asked)


if __name__ == "__main__":
    main()
