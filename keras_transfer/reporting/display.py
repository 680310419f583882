"""What a workflow tells without listeners: notes in a log, progress in notebooks."""

import logging
import sys
import time
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from keras_transfer.events import Broadcast, Figures, Listener
from keras_transfer.markup import escaped, html_table

_SECONDS = 0.2  # between two updates, which travel to a browser
_MOST_NOTES = 50
_LOGGER = logging.getLogger("keras_transfer")
_SHELL = "ZMQInteractiveShell"  # of Jupyter's kernels; in a terminal it is another


def told(listeners: Iterable[Listener]) -> Broadcast:
    """Returns what a workflow tells.

    Without listeners, a notebook shows notes and progress, and elsewhere notes go to
    the logger `keras_transfer`. Pass `Listener()`, which ignores everything, for
    silence.
    """
    usual = NotebookListener if in_notebook() else LoggingListener
    return Broadcast(list(listeners) or [usual()])


def in_notebook() -> bool:
    """Returns whether the code runs in a notebook's kernel; imports nothing."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module else None
    return type(shell).__name__ == _SHELL


class LoggingListener(Listener):
    """Logs notes as warnings, which Python shows on stderr unless told otherwise."""

    def note(self, text: str) -> None:
        """Logs a note."""
        _LOGGER.warning(text)


class NotebookListener(Listener):
    """Shows notes, progress and epochs below the cell that is running."""

    def __init__(self) -> None:
        self._notes: list[str] = []
        self._steps: dict[str, tuple[int, int]] = {}
        self._epochs: list[Mapping[str, float]] = []
        self._handle: Any = None
        self._last = 0.0

    def note(self, text: str) -> None:
        """Shows a note as a line."""
        self._notes.append(text)
        self._show()

    def progress(self, step: str, done: int, total: int) -> None:
        """Moves the bar of a step."""
        is_new = step not in self._steps
        if is_new:
            self._drop_unfinished()
        self._steps[step] = done, total
        if is_new or done == total or time.monotonic() - self._last >= _SECONDS:
            self._show()

    def epoch(self, phase: str, number: int, figures: Mapping[str, float]) -> None:
        """Adds a row to the table of epochs."""
        if phase == "finetune":
            self._epochs.append(figures)
            self._show()

    def finished(self, phase: str, run_dir: Path, figures: Figures) -> None:
        """Takes away the bars of steps that ended early."""
        self._end()

    def failed(self, phase: str, error: BaseException) -> None:
        """Takes away the bars that will not move any more."""
        self._end()

    def _end(self) -> None:
        self._drop_unfinished()
        if self._handle is not None:
            self._show()

    def _drop_unfinished(self) -> None:
        """Forgets the steps before that did not need all that they had announced."""
        self._steps = {x: done for x, done in self._steps.items() if done[0] == done[1]}

    def _show(self) -> None:
        """Shows the current state, in the output that is there already."""
        display = import_module("IPython.display")
        page = display.HTML(self._html())
        if self._handle is None:
            self._handle = display.display(page, display_id=True)
        else:
            self._handle.update(page)
        self._last = time.monotonic()

    def _html(self) -> str:
        lines = [f"<div>- {escaped(x)}</div>" for x in self._notes[-_MOST_NOTES:]]
        lines += [_bar(step, *done) for step, done in self._steps.items()]
        if self._epochs:
            names = list(self._epochs[0])
            rows = [[f"{row.get(x, 0):.4g}" for x in names] for row in self._epochs]
            header = [name.replace("_", " ") for name in names]
            lines.append(
                html_table("Fine-tuning, the last epoch first", header, rows[::-1])
            )
        return "".join(lines)


def _bar(step: str, done: int, total: int) -> str:
    """Formats the bar of a step; without a total it has no end."""
    of = f" of {total:,}" if total else ""
    ends = f" value='{done}' max='{total}'" if total else ""
    label = escaped(step)
    return (
        f"<div><progress aria-label='{label}'{ends}></progress> "
        f"{label}: {done:,}{of}</div>"
    )
