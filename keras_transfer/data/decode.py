"""Encoded bytes -> pixels: one TensorFlow function for training and for serving.

`decode_image` is traced into every exported SavedModel, so the served model sees
exactly the same pixels as in training. It never trusts a header: the number of pixels
is checked before a buffer of that size is allocated, and formats that TensorFlow
decodes incorrectly are refused with a reason.

Images are shrunk by area averaging. A JPEG is first shrunk in the DCT domain (decoding
at 1/2, 1/4 or 1/8 is several times cheaper than decoding at full size), then by
`tf.image.resize` with `area`. The usual alternative, antialiased bilinear, is the
slowest step of a pipeline.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_transfer.data.formats.convert import (
    converted_pixels,
    encode_png,
    file_type,
)
from keras_transfer.data.formats.limits import MAX_PIXELS
from keras_transfer.errors import REFUSED, DecodeError, refusal

DECODER_VERSION = 1
"""Changes whenever the pixels of any image change, because features are cached."""

_HEADER_BYTES = 70
# Limit on JPEG segments before the EXIF one; walking many tiny ones takes seconds.
_MOST_SEGMENTS = 64
# A GIF may have 1024 data blocks plus one per 128 bytes of the file. Encoders fill
# blocks to 255 bytes, and walking a file of 1-byte blocks would take minutes.
_MOST_BLOCKS, _LEAST_BLOCK = 1024, 128
# A JPEG at the pixel limit may have 32 scans; a smaller one may have proportionally
# more, up to 1024. A scan of a few bytes makes libjpeg process all pixels, which takes
# 0.13 s at the limit. Encoders write about 10 scans. But a motion photo is followed by
# a video, in which the scan marker appears by chance every 64 KB; at 12 megapixels, 477
# scans are allowed.
_MOST_SCANS, _MOST_SCANS_OF_SMALL = 32, 1024
_EXIF = 0x1E1  # stands for "APP1 with EXIF"; real markers have only eight bits


def decode_image(encoded: tf.Tensor, image_size: int) -> tf.Tensor:
    """Decodes an image, rotates it upright and resizes it to a square.

    The aspect ratio is not preserved, as in `keras.utils.image_dataset_from_directory`.

    Args:
        encoded: String scalar with the content of a JPEG (any color space; EXIF
            orientation is applied), PNG (any bit depth and color type), GIF (first
            frame), 24- or 32-bit BMP or still WebP file. Alpha is dropped.
        image_size: Side of the result in pixels.

    Returns:
        uint8 `[image_size, image_size, 3]` RGB pixels in [0, 255].

    Raises:
        tf.errors.InvalidArgumentError: At run time, if the image is refused or damaged.
    """
    pixels, _ = _decode_and_measure(encoded, image_size)
    return pixels


def _decode_and_measure(
    encoded: tf.Tensor, image_size: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the pixels as `decode_image` does, and int32 `[2]` (height, width)."""
    header = _integers(encoded, _HEADER_BYTES)
    decoders = {
        b"\xff\xd8\xff": _decode_jpeg,
        b"\x89PNG\r\n\x1a\n": _decode_png,
        b"GIF8": _decode_gif,
        b"BM": _decode_bmp,
        b"RIFF": _decode_webp,
    }
    kind = tf.constant(len(decoders))
    for index, magic in enumerate(decoders):
        kind = tf.where(_starts_with(header, magic), index, kind)
    pixels, size = tf.switch_case(
        kind,
        [
            lambda decode=decode: decode(encoded, header, image_size)
            for decode in decoders.values()
        ]
        + [lambda: _refuse_unknown(encoded, header, image_size)],
    )
    return tf.ensure_shape(pixels, (image_size, image_size, 3)), size


def resize_image(image: tf.Tensor, image_size: int) -> tf.Tensor:
    """Resizes like `decode_image`: shrinks by area averaging, enlarges bilinearly.

    Args:
        image: uint8 `[H, W, 3]`; height and width are resized independently.
        image_size: Side of the result in pixels.

    Returns:
        uint8 `[image_size, image_size, 3]`.
    """
    image = tf.ensure_shape(image, (None, None, 3))
    size = tf.minimum(tf.shape(image)[:2], image_size)
    image = tf.image.resize(image, size, method="area")
    image = tf.image.resize(image, (image_size, image_size), method="bilinear")
    return tf.cast(tf.round(image), tf.uint8)


class DecodedImage(NamedTuple):
    """An image as the base sees it, with its original size.

    Attributes:
        pixels: uint8 `[image_size, image_size, 3]` RGB pixels.
        height: Height of the full image in pixels, after EXIF rotation.
        width: Width of the full image in pixels, after EXIF rotation.
        is_16_bit: Whether it is, or was converted to, a PNG of 16 bits per channel.
    """

    pixels: np.ndarray
    height: int
    width: int
    is_16_bit: bool = False


@functools.cache
def make_measuring_decoder(image_size: int) -> Callable[[bytes], DecodedImage]:
    """Creates a thread-safe Python function that decodes like `decode_image`.

    It also takes what `formats.to_png` converts: TIFF, HEIC, AVIF, DICOM and arrays.

    Args:
        image_size: Side of the decoded images in pixels.

    Returns:
        A function from encoded bytes to a decoded image. For an unusable image it
        raises `DecodeError`, whose message is the reason.
    """
    graph = tf.function(
        lambda encoded: _decode_and_measure(encoded, image_size), autograph=False
    )
    decode_bytes = graph.get_concrete_function(tf.TensorSpec((), tf.string))
    resizing = tf.function(
        lambda image: resize_image(image, image_size), autograph=False
    )
    resize = resizing.get_concrete_function(tf.TensorSpec((None, None, 3), tf.uint8))

    def decode(encoded: bytes) -> DecodedImage:
        converted = converted_pixels(encoded)
        if converted is not None and converted.dtype == np.uint8:
            # What the graph would decode its PNG to, without the detour.
            image = converted if converted.ndim == 3 else np.stack(3 * [converted], -1)
            pixels = resize(tf.constant(image)).numpy()
            return DecodedImage(pixels, *converted.shape[:2])
        decodable = encoded if converted is None else encode_png(converted)
        try:
            pixels, size = decode_bytes(tf.constant(decodable))
        except tf.errors.OpError as error:
            raise DecodeError(refusal(error.message, len(encoded))) from None
        is_16_bit = file_type(decodable) == "PNG" and decodable[24:25] == b"\x10"
        height, width = size.numpy().tolist()
        return DecodedImage(pixels.numpy(), height, width, is_16_bit)

    return decode


@functools.cache
def make_decoder(image_size: int) -> Callable[[bytes], np.ndarray]:
    """Like `make_measuring_decoder`, but the function returns only the pixels."""
    decode = make_measuring_decoder(image_size)
    return lambda encoded: decode(encoded).pixels


_Decoded = tuple[tf.Tensor, tf.Tensor]  # pixels and size; see `_decode_and_measure`


def _decode_jpeg(encoded: tf.Tensor, header: tf.Tensor, image_size: int) -> _Decoded:
    del header
    height, width = tf.unstack(tf.image.extract_jpeg_shape(encoded)[:2])
    encoded = _within_pixel_limit(encoded, height, width)
    encoded = _within_scan_limit(encoded, height, width)
    fitting = tf.minimum(height, width) // image_size

    def decode_scaled(ratio: int) -> tf.Tensor:
        return tf.io.decode_jpeg(
            encoded, channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE"
        )

    ratios = (1, 2, 4, 8)
    index = tf.reduce_sum(tf.cast(fitting >= tf.constant(ratios[1:]), tf.int32))
    image = tf.switch_case(index, [lambda r=r: decode_scaled(r) for r in ratios])
    # Rotating the small square is equivalent to rotating the photo, and much cheaper.
    orientation = _exif_orientation(encoded)
    pixels = _upright(resize_image(image, image_size), orientation)
    is_turned = orientation >= 5
    return pixels, tf.where(is_turned, [width, height], [height, width])


def _decode_png(encoded: tf.Tensor, header: tf.Tensor, image_size: int) -> _Decoded:
    encoded = require(
        encoded,
        _starts_with(header[8:], b"\0\0\0\rIHDR"),
        "damaged: a PNG that does not start with its header (IHDR)",
    )
    height, width = _big_endian(header[20:24]), _big_endian(header[16:20])
    encoded = _within_pixel_limit(encoded, height, width)
    image = tf.io.decode_png(encoded, channels=3)
    return resize_image(image, image_size), tf.stack([height, width])


def _decode_gif(encoded: tf.Tensor, header: tf.Tensor, image_size: int) -> _Decoded:
    frame, margins = _first_frame(encoded, header)
    image = tf.pad(tf.io.decode_gif(frame)[0], margins)
    return resize_image(image, image_size), tf.shape(image)[:2]


def _decode_bmp(encoded: tf.Tensor, header: tf.Tensor, image_size: int) -> _Decoded:
    width = _little_endian(header[18:22])
    height = tf.abs(tf.bitcast(_little_endian(header[22:26]), tf.int32))
    bits = _little_endian(header[28:30])
    compression = _little_endian(header[30:34])
    red_mask = _little_endian(header[54:58])
    plain = (compression == 0) | ((compression == 3) & (red_mask == 0xFF0000))
    encoded = require(
        encoded,
        ((bits == 24) | (bits == 32)) & plain,
        "a BMP with a palette, 16 bits or compression; only 24 and 32 bit BMP",
    )
    encoded = _within_pixel_limit(encoded, height, width)
    image = tf.io.decode_bmp(encoded)[..., :3]
    return resize_image(image, image_size), tf.stack([height, width])


def _decode_webp(encoded: tf.Tensor, header: tf.Tensor, image_size: int) -> _Decoded:
    lossy = _starts_with(header[12:], b"VP8 ")
    lossless = _starts_with(header[12:], b"VP8L")
    extended = _starts_with(header[12:], b"VP8X")
    encoded = require(
        encoded,
        _starts_with(header[8:], b"WEBP") & (lossy | lossless | extended),
        "not an image: a RIFF file without WebP inside",
    )
    animated = extended & (tf.bitwise.bitwise_and(header[20], 0x02) != 0)
    encoded = require(encoded, ~animated, "an animated WebP; only still WebP")
    packed = _little_endian(header[21:25])  # VP8L: two 14-bit fields
    width = tf.where(
        extended,
        _little_endian(header[24:27]) + 1,
        tf.where(lossless, packed % 2**14 + 1, _little_endian(header[26:28]) % 2**14),
    )
    height = tf.where(
        extended,
        _little_endian(header[27:30]) + 1,
        tf.where(
            lossless,
            packed // 2**14 % 2**14 + 1,
            _little_endian(header[28:30]) % 2**14,
        ),
    )
    encoded = _within_pixel_limit(encoded, height, width)
    # With channels=3, TensorFlow rejects a WebP that has alpha.
    frames = tf.io.decode_image(encoded, channels=0, expand_animations=True)
    image = tf.ensure_shape(frames, [None] * 4)[0, ..., :3]
    return resize_image(image, image_size), tf.stack([height, width])


_CONVERT = "; convert it with keras_transfer.to_png, or to JPEG or PNG"


def _refuse_unknown(encoded: tf.Tensor, header: tf.Tensor, image_size: int) -> _Decoded:
    length = tf.strings.length(encoded)
    tiff = tf.reduce_any(
        [_starts_with(header, x) for x in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")]
    )
    avif = _starts_with(header[4:], b"ftyp")
    dicom = tf.strings.substr(encoded, tf.minimum(128, length), 4) == b"DICM"
    empty = length == 0
    reason = tf.where(empty, "an empty file", "not an image")
    for is_kind, kind in (
        (tiff, "a TIFF"),
        (avif, "an AVIF or HEIC"),
        (dicom, "a DICOM"),
    ):
        reason = tf.where(is_kind, kind + _CONVERT, reason)
    with tf.control_dependencies([require(encoded, tf.constant(False), reason)]):
        return tf.zeros((image_size, image_size, 3), tf.uint8), tf.zeros(2, tf.int32)


def _upright(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Undoes the EXIF orientation (1 to 8) of a square image."""

    def is_any(*values: int) -> tf.Tensor:
        return tf.reduce_any(orientation == tf.constant(values))

    def turn() -> tf.Tensor:
        turned = tf.where(is_any(5, 6, 7, 8), tf.transpose(image, (1, 0, 2)), image)
        turned = tf.where(is_any(2, 3, 6, 7), turned[:, ::-1], turned)
        return tf.where(is_any(3, 4, 7, 8), turned[::-1], turned)

    return tf.cond(orientation > 1, turn, lambda: image)


def _exif_orientation(encoded: tf.Tensor) -> tf.Tensor:
    """Reads the EXIF orientation of a JPEG, int32 1 to 8; 1 if missing or not valid.

    Walks the application and comment segments at the start of the file, where EXIF 2.32
    requires its own segment to be. Source of the layout: JPEG annex B.
    """
    length = tf.strings.length(encoded)

    def is_open(position: tf.Tensor, marker: tf.Tensor) -> tf.Tensor:
        is_application = (marker >= 0xE0) & (marker <= 0xEF)
        return (position + 10 < length) & (is_application | (marker == 0xFE))

    def advance(position: tf.Tensor, marker: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        del marker
        segment = _integers(tf.strings.substr(encoded, position, 10), 10)
        is_exif = (segment[1] == 0xE1) & _starts_with(segment[4:], b"Exif\0")
        size = tf.where(is_exif, 0, 2 + 256 * segment[2] + segment[3])
        return position + size, tf.where(is_exif, _EXIF, segment[1])

    start = (tf.constant(2), tf.constant(0xE0))
    position, marker = tf.while_loop(
        is_open,
        advance,
        start,
        parallel_iterations=1,
        maximum_iterations=_MOST_SEGMENTS,
    )
    return tf.cond(
        marker == _EXIF,
        lambda: _tiff_orientation(
            tf.strings.substr(encoded, position + 10, tf.minimum(65_536, length))
        ),
        lambda: tf.constant(1),
    )


def _tiff_orientation(tiff: tf.Tensor) -> tf.Tensor:
    """Reads the orientation, tag 0x0112, in the first directory of a TIFF block.

    Returns:
        int32 scalar, 1 to 8; 1 if it is missing or not valid.
    """
    data = tf.cast(tf.io.decode_raw(tiff, tf.uint8), tf.int32)
    size = tf.size(data)
    little = _starts_with(tf.pad(data, ((0, 4),)), b"II")
    data = tf.pad(data, ((0, 16),))

    def integer(offset: tf.Tensor | int, count: int) -> tf.Tensor:
        field = data[offset : offset + count]
        return tf.where(little, _little_endian(field), _big_endian(field))

    directory = tf.clip_by_value(integer(4, 4), 0, size)
    count = tf.clip_by_value(integer(directory, 2), 0, (size - directory) // 12)
    entries = tf.reshape(data[directory + 2 : directory + 2 + 12 * count], (count, 12))
    low = tf.cast(tf.where(little, 0, 1), tf.int32)
    tags = tf.gather(entries, low, axis=1) + 256 * tf.gather(entries, 1 - low, axis=1)
    values = tf.gather(entries, 8 + low, axis=1)
    found = tf.boolean_mask(values, tags == 0x0112)
    value = tf.concat([found, [1]], axis=0)[0]
    return tf.where((value >= 1) & (value <= 8), value, 1)


def _first_frame(
    encoded: tf.Tensor, header: tf.Tensor
) -> tuple[tf.Tensor, list[list[tf.Tensor | int]]]:
    """Truncates a GIF after its first image, which bounds the cost of decoding it.

    The image is moved to the corner of the screen, because TensorFlow crops one that is
    elsewhere. A frame that extends beyond the screen enlarges the canvas, as in Pillow.
    Source: GIF89a specification.

    Returns:
        (the truncated GIF, the margins that `tf.pad` must add around its image).
    """
    length = tf.strings.length(encoded)
    blocks = _Blocks(encoded)
    # Extensions come first, each with an introducer, a label and data blocks.
    position, steps = tf.while_loop(
        lambda at, steps: blocks.mark(at, steps) == 0x21,
        lambda at, steps: blocks.skip(at + 2, steps),
        (13 + _color_table_size(header[10]), tf.constant(0)),
        parallel_iterations=1,
    )
    encoded = blocks.require_few(encoded, steps)
    encoded = require(
        encoded, position + 10 < length, "damaged or truncated before its image"
    )
    frame = _integers(tf.strings.substr(encoded, position, 10), 10)
    left, top = _little_endian(frame[1:3]), _little_endian(frame[3:5])
    right = left + _little_endian(frame[5:7])
    bottom = top + _little_endian(frame[7:9])
    width = tf.maximum(_little_endian(header[6:8]), right)
    height = tf.maximum(_little_endian(header[8:10]), bottom)
    encoded = _within_pixel_limit(encoded, height, width)
    data = position + 11 + _color_table_size(frame[9])
    end, steps = blocks.skip(data, steps)
    encoded = blocks.require_few(encoded, steps)
    encoded = require(encoded, end <= length, "damaged or truncated in its first image")
    before = tf.strings.substr(encoded, 0, position + 1)
    after = tf.strings.substr(encoded, position + 5, end - position - 5)
    return tf.strings.join([before, b"\0\0\0\0", after, b";"]), [
        [top, height - bottom],
        [left, width - right],
        [0, 0],
    ]


def _color_table_size(flags: tf.Tensor) -> tf.Tensor:
    """Returns the number of bytes of the color table that a GIF's flags announce."""
    size = 3 * tf.bitwise.left_shift(2, tf.bitwise.bitwise_and(flags, 7))
    return tf.where(flags >= 0x80, size, 0)


class _Blocks:
    """The blocks of a GIF, of which a limited number is walked."""

    def __init__(self, encoded: tf.Tensor):
        self._encoded = encoded
        self._length = tf.strings.length(encoded)
        self._limit = _MOST_BLOCKS + self._length // _LEAST_BLOCK

    def mark(self, position: tf.Tensor, steps: tf.Tensor) -> tf.Tensor:
        """Reads a byte; returns 0, which ends the walk, if it has gone too far."""
        is_far = (position >= self._length) | (steps >= self._limit)
        return tf.where(is_far, 0, self._byte(tf.minimum(position, self._length - 1)))

    def skip(
        self, position: tf.Tensor, steps: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the position after data blocks, and the blocks walked so far."""
        end, steps = tf.while_loop(
            lambda at, steps: self.mark(at, steps) > 0,
            lambda at, steps: (at + 1 + self._byte(at), steps + 1),
            (position, steps),
            parallel_iterations=1,
        )
        return end + 1, steps + 1

    def require_few(self, tensor: tf.Tensor, steps: tf.Tensor) -> tf.Tensor:
        """Returns a tensor that is available only if the limit was not reached."""
        return require(tensor, steps < self._limit, "a GIF of too many small blocks")

    def _byte(self, position: tf.Tensor) -> tf.Tensor:
        return _integers(tf.strings.substr(self._encoded, position, 1), 1)[0]


def _within_pixel_limit(
    encoded: tf.Tensor, height: tf.Tensor, width: tf.Tensor
) -> tf.Tensor:
    pixels = _product(height, width)
    valid = (height > 0) & (width > 0) & (pixels <= MAX_PIXELS)
    size = tf.strings.join([tf.as_string(width), "x", tf.as_string(height)])
    reason = tf.strings.join([size, f" pixels; at most {MAX_PIXELS:,} are decoded"])
    return require(encoded, valid, reason)


def _within_scan_limit(
    encoded: tf.Tensor, height: tf.Tensor, width: tf.Tensor
) -> tf.Tensor:
    """Limits how many passes over its pixels a JPEG demands of the decoder.

    Scan markers, including those of thumbnails, are counted by splitting the string,
    which takes less than a nanosecond per byte.
    """
    parts = tf.raw_ops.StringSplitV2(
        input=[encoded], sep=b"\xff\xda", maxsplit=_MOST_SCANS_OF_SMALL + 1
    ).values
    scans = tf.size(parts) - 1
    passes = _product(scans, height, width)
    few = (passes <= _MOST_SCANS * MAX_PIXELS) & (scans <= _MOST_SCANS_OF_SMALL)
    return require(encoded, few, "a JPEG of too many scans")


def _product(*factors: tf.Tensor) -> tf.Tensor:
    """Multiplies in float64, so that hostile 32-bit numbers cannot overflow."""
    return tf.reduce_prod(tf.cast(tf.stack(factors), tf.float64))


def require(
    tensor: tf.Tensor, condition: tf.Tensor, reason: str | tf.Tensor
) -> tf.Tensor:
    """Returns a tensor that can be evaluated only if a condition holds.

    A separate assertion would not suffice: decoders have no side effects, so TensorFlow
    may run them before it.

    Args:
        tensor: The tensor to return.
        condition: Boolean scalar.
        reason: Error message if the condition does not hold.
    """
    message = tf.strings.join([REFUSED, reason])
    with tf.control_dependencies([tf.debugging.Assert(condition, [message])]):
        return tf.identity(tensor)


def _integers(encoded: tf.Tensor, count: int) -> tf.Tensor:
    """Converts the first bytes to int32 `[count]`, padded with zeros."""
    data = tf.io.decode_raw(encoded, tf.uint8, fixed_length=count)
    return tf.cast(data, tf.int32)


def _starts_with(data: tf.Tensor, magic: bytes) -> tf.Tensor:
    return tf.reduce_all(data[: len(magic)] == tf.constant(list(magic)))


def _little_endian(data: tf.Tensor) -> tf.Tensor:
    return _big_endian(data[::-1])


def _big_endian(data: tf.Tensor) -> tf.Tensor:
    shifts = 8 * tf.range(tf.size(data) - 1, -1, -1)
    return tf.reduce_sum(tf.bitwise.left_shift(data, shifts))
