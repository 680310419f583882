"""The workflow of `kt rank`: which base suits a task, and what it costs to run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keras_transfer.bases import BASES, Base, get_base, weights_path
from keras_transfer.config import Config, load_config
from keras_transfer.data import Splits
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.evidence import images_per_second, learning_curve, probe
from keras_transfer.extract import FrozenPart, frozen_features
from keras_transfer.feature_extraction import frozen_base, usable_splits
from keras_transfer.inputs import prepare
from keras_transfer.run import Estimate, OnNote, OnProgress
from keras_transfer.transferability import logme


@dataclass(frozen=True)
class Ranked:
    """A base and what it is worth for a task.

    Attributes:
        base: Its name.
        accuracy: Of a linear probe on its features, cross-validated on the training
            images; of multi-label data the mean average precision.
        logme: `transferability.logme` of its features.
        images_per_second: Of the base on this machine.
        parameters: Number of its weights.
        megabytes: About the size of an exported model: 4 bytes a weight.
        is_best: Whether no other base is both faster and more accurate (on the Pareto
            front).
    """

    base: str
    accuracy: Estimate
    logme: float
    images_per_second: float
    parameters: int
    megabytes: float
    is_best: bool


def rank(
    data: str | Path,
    bases: Sequence[str] | None = None,
    *,
    on_progress: OnProgress = lambda *_: None,
    on_note: OnNote = lambda _: None,
    **options: Any,
) -> tuple[list[Ranked], dict[str, str]]:
    """Measures bases on a task, the most accurate first.

    Features are cached, so that `fit` with one of the bases does not compute them
    again.

    Args:
        data: As of `fit`.
        bases: Names; None for all whose weights are on this machine.
        on_progress: Told how the work goes on.
        on_note: Told which base is next.
        **options: Config keys other than `base`.

    Returns:
        (bases by accuracy, those left out to the reason).

    Raises:
        UsageError: If a base is unknown, or none can be used.
        KerasTransferError: If no base has its weights.
    """
    config = load_config(None, {**options, "data": str(data)})
    splits = prepare(config, makes_run=False).splits
    return measure_bases(config, splits, bases, on_progress, on_note)


def measure_bases(
    config: Config,
    splits: Splits,
    bases: Sequence[str] | None,
    on_progress: OnProgress,
    on_note: OnNote,
) -> tuple[list[Ranked], dict[str, str]]:
    """Does what `rank` says, with images that were found."""
    rows = list(BASES) if bases is None else [get_base(name) for name in bases]
    if not rows:
        raise UsageError("No base to rank. Received: an empty list. Name some.")
    for warning in splits.warnings:
        on_note(warning)
    found, left_out = [], {}
    for row in rows:
        if bases is None and not weights_path(row).is_file():
            left_out[row.name] = "weights are not on this machine"
            continue
        on_note(f"{row.name}: {row.parameters:,} weights")
        with_base = config.model_copy(update={"base": row.name})
        resolved = prepare(with_base, makes_run=False).config
        try:
            part = frozen_base(resolved)
        except KerasTransferError as error:
            left_out[row.name] = str(error)
            continue
        found.append(_measured(row, resolved, splits, part, on_progress))
    if not found:
        name, reason = next(iter(left_out.items()))
        raise KerasTransferError(f"No base can be ranked. The first, {name}: {reason}")
    return _ranked(found), left_out


def _measured(
    row: Base,
    config: Config,
    splits: Splits,
    part: FrozenPart,
    on_progress: OnProgress,
) -> dict[str, Any]:
    def progress(_: str, done: int, total: int) -> None:
        on_progress(row.name, done, total)

    features = frozen_features(part, splits, 0, config.precision, on_progress=progress)
    splits = usable_splits(config, splits, features.extraction)
    probed = probe(config, splits, features)
    curve, _ = learning_curve(config, splits, probed, features, shares=(1.0,))
    targets, classes = probed.table.targets, len(splits.class_names)
    return {
        "base": row.name,
        "accuracy": curve[1.0],
        "logme": logme(probed.rows, targets, classes, config.seed),
        "images_per_second": images_per_second(part, splits, features),
        "parameters": row.parameters,
        "megabytes": 4 * part.model.count_params() / 1e6,
    }


def _ranked(found: Sequence[dict[str, Any]]) -> list[Ranked]:
    def is_best(one: dict[str, Any]) -> bool:
        here = one["accuracy"].mean, one["images_per_second"]
        others = [(x["accuracy"].mean, x["images_per_second"]) for x in found]
        return not any(
            accuracy >= here[0] and speed >= here[1] and (accuracy, speed) != here
            for accuracy, speed in others
        )

    ranked = [Ranked(**one, is_best=is_best(one)) for one in found]
    return sorted(ranked, key=lambda one: -one.accuracy.mean)


def draw_chart(ranked: Sequence[Ranked], path: Path) -> None:
    """Draws accuracy against speed as a PNG, the Pareto front as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for one in ranked:
        low, high = one.accuracy.low, one.accuracy.high
        mean, speed = one.accuracy.mean, one.images_per_second
        axes.errorbar(
            speed,
            mean,
            yerr=[[mean - low], [high - mean]],
            fmt="o",
            color="tab:blue" if one.is_best else "tab:gray",
            capsize=3,
        )
        axes.annotate(
            one.base, (speed, mean), xytext=(6, 6), textcoords="offset points"
        )
    front = sorted((x.images_per_second, x.accuracy.mean) for x in ranked if x.is_best)
    axes.plot(*zip(*front, strict=True), color="tab:blue", linewidth=1)
    axes.set_xlim(0, 1.25 * max(one.images_per_second for one in ranked))
    axes.set_xlabel("images a second on this machine")
    axes.set_ylabel("accuracy of a linear probe, 95% interval")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150, format="png")
