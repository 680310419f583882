"""Notifications that a workflow sends to listeners while it runs."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from keras_transfer.errors import ListenerError

Figures = Mapping[str, Mapping[str, Any]]
"""The fields of `metrics.Evaluation` by the name of a split, such as `test`."""


class Listener:
    """Receives a workflow's events. Subclass it and override the methods you need.

    Every method of this class does nothing. An exception raised by an override ends
    the workflow, except `ListenerError`: the listener is then left out from there on,
    and the message becomes a note.
    """

    def started(self, phase: str, run_dir: Path, parameters: Mapping[str, Any]) -> None:
        """Called once before training, when everything that can be checked was.

        Args:
            phase: `fit` or `finetune`.
            run_dir: The run's directory, which may not exist yet. If another process
                takes it, `finished` has another one.
            parameters: Config keys with their values as JSON types; sections are dicts.
        """

    def note(self, text: str) -> None:
        """Called when a decision was made or something in the data looks doubtful.

        Args:
            text: One line of human-readable text.
        """

    def progress(self, step: str, done: int, total: int) -> None:
        """Called while a step makes progress.

        Args:
            step: `features`, `copies`, `head`, `folds`, `trial`, `training`,
                `evaluate`, `predict`, `report`, or the name of the base being measured.
            done: Number of images, L2 strengths, folds, batches or steps done so far.
            total: Number of them in all; 0 if unknown.
        """

    def epoch(self, phase: str, number: int, figures: Mapping[str, float]) -> None:
        """Called at the end of an epoch; for the head, once per L2 strength.

        When a training is resumed, it is called for the earlier epochs too, first.

        Args:
            phase: `fit` or `finetune`.
            number: Number of the epoch, starting at 1; for the head, the number of
                iterations or epochs that it took with this L2 strength.
            figures: The epoch's row of `history.csv`. Of `fit`: `l2`, and `loss` and
                `val_loss` in nats. Of `finetune`: `loss` in nats; `accuracy` from 0 to
                1, unless the data are multi-label; with `patience`, `val_loss`;
                `learning_rate`, that of the head at the end of the epoch; `seconds`;
                `images_per_second`. Loss and accuracy are means over the training
                images, each with the weights before its step.
        """

    def artifact(self, path: Path, kind: str) -> None:
        """Called when a permanent file or directory was written.

        Args:
            path: The file or directory.
            kind: `run`, `report`, `savedmodel`, `chart`, `audit` (its table or page),
                `table` (a cleaned one), or the format of an exported model.
        """

    def finished(self, phase: str, run_dir: Path, figures: Figures) -> None:
        """Called last, when the run is complete on disk.

        Args:
            phase: `fit` or `finetune`.
            run_dir: The run's directory.
            figures: Metrics of the new model.
        """

    def failed(self, phase: str, error: BaseException) -> None:
        """Called instead of `finished` if an exception ended the workflow.

        Args:
            phase: `fit` or `finetune`.
            error: The exception, such as a `KeyboardInterrupt`.
        """


SILENT = Listener()
"""A listener that ignores everything."""


class Broadcast(Listener):
    """Forwards every event to several listeners, in order.

    Attributes:
        notes: All notes received so far.
    """

    def __init__(self, listeners: Iterable[Listener]):
        self._listeners = list(listeners)
        self.notes: list[str] = []

    def started(self, phase: str, run_dir: Path, parameters: Mapping[str, Any]) -> None:
        """Forwards the start."""
        self._send("started", phase, run_dir, parameters)

    def note(self, text: str) -> None:
        """Forwards a note and records it in `notes`."""
        self.notes.append(text)
        self._send("note", text)

    def progress(self, step: str, done: int, total: int) -> None:
        """Forwards progress."""
        self._send("progress", step, done, total)

    def epoch(self, phase: str, number: int, figures: Mapping[str, float]) -> None:
        """Forwards the end of an epoch."""
        self._send("epoch", phase, number, figures)

    def artifact(self, path: Path, kind: str) -> None:
        """Forwards an artifact."""
        self._send("artifact", path, kind)

    def finished(self, phase: str, run_dir: Path, figures: Figures) -> None:
        """Forwards the end."""
        self._send("finished", phase, run_dir, figures)

    def failed(self, phase: str, error: BaseException) -> None:
        """Forwards a failure."""
        self._send("failed", phase, error)

    def _send(self, event: str, *values: Any) -> None:
        """Calls a method of every listener, and leaves out those that cannot go on."""
        lost = []
        for listener in [*self._listeners]:
            try:
                getattr(listener, event)(*values)
            except ListenerError as error:
                self._listeners.remove(listener)
                lost.append(str(error))
        for reason in lost:
            self.note(reason)


@contextlib.contextmanager
def announcing(
    listener: Listener, phase: str, run_dir: Path, parameters: Mapping[str, Any]
) -> Iterator[None]:
    """Tells a listener that training starts, and whether an exception ends the block.

    Args:
        listener: The listener. It is for the block to tell it that it has `finished`.
        phase: `fit` or `finetune`.
        run_dir: The run's directory.
        parameters: Config keys with their values.
    """
    try:
        listener.started(phase, run_dir, parameters)
        yield
    except BaseException as error:
        listener.failed(phase, error)
        raise


def duration(seconds: float) -> str:
    """Formats seconds as text; from two minutes on, in minutes."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"
