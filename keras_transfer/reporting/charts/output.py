"""Figures -> SVG for the page, and PNG files."""

import hashlib
import io
import re
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import IO, TYPE_CHECKING

from keras_transfer.reporting.charts.style import COLORS, SURFACE, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 200

_VARIABLES = {light: f"var(--{name},{light})" for name, (light, _) in COLORS.items()}
_COLOR = re.compile("|".join(_VARIABLES))
_FONT = re.compile(r"font-family:[^;]*;? ?")
_NUMBER = re.compile(r"-?\d+\.\d+")
_NOT_TURNED = re.compile(r"rotate\(-?0 ")
_REFERENCE = re.compile(r"url\(#([^)]*)\)")
_GEOMETRY = ("d", "x", "y", "width", "height", "transform", "points")


@styled
def themed_svg(figure: "Figure") -> str:
    """Draws a figure as SVG text that can be put into an HTML page as it is.

    - Colors of the style are CSS variables (`style.theme_css` defines them), so that
      the page decides about light and dark; without a definition they are the light
      ones. The background is transparent, and fonts are those of the page.
    - There is no width or height: the figure is as wide as what it is put into.
    - An artist with the gid `NAME` is an element with `data-gid="NAME"`. One of many
      markers with the gid `point:3,17` has markers with `data-gid="point-3"` and
      `data-gid="point-17"`. Ids are not the same as in other figures.
    - The same figure always gives the same text.

    Args:
        figure: A figure made by a function of this package.

    Returns:
        The `<svg>` element, well-formed XML without a header.
    """
    file = io.StringIO()
    with _without_glyph_warnings():
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    root = ET.fromstring(file.getvalue())
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    _clean(root)
    root.set("stroke-linejoin", "round")
    _make_ids_unique(root)
    root.set("xmlns", "http://www.w3.org/2000/svg")
    return ET.tostring(root, encoding="unicode")


@styled
def save_png(figure: "Figure", path: Path | IO[bytes], dpi: int = DPI) -> None:
    """Writes a figure as a PNG file on white paper.

    Args:
        figure: A figure made by a function of this package.
        path: The file to write.
        dpi: Dots per inch.
    """
    with _without_glyph_warnings():
        figure.savefig(path, format="png", dpi=dpi, facecolor=SURFACE)


def _without_glyph_warnings() -> "warnings.catch_warnings[None]":
    """Silences that no font here has a letter: a box is drawn, and a page has fonts."""
    return warnings.catch_warnings(action="ignore", category=UserWarning, append=False)


def _clean(root: ET.Element) -> None:
    """Removes what a page does not need, and names colors by their variables."""
    for parent in root.iter():
        parent.tag = parent.tag.rpartition("}")[2]
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tail = None
        if element.tag != "text" and element.text and not element.text.strip():
            element.text = None
        for name in list(element.attrib):
            value = element.attrib.pop(name)
            if name.endswith("}href"):
                name = "href"
            elif name in _GEOMETRY:
                value = " ".join(_NUMBER.sub(_rounded, value).split())
                if name == "transform" and _NOT_TURNED.match(value):
                    continue
            elif name == "style":
                value = _COLOR.sub(_variable, _FONT.sub("", value))
                value = value.replace(": ", ":").replace("; ", ";")
            element.set(name, value)
    for element in root.iter("g"):
        _share_style(element)


def _rounded(found: re.Match[str]) -> str:
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")


def _variable(found: re.Match[str]) -> str:
    return _VARIABLES[found[0]]


def _share_style(group: ET.Element) -> None:
    """Moves a style that all markers of a group have to the group."""
    styles = {child.get("style", "") for child in group}
    if len(group) > 1 and all(child.tag == "use" for child in group):
        if len(styles) == 1 and "style" not in group.attrib:
            group.set("style", styles.pop())
            for child in group:
                child.attrib.pop("style", None)


def _make_ids_unique(root: ET.Element) -> None:
    """Keeps ids that are referred to, with a prefix, and turns gids into data."""
    text = ET.tostring(root, encoding="unicode")
    prefix = "f" + hashlib.sha256(text.encode()).hexdigest()[:10]
    used = {*_REFERENCE.findall(text)}
    used |= {element.get("href", "#")[1:] for element in root.iter("use")}
    new = {old: f"{prefix}-{number}" for number, old in enumerate(sorted(used))}
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in new:
            element.set("id", new[name])
        elif name and name.startswith("gid:"):
            _mark(element, name.removeprefix("gid:"))
        if element.tag == "use":
            element.set("href", "#" + new[element.attrib["href"][1:]])
        if "clip-path" in element.attrib:
            found = _REFERENCE.fullmatch(element.attrib["clip-path"])
            assert found is not None
            element.set("clip-path", f"url(#{new[found[1]]})")


def _mark(element: ET.Element, name: str) -> None:
    kind, _, rows = name.partition(":")
    if not rows:
        element.set("data-gid", name)
        return
    markers = list(element.iter("use"))
    for marker, row in zip(markers, rows.split(","), strict=True):
        marker.set("data-gid", f"{kind}-{row}")
