"""A run's files, images and features -> the contents of its report page."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from keras_transfer.evaluation.names import label
from keras_transfer.events import duration
from keras_transfer.findings.finding import LABEL_ERRORS, Audit, counted
from keras_transfer.reporting.album import Album, predicted_images, relative_names
from keras_transfer.reporting.contents import (
    class_rows,
    confusion_of,
    figures_of,
    mistakes_and_doubts,
)
from keras_transfer.reporting.of_run import charts as run_charts
from keras_transfer.reporting.of_run.charts import Drawn
from keras_transfer.reporting.of_run.gallery import Galleries
from keras_transfer.reporting.of_run.record import Loaded, RunRecord
from keras_transfer.reporting.page import (
    Chart,
    FeatureMap,
    Findings,
    Finetuning,
    Page,
    Provenance,
    ShownFinding,
)
from keras_transfer.reporting.predictions import changes
from keras_transfer.reporting.summary import (
    WithoutPaths,
    asked,
    commands,
    data_name,
    found,
    stands_out,
)
from keras_transfer.reporting.thumbnails import SMALL, Thumbnail, make_thumbnails
from keras_transfer.runs.manifest import READS, FinetuneReport
from keras_transfer.runs.run import AUDIT

_MISTAKES, _DOUBTS = 12, 6  # cards of the galleries
MOST_PICTURE_BYTES = 2_900_000
"""Bytes of all pictures of a page: as text 3.9 MB of the 5 that it may have."""


@dataclass(frozen=True)
class ReportOptions:
    """What a report page has.

    Attributes:
        thumbnails: Largest number of pictures.
        images: Whether it has pictures.
        is_thorough: Whether it has what takes seconds: a t-SNE map.
    """

    thumbnails: int = 200
    images: bool = True
    is_thorough: bool = True

    @property
    def has_pictures(self) -> bool:
        """Whether pictures are wanted at all."""
        return self.images and self.thumbnails > 0


@dataclass(eq=False)
class RunPage:
    """Makes the contents of a page about a run.

    Attributes:
        record: What the run's files say.
        loaded: Its images, features and model, as far as there are any.
        options: What the page has.
    """

    record: RunRecord
    loaded: Loaded
    options: ReportOptions
    album: Album = field(default_factory=Album)

    def make(self) -> Page:
        """Makes the contents of the page."""
        record, album = self.record, self.album
        config = record.config
        plain = WithoutPaths([config.data, config.runs_dir, config.cache_dir])
        if record.kept is not None:
            album.names = relative_names(record.kept.sources.tolist())
            album.tell(predicted_images(record.kept, record.class_names))

        # Sections name their images first: their pictures are then read together.
        galleries = self._galleries()
        page = self._with_figures(Page("Report", record.name, _facts(record), ()))
        findings = None
        if record.audit is not None:
            findings = findings_of(record.audit, album, plain, AUDIT)
        tuned = self._finetuning(plain)
        feature_map = self._feature_map()
        pictures = self._pictures()
        return replace(
            page,
            summary=self._summary(page),
            images=album.shown(pictures),
            sets=album.sets,
            notes=tuple(plain(note) for note in self._notes()),
            curves=_charts(run_charts.curves(record)),
            galleries=galleries.shown(pictures),
            heat=galleries.heat,
            feature_map=feature_map,
            learning=_charts(run_charts.learning(record, self.loaded)),
            finetuning=tuned,
            findings=findings,
            provenance=provenance_of(record, plain),
        )

    def _notes(self) -> list[str]:
        """Says what the page lacks, and why."""
        notes = [*self.loaded.notes]
        if self.record.kept is None:
            notes.append(
                "There are no predictions of single images, and so neither a confusion "
                "matrix nor curves: the run was made by a version that kept none. "
                "Train it again to have them."
            )
        return notes

    def _with_figures(self, page: Page) -> Page:
        """Adds figures, the confusion matrix and the classes."""
        record, album, shown = self.record, self.album, self.record.shown
        if record.headline is None:
            return page
        learned = learned_shares(record)
        page = replace(
            page,
            headline=tuple(
                figures_of(one, record.what(name), learned)
                for name, one in record.evaluations.items()
            ),
        )
        if shown is None:
            return page
        multi, names = shown.targets.ndim == 2, record.class_names
        classes = record.evaluations[record.headline].classes
        limits = record.manifest.thresholds or {} if multi else None
        return replace(
            page,
            confusion=None if multi else confusion_of(shown, names, album),
            classes=class_rows(shown, names, classes, limits, album),
        )

    def _galleries(self) -> Galleries:
        """Chooses the mistakes and doubts to show, and explains them."""
        found = Galleries(self.album, self.record.manifest.multi_label)
        shown = self.record.shown
        if shown is None:
            return found
        # Every page of a run shows the same images: mean heat does not change.
        mistakes, doubts = mistakes_and_doubts(
            shown, self.record.thresholds, _MISTAKES, _DOUBTS
        )
        found.add(
            "Most confident mistakes",
            "Wrong, and sure of it: wrong labels and images that mislead come first.",
            shown.select(mistakes),
        )
        found.add(
            "Least sure",
            "Where the model could as well have decided otherwise.",
            shown.select(doubts),
        )
        loaded = self.loaded
        if self.options.has_pictures and loaded.splits and loaded.model is not None:
            found.explain(loaded.model, loaded.splits.read, loaded.changed)
        return found

    def _finetuning(self, plain: WithoutPaths) -> Finetuning | None:
        tuned = self.record.manifest.finetune
        if tuned is None:
            return None
        gained, lost = self._changes()
        return Finetuning(
            plain(f"{tuned.reason[:1].upper()}{tuned.reason[1:]}."),
            _tuning_facts(tuned),
            _charts(run_charts.tuning(self.record)),
            gained,
            lost,
        )

    def _changes(self) -> tuple[str, str]:
        """Finds the test images that fine-tuning gained and lost."""
        before, after = self.record.before, self.record.kept
        if before is None or after is None:
            return "", ""
        gained, lost = changes(
            before.select(before.how == "test"), after.select(after.how == "test")
        )
        title = "Test images that only {} gets right"
        album = self.album
        return (
            album.put("tuned-gained", title.format("the fine-tuned model"), gained),
            album.put("tuned-lost", title.format("the model before"), lost),
        )

    def _feature_map(self) -> FeatureMap | None:
        record, album = self.record, self.album
        found = run_charts.mapped(record, self.loaded, self.options.is_thorough)
        if found is None:
            return None
        kept, views = found
        # Mistakes come first if not all images can be named.
        numbers = np.full(len(kept), -1)
        for row in np.argsort(kept.is_right, kind="stable"):
            number = album.number(str(kept.sources[row]))
            numbers[row] = -1 if number is None else number
        named = numbers >= 0
        drawn = run_charts.maps(
            record,
            kept.select(named),
            [(name, points[named]) for name, points in views],
            numbers[named],
        )
        total = 0 if record.honest is None else len(record.honest)
        return FeatureMap(tuple(one.chart() for one in drawn), int(named.sum()), total)

    def _pictures(self) -> dict[str, Thumbnail]:
        """Makes the pictures that matter most."""
        loaded, album = self.loaded, self.album
        if not self.options.has_pictures or loaded.splits is None:
            return {}
        wanted = album.wanted(self.options.thumbnails, album.sources)
        sides = {
            source: album.first.get(source, SMALL)
            for source in wanted
            if source not in loaded.changed
        }
        return make_thumbnails(loaded.splits.read, sides, MOST_PICTURE_BYTES)

    def _summary(self, page: Page) -> tuple[str, ...]:
        record = self.record
        first = asked(record.manifest, record.config, *record.counts)
        if record.headline is None:
            return (first, "No image was held out to say how good the model is.")
        evaluation = record.evaluations[record.headline]
        figure = page.headline[0].figures[0]
        last = stands_out(evaluation, record.audit)
        sentences = (first, found(evaluation, figure, record.what(record.headline)))
        return (*sentences, last) if last else sentences


def _charts(drawn: Iterable[Drawn]) -> tuple[Chart, ...]:
    return tuple(one.chart() for one in drawn)


def learned_shares(record: RunRecord) -> np.ndarray:
    """Returns the share of each class in the training images, float `[num_classes]`."""
    counts = record.manifest.class_counts["train"]
    learned = np.array([counts[name] for name in record.class_names], float)
    return learned / max(learned.sum(), 1)


def findings_of(
    audit: Audit, album: Album, plain: WithoutPaths, table: str
) -> Findings:
    """Puts findings, which the file `table` lists, on a page with their images."""
    known = {x.path for one in audit.findings for x in one.suspects} | {*album.images}
    album.names |= relative_names(known)
    shown = []
    for number, one in enumerate(audit.findings):
        notes: dict[str, str] = {}
        for suspect in one.suspects:
            is_image = suspect.other in known
            said = "" if is_image else plain(suspect.other)
            if said and one.kind == LABEL_ERRORS:
                said = f"labeled {album.label(suspect.path)}, looks like {said}"
            notes[suspect.path] = notes.get(suspect.path) or said
            if is_image:
                notes.setdefault(suspect.other, "")
        title = f"{one.kind[:1].upper()}{one.kind[1:]}"
        key = album.put(f"finding-{number}", title, [*notes], [*notes.values()], table)
        shown.append(ShownFinding(title, one.severity, plain(one.message), key))
    return Findings(tuple(shown), tuple(plain(note) for note in audit.notes))


def provenance_of(record: RunRecord, plain: WithoutPaths) -> Provenance:
    """Says where a run came from and how to repeat it."""
    manifest, config = record.manifest, record.config
    facts = {
        "Data": data_name(config),
        "Data fingerprint": manifest.data_fingerprint[:16],
        "Left out": counted(manifest.skipped, "image"),
        "Base": manifest.base,
        "Weights": os.path.basename(manifest.weights),
        "Weights digest": " + ".join(
            digest[:16] for digest in manifest.weights_digest.split("+")
        ),
        "Image size": f"{manifest.image_size} pixels",
        "Head reads": READS[manifest.features],
        "Head": f"{config.head.kind}, L2 strength {manifest.l2:.3g}",
        "Seed": str(manifest.seed),
        "Arithmetic": f"{manifest.precision} ({manifest.engine})",
        "Machine": ", ".join(
            counted(int(value), "core") if name == "cpu_cores" else str(value)
            for name, value in manifest.host.items()
        ),
        "Made": made_at(manifest.created),
        "Time": duration(manifest.timings.get("total", 0.0)),
    }
    notes = [*manifest.notes, *(manifest.finetune.notes if manifest.finetune else ())]
    return Provenance(
        tuple(facts.items()),
        tuple(manifest.versions.items()),
        tuple(plain(note) for note in notes),
        commands(config, manifest, record.name),
    )


def made_at(created: str) -> str:
    """Formats a UTC time in ISO 8601 so that it is easy to read."""
    return f"{created[:16].replace('T', ' ')} UTC"


def _facts(record: RunRecord) -> tuple[str, ...]:
    manifest = record.manifest
    images, _ = record.counts
    kind = ("label",) if manifest.multi_label else ("class", "classes")
    phase = ", fine-tuned" if manifest.phase == "finetune" else ""
    return (
        data_name(record.config),
        counted(images, "image"),
        counted(len(record.class_names), *kind),
        f"{manifest.base}{phase}",
        manifest.created[:10],
    )


def _tuning_facts(tuned: FinetuneReport) -> tuple[tuple[str, str], ...]:
    facts = {
        "kept": "yes" if tuned.kept else "no",
        "trained from": tuned.split_point,
        "trained weights": f"{tuned.trained_parameters:,}",
        "epochs": f"{tuned.epochs} (best: {tuned.best_epoch})",
        "mix with the weights before": f"{tuned.alpha:.3g}",
        "attempts": str(tuned.attempts),
    }
    if tuned.p_value is not None:
        facts["p-value of the gain"] = f"{tuned.p_value:.2g}"
    if tuned.before is not None and tuned.after is not None:
        name = label(tuned.metric)
        facts[f"{name} on {counted(tuned.deciding_images, 'deciding image')}"] = (
            f"{tuned.before:.3f} → {tuned.after:.3f}"
        )
    return tuple(facts.items())
