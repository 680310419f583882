"""The output of `kt`: progress bars and tables, without noise from libraries."""

import contextlib
import functools
import io
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

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
from keras_transfer.events import SILENT, Listener, duration
from keras_transfer.models.bases import BASES, weights_path
from keras_transfer.runs.files import replacing

if TYPE_CHECKING:
    from keras_transfer.advice.ranking import RankResult
    from keras_transfer.evaluation.drift import Shift
    from keras_transfer.evaluation.metrics import Evaluation
    from keras_transfer.evaluation.thresholds import SureEvaluation
    from keras_transfer.workflows.advise import Recommendation
    from keras_transfer.workflows.drift import RunDrift
    from keras_transfer.workflows.finetune import FinetuneResult
    from keras_transfer.workflows.fit import FitResult


_MOST_CLASSES = 30

_METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "mean_average_precision": "mean average precision",
    "roc_auc": "ROC AUC",
    "log_loss": "log loss",
}
"""Labels of the metrics of an evaluation, in the order in which they are shown."""

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


_EXACT = sys.getfilesystemencodeerrors()  # keeps names that are not valid text

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
                for name in ("loss", "val_loss")
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


def show_sorted(directory: Path, counts: Mapping[str, int]) -> None:
    """Shows how many images were sorted into each folder, on stderr."""
    most = sorted(counts, key=lambda name: (-counts[name], name))
    shown = ", ".join(f"{name} {counts[name]:,}" for name in most[:_MOST_CLASSES])
    more = f" and {len(most) - _MOST_CLASSES} more" if most[_MOST_CLASSES:] else ""
    show_line(f"Sorted into {directory}: {shown or 'none'}{more}")


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
    run, manifest = result.run, result.run.manifest
    for place, (name, found) in enumerate(result.evaluations.items()):
        if place == 0:
            show_evaluation(found, _words(name))
        else:
            console.print(f"{_words(name)}: {found}")
    if manifest.abstention:
        console.print(str(manifest.abstention))
    if result.sure:
        console.print("Of the test images:")
        show_sure(result.sure, result.evaluations["test"].images)
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
    """Shows the result of `kt unfreeze-and-finetune`, one row per phase.

    The reason, which is shown before, has the figures of the deciding images.
    """
    run, report = result.run, result.report
    _show_phases(result)
    if report.calibration:
        found = report.calibration
        text = (
            f"Temperature {found.temperature:.2f}: log loss of the deciding images "
            f"{found.log_loss_before:.3g} -> {found.log_loss_after:.3g}"
        )
        if found.ece_before is not None and found.ece_after is not None:
            text += f", ECE {found.ece_before:.3f} -> {found.ece_after:.3f}"
        console.print(text)
    groups = ", ".join(f"{name} {rate:.1e}" for name, rate in report.groups.items())
    weights = f"weights of epoch {report.best_epoch}"
    if report.averaged_epochs > 1:
        weights = f"mean weights of the last {report.averaged_epochs}"
    console.print(
        f"Trained {report.trained_parameters:,} parameters ({groups}) for "
        f"{report.epochs} epochs, {weights}; alpha "
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


def _show_phases(result: "FinetuneResult") -> None:
    """Shows a table of phases: the images of each row, and their figures.

    These are the test images, if there are any. Otherwise the head-only model's figures
    are those out of fold, and the fine-tuned model's those of the deciding images.
    """
    from keras_transfer.evaluation.metrics import Evaluation

    run, report = result.run, result.report
    phases = {
        name: {split: Evaluation.model_validate(x) for split, x in splits.items()}
        for name, splits in run.metrics.items()
    }
    if run.manifest.phase == "finetune" and not report.kept:  # an earlier one stays
        phases["not kept"] = dict(result.evaluations)
    table = Table(box=None, pad_edge=False)
    for column in ("phase", "images", f"{_words(report.metric)} (95% interval)"):
        table.add_column(column)
    for column in ("log loss", "ECE"):
        table.add_column(column, justify="right")
    table.add_column("")
    for phase, evaluations in phases.items():
        # `val` is of version 0.1.0, which chose models by these images.
        order = ("test", "out_of_fold", "deciding", "val")
        split = next((name for name in order if name in evaluations), None)
        cells = ["none", "", "", ""]
        if split is not None:
            found = evaluations[split]
            ece = "" if found.ece is None else f"{found.ece:.3f}"
            figures = found.describe(report.metric), f"{found.log_loss:.3g}", ece
            cells = [_words(split), *figures]
        mark = "<- the run's model" if phase == run.manifest.phase else ""
        table.add_row(phase, *cells, mark)
    console.print(table)


def show_evaluation(found: "Evaluation", of: str) -> None:
    """Shows a headline, a table of metrics and a table of classes.

    Args:
        found: The metrics.
        of: Name of the images as it is shown, such as `test` or that of DATA.
    """
    console.print(f"{of}: {found}")
    figures = Table(box=None, pad_edge=False)
    figures.add_column("")
    figures.add_column("(95% interval)")
    for name, label in _METRICS.items():
        if name != found.headline and getattr(found, name) is not None:
            figures.add_row(label, found.describe(name))
    if found.ece is not None:
        figures.add_row(
            "ECE",
            f"{found.ece:.3f} ({found.ece_if_calibrated:.3f} if perfectly calibrated)",
        )
    console.print(figures)
    table = Table(box=None, pad_edge=False)
    table.add_column("class")
    table.add_column("recall (95% interval)")
    for column in ("precision", "F1", "images"):
        table.add_column(column, justify="right")
    classes = found.classes
    worst = sorted(classes, key=lambda name: classes[name].f1)[:_MOST_CLASSES]
    for name in (name for name in classes if name in set(worst)):
        row = classes[name]
        table.add_row(
            name,
            row.describe("recall"),
            f"{row.precision:.3f}",
            f"{row.f1:.3f}",
            f"{row.support:,}",
        )
    console.print(table)
    if len(classes) > len(worst):
        console.print(f"(the {len(worst)} worst of {len(classes)} classes)")


def _words(name: str) -> str:
    """Writes the name of a metric or split in words: `macro_f1` becomes macro F1."""
    return _METRICS.get(name) or name.replace("_", " ")


def show_sure(found: "SureEvaluation", images: int) -> None:
    """Shows how many of `images` predictions are sure, and how many are correct."""
    figures = Table(box=None, show_header=False, pad_edge=False)
    for name, value, ends, count in (
        ("sure", found.coverage, found.coverage_interval, images),
        (
            "accuracy of the sure",
            found.accuracy,
            found.accuracy_interval,
            found.images,
        ),
    ):
        if value is not None and ends is not None:
            low, high = ends
            part = f"{round(value * count):,} of {count:,}"
            figures.add_row(name, f"{value:.3f} ({low:.3f} to {high:.3f}), {part}")
    console.print(figures)


def show_drift(found: "RunDrift") -> None:
    """Shows how new images differ from a run's held-out images, per class."""
    console.print(
        f"{found.images:,} new images beside {found.reference_images:,} of the run "
        f"({found.reference})"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in ("run", "new", "shift (95% interval)"):
        table.add_column(column, justify="right")
    table.add_column("")

    def add(name: str, one: "Shift") -> None:
        table.add_row(
            name,
            f"{one.reference.value:.3f}",
            f"{one.new.value:.3f}",
            f"{one.difference:+.3f} ({one.low:+.3f} to {one.high:+.3f})",
            "<- differs" if one.is_clear else "",
        )

    add("far from the training images", found.far)
    classes = found.classes
    most = sorted(classes, key=lambda name: -abs(classes[name].difference))
    for name in most[:_MOST_CLASSES]:
        add(f"predicted {name}", classes[name])
    console.print(table)
    if len(most) > _MOST_CLASSES:
        console.print(f"(the {_MOST_CLASSES} of {len(most)} classes that differ most)")
    console.print(
        "Predicted classes as different as this, if both are drawn from the same "
        f"images: p = {found.p_value:.4f}"
    )


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
