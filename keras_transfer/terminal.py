"""The output of `kt`: progress bars and tables, without noise from libraries."""

import contextlib
import io
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
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

from keras_transfer.advice.rules import METHODS
from keras_transfer.errors import KerasTransferError
from keras_transfer.events import Listener, duration
from keras_transfer.models.bases import BASES, weights_path

if TYPE_CHECKING:
    from keras_transfer.advice.ranking import RankResult
    from keras_transfer.evaluation.metrics import Evaluation
    from keras_transfer.workflows.advise import Recommendation
    from keras_transfer.workflows.finetune import FinetuneResult
    from keras_transfer.workflows.fit import FitResult


_MOST_CLASSES = 30

# Control characters (which terminals obey), line separators, bidirectional controls,
# and surrogates (which stand for bytes that are not valid text).
_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Escapes characters that are not printable the way Python does, as in `\x1b`.

    File and class names are untrusted, so all text shown to people passes through here.
    """
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


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


_QUIET_SECONDS = 10.0  # between progress lines when there are no progress bars


@contextlib.contextmanager
def listening() -> Iterator[Listener]:
    """Yields a listener that shows notes, epochs and progress on stderr.

    Progress is shown as bars on a terminal and as occasional lines elsewhere. Stdout is
    reserved for results, so anything that libraries print in the meantime, such as
    download progress, is redirected to stderr.
    """
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with (
        contextlib.redirect_stdout(sys.stderr),
        Progress(*columns, console=messages, disable=not messages.is_terminal) as bars,
    ):
        yield _Shown(bars)


class _Shown(Listener):
    """Shows the events of a workflow."""

    def __init__(self, bars: Progress):
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._last_line = time.monotonic()

    def note(self, text: str) -> None:
        show_note(text)
        self._last_line = time.monotonic()

    def progress(self, step: str, done: int, total: int) -> None:
        if messages.is_terminal:
            if step not in self._tasks:
                self._tasks[step] = self._bars.add_task(step)
            self._bars.update(self._tasks[step], completed=done, total=total or None)
        elif time.monotonic() - self._last_line > _QUIET_SECONDS:
            self.note(
                f"{step}: {done:,} of {total:,}" if total else f"{step}: {done:,}"
            )

    def epoch(self, phase: str, number: int, figures: Mapping[str, float]) -> None:
        if phase == "finetune":
            shown = ", ".join(
                f"{name.replace('_', ' ')} {figures[name]:.4f}"
                for name in ("loss", "val_loss", "val_metric")
                if name in figures
            )
            self.note(f"epoch {number}: {shown}, {duration(figures['seconds'])}")


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


def write_line(line: object) -> None:
    """Writes a line to stdout: exact for a file or pipe, escaped on a terminal.

    Exact output is UTF-8 regardless of the locale, except for file names that are not
    valid text, which are written byte for byte.
    """
    text = str(line)
    if sys.stdout.isatty():
        text = printable(text)
    elif isinstance(sys.stdout, io.TextIOWrapper):
        errors = sys.getfilesystemencodeerrors()
        sys.stdout.reconfigure(encoding="utf-8", errors=errors)
    print(text, flush=True)


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


def show_run(result: "FitResult") -> None:
    """Shows the result of `kt fit`; its notes were shown as they were made."""
    run, found, folds = result.run, result.evaluations, result.cross_validation
    manifest = run.manifest
    if folds:
        console.print(f"cross-validation, {len(folds.values)} folds: {folds}")
    name = "test" if "test" in found else "val"
    if name in found:
        show_evaluation(found[name], name)
    if manifest.skipped:
        console.print(
            f"- {manifest.skipped} images were left out: {run.run_dir / 'skipped.csv'}",
        )
    seconds = manifest.timings
    console.print(
        f"Time: features {seconds['features']:.1f} s (waited "
        f"{seconds['decode']:.1f} s for {manifest.images_decoded:,} images, "
        f"{seconds['forward']:.1f} s for the base), head {seconds['head']:.1f} s, "
        f"model {seconds['model']:.1f} s, total {seconds['total']:.1f} s.",
    )
    if run.name != run.config.name:
        console.print(
            f"- Another process took or changed {run.config.name} meanwhile, which "
            f"stays as it is; this run is {run.name}"
        )
    console.print(f"Run: {run.run_dir}")
    console.print(
        f"Next: kt predict {run.run_dir} IMAGE..., or kt unfreeze-and-finetune "
        f"{run.run_dir}"
    )


def show_note(text: str) -> None:
    """Shows a note on stderr."""
    messages.print(f"- {text}", style="dim", markup=False, highlight=False)


def show_finetuning(result: "FinetuneResult") -> None:
    """Shows the result of `kt unfreeze-and-finetune`, one row per phase."""
    run, report = result.run, result.report
    metrics = {name: one.model_dump() for name, one in result.evaluations.items()}
    phase, phases = run.manifest.phase, run.metrics
    if phase == "finetune" and not report.kept:  # the run keeps an earlier model
        phases["not kept"] = metrics
    table = Table(box=None, pad_edge=False)
    table.add_column("phase")
    splits = [name for name in metrics if all(name in x for x in phases.values())]
    for split in splits:
        table.add_column(f"{split} {report.metric.replace('_', ' ')}", justify="right")
        table.add_column(f"{split} log loss", justify="right")
    table.add_column("")
    for name, figures in phases.items():
        cells = [
            f"{figures[split][key]:.4f}"
            for split in splits
            for key in (report.metric, "log_loss")
        ]
        mark = "<- the run's model" if name == phase else ""
        table.add_row(name, *cells, mark)
    console.print(table)
    groups = ", ".join(f"{name} {rate:.1e}" for name, rate in report.groups.items())
    console.print(
        f"Trained {report.trained_parameters:,} parameters ({groups}) for "
        f"{report.epochs} epochs, best after {report.best_epoch}; alpha "
        f"{report.alpha:g}, {report.precision}, "
        f"{report.images_per_second:,.0f} images/s.",
    )
    seconds = report.timings
    console.print(
        f"Time: features {seconds['features']:.1f} s, training "
        f"{seconds['training']:.1f} s, comparison {seconds['comparison']:.1f} s, total "
        f"{seconds['total']:.1f} s.",
    )
    console.print(f"Run: {run.run_dir}")
    console.print(
        f"Next: kt predict {run.run_dir} IMAGE..., or kt export {run.run_dir}"
    )


def show_evaluation(found: "Evaluation", of: str) -> None:
    """Shows a table of metrics and a table of classes.

    Args:
        found: The metrics.
        of: Name of the images, such as `test`.
    """
    evaluation = found.model_dump()
    console.print(f"{evaluation['images']:,} {of} images")
    figures = Table(box=None, show_header=False, pad_edge=False)
    for key in ("accuracy", "balanced_accuracy", "macro_f1", "log_loss"):
        figures.add_row(key.replace("_", " "), f"{evaluation[key]:.4f}")
    if evaluation["mean_average_precision"] is not None:
        value = evaluation["mean_average_precision"]
        figures.add_row("mean average precision", f"{value:.4f}")
    console.print(figures)
    table = Table(box=None, pad_edge=False)
    table.add_column("class")
    for column in ("precision", "recall", "F1", "images"):
        table.add_column(column, justify="right")
    classes = evaluation["classes"]
    worst = sorted(classes, key=lambda name: classes[name]["f1"])[:_MOST_CLASSES]
    for name in (name for name in classes if name in set(worst)):
        row = classes[name]
        table.add_row(
            name,
            *(f"{row[key]:.3f}" for key in ("precision", "recall", "f1")),
            f"{row['support']:,}",
        )
    console.print(table)
    if len(classes) > len(worst):
        console.print(f"(the {len(worst)} worst of {len(classes)} classes)")


def show_recommendation(found: "Recommendation") -> None:
    """Shows the result of `kt advise`; the last line is the command to run."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for one in found.advice:
        numbers = ", ".join(
            f"{key} {value:,.4g}" if value < 1000 else f"{key} {value:,.0f}"
            for key, value in one.evidence.items()
            if value is not None
        )
        table.add_row(one.rule, one.message)
        table.add_row("", numbers, style="dim")
    console.print(table)
    console.print(f"Recommended: {METHODS[found.method]}")
    console.print(found.command, soft_wrap=True)


def show_ranking(result: "RankResult") -> None:
    """Shows the result of `kt rank`, with the Pareto front marked."""
    ranked, left_out = result.ranked, result.left_out
    table = Table(box=None, pad_edge=False)
    table.add_column("base", no_wrap=True)
    for column in ("accuracy (95% interval)", "LogME", "img/s", "parameters", "MB"):
        table.add_column(column, justify="right")
    table.add_column("")
    for one in ranked:
        table.add_row(
            one.base,
            str(one.accuracy),
            f"{one.logme:.4f}",
            f"{one.images_per_second:,.0f}",
            f"{one.parameters:,}",
            f"{one.megabytes:,.1f}",
            "<- none is both faster and better" if one.is_best else "",
        )
    console.print(table)
    for reason in dict.fromkeys(left_out.values()):
        names = ", ".join(name for name in left_out if left_out[name] == reason)
        console.print(f"Left out: {names}: {reason}")


def show_bases() -> None:
    """Shows the table of bases."""
    table = Table(box=None, pad_edge=False)
    table.add_column("base", no_wrap=True)
    table.add_column("parameters", justify="right")
    table.add_column("image size", justify="right")
    table.add_column("input scaling")
    table.add_column("ImageNet weights")
    for base in BASES:
        if weights_path(base).is_file():
            where = "here"
        elif base.weights_package:
            where = "package not installed"
        else:
            where = "to download"
        table.add_row(
            base.name,
            f"{base.parameters:,}",
            str(base.image_size),
            base.scaling.name,
            where,
        )
    console.print(table)


def show_cache(tables: list[dict[str, Any]]) -> None:
    """Shows the tables of cached features."""
    table = Table(box=None, pad_edge=False)
    for column in ("base", "split point", "image size", "precision", "view"):
        table.add_column(column, no_wrap=True)
    for column in ("images", "MB", "days unused"):
        table.add_column(column, justify="right")
    for row in tables:
        table.add_row(
            row["base"],
            row["split_point"],
            str(row["image_size"]),
            row["precision"],
            str(row["view"]),
            f"{row['images']:,}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['days_unused']:.1f}",
        )
    console.print(table)
