"""The workflow of `kt audit`: what is wrong with images, labels and splits."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from keras_transfer.data.listing import list_data
from keras_transfer.data.splitting import keep_old_splits
from keras_transfer.data.tables import Listing, Splits, count_classes
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.evaluation.crossvalidation import FOLDS
from keras_transfer.events import SILENT, Listener
from keras_transfer.features.base import frozen_base
from keras_transfer.features.frozen_part import (
    FrozenFeatures,
    Storage,
    frozen_features,
)
from keras_transfer.features.usable import tell_of_unusable
from keras_transfer.findings.borders import border_findings
from keras_transfer.findings.classes import (
    class_findings,
    single_group_findings,
    training_groups,
)
from keras_transfer.findings.cleaned import cleaned_table
from keras_transfer.findings.duplicates import Copies, copy_findings, find_copies
from keras_transfer.findings.exif import source_properties
from keras_transfer.findings.finding import Audit, Finding
from keras_transfer.findings.groups import united_groups
from keras_transfer.findings.images import FEWEST_IMAGES, AuditedImages
from keras_transfer.findings.label_errors import (
    INSTALL,
    can_find_label_errors,
    judged_images,
    label_error_findings,
)
from keras_transfer.findings.odd_files import (
    FEWEST_COMPARED,
    UNUSABLE,
    odd_file_findings,
    unusable_findings,
)
from keras_transfer.findings.outliers import outlier_findings
from keras_transfer.findings.shortcuts import shortcut_findings
from keras_transfer.findings.sources import source_findings
from keras_transfer.reporting.predictions import PredictedTable
from keras_transfer.runs.files import write_atomic
from keras_transfer.training.out_of_fold import out_of_fold_probabilities
from keras_transfer.workflows.inputs import Inputs
from keras_transfer.workflows.report import AUDIT_TABLE, audit_page

AUDIT_PAGE = "report.html"


@dataclass(frozen=True, eq=False, repr=False)
class AuditedData:
    """An audit, with what its report and a cleaned table are made from.

    Attributes:
        audit: What was found.
        images: The N images.
        copies: Which of them are copies of one another.
        probabilities: float32 `[N, C]` by heads that did not learn from the image; rows
            of NaN for images without.
    """

    audit: Audit
    images: AuditedImages
    copies: Copies
    probabilities: np.ndarray


def audit_data(
    inputs: Inputs,
    listener: Listener,
    output: Path | None = None,
    fix: Path | None = None,
) -> Audit:
    """Implements `api.audit`.

    Args:
        inputs: Checked inputs.
        listener: Receives notes, progress and artifacts.
        output: Directory for audit.csv and report.html; None writes neither.
        fix: CSV file for the cleaned table; None writes none.

    Raises:
        UsageError: If the data are not valid, or `fix` is given for images that are
            not files, or is the audit.csv of `output`.
        KerasTransferError: If none of the images can be used, or the weights cannot.
    """
    if fix and inputs.splits.root is None:
        raise UsageError(
            "Only images in files can be listed in a cleaned table. Received: "
            f"fix={fix} and {inputs.config.data}. Leave out fix."
        )
    if fix and output and fix.resolve() == (output / AUDIT_TABLE).resolve():
        raise UsageError(
            f"fix would be replaced by the findings. Received: fix={fix}, and output="
            f"{output}. Name another file."
        )
    # Listed before it takes minutes, in which files may vanish.
    listing = _listing(inputs) if fix else None
    found = look_at_data(inputs, listener)
    if fix and listing:
        _write_cleaned(found, listing, fix, listener)
    if output:
        _write_report(found, output, listener)
    return found.audit


def look_at_data(inputs: Inputs, listener: Listener) -> AuditedData:
    """Looks for everything that an audit looks for; writes nothing but the cache.

    Args:
        inputs: Checked inputs.
        listener: Receives progress.

    Raises:
        KerasTransferError: If none of the images can be used, or the weights cannot.
    """
    config = inputs.config

    # The images of all splits, with the features that `kt fit` uses as well.
    part = frozen_base(config)
    storage = Storage(config.precision, quality=True)
    features = frozen_features(part, inputs.splits, 0, storage, listener)
    skipped = features.extraction.skipped
    splits = inputs.splits.keep(features.extraction.digests)
    images = AuditedImages.of(splits, features)
    if not len(images):
        tell_of_unusable(features.extraction, listener)
        raise KerasTransferError(
            f"None of the {len(skipped):,} images can be used. Received: {config.data}."
        )

    # No image is predicted by a head that learned from a copy of it.
    copies = find_copies(images, listener)
    apart = _grouped(images, copies)
    probabilities = out_of_fold_probabilities(
        apart.table, apart.features, len(images.class_names), config.seed, listener
    )
    findings = [
        *unusable_findings(skipped),
        *copy_findings(images, copies),
        *odd_file_findings(images),
        *class_findings(images, probabilities),
        *single_group_findings(apart),
        *outlier_findings(apart, config.seed),
    ]
    notes = [*splits.warnings, *copies.notes]
    if _has_classes(images):
        findings += _of_classes(apart, probabilities, config.seed, notes)
        findings += border_findings(apart, splits, part, config, listener)
    else:
        notes.append(
            "Label errors and shortcuts were not looked for: all images are of one "
            "class."
        )
    notes += _not_looked_at(images)
    audit = Audit.of(config.data, _class_counts(images), len(images), findings, notes)
    return AuditedData(audit, images, copies, probabilities)


def quick_audit(
    data: str,
    listed: Splits,
    usable: Splits,
    features: FrozenFeatures,
    predicted: Sequence[PredictedTable],
    seed: int,
    listener: Listener,
) -> Audit:
    """Looks for what is found in a second, and notes what matters.

    Args:
        data: The DATA argument.
        listed: All images; what their warnings say is not noted again.
        usable: The images that have features.
        features: Their features, with quality measures.
        predicted: Predictions of some of the images.
        seed: Seed of random choices.
        listener: Receives notes and progress.
    """
    images = AuditedImages.of(usable, features)
    rows = {source: row for row, source in enumerate(images.table.sources)}
    shape = len(images), len(images.class_names)
    probabilities = np.full(shape, np.nan, np.float32)
    for part in predicted:
        if part.how != "fitted":
            places = [rows[source] for source in part.table.sources]
            probabilities[places] = part.probabilities
    findings = [
        *unusable_findings(features.extraction.skipped),
        *cheap_findings(images, probabilities, seed, listener),
    ]
    audit = Audit.of(data, _class_counts(images), len(images), findings)
    told = {UNUSABLE, "groups divided between splits"}  # `fit` counts the former
    if usable.absent_classes() == listed.absent_classes():
        told |= {"classes absent from train", "classes absent from test"}
    for finding in audit.at_least("medium"):
        if finding.kind not in told:
            listener.note(finding.message + _example(finding, rows))
    return audit


def _example(finding: Finding, sources: Collection[str]) -> str:
    """Names the first image of a finding, and the one that it goes with, if any."""
    if not finding.suspects:
        return ""
    first = finding.suspects[0]
    other = f" and {first.other}" if first.other in sources else ""
    return f" Such as: {first.path}{other}."


def cheap_findings(
    images: AuditedImages,
    probabilities: np.ndarray,
    seed: int,
    listener: Listener = SILENT,
) -> list[Finding]:
    """Looks for what can be found without reading an image again or further packages.

    Args:
        images: The N images.
        probabilities: float32 `[N, C]` by models that did not learn from the image;
            rows of NaN for images without.
        seed: Seed of random choices.
        listener: Receives notes and progress.
    """
    copies = find_copies(images, listener, thorough=False)
    apart = _grouped(images, copies)
    if not images.multi_label:
        # What learned no image of the class, out of fold no other group, is not right.
        groups = training_groups(apart)[images.table.targets]
        is_learned = groups > (images.split == "train")
        probabilities = np.where(is_learned[:, None], probabilities, np.nan)
    found = [
        *copy_findings(images, copies),
        *odd_file_findings(images),
        *class_findings(images, probabilities),
        *single_group_findings(apart),
    ]
    if _has_classes(images):
        accuracy = _accuracy(images, probabilities)
        found += shortcut_findings(apart, accuracy, seed)
    return found


def _of_classes(
    images: AuditedImages, probabilities: np.ndarray, seed: int, notes: list[str]
) -> list[Finding]:
    """Finds label errors and shortcuts, as far as features of whole images tell."""
    found = []
    if not can_find_label_errors():
        notes.append(INSTALL)
    elif not (known := judged_images(images, probabilities)).any():
        notes.append(
            "Label errors were not looked for: the images are too few, or of too few "
            "groups, to predict some from the others."
        )
    else:
        found += label_error_findings(images, probabilities)
        if not known.all():
            notes.append(
                f"Label errors were looked for among {known.sum():,} of "
                f"{len(images):,} images: no model knows the class of the others "
                "without having learned from them or their group."
            )
    units = {group or row for row, group in enumerate(images.table.groups)}
    if len(units) < FOLDS and len(images) >= FEWEST_IMAGES:
        notes.append(
            "Shortcuts were not looked for: the images are of too few groups; copies "
            "of an image are one."
        )
    accuracy = _accuracy(images, probabilities)
    made = source_properties(images, seed)
    found += shortcut_findings(images, accuracy, seed, made)
    return [*found, *source_findings(images, seed, made)]


def _not_looked_at(images: AuditedImages) -> Iterator[str]:
    """Says what is not looked for in so few images, and in multi-label data."""
    looks = [
        ("blurry images", FEWEST_COMPARED),
        ("outliers", FEWEST_IMAGES),
        *([("shortcuts", FEWEST_IMAGES)] if _has_classes(images) else []),
    ]
    few = [name for name, fewest in looks if len(images) < fewest]
    if few:
        named = " and ".join(filter(None, (", ".join(few[:-1]), few[-1])))
        yield f"{named.capitalize()} were not looked for: the images are too few."
    if images.multi_label:
        yield (
            "Classes that look alike, and sources on which a model would be worse, "
            "were not looked for: that takes images of one label each."
        )


def _grouped(images: AuditedImages, copies: Copies) -> AuditedImages:
    """Returns the images with copies in one group."""
    groups = united_groups(images.table.groups, copies.groups)
    return replace(images, table=replace(images.table, groups=tuple(groups)))


def _has_classes(images: AuditedImages) -> bool:
    """Returns whether the images differ in their targets."""
    return len(np.unique(images.table.targets, axis=0)) > 1


def _accuracy(images: AuditedImages, probabilities: np.ndarray) -> float | None:
    """Computes the share of right predictions; None if it is not known."""
    known = np.isfinite(probabilities).all(1)
    if images.multi_label or not known.any():
        return None
    said = probabilities[known].argmax(1)
    return float((said == images.table.targets[known]).mean())


def _class_counts(images: AuditedImages) -> dict[str, int]:
    counts = count_classes(images.table.targets, len(images.class_names))
    return dict(zip(images.class_names, counts.tolist(), strict=True))


def _write_report(found: AuditedData, output: Path, listener: Listener) -> None:
    """Writes audit.csv and report.html to a directory, replacing earlier ones."""
    output.mkdir(parents=True, exist_ok=True)
    page = audit_page(found.audit, found.images, found.probabilities)
    for name, text in ((AUDIT_TABLE, found.audit.to_csv()), (AUDIT_PAGE, page)):
        write_atomic(output / name, text)
        listener.artifact(output / name, "audit")


def _listing(inputs: Inputs) -> Listing:
    """Lists DATA in the order of DATA, with old splits."""
    listing = list_data(inputs.data, inputs.config)
    if inputs.config.splits.file is not None:
        keep_old_splits(listing, inputs.config.splits.file)
    return listing


def _write_cleaned(
    found: AuditedData, listing: Listing, fix: Path, listener: Listener
) -> None:
    """Writes the cleaned table of DATA."""
    file = fix.resolve()  # a link stays one; what it names is replaced
    cleaned = cleaned_table(
        listing, found.images, found.copies.groups, found.audit.findings, file.parent
    )
    write_atomic(file, cleaned.text)
    listener.note(f"Cleaned table: {cleaned}.")
    listener.artifact(fix, "table")
