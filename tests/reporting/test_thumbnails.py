"""Small pictures, looked at pixel by pixel."""

import io

import numpy as np
import pytest
from conftest import encode
from made_pages import jpeg_with_exif
from PIL import Image

from keras_transfer.data.formats.pixels import upright
from keras_transfer.reporting.thumbnails import (
    heat_overlay,
    make_thumbnails,
    thumbnail,
)


def pixels_of(webp: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(webp)).convert("RGB")).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright_and_have_no_metadata(orientation):
    found = thumbnail(jpeg_with_exif(orientation), 40)
    assert found is not None
    stored = np.full((20, 40, 3), 255, np.uint8)
    stored[:10, :20] = (255, 0, 0)
    expected = upright(stored, orientation).astype(int)
    actual = pixels_of(found.webp)
    assert (found.height, found.width) == expected.shape[:2] == actual.shape[:2]
    assert np.abs(actual - expected).mean() < 8
    assert b"SECRET" not in found.webp and b"EXIF" not in found.webp


def forms() -> dict[str, bytes]:
    gray = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (64, 1))
    rgb = np.dstack([gray] * 3)
    deep = io.BytesIO()
    Image.fromarray(gray.astype(np.uint16) * 257).save(deep, "PNG")
    array = io.BytesIO()
    np.save(array, rgb)
    palette = io.BytesIO()
    image = Image.fromarray(rgb).quantize(64)
    image.save(palette, "PNG", transparency=bytes(range(64)))
    cmyk = io.BytesIO()
    Image.fromarray(rgb).convert("CMYK").save(cmyk, "JPEG")
    return {
        "gray": encode(gray, "PNG"),
        "alpha": encode(np.dstack([rgb, 255 - gray]), "PNG"),
        "16 bits": deep.getvalue(),
        "palette": palette.getvalue(),
        "CMYK": cmyk.getvalue(),
        "GIF": encode(gray, "GIF"),
        "TIFF": encode(rgb, "TIFF"),
        "array": array.getvalue(),
    }


@pytest.mark.parametrize("form", forms())
def test_every_kind_of_pixels_is_shown(form):
    found = thumbnail(forms()[form], 32)
    assert found is not None and (found.width, found.height) == (32, 32)
    expected = np.linspace(2, 253, 32)
    assert np.abs(pixels_of(found.webp).mean((0, 2)) - expected).max() < 14


def test_what_cannot_be_shown_is_a_gap():
    good = encode(np.zeros((80, 60, 3), np.uint8), "JPEG")
    files = {
        "good": good,
        "broken": good[:200],
        "text": b"hello",
        "empty": b"",
        "missing": OSError("missing"),
        "last": good,
    }

    def read(sources):
        yield from ((source, files[source]) for source in sources)

    found = make_thumbnails(read, dict.fromkeys(files, 40), 10**6)
    assert [*found] == ["good", "last"]
    assert (found["good"].width, found["good"].height) == (30, 40)
    most = len(found["good"].webp) + 1
    assert [*make_thumbnails(read, dict.fromkeys(files, 40), most)] == ["good"]

    def unreadable(sources):
        raise OSError("the folder is gone")
        yield

    assert make_thumbnails(unreadable, {"good": 40}, 10**6) == {}


def test_heat_lies_where_it_is_and_has_the_proportions_of_the_picture():
    heat = np.zeros((7, 7), np.float32)
    heat[0, 6] = 1
    image = Image.open(io.BytesIO(heat_overlay(heat, 200, 100)))
    assert image.size == (128, 64) and image.mode == "RGBA"
    alpha = np.asarray(image)[..., 3].astype(int)
    assert alpha[4, 122] > 120 and alpha[40, 40] == 0
    weak = Image.open(io.BytesIO(heat_overlay(heat / 8, 200, 100)))
    assert np.asarray(weak)[..., 3].max() == 0
