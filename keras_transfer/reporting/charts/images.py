"""Images: a map of all of them, a grid of some, and heat on one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_transfer.reporting.charts.style import (
    CLASSES,
    INK,
    MARKERS,
    MUTED,
    SURFACE,
    legend_below,
    legend_name,
    new_figure,
    plain,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAP = 6.2, 4.4  # inches of the feature map: it has the whole width of a page
_MOST_COLORS = 8
_HEAT = 0.65  # opacity of the hottest place


@styled
def feature_map(
    points: np.ndarray,
    targets: np.ndarray,
    is_right: np.ndarray,
    class_names: Sequence[str],
    rows: np.ndarray | None = None,
) -> "Figure":
    """Draws images where their features put them; mistakes are larger, with a rim.

    Of more than 8 classes, the 7 with most mistakes have a color. Each image's marker
    has the gid `point-ROW`.

    Args:
        points: float32 `[N, 2]`, as `projection.project` returns it.
        targets: int64 `[N]` class indices; for multi-label data, uint8
            `[N, num_classes]`, whose images are colored by right and wrong only.
        is_right: bool `[N]`, whether the prediction is correct.
        class_names: Class names in the order of the targets.
        rows: int64 `[N]` numbers for the gids; None for 0 to N - 1.
    """
    numbers = np.arange(len(points)) if rows is None else rows
    if targets.ndim == 2:
        series, names = np.where(is_right, 0, 1), ["right", "wrong"]
    else:
        series, names = _series(targets, is_right, class_names)
    figure = new_figure(*_MAP)
    axes = figure.add_subplot()
    for is_wrong in (False, True):  # so that mistakes are on top
        for index in reversed(range(len(names))):
            members = np.flatnonzero((series == index) & (is_right != is_wrong))
            if len(members):
                gid = "gid:point:" + ",".join(map(str, numbers[members]))
                style = _marker(index, names, is_wrong)
                axes.plot(*points[members].T, gid=gid, **style)
    for index in np.unique(series):
        axes.plot(
            [], [], label=legend_name(names[index]), **_marker(index, names, False)
        )
    if targets.ndim == 1 and not is_right.all():
        empty = {**_marker(0, names, True), "markerfacecolor": "none"}
        axes.plot([], [], label="mistake", **empty)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.margins(0.04)
    legend_below(figure)
    return figure


def _series(
    targets: np.ndarray, is_right: np.ndarray, class_names: Sequence[str]
) -> tuple[np.ndarray, list[str]]:
    """Assigns images to colors: one for each class, or for those with most mistakes."""
    if len(class_names) <= _MOST_COLORS:
        return targets, [*class_names]
    wrong = np.bincount(targets, ~is_right, len(class_names))
    order = np.lexsort((-np.bincount(targets, minlength=len(class_names)), -wrong))
    shown = np.sort(order[: _MOST_COLORS - 1])
    place = np.full(len(class_names), len(shown))
    place[shown] = np.arange(len(shown))
    others = f"{len(class_names) - len(shown)} others"
    return place[targets], [*(class_names[i] for i in shown), others]


def _marker(index: int, names: Sequence[str], is_wrong: bool) -> dict[str, Any]:
    """Returns how images of a color are drawn; those of the others are gray dots."""
    is_gray = index == _MOST_COLORS - 1 and names[index].endswith(" others")
    color = MUTED if is_gray else CLASSES[index]
    return {
        "linestyle": "",
        "marker": "." if is_gray else MARKERS[index],
        "markersize": 5.2 if is_wrong and not is_gray else 4.2,
        "color": color,
        "alpha": 0.95 if is_wrong else 0.4 if is_gray else 0.6,
        "markeredgecolor": INK if is_wrong else SURFACE,
        "markeredgewidth": 0.8 if is_wrong else 0.3,
    }


@styled
def image_grid(
    pixels: np.ndarray,
    titles: Sequence[str],
    heats: np.ndarray | None = None,
    columns: int = 3,
) -> "Figure":
    """Draws images in a grid, each below its title.

    Args:
        pixels: uint8 or float `[N, S, S, 3]` RGB pixels in [0, 255].
        titles: A title for each image; lines are divided by a line break.
        heats: float32 `[N, h, w]` in the range 0 to 1 to lay over the images; None for
            none.
        columns: Number of images side by side.
    """
    count = max(len(pixels), 1)
    columns = min(columns, count)
    rows = -(-count // columns)
    lines = max((title.count("\n") + 1 for title in titles), default=1)
    width = 1.75 * columns
    figure = new_figure(width, rows * (1.75 + 0.16 * lines))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels:
        panel.axis("off")
    for panel in panels[len(pixels) :]:
        panel.remove()
    for number, (image, title) in enumerate(zip(pixels, titles, strict=True)):
        shown = np.clip(image, 0, 255).astype(np.uint8)
        if heats is not None:
            shown = overlay(shown, heats[number])
        panels[number].imshow(shown)
        text = "\n".join(plain(line, 28) for line in title.split("\n"))
        panels[number].set_title(text, fontsize=8.5, loc="left", pad=3)
    return figure


def overlay(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lays heat over an image: the hotter a place, the more of its color is seen.

    Args:
        pixels: uint8 `[H, W, 3]` RGB pixels.
        heat: float32 `[h, w]` in the range 0 to 1, which is enlarged smoothly.

    Returns:
        uint8 `[H, W, 3]` pixels.
    """
    from matplotlib import colormaps
    from PIL import Image

    height, width = pixels.shape[:2]
    small = Image.fromarray(heat.astype(np.float32), "F")
    smooth = small.resize((width, height), Image.Resampling.BICUBIC)
    amount = np.asarray(smooth).clip(0, 1)
    color = colormaps["plasma"](amount)[..., :3] * 255
    opacity = _HEAT * amount[..., None]
    gray = pixels.mean(-1, keepdims=True)
    quiet = 0.35 * gray + 0.65 * pixels  # so that colors of the image are not heat
    return (quiet * (1 - opacity) + color * opacity).astype(np.uint8)
