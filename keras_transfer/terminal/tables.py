"""Results of commands as tables."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from keras_transfer.advice.evidence import METHODS
from keras_transfer.evaluation.names import label
from keras_transfer.events import duration
from keras_transfer.findings.finding import Audit, counted
from keras_transfer.markup import printable
from keras_transfer.reporting.text_chart import text_chart
from keras_transfer.terminal.console import console, show_line

if TYPE_CHECKING:
    from keras_transfer.advice.ranking import RankResult
    from keras_transfer.evaluation.drift import Shift
    from keras_transfer.evaluation.metrics import Evaluation
    from keras_transfer.evaluation.thresholds import SureEvaluation
    from keras_transfer.runs.run import Run
    from keras_transfer.workflows.advise import Recommendation
    from keras_transfer.workflows.compare import RunComparison
    from keras_transfer.workflows.drift import RunDrift
    from keras_transfer.workflows.finetune import FinetuneResult
    from keras_transfer.workflows.fit import FitResult
    from keras_transfer.workflows.leaderboard import ListedRun
    from keras_transfer.workflows.search import SearchResult


_MOST_CLASSES = 30
_ENDING = 6  # lines of `kt advise` below the chart, if the command takes three

_SEVERITY_COLORS = {"high": "bold red", "medium": "yellow", "low": "cyan"}


def show_run(result: "FitResult") -> None:
    """Shows the result of `kt fit`; its notes were shown as they were made."""
    run, manifest = result.run, result.run.manifest
    for place, (name, found) in enumerate(result.evaluations.items()):
        if place == 0:
            show_evaluation(found, label(name))
        else:
            console.print(f"{label(name)}: {found}")
    if manifest.abstention:
        console.print(str(manifest.abstention))
    if result.sure:
        console.print("Of the test images:")
        show_sure(result.sure, result.evaluations["test"].images)
    if manifest.skipped:
        console.print(
            f"- Left out: {manifest.skipped:,}, see {run.run_dir / 'skipped.csv'}",
        )
    seconds = manifest.timings
    waited = ""
    if count := manifest.images_decoded:
        waited = (
            f" ({seconds['decode']:.1f} s waiting for {counted(count, 'image')} to be "
            f"read, {seconds['forward']:.1f} s computing)"
        )
    console.print(
        f"Time: features {seconds['features']:.1f} s{waited}, head "
        f"{seconds['head']:.1f} s, model {seconds['model']:.1f} s, total "
        f"{seconds['total']:.1f} s.",
    )
    if run.name != run.config.name:
        console.print(
            f"- Another process took or changed {run.config.name} meanwhile, which "
            f"stays as it is; this run is {run.name}"
        )
    console.print(f"Run: {run.run_dir}")
    _show_page(run)
    audit = Audit.from_json(run.audit_path.read_bytes())
    if any(one.suspects for one in audit.at_least("medium")):
        data = shlex.quote(manifest.data)
        console.print(f"kt audit {data} shows which images were found.")
    quoted = shlex.quote(str(run.run_dir))
    console.print(
        f"Next: kt predict {quoted} IMAGE..., or kt unfreeze-and-finetune {quoted}"
    )


def show_finetuning(result: "FinetuneResult") -> None:
    """Shows the result of `kt unfreeze-and-finetune`, one row per phase."""
    run, report = result.run, result.report
    _show_phases(result)
    reason = f"{report.reason[:1].upper()}{report.reason[1:]}."
    console.print(reason, soft_wrap=not console.is_terminal)
    if report.p_value is not None:
        console.print(
            "p is the probability that chance alone gives at least such a gain. Test "
            "images do not decide, so that their figures stay honest."
        )
    if not report.kept:
        console.print("Of the fine-tuned model that was not kept:")
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
        f"Trained {counted(report.trained_parameters, 'parameter')} ({groups}) for "
        f"{counted(report.epochs, 'epoch')}, {weights}; alpha "
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
    _show_page(run)
    quoted = shlex.quote(str(run.run_dir))
    console.print(f"Next: kt predict {quoted} IMAGE..., or kt export {quoted}")


def _show_page(run: "Run") -> None:
    if run.report_path.is_file():
        console.print(f"Page: {run.report_path}")


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
    for column in ("phase", "images", f"{label(report.metric)} (95% interval)"):
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
            cells = [label(split), *figures]
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
    figures.add_column("metric")
    figures.add_column("value (95% interval)")
    for row in found.table():
        figures.add_row(*row)
    console.print(figures)
    table = Table(box=None, pad_edge=False)
    table.add_column("class")
    table.add_column("recall (95% interval)")
    for column in ("precision", "F1", "images"):
        table.add_column(column, justify="right")
    classes = found.classes
    worst = {*found.worst_first()[:_MOST_CLASSES]}
    shown = [name for name in classes if name in worst]
    for name in sorted(shown, key=lambda name: not classes[name].support):
        one = classes[name]
        cells = (one.describe(x) for x in ("recall", "precision", "f1"))
        table.add_row(name, *cells, f"{one.support:,}")
    console.print(table)
    if len(classes) > len(worst):
        console.print(f"(the {len(worst)} worst of {len(classes)} classes)")


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
        f"{counted(found.images, 'new image')} beside {found.reference_images:,} of "
        f"the run ({found.reference})"
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


def show_audit(found: Audit, folder: Path, fix: Path | None) -> None:
    """Shows what an audit found, the worst first, and what to do next.

    Args:
        found: The audit.
        folder: Directory with its table and its page.
        fix: The cleaned table; None if there is none.
    """
    from keras_transfer.findings.cleaned import count_marked

    findings = found.findings
    console.print(
        f"{counted(found.images, 'image')} of "
        f"{counted(len(found.class_counts), 'class', 'classes')}: "
        f"{counted(len(findings), 'finding')}"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("severity", no_wrap=True)
    table.add_column("images", justify="right", no_wrap=True)
    table.add_column("finding", overflow="fold")
    for one in findings:
        color = _SEVERITY_COLORS[one.severity]
        count = f"{len(one.suspects):,}" if one.suspects else ""
        words = Text.assemble(
            (printable(one.kind), "bold"), f": {printable(one.message)}"
        )
        table.add_row(Text(one.severity, style=color), count, words)
    if findings:
        console.print(table)
    for note in found.notes:
        console.print(f"- {note}")
    console.print(f"Page: {folder / 'report.html'}, table: {folder / 'audit.csv'}")
    if fix and (marked := count_marked(fix)):
        rows = "row" if marked == 1 else f"{marked:,} rows"
        console.print(
            f"Next: look at the {rows} with a `suspect`, delete or relabel them, then: "
            f"kt fit {shlex.quote(str(fix))}"
        )
    elif fix:
        console.print(f"Next: kt fit {shlex.quote(str(fix))}")
    elif findings:
        console.print(
            "Next: look at the page, or write a cleaned table with --fix FILE"
        )


def show_recommendation(found: "Recommendation") -> None:
    """Shows the result of `kt advise`; the last line is the command to run.

    The learning curve is drawn only where everything fits on the screen with it.
    """
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for one in found.advice:
        table.add_row(Text(one.rule, style="bold"), printable(one.message))
    console.print(table)
    points = [(f"{share:.0%}", one) for share, one in found.evidence.curve.items()]
    chart = text_chart(points, console.encoding).splitlines()
    height = len(console.render_lines(table)) + len(chart) + _ENDING
    if not console.is_terminal or height <= console.height:
        figure = label(found.evidence.metric)
        console.print(
            f"{figure} of a probe by share of the training images, with 95% intervals:"
        )
        for line in chart:
            console.print(line)
    console.print(
        f"Recommended: {METHODS[found.method]}. Why: {found.reason}.",
        soft_wrap=not console.is_terminal,
    )
    console.print(found.command, soft_wrap=True)


def show_runs(found: "Sequence[ListedRun]") -> None:
    """Shows the result of `kt runs`; what cannot be read comes last, and why."""
    listed = [one for one in found if not one.problem]
    metrics = {one.metric for one in listed if one.figure}
    is_one = len(metrics) == 1
    figure = f"{label(min(metrics)) if is_one else 'figure'} (95% interval)"
    columns: dict[str, list[str]] = {
        "run": [one.run_dir.name for one in listed],
        "data": [Path(one.data).name or one.data for one in listed],
        "base": [one.base for one in listed],
        "phase": [one.phase for one in listed],
        figure: [
            (f"{label(one.metric)} " if one.figure and not is_one else "")
            + (one.figure or "none")
            for one in listed
        ],
        "images": [
            f"{one.images:,} {label(one.split)}" if one.split else "" for one in listed
        ],
        "MB": [f"{one.size / 1e6:,.1f}" for one in listed],
        "img/s": [
            f"{speed:,.0f}" if (speed := one.images_per_second) else ""
            for one in listed
        ],
        "date": [one.created[:16].replace("T", " ") for one in listed],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    too_wide = _leave_out(columns, ("base", "data", "img/s", "MB", "date"))
    table = Table(box=None, pad_edge=False)
    for name in columns:
        at_right = name in ("images", "MB", "img/s", "date")
        table.add_column(
            name,
            justify="right" if at_right else "left",
            no_wrap=name != "run",
            overflow="fold",
        )
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    if listed:
        console.print(table)
    if too_wide:
        console.print(f"(a wider terminal shows more: {', '.join(too_wide)})")
    for one in found:
        if one.problem:
            console.print(f"{one.run_dir.name}: {one.problem}")
    if not found:
        console.print("No runs.")


def _leave_out(columns: dict[str, list[str]], order: Sequence[str]) -> list[str]:
    """Removes columns, in this order, until a table fits; returns their names."""

    def width() -> int:
        cells = (max(map(cell_len, (name, *x))) for name, x in columns.items())
        return sum(cells) + len(columns) - 1

    removed = []
    for name in order:
        if width() > console.width and columns.pop(name, []):
            removed.append(name)
    return removed


def show_comparison(found: "RunComparison") -> None:
    """Shows the result of `kt runs compare`."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column(f"{label(found.metric)} (95% interval)")
    for name, figures in zip(found.names, (found.first, found.second), strict=True):
        table.add_row(name, figures.describe(found.metric))
    console.print(table)
    console.print(
        f"Difference (95% interval): {found.described_difference} on "
        f"{counted(found.first.images, 'common test image')}, p = {found.p_value:.3g}"
    )
    for reason, count in found.left_out.items():
        images = counted(count, "test image")
        console.print(f"Left out: {images} of {found.names[0]} {reason}")
    console.print(found.sentence)


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


def show_search(result: "SearchResult") -> None:
    """Shows the leaderboard of `kt search`, and the run that was made."""
    outcomes = result.outcomes
    table = Table(box=None, pad_edge=False)
    table.add_column("way", overflow="fold")
    name, listed = label(outcomes[0].metric), result.listed
    table.add_column(f"{name} out of fold (95% interval)", overflow="fold")
    for column in ("time", "MB", "ms an image"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for one in outcomes:
        table.add_row(
            printable(str(one.way)),
            printable(one.problem) or one.figure,
            duration(one.seconds),
            f"{one.megabytes:,.1f}" if one.megabytes else "",
            f"{one.milliseconds:,.1f}" if one.milliseconds else "",
            "<- none is both faster and better" if one in result.front else "",
        )
    console.print(table)
    if any(one.way.tuning is not None for one in outcomes):
        console.print(
            "With fine-tuning: the figure of the head, and what it is expected to add."
        )
    usable = [one for one in outcomes if not one.problem]
    tuning = result.run.manifest.finetune
    if usable[1:]:
        console.print(f"The best of {len(usable)} ways flatters itself a little.")
    if outcomes[0].trial and tuning:
        console.print(f"In the run, {tuning.reason}")
    if listed.value is not None:
        figure = f"{label(listed.metric)} {listed.figure}"
        note = ", looked at in the end only" if listed.split == "test" else ""
        console.print(f"{label(listed.split).capitalize()}{note}: {figure}")
    console.print(f"Run: {result.run.run_dir}")
    _show_page(result.run)


def show_bases(rows: Sequence[Mapping[str, Any]]) -> None:
    """Shows the table of bases, and where its figures of accuracy are from."""
    table = Table(box=None, pad_edge=False)
    table.add_column("base", no_wrap=True)
    for column in ("parameters", "image size", "ImageNet top-1", "img/s here"):
        table.add_column(column, justify="right")
    table.add_column("input scaling")
    table.add_column("ImageNet weights")
    sources = list(dict.fromkeys(row["top_1_source"] for row in rows))
    for row in rows:
        number = sources.index(row["top_1_source"]) + 1
        speeds = [
            one["images_per_second"]
            for one in row["throughput"]
            if one["image_size"] == row["image_size"]
        ]
        table.add_row(
            row["base"],
            f"{row['parameters']:,}",
            str(row["image_size"]),
            f"{row['top_1']:.1f} [{number}]" if row["top_1"] else "",
            f"{speeds[-1]:,.0f}" if speeds else "",
            row["scaling"],
            row["weights"],
        )
    console.print(table)
    for number, source in enumerate(sources, 1):
        if source:
            console.print(f"[{number}] {source}", markup=False)
    console.print(
        "Images per second are those that `kt rank` or `kt advise` measured on this "
        "machine last, without decoding."
    )


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


def show_sorted(directory: Path, counts: Mapping[str, int]) -> None:
    """Shows how many images were sorted into each folder, on stderr."""
    most = sorted(counts, key=lambda name: (-counts[name], name))
    shown = ", ".join(f"{name} {counts[name]:,}" for name in most[:_MOST_CLASSES])
    more = f" and {len(most) - _MOST_CLASSES} more" if most[_MOST_CLASSES:] else ""
    show_line(f"Sorted into {directory}: {shown or 'none'}{more}")
