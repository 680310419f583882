"""`kt unfreeze-and-finetune` beside the keras.io recipe: speed, and accuracy.

    python tests/benchmarks/finetune_vs_recipe.py speed PHOTOS
    python tests/benchmarks/finetune_vs_recipe.py speed PHOTOS --base ResNet50
    python tests/benchmarks/finetune_vs_recipe.py accuracy PHOTOS

PHOTOS holds class folders, or train/ and val/ (or test/) folders of them.

speed: images a second of training, on --images distinct photos of about 43 KB (as in
fit_vs_recipe.py), without augmentation, with random weights, once with the last stage
trainable and once with all layers: of this package the median of three epochs, of the
recipe the second epoch after base.trainable = True. Runs alternate, and ratios are of
neighbouring runs.

accuracy: 15% test images (where PHOTOS names none), seed 0; the test accuracy of the
head alone and after fine-tuning, and the seconds of both, of this package with its
defaults and of the recipe (head, then all layers at 1e-5).
"""

import argparse
import csv
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from fit_vs_recipe import HERE, find_photos, make_photos, run, shown

KT = Path(sys.executable).with_name("kt")
LAST_FROZEN = {"MobileNetV2": "block_12_add", "ResNet50": "conv4_block6_out"}
"""The layer below the last stage, of the bases that the speed is measured of."""


def finetune(run_dir: Path, *options: object) -> dict:
    """Runs the command on a copy of a run; its report, with metrics and seconds."""
    copy = run_dir.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run_dir, copy)
    seconds, _, _ = run(KT, "unfreeze-and-finetune", copy, *options)
    manifest = json.loads((copy / "manifest.json").read_text())
    metrics = json.loads((copy / "metrics.json").read_text())
    return {**manifest["finetune"], "metrics": metrics, "process_seconds": seconds}


def recipe(data: Path, *options: object) -> dict:
    script = HERE / "recipe.py"
    return json.loads(run(sys.executable, script, data, *options)[2].splitlines()[-1])


def speed(photos: Path, work: Path, base: str, images: int, repeats: int) -> None:
    data = work / "photos"
    make_photos(find_photos(photos), images, data)
    count = len(list((data / "train").rglob("*.jpg")))
    fit = [KT, "fit", data, "--base", base, "--weights", "none", "--name", base]
    run(*fit, "--runs-dir", work, "--cache-dir", work / "cache")
    for unfreeze in ("top", "all"):
        ours, theirs, notes = [], [], []
        for _ in range(repeats):
            lower = ["--finetune-from", LAST_FROZEN[base]] if unfreeze == "top" else []
            options = ["--base", base, "--weights", "none", "--no-augmentation"]
            found = recipe(
                data, *options, "--epochs", 1, "--finetune-epochs", 2, *lower
            )
            theirs.append(count / found["finetune_train_seconds"][-1])
            report = finetune(
                work / base, "--unfreeze", unfreeze, "--epochs", 3, "--force"
            )
            ours.append(report["images_per_second"])
            notes = report["notes"]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        print(
            f"{base} {unfreeze}: {shown(ours)} img/s ({report['precision']}), "
            f"recipe {shown(theirs)} img/s, ratio {shown(ratios)}",
            flush=True,
        )
        print("  " + "; ".join(note for note in notes if "precision" in note))


def accuracy(photos: Path, work: Path, head_epochs: int, epochs: int) -> None:
    fit = [KT, "fit", photos, "--base", "MobileNetV2", "--name", "fit"]
    seconds, _, _ = run(*fit, "--runs-dir", work, "--cache-dir", work / "cache")
    report = finetune(work / "fit")
    before = report["metrics"]["fit"]["test"]
    after = report["metrics"]["finetune"]["test"]
    print(f"{photos.name}, {before['images']} test images")
    print(f"  kt fit: {before['accuracy']:.4f} in {seconds:.1f} s")
    print(
        f"  kt unfreeze-and-finetune: {after['accuracy']:.4f} in "
        f"{report['process_seconds']:.1f} s; {report['reason']}",
        flush=True,
    )
    data = work / "same_splits"
    with (work / "fit" / "splits.csv").open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            # The recipe watches a tenth of the training images while it trains.
            is_val = row["split"] == "train" and number % 10 == 0
            folder = data / ("val" if is_val else row["split"]) / row["label"]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(photos / row["path"], folder)
    found = recipe(data, "--epochs", head_epochs, "--finetune-epochs", epochs)
    print(
        f"  recipe, head {head_epochs} epochs: {found['test_accuracy']:.4f} in "
        f"{sum(found['epoch_seconds']):.1f} s"
    )
    accuracies = ", ".join(f"{value:.4f}" for value in found["finetune_accuracy"])
    print(
        f"  recipe, then all layers at 1e-5, epoch by epoch: {accuracies}; "
        f"{statistics.median(found['finetune_epoch_seconds']):.1f} s an epoch"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["speed", "accuracy"])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--base", choices=LAST_FROZEN, default="MobileNetV2")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--head-epochs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photos, work = arguments.photos.resolve(), Path(folder)
        if arguments.what == "speed":
            speed(photos, work, arguments.base, arguments.images, arguments.repeats)
        else:
            accuracy(photos, work, arguments.head_epochs, arguments.epochs)


if __name__ == "__main__":
    main()
