"""What a search tries: ways to make a classifier, and what each promises.

Ways are tried in the order of what they usually gain for the effort that they take.
Both are rough means over data sets, from tests/benchmarks/RESULTS.md; only the order of
their ratios matters.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from keras_transfer.config import HeadKind
from keras_transfer.models.bases import get_base

FURTHER = (0.02, 0.007)
"""Usual gains of the features of a second base, and of a third one."""

ALONE = 0.005
"""Usual gain of another base that is as accurate on ImageNet: it may fit better."""

ON_IMAGENET = 0.3
"""Share of a difference in accuracy on ImageNet that is found elsewhere."""

HIDDEN = 0.003
"""Usual gain of a head with a hidden layer."""

VIEWS = 0.006
"""Usual gain of augmented views for a head."""

MOST_BASES = 3
"""Bases that are used as one, at most."""


@dataclass(frozen=True)
class Way:
    """A way to make a classifier.

    Attributes:
        base: Name of the base, or of several, joined by `+`.
        head: Kind of head.
        augment: Number of augmented views per training image.
        tuning: Options of fine-tuning that differ from their defaults; None if only
            the head is trained.
    """

    base: str
    head: HeadKind = "linear"
    augment: int = 0
    tuning: tuple[tuple[str, Any], ...] | None = None

    @property
    def head_alone(self) -> "Way":
        """The same way without fine-tuning."""
        return replace(self, tuning=None)

    def options(self) -> dict[str, Any]:
        """Returns the config keys that make a classifier in this way."""
        found = {"base": self.base, "head.kind": self.head, "augment": self.augment}
        return found | {f"finetune.{name}": value for name, value in self.tuning or ()}

    def __str__(self) -> str:
        parts = [self.base]
        if self.head != "linear":
            parts.append(f"{self.head} head")
        if self.augment:
            parts.append(f"{self.augment} views")
        if self.tuning is not None:
            listed = ", ".join(f"{name}={value}" for name, value in self.tuning)
            parts.append(f"fine-tuned {listed}".rstrip())
        return ", ".join(parts)


@dataclass(frozen=True)
class Proposal:
    """A way to try next.

    Attributes:
        way: The way.
        gain: What it usually gains over the best so far, in parts of 1.
    """

    way: Way
    gain: float


def proposals(
    best: Way,
    tried: Sequence[Way],
    bases: Sequence[str],
    tuned: float | None,
    seed: int,
) -> list[Proposal]:
    """Proposes ways that may be better than the best one.

    Args:
        best: The best way with a head alone.
        tried: All ways that were tried.
        bases: Names of the bases that may be used.
        tuned: Usual gain of fine-tuning on such data; None if it is not possible.
            Further attempts are taken to gain the same divided by twice the number of
            attempts so far.
        seed: Seed of the options of fine-tuning.
    """
    found = [*_with_bases(best, bases)]
    if best.head == "linear":
        found.append(Proposal(replace(best, head="mlp"), HIDDEN))
    if not best.augment:
        found.append(Proposal(replace(best, augment=2), VIEWS))
    if tuned is not None:
        attempts = [way for way in tried if way.tuning is not None]
        options = _tunings(seed)
        gain = tuned / max(2 * len(attempts), 1)
        for tuning in [next(options) for _ in range(len(attempts) + 1)]:
            found.append(Proposal(replace(best, tuning=tuning), gain))
    return [one for one in found if one.way not in tried]


def _with_bases(best: Way, bases: Sequence[str]) -> Iterator[Proposal]:
    """Yields the best way with other bases, and with further ones."""
    used = best.base.split("+")
    most = max(_on_imagenet(name) for name in used)
    for name in bases:
        if name in used:
            continue
        more = ON_IMAGENET * (_on_imagenet(name) - most)
        yield Proposal(replace(best, base=name), ALONE + more)
        if len(used) < MOST_BASES:
            joined = "+".join([*used, name])
            gain = FURTHER[min(len(used), len(FURTHER)) - 1]
            yield Proposal(replace(best, base=joined), gain + more / 2)


def _on_imagenet(name: str) -> float:
    """Returns a base's accuracy on ImageNet, from 0 to 1; a guess without a figure."""
    accuracy = get_base(name).accuracy
    return accuracy.top_1 / 100 if accuracy else 0.7


def _tunings(seed: int) -> Iterator[tuple[tuple[str, Any], ...]]:
    """Yields options of fine-tuning: the defaults, then random ones, without end."""
    yield ()
    rng = np.random.default_rng(seed)
    while True:
        drawn: Mapping[str, Any] = {
            "unfreeze": str(rng.choice(["top", "stages:2"])),
            "learning_rate": float(f"{10 ** rng.uniform(-3.5, -2.5):.1g}"),
            "layer_decay": float(rng.choice([0.1, 0.3, 1.0])),
            "augment": int(rng.choice([0, 2])),
            "label_smoothing": float(rng.choice([0.0, 0.1])),
        }
        yield tuple(drawn.items())
