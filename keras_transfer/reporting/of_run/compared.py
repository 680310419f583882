"""Several runs -> the contents of a page that shows them side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

from keras_transfer.evaluation.names import label
from keras_transfer.reporting.album import Album, predicted_images, relative_names
from keras_transfer.reporting.contents import class_figure, figures_of
from keras_transfer.reporting.of_run.page import (
    MOST_PICTURE_BYTES,
    ReportOptions,
    learned_shares,
    made_at,
)
from keras_transfer.reporting.of_run.record import Loaded, RunRecord
from keras_transfer.reporting.page import Compared, Figure, Page, percent
from keras_transfer.reporting.summary import WithoutPaths, data_name
from keras_transfer.reporting.thumbnails import SMALL, make_thumbnails
from keras_transfer.runs.manifest import READS

_NONE = Figure("", None)


@dataclass(frozen=True)
class AgainstFirst:
    """A run compared with the first one of a page.

    Attributes:
        text: What the comparison says, or why there is none.
        gained: Sources of images that only this run predicts correctly.
        lost: Sources of those that only the first run does.
    """

    text: str
    gained: Sequence[str] = ()
    lost: Sequence[str] = ()


def compared_page(
    records: Sequence[RunRecord],
    names: Sequence[str],
    others: Sequence[AgainstFirst],
    loaded: Loaded,
    options: ReportOptions,
) -> Page:
    """Makes the contents of a page about several runs.

    Args:
        records: What the files of each run say, at least two.
        names: Their `distinct_names`.
        others: Each run but the first, compared with the first.
        loaded: The images of the first.
        options: What the page has.
    """
    album = Album()
    for record in records:
        if record.kept is not None:
            album.tell(predicted_images(record.kept, record.class_names))
            album.names |= relative_names(record.kept.sources.tolist())
    plain = WithoutPaths(
        path
        for record in records
        for path in (record.config.data, record.config.runs_dir)
    )
    only = "Only {} gets these right; the predictions are those of {}"
    gained = tuple(
        (
            name,
            plain(one.text),
            album.put(f"gained-{number}", only.format(name, names[0]), one.gained),
            album.put(f"lost-{number}", only.format(names[0], names[0]), one.lost),
        )
        for number, (name, one) in enumerate(zip(names[1:], others, strict=True))
    )
    pictures = {}
    if options.has_pictures and loaded.splits is not None:
        sides = dict.fromkeys(album.wanted(options.thumbnails), SMALL)
        pictures = make_thumbnails(loaded.splits.read, sides, MOST_PICTURE_BYTES)
    return Page(
        kind="Comparison",
        title=" and ".join(names),
        facts=tuple(dict.fromkeys(data_name(record.config) for record in records)),
        summary=_summary(records, names),
        images=album.shown(pictures),
        sets=album.sets,
        notes=tuple(plain(note) for note in loaded.notes),
        compared=Compared(
            tuple(names), _rows(records), _settings(records), gained, *_classes(records)
        ),
    )


def distinct_names(records: Sequence[RunRecord]) -> list[str]:
    """Returns the names of runs; those in different folders may have to be numbered."""
    seen: dict[str, int] = {}
    found = []
    for name in (record.name for record in records):
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def _summary(records: Sequence[RunRecord], names: Sequence[str]) -> tuple[str, ...]:
    sentences = []
    for name, record in zip(names, records, strict=True):
        if record.headline is None:
            sentences.append(f"Nothing says how good {name} is.")
            continue
        one = record.evaluations[record.headline]
        value, ends = getattr(one, one.headline), one.intervals.get(one.headline)
        figure = percent(value) if value is not None else "unknown"
        if ends is not None:
            figure += f" (95% interval {percent(ends[0])} to {percent(ends[1])})"
        what = record.what(record.headline)
        sentences.append(f"{name}: {label(one.headline)} {figure} on {what}.")
    return tuple(sentences)


def _rows(
    records: Sequence[RunRecord],
) -> tuple[tuple[str, tuple[Figure, ...]], ...]:
    """Returns the figures of the first evaluation of each run, row by row."""
    tables = []
    for record in records:
        found: dict[str, Figure] = {}
        if record.headline is not None:
            evaluation = record.evaluations[record.headline]
            figures = figures_of(evaluation, "", learned_shares(record)).figures
            found = {figure.label: figure for figure in figures}
        tables.append(found)
    names = dict.fromkeys(name for table in tables for name in table)
    return tuple(
        (name, tuple(table.get(name, _NONE) for table in tables)) for name in names
    )


def _classes(
    records: Sequence[RunRecord],
) -> tuple[tuple[tuple[str, tuple[Figure, ...]], ...], str]:
    """Returns a figure of each class in each run, and what it is."""
    is_multi = any(record.manifest.multi_label for record in records)
    metric = "average_precision" if is_multi else "recall"
    tables = [
        record.evaluations[record.headline].classes if record.headline else {}
        for record in records
    ]
    rows = [
        (
            name,
            tuple(
                class_figure(table[name], metric) if name in table else _NONE
                for table in tables
            ),
        )
        for name in dict.fromkeys(x for one in records for x in one.class_names)
    ]
    return tuple(rows), label(metric).capitalize()


def _settings(
    records: Sequence[RunRecord],
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Lists the settings in which runs differ."""
    tables = []
    for record in records:
        config, manifest = record.config, record.manifest
        tables.append(
            {
                "data": data_name(config),
                "base": manifest.base,
                "phase": manifest.phase,
                "image size": str(manifest.image_size),
                "head": config.head.kind,
                "head reads": READS[manifest.features],
                "L2 strength": f"{manifest.l2:.3g}",
                "augmented views": str(config.augment),
                "how views are made": config.augment_policy,
                "class weights": str(config.head.class_weight),
                "folds": str(config.folds or "automatic"),
                "seed": str(manifest.seed),
                "images": f"{record.counts[0]:,}",
                "data fingerprint": manifest.data_fingerprint[:16],
                "evaluated on": record.what(record.headline)
                if record.headline
                else "nothing",
                "made": made_at(manifest.created),
            }
        )
    rows = ((key, tuple(table[key] for table in tables)) for key in tables[0])
    return tuple((key, values) for key, values in rows if len({*values}) > 1)
