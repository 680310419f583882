"""Measured bases -> their order, and which no other beats."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keras_transfer.runs.manifest import Estimate


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


def rank_by_accuracy(found: Sequence[dict[str, Any]]) -> list[Ranked]:
    """The best first; marked are those that no other beats in accuracy and speed."""

    def is_best(one: dict[str, Any]) -> bool:
        here = one["accuracy"].mean, one["images_per_second"]
        others = [(x["accuracy"].mean, x["images_per_second"]) for x in found]
        return not any(
            accuracy >= here[0] and speed >= here[1] and (accuracy, speed) != here
            for accuracy, speed in others
        )

    ranked = [Ranked(**one, is_best=is_best(one)) for one in found]
    return sorted(ranked, key=lambda one: -one.accuracy.mean)
