"""What `kt` shows: progress bars and tables, and no noise from below."""

import contextlib
import io
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from keras_transfer.advice.rules import METHODS
from keras_transfer.errors import KerasTransferError
from keras_transfer.models.bases import BASES, weights_path
from keras_transfer.runs.manifest import FinetuneReport
from keras_transfer.runs.run import Run

if TYPE_CHECKING:
    from keras_transfer.advice.ranking import Ranked
    from keras_transfer.workflows.advise import Recommendation


_MOST_CLASSES = 30

# Control characters (a terminal obeys them), line separators, what reverses the order
# of characters, and the halves of characters that stand for bytes that are no text.
_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Text with what is no character to be seen escaped as in Python, like `\x1b`.

    Names of files and classes come from anywhere: what people read goes through here.
    """
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


class _Console(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


# Piped output is not broken at the 80 columns that rich assumes there.
console = _Console(
    markup=False,
    highlight=False,
    emoji=False,
    width=None if sys.stdout.isatty() else 200,
)
messages = _Console(stderr=True, width=None if sys.stderr.isatty() else 200)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Bars on a terminal, nothing elsewhere; yields what to tell them.

    Stdout is for results: what libraries print meanwhile, such as that they download,
    goes to stderr.
    """
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    tasks = {}
    with (
        contextlib.redirect_stdout(sys.stderr),
        Progress(*columns, console=messages, disable=not messages.is_terminal) as bars,
    ):

        def update(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total or None)
            bars.update(tasks[phase], completed=done)

        yield update


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Holds back what C++ libraries write to stderr.

    It is shown only if the block fails with an error that does not explain itself.
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
    """A line on stdout: exact for a file or pipe, printable on a terminal.

    What is exact is UTF-8 whatever the locale, but for names of files that are no text:
    these leave byte for byte.
    """
    text = str(line)
    if sys.stdout.isatty():
        text = printable(text)
    elif isinstance(sys.stdout, io.TextIOWrapper):
        errors = sys.getfilesystemencodeerrors()
        sys.stdout.reconfigure(encoding="utf-8", errors=errors)
    print(text, flush=True)


def show_line(text: str) -> None:
    """A line on stderr, for people."""
    print(printable(text), file=sys.stderr)


def show_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """What `sys.excepthook` is with --debug."""
    _show_lines("".join(traceback.format_exception(kind, error, trace)))


def _show_lines(text: str) -> None:
    for line in filter(None, text.split("\n")):
        show_line(line)


def show_run(run: Run) -> None:
    """The result of `kt fit`; its notes were shown when they were made."""
    manifest, metrics = run.manifest, run.metrics
    splits = metrics[manifest.phase]
    name = "test" if "test" in splits else "val"
    if manifest.folds:
        console.print(
            f"cross-validation, {len(manifest.folds.values)} folds: {manifest.folds}"
        )
    if name in splits:
        show_evaluation(splits[name], name)
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
    """What was decided, while the work goes on."""
    messages.print(f"- {text}", style="dim", markup=False, highlight=False)


def show_finetuning(run: Run, report: FinetuneReport, metrics: dict[str, dict]) -> None:
    """The result of `kt unfreeze-and-finetune`: the phases side by side."""
    phase, phases = run.manifest.phase, run.metrics
    if phase == "finetune" and not report.kept:  # an earlier one stays in the run
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


def show_evaluation(evaluation: dict, of: str) -> None:
    """A table of figures and one of classes."""
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
    """What `kt advise` found; the last line is what to run."""
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


def show_ranking(ranked: "list[Ranked]", left_out: dict[str, str]) -> None:
    """The result of `kt rank`; the Pareto front is marked."""
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
    """The table of bases."""
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


def show_cache(tables: list[dict]) -> None:
    """The table of cached features."""
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
