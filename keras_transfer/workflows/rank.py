"""The workflow of `kt rank`: which base suits a task, and what it costs to run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_transfer.advice.logme import logme
from keras_transfer.advice.probe import images_per_second, learning_curve, probe
from keras_transfer.advice.ranking import Ranked, rank_by_accuracy
from keras_transfer.config import Config, load_config
from keras_transfer.data.tables import Splits
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.events import OnNote, OnProgress
from keras_transfer.features.base import frozen_base
from keras_transfer.features.extraction import FrozenPart, frozen_features
from keras_transfer.features.usable import usable_splits
from keras_transfer.models.bases import BASES, Base, get_base, weights_path
from keras_transfer.workflows.inputs import prepare


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
    return rank_by_accuracy(found), left_out


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
