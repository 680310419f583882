"""Notifications that a workflow sends to listeners while it runs."""

from collections.abc import Iterable, Mapping
from pathlib import Path


class Listener:
    """Receives a workflow's events. Subclass it and override the methods you need.

    Every method of this class does nothing. An exception raised by an override ends
    the workflow.
    """

    def note(self, text: str) -> None:
        """Called when a decision was made or something in the data looks doubtful.

        Args:
            text: One line of human-readable text.
        """

    def progress(self, step: str, done: int, total: int) -> None:
        """Called while a step makes progress.

        Args:
            step: `features`, `head`, `folds`, `training`, `evaluate`, `predict`, or
                the name of the base being measured.
            done: Number of images, L2 strengths, folds or batches processed so far.
            total: Number of them in all; 0 if unknown.
        """

    def epoch(self, phase: str, number: int, figures: Mapping[str, float]) -> None:
        """Called at the end of an epoch.

        Args:
            phase: `fit` or `finetune`.
            number: Number of the epoch, starting at 1.
            figures: The epoch's row of `history.csv`, such as `loss` and `val_loss`
                in nats.
        """

    def artifact(self, path: Path, kind: str) -> None:
        """Called when a permanent file or directory was written.

        Args:
            path: The file or directory.
            kind: `run`, `savedmodel`, `chart`, or the format of an exported model.
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

    def note(self, text: str) -> None:
        """Forwards a note and records it in `notes`."""
        self.notes.append(text)
        for listener in self._listeners:
            listener.note(text)

    def progress(self, step: str, done: int, total: int) -> None:
        """Forwards progress."""
        for listener in self._listeners:
            listener.progress(step, done, total)

    def epoch(self, phase: str, number: int, figures: Mapping[str, float]) -> None:
        """Forwards the end of an epoch."""
        for listener in self._listeners:
            listener.epoch(phase, number, figures)

    def artifact(self, path: Path, kind: str) -> None:
        """Forwards an artifact."""
        for listener in self._listeners:
            listener.artifact(path, kind)


def duration(seconds: float) -> str:
    """Formats seconds as text; from two minutes on, in minutes."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"
