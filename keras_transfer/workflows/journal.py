"""What a search has found so far, on disk, so that it can go on after it was killed."""

import contextlib
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from keras_transfer.advice.evidence import Trial
from keras_transfer.advice.space import Way
from keras_transfer.evaluation.names import label
from keras_transfer.runs.files import write_atomic


@dataclass(frozen=True)
class Outcome:
    """What a way to make a classifier was found to be worth.

    Attributes:
        way: The way.
        metric: Name of the metric that decides.
        value: The metric out of fold. With fine-tuning, that of the head alone and what
            fine-tuning is expected to add to it.
        low: Lower end of the 95% interval of the value; None if it has none.
        high: Upper end.
        seconds: Time that trying it took.
        head_seconds: Time that training the head took.
        megabytes: Size of the weights in units of 10^6 bytes.
        milliseconds: Time that one image takes on this machine.
        trial: What fine-tuning gained in folds; None without fine-tuning.
        problem: Why the way cannot be used, or was given up; "" if it can.
    """

    way: Way
    metric: str
    value: float = 0.0
    low: float | None = None
    high: float | None = None
    seconds: float = 0.0
    head_seconds: float = 0.0
    megabytes: float = 0.0
    milliseconds: float = 0.0
    trial: Trial | None = None
    problem: str = ""

    @property
    def sign(self) -> int:
        """-1 if a smaller value is better, 1 if a larger one is."""
        return -1 if self.metric == "log_loss" else 1

    @property
    def merit(self) -> float:
        """The value, turned so that more is better; minus infinity with a problem."""
        return -math.inf if self.problem else self.sign * self.value

    @property
    def figure(self) -> str:
        """The value with its interval, such as `0.954 (0.908 to 0.978)`."""
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"

    def __str__(self) -> str:
        figure = f"{label(self.metric)} {self.figure} out of fold"
        return f"{self.way}: {self.problem or figure}"

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes as JSON types, the way as text and as options."""
        found: dict[str, Any] = _OUTCOME.dump_python(self, mode="json")
        return {**found, "way": str(self.way), "options": self.way.options()}


@dataclass
class _Content:
    key: str
    outcomes: list[Outcome]


_OUTCOME = TypeAdapter(Outcome)
_CONTENT = TypeAdapter(_Content)


class Journal:
    """The outcomes of a search that is not finished, beside the run that it will make.

    It is read again only by a search for the same on the same images.
    """

    def __init__(self, run_dir: Path, shared: Mapping[str, Any]):
        """Finds what an interrupted search left.

        Args:
            run_dir: The run that the search will make.
            shared: What outcomes depend on besides their ways.
        """
        self._path = run_dir.with_name(f"{run_dir.name}.search.json")
        key = hashlib.sha256(repr(sorted(shared.items())).encode()).hexdigest()
        self._content = _Content(key, [])
        with contextlib.suppress(OSError, ValidationError):
            content = _CONTENT.validate_json(self._path.read_bytes())
            if content.key == key:
                self._content = content

    @property
    def outcomes(self) -> list[Outcome]:
        """What was tried, in that order."""
        return list(self._content.outcomes)

    def add(self, outcome: Outcome) -> None:
        """Adds an outcome and writes all of them."""
        self._content.outcomes.append(outcome)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, _CONTENT.dump_json(self._content, indent=1))

    def remove(self) -> None:
        """Removes the file, when the search is finished."""
        self._path.unlink(missing_ok=True)
