"""The workflow of `kt search`: what a person would try in half an hour.

Ways to make a classifier are tried in the order of what they promise for the time that
they take: first a base alone, then others, several as one, fine-tuning and so on. All
are judged out of fold, on the same training images. Then a run is made in the best way,
and test images are looked at.
"""

import functools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from keras_transfer.advice.effort import Effort
from keras_transfer.advice.space import Proposal, Way, proposals
from keras_transfer.config import Config
from keras_transfer.data.in_memory.forms import NOT_KEPT
from keras_transfer.errors import (
    KerasTransferError,
    UnusableImagesError,
    UsageError,
    first_line,
)
from keras_transfer.evaluation.names import FIELDS, label
from keras_transfer.events import Listener
from keras_transfer.markup import html_table
from keras_transfer.models.bases import BASES, get_base, parameters_of, weights_path
from keras_transfer.runs.files import write_atomic
from keras_transfer.runs.manifest import versions
from keras_transfer.runs.run import SEARCH, Run
from keras_transfer.workflows.finetune import run_finetuning
from keras_transfer.workflows.fit import extract_and_fit
from keras_transfer.workflows.inputs import Inputs
from keras_transfer.workflows.journal import Journal, Outcome
from keras_transfer.workflows.leaderboard import ListedRun, list_run
from keras_transfer.workflows.trials import TRIED_IMAGES, Prepared, Trials

MINUTES = 30.0
"""What a search may spend if nothing is said."""

_LEAST = 0.002
"""Gain that fine-tuning is taken to promise where it usually gains nothing."""

_BESIDES = 20.0
"""Seconds that a trial and the run take besides what grows with the images: building
models, comparing predictions and writing the report."""

_CHOSEN = (
    *("unfreeze", "learning_rate", "base_lr", "layer_decay", "augment", "mix"),
    *("augment_policy", "label_smoothing", "patience", "from_scratch_head", "force"),
)
"""Options of fine-tuning that a search chooses itself, or cannot try."""


@dataclass(frozen=True)
class Limits:
    """What a search may spend, and what its model may take.

    Attributes:
        minutes: Wall-clock time in minutes, the final run included; None for no limit
            with `trials`, or else for `MINUTES`.
        trials: Number of ways to try; None for no limit. Without `minutes` and
            `milliseconds`, nothing depends on the clock.
        megabytes: Size of the model's weights in units of 10^6 bytes; None for any.
        milliseconds: Time for one image on this machine; None for any.
    """

    minutes: float | None = None
    trials: int | None = None
    megabytes: float | None = None
    milliseconds: float | None = None

    def resolved(self) -> "Limits":
        """Fills in the default, and checks the others.

        Raises:
            UsageError: If nothing may be spent.
        """
        if self.minutes is None and self.trials is None:
            return replace(self, minutes=MINUTES)
        for name, value in (("budget", self.minutes), ("trials", self.trials)):
            if value is not None and value <= 0:
                raise UsageError(
                    f"A search needs something to spend. Received: {name}={value}. "
                    "Give more than 0."
                )
        return self

    def allow(self, way: Way) -> bool:
        """Whether the bases of a way alone are small enough."""
        least = 4 * parameters_of(way.base) / 1e6
        return self.megabytes is None or least <= self.megabytes

    def check(self, outcome: Outcome) -> Outcome:
        """Adds to an outcome which of the limits it exceeds, if any."""
        problem = outcome.problem
        if self.megabytes is not None and outcome.megabytes > self.megabytes:
            problem = f"{outcome.megabytes:.1f} MB are more than {self.megabytes:g}"
        if self.milliseconds is not None and outcome.milliseconds > self.milliseconds:
            problem = (
                f"{outcome.milliseconds:.1f} ms are more than {self.milliseconds:g}"
            )
        return replace(outcome, problem=problem)


@dataclass(frozen=True, repr=False)
class SearchResult:
    """The result of a search.

    Attributes:
        run: The run that was made in the best way.
        outcomes: What was tried, the best first.
    """

    run: Run
    outcomes: Sequence[Outcome]

    @functools.cached_property
    def front(self) -> list[Outcome]:
        """The Pareto front of the figure out of fold and the time of an image."""
        usable = [one for one in self.outcomes if not one.problem]
        return [
            one
            for one in usable
            if not any(
                (x.merit, -x.milliseconds) != (one.merit, -one.milliseconds)
                and x.merit >= one.merit
                and x.milliseconds <= one.milliseconds
                for x in usable
            )
        ]

    @property
    def listed(self) -> ListedRun:
        """The run's figures, of the metric that decided."""
        return list_run(self.run.run_dir, FIELDS[self.outcomes[0].metric])

    def to_json(self) -> dict[str, Any]:
        """Returns the run, its metrics and what was tried, as JSON types."""
        return {
            "run": str(self.run.run_dir),
            "phase": self.run.manifest.phase,
            "metrics": self.run.metrics,
            "outcomes": [
                {**one.to_json(), "pareto": one in self.front} for one in self.outcomes
            ],
        }

    def _repr_html_(self) -> str:
        """What notebooks show: the ways, the best first."""
        metric = label(self.outcomes[0].metric)
        header = ("way", f"{metric} out of fold", "seconds", "MB", "ms an image", "")
        rows = [
            (
                one.way,
                one.problem or one.figure,
                f"{one.seconds:,.1f}",
                f"{one.megabytes:,.1f}",
                f"{one.milliseconds:,.1f}",
                "none is both faster and better" if one in self.front else "",
            )
            for one in self.outcomes
        ]
        return html_table(f"Run: {self.run.run_dir}", header, rows)

    def __repr__(self) -> str:
        return f"SearchResult({self.run.run_dir}: {self.outcomes[0]})"


def search_best(
    inputs: Inputs,
    limits: Limits,
    bases: Sequence[str] | None,
    image_size: int | None,
    listener: Listener,
) -> SearchResult:
    """Implements `api.search`.

    Args:
        inputs: Checked inputs: the run that will be made, and what all ways share.
        limits: What may be spent.
        bases: Names of the bases to use; None for all whose weights are here.
        image_size: Side of the images in pixels; None for each base's own.
        listener: Receives notes, progress, epochs and artifacts.

    Raises:
        UsageError: If the budget is not positive, a config key is given that a search
            chooses, a base is unknown, or nothing fits the limits.
        KerasTransferError: If the data cannot be used.
    """
    limits = limits.resolved()
    _check_free(inputs.config)
    names = _usable_bases(bases, limits, inputs.config.weights)
    for warning in inputs.splits.warnings:
        listener.note(warning)
    search = _Search(inputs, limits, names, image_size, listener)
    try:
        search.spend()
    except KeyboardInterrupt:
        if search.best() is None:
            raise
        listener.note("interrupted: a run is made in the best way that was found")
    return search.finish()


def _check_free(config: Config) -> None:
    """Checks that nothing is given that a search chooses."""
    plain = Config(data=config.data)
    chosen: dict[str, tuple[object, object]] = {
        "base": (config.base, plain.base),
        "head.kind": (config.head.kind, plain.head.kind),
        "augment": (config.augment, plain.augment),
    }
    for key in _CHOSEN:
        values = getattr(config.finetune, key), getattr(plain.finetune, key)
        chosen[f"finetune.{key}"] = values
    for key, (value, default) in chosen.items():
        if value != default:
            hint = "Use bases" if key == "base" else "Leave it out"
            raise UsageError(
                f"A search chooses {key} itself. Received: {key}={value}. {hint}."
            )
    if config.export:
        raise UsageError(
            "A search makes a run only. Received: export=True. Export the run."
        )


def _usable_bases(
    bases: Sequence[str] | None, limits: Limits, weights: str
) -> list[str]:
    """Lists the bases to use, without those that are too large by themselves."""
    if bases is None:
        rows = [base for base in BASES if weights_path(base).is_file()]
    else:
        rows = list(dict.fromkeys(map(get_base, bases)))
    if not rows:
        raise UsageError(
            f"A search needs bases. Received: bases={bases or 'none that is here'}. "
            "Name some."
        )
    if weights not in ("imagenet", "none") and rows[1:]:
        raise UsageError(
            "A file holds the weights of one base. Received: "
            f"weights={weights} for {len(rows)} bases. Name one with bases."
        )
    found = [row.name for row in rows if limits.allow(Way(row.name))]
    if not found:
        least = min(rows, key=lambda row: row.parameters)
        raise UsageError(
            f"No base is as small. Received: max_size={limits.megabytes:g}, and the "
            f"smallest, {least.name}, has {4 * least.parameters / 1e6:.1f} MB. Allow "
            "more."
        )
    return found


class _Search:
    """A search in progress."""

    def __init__(
        self,
        inputs: Inputs,
        limits: Limits,
        bases: Sequence[str],
        image_size: int | None,
        listener: Listener,
    ):
        self._inputs, self._limits, self._listener = inputs, limits, listener
        self._bases, self._image_size = bases, image_size
        self._started, self._spent = time.perf_counter(), 0.0
        is_timed = limits.minutes is not None
        self._trials = Trials(
            inputs.config, inputs.splits, image_size, is_timed, listener
        )
        images = len(inputs.splits.train)
        others = len(inputs.splits.val) + len(inputs.splits.test)
        epochs, tried = inputs.config.finetune.epochs, min(images, TRIED_IMAGES)
        self._effort = Effort(images, others, tried, epochs, image_size)
        self._outcomes: list[Outcome] = []
        self._can_tune = True

    def best(self, alone: bool = False) -> Outcome | None:
        """Returns the best that was tried so far and may be used, if there is one.

        Args:
            alone: Whether to consider only heads on frozen bases.
        """
        usable = [one for one in self._outcomes if not one.problem]
        if alone:
            usable = [one for one in usable if one.way.tuning is None]
        return max(usable, key=lambda one: one.merit, default=None)

    def spend(self) -> None:
        """Tries one way after the other, until the budget is spent."""
        for outcome in self._journal.outcomes[: self._limits.trials]:
            self._spent += outcome.seconds
            self._add(outcome)
        while len(self._outcomes) != self._limits.trials:
            way = self._next()
            if way is None:
                return
            self._try(way)

    def finish(self) -> SearchResult:
        """Makes the run in the best way."""
        ranked = sorted(self._outcomes, key=lambda one: -one.merit)
        best = ranked[0]
        if best.problem:
            one = self._outcomes[0]
            raise UsageError(f"No way can be used. The first, {one.way}: {one.problem}")
        self._listener.note(f"the best way is {best.way}")
        inputs = self._inputs.with_config(self._trials.config(best.way))
        run = extract_and_fit(inputs, self._listener).run
        rows = [one.to_json() for one in ranked]
        write_atomic(run.run_dir / SEARCH, json.dumps(rows, indent=1))
        if best.trial is not None:
            self._fine_tune(run, best)
        self._journal.remove()
        return SearchResult(run, ranked)

    def _fine_tune(self, run: Run, best: Outcome) -> None:
        """Fine-tunes the run; without success it keeps the head alone."""
        given = self._inputs.in_memory
        in_memory = given if self._inputs.config.data in NOT_KEPT else None
        try:
            run_finetuning(run, {}, False, self._listener, in_memory, trial=best.trial)
        except (KerasTransferError, KeyboardInterrupt) as error:
            why = "it was interrupted, and resume=True goes on"
            if isinstance(error, KerasTransferError):
                why = first_line(error)
            if run.manifest.phase == "fit":
                self._listener.note(f"the run is not fine-tuned: {why}")

    @functools.cached_property
    def _first(self) -> Prepared:
        """The first base that can be used, with its features."""
        while True:
            way = Way(self._bases[0])
            try:
                return self._trials.prepare(way)
            except UnusableImagesError:
                raise
            except KerasTransferError as error:
                if len(self._bases) == 1:
                    raise
                self._listener.note(f"{way} is left out: {first_line(error)}")
                self._bases = self._bases[1:]

    @functools.cached_property
    def _journal(self) -> Journal:
        """What an interrupted search for the same on the same images left."""
        made, config = self._first, self._inputs.config
        shared = config.model_dump(
            mode="json", exclude={"overwrite", "reread", "name", "base", "image_size"}
        )
        shared |= {
            "image_size": self._image_size,
            "timed": self._limits.minutes is not None,
            "versions": versions(),
            "images": made.splits.fingerprint(made.features.extraction.digests),
        }
        return Journal(self._inputs.run.run_dir, shared)

    @functools.cached_property
    def _unit(self) -> float:
        """Seconds for a unit of effort, measured with the first base.

        Without a limit in minutes it is arbitrary: nothing may depend on the clock.
        """
        if self._limits.minutes is None:
            return 1.0
        way = Way(self._first.config.base)
        return 1 / (self._trials.speed(self._first) * self._effort.of_image(way))

    def _next(self) -> Way | None:
        """Returns what to try next; None if there is nothing, or no time."""
        best = self.best(alone=True)
        tried = [one.way for one in self._outcomes]
        if best is None:
            _ = self._first  # without bases that cannot be used
            ways = [Way(name) for name in self._bases]
            left = (way for way in ways if way not in tried)
            return next((x for x in left if not tried or self._is_affordable(x)), None)
        usual = (
            max(self._trials.usual_gain(best)[0], _LEAST) if self._can_tune else None
        )
        seed = self._inputs.config.seed
        found = [
            one
            for one in proposals(best.way, tried, self._bases, usual, seed)
            if self._limits.allow(one.way) and self._is_affordable(one.way)
        ]
        return max(found, key=self._promise).way if found else None

    def _try(self, way: Way) -> None:
        """Tries a way, and keeps the outcome if it can be tried."""
        self._listener.note(f"way {len(self._outcomes) + 1}: {way}")
        started = time.perf_counter()
        try:
            outcome = self._trials.head(way) if way.tuning is None else self._tuned(way)
        except UnusableImagesError:
            raise
        except KerasTransferError as error:
            # If the defaults fail, such as for want of time or disk, so will others.
            self._can_tune = self._can_tune and way.tuning != ()
            outcome = Outcome(way, self._trials.metric, problem=first_line(error))
        else:
            outcome = replace(outcome, seconds=time.perf_counter() - started)
            self._journal.add(outcome)
        self._add(outcome)

    def _add(self, outcome: Outcome) -> None:
        self._outcomes.append(self._limits.check(outcome))
        self._effort.add(outcome.way)
        total = self._limits.trials or 0
        self._listener.progress("search", len(self._outcomes), total)

    def _tuned(self, way: Way) -> Outcome:
        parent = next(one for one in self._outcomes if one.way == way.head_alone)
        best = self.best() or parent

        def is_too_little(most: float) -> bool:
            return parent.merit + most <= best.merit

        return self._trials.tuning(way, parent, self._left(), is_too_little)

    def _left(self) -> float:
        """Seconds that are left."""
        if self._limits.minutes is None:
            return math.inf
        elapsed = time.perf_counter() - self._started + self._spent
        return 60 * self._limits.minutes - elapsed

    def _promise(self, one: Proposal) -> float:
        return one.gain / self._effort.of_trial(one.way)

    def _is_affordable(self, way: Way) -> bool:
        """Whether there is time to try a way, and then to make a run in the best."""
        if self._limits.minutes is None:
            return True
        best = self.best() or Outcome(way, self._trials.metric)
        effort = self._effort.of_trial(way)
        effort += max(self._effort.of_run(best.way), self._effort.of_run(way))
        return self._unit * effort + _BESIDES < self._left()
