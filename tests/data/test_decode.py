"""Decoding: Pillow's pixels, a reason for what is refused, and bounded memory."""

import functools
import io
import re
import struct
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import encode
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from keras_transfer.data.decode import decode_image, make_decoder
from keras_transfer.data.formats.limits import MAX_PIXELS
from keras_transfer.errors import DecodeError

SIZE = 33  # odd: rows are padded in a BMP, blocks are partial in a JPEG

RNG = np.random.default_rng(0)
PIXELS = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (6, 6, 3), np.uint8)).resize((SIZE, SIZE))
)
ALPHA = np.dstack([PIXELS, PIXELS[..., 0] // 2])
DEEP = RNG.integers(0, 2**16, (SIZE, SIZE, 3)).astype(np.uint16)

decoder = functools.cache(make_decoder)
decode = decoder(SIZE)


def pillow(encoded: bytes) -> np.ndarray:
    """The RGB pixels that Pillow sees, upright, without alpha."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    mode = "RGBA" if "transparency" in image.info else "RGB"
    return np.asarray(image.convert(mode).convert("RGB"))


def area_average(pixels: np.ndarray, size: int) -> np.ndarray:
    """`[size, size, 3]` means over areas with fractional edges, in float64."""

    def weights(length: int) -> np.ndarray:
        edges = np.linspace(0, length, size + 1)[:, None]
        start = np.arange(length)
        covered = np.minimum(start + 1, edges[1:]) - np.maximum(start, edges[:-1])
        return covered.clip(0) * (size / length)

    height, width, _ = pixels.shape
    rows = np.tensordot(weights(height), pixels, 1)
    return np.tensordot(weights(width), rows, ((1,), (1,))).swapaxes(0, 1)


def save(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def patched(encoded: bytes, position: int, form: str, *values: int) -> bytes:
    """`encoded` with the packed values written over what was at a position."""
    new = struct.pack(form, *values)
    return encoded[:position] + new + encoded[position + len(new) :]


def bmp(pixels: np.ndarray, top_down: bool = False, masks: bytes = b"") -> bytes:
    """A BMP written by hand, since Pillow writes neither kind."""
    height, width, channels = pixels.shape
    rows = pixels[..., [2, 1, 0, 3][:channels]][:: 1 if top_down else -1]
    padded = np.pad(rows.reshape(height, -1), ((0, 0), (0, -width * channels % 4)))
    header = 108 if masks else 40
    info = struct.pack(
        "<IiiHHIIIIII",
        header,
        width,
        -height if top_down else height,
        1,
        8 * channels,
        3 if masks else 0,
        *(padded.size, 0, 0, 0, 0),
    )
    info = (info + masks).ljust(header, b"\0")
    start = 14 + header
    return (
        struct.pack("<2sIII", b"BM", start + padded.size, 0, start)
        + info
        + padded.tobytes()
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG."""
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def png(header: bytes, rows: bytes) -> bytes:
    """A PNG of one compressed chunk of rows, each behind the number of its filter."""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows, 9))
        + chunk(b"IEND", b"")
    )


def interlaced_png(pixels: np.ndarray) -> bytes:
    """A PNG in the seven passes of Adam7, which Pillow does not write."""
    height, width, _ = pixels.shape
    starts = [(0, 0), (0, 4), (4, 0), (0, 2), (2, 0), (0, 1), (1, 0)]
    steps = [(8, 8), (8, 8), (8, 4), (4, 4), (4, 2), (2, 2), (2, 1)]
    rows = [
        b"\0" + row.tobytes()
        for (top, left), (down, right) in zip(starts, steps, strict=True)
        for row in pixels[top::down, left::right]
    ]
    return png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1), b"".join(rows))


PHOTO = Image.fromarray(PIXELS)
INDEXED = PHOTO.quantize(16)
FRAMES = {"save_all": True, "append_images": [Image.fromarray(255 - PIXELS)] * 3}
MASKS = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)

FILES = {
    "jpeg": encode(PIXELS, "JPEG"),
    "jpeg-444": encode(PIXELS, "JPEG", quality=98, subsampling=0),
    "jpeg-progressive": encode(PIXELS, "JPEG", progressive=True),
    "jpeg-gray": save(PHOTO.convert("L"), "JPEG"),
    "jpeg-cmyk": save(PHOTO.convert("CMYK"), "JPEG"),
    "png": encode(PIXELS, "PNG"),
    "png-gray": save(PHOTO.convert("L"), "PNG"),
    "png-1-bit": save(PHOTO.convert("1"), "PNG"),
    "png-interlaced": interlaced_png(PIXELS),
    "png-palette": save(INDEXED, "PNG"),
    "png-palette-2-bit": save(PHOTO.quantize(4), "PNG", bits=2),
    "png-palette-4-bit": save(INDEXED, "PNG", bits=4),
    "png-palette-transparent": save(
        INDEXED, "PNG", transparency=bytes(range(0, 160, 10))
    ),
    "png-gray-alpha": save(Image.fromarray(ALPHA).convert("LA"), "PNG"),
    "png-alpha": encode(ALPHA, "PNG"),
    "png-transparent-color": encode(
        PIXELS, "PNG", transparency=tuple(PIXELS[0, 0].tolist())
    ),
    "gif": encode(PIXELS, "GIF", interlace=0),
    "gif-interlaced": encode(PIXELS, "GIF", interlace=1),
    "gif-animated": encode(PIXELS, "GIF", **FRAMES),
    "gif-transparent": encode(ALPHA, "GIF"),
    "bmp": encode(PIXELS, "BMP"),
    "bmp-top-down": bmp(PIXELS, top_down=True),
    "bmp-32-bit": encode(ALPHA, "BMP"),
    "bmp-32-bit-masks": bmp(ALPHA, masks=MASKS),
    "webp": encode(PIXELS, "WEBP"),
    "webp-lossless": encode(PIXELS, "WEBP", lossless=True),
    "webp-alpha": encode(ALPHA, "WEBP", exact=True),
    "webp-lossless-alpha": encode(ALPHA, "WEBP", lossless=True, exact=True),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_pillow(name):
    expected = pillow(FILES[name])
    assert expected.std() > 30
    np.testing.assert_array_equal(decode(FILES[name]), expected)


@pytest.mark.parametrize("name", [name for name in FILES if "bmp" in name])
def test_a_bmp_written_by_hand_is_what_was_drawn(name):
    np.testing.assert_array_equal(decode(FILES[name]), PIXELS)


def test_a_gif_without_its_last_byte_is_whole():
    encoded = FILES["gif"][:-1]
    np.testing.assert_array_equal(decode(encoded), pillow(encoded))


def gif_in_blocks(size: int, comment: int) -> bytes:
    """A GIF whose data are in blocks of a size, behind a comment of 3-byte blocks."""
    encoded = FILES["gif"]
    start = encoded.index(b",\0\0")
    data = start + 11  # after the frame's header and the codes' size
    inside, position = b"", data
    while encoded[position]:
        inside += encoded[position + 1 : position + 1 + encoded[position]]
        position += 1 + encoded[position]
    blocks = [inside[at : at + size] for at in range(0, len(inside), size)]
    return (
        encoded[:start]
        + (b"!\xfe" + b"\2kt" * comment + b"\0")
        + encoded[start:data]
        + b"".join(bytes([len(block)]) + block for block in blocks)
        + encoded[position:]
    )


@pytest.mark.parametrize(("size", "comment"), [(255, 1), (9, 1), (254, 500)])
def test_a_gif_may_be_in_small_blocks(size, comment):
    encoded = gif_in_blocks(size, comment)
    np.testing.assert_array_equal(decode(encoded), pillow(FILES["gif"]))


@pytest.mark.parametrize(("left", "top"), [(0, 0), (5, 8)])
def test_a_gif_frame_smaller_than_its_screen_stays_in_its_place(left, top):
    encoded = encode(PIXELS[:20, :20], "GIF")
    encoded = patched(encoded, 6, "<HH", SIZE, SIZE)
    encoded = patched(encoded, encoded.index(b",\0\0") + 1, "<HH", left, top)
    expected = pillow(encoded)
    assert expected.shape == (SIZE, SIZE, 3)
    place = slice(top, top + 20), slice(left, left + 20)
    np.testing.assert_array_equal(decode(encoded)[place], expected[place])


@pytest.mark.parametrize("screen", [(SIZE, SIZE), (20, SIZE), (0, 0)])
def test_a_gif_frame_that_reaches_out_of_its_screen_enlarges_it(screen):
    encoded = patched(encode(PIXELS[:20, :20], "GIF"), 6, "<HH", *screen)
    corner = SIZE - 20
    encoded = patched(encoded, encoded.index(b",\0\0") + 1, "<HH", corner, corner)
    expected = pillow(encoded)
    assert expected.shape == (SIZE, SIZE, 3)
    place = slice(corner, SIZE), slice(corner, SIZE)
    np.testing.assert_array_equal(decode(encoded)[place], expected[place])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_16_bit_png_is_scaled(channels):
    encoded = tf.io.encode_png(DEEP[..., :channels]).numpy()
    difference = decode(encoded) - DEEP[..., :channels] / 257
    assert abs(difference).max() <= 1


def segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def exif(orientation: int, order: str = "<") -> bytes:
    """An APP1 segment whose directory has another entry before the orientation."""
    tiff = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(
        f"{order}IIHHHI4sHHIHHI",
        *(12, 0),  # the directory's position, then a gap
        2,
        *(0x0110, 2, 4, b"cam\0"),
        *(0x0112, 3, 1, orientation, 0),
        0,
    )
    return segment(0xE1, b"Exif\0\0" + tiff)


def tagged(*segments: bytes) -> bytes:
    """A JPEG with segments before its own JFIF segment."""
    return FILES["jpeg"][:2] + b"".join(segments) + FILES["jpeg"][2:]


JFIF = FILES["jpeg"][2:20]
assert JFIF.startswith(b"\xff\xe0\0\x10JFIF")
XMP = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>")
COMMENT = segment(0xFE, b"Exif\0\0II*\0")


@pytest.mark.parametrize("order", ["<", ">"], ids=["little-endian", "big-endian"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_photo_upright(orientation, order):
    encoded = tagged(exif(orientation, order))
    upright = pillow(encoded)
    assert np.array_equal(upright, pillow(FILES["jpeg"])) == (orientation == 1)
    np.testing.assert_array_equal(decode(encoded), upright)


@pytest.mark.parametrize(
    "before",
    [
        (JFIF,),
        (JFIF, XMP),
        (segment(0xED, bytes(40_000)), segment(0xE2, bytes(60_000))),
        (COMMENT,),
    ],
    ids=["jfif", "xmp", "large", "comment"],
)
def test_exif_is_found_behind_other_segments(before):
    encoded = tagged(*before, exif(6))
    upright = pillow(encoded)
    assert not np.array_equal(upright, pillow(FILES["jpeg"]))
    np.testing.assert_array_equal(decode(encoded), upright)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_that_is_not_square_is_turned_too(orientation):
    wide = Image.fromarray(PIXELS).resize((60, 47))
    encoded = save(wide, "JPEG", exif=exif(orientation)[4:])
    expected = area_average(pillow(encoded), SIZE)
    assert abs(decode(encoded) - expected).max() <= 0.51


@pytest.mark.parametrize(
    "broken",
    [
        exif(0),
        exif(9),
        exif(0x0600),
        segment(0xE1, b"Exif\0\0"),
        segment(0xE1, b"Exif\0\0II*\0" + b"\xff" * 60),
        segment(0xE1, b"Exif\0\0MM\0*" + struct.pack(">I", 2**31) + bytes(60)),
        segment(0xE1, b"Exif\0\0II*\0" + struct.pack("<IH", 8, 65_535)),
        segment(0xE1, b"Exif\0\0" + np.random.default_rng(1).bytes(5_000)),
        segment(0xE1, b"other" + exif(6)[9:]),
    ],
    ids=lambda segment: f"{len(segment)}-bytes",
)
def test_exif_that_is_not_valid_is_ignored(broken):
    np.testing.assert_array_equal(decode(tagged(broken)), pillow(FILES["jpeg"]))


def ftyp(brand: bytes) -> bytes:
    return struct.pack(">I4s4sI4s4s", 24, b"ftyp", brand, 0, b"mif1", brand) + bytes(99)


def png_bomb(side: int = 20_000) -> bytes:
    """A valid 1-bit PNG of side x side pixels in a few KB."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return png(header, bytes((side // 8 + 1) * side))


def hidden_png_bomb() -> bytes:
    """A PNG bomb that says, where its header should be, that it is 2x2."""
    bomb = png_bomb()
    return bomb[:8] + chunk(b"prVt", struct.pack(">II", 2, 2)) + bomb[8:]


def gif_frame_bomb(side: int = 13_500) -> bytes:
    """A small valid GIF that says it is 10x10 and whose frame is side x side."""
    return patched(save(Image.new("P", (side, side)), "GIF"), 6, "<HH", 10, 10)


def gif_canvas_bomb() -> bytes:
    """A valid GIF of 35 bytes: one pixel in the corner opposite to a flat screen's."""
    return (
        b"GIF89a"
        + struct.pack("<HHBBB6x", 65_535, 1, 0x80, 0, 0)
        + struct.pack("<cHHHHB", b",", 0, 65_534, 1, 1, 0)
        + b"\x02\x02\x44\x01\0;"
    )


def jpeg_of_scans(scans: int, side: int = SIZE) -> bytes:
    """A black progressive JPEG whose last scan is repeated; its header gives a side."""
    encoded = save(Image.new("RGB", (SIZE, SIZE)), "JPEG", progressive=True)
    encoded = patched(encoded, encoded.index(b"\xff\xc2") + 5, ">HH", side, side)
    last = encoded.rindex(b"\xff\xda")
    more = scans - encoded.count(b"\xff\xda")
    return encoded[:last] + encoded[last:-2] * more + encoded[last:]


def sequential_jpeg_of_scans(scans: int) -> bytes:
    """A black baseline JPEG with scans of one color each, the last repeated."""
    gray = save(Image.new("L", (SIZE, SIZE)), "JPEG")
    frame, scan = gray.index(b"\xff\xc0"), gray.index(b"\xff\xda")
    colors = b"".join(bytes([color, 0x11, 0]) for color in (1, 2, 3))
    size = struct.pack(">BHHB", 8, SIZE, SIZE, 3)
    return (
        gray[:frame]
        + segment(0xC0, size + colors)
        + gray[frame + 13 : scan]
        + b"".join(patched(gray[scan:-2], 5, "B", color) for color in (1, 2))
        + patched(gray[scan:-2], 5, "B", 3) * (scans - 2)
        + gray[-2:]
    )


TOO_LARGE = {
    "jpeg": patched(
        FILES["jpeg"], FILES["jpeg"].index(b"\xff\xc0") + 5, ">HH", 20_000, 20_000
    ),
    "jpeg-progressive": patched(
        FILES["jpeg-progressive"],
        FILES["jpeg-progressive"].index(b"\xff\xc2") + 5,
        *(">HH", 20_000, 20_000),
    ),
    "png": png_bomb(),
    "gif": patched(FILES["gif"], 6, "<HH", 20_000, 20_000),
    "gif-canvas": gif_canvas_bomb(),
    "bmp": patched(FILES["bmp"], 18, "<ii", 20_000, 20_000),
    "bmp-top-down": patched(FILES["bmp"], 18, "<ii", 20_000, -20_000),
    "webp": patched(FILES["webp"], 26, "<HH", 16_383, 16_383),
    "webp-lossless": patched(FILES["webp-lossless"], 21, "<I", 2**28 - 1),
    "webp-alpha": patched(
        FILES["webp-alpha"], 24, "<HBHB", 19_999 & 0xFFFF, 0, 19_999, 0
    ),
}
BROKEN = "damaged or truncated"
REFUSED = {
    "animated-webp": (encode(PIXELS, "WEBP", **FRAMES), "animated WebP"),
    "palette-bmp": (save(PHOTO.quantize(), "BMP"), "BMP with a palette"),
    "1-bit-bmp": (save(PHOTO.convert("1"), "BMP"), "BMP with a palette"),
    "odd-masks-bmp": (bmp(ALPHA, masks=MASKS[8:] + MASKS[:8]), "BMP with a palette"),
    "big-endian-tiff": (b"MM\0*" + bytes(99), "a TIFF"),
    "avif": (ftyp(b"avif"), "damaged or truncated AVIF"),
    "heic": (ftyp(b"heic"), "damaged or truncated HEIC"),
    "empty": (b"", "an empty file"),
    "1-byte": (b"\xff", "not an image"),
    "junk": (b"\x01" + np.random.default_rng(0).bytes(5_000), "not an image"),
    "text": (b"<html><body>404 Not Found</body></html>", "not an image"),
    "jpeg-of-many-scans": (jpeg_of_scans(1025), "too many scans"),
    "large-jpeg-of-scans": (jpeg_of_scans(34, 13_000), "too many scans"),
    "baseline-of-many-scans": (sequential_jpeg_of_scans(1025), "too many scans"),
    "png-of-a-late-header": (hidden_png_bomb(), "IHDR"),
    "png-of-a-long-header": (patched(FILES["png"], 8, ">I", 14), "IHDR"),
    "gif-of-many-blocks": (gif_in_blocks(1, 1), "too many small blocks"),
    "gif-of-a-long-comment": (gif_in_blocks(255, 1200), "too many small blocks"),
    "wav": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(30), "not an image"),
    "only-jpeg-magic": (b"\xff\xd8\xff", BROKEN),
    **{
        f"{kind}-cut-at-{share:.0%}": (FILES[kind][: int(share * size)], BROKEN)
        for kind in ("jpeg", "png", "gif", "bmp", "webp", "webp-lossless")
        for size in [len(FILES[kind])]
        for share in (0.5, 0.97)
    },
    **{
        f"{name}-of-too-many-pixels": (encoded, f"pixels; at most {MAX_PIXELS:,}")
        for name, encoded in TOO_LARGE.items()
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_with_its_reason(name):
    encoded, reason = REFUSED[name]
    with pytest.raises(DecodeError) as caught:
        decode(encoded)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "encoded",
    [
        jpeg_of_scans(1000),
        sequential_jpeg_of_scans(1000),
        FILES["jpeg"] + b"\0\xff\xda" * 1000,  # as in the video of a motion photo
    ],
    ids=["progressive", "baseline", "trailer"],
)
def test_a_small_jpeg_may_have_many_scans(encoded):
    np.testing.assert_array_equal(decode(encoded), pillow(encoded))


def test_the_size_that_is_too_large_is_named():
    with pytest.raises(DecodeError, match="20000x20000"):
        decode(TOO_LARGE["png"])


def photo(index: int = 0, size: tuple[int, int] = (640, 427)) -> Image.Image:
    image = Image.fromarray(load_sample_images().images[index])
    return image.resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("index", "limit"), [(0, 2.5), (1, 1.0)])
@pytest.mark.parametrize("size", [(1600, 1200), (1200, 1600)])
def test_a_large_jpeg_looks_like_the_average_of_all_its_pixels(index, limit, size):
    encoded = save(photo(index, size), "JPEG", quality=92)
    difference = decoder(224)(encoded) - area_average(pillow(encoded), 224)
    assert abs(difference).mean() < limit
    assert abs(difference.mean()) < 0.1


@pytest.mark.parametrize(
    ("image_size", "ratio"),
    [(224, 1), (214, 1), (213, 2), (107, 2), (106, 4), (54, 4), (53, 8), (20, 8)],
)
def test_a_jpeg_is_never_decoded_smaller_than_it_is_needed(image_size, ratio):
    encoded = save(photo(), "JPEG")
    scaled = Image.open(io.BytesIO(encoded))
    scaled.draft("RGB", (640 // ratio, 427 // ratio))
    assert scaled.size == (-(-640 // ratio), -(-427 // ratio))
    difference = decoder(image_size)(encoded) - area_average(
        np.asarray(scaled), image_size
    )
    assert abs(difference).max() <= 0.51


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "WEBP"])
def test_other_formats_are_shrunk_by_averaging_areas(form):
    encoded = encode(np.asarray(photo(1)), form)
    expected = area_average(pillow(encoded), SIZE)
    assert abs(decode(encoded) - expected).max() <= 0.51


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (7, 20), (20, 3)])
def test_a_tiny_image_is_enlarged(size):
    tiny = Image.fromarray(PIXELS).resize(size)
    expected = np.asarray(tiny.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    difference = decode(save(tiny, "PNG")).astype(int) - expected
    assert abs(difference).max() <= 1


def test_each_side_is_resized_on_its_own():
    strip = photo().crop((0, 200, 2 * SIZE, 211))
    expected = strip.resize((SIZE, 11), Image.Resampling.BOX).resize(
        (SIZE, SIZE), Image.Resampling.BILINEAR
    )
    difference = decode(save(strip, "PNG")).astype(int) - np.asarray(expected)
    assert abs(difference).max() <= 2


def test_threads_get_the_same_pixels():
    files = [*FILES.values(), save(photo(), "JPEG")]
    expected = [decode(encoded) for encoded in files]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            np.testing.assert_array_equal(list(pool.map(decode, files)), expected)


def test_a_saved_model_decodes_to_the_same_bits(tmp_path):
    class Decoder(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def __call__(self, images):
            return tf.map_fn(
                lambda encoded: decode_image(encoded, SIZE),
                images,
                fn_output_signature=tf.TensorSpec((SIZE, SIZE, 3), tf.uint8),
            )

    files = [*FILES.values(), tagged(exif(6)), save(photo(), "JPEG")]
    tf.saved_model.save(Decoder(), tmp_path / "model")
    loaded = tf.saved_model.load(tmp_path / "model")
    np.testing.assert_array_equal(
        loaded(tf.constant(files)), [decode(encoded) for encoded in files]
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match="refused: a TIFF"):
        loaded(tf.constant([FILES["png"], encode(PIXELS, "TIFF")]))


def peak_memory() -> int:
    """Bytes; unlike `ru_maxrss`, which starts at the parent's peak, of us alone."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise AssertionError


def memory_of_decoding(files: list[bytes]) -> list[tuple[int, np.ndarray | str]]:
    """For each, (bytes by which the peak grew, the pixels or the reason)."""

    def result(encoded: bytes) -> np.ndarray | str:
        try:
            return decode(encoded)
        except DecodeError as error:
            return str(error)

    decode(FILES["png"])
    measured = []
    for encoded in files:
        before = peak_memory()
        found = result(encoded)
        measured.append((peak_memory() - before, found))
    return measured


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
@pytest.mark.long
def test_a_small_file_of_many_pixels_costs_no_memory(other_process):
    bombs = {
        png_bomb(): "20000x20000",
        hidden_png_bomb(): "IHDR",
        gif_frame_bomb(): "pixels",
        gif_canvas_bomb(): "65535x65535",
    }
    assert max(map(len, bombs)) < 200_000
    measured = other_process.submit(memory_of_decoding, list(bombs)).result(600)
    for (grown, reason), word in zip(measured, bombs.values(), strict=True):
        assert word in reason
        assert grown < 50e6


@linux
def test_a_long_animation_costs_one_frame(other_process):
    first = save(photo(size=(600, 600)).quantize(), "GIF")
    later = save(Image.new("P", (600, 600), 1), "GIF")
    animation = first[:-1] + later[later.index(b",\0\0") : -1] * 400 + b";"
    with Image.open(io.BytesIO(animation)) as image:
        assert image.n_frames == 401
    expected = area_average(pillow(first), SIZE)
    work = other_process.submit(memory_of_decoding, [animation])
    [(grown, pixels)] = work.result(600)
    assert abs(pixels - expected).max() <= 0.51
    assert grown < 50e6  # 401 frames decoded are 433 MB


# Where parts of a file may begin: marks of a JPEG, chunks of a PNG or WebP, blocks of a
# GIF. Bytes that only look like them do no harm.
PART = re.compile(
    rb"(?=\xff[\xc0-\xfe]|....(?:IHDR|PLTE|tRNS|IDAT|IEND)|VP8|ALPH|EXIF|[!,;])", re.S
)
EXTREMES = [
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
]


def with_checksums(encoded: bytes) -> bytes:
    """A PNG whose chunks have the right checksums, as far as its lengths lead."""
    position, data = 8, bytearray(encoded)
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[position + 4 : end]))
        position = end + 4
    return bytes(data)


def damaged(encoded: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """`encoded`, which is not empty, with damage of one kind in one place."""
    data = bytearray(encoded)
    # Much of it is done to the header, where most decisions are made.
    reach = len(data) if rng.random() < 0.6 else min(64, len(data))
    start, length = rng.integers(reach), rng.integers(1, 40)
    match rng.integers(9):
        case 0:
            for position in rng.integers(reach, size=rng.integers(1, 4)):
                data[position] = rng.integers(256)
        case 1:
            data[start] ^= 1 << rng.integers(8)
        case 2:
            del data[start:]
        case 3:
            del data[start : start + length]
        case 4:
            data[start:start] = rng.bytes(length)
        case 5:  # a field of a header
            form = rng.choice(["<B", "<H", ">H", "<I", ">I"])
            size = struct.calcsize(form)
            value = int(rng.choice(EXTREMES)) % 256**size
            data[start : start + size] = struct.pack(form, value)
        case 6:  # the end of another file, at its place or elsewhere
            data[start:] = other[rng.choice([start, rng.integers(len(other))]) :]
        case 7:  # a part left out, doubled or repeated
            parts = PART.split(encoded)
            pick = rng.integers(len(parts))
            parts[pick] *= rng.choice([0, 2, 50])
            return b"".join(parts)
        case 8:  # two parts in the place of each other
            parts = PART.split(encoded)
            one, two = rng.integers(len(parts), size=2)
            parts[one], parts[two] = parts[two], parts[one]
            return b"".join(parts)
    return bytes(data)


def mutant(originals: list[bytes], index: int) -> bytes:
    """One of the originals, damaged one to three times; the same for an index."""
    rng = np.random.default_rng(index)
    encoded = originals[index % len(originals)]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        other = originals[rng.integers(len(originals))]
        encoded = damaged(encoded or b"\0", other, rng)
    # Or nearly all damage to a PNG would end at a checksum.
    is_png = encoded.startswith(b"\x89PNG")
    return with_checksums(encoded) if is_png and rng.random() < 0.8 else encoded


def decode_mutants(indices: range, last: Path) -> tuple[Counter, list[str], int]:
    """Decodes mutants, each of which is in a file meanwhile, for after a crash.

    Returns:
        (how many of each format decoded and were refused, what else happened, bytes
        by which the peak of memory grew).
    """
    originals = {
        **FILES,
        "jpeg-exif": tagged(JFIF, exif(6), COMMENT),
        "jpeg-large": save(photo(size=(300, 290)), "JPEG", progressive=True),
        "png-16-bit": tf.io.encode_png(DEEP).numpy(),
    }
    names, contents = list(originals), list(originals.values())
    for encoded in contents:
        decode(encoded)
    before = peak_memory()
    counts: Counter = Counter()
    wrong = []
    for index in indices:
        encoded = mutant(contents, index)
        last.write_bytes(encoded)
        form = names[index % len(names)].partition("-")[0]
        try:
            pixels = decode(encoded)
        except DecodeError as error:
            counts[form, "refused"] += 1
            if len(str(error).splitlines()) != 1:
                wrong.append(f"{index}: {error}")
        except BaseException as error:
            wrong.append(f"{index}: {error!r}")
        else:
            counts[form, "decoded"] += 1
            if pixels.shape != (SIZE, SIZE, 3) or pixels.dtype != np.uint8:
                wrong.append(f"{index}: {pixels.dtype} {pixels.shape}")
            if not np.array_equal(pixels, decode(encoded)):
                wrong.append(f"{index}: other pixels the second time")
    return counts, wrong, peak_memory() - before


@linux
@pytest.mark.parametrize("mutants", [500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_damaged_file_decodes_or_is_refused(tmp_path, other_process, mutants):
    last = tmp_path / "mutant"
    work = other_process.submit(decode_mutants, range(mutants), last)
    counts, wrong, grown = work.result(600)
    assert wrong == []
    assert counts.total() == mutants
    formats = {name.partition("-")[0] for name in FILES}
    assert set(counts) == {(f, how) for f in formats for how in ("decoded", "refused")}
    assert grown < 10 * MAX_PIXELS  # what an image costs that says it has so many
