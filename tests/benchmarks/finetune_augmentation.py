"""Fine-tuning with RandAugment, mixup, cutmix and label smoothing, beside without.

    python tests/benchmarks/finetune_augmentation.py FOLDER ... --images 300 --seeds 3

For each data set and seed, `--images` images are drawn, with as many of each class as
the data have; the base's last stage is fine-tuned on them in each way, and the model is
evaluated on the other images (at most 600), whether or not it is better than the head
alone. Printed are the means over seeds of the accuracy and the log loss of the first
way (of all: without any), and what each other way changes, with the standard error of
the mean change.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

import keras_transfer
from keras_transfer.data.loading import load
from keras_transfer.runs.files import csv_text

MOST_EVALUATED = 600
WAYS: dict[str, dict[str, object]] = {
    "without": {},
    "4 views": {"augment": 4},
    "4 views, randaugment": {"augment": 4, "augment_policy": "randaugment"},
    "online": {"augment": "online"},
    "online, randaugment": {"augment": "online", "augment_policy": "randaugment"},
    "online, mixup": {"augment": "online", "mix": "mixup"},
    "online, cutmix": {"augment": "online", "mix": "cutmix"},
    "label smoothing 0.1": {"label_smoothing": 0.1},
}


def table_of(folder: str, images: int, seed: int) -> str:
    """A CSV table with the drawn images for training, and others to evaluate on."""
    splits = load(folder)
    every = splits.train.joined(splits.test)
    order = np.random.default_rng(seed).permutation(len(every))
    picked = order[: images + MOST_EVALUATED]
    root, names = splits.root or Path(), splits.class_names
    rows = [
        (
            root / every.sources[i],
            names[every.targets[i]],
            "train" if rank < images else "test",
        )
        for rank, i in enumerate(picked)
    ]
    return csv_text(("path", "label", "split"), rows)


def measure(table: Path, work: Path, arguments: argparse.Namespace, seed: int) -> dict:
    """(accuracy, log loss, seconds) of each way on the images that were left out."""
    found = {}
    fitted = keras_transfer.fit(
        table,
        base=arguments.base,
        image_size=arguments.image_size,
        seed=seed,
        report=False,
        name=f"{table.stem}-{seed}",
        runs_dir=work / "runs",
        cache_dir=work / "cache",
    )
    for number, name in enumerate(arguments.ways):
        copy = shutil.copytree(fitted.run_dir, work / f"{table.stem}-{seed}-{number}")
        run, started = keras_transfer.open_run(copy), time.process_time()
        keras_transfer.unfreeze_and_finetune(
            run,
            force=True,
            epochs=arguments.epochs,
            precision="f32",
            report=False,
            **WAYS[name],
        )
        seconds = time.process_time() - started
        figures = run.metrics["finetune"]["test"]
        found[name] = (figures["accuracy"], figures["log_loss"], seconds)
        print("#", table.stem, seed, name, *found[name], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--base", default="efficientnet_lite0")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for data in arguments.folders:
            rows = []
            for seed in range(arguments.seeds):
                table = Path(folder, f"{Path(data).stem}.csv")
                table.write_text(table_of(data, arguments.images, seed))
                rows.append(measure(table, Path(folder, "work"), arguments, seed))
            ways = arguments.ways
            values = {name: np.array([row[name] for row in rows]) for name in ways}
            plain = values[ways[0]]
            print("{}: {:.4f}; {:.4f}; {:.0f} s".format(data, *plain.mean(0)))
            for name in ways[1:]:
                change = values[name] - plain
                error = change.std(0, ddof=1) / len(rows) ** 0.5
                print(
                    f"{name} | {100 * change[:, 0].mean():+.2f} +- "
                    f"{100 * error[0]:.2f} points | {change[:, 1].mean():+.4f} +- "
                    f"{error[1]:.4f} | {values[name][:, 2].mean():.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
