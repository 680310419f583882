"""The `kt` command line: options -> Config -> one call -> printed result.

TensorFlow is imported only by commands that need it, and only after the usage was
checked, so `kt --help` and usage errors respond immediately.
"""

import io
import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from keras_transfer import __version__
from keras_transfer.config import (
    Config,
    Format,
    Quantization,
    check_export,
    choices,
    default_of,
    finetune_options,
    listing_config,
    load_config,
    with_finetune,
)
from keras_transfer.errors import KerasTransferError, UsageError, explaining_full_disk
from keras_transfer.events import Broadcast
from keras_transfer.findings.finding import SEVERITIES, Severity
from keras_transfer.markup import printable
from keras_transfer.models.bases import get_base, get_bases
from keras_transfer.options import (
    AUDITED,
    CONFIG_FILE,
    FLIP_TTA,
    JSON,
    LISTING,
    LOG_TO,
    MEASURED,
    PATH,
    SET,
    Bytes,
    Minutes,
    config_options,
    finetune_section_options,
)
from keras_transfer.runs.files import (
    check_directory,
    check_fix,
    check_output,
    check_report,
    check_sort_into,
)
from keras_transfer.runs.manifest import Phase
from keras_transfer.runs.run import Run, open_run
from keras_transfer.workflows.leaderboard import (
    SortKey,
    delete_run,
    describe_deletion,
    list_runs_in,
    runs_to_delete,
)

if TYPE_CHECKING:
    from keras_transfer.data.tables import Predictions
    from keras_transfer.reporting.predictions import Rows
    from keras_transfer.reporting.tracking import Tracker
    from keras_transfer.workflows.inputs import Inputs


_DEFAULT = ParameterSource.DEFAULT
_GROUPS = {
    "Start here": ("fit", "advise", "bases"),
    "Improve": ("unfreeze-and-finetune", "rank"),
    "Look": ("report", "evaluate", "audit", "runs"),
    "Ship": ("predict", "export", "serve"),
    "Look after": ("cache",),
}


class _Commands(click.Group):
    """Lists commands in groups and reports errors in one line (--debug: traceback)."""

    def format_commands(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        """Lists the commands by purpose."""
        width = max(map(len, self.commands))
        for title, names in _GROUPS.items():
            with formatter.section(title):
                rows = [
                    (name.ljust(width), self.commands[name].get_short_help_str(200))
                    for name in names
                ]
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        from keras_transfer.terminal import show_line

        if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may be ASCII
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            with explaining_full_disk():
                return super().invoke(ctx)
        except click.UsageError as error:  # may quote user input
            message = printable(error.format_message())
            raise click.UsageError(message, error.ctx) from None
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            kept = "Computed features are kept"
            if ctx.invoked_subcommand == "unfreeze-and-finetune":
                kept += ", and every finished epoch (--resume)"
            click.echo(f"Interrupted. {kept}.", err=True)
            ctx.exit(130)
        except KerasTransferError as error:
            if ctx.params["debug"]:
                raise
            show_line(f"Error: {_in_flags(str(error), self, ctx)}")
            ctx.exit(2 if isinstance(error, UsageError) else 1)
        except OSError as error:
            if ctx.params["debug"]:
                raise
            show_line(f"Error: A file cannot be read or written: {error}.")
            ctx.exit(1)
        except Exception as error:
            if ctx.params["debug"]:
                raise
            show_line(
                f"Error: Unexpected {type(error).__name__}: {error}. This is a fault "
                "of kt; `kt --debug ...` shows where."
            )
            ctx.exit(1)


def _in_flags(message: str, group: click.Group, ctx: click.Context) -> str:
    """Rewrites Python parameters in a message as flags of the current command.

    `force=True` becomes `--force`, `min_accuracy=0.9` becomes `--min-accuracy 0.9`, and
    `cache_dir` becomes `--cache-dir`. Parameters for which the command has no option
    are left unchanged.
    """
    command = group.commands.get(ctx.invoked_subcommand or "")
    options = {
        str(option.name).rpartition("__")[-1]: option
        for option in (command.params if command else ())
        if isinstance(option, click.Option)
    }
    options |= {"format": options["form"]} if "form" in options else {}

    def flag(found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        if name not in options or (value is None and "_" not in name):
            return found[0]
        option = options[name]
        if value == "False" and option.secondary_opts:
            return option.secondary_opts[0]
        is_bare = value is None or value == "True"
        return option.opts[0] if is_bare else f"{option.opts[0]} {value}"

    # The lookarounds keep matches out of paths and of config keys, which are quoted.
    pattern = r"(?<![\w/.='-])([a-z]\w+)(?:=([^\s,;)]*[^\s,;).]))?(?![\w/=-])"
    return re.sub(pattern, flag, message)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show a traceback if an error occurs.")
@click.version_option(__version__, prog_name="kt")
def main(debug: bool) -> None:
    """Transfer learning on images with Keras.

    \b
    kt fit photos/                                  train a classifier
    kt unfreeze-and-finetune saved_models/photos-... make it better
    kt predict saved_models/photos-... new/*.jpg    use it
    """
    if debug:
        from keras_transfer.terminal import show_traceback

        sys.excepthook = show_traceback


@main.command()
@click.argument("data", required=False)
@config_options(
    *("base", "weights", "image_size", "features", "head.kind", "head.epochs"),
    *(
        "head.class_weight",
        "head.logit_adjustment",
        "metric",
        "augment",
        "augment_policy",
        "folds",
    ),
    *(
        "abstain_at_accuracy",
        "precision",
        *LISTING,
        "splits.file",
        "max_skipped",
        "name",
    ),
)
@click.option(
    "--overwrite/--no-overwrite",
    default=None,
    help="Replace an existing run of this name.  [default: no]",
)
@click.option(
    "--export/--no-export",
    default=None,
    help="Also export a SavedModel.  [default: no]",
)
@click.option(
    "--report/--no-report",
    default=None,
    help="Make the page report.html in the run.  [default: yes]",
)
@config_options("runs_dir", "seed", "cache_dir")
@click.option(
    "--reread/--no-reread",
    default=None,
    help="Read images again whose size and times are unchanged.  [default: no]",
)
@CONFIG_FILE
@SET
@LOG_TO
@JSON
def fit(
    file: Path | None,
    assignments: tuple[str, ...],
    log_to: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Train a classifier on DATA with a frozen base and evaluate it.

    DATA is a folder of class folders, a folder of train/ val/ test/ folders, a table
    (CSV, TSV, Parquet) with columns path,label[,split][,group], tfds:NAME, or digits.

    \b
    kt fit photos/ --base MobileNetV2 --head mlp --set head.dropout=0.5
    """
    trackers = _trackers(log_to)
    overrides = {key.replace("__", "."): value for key, value in options.items()}
    inputs = _prepare(load_config(file, overrides, assignments))
    from keras_transfer import terminal
    from keras_transfer.workflows.fit import extract_and_fit

    with terminal.listening() as listener:
        result = extract_and_fit(inputs, Broadcast([listener, *trackers]))
    if as_json:
        manifest = result.run.manifest.model_dump(
            include={
                *("abstention", "base", "coverage", "folds", "l2", "notes", "skipped"),
                *("thresholds", "timings"),
            }
        )
        figures = {
            name: found.model_dump() for name, found in result.evaluations.items()
        }
        _write_json(
            {"run": str(result.run.run_dir), "evaluations": figures, **manifest}
        )
    else:
        terminal.show_run(result)
    _show_places(trackers)


@main.command()
@click.argument("run", type=PATH)
@finetune_section_options()
@click.option(
    "--resume/--no-resume",
    default=None,
    help="Continue an interrupted fine-tuning, or start over.  [default: stop with an "
    "error if there is one]",
)
@click.option(
    "--report/--no-report",
    default=None,
    help="Make the page report.html in the run.  [default: as kt fit did]",
)
@CONFIG_FILE
@SET
@LOG_TO
def unfreeze_and_finetune(
    run: Path,
    resume: bool | None,
    report: bool | None,
    file: Path | None,
    assignments: tuple[str, ...],
    log_to: tuple[str, ...],
    **options: Any,
) -> None:
    """Fine-tune pretrained layers of a RUN; keep the result if it is better.

    Layers near the head learn faster than those below, BatchNormalization stays
    frozen, and outputs of the frozen part are computed once and cached.

    \b
    kt unfreeze-and-finetune saved_models/photos-MobileNetV2 --unfreeze stages:2
    """
    opened, trackers = open_run(run), _trackers(log_to)
    given = finetune_options(file, assignments)
    given |= {key: value for key, value in options.items() if value is not None}
    with_finetune(opened.config, given)  # mistakes are found before TensorFlow starts
    opened.check_resume(resume)
    _import_tensorflow()
    from keras_transfer import terminal
    from keras_transfer.workflows.finetune import run_finetuning

    with terminal.listening() as listener:
        told = Broadcast([listener, *trackers])
        result = run_finetuning(opened, given, resume, told, report=report)
    terminal.show_finetuning(result)
    _show_places(trackers)


@main.command()
@click.argument("run", type=PATH)
@click.argument("data", required=False)
@click.option(
    "--phase",
    type=click.Choice(choices(Phase)),
    help="Evaluate the model of this phase.  [default: the run's current model]",
)
@config_options(*LISTING)
@FLIP_TTA
@JSON
@click.option(
    "--drift",
    "is_drift",
    is_flag=True,
    help="Compare a folder of images without labels with the RUN's own.",
)
def evaluate(
    run: Path,
    data: str | None,
    is_drift: bool,
    phase: Phase | None,
    flip_tta: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Evaluate a RUN's model on its test images or on labeled DATA.

    \b
    kt evaluate saved_models/photos-efficientnet_lite0 --json
    kt evaluate saved_models/photos-efficientnet_lite0 new/ --drift
    """
    if is_drift and (data is None or phase or flip_tta or any(options.values())):
        raise click.UsageError(
            "--drift compares a folder of images with the run's current model. "
            "Received: "
            + ("no folder" if data is None else "another option beside it")
            + ". Run: kt evaluate RUN FOLDER --drift"
        )
    opened, given = open_run(run), listing_config(options)
    _import_tensorflow()
    if is_drift:
        _show_drift(opened, Path(str(data)), as_json)
        return
    from keras_transfer import terminal
    from keras_transfer.workflows.evaluate import evaluate_run

    with terminal.listening() as listener:
        found = evaluate_run(opened, data, given, phase, listener, flip_tta)
    if as_json:
        _write_json(found.model_dump())
    else:
        averaged = ", averaged over flips" if flip_tta else ""
        terminal.show_evaluation(found, found.data + averaged)
        if found.sure:
            terminal.show_sure(found.sure, found.images)
        for path, reason in found.skipped.items():
            terminal.show_line(f"left out: {path}: {reason}")


def _show_drift(run: Run, folder: Path, as_json: bool) -> None:
    from keras_transfer import terminal
    from keras_transfer.workflows.drift import measure_drift

    with terminal.listening() as listener:
        found = measure_drift(run, folder, listener)
    if as_json:
        _write_json(found.model_dump())
        return
    terminal.show_drift(found)
    for path, reason in found.skipped.items():
        terminal.show_line(f"left out: {path}: {reason}")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=PATH, metavar="RUN...")
@click.option(
    "--format",
    "form",
    type=click.Choice(["html", "png"]),
    default="html",
    help="A page, or the charts of one RUN as files.  [default: html]",
)
@click.option(
    "--output",
    type=PATH,
    metavar="PATH",
    help="File of the page, or folder of the charts.  [default: report.html or charts "
    "in the RUN; of several, report-RUN-RUN.html here]",
)
@click.option(
    "--thumbnails",
    type=click.IntRange(0, 1000),
    default=200,
    show_default=True,
    metavar="N",
    help="Largest number of pictures.",
)
@click.option("--no-images", is_flag=True, help="Leave pictures out.")
def report(
    runs: tuple[Path, ...],
    form: Any,
    output: Path | None,
    thumbnails: int,
    no_images: bool,
) -> None:
    """Make a page that shows a RUN, or several side by side.

    The page is one file that loads nothing: figures, mistakes, and what the model
    looked at. Pictures are small and have no metadata.

    \b
    kt report saved_models/photos-efficientnet_lite0
    kt report saved_models/one saved_models/other --output both.html
    """
    opened = [open_run(run) for run in runs]
    check_report(len(opened), form, thumbnails, output)
    _import_tensorflow()
    from keras_transfer import terminal
    from keras_transfer.reporting.of_run.page import ReportOptions
    from keras_transfer.workflows.report import draw_run, report_run, report_runs

    options = ReportOptions(thumbnails, not no_images)
    with terminal.listening() as listener:
        if form == "png":
            made = draw_run(opened[0], options, listener, output)
        elif len(opened) > 1:
            made = report_runs(opened, options, listener, output)
        else:
            made = report_run(opened[0], options, listener, output=output)
    terminal.write_line(made)


@main.command()
@click.argument("run_and_paths", nargs=-1, type=PATH, metavar="RUN IMAGE...")
@click.option(
    "--bundle",
    type=PATH,
    metavar="DIR",
    help="Use an exported version instead of a RUN.  [default: none]",
)
@click.option("--recursive", is_flag=True, help="Search subfolders too.")
@FLIP_TTA
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=1,
    metavar="K",
    help="Number of classes to print per image.  [default: 1]",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["csv", "jsonl"]),
    default="csv",
    help="Output format.  [default: csv]",
)
@click.option(
    "--output",
    type=PATH,
    metavar="FILE",
    help="Write the rows to a file, which is complete or not there.  [default: print "
    "them]",
)
@click.option(
    "--sort-into",
    type=PATH,
    metavar="DIR",
    help="Also link (or copy) each image into DIR/CLASS/, or DIR/_unsure/ if it is "
    "not sure.  [default: none]",
)
def predict(
    run_and_paths: tuple[Path, ...],
    bundle: Path | None,
    recursive: bool,
    flip_tta: bool,
    output: Path | None,
    sort_into: Path | None,
    **shown: Any,
) -> None:
    """Classify image files or folders of images; print one row per image.

    A row is marked sure or not if the RUN was made with --abstain-at-accuracy. With
    several classes per image, all that reach their thresholds are listed.

    \b
    kt predict saved_models/photos-efficientnet_lite0 new/ --top 3 --output result.csv
    kt predict saved_models/photos-efficientnet_lite0 new/ --sort-into sorted/
    kt predict --bundle saved_models/photos-efficientnet_lite0/1 new/
    """
    paths = run_and_paths if bundle else run_and_paths[1:]
    if not paths:
        wanted = "images" if bundle else "a RUN and images"
        raise click.UsageError(f"Name {wanted}. Received: {len(run_and_paths)} paths.")
    if bundle and flip_tta:
        raise click.UsageError(
            "A bundle averages over flips if it was exported so. Received: --flip-tta "
            "and --bundle. Leave --flip-tta out, or export with it."
        )
    if output:
        check_output(output)
    if sort_into:
        check_sort_into(sort_into)
    if bundle:
        from keras_transfer import terminal
        from keras_transfer.serving.server import predict_bundle

        with terminal.quiet_stderr():
            found = predict_bundle(bundle, paths, recursive)
    else:
        opened = open_run(run_and_paths[0])
        _import_tensorflow()
        from keras_transfer import terminal
        from keras_transfer.workflows.predict import predict_run

        told = Broadcast(())
        found = predict_run(opened, paths, recursive, flip_tta, told)
        for note in told.notes:
            terminal.show_note(note)
    from keras_transfer.reporting.predictions import Rows

    rows = Rows(found.class_names, found.columns, **shown)
    classified, failed = _write_rows(found, rows, output, sort_into)
    if failed:
        from keras_transfer.terminal import show_line

        show_line(f"{failed:,} of {classified + failed:,} images were not classified.")
    if not classified:
        raise KerasTransferError("None of the images could be classified.")


@main.command()
@click.argument("run", type=PATH)
@click.option(
    "--format",
    "form",
    type=click.Choice(["savedmodel", *choices(Format)]),
    default="savedmodel",
    help="Export format.  [default: savedmodel]",
)
@click.option(
    "--quantize",
    type=click.Choice(choices(Quantization)),
    help="For litert: store weights in 8 bits (dynamic), or compute in 8 bits too "
    "(int8).  [default: no quantization]",
)
@click.option(
    "--min-accuracy",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Export only if the test accuracy is at least this.  [default: no limit]",
)
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    metavar="N",
    help="Delete all but the newest N versions.  [default: keep all]",
)
@FLIP_TTA
@click.option(
    "--write-serving-config",
    is_flag=True,
    help="Also write configuration files for TensorFlow Serving.",
)
def export(
    run: Path,
    form: Any,
    quantize: Quantization | None,
    min_accuracy: float | None,
    keep: int | None,
    flip_tta: bool,
    write_serving_config: bool,
) -> None:
    """Export a RUN's model for TensorFlow Serving or another runtime.

    \b
    kt export saved_models/photos-efficientnet_lite0
    kt export saved_models/photos-efficientnet_lite0 --format litert
    """
    check_export(form, quantize, keep)
    opened = open_run(run)
    _import_tensorflow()
    from keras_transfer import terminal
    from keras_transfer.workflows.export import export_format, export_savedmodel

    if form == "savedmodel":
        with terminal.listening() as listener:
            made: object = export_savedmodel(
                opened, min_accuracy, keep, listener, flip_tta
            )
    else:
        told = Broadcast(())
        with terminal.quiet_stderr():  # converters are noisy
            made = export_format(opened, form, quantize, min_accuracy, told, flip_tta)
        for note in told.notes:
            terminal.show_note(note)
    terminal.write_line(made)
    if write_serving_config:
        from keras_transfer.serving.server import write_serving_config as run_write

        for path in run_write(opened):
            terminal.write_line(path)


@main.command()
@click.argument("run", type=PATH)
@click.argument("flags", nargs=-1, metavar="[-- FLAG...]")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 also accepts other machines.",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=8500,
    show_default=True,
    metavar="PORT",
    help="Port for gRPC.",
)
@click.option(
    "--rest-port",
    type=click.IntRange(1, 65535),
    default=8501,
    show_default=True,
    metavar="PORT",
    help="Port for REST.",
)
def serve(
    run: Path, flags: tuple[str, ...], host: str, port: int, rest_port: int
) -> None:
    """Serve a RUN's exported versions with TensorFlow Serving until Ctrl-C.

    Starts a Docker container. With --host 0.0.0.0, starts tensorflow_model_server
    instead if it is on PATH; it always listens on all addresses. FLAGs after -- are
    passed to the server.

    \b
    kt serve saved_models/photos-efficientnet_lite0
    kt serve saved_models/photos-efficientnet_lite0 -- --enable_batching
    """
    from keras_transfer import terminal
    from keras_transfer.serving.server import server_command

    command = server_command(run, port, rest_port, host, flags)
    name = open_run(run).run_dir.resolve().name
    terminal.show_line(shlex.join(command))
    at = "localhost" if host in ("127.0.0.1", "0.0.0.0") else host
    terminal.show_line(f"http://{at}:{rest_port}/v1/models/{name}")
    os.execv(command[0], command)


@main.command()
@click.argument("data")
@config_options("base", "weights")
@click.option(
    "--budget",
    type=Minutes(),
    metavar="TIME",
    help="Maximum time that the method may take, such as 90s, 30m or 2h.  [default: no "
    "limit]",
)
@config_options(*MEASURED)
@JSON
def advise(data: str, budget: float | None, as_json: bool, **options: Any) -> None:
    """Recommend a method for DATA, based on measurements on this machine.

    Fine-tuning is tried if that takes at most a quarter of the budget, or 5 minutes.

    \b
    kt advise photos/ --budget 30m
    """
    inputs = _prepare(load_config(None, {**options, "data": data}), makes_run=False)
    from keras_transfer import terminal
    from keras_transfer.workflows.advise import measure

    with terminal.listening() as listener:
        found = measure(inputs, options, budget, listener)
    if as_json:
        _write_json(found.model_dump(mode="json"))
    else:
        terminal.show_recommendation(found)


@main.command()
@click.argument("data")
@click.option(
    "--budget",
    type=Minutes(),
    metavar="TIME",
    help="Time to spend, such as 30m or 2h, the final training included.  [default: "
    "30m, or no limit with --trials]",
)
@click.option(
    "--trials",
    type=click.IntRange(1),
    metavar="N",
    help="Number of ways to try.  [default: no limit]",
)
@click.option(
    "--bases",
    default="available",
    metavar="NAME,...",
    help="Bases to use.  [default: all whose weights are on this machine]",
)
@click.option(
    "--max-size",
    type=click.FloatRange(0, min_open=True),
    metavar="MB",
    help="Largest size of the model's weights.",
)
@click.option(
    "--max-latency",
    type=click.FloatRange(0, min_open=True),
    metavar="MS",
    help="Longest time for one image on this machine, in milliseconds.",
)
@config_options("metric")
@click.option("--name", metavar="NAME", help="Name of the run.  [default: DATA-search]")
@config_options("runs_dir", *MEASURED)
@click.option(
    "--overwrite/--no-overwrite",
    default=None,
    help="Replace an existing run of this name.  [default: no]",
)
@JSON
def search(
    data: str,
    budget: float | None,
    trials: int | None,
    bases: str,
    max_size: float | None,
    max_latency: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Spend a budget on the best classifier of DATA and make a run of it.

    Bases, several as one, heads, views and fine-tuning are tried and judged out of
    fold. Ctrl-C keeps the best so far.

    \b
    kt search photos/ --budget 30m
    """
    names = None if bases == "available" else bases.split(",")
    for name in names or ():
        get_base(name)
    config = load_config(None, {**options, "data": data})
    inputs = _prepare(config, ending="search")
    from keras_transfer import terminal
    from keras_transfer.workflows.search import Limits, search_best

    limits = Limits(budget, trials, max_size, max_latency)
    with terminal.listening() as listener:
        found = search_best(inputs, limits, names, config.image_size, listener)
    if as_json:
        _write_json(found.to_json())
    else:
        terminal.show_search(found)


@main.command()
@click.argument("data")
@click.option(
    "--bases",
    default="available",
    metavar="NAME,...",
    help="Bases to compare.  [default: all whose weights are on this machine]",
)
@click.option(
    "--chart",
    type=PATH,
    default=Path("rank.png"),
    show_default=True,
    metavar="FILE",
    help="PNG file to write.",
)
@config_options(*MEASURED)
@JSON
def rank(data: str, bases: str, chart: Path, as_json: bool, **options: Any) -> None:
    """Compare bases on DATA by accuracy of a linear probe, speed and size.

    \b
    kt rank photos/ --bases efficientnet_lite0,MobileNetV2
    """
    names = None if bases == "available" else [x for x in bases.split(",") if x]
    for name in names or ():
        get_bases(name)
    if not chart.absolute().parent.is_dir():
        raise UsageError(
            f"--chart names a file in a folder that exists. Received: {chart}."
        )
    inputs = _prepare(load_config(None, {**options, "data": data}), makes_run=False)
    from keras_transfer import terminal
    from keras_transfer.reporting.charts import draw_chart
    from keras_transfer.workflows.rank import measure_bases

    with terminal.listening() as listener:
        result = measure_bases(inputs, names, listener)
        draw_chart(result.ranked, chart)
        listener.artifact(chart, "chart")
    if as_json:
        ranked = [
            {**vars(one), "accuracy": one.accuracy.model_dump()}
            for one in result.ranked
        ]
        _write_json(
            {"ranked": ranked, "left_out": dict(result.left_out), "chart": str(chart)}
        )
    else:
        terminal.show_ranking(result)
        terminal.write_line(f"Chart: {chart}")


@main.command()
@click.argument("data")
@click.option(
    "--output",
    type=PATH,
    metavar="DIR",
    help="Directory for audit.csv and report.html.  [default: audit-DATA]",
)
@click.option(
    "--fix",
    type=PATH,
    metavar="FILE",
    help="Also write a cleaned CSV table that kt fit reads: without copies, with "
    "suspects marked and near duplicates grouped.  [default: none]",
)
@click.option(
    "--fail-on",
    type=click.Choice([*SEVERITIES]),
    help="Exit with status 3 if there is a finding of this severity or a worse one.  "
    "[default: never]",
)
@config_options("base", "weights", "splits.file", *AUDITED)
@JSON
def audit(
    data: str,
    output: Path | None,
    fix: Path | None,
    fail_on: Severity | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Find what is wrong with the images, labels and splits of DATA.

    Finds copies and near duplicates, label errors, outliers, odd files, shortcuts,
    classes that look alike and doubtful splits. No image is touched.

    \b
    kt audit photos/
    kt audit photos/ --fix cleaned.csv && kt fit cleaned.csv
    """
    given = {key.replace("__", "."): value for key, value in options.items()}
    config = load_config(None, {**given, "data": data})
    if fix:
        check_fix(fix, data, config.splits.file)
    if output:
        check_directory(output)
    inputs = _prepare(config, makes_run=False, fewest_classes=1)
    stem = str(inputs.config.name).removesuffix(f"-{inputs.config.base}")
    folder = output or Path(f"audit-{stem}")
    check_directory(folder)
    from keras_transfer import terminal
    from keras_transfer.workflows.audit import audit_data

    with terminal.listening() as listener:
        found = audit_data(inputs, listener, folder, fix)
    if as_json:
        _write_json({**found.model_dump(), "output": str(folder)})
    else:
        terminal.show_audit(found, folder, fix)
    if fail_on and found.at_least(fail_on):
        click.get_current_context().exit(3)


@main.command()
@config_options("cache_dir")
@JSON
def bases(cache_dir: Path | None, as_json: bool) -> None:
    """List the pretrained bases: accuracy on ImageNet, speed, and their weights.

    \b
    kt bases --json
    """
    from keras_transfer import terminal
    from keras_transfer.workflows.bases import describe_bases

    rows = describe_bases(cache_dir)
    if as_json:
        _write_json({"bases": rows})
    else:
        terminal.show_bases(rows)


@main.group(invoke_without_command=True)
@click.option(
    "--sort",
    type=click.Choice(choices(SortKey)),
    default="date",
    show_default=True,
    metavar="KEY",
    help=f"What to sort by, best or newest first: {', '.join(choices(SortKey))}. A "
    "metric is shown too.",
)
@click.option(
    "--data",
    metavar="DATA",
    help="List runs of these data only.  [default: of all]",
)
@config_options("runs_dir")
@JSON
@click.pass_context
def runs(
    ctx: click.Context,
    sort: Any,
    data: str | None,
    runs_dir: Path | None,
    as_json: bool,
) -> None:
    """List all runs with their figures; delete or compare runs.

    \b
    kt runs --sort accuracy --data photos/
    kt runs compare saved_models/photos-MobileNetV2 saved_models/photos-ResNet50
    """
    if ctx.invoked_subcommand:
        if any(ctx.get_parameter_source(x) is not _DEFAULT for x in ctx.params):
            raise click.UsageError(
                "Options of the list stand without a subcommand. Received: "
                f"{ctx.invoked_subcommand}. Give its own options after it."
            )
        return
    found = list_runs_in(runs_dir or default_of("runs_dir"), data, sort)
    if as_json:
        _write_json([one.to_json() for one in found])
    else:
        from keras_transfer.terminal import show_runs

        show_runs(found)


@runs.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="RUN...")
@click.option("--yes", is_flag=True, help="Do not ask.")
@config_options("runs_dir")
def runs_rm(names: tuple[str, ...], yes: bool, runs_dir: Path | None) -> None:
    """Delete RUNs for good, with their exported versions.

    A RUN is a name in the directory of runs, or a path with a separator. Damaged runs
    are deleted too.

    \b
    kt runs rm saved_models/photos-MobileNetV2
    """
    from keras_transfer.terminal import show_line

    found = runs_to_delete(names, runs_dir)
    if not yes:
        click.confirm(printable(describe_deletion(found)), abort=True, err=True)
    for run in found:
        delete_run(run)
        show_line(f"Deleted: {run.run_dir}")


@runs.command("compare")
@click.argument("a", type=PATH, metavar="RUN_A")
@click.argument("b", type=PATH, metavar="RUN_B")
def runs_compare(a: Path, b: Path) -> None:
    """Compare two runs on the test images that they have in common.

    The test is paired. Images that one of the runs was trained on are left out.

    \b
    kt runs compare saved_models/photos-MobileNetV2 saved_models/photos-ResNet50
    """
    first, second = open_run(a), open_run(b)
    if first.run_dir.resolve() == second.run_dir.resolve():
        raise UsageError(
            f"Two different runs are compared. Received: {a} and {b}, which are the "
            "same. Name another."
        )
    from keras_transfer.terminal import show_comparison
    from keras_transfer.workflows.compare import compare_two

    show_comparison(compare_two(first, second))


@main.group()
def cache() -> None:
    """List, prune or locate the cached features."""


@cache.command("list")
@config_options("cache_dir")
def cache_list(cache_dir: Path | None) -> None:
    """List the cached features."""
    from keras_transfer import terminal
    from keras_transfer.features.cache import FeatureCache

    terminal.show_cache(list(FeatureCache(cache_dir).list()))


@cache.command("prune")
@click.option(
    "--unused-days",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    help="Delete features not used for this many days; 0 deletes all.  [default: 30, "
    "or no limit with --max-size]",
)
@click.option(
    "--max-size",
    type=Bytes(),
    metavar="SIZE",
    help="Delete the least recently used features until the rest fits, for example "
    "20GB.  [default: no limit]",
)
@config_options("cache_dir")
def cache_prune(
    unused_days: float | None, max_size: int | None, cache_dir: Path | None
) -> None:
    """Delete cached features by age or total size.

    \b
    kt cache prune --unused-days 7
    kt cache prune --max-size 20GB
    """
    from keras_transfer.features.cache import FeatureCache

    if unused_days is None and max_size is None:
        unused_days = 30
    deleted, freed = FeatureCache(cache_dir).prune(unused_days, max_size)
    click.echo(f"{deleted} tables deleted, {freed / 1e6:.1f} MB freed.")


@cache.command("path")
@config_options("cache_dir")
def cache_path(cache_dir: Path | None) -> None:
    """Print the path of the cache directory."""
    from keras_transfer import terminal
    from keras_transfer.features.cache import FeatureCache

    terminal.write_line(FeatureCache(cache_dir).directory)


def _prepare(
    config: Config, makes_run: bool = True, fewest_classes: int = 2, ending: str = ""
) -> "Inputs":
    """Checks the inputs and lists the images before importing TensorFlow."""
    from keras_transfer.workflows.inputs import prepare

    inputs = prepare(config, makes_run, None, fewest_classes, ending)
    if not inputs.need_tensorflow:
        _ = inputs.splits
    _import_tensorflow()
    return inputs


def _trackers(log_to: Iterable[str]) -> "list[Tracker]":
    """Creates the listeners of --log-to, before any work is done."""
    if not log_to:
        return []
    from keras_transfer.reporting.tracking import listener_of

    return [listener_of(target) for target in log_to]


def _show_places(trackers: "Iterable[Tracker]") -> None:
    """Says where --log-to logged."""
    from keras_transfer.terminal import show_line

    for tracker in trackers:
        show_line(f"Logged to: {tracker.place}")


def _import_tensorflow() -> None:
    """Imports TensorFlow, which takes several seconds."""
    from keras_transfer.terminal import import_tensorflow

    import_tensorflow()


def _write_json(document: Any) -> None:
    """Writes a JSON document to stdout, which holds nothing else then."""
    from keras_transfer.terminal import write_line

    # A terminal escapes line breaks inside a line, so each is written by itself.
    for line in json.dumps(document, indent=1, ensure_ascii=False).split("\n"):
        write_line(line)


def _write_rows(
    found: "Predictions", rows: "Rows", output: Path | None, sort_into: Path | None
) -> tuple[int, int]:
    """Writes one row per image, and sorts the images if a directory is given.

    Returns:
        (number of classified images, number of unusable images).
    """
    from keras_transfer import terminal
    from keras_transfer.data.sorting import SortedFolders

    folders = SortedFolders(sort_into, found.class_names) if sort_into else None
    count = Counter[bool]()
    with terminal.writing_rows(output) as (write, listener):
        for line in rows.header():
            write(line)
        for done, prediction in enumerate(found.rows, start=1):
            write(rows.line(prediction))
            if folders:
                folders.put(prediction)
            count[not prediction.error] += 1
            listener.progress("predict", done, found.total)
    if output:
        terminal.show_line(f"Predictions: {output}")
    if folders:
        terminal.show_sorted(folders.directory, folders.counts)
    return count[True], count[False]


if __name__ == "__main__":
    main()
