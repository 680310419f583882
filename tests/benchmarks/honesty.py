"""Whether figures can be believed: how often intervals hold the truth, and more.

    python tests/benchmarks/honesty.py --flowers flowers/

Each part is a function below and can be named alone; without names, all run. With
`--flowers FOLDER` (a folder of class folders), real images are measured besides the
`digits` that scikit-learn contains. Results of these measurements are in RESULTS.md.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import gate_simulation
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from keras_transfer.config import load_config
from keras_transfer.evaluation.metrics import Evaluation, evaluate, score
from keras_transfer.events import SILENT
from keras_transfer.features.base import frozen_base
from keras_transfer.features.frozen_part import Storage, frozen_features
from keras_transfer.features.usable import usable_splits
from keras_transfer.workflows.inputs import prepare

DRAWS = 200
TRIALS = 2_000
SIZE = 120  # images in a draw of real data
POPULATION = 100_000  # synthetic images that the truth is computed from


@dataclass(frozen=True)
class Predictions:
    """What a model says about images, and the truth.

    Attributes:
        targets: As for `metrics.evaluate`.
        probabilities: float32 `[N, num_classes]`.
        groups: int64 `[N]` group of each image; None for independent images.
    """

    targets: np.ndarray
    probabilities: np.ndarray
    groups: np.ndarray | None = None

    def rows(self, index: np.ndarray) -> "Predictions":
        groups = None if self.groups is None else self.groups[index]
        return Predictions(self.targets[index], self.probabilities[index], groups)

    def evaluate(self, seed: int) -> Evaluation:
        names = [str(i) for i in range(self.probabilities.shape[1])]
        groups = () if self.groups is None else [f"g{group}" for group in self.groups]
        return evaluate(self.targets, self.probabilities, names, groups, seed=seed)


def synthetic(
    accuracy: float,
    num_classes: int,
    multi_label: bool = False,
    group_size: int = 0,
    likeness: float = 0.0,
    seed: int = 0,
) -> Predictions:
    """Draws predictions of a model of about this accuracy, of unequal classes.

    Logits are those of the true class plus Gaussian noise, of which images of a group
    share the fraction `likeness`.
    """
    rng = np.random.default_rng(seed)
    images = POPULATION
    shares = 0.8 ** np.arange(num_classes)
    groups = np.arange(images) // max(group_size, 1)
    own = rng.normal(size=(images, num_classes))
    shared = rng.normal(size=(groups.max() + 1, num_classes))[groups]
    noise = np.sqrt(1 - likeness) * own + np.sqrt(likeness) * shared
    if multi_label:
        targets = (rng.random((images, num_classes)) < 0.3 * shares).astype(np.uint8)
        logits = 2 * _margin(accuracy, 2) * (targets - 0.5) + noise
        probabilities = 1 / (1 + np.exp(-2 * logits))
    else:
        classes = rng.choice(num_classes, groups.max() + 1, p=shares / shares.sum())
        targets = classes[groups]
        logits = _margin(accuracy, num_classes) * np.eye(num_classes)[targets] + noise
        probabilities = np.exp(2 * logits)
        probabilities /= probabilities.sum(1, keepdims=True)
    names = groups if group_size else None
    return Predictions(targets, probabilities.astype(np.float32), names)


def _margin(accuracy: float, num_classes: int) -> float:
    """Searches for the logit of the true class at which the accuracy is this."""
    noise = np.random.default_rng(0).normal(size=(20_000, num_classes))
    best = noise[:, 1:].max(1) - noise[:, 0]
    return float(np.quantile(best, accuracy))


def measure_coverage(
    predictions: Predictions, size: int, draws: int, seed: int = 0
) -> str:
    """Counts how often the intervals of `size` drawn images hold the truth.

    The truth is the metric on the images that were not drawn. With groups, whole groups
    are drawn.
    """
    rng = np.random.default_rng(seed)
    held: dict[str, list[bool]] = {}
    widths: dict[str, list[float]] = {}
    names = {"roc_auc": "auc"}
    everything = {}
    for draw in range(draws):
        chosen = _draw(predictions, size, rng)
        found = predictions.rows(chosen).evaluate(draw)
        rest = np.ones(len(predictions.targets), bool)
        rest[chosen] = False
        for metric, (low, high) in found.intervals.items():
            name = names.get(metric, metric)
            # Of a large population, the rest is the same but for a permille.
            if len(rest) < 20_000 or metric not in everything:
                others = predictions.rows(rest)
                everything[metric] = score(name, others.targets, others.probabilities)
            truth = (
                abs(everything[metric]) if name == "log_loss" else everything[metric]
            )
            held.setdefault(metric, []).append(low <= truth <= high)
            widths.setdefault(metric, []).append(high - low)
    return ", ".join(
        f"{name.replace('_', ' ')} {np.mean(held[name]):.3f} "
        f"(width {np.median(widths[name]):.3f})"
        for name in held
    )


def _draw(predictions: Predictions, size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the indices of drawn images."""
    groups = predictions.groups
    if groups is None:
        return rng.choice(len(predictions.targets), size, replace=False)
    each = np.bincount(groups).mean()
    chosen = rng.choice(groups.max() + 1, round(size / each), replace=False)
    return np.flatnonzero(np.isin(groups, chosen))


def features_of(data: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns float32 `[N, D]` features and int64 `[N]` classes of all images."""
    config = load_config(None, {"data": data})
    inputs = prepare(config, makes_run=False)
    part = frozen_base(inputs.config)
    features = frozen_features(part, inputs.splits, 0, Storage("auto"), SILENT)
    splits = usable_splits(inputs.config, inputs.splits, features.extraction)
    tables = [table for _, table in splits.items() if len(table)]
    rows = [features.rows(table.sources)[:] for table in tables]
    return np.concatenate(rows), np.concatenate([table.targets for table in tables])


def held_out_predictions(data: str, train: int, seed: int = 0) -> Predictions:
    """Trains a head on `train` images of DATA and predicts all others."""
    rows, targets = features_of(data)
    order = np.random.default_rng(seed).permutation(len(rows))
    mine, others = order[:train], order[train:]
    head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    head.fit(rows[mine], targets[mine])
    said = head.predict_proba(rows[others]).astype(np.float32)
    return Predictions(targets[others], said)


def real(flowers: str | None) -> Iterator[tuple[str, Predictions]]:
    """Yields real data sets, with a head trained on a part that is not returned.

    At least 800 images are left when 120 are drawn. Of digits, the head has few images
    to learn from, so that it makes mistakes.
    """
    yield "digits", held_out_predictions("digits", 100)
    if flowers:
        yield "flowers", held_out_predictions(flowers, 500)


def coverage(flowers: str | None) -> None:
    """Prints how often 95% intervals hold the truth."""
    for num_classes, accuracy in ((2, 0.9), (5, 0.8), (5, 0.97), (10, 0.9)):
        predictions = synthetic(accuracy, num_classes)
        for size in (30, 120, 600):
            found = measure_coverage(predictions, size, DRAWS)
            print(f"{num_classes} classes, {accuracy}, {size} images: {found}")
    predictions = synthetic(0.9, 5, multi_label=True)
    for size in (120, 600):
        found = measure_coverage(predictions, size, DRAWS)
        print(f"5 labels, {size} images: {found}")
    for accuracy, likeness in ((0.9, 0.0), (0.9, 0.5), (0.97, 0.9)):
        predictions = synthetic(accuracy, 3, group_size=5, likeness=likeness)
        for size in (60, 200):
            found = measure_coverage(predictions, size, DRAWS)
            print(
                f"groups of 5, {accuracy}, likeness {likeness}, {size} images: {found}"
            )
    for name, predictions in real(flowers):
        found = measure_coverage(predictions, SIZE, DRAWS)
        left = len(predictions.targets) - SIZE
        print(f"{name}, {SIZE} images, truth from {left}: {found}")


def ece(flowers: str | None) -> None:
    """Prints the calibration error beside its value under perfect calibration."""
    rng = np.random.default_rng(1)  # not the numbers that the images are drawn with
    raw = synthetic(0.8, 5).probabilities.astype(np.float64)
    for temperature in (1.0, 0.5, 2.0):
        # Labels are drawn from probabilities, which are then made sharper or flatter.
        targets = (raw.cumsum(1) < rng.random(len(raw))[:, None]).sum(1)
        said = raw ** (1 / temperature)
        said /= said.sum(1, keepdims=True)
        predictions = Predictions(np.minimum(targets, 4), said.astype(np.float32))
        for size in (100, 1000):
            _print_ece(f"temperature {temperature}", predictions, size)
    for name, predictions in real(flowers):
        _print_ece(name, predictions, SIZE)
        _print_ece(name, predictions, 800)


def _print_ece(name: str, predictions: Predictions, size: int) -> None:
    rng = np.random.default_rng(0)
    found = [
        predictions.rows(_draw(predictions, size, rng)).evaluate(draw)
        for draw in range(100)
    ]
    print(
        f"{name}, {size} images: ECE {np.mean([x.ece for x in found]):.3f}, if "
        f"perfectly calibrated {np.mean([x.ece_if_calibrated for x in found]):.3f}"
    )


def gate(flowers: str | None) -> None:
    """Prints how often a fine-tuned model is kept, by how much better it is."""
    gate_simulation.gate(np.random.default_rng(0), TRIALS)


def calibration(flowers: str | None) -> None:
    """Prints what a temperature fitted on few images costs or gains."""
    gate_simulation.calibration(np.random.default_rng(0), TRIALS)


PARTS: dict[str, Callable[[str | None], None]] = {
    "coverage": coverage,
    "ece": ece,
    "gate": gate,
    "calibration": calibration,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--flowers", metavar="FOLDER")
    given = parser.parse_args(arguments)
    for name in given.parts or PARTS:
        if name not in PARTS:
            parser.error(f"There is no part {name}. Choose of: {', '.join(PARTS)}.")
        print(f"# {name}", flush=True)
        PARTS[name](given.flowers)


if __name__ == "__main__":
    main()
