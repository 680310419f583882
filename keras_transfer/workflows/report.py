"""The workflow of `kt report`: pages about runs, and their charts as files."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from keras_transfer.data.tables import label_text
from keras_transfer.errors import KerasTransferError, UsageError, first_line
from keras_transfer.events import SILENT, Listener
from keras_transfer.findings.finding import Audit, counted
from keras_transfer.findings.images import AuditedImages
from keras_transfer.reporting import charts
from keras_transfer.reporting.album import SHOWN_SEPARATOR, Album, relative_names
from keras_transfer.reporting.of_run import charts as run_charts
from keras_transfer.reporting.of_run.charts import Drawn
from keras_transfer.reporting.of_run.compared import (
    AgainstFirst,
    compared_page,
    distinct_names,
)
from keras_transfer.reporting.of_run.page import (
    MOST_PICTURE_BYTES,
    ReportOptions,
    RunPage,
    findings_of,
)
from keras_transfer.reporting.of_run.record import Loaded, RunRecord, load_run
from keras_transfer.reporting.page import Page, ShownImage, render
from keras_transfer.reporting.summary import WithoutPaths
from keras_transfer.reporting.thumbnails import SMALL, make_thumbnails
from keras_transfer.runs.files import check_output, replacing, write_atomic
from keras_transfer.runs.run import Run, committing, read_together
from keras_transfer.workflows.compare import compare_two

CHARTS = "charts"
"""Folder of a run with its charts as files."""

AUDIT_TABLE = "audit.csv"
"""File beside the page of an audit that lists its findings."""

_NEXT_STEPS = (
    "audit.csv, beside this page, lists every image of every finding.",
    "kt audit DATA --fix cleaned.csv writes a table of the data without copies, with "
    "suspects marked, which kt fit reads.",
)
_STEPS = 3  # read the run, load images and model, draw and write
_MOST_IN_NAME = 3  # runs that the name of a page names
_LONGEST_NAME = 80  # characters; file systems take 255 bytes, up to 3 for each


def report_run(
    run: Run,
    options: ReportOptions = ReportOptions(),  # noqa: B008
    listener: Listener = SILENT,
    known: Loaded | None = None,
    output: Path | None = None,
) -> Path:
    """Writes the report page of a run.

    Args:
        run: The run.
        options: What the page has.
        listener: Receives progress if features are computed again, and the artifact.
        known: Images, features and model, as far as they are in memory; the others are
            loaded.
        output: The file to write; None for report.html in the run.

    Returns:
        The file.

    Raises:
        KerasTransferError: If a file of the run is damaged, or another process changed
            the run meanwhile.
    """
    record, loaded = _load(run, listener, known)
    html = render(RunPage(record, loaded, options).make())
    path = output or run.report_path
    if output is None:
        with committing(run.run_dir, record.identity):
            write_atomic(path, html)
    else:
        write_atomic(path, html)
    listener.progress("report", _STEPS, _STEPS)
    listener.artifact(path, "report")
    return path


def _load(
    run: Run, listener: Listener, known: Loaded | None = None
) -> tuple[RunRecord, Loaded]:
    """Reads a run's files, and loads what is not known, which takes seconds."""
    listener.progress("report", 0, _STEPS)
    record = read_together(run, lambda: RunRecord.of(run))
    listener.progress("report", 1, _STEPS)
    loaded = load_run(run, record, listener, known=known)
    listener.progress("report", 2, _STEPS)
    return record, loaded


def report_phase(run: Run, listener: Listener, known: Loaded) -> None:
    """Writes the report page at the end of a phase, without what takes seconds.

    The run is complete by then: if the page cannot be written, that is a note.

    Args:
        run: The run.
        listener: Receives the artifact.
        known: As in `report_run`.
    """
    try:
        report_run(run, ReportOptions(is_thorough=False), listener, known)
    except Exception as error:  # whatever it is, the model is there and must stay
        listener.note(
            f"There is no report page: {first_line(error)}. kt --debug report "
            f"{shlex.quote(str(run.run_dir))} shows where"
        )


def report_runs(
    runs: Sequence[Run],
    options: ReportOptions = ReportOptions(),  # noqa: B008
    listener: Listener = SILENT,
    output: Path | None = None,
) -> Path:
    """Writes a page that shows several runs side by side.

    Args:
        runs: The runs, at least two.
        options: What the page has.
        listener: Receives the artifact.
        output: The file to write; None for one in the working directory, named after
            the runs: report-RUN-RUN.html, or report-RUN-and-6-more.html.

    Returns:
        The file.

    Raises:
        UsageError: If the file cannot be written.
        KerasTransferError: If a file of a run is damaged.
    """
    path = output or Path(_file_name([run.run_dir.resolve().name for run in runs]))
    check_output(path)
    records = [read_together(run, partial(RunRecord.of, run)) for run in runs]
    names = distinct_names(records)
    others = [
        _against(runs[0], run, (names[0], name))
        for run, name in zip(runs[1:], names[1:], strict=True)
    ]
    first = load_run(runs[0], records[0], listener, images_only=True)
    html = render(compared_page(records, names, others, first, options))
    write_atomic(path, html)
    listener.artifact(path, "report")
    return path


def _file_name(names: Sequence[str]) -> str:
    """Names a page after its runs, or after the first if there are many."""
    name = f"report-{'-'.join(names)}.html"
    if len(names) > _MOST_IN_NAME or len(name) > _LONGEST_NAME:
        name = f"report-{names[0][:_LONGEST_NAME]}-and-{len(names) - 1}-more.html"
    return name


def _against(first: Run, other: Run, names: tuple[str, str]) -> AgainstFirst:
    """Compares a run with the first one of a page; `names` are those on the page."""
    try:
        found = replace(compare_two(first, other), names=names)
    except KerasTransferError as error:
        return AgainstFirst(f"{names[1]} cannot be compared with {names[0]}: {error}")
    text = f"Difference of {names[1]} from {names[0]}: {found}"
    if found.left_out:
        reasons = ", ".join(f"{count:,} {why}" for why, count in found.left_out.items())
        text += f" Of the test images of {names[0]}, {reasons} and do not count."
    return AgainstFirst(text, found.gained, found.lost)


def draw_run(
    run: Run,
    options: ReportOptions = ReportOptions(),  # noqa: B008
    listener: Listener = SILENT,
    output: Path | None = None,
) -> Path:
    """Writes the charts of a run's page as PNG files.

    Args:
        run: The run.
        options: Whether to draw what takes seconds.
        listener: Receives progress if features are computed again, and each file.
        output: The folder; None for `charts` in the run.

    Returns:
        The folder.

    Raises:
        UsageError: If the folder is something else.
        KerasTransferError: If a file of the run is damaged.
    """
    record, loaded = _load(run, listener)
    for note in loaded.notes:
        listener.note(note)
    folder = output or run.run_dir / CHARTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UsageError(
            f"output names a folder for the charts. Received: output={folder}, which "
            "is none. Name another."
        ) from None
    for drawn in _all_charts(record, loaded, options):
        path = folder / f"{drawn.name}.png"
        with replacing(path) as file:
            charts.save_png(drawn.figure, file)
        listener.artifact(path, "chart")
    listener.progress("report", _STEPS, _STEPS)
    return folder


def _all_charts(
    record: RunRecord, loaded: Loaded, options: ReportOptions
) -> Iterator[Drawn]:
    yield from run_charts.by_class(record)
    yield from run_charts.curves(record)
    yield from run_charts.learning(record, loaded)
    yield from run_charts.tuning(record)
    if found := run_charts.mapped(record, loaded, options.is_thorough):
        yield from run_charts.maps(record, *found)


def audit_page(
    audit: Audit,
    images: AuditedImages,
    probabilities: np.ndarray | None = None,
    thumbnails: int = 200,
) -> str:
    """Makes a page about an audit of data, without a run.

    Args:
        audit: The audit.
        images: The images that were looked at.
        probabilities: float32 `[N, num_classes]` out-of-fold probabilities, NaN for
            images without; None without any.
        thumbnails: Largest number of pictures.

    Returns:
        The HTML.
    """
    plain = WithoutPaths([audit.data])
    album = Album(names=relative_names(images.table.sources))
    album.tell(_labeled(images, probabilities))
    findings = replace(
        findings_of(audit, album, plain, AUDIT_TABLE), next_steps=_NEXT_STEPS
    )
    sides = dict.fromkeys(album.wanted(thumbnails), SMALL)
    pictures = make_thumbnails(images.read, sides, MOST_PICTURE_BYTES)
    name = plain(audit.data)
    return render(
        Page(
            kind="Audit",
            title=name,
            facts=(
                counted(audit.images, "image"),
                counted(
                    len(audit.class_counts),
                    *(("label",) if images.multi_label else ("class", "classes")),
                ),
            ),
            summary=_audited(audit, name),
            images=album.shown(pictures),
            sets=album.sets,
            findings=findings,
        )
    )


def _audited(audit: Audit, name: str) -> tuple[str, ...]:
    """Says what an audit was asked and what it found, a sentence each."""
    high, total = len(audit.at_least("high")), len(audit.findings)
    were = "was" if audit.images == 1 else "were"
    first = f"{counted(audit.images, 'image')} of {name} {were} looked at."
    if not total:
        return first, "Nothing was found that needs a look."
    are = "is" if total == 1 else "are"
    second = f"There {are} {counted(total, 'finding')}, {high:,} of high severity."
    worst = audit.findings[0]
    return first, second, f"The first: {worst.kind}."


def _labeled(
    images: AuditedImages, probabilities: np.ndarray | None
) -> dict[str, ShownImage]:
    """Describes audited images by their labels and, if known, predictions."""
    names, found = images.class_names, {}
    for row, source in enumerate(images.table.sources):
        target = images.table.targets[row]
        label = label_text(target, names, SHOWN_SEPARATOR)
        one = ShownImage(source, label)
        if probabilities is not None and np.isfinite(probabilities[row]).all():
            best = int(probabilities[row].argmax())
            one = ShownImage(
                source,
                label,
                names[best],
                float(probabilities[row, best]),
                bool(target[best] if images.multi_label else target == best),
            )
        found[source] = one
    return found
