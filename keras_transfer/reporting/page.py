"""The report page: contents -> one HTML file that needs nothing else.

`Page` holds everything that a page shows, as plain values; `render` makes the HTML.
Each part is optional: a section without content is not on the page.
"""

import base64
import hashlib
import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Literal

from keras_transfer.findings.finding import SEVERITIES, Severity
from keras_transfer.markup import printable
from keras_transfer.reporting.charts import theme_css
from keras_transfer.reporting.thumbnails import Thumbnail, heat_css

_MOST_SUSPECTS = 8  # whose pictures stand in the page; a button shows the others

_LONGEST_NAME = 64  # characters, which take four lines below a picture

_WHITE = str.maketrans("\t\n", "  ")


@dataclass(frozen=True)
class ShownImage:
    """An image that the page names.

    Attributes:
        name: Its relative path, or its id in the data.
        label: The class that it is labeled as, or several joined by `|`; "" if unknown.
        predicted: The predicted class, or several; "" without a prediction.
        confidence: Probability of the predicted class, from 0 to 1.
        is_right: Whether the prediction is the label; None without a prediction.
        thumbnail: Its picture, if the page has one.
    """

    name: str
    label: str = ""
    predicted: str = ""
    confidence: float | None = None
    is_right: bool | None = None
    thumbnail: Thumbnail | None = None


@dataclass(frozen=True)
class ImageSet:
    """Images that a button opens.

    Attributes:
        title: What they are.
        images: Indices into the page's images, the most telling first.
        total: Number of images that there are, which may be more.
        table: Name of the file that lists all of them.
        notes: What is said of each of the images; none if nothing is.
    """

    title: str
    images: tuple[int, ...]
    total: int
    table: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A measured number.

    Attributes:
        label: What it is.
        value: The number; None if it is not defined.
        low: Lower end of its 95% interval, if it has one.
        high: Upper end of its 95% interval.
        baseline: What a classifier that learned nothing would reach.
        against: Who that is, such as `always tulip`.
        is_percent: Whether it is shown in percent.
        has_bar: Whether it is a share of 1 of which more is better; else less is.
    """

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    baseline: float | None = None
    against: str = ""
    is_percent: bool = True
    has_bar: bool = True


@dataclass(frozen=True)
class Figures:
    """The figures of one set of images, such as `648 test images`."""

    title: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Cell:
    """A cell of a confusion matrix.

    Attributes:
        count: Number of images.
        share: Their share of the images of the true class, from 0 to 1.
        key: The `ImageSet` that it opens; "" for none.
    """

    count: int
    share: float
    key: str


@dataclass(frozen=True)
class ConfusedPair:
    """Images of one class that were taken for another."""

    true: str
    predicted: str
    count: int
    share: float
    key: str


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix, or the part of it that matters most.

    Attributes:
        class_names: Names of the rows, which are true classes, and of the columns.
        rows: A row of cells per true class.
        others: Images of each row that were predicted as a class without a column;
            empty if all classes have one.
        classes: Number of all classes.
        pairs: The pairs of classes confused most often.
        rest: The other confusions: true class, and what it was taken for.
    """

    class_names: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    others: tuple[int, ...]
    classes: int
    pairs: tuple[ConfusedPair, ...] = ()
    rest: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ClassRow:
    """Figures of one class.

    Attributes:
        name: Its name.
        support: Number of images that show it.
        bar: The figure that is drawn as a bar.
        figures: Further figures.
        missed: The `ImageSet` of images that show it and were not predicted as it; ""
            for none.
        mistaken: That of images that were predicted as it and do not show it.
        threshold: Probability from which on it is predicted; None if the most likely
            class is.
    """

    name: str
    support: int
    bar: Figure
    figures: tuple[Figure, ...]
    missed: str = ""
    mistaken: str = ""
    threshold: float | None = None


@dataclass(frozen=True)
class Chart:
    """A chart: SVG text that may stand in a page, and what it shows."""

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Card:
    """An image of a gallery.

    Attributes:
        image: Index into the page's images.
        heat: A WebP file of the heat map, to lie on the thumbnail.
        border_share: Share of the heat on the image's border, from 0 to 1.
    """

    image: int
    heat: bytes | None = None
    border_share: float | None = None


@dataclass(frozen=True)
class Gallery:
    """Images with what the model said of them.

    Attributes:
        title: Its heading.
        lead: A sentence that says which images these are.
        cards: The images.
    """

    title: str
    lead: str
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Heat:
    """What a page says of its heat maps.

    Attributes:
        border: Mean share of the heat on the border of the images of the galleries,
            beside the border's share of an image, against what is border.
        is_exact: Whether the maps are exact, or based on gradients.
        is_multi_label: Whether images may show several classes.
    """

    border: Figure
    is_exact: bool
    is_multi_label: bool


@dataclass(frozen=True)
class FeatureMap:
    """Images as points, near each other if their features are alike.

    Attributes:
        views: A chart for each projection. Elements with the data-gid `point-N` stand
            for the page's image N.
        drawn: Number of points.
        total: Number of images that there are.
    """

    views: tuple[Chart, ...]
    drawn: int
    total: int


@dataclass(frozen=True)
class Finetuning:
    """What fine-tuning did.

    Attributes:
        reason: Why it was kept or not, a sentence.
        facts: Further numbers, by name.
        charts: Loss and metric by epoch, rates by layer.
        gained: The `ImageSet` of images that only the new model predicts correctly; ""
            if unknown.
        lost: That of those that only the model before did.
    """

    reason: str
    facts: tuple[tuple[str, str], ...]
    charts: tuple[Chart, ...]
    gained: str = ""
    lost: str = ""


@dataclass(frozen=True)
class ShownFinding:
    """A finding of an audit.

    Attributes:
        kind: What it is, in a few words.
        severity: How much it matters.
        message: A sentence.
        key: The `ImageSet` of its suspects; "" without any.
    """

    kind: str
    severity: Severity
    message: str
    key: str = ""


@dataclass(frozen=True)
class Findings:
    """The findings of an audit.

    Attributes:
        findings: The findings, the worst first.
        notes: What was not looked at.
        next_steps: What to do with them, a sentence each.
    """

    findings: tuple[ShownFinding, ...]
    notes: tuple[str, ...] = ()
    next_steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Provenance:
    """Where a model came from.

    Attributes:
        facts: Names and values.
        versions: Package names and versions.
        notes: Decisions that were made along the way.
        commands: Command lines that repeat it.
    """

    facts: tuple[tuple[str, str], ...]
    versions: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    commands: tuple[str, ...]


@dataclass(frozen=True)
class Compared:
    """Several runs side by side.

    Attributes:
        runs: Their names.
        rows: Name of a figure or setting, and its value in each run.
        settings: The same of what the runs differ in.
        gained: For each further run, (name, sentence, `ImageSet` of images that only
            it predicts correctly, of those that only the first one does).
        classes: Class name and a figure for each run.
        class_figure: What that figure is.
    """

    runs: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Figure, ...]], ...]
    settings: tuple[tuple[str, tuple[str, ...]], ...]
    gained: tuple[tuple[str, str, str, str], ...]
    classes: tuple[tuple[str, tuple[Figure, ...]], ...]
    class_figure: str


@dataclass(frozen=True)
class Page:
    """Everything that a page shows.

    Attributes:
        kind: What it is about.
        title: Name of the run, or of the data.
        facts: A few words each on data, base and date.
        summary: What was asked and found, a sentence each.
        images: All images that the page names.
        sets: Images that buttons open, by key.
        notes: What the page lacks, and why.
    """

    kind: Literal["Report", "Audit", "Comparison"]
    title: str
    facts: tuple[str, ...]
    summary: tuple[str, ...]
    images: tuple[ShownImage, ...] = ()
    sets: Mapping[str, ImageSet] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    headline: tuple[Figures, ...] = ()
    compared: Compared | None = None
    confusion: Confusion | None = None
    classes: tuple[ClassRow, ...] = ()
    curves: tuple[Chart, ...] = ()
    galleries: tuple[Gallery, ...] = ()
    heat: Heat | None = None
    feature_map: FeatureMap | None = None
    learning: tuple[Chart, ...] = ()
    finetuning: Finetuning | None = None
    findings: Findings | None = None
    provenance: Provenance | None = None


_SECTIONS = (
    ("headline", "Figures"),
    ("compared", "Side by side"),
    ("confusion", "Confusion"),
    ("classes", "Classes"),
    ("curves", "Curves"),
    ("galleries", "Mistakes and doubts"),
    ("feature_map", "Feature map"),
    ("learning", "Learning"),
    ("finetuning", "Fine-tuning"),
    ("findings", "Audit"),
    ("provenance", "Provenance"),
)
"""Attribute of a `Page` and title of its section, in the order of the page."""


def render(page: Page) -> str:
    """Formats a page as one HTML file.

    Every text is escaped, and the page's own policy keeps it from loading anything and
    from running any script but its own.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("keras_transfer.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_plain,
    )
    environment.filters |= {
        "percent": percent,
        "number": _number,
        "data_uri": lambda webp: f"data:image/webp;base64,{_base64(webp)}",
        "short": _short,
        "points": lambda share: round(100 * min(max(share, 0), 1), 2),
    }
    script = _template("script.js").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    findings = page.findings.findings if page.findings else ()
    sections = [(name, title) for name, title in _SECTIONS if getattr(page, name)]
    contents = sections
    if len(sections) == 1:
        contents = [(f"finding-{i}", one.kind) for i, one in enumerate(findings)]
    standing = {card.image for gallery in page.galleries for card in gallery.cards}
    for one in findings:
        if one.key:
            standing.update(page.sets[one.key].images[:_MOST_SUSPECTS])
    return environment.get_template("page.html.j2").render(
        page=page,
        most_suspects=_MOST_SUSPECTS,
        has_pictures=any(image.thumbnail for image in page.images),
        sections=sections,
        contents=contents,
        severities=SEVERITIES.items(),
        heat_key=Markup(heat_css()),
        style=Markup(theme_css() + _template("style.css")),
        script=Markup(script),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        data=Markup(_json(_script_data(page, standing))),
    )


def percent(share: float) -> str:
    """Formats a share of 1 as `75.8%`."""
    return f"{100 * share:.1f}%"


def _plain(value: Any) -> Any:
    """Makes text plain, but for what is HTML already."""
    if type(value) is str:
        return printable(value.translate(_WHITE))
    return value


def _short(name: str) -> str:
    """Leaves out the middle of a long name, whose ends say the most."""
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME // 3]} … {name[-_LONGEST_NAME // 2 :]}"


def _number(value: float) -> str:
    return f"{value:.3f}"


def _template(name: str) -> str:
    return (files(__package__) / "templates" / name).read_text(encoding="utf-8")


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _script_data(page: Page, standing: Container[int]) -> dict[str, Any]:
    """Returns what the page's script looks up: images and sets of images.

    A picture that stands in the page itself is not repeated.
    """
    return {
        "images": [
            _row(image, index in standing) for index, image in enumerate(page.images)
        ],
        "sets": {
            key: [
                printable(one.title),
                one.images,
                one.total,
                one.table,
                [printable(note) for note in one.notes],
            ]
            for key, one in page.sets.items()
        },
    }


def _row(image: ShownImage, is_standing: bool) -> Sequence[Any]:
    picture = image.thumbnail
    shows = picture is not None and not is_standing
    return (
        printable(image.name),
        printable(image.label),
        printable(image.predicted),
        None if image.confidence is None else round(image.confidence, 4),
        image.is_right,
        _base64(picture.webp) if picture is not None and shows else "",
    )


def _json(value: Any) -> str:
    """Formats JSON that can stand in a script element, whatever text it has."""
    text = json.dumps(value, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
