"""What `kt` prints on: streams, progress, and lines without noise from libraries."""

import contextlib
import functools
import io
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from keras_transfer.errors import KerasTransferError
from keras_transfer.events import SILENT, Listener, duration
from keras_transfer.markup import printable
from keras_transfer.runs.files import replacing


class _Console(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


# For piped output rich would assume 80 columns and wrap lines there.
console = _Console(
    markup=False,
    highlight=False,
    emoji=False,
    width=None if sys.stdout.isatty() else 200,
)
messages = _Console(stderr=True, width=None if sys.stderr.isatty() else 200)


_EXACT = sys.getfilesystemencodeerrors()  # keeps names that are not valid text

_QUIET_SECONDS = 10.0  # between progress lines when there are no progress bars


@contextlib.contextmanager
def listening() -> Iterator[Listener]:
    """Yields a listener that shows notes, epochs and progress on stderr.

    Progress is shown as bars on a terminal and as occasional lines elsewhere. Stdout is
    reserved for results, so anything that libraries print in the meantime, such as
    download progress, is redirected to stderr.
    """
    with contextlib.redirect_stdout(sys.stderr):
        shown = _Shown()
        if not messages.is_terminal:
            yield shown
            return
        with Live(console=messages, get_renderable=shown.render, refresh_per_second=5):
            try:
                yield shown
            finally:
                shown.is_over = True


class _Shown(Listener):
    """Shows the events of a workflow.

    Attributes:
        is_over: Whether no more events come, so that all epochs are shown for good.
    """

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description:>10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bars = Progress(*columns, console=messages)
        self._tasks: dict[str, TaskID] = {}
        self._last_line = time.monotonic()
        self._rows: list[Mapping[str, str]] = []
        self._done = 0.0  # share of all training steps
        self._rate = 0.0  # at the end of the epoch before
        self.is_over = False

    def render(self) -> Group:
        """Returns the table of epochs, the last ones that fit, above the bars."""
        most = max(messages.height - len(self._tasks) - 4, 1)
        rows = self._rows if self.is_over else self._rows[-most:]
        return Group(*([_epoch_table(rows)] if rows else []), self._bars)

    def note(self, text: str) -> None:
        show_note(text)
        self._last_line = time.monotonic()

    def progress(self, step: str, done: int, total: int) -> None:
        if step == "training" and total:
            self._done = done / total
        if messages.is_terminal:
            if step not in self._tasks:
                self._tasks[step] = self._bars.add_task(step)
            self._bars.update(self._tasks[step], completed=done, total=total or None)
        elif done and time.monotonic() - self._last_line > _QUIET_SECONDS:
            self.note(
                f"{step}: {done:,} of {total:,}" if total else f"{step}: {done:,}"
            )

    def epoch(self, phase: str, number: int, figures: Mapping[str, float]) -> None:
        if phase != "finetune":
            return
        if (end := figures.get("learning_rate")) is not None:
            # It ends at 0, as if the last epoch had learned nothing.
            figures = {**figures, "learning_rate": max(self._rate, end)}
            self._rate = end
        row = {
            label: form(figures[name])
            for name, label, form in _EPOCH
            if name in figures
        }
        if self._done:  # it is not when the epochs before --resume are told
            seconds = figures["seconds"] * number * (1 / self._done - 1)
            row["time left"] = duration(seconds)
        self._rows.append({"epoch": str(number), **row})
        if not messages.is_terminal:
            cells = ", ".join(f"{name} {cell}" for name, cell in row.items())
            self.note(f"epoch {number}: {cells}")


def _nats(value: float) -> str:
    return f"{value:.4f}" if value >= 0.01 else f"{value:.2g}"


_EPOCH: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss", "loss", _nats),
    ("accuracy", "training accuracy", "{:.4f}".format),
    ("val_loss", "val loss", _nats),
    ("learning_rate", "highest rate", "{:.1e}".format),
    ("images_per_second", "img/s", "{:,.0f}".format),
    ("seconds", "time", duration),
)
"""Figures of an epoch in the order in which they are shown: name, label, format.

The rate is the larger one of those at both ends of the epoch."""


def _epoch_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Returns a table of epochs, with a column for each label that occurs."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(row.get(name, "") for name in names))
    return table


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Suppresses what C++ libraries write to stderr.

    It is shown only if the block fails with an unexpected error.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as noise:
        kept = os.dup(2)
        os.dup2(noise.fileno(), 2)
        try:
            yield
        except (KerasTransferError, KeyboardInterrupt):
            raise
        except BaseException:
            os.dup2(kept, 2)
            noise.seek(0)
            _show_lines(noise.read().decode(errors="replace"))
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def import_tensorflow() -> None:
    """Imports TensorFlow without its start-up messages."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    with quiet_stderr():
        import tensorflow  # noqa: F401


@contextlib.contextmanager
def writing_rows(
    output: Path | None,
) -> Iterator[tuple[Callable[[str], object], Listener]]:
    """Yields a function that writes a line of results, and a listener for progress.

    Args:
        output: File to write, which is replaced when the block succeeds; None for
            stdout. If that is a terminal, the lines themselves are the progress.
    """
    if output:
        # A link stays one; what it names is replaced.
        with replacing(output.resolve()) as file, listening() as listener:
            yield lambda line: file.write(f"{line}\n".encode(errors=_EXACT)), listener
    elif sys.stdout.isatty():
        yield write_line, SILENT
    else:
        write = functools.partial(write_line, to=sys.stdout)
        with listening() as listener:  # which redirects stdout
            yield write, listener


def write_line(line: object, to: TextIO | None = None) -> None:
    """Writes a line of results: exact for a file or pipe, escaped on a terminal.

    Exact output is UTF-8 regardless of the locale, except for file names that are not
    valid text, which are written byte for byte.

    Args:
        line: The line.
        to: The stream; None for stdout.
    """
    text, stream = str(line), to or sys.stdout
    if stream.isatty():
        text = printable(text)
    elif isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding="utf-8", errors=_EXACT)
    print(text, file=stream, flush=True)


def show_line(text: str) -> None:
    """Writes a line to stderr, with unprintable characters escaped."""
    print(printable(text), file=sys.stderr)


def show_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Prints a traceback; installed as `sys.excepthook` by --debug."""
    _show_lines("".join(traceback.format_exception(kind, error, trace)))


def _show_lines(text: str) -> None:
    for line in filter(None, text.split("\n")):
        show_line(line)


def show_note(text: str) -> None:
    """Shows a note on stderr, in one line unless that is a terminal."""
    messages.print(
        f"- {text}",
        style="dim",
        markup=False,
        highlight=False,
        soft_wrap=not messages.is_terminal,
    )
