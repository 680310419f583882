"""How a search should choose options of fine-tuning: at random, by racing, by Optuna.

    pip install optuna
    python tests/benchmarks/search_methods.py TABLES DATA [DATA ...] [--seeds 300]
        [--drawn 0] [--images 400] [--image-size 64] [--epochs 4]

For each DATA (a folder or a table), every option of `GRID` is tried once with
`tune_in_folds` on --images training images. Predictions out of fold are written to the
folder TABLES, and read from there if they exist, so that simulations can be repeated.

In each of --seeds simulations, the images are divided at random into two halves. A
method sees figures of one half only, fold by fold, until it has spent its budget of
fold-trainings; the option that it ends with, at the mix that is best on this half, is
judged by its gain in accuracy over the head alone on the other half. The head alone,
with a gain of 0, is kept if nothing is better. With --drawn, the images are taken for
the whole population instead: a method sees as many, drawn with replacement, and its
option is judged on all; so more can be seen than there are.

All methods try the defaults first:

random      the others in random order, in all folds
racing      the same, but an option is left after a fold if the upper end of the
            interval of its gain does not exceed the gain of the best, as in `kt search`
halving     successive halving: as many random options as can be afforded, the better
            half of which is tried in the second fold, and of these in the third
TPE         Optuna's TPESampler; an option that it asks for again costs nothing
TPE, pruned the same with the MedianPruner

Printed are mean gains in points with their standard errors over the simulations, then
mean differences from racing. The errors say nothing about other images or trainings.
Last is the mean number of options that racing has tried, a third of the budget without
it.
"""

import argparse
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import optuna

from keras_transfer.advice.probe import deal
from keras_transfer.advice.trial import FOLDS, tune_in_folds
from keras_transfer.config import load_config
from keras_transfer.data.tables import Table
from keras_transfer.evaluation.comparison import Comparison
from keras_transfer.evaluation.crossvalidation import fold_numbers
from keras_transfer.evaluation.validation import halves
from keras_transfer.events import SILENT
from keras_transfer.features.base import frozen_base
from keras_transfer.features.frozen_part import frozen_features
from keras_transfer.features.usable import keep_copies_together, usable_splits
from keras_transfer.training.tuned import ALPHAS
from keras_transfer.workflows.inputs import prepare

VALUES = {
    "label_smoothing": (0.0, 0.1),
    "learning_rate": (3e-4, 1e-3, 3e-3),
    "layer_decay": (0.1, 0.3, 1.0),
}
GRID = list(itertools.product(*(range(len(x)) for x in VALUES.values())))
DEFAULTS = GRID.index((0, 1, 1))
HEAD_ALONE = -1
BUDGETS = (6, 12, 24, 48)
STARTUP = (4, 10)
"""Random trials before TPE's model is used: few, for small budgets, and its default."""

Choices = Iterator[tuple[int, int]]
"""(fold-trainings spent, best option) after each trial."""


@dataclass(frozen=True)
class Measured:
    """What models said, out of fold, of the N images of a data set.

    Attributes:
        table: The images.
        folds: int64 `[N]` fold of each image.
        said: float32 `[options, 1 + alphas, N, C]` probabilities; the first are before.
    """

    table: Table
    folds: np.ndarray
    said: np.ndarray

    @functools.cached_property
    def right(self) -> np.ndarray:
        """int64 `[options, 1 + alphas, N]`: 1 where the class is right."""
        return (self.said.argmax(-1) == self.table.targets).astype(np.int64)

    @functools.cached_property
    def merits(self) -> np.ndarray:
        """The same, with the log loss to break ties."""
        of_class = self.said[..., np.arange(len(self.folds)), self.table.targets]
        return self.right + 1e-6 * np.log(np.maximum(of_class, 1e-7))

    def gains(self, choosing: np.ndarray, judging: np.ndarray) -> np.ndarray:
        """Right images that options gain, at the mix that is best on other images."""
        mix = 1 + self.merits[:, 1:, choosing].sum(-1).argmax(-1)
        after = self.right[np.arange(len(GRID)), mix][:, judging]
        return (after - self.right[0, 0, judging]).sum(-1)

    def most(self, rows: np.ndarray) -> np.ndarray:
        """Largest upper end of the intervals of the gains of each option's mixes."""
        count, change = len(rows), (self.right[:, 1:] - self.right[:, :1])[..., rows]
        spread = abs(change).sum(-1) ** 0.5 / count  # as in `compare`
        pairs = zip(change.mean(-1).flat, spread.flat, strict=True)
        made = (
            Comparison("accuracy", 0, x, 1, 1, count, s, 0, count) for x, s in pairs
        )
        return np.reshape([one.interval[1] for one in made], spread.shape).max(-1)

    def halves(self, rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        first = halves(self.table.select(rows), self.said.shape[-1], seed)
        return rows[first], rows[~first]


def measure(data: str, folder: Path, images: int, size: int, epochs: int) -> Measured:
    """Tries all options, but for those that are in the folder."""
    asked = {"data": data, "image_size": size, "metric": "accuracy"}
    asked |= {"finetune.epochs": epochs, "finetune.precision": "f32"}
    inputs = prepare(load_config(None, asked), makes_run=False)
    config, splits = inputs.config, inputs.splits
    picked = np.sort(deal(splits.train.targets, config.seed)[:images])
    nothing = splits.train.keep(())
    train = splits.train.select(picked)
    splits = replace(splits, train=train, val=nothing, test=nothing)
    part = frozen_base(config)
    features = frozen_features(part, splits, 0)
    splits = usable_splits(config, splits, features.extraction)
    table = keep_copies_together(splits.train, features.extraction)
    folds = fold_numbers(table, len(splits.class_names), FOLDS, config.seed)
    said = []
    for option in GRID:
        pairs = zip(VALUES.items(), option, strict=True)
        given = {name: values[place] for (name, values), place in pairs}
        name = "-".join(map(str, [Path(data).stem, *given.values()]))
        path = folder / f"{name}.npz"
        if not path.exists():
            tuning = config.finetune.model_copy(update=given)
            own = config.model_copy(update={"finetune": tuning})
            found = tune_in_folds(own, splits, part, features, images, SILENT)
            mixes = np.stack([found.mixes[alpha] for alpha in ALPHAS])
            np.savez(path, before=found.before, mixes=mixes)
        with np.load(path) as arrays:
            said.append(np.concatenate([arrays["before"][None], arrays["mixes"]]))
        before, *after = (said[-1].argmax(-1) == table.targets).mean(-1)
        print(path.stem, f"{before:.4f}", np.round(after, 4), flush=True)
    return Measured(table, folds, np.stack(said))


@dataclass(frozen=True)
class Seen:
    """What is known of the options from the images that a search sees.

    Attributes:
        gains: float64 `[options, folds]` gain in accuracy after each fold.
        most: float64 `[options, folds]` upper end of its interval.
        true: float64 `[options + 1]` gain on those that judge; the last is of the head.
    """

    gains: np.ndarray
    most: np.ndarray
    true: np.ndarray

    @classmethod
    def of(cls, measured: Measured, seed: int, drawn: int) -> "Seen":
        others = np.arange(len(measured.folds))
        if drawn:
            seen = np.random.default_rng(seed).choice(others, drawn)
        else:
            seen, others = measured.halves(others, seed)
        gains, most = [], []
        for fold in range(FOLDS):
            rows = seen[measured.folds[seen] <= fold]
            # As in `judge`, each half chooses the mix for the other.
            one, other = measured.halves(rows, seed)
            gained = measured.gains(one, other) + measured.gains(other, one)
            gains.append(gained / len(rows))
            most.append(measured.most(rows))
        true = np.append(measured.gains(seen, others) / len(others), 0.0)
        return cls(np.stack(gains, 1), np.stack(most, 1), true)

    def gain(self, option: int) -> float:
        return 0.0 if option == HEAD_ALONE else float(self.gains[option, -1])

    def best(self, tried: list[int]) -> int:
        """The best of the options that were tried in all folds, and the head alone."""
        return max([HEAD_ALONE, *tried], key=self.gain)


def shuffled(seed: int) -> list[int]:
    """The defaults, then the others in random order."""
    order = np.random.default_rng(seed).permutation(len(GRID)).tolist()
    return [DEFAULTS, *(option for option in order if option != DEFAULTS)]


def in_order(seen: Seen, seed: int, races: bool) -> Choices:
    spent, tried = 0, list[int]()
    for option in shuffled(seed):
        best = seen.gain(seen.best(tried))
        for fold in range(FOLDS):
            spent += 1
            if races and fold < FOLDS - 1 and seen.most[option, fold] <= best:
                break
        else:
            tried.append(option)
        yield spent, seen.best(tried)


def halving(seen: Seen, seed: int) -> Choices:
    for budget in BUDGETS:
        # As many in the first fold as leave enough for half and a quarter of them.
        most = (n for n in range(budget, 0, -1) if sum(halved(n)) <= budget)
        kept = shuffled(seed)[: next(most)]
        for fold, count in enumerate(halved(len(kept))[1:]):
            kept = sorted(kept, key=seen.gains[:, fold].__getitem__)[-count:]
        yield budget, seen.best(kept)


def halved(count: int) -> list[int]:
    """Options that are tried in each fold."""
    return [math.ceil(count / 2**fold) for fold in range(FOLDS)]


def by_optuna(seen: Seen, seed: int, startup: int, prunes: bool) -> Choices:
    pruner = optuna.pruners.MedianPruner(n_startup_trials=startup)
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup),
        pruner=pruner if prunes else optuna.pruners.NopPruner(),
    )
    study.enqueue_trial(dict(zip(VALUES, GRID[DEFAULTS], strict=True)))
    tried, trained = list[int](), set[tuple[int, int]]()
    for _ in range(3 * len(GRID)):
        trial = study.ask()
        places = (trial.suggest_int(x, 0, len(v) - 1) for x, v in VALUES.items())
        option = GRID.index(tuple(places))
        for fold in range(FOLDS):
            trained.add((option, fold))
            trial.report(seen.gains[option, fold], fold)
            if fold < FOLDS - 1 and trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, seen.gains[option, -1])
            tried.append(option)
        yield len(trained), seen.best(tried)
        if len(trained) >= BUDGETS[-1]:
            return


def simulate(measured: Measured, seeds: int, drawn: int) -> None:
    """Prints mean gains by method and budget."""
    found: dict[str, list[np.ndarray]] = {}
    raced = []
    for seed in range(seeds):
        seen = Seen.of(measured, seed, drawn)
        methods = {
            "the defaults": [(0, seen.best([DEFAULTS]))],
            "random": in_order(seen, seed, races=False),
            "racing": in_order(seen, seed, races=True),
            "halving": halving(seen, seed),
        }
        for few in STARTUP:
            methods[f"TPE after {few}"] = by_optuna(seen, seed, few, False)
            methods[f"TPE after {few}, pruned"] = by_optuna(seen, seed, few, True)
        methods["all options"] = [(0, seen.best(list(range(len(GRID)))))]
        methods["truly best"] = [(0, int(seen.true.argmax()))]
        for name, choices in methods.items():
            made = list(choices)
            picked = [[x for n, x in made if n <= most][-1] for most in BUDGETS]
            found.setdefault(name, []).append(seen.true[picked])
            if name == "racing":
                raced.append([sum(n <= most for n, _ in made) for most in BUDGETS])
    racing = np.array(found["racing"])
    for title, less in (("gain", 0 * racing), ("gain less that of racing", racing)):
        print(f"\n| {title} | " + " | ".join(map(str, BUDGETS)) + " |")
        print("| --- |" + " --- |" * len(BUDGETS))
        for name, rows in found.items():
            values = 100 * (np.array(rows) - less)
            errors = values.std(0, ddof=1) / math.sqrt(seeds)
            pairs = zip(values.mean(0), errors, strict=True)
            cells = (f"{mean:+.2f} +- {error:.2f}" for mean, error in pairs)
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print("\noptions raced:", *(f"{x:.1f}" for x in np.mean(raced, 0)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", type=Path)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--seeds", type=int, default=300)
    parser.add_argument("--drawn", type=int, default=0)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    asked = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    asked.tables.mkdir(parents=True, exist_ok=True)
    for data in asked.data:
        sizes = asked.images, asked.image_size, asked.epochs
        simulate(measure(data, asked.tables, *sizes), asked.seeds, asked.drawn)


if __name__ == "__main__":
    main()
