"""Whether `kt advise` is right: its advice beside both methods, carried out.

    python tests/benchmarks/advice.py DATA [DATA ...] --images 100 300 --seeds 3
    python tests/benchmarks/advice.py simulate

For each DATA, number of training images and seed, 30% of the images (at most --tested;
whole groups) become test images, and that number of the others are trained on. These
get the advice of `kt advise`, with and without its trial, and then `kt fit` and
`kt unfreeze-and-finetune --unfreeze top`. A row shows the advice beside the gain of
fine-tuning in accuracy on the test images, whether or not the model was kept. At the
end: how often fine-tuning was advised where it was worth it and where not, and the mean
gain of following the advice. DATA are folders or tables.

`simulate` compares criteria by which a trial may decide, for true gains that are normal
with several means and deviations, and trials that measure half a point less than them
(as they learn from two thirds of the images) with the noise of their paired images.
"""

import argparse
import csv
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import keras_transfer
from keras_transfer.advice.evidence import Method, Trial
from keras_transfer.advice.probe import deal
from keras_transfer.advice.rules import WORTH_IT, recommend, usual_gain
from keras_transfer.config import load_config
from keras_transfer.evaluation.intervals import Groups
from keras_transfer.evaluation.of_run import load_model, run_splits
from keras_transfer.evaluation.prediction import predict_table
from keras_transfer.workflows.inputs import prepare

TEST_SHARE = 0.3


@dataclass(frozen=True)
class Row:
    """The advice of one split, and the truth.

    Attributes:
        advised: The method that is advised.
        without_trial: The method that is advised without a trial.
        trial: The trial, if there was one.
        gain: Accuracy on test images after fine-tuning minus that before.
    """

    advised: Method
    without_trial: Method
    trial: Trial | None
    gain: float


def write_split(data: str, images: int, seed: int, tested: int, path: Path) -> int:
    """Writes a table of DATA with splits; returns the number of training images."""
    splits = prepare(load_config(None, {"data": data}), makes_run=False).splits
    table, *others = (part for _, part in splits.items() if len(part))
    for other in others:
        table = table.joined(other)
    grouped, count = Groups.of(table.groups), len(table)
    group = np.arange(count) if grouped is None else grouped.index
    order = np.random.default_rng(seed).permutation(group.max() + 1)[group]
    order = np.argsort(order, kind="stable")
    edge = min(tested, round(TEST_SHARE * count))
    while edge < count and group[order[edge]] == group[order[edge - 1]]:
        edge += 1
    test, rest = order[:edge], order[edge:]
    train = rest[deal(table.targets[rest], seed)[:images]]
    root = Path(data) if Path(data).is_dir() else Path(data).parent
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "group", "split"])
        for split, rows in (("train", train), ("test", test)):
            for i in rows:
                label = splits.class_names[table.targets[i]]
                source = root.resolve() / table.sources[i]
                writer.writerow([source, label, table.groups[i], split])
    return len(train)


def measure(table: Path, options: dict[str, object]) -> Row:
    """Asks for advice and carries out both methods."""
    found = keras_transfer.advise(table, **options)
    method, _, _ = recommend(replace(found.evidence, trial=None))
    run = keras_transfer.fit(table, **options, runs_dir=table.parent, report=False)
    run.unfreeze_and_finetune(unfreeze="top", report=False)
    splits = run_splits(run)
    head, tuned = (
        predict_table(load_model(run, phase), splits.test, splits.read).argmax(1)
        for phase in ("fit", "finetune")
    )
    right, were_right = (x == splits.test.targets for x in (tuned, head))
    gain = float(right.mean() - were_right.mean())
    return Row(found.method, method, found.evidence.trial, gain)


def _expected(seen: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Weighs gains in trials with the usual gain of unlike data."""
    mean, deviation, _ = usual_gain(0.0, 0)
    weight = deviation**2 / (deviation**2 + error**2)
    return weight * seen + (1 - weight) * mean


def simulate(rounds: int = 200_000) -> None:
    """Prints what each criterion gains, and how often it leads to fine-tuning."""
    rng = np.random.default_rng(0)
    for mean, deviation in ((0.0, 0.03), (0.02, 0.03), (0.03, 0.04)):
        for images in (100, 300, 1_000):
            true = rng.normal(mean, deviation, rounds)
            # Models differ on 15% of the images, and on those that the gain is due to.
            error = np.sqrt((0.15 + np.abs(true)) / images)
            seen = true - 0.005 + error * rng.normal(size=rounds)
            criteria = {
                "lower end above 0": seen - 1.96 * error > 0,
                "gain at least 0.01": seen >= 0.01,
                "gain at least 0.005": seen >= 0.005,
                "gain at least 0": seen >= 0,
                "upper end above 0.01": seen + 1.96 * error > 0.01,
                "expected gain at least 0.005": _expected(seen, error) >= 0.005,
                "always": np.full(rounds, True),
            }
            print(f"gains {mean} +- {deviation}, {images} images", end=": ")
            shown = (
                f"{name} {100 * (chosen * true).mean():.2f} ({chosen.mean():.0%})"
                for name, chosen in criteria.items()
            )
            print(", ".join(shown))


def show_summary(rows: list[Row]) -> None:
    """Prints what following the advice would have gained."""
    choices = {
        "never fine-tuned": [False for _ in rows],
        "always": [True for _ in rows],
        "as advised without a trial": [
            x.without_trial.startswith("finetune") for x in rows
        ],
        "as advised": [x.advised.startswith("finetune") for x in rows],
        "best": [x.gain > 0 for x in rows],
    }
    worth = [row.gain >= WORTH_IT for row in rows]
    for name, chosen in choices.items():
        pairs = list(zip(chosen, worth, rows, strict=True))
        print(
            f"{name}: mean gain {np.mean([c * x.gain for c, _, x in pairs]):+.4f}; "
            f"fine-tuned in {sum(c and w for c, w, _ in pairs)} of {sum(worth)} where "
            f"it was worth it, {sum(c and not w for c, w, _ in pairs)} of "
            f"{len(rows) - sum(worth)} others"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--images", nargs="+", type=int, default=[300])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tested", type=int, default=800)
    parser.add_argument("--base", default="efficientnet_lite0")
    parser.add_argument("--image-size", type=int)
    arguments = parser.parse_args()
    if arguments.data == ["simulate"]:
        simulate()
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for data in arguments.data:
            for images in arguments.images:
                for seed in range(arguments.seeds):
                    table = Path(folder) / f"{Path(data).stem}-{images}-{seed}.csv"
                    count = write_split(data, images, seed, arguments.tested, table)
                    options = {"base": arguments.base, "seed": seed}
                    options |= {"image_size": arguments.image_size}
                    row = measure(table, options)
                    rows.append(row)
                    shown = "none"
                    if (one := row.trial) is not None:
                        shown = f"{one.gain:+.3f} ({one.low:+.3f} to {one.high:+.3f})"
                    print(
                        f"{Path(data).stem}, {count} images, seed {seed}: "
                        f"{row.advised} (without a trial {row.without_trial}); trial "
                        f"{shown}, gain on test images {row.gain:+.3f}",
                        flush=True,
                    )
    show_summary(rows)


if __name__ == "__main__":
    main()
