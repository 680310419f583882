"""Small pictures for the report page: encoded images -> WebP without metadata."""

import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from keras_transfer.data.formats.convert import converted_pixels, file_type
from keras_transfer.data.formats.limits import check_pixels
from keras_transfer.data.formats.pixels import upright
from keras_transfer.data.formats.silence import silenced
from keras_transfer.data.reading import Reader, map_ahead
from keras_transfer.errors import KerasTransferError

if TYPE_CHECKING:
    from PIL import Image

LARGE, SMALL = 256, 160
"""Longer sides in pixels: of pictures that heat maps lie on, and of all others. A
typical photo takes 9 KB and 4 KB."""

_ORIENTATION = 0x0112  # EXIF
_QUALITY = 72  # of WebP; artifacts are not seen at these sizes
_HEAT_QUALITY = 60
_HEAT_SIDE = 128  # of maps of 7 x 7 places or so: no step is seen when it is enlarged
_HEAT_FROM = 0.25  # heat below this is not drawn, or it would veil the whole image
_HEAT_OPACITY = 0.8  # of the hottest place, so that the image stays visible

# From cold to hot: red, orange, yellow. The page makes the picture below it gray.
_HEAT_STOPS = np.array([0.0, 0.5, 1.0])
_HEAT_COLORS = np.array([[150, 20, 60], [235, 90, 30], [255, 225, 90]])


@dataclass(frozen=True, repr=False)
class Thumbnail:
    """A small picture.

    Attributes:
        webp: The content of a WebP file without any metadata.
        width: Its width in pixels.
        height: Its height in pixels.
    """

    webp: bytes
    width: int
    height: int

    def __repr__(self) -> str:
        return f"Thumbnail({self.width}x{self.height}, {len(self.webp):,} bytes)"


def make_thumbnails(
    read: Reader, sides: Mapping[str, int], most_bytes: int
) -> dict[str, Thumbnail]:
    """Makes small pictures of images.

    Args:
        read: Reads the encoded bytes of sources.
        sides: Longer side of the picture in pixels by source, the most important first.
        most_bytes: Limit of the total size. If it is reached, the least important
            pictures are left out.

    Returns:
        The pictures by source. Images that are missing, damaged or of a format whose
        package is missing have none.
    """

    def make(item: tuple[str, bytes | OSError]) -> tuple[str, Thumbnail | None]:
        source, encoded = item
        if isinstance(encoded, OSError):
            return source, None
        return source, thumbnail(encoded, sides[source])

    made: dict[str, Thumbnail] = {}
    threads = max(min(os.cpu_count() or 1, 8), 2)
    for source, found in map_ahead(make, _read(read, sides), threads):
        if found:
            made[source] = found
    kept, total = {}, 0
    for source in sides:
        if source in made:
            total += len(made[source].webp)
            if total > most_bytes:
                break
            kept[source] = made[source]
    return kept


def _read(
    read: Reader, sides: Mapping[str, int]
) -> Iterator[tuple[str, bytes | OSError]]:
    """Yields what a reader yields, until the data themselves cannot be read."""
    try:
        yield from read([*sides])
    except (OSError, KerasTransferError):
        return


def thumbnail(encoded: bytes, side: int) -> Thumbnail | None:
    """Makes a small picture of an image: upright, pixels only.

    Args:
        encoded: The content of an image file.
        side: Its longer side in pixels; smaller images are not enlarged.

    Returns:
        The picture; None if the image cannot be decoded.
    """
    from PIL import Image

    try:
        with silenced():
            pixels = converted_pixels(encoded)
            if pixels is None:
                return _encoded(*_opened(encoded, side))
            return _encoded(_small_rgb(Image.fromarray(pixels), side), 1)
    except Exception:  # what libraries raise for damaged files has no common class
        return None


def _opened(encoded: bytes, side: int) -> tuple["Image.Image", int]:
    """Decodes an image at about the wanted size, which for a JPEG takes less time.

    Returns:
        (RGB image, EXIF orientation, which the decoder too applies to JPEG only).
    """
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        check_pixels(*image.size)
        image.draft(None, (side, side))
        is_jpeg = file_type(encoded) == "JPEG"
        orientation = image.getexif().get(_ORIENTATION, 1) if is_jpeg else 1
        return _small_rgb(image, side), orientation


def _small_rgb(image: "Image.Image", side: int) -> "Image.Image":
    """Converts an image of any mode to RGB, without alpha, and shrinks it."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):  # 16 bits; Pillow would cut them off at 255
        values = np.asarray(image)
        image = Image.fromarray((values // 256).clip(0, 255).astype(np.uint8))
    image = image.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.BILINEAR)
    return image


def _encoded(image: "Image.Image", orientation: int) -> Thumbnail:
    """Encodes the pixels of an RGB image, upright, and nothing else that it carries."""
    from PIL import Image

    pixels = np.ascontiguousarray(upright(np.asarray(image), orientation))
    file = io.BytesIO()
    plain = Image.fromarray(pixels)
    plain.save(file, "WEBP", quality=_QUALITY, method=2)
    return Thumbnail(file.getvalue(), *plain.size)


def heat_overlay(heat: np.ndarray, width: int, height: int) -> bytes:
    """Draws a heat map to lie on a thumbnail.

    The model sees the whole image stretched to a square, so the map is stretched back.

    Args:
        heat: float32 `[h, w]` from 0 to 1.
        width: Width of the thumbnail.
        height: Height of the thumbnail.

    Returns:
        The content of a WebP file with the thumbnail's proportions, transparent where
        there is little heat.
    """
    from PIL import Image

    scale = _HEAT_SIDE / max(width, height)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    values = Image.fromarray(heat.astype(np.float32))
    smooth = np.asarray(values.resize(size, Image.Resampling.BICUBIC))
    shown = ((smooth - _HEAT_FROM) / (1 - _HEAT_FROM)).clip(0, 1)
    channels = [np.interp(shown, _HEAT_STOPS, x) for x in _HEAT_COLORS.T]
    rgba = np.dstack([*channels, 255 * _opacity(shown)]).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(rgba).save(file, "WEBP", quality=_HEAT_QUALITY, method=2)
    return file.getvalue()


def heat_css() -> str:
    """Formats the colors of heat as a CSS gradient, from little to much of it."""
    places, colors = np.linspace(0, 1, 9), []
    for at, opacity in zip(places, _opacity(places), strict=True):
        red, green, blue = (np.interp(at, _HEAT_STOPS, x) for x in _HEAT_COLORS.T)
        colors.append(f"rgb({red:.0f} {green:.0f} {blue:.0f} / {opacity:.0%})")
    return f"linear-gradient(to right, {', '.join(colors)})"


def _opacity(shown: np.ndarray) -> np.ndarray:
    """Returns the opacity of heat that is drawn, all from 0 to 1.

    It rises faster than the heat: a faint color could not be told.
    """
    return _HEAT_OPACITY * shown**0.7
