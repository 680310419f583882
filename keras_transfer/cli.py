"""The `kt` command line: options -> Config -> one call -> printed result.

Only a command that needs TensorFlow imports it, so `kt --help` and mistakes in usage
answer at once.
"""

import io
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from keras_transfer import __version__
from keras_transfer.config import (
    ClassWeight,
    Config,
    Format,
    HeadKind,
    Precision,
    Quantization,
    TrainingPrecision,
    check_quantization,
    choices,
    load_config,
    parse_assignments,
    with_finetune,
)
from keras_transfer.errors import KerasTransferError, UsageError, explaining_full_disk
from keras_transfer.models.bases import get_base
from keras_transfer.runs.files import csv_line
from keras_transfer.runs.manifest import Phase
from keras_transfer.runs.run import open_run

if TYPE_CHECKING:
    from keras_transfer.data.tables import Prediction
    from keras_transfer.workflows.inputs import Inputs


class _Commands(click.Group):
    """Commands whose errors are one line; a traceback is shown with --debug only."""

    def invoke(self, ctx: click.Context) -> Any:
        from keras_transfer.terminal import printable, show_line

        if isinstance(sys.stdout, io.TextIOWrapper):  # it may be ASCII or cp1252
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            with explaining_full_disk():
                return super().invoke(ctx)
        except click.UsageError as error:  # it may repeat what was typed
            message = printable(error.format_message())
            raise click.UsageError(message, error.ctx) from None
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            click.echo(
                "Interrupted. Computed features are kept, and of fine-tuning every "
                "finished epoch (--resume).",
                err=True,
            )
            ctx.exit(130)
        except KerasTransferError as error:
            if ctx.params["debug"]:
                raise
            show_line(f"Error: {error}")
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


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
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


_PATH = click.Path(path_type=Path)


@main.command()
@click.argument("data", required=False)
@click.option("--base", help="Pretrained base; `kt bases` lists them.")
@click.option("--weights", help="imagenet, none or a file.")
@click.option("--image-size", type=int, help="Side of the images in pixels.")
@click.option("--head", "head__kind", type=click.Choice(choices(HeadKind)))
@click.option("--epochs", "head__epochs", type=int, help="The most passes of the head.")
@click.option(
    "--class-weight", "head__class_weight", type=click.Choice(choices(ClassWeight))
)
@click.option("--augment", type=int, metavar="N", help="Augmented views an image.")
@click.option("--folds", type=int, metavar="K", help="Cross-validate the head too.")
@click.option("--precision", type=click.Choice(choices(Precision)))
@click.option("--splits", "splits__file", type=_PATH, help="Keep a splits.csv.")
@click.option("--max-skipped", type=float, help="Share of unusable images allowed.")
@click.option("--name", help="Name of the run.")
@click.option("--runs-dir", type=_PATH, help="Where runs are kept.")
@click.option("--overwrite/--no-overwrite", default=None, help="Replace the run.")
@click.option("--export/--no-export", default=None, help="Also make a SavedModel.")
@click.option("--seed", type=int)
@click.option("--data-dir", type=_PATH, help="Of tensorflow-datasets.")
@click.option("--cache-dir", type=_PATH, help="Where features are kept.")
@click.option("--config", "file", type=_PATH, help="YAML file of config keys.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE")
def fit(file: Path | None, assignments: tuple[str, ...], **options: Any) -> None:
    """Train a classifier on DATA with a frozen base, and evaluate it.

    DATA is a folder of class folders, a folder of train/ val/ test/ folders, a CSV
    file with columns path,label[,split][,group], tfds:NAME, or digits.

    \b
    kt fit photos/ --base MobileNetV2 --head mlp --set head.dropout=0.5
    """
    overrides = {key.replace("__", "."): value for key, value in options.items()}
    inputs = _prepare(load_config(file, overrides, assignments))
    from keras_transfer import terminal
    from keras_transfer.workflows.fit import extract_and_fit

    with terminal.progress() as on_progress:
        run = extract_and_fit(inputs, on_progress, terminal.show_note)
    terminal.show_run(run)


@main.command()
@click.argument("run", type=_PATH)
@click.option("--unfreeze", help="top, stages:N, all or from:LAYER.")
@click.option("--lr", "learning_rate", type=float, help="Of the head.")
@click.option("--base-lr", type=float, help="Of the base's last stage.")
@click.option("--layer-decay", type=float, help="Of rates, from stage to stage.")
@click.option("--epochs", type=int, help="The most epochs.")
@click.option("--batch-size", type=int)
@click.option("--augment", metavar="N|online", help="Cached views, or new ones.")
@click.option("--precision", type=click.Choice(choices(TrainingPrecision)))
@click.option("--train-bn/--no-train-bn", default=None, help="BatchNormalization too.")
@click.option("--from-scratch-head/--trained-head", default=None)
@click.option("--disk-budget", "disk_budget_gb", type=float, metavar="GB")
@click.option("--force/--keep-best", default=None, help="Keep it even if worse.")
@click.option("--resume/--no-resume", default=None, help="Go on, or start over.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE")
def unfreeze_and_finetune(
    run: Path, resume: bool | None, assignments: tuple[str, ...], **options: Any
) -> None:
    """Fine-tune a RUN's pretrained layers; keep the result if it is better.

    Layers near the head learn faster than those below, BatchNormalization stays
    frozen, and what lies below the unfrozen layers is computed once.

    \b
    kt unfreeze-and-finetune saved_models/photos-MobileNetV2 --unfreeze stages:2
    """
    opened = open_run(run)
    given = {key: value for key, value in options.items() if value is not None}
    given |= parse_assignments(assignments)
    with_finetune(opened.config, given)  # mistakes are found before TensorFlow starts
    _import_tensorflow()
    from keras_transfer import terminal
    from keras_transfer.workflows.finetune import attempt

    with terminal.progress() as on_progress:
        report, metrics = attempt(
            opened, given, resume, on_progress, terminal.show_note
        )
    terminal.show_finetuning(opened, report, metrics)


@main.command()
@click.argument("run", type=_PATH)
@click.argument("data", required=False)
@click.option("--phase", type=click.Choice(choices(Phase)), help="Not the run's own.")
@click.option("--data-dir", type=_PATH, help="Of tensorflow-datasets.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(
    run: Path,
    data: str | None,
    phase: Phase | None,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Evaluate a RUN's model on its test images, or on labelled DATA.

    \b
    kt evaluate saved_models/photos-efficientnet_lite0 --json
    """
    opened = open_run(run)
    _import_tensorflow()
    from keras_transfer import terminal
    from keras_transfer.workflows.evaluate import evaluate_run

    evaluation, of, skipped = evaluate_run(opened, data, data_dir, phase=phase)
    if as_json:
        values = {"data": of, "skipped": skipped, **evaluation.model_dump()}
        terminal.write_line(json.dumps(values, ensure_ascii=False))
    else:
        terminal.show_evaluation(evaluation.model_dump(), of)
        for path, reason in skipped.items():
            terminal.show_line(f"left out: {path}: {reason}")


@main.command()
@click.argument("run_and_paths", nargs=-1, type=_PATH, metavar="RUN IMAGE...")
@click.option("--bundle", type=_PATH, help="Exported version, instead of a RUN.")
@click.option("--recursive", is_flag=True, help="Search folders inside folders.")
@click.option("--top", type=click.IntRange(min=1), default=1, metavar="K")
@click.option("--format", "form", type=click.Choice(["csv", "jsonl"]), default="csv")
def predict(
    run_and_paths: tuple[Path, ...],
    bundle: Path | None,
    recursive: bool,
    top: int,
    form: str,
) -> None:
    """Classify images: files, or folders of them, a row each as they are done.

    \b
    kt predict saved_models/photos-efficientnet_lite0 new/ --top 3 > result.csv
    kt predict --bundle saved_models/photos-efficientnet_lite0/1 new/
    """
    paths = run_and_paths if bundle else run_and_paths[1:]
    if not paths:
        wanted = "images" if bundle else "a RUN and images"
        raise click.UsageError(f"Name {wanted}. Received: {len(run_and_paths)} paths.")
    if bundle:
        from keras_transfer import terminal
        from keras_transfer.serving.server import predict_bundle

        with terminal.quiet_stderr():
            class_names, predictions = predict_bundle(bundle, paths, recursive)
    else:
        opened = open_run(run_and_paths[0])
        _import_tensorflow()
        from keras_transfer.workflows.predict import predict_run

        class_names, predictions = predict_run(opened, paths, recursive)
    write = _csv_rows if form == "csv" else _json_rows
    if not write(predictions, class_names, min(top, len(class_names))):
        raise KerasTransferError("None of the images could be classified.")


@main.command()
@click.argument("run", type=_PATH)
@click.option(
    "--format",
    "form",
    type=click.Choice(["savedmodel", *choices(Format)]),
    default="savedmodel",
)
@click.option("--quantize", type=click.Choice(choices(Quantization)), help="Of litert.")
@click.option("--min-accuracy", type=click.FloatRange(0, 1), help="On test images.")
@click.option("--keep", type=click.IntRange(min=1), metavar="N", help="Versions left.")
@click.option("--write-serving-config", is_flag=True, help="Of TensorFlow Serving.")
def export(
    run: Path,
    form: Any,
    quantize: Quantization | None,
    min_accuracy: float | None,
    keep: int | None,
    write_serving_config: bool,
) -> None:
    """Publish a RUN's model as a SavedModel for TensorFlow Serving.

    \b
    kt export saved_models/photos-efficientnet_lite0
    kt export saved_models/photos-efficientnet_lite0 --format litert
    """
    check_quantization(form, quantize)
    if keep and form != "savedmodel":
        raise UsageError(
            f"Only a SavedModel has versions. Received: --keep {keep} and --format "
            f"{form}. Leave one of them out."
        )
    opened = open_run(run)
    _import_tensorflow()
    from keras_transfer import terminal

    if form == "savedmodel":
        from keras_transfer.workflows.export import export as run_export

        path = run_export(
            opened, min_accuracy=min_accuracy, keep=keep, on_note=terminal.show_note
        )
        terminal.write_line(path)
    else:
        from keras_transfer.workflows.export import export_format

        notes: list[str] = []
        with terminal.quiet_stderr():  # converters talk
            exported = export_format(
                opened,
                form,
                quantize=quantize,
                min_accuracy=min_accuracy,
                on_note=notes.append,
            )
        for note in notes:
            terminal.show_note(note)
        terminal.write_line(exported)
    if write_serving_config:
        from keras_transfer.serving.server import write_serving_config as run_write

        for path in run_write(opened):
            terminal.write_line(path)


@main.command()
@click.argument("run", type=_PATH)
@click.argument("flags", nargs=-1, metavar="[-- FLAG...]")
@click.option("--host", default="127.0.0.1", help="0.0.0.0: for other machines too.")
@click.option("--port", type=click.IntRange(1, 65535), default=8500, help="Of gRPC.")
@click.option("--rest-port", type=click.IntRange(1, 65535), default=8501)
def serve(
    run: Path, flags: tuple[str, ...], host: str, port: int, rest_port: int
) -> None:
    """Serve a RUN's exported versions with TensorFlow Serving, until Ctrl-C.

    It starts a container, or with --host 0.0.0.0 tensorflow_model_server where that is
    on PATH: it cannot listen at one address only. What follows -- is passed on to it.

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


class _Minutes(click.ParamType):
    """A duration such as 30m, 2h or 90s, as minutes."""

    name = "duration"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", str(value))
        if not found:
            self.fail(f"{value!r} is no duration such as 30m, 2h or 90s.", param, ctx)
        return float(found[1]) * {"s": 1 / 60, "m": 1, "h": 60}[found[2]]


@main.command()
@click.argument("data")
@click.option("--base", help="Pretrained base; `kt bases` lists them.")
@click.option("--budget", type=_Minutes(), help="The most time, such as 30m or 2h.")
@click.option("--weights", help="imagenet, none or a file.")
@click.option("--image-size", type=int, help="Side of the images in pixels.")
@click.option("--seed", type=int)
@click.option("--max-skipped", type=float, help="Share of unusable images allowed.")
@click.option("--data-dir", type=_PATH, help="Of tensorflow-datasets.")
@click.option("--cache-dir", type=_PATH, help="Where features are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def advise(data: str, budget: float | None, as_json: bool, **options: Any) -> None:
    """Say which method suits DATA, and why, from measurements on this machine.

    \b
    kt advise photos/ --budget 30m
    """
    config = load_config(None, {**options, "data": data})
    inputs = _prepare(config, makes_run=False)
    from keras_transfer import terminal
    from keras_transfer.workflows.advise import measure

    with terminal.progress() as on_progress:
        found = measure(inputs, options, budget, on_progress, terminal.show_note)
    if as_json:
        for line in json.dumps(found.model_dump(mode="json"), indent=1).split("\n"):
            terminal.write_line(line)
    else:
        terminal.show_recommendation(found)


@main.command()
@click.argument("data")
@click.option(
    "--bases", default="available", help="Names with commas, or `available` here."
)
@click.option("--chart", type=_PATH, default=Path("rank.png"), help="PNG to write.")
@click.option("--image-size", type=int, help="Side of the images in pixels.")
@click.option("--seed", type=int)
@click.option("--max-skipped", type=float, help="Share of unusable images allowed.")
@click.option("--data-dir", type=_PATH, help="Of tensorflow-datasets.")
@click.option("--cache-dir", type=_PATH, help="Where features are kept.")
def rank(data: str, bases: str, chart: Path, **options: Any) -> None:
    """Compare bases on DATA: accuracy of a probe, speed and size.

    \b
    kt rank photos/ --bases efficientnet_lite0,MobileNetV2
    """
    names = None if bases == "available" else [x for x in bases.split(",") if x]
    for name in names or ():
        get_base(name)
    if not chart.absolute().parent.is_dir():
        raise UsageError(
            f"--chart names a file in a folder that exists. Received: {chart}."
        )
    config = load_config(None, {**options, "data": data})
    inputs = _prepare(config, makes_run=False)
    from keras_transfer import terminal
    from keras_transfer.reporting.charts import draw_chart
    from keras_transfer.workflows.rank import measure_bases

    with terminal.progress() as on_progress:
        ranked, left_out = measure_bases(
            config, inputs.splits, names, on_progress, terminal.show_note
        )
    terminal.show_ranking(ranked, left_out)
    draw_chart(ranked, chart)
    terminal.write_line(f"Chart: {chart}")


@main.command()
def bases() -> None:
    """List the pretrained bases, and whether their weights are on this machine."""
    from keras_transfer import terminal

    terminal.show_bases()


@main.group()
def cache() -> None:
    """Look after the cached features."""


_cache_dir = click.option("--cache-dir", type=_PATH, help="Where features are kept.")


@cache.command("list")
@_cache_dir
def cache_list(cache_dir: Path | None) -> None:
    """List what is cached."""
    from keras_transfer import terminal
    from keras_transfer.features.cache import FeatureCache

    terminal.show_cache(list(FeatureCache(cache_dir).list()))


class _Bytes(click.ParamType):
    """A size such as 20GB, 1.5TB or 500000000, in bytes."""

    name = "size"
    _units = {unit: 1000**power for power, unit in enumerate(("", "K", "M", "G", "T"))}

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", str(value).strip(), re.I)
        if not found:
            self.fail(f"{value!r} is not a size such as 20GB, 500MB or 0.", param, ctx)
        return int(float(found[1]) * self._units[found[2].upper()])


@cache.command("prune")
@click.option(
    "--unused-days",
    type=click.FloatRange(min=0),
    help="Delete what was not used for so long; 0 deletes all. Default: 30, or no "
    "limit with --max-size.",
)
@click.option(
    "--max-size",
    type=_Bytes(),
    help="Delete what was not used for the longest time, until the rest fits.",
)
@_cache_dir
def cache_prune(
    unused_days: float | None, max_size: int | None, cache_dir: Path | None
) -> None:
    """Delete features that were not used for some days, or that do not fit.

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
@_cache_dir
def cache_path(cache_dir: Path | None) -> None:
    """Print where the cache is."""
    from keras_transfer import terminal
    from keras_transfer.features.cache import FeatureCache

    terminal.write_line(FeatureCache(cache_dir).directory)


def _prepare(config: Config, makes_run: bool = True) -> "Inputs":
    """Checks inputs, and looks for the images, before TensorFlow is imported."""
    from keras_transfer.workflows.inputs import prepare

    inputs = prepare(config, makes_run)
    if not inputs.need_tensorflow:
        _ = inputs.splits
    _import_tensorflow()
    return inputs


def _import_tensorflow() -> None:
    """Imports TensorFlow, which takes seconds."""
    from keras_transfer.terminal import import_tensorflow

    import_tensorflow()


def _csv_rows(
    predictions: Iterable["Prediction"], class_names: list[str], top: int
) -> int:
    from keras_transfer.terminal import write_line

    ranks = range(1, top + 1)
    names = (f"{c}_{k}" for k in ranks for c in ("class", "score"))
    write_line(csv_line(["path", "error", *names]))
    classified = 0
    for prediction in predictions:
        best = _best(prediction, class_names, top)
        cells = [cell for name, score in best for cell in (name, f"{score:.6f}")]
        write_line(csv_line([prediction.source, prediction.error, *cells]))
        classified += not prediction.error
    return classified


def _json_rows(
    predictions: Iterable["Prediction"], class_names: list[str], top: int
) -> int:
    from keras_transfer.terminal import write_line

    classified = 0
    for prediction in predictions:
        row: dict[str, Any] = {"path": prediction.source}
        if prediction.error:
            row["error"] = prediction.error
        else:
            row["predictions"] = [
                {"class": name, "score": round(score, 6)}
                for name, score in _best(prediction, class_names, top)
            ]
        write_line(json.dumps(row, ensure_ascii=False))
        classified += not prediction.error
    return classified


def _best(
    prediction: "Prediction", class_names: list[str], top: int
) -> Iterator[tuple[str, float]]:
    if prediction.probabilities is not None:
        for index in prediction.probabilities.argsort()[::-1][:top]:
            yield class_names[index], float(prediction.probabilities[index])


if __name__ == "__main__":
    main()
