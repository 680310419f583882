"""The workflow of `kt rank`: which base suits a task, and what it costs to run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keras_transfer.bases import BASES, Base, get_base, weights_path
from keras_transfer.config import load_config
from keras_transfer.data import load as load_data
from keras_transfer.errors import UsageError
from keras_transfer.evidence import learning_curve, probed_splits
from keras_transfer.extract import Extractor, frozen_features
from keras_transfer.feature_extraction import frozen_base, resolve, usable_splits
from keras_transfer.prediction import sample_images
from keras_transfer.run import Estimate, OnNote, OnProgress
from keras_transfer.transferability import logme

_SAMPLE = 32  # images that are run to measure the speed


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
    data: str,
    bases: Sequence[str] | None = None,
    *,
    on_progress: OnProgress = lambda *_: None,
    on_note: OnNote = lambda _: None,
    **options: Any,
) -> tuple[list[Ranked], list[str]]:
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
        (bases by accuracy, names of those left out for want of weights).

    Raises:
        UsageError: If a base is unknown, or none can be used.
    """
    rows = list(BASES) if bases is None else [get_base(name) for name in bases]
    here = [row for row in rows if bases or weights_path(row).is_file()]
    skipped = [row.name for row in rows if row not in here]
    if not here:
        raise UsageError("No base to rank. Received: an empty list. Name some.")
    found = []
    for row in here:
        on_note(f"{row.name}: {row.parameters:,} weights")
        options = {**options, "data": data, "base": row.name}
        found.append(_measured(row, options, on_progress))
    return _ranked(found), skipped


def _measured(
    row: Base, options: dict[str, Any], on_progress: OnProgress
) -> dict[str, Any]:
    config = resolve(load_config(None, options))
    splits = load_data(config.data, config.splits, config.seed, config.data_dir)
    part = frozen_base(config)

    def progress(_: str, done: int, total: int) -> None:
        on_progress(row.name, done, total)

    features = frozen_features(part, splits, 0, config.precision, on_progress=progress)
    splits = usable_splits(config, splits, features.extraction)
    splits = probed_splits(splits, config.seed)
    curve, _ = learning_curve(config, splits, features, shares=(1.0,))
    rows = features.rows(splits.train.sources)[:]
    targets, classes = splits.train.targets, len(splits.class_names)
    sample = sample_images(splits, part.image_size, _SAMPLE)
    pixels = np.stack([decoded for _, _, decoded in sample])
    return {
        "base": row.name,
        "accuracy": curve[1.0],
        "logme": logme(rows, targets, classes, config.seed),
        "images_per_second": 1
        / Extractor(part.model, features.precision).measure(pixels),
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
    figure.savefig(path, dpi=150)
