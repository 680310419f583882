"""Ranks measured bases and finds the Pareto front of accuracy and speed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keras_transfer.markup import html_table
from keras_transfer.runs.manifest import Estimate


@dataclass(frozen=True)
class Ranked:
    """Measurements of a base for a task.

    Attributes:
        base: Name of the base.
        accuracy: Accuracy of a linear probe on its features, cross-validated on the
            training images; for multi-label data, the mean average precision.
        logme: LogME of its features in nats; see `logme.logme`.
        images_per_second: Throughput of the base on this machine.
        parameters: Number of weights without the classifier.
        megabytes: Approximate size of an exported model in units of 10^6 bytes, at 4
            bytes per weight.
        is_best: Whether the base is on the Pareto front: no other base is at least as
            accurate and at least as fast, and better in one of the two.
    """

    base: str
    accuracy: Estimate
    logme: float
    images_per_second: float
    parameters: int
    megabytes: float
    is_best: bool


@dataclass(frozen=True, repr=False)
class RankResult:
    """The result of `kt rank`.

    Attributes:
        ranked: The measured bases, most accurate first.
        left_out: Reason why a base was not measured, by name of the base.
    """

    ranked: Sequence[Ranked]
    left_out: Mapping[str, str]

    def __repr__(self) -> str:
        bases = ", ".join(f"{one.base} {one.accuracy}" for one in self.ranked)
        return f"RankResult({bases}; {len(self.left_out)} left out)"

    def _repr_html_(self) -> str:
        """What notebooks show: the bases, and those that were left out."""
        rows = [
            (
                one.base,
                one.accuracy,
                f"{one.logme:.4f}",
                f"{one.images_per_second:,.0f}",
                f"{one.parameters:,}",
                f"{one.megabytes:,.1f}",
                "none is both faster and better" if one.is_best else "",
            )
            for one in self.ranked
        ]
        names = ("base", "accuracy (95% interval)", "LogME", "img/s", "parameters")
        shown = html_table("Bases, most accurate first", (*names, "MB", ""), rows)
        if self.left_out:
            header = ("base", "reason")
            shown += html_table("Left out", header, self.left_out.items())
        return shown


def rank_by_accuracy(
    found: Sequence[dict[str, Any]], left_out: Mapping[str, str]
) -> RankResult:
    """Sorts bases by decreasing accuracy and marks the Pareto front.

    Args:
        found: The fields of `Ranked` but `is_best`, for each measured base.
        left_out: Reason why a base was not measured, by name of the base.
    """

    def is_best(one: dict[str, Any]) -> bool:
        here = one["accuracy"].mean, one["images_per_second"]
        others = [(x["accuracy"].mean, x["images_per_second"]) for x in found]
        return not any(
            accuracy >= here[0] and speed >= here[1] and (accuracy, speed) != here
            for accuracy, speed in others
        )

    ranked = [Ranked(**one, is_best=is_best(one)) for one in found]
    ranked.sort(key=lambda one: -one.accuracy.mean)
    return RankResult(ranked, left_out)
