"""The workflow of `kt rank`: measures how bases suit a task and what they cost."""

from collections.abc import Sequence
from typing import Any

from keras_transfer.advice.logme import logme
from keras_transfer.advice.probe import images_per_second, learning_curve, probe
from keras_transfer.advice.ranking import RankResult, rank_by_accuracy
from keras_transfer.config import Config
from keras_transfer.data.tables import Splits
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.events import Listener
from keras_transfer.features.base import frozen_base
from keras_transfer.features.frozen_part import FrozenPart, Storage, frozen_features
from keras_transfer.features.usable import usable_splits
from keras_transfer.models.bases import (
    BASES,
    get_base,
    get_bases,
    parameters_of,
    weights_path,
)
from keras_transfer.workflows.inputs import Inputs, prepare


def measure_bases(
    inputs: Inputs, bases: Sequence[str] | None, listener: Listener
) -> RankResult:
    """Implements `api.rank`.

    Args:
        inputs: Checked inputs.
        bases: Names of bases, or of several as one, such as `A+B`; None for all whose
            weights are on this machine.
        listener: Receives notes and progress.

    Returns:
        The measured bases, most accurate first, and the bases that were left out.

    Raises:
        UsageError: If a base is unknown, or `bases` is empty.
        KerasTransferError: If no base has its weights or can be built.
    """
    splits = inputs.splits
    names = [row.name for row in BASES]
    if bases is not None:
        names = ["+".join(row.name for row in get_bases(name)) for name in bases]
    if not names:
        raise UsageError("No base to rank. Received: an empty list. Name some.")
    for warning in splits.warnings:
        listener.note(warning)
    found, left_out = [], {}
    for name in names:
        if bases is None and not weights_path(get_base(name)).is_file():
            left_out[name] = "weights are not on this machine"
            continue
        listener.note(f"{name}: {parameters_of(name):,} weights")
        with_base = inputs.config.model_copy(update={"base": name})
        resolved = prepare(with_base, makes_run=False).config
        try:
            part = frozen_base(resolved)
        except KerasTransferError as error:
            left_out[name] = str(error)
            continue
        found.append(_measured(name, resolved, splits, part, listener))
    if not found:
        name, reason = next(iter(left_out.items()))
        raise KerasTransferError(f"No base can be ranked. The first, {name}: {reason}")
    return rank_by_accuracy(found, left_out)


class _Naming(Listener):
    """Forwards notes, and progress of any step under the name of a base."""

    def __init__(self, name: str, listener: Listener):
        self._name = name
        self._listener = listener

    def note(self, text: str) -> None:
        self._listener.note(text)

    def progress(self, step: str, done: int, total: int) -> None:
        self._listener.progress(self._name, done, total)


def _measured(
    name: str,
    config: Config,
    splits: Splits,
    part: FrozenPart,
    listener: Listener,
) -> dict[str, Any]:
    storage = Storage(config.precision)
    features = frozen_features(part, splits, 0, storage, _Naming(name, listener))
    splits = usable_splits(config, splits, features.extraction)
    probed = probe(config, splits, features)
    curve, _ = learning_curve(config, splits, probed, shares=(1.0,))
    targets, classes = probed.table.targets, len(splits.class_names)
    return {
        "base": name,
        "accuracy": curve[1.0],
        "logme": logme(probed.rows, targets, classes, config.seed),
        "images_per_second": images_per_second(part, splits, features),
        "parameters": parameters_of(name),
        "megabytes": 4 * sum(model.count_params() for model in part.models) / 1e6,
    }
