"""TIFF -> pixels, through Pillow.

Pillow and libtiff get a copy of the file whose only directory lists the tags that the
pixels need, once each. Everything else that a TIFF may contain (further pages, EXIF,
previews, tags that share or exceed the bytes of the file) is never read.
"""

import io
import struct
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import COMPRESSION_INFO, TiffImageFile

from keras_transfer.data.formats.limits import check_pixels
from keras_transfer.data.formats.pixels import to_array, upright
from keras_transfer.data.formats.silence import silence_libtiff
from keras_transfer.errors import DecodeError

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_STRIP_OFFSETS, _ORIENTATION, _SAMPLES, _PLANAR = 273, 274, 277, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS = 322, 323, 324
_SAMPLE_FORMAT = 339
# Of the tags that Pillow and libtiff decode pixels by, 512 to 521 belong to old JPEG.
_KEPT = frozenset(
    [
        *(_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, 266, _STRIP_OFFSETS),
        *(_SAMPLES, 278, 279, _PLANAR, 292, 293, 317, 320, _TILE_WIDTH, _TILE_HEIGHT),
        *(_TILE_OFFSETS, 325, 332, 338, _SAMPLE_FORMAT, 347, 529, 530, 531, 532),
        *range(512, 522),
    ]
)
_TYPES = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8} | {
    **{11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
}
_MOST_TAGS = 4096
# Pillow takes about 20 microseconds per strip or tile.
_MOST_PARTS = 65_536
# libtiff allocates whole tiles, and tiles of small images may be larger than these.
_TILE_PIXELS = 2**24


def decode_tiff(encoded: bytes) -> np.ndarray:
    """Decodes the first page of a TIFF and rotates it upright.

    Args:
        encoded: The file's content.

    Returns:
        uint8 `[H, W]` or RGB `[H, W, 3]`, or uint16 `[H, W]` if it is gray with more
        than 8 bits. Alpha is dropped, 16-bit colors keep their upper 8 bits, and color
        profiles are ignored, as the decoder does with a PNG.

    Raises:
        DecodeError: If the image is too large or its pixels are in an unsupported form.
        Exception: Of any kind, if it is damaged.
    """
    silence_libtiff()
    directory = _Directory(encoded)
    is_inverted = _check(directory)
    image = _open(directory)
    check_pixels(*image.size)
    try:
        image.load()
    except OSError:
        if directory.number(_COMPRESSION, 1) == 50_001:
            raise DecodeError(_unread_compression(50_001)) from None
        raise
    pixels = _pixels(image)
    if is_inverted:
        pixels = ~pixels
    if directory.number(_BITS, 1) == 12:
        pixels = pixels << 4 | pixels >> 8
    return upright(pixels, directory.number(_ORIENTATION, 1))


class _Entry(NamedTuple):
    kind: int
    values: int  # how many
    data: bytes


class _Directory:
    """The first directory of a TIFF or BigTIFF."""

    def __init__(self, encoded: bytes):
        self._encoded = encoded
        self._order = "<" if encoded[:2] == b"II" else ">"
        is_big = b"+" in encoded[2:4]
        count_form, offset = ("Q", "Q") if is_big else ("H", "I")
        width = struct.calcsize(offset)
        (start,) = self._unpack(offset, width)
        (count,) = self._unpack(count_form, start)
        if count > _MOST_TAGS:
            raise DecodeError("a TIFF of too many tags")
        start += struct.calcsize(count_form)
        self._entries: dict[int, _Entry] = {}
        left = len(encoded)  # values may not overlap
        for place in range(start, start + count * (4 + 2 * width), 4 + 2 * width):
            tag, kind, values = self._unpack("HH" + offset, place)
            if tag in self._entries or (tag not in _KEPT and tag != _ORIENTATION):
                continue
            size = values * _TYPE_BYTES.get(kind, 1)
            field = place + 4 + width
            if size > width:
                (field,) = self._unpack(offset, field)
            left -= size
            if left < 0 or field + size > len(encoded):
                raise DecodeError(f"a damaged TIFF ({len(encoded):,} bytes)")
            data = encoded[field : field + size]
            self._entries[tag] = _Entry(kind, values, data)

    def _unpack(self, form: str, position: int) -> tuple[int, ...]:
        return struct.unpack_from(self._order + form, self._encoded, position)

    def count(self, tag: int) -> int:
        """Returns how many values a tag has; 0 if it is missing."""
        return self._entries[tag].values if tag in self._entries else 0

    def numbers(self, tag: int) -> tuple[int, ...]:
        """Returns the values of a tag of integers; () if it is missing."""
        entry = self._entries.get(tag)
        if entry is None or entry.kind not in _TYPES:
            return ()
        form = f"{self._order}{entry.values}{_TYPES[entry.kind]}"
        return struct.unpack(form, entry.data)

    def number(self, tag: int, default: int) -> int:
        """Returns the first value of a tag."""
        return next(iter(self.numbers(tag)), default)

    def replace(self, tag: int, value: int) -> None:
        """Replaces the value of a tag by one 16-bit number."""
        self._entries[tag] = _Entry(3, 1, struct.pack(self._order + "H", value))

    def file(self) -> bytes:
        """Returns the image as a TIFF with only the tags that are kept.

        It is never a BigTIFF: Pillow reads only those of little-endian order.
        """
        entries, values = [], []
        content = self._encoded[8:] + bytes(-len(self._encoded) % 8)
        start = 8 + len(content)
        for tag, (kind, count, data) in sorted(self._entries.items()):
            if tag == _ORIENTATION:
                continue
            if kind == 16:
                kind = 4
                data = struct.pack(f"{self._order}{count}I", *self.numbers(tag))
            if len(data) > 4:
                place = start
                values.append(data + bytes(-len(data) % 8))
                start += len(values[-1])
                data = struct.pack(self._order + "I", place)
            entry = (tag, kind, count, data)
            entries.append(struct.pack(self._order + "HHI4s", *entry))
        return b"".join(
            [
                b"II*\0" if self._order == "<" else b"MM\0*",
                struct.pack(self._order + "I", start),
                content,
                *values,
                struct.pack(self._order + "H", len(entries)),
                *entries,
                bytes(4),  # no further directory
            ]
        )


def _check(directory: _Directory) -> bool:
    """Rejects what Pillow would read for too long, wrongly or not at all.

    Returns:
        Whether the pixels must be inverted, which Pillow does not do at 16 bits.
    """
    width, height = directory.number(_WIDTH, 0), directory.number(_HEIGHT, 0)
    check_pixels(width, height)
    parts = max(directory.count(_STRIP_OFFSETS), directory.count(_TILE_OFFSETS))
    tile = directory.number(_TILE_WIDTH, 0) * directory.number(_TILE_HEIGHT, 0)
    if parts > _MOST_PARTS or tile > max(_TILE_PIXELS, width * height):
        raise DecodeError("a TIFF of too many or too large tiles or strips")
    forms = {2: "signed", 3: "floating point", 5: "complex", 6: "complex"}
    form = forms.get(max(directory.numbers(_SAMPLE_FORMAT), default=1))
    bits = max(directory.numbers(_BITS), default=1)
    if form or bits > 16:
        raise DecodeError(
            f"a TIFF of {form or f'{bits}-bit'} pixels; save it with 8 or 16 bits "
            "per channel, unsigned"
        )
    compression = directory.number(_COMPRESSION, 1)
    if compression not in COMPRESSION_INFO:
        raise DecodeError(_unread_compression(compression))
    samples = directory.number(_SAMPLES, 1)
    if bits == 16 and samples > 1 and directory.number(_PLANAR, 1) == 2:
        raise DecodeError("a TIFF of 16-bit planes; save it with interleaved channels")
    is_inverted = bits == 16 and directory.number(_PHOTOMETRIC, 0) == 0
    if is_inverted:
        directory.replace(_PHOTOMETRIC, 1)
    return is_inverted


def _unread_compression(number: int) -> str:
    return (
        f"a TIFF with compression {number}, which Pillow does not read; save it with "
        "LZW, deflate or none"
    )


def _open(directory: _Directory) -> TiffImageFile:
    try:
        return TiffImageFile(io.BytesIO(directory.file()))
    except SyntaxError as error:
        if "pixel mode" in str(error) or "data organization" in str(error):
            raise DecodeError(
                "a TIFF whose combination of channels and bits Pillow does not read; "
                "save it as gray or RGB with 8 or 16 bits"
            ) from None
        raise


def _pixels(image: Image.Image) -> np.ndarray:
    """Returns uint8 `[H, W]`, `[H, W, 3]` or uint16 `[H, W]`."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N"):
        return to_array(image).astype(np.uint16, copy=False)
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.mode in ("1", "LA"):
        image = image.convert("L")
    elif image.mode == "LAB":
        image = _from_lab(image)
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return to_array(image)


def _from_lab(image: Image.Image) -> Image.Image:
    lab, rgb = (
        ImageCms.ImageCmsProfile(ImageCms.createProfile(x)) for x in ("LAB", "sRGB")
    )
    converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    assert converted is not None  # it is None only if converted in place
    return converted
