"""What an audit finds: findings by severity, each with the images it is about."""

import json
from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from keras_transfer.markup import html_table
from keras_transfer.runs.files import csv_text

LABEL_ERRORS = "label errors"
"""Kind of the finding whose suspects look like another class, their `other`."""

Severity = Literal["high", "medium", "low"]

SEVERITIES: dict[Severity, str] = {
    "high": "makes figures untrue",
    "medium": "makes the model worse",
    "low": "deserves a look",
}
"""What each means, from the worst on. Copies of test images among the training images
are of high severity, for example."""

_RANKS = {severity: rank for rank, severity in enumerate(SEVERITIES)}


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Says how many there are, such as `1 image` or `2 images`.

    Args:
        count: Their number.
        noun: What one is called.
        plural: What several are called; None for the noun with an s.
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


class Suspect(BaseModel):
    """An image that a finding is about."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    """The image's source, as in splits.csv."""
    score: float | None = None
    """How sure the finding is of this image, from 0 to 1, or the measured number that
    its message names; None if there is nothing to measure."""
    other: str = ""
    """With whom: another image's source, a class, or a value; "" for nobody."""


class Finding(BaseModel):
    """One thing that an audit found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    """What it is, in words that are short and the same in every audit, such as
    `near duplicates across splits`."""
    severity: Severity
    """How much it matters."""
    message: str
    """Sentences that say what was found, with its numbers, and what to do."""
    suspects: tuple[Suspect, ...] = ()
    """The images, most suspicious first; none if it is about the data as a whole."""
    figures: dict[str, float] = {}
    """The measured numbers by name, such as `accuracy`, `low` and `high`."""


class Audit(BaseModel):
    """The result of an audit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    """The DATA argument; folders and files as absolute paths."""
    images: int
    """Number of usable images."""
    class_counts: dict[str, int]
    """Number of usable images by class name, in all splits together."""
    findings: tuple[Finding, ...]
    """What was found, the worst first."""
    notes: tuple[str, ...] = ()
    """What was not looked at, and why, a line each."""

    @classmethod
    def of(
        cls,
        data: str,
        class_counts: dict[str, int],
        images: int,
        findings: Iterable[Finding],
        notes: Sequence[str] = (),
    ) -> "Audit":
        """Creates an audit whose findings are sorted by severity."""
        ordered = sorted(findings, key=lambda one: _RANKS[one.severity])
        return cls(
            data=data,
            images=images,
            class_counts=class_counts,
            findings=tuple(ordered),
            notes=tuple(notes),
        )

    def _repr_html_(self) -> str:
        """What notebooks show: the findings, the worst first, and the notes."""
        rows = [
            (
                one.severity,
                one.kind,
                one.message,
                f"{len(one.suspects):,}" if one.suspects else "",
            )
            for one in self.findings
        ]
        caption = (
            f"{counted(len(rows), 'finding')} in {counted(self.images, 'image')} "
            f"of {self.data}"
        )
        header = ("severity", "finding", "", "images")
        notes = [("note", text) for text in self.notes]
        return html_table(caption, header, rows) + (
            html_table("Not looked at", (), notes) if notes else ""
        )

    def at_least(self, severity: Severity) -> list[Finding]:
        """Returns the findings that are at least this severe."""
        most = _RANKS[severity]
        return [x for x in self.findings if _RANKS[x.severity] <= most]

    def to_json(self) -> str:
        """Formats audit.json as ASCII, since not every path is valid UTF-8."""
        return json.dumps(self.model_dump(), indent=1) + "\n"

    @classmethod
    def from_json(cls, content: bytes) -> "Audit":
        """Reads what `to_json` wrote, which pydantic's own reader would not take.

        Raises:
            ValueError: If it is damaged.
        """
        return cls.model_validate(json.loads(content))

    def to_csv(self) -> str:
        """Formats audit.csv: a line for each image of each finding.

        The columns are path, finding, severity, score and with. Findings about the data
        as a whole are not in it.
        """
        rows = (
            (
                one.path,
                found.kind,
                found.severity,
                "" if one.score is None else f"{one.score:.4f}",
                one.other,
            )
            for found in self.findings
            for one in found.suspects
        )
        return csv_text(("path", "finding", "severity", "score", "with"), rows)
