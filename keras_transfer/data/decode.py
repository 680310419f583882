"""Encoded bytes -> pixels: one TensorFlow function for training and for serving.

`decode_image` is traced into every exported SavedModel, so an image looks the same to
the served model as it did in training, to the bit. It never trusts a header: the
number of pixels is checked before a buffer of that size exists, and formats that
TensorFlow's decoders get wrong are refused with a reason.

Shrinking averages over areas: for a JPEG first in the DCT domain (decoding at 1/2, 1/4
or 1/8 is several times cheaper than decoding whole), then `tf.image.resize` by area.
Its antialiased bilinear, the usual alternative, is the slowest step of a pipeline.
"""

import functools
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from keras_transfer.errors import REFUSED, DecodeError, refusal

DECODER_VERSION = 1
"""Changes whenever the pixels of any image change: cached features depend on it."""

MAX_PIXELS = 178_956_970
"""Images with more pixels are refused; the limit at which Pillow raises."""

_HEADER_BYTES = 70
_MOST_SEGMENTS = 64  # before the EXIF one; a file of many tiny ones would take seconds
# Of data in a GIF, at most so many and one for so many bytes of the file: encoders fill
# blocks to 255 bytes, and walking a file of 1-byte ones would take minutes.
_MOST_BLOCKS, _LEAST_BLOCK = 1024, 128
# Of scans in a JPEG at the pixel limit; a smaller one may have more, up to 1024. A scan
# of a few bytes makes libjpeg go over all pixels: 0.13 s at the limit. Encoders write
# about 10, but behind a motion photo lies a video, in which a scan's mark appears by
# chance once in 64 KB: at 12 megapixels 477 are allowed.
_MOST_SCANS, _MOST_SCANS_OF_SMALL = 32, 1024
_EXIF = 0x1E1  # our own mark for "APP1 that holds EXIF"; no marker has nine bits


def decode_image(encoded: tf.Tensor, image_size: int) -> tf.Tensor:
    """Decodes one image, turns it upright, and resizes it to a square.

    The aspect ratio is not kept, as in `keras.utils.image_dataset_from_directory`.

    Args:
        encoded: string scalar: a JPEG (any color space; EXIF orientation is applied),
            PNG (any bit depth and color type), GIF (first frame), 24 or 32 bit BMP or
            still WebP file. Alpha is dropped.
        image_size: Side of the result in pixels.

    Returns:
        uint8 `[image_size, image_size, 3]` RGB pixels, 0 to 255.

    Raises:
        tf.errors.InvalidArgumentError: When run, if the image is refused or damaged.
    """
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
    return tf.ensure_shape(
        tf.switch_case(
            kind,
            [
                lambda decode=decode: decode(encoded, header, image_size)
                for decode in decoders.values()
            ]
            + [lambda: _refuse_unknown(encoded, header, image_size)],
        ),
        (image_size, image_size, 3),
    )


def resize_image(image: tf.Tensor, image_size: int) -> tf.Tensor:
    """Resizes as `decode_image` does: shrinks by area, enlarges bilinearly.

    Args:
        image: uint8 `[H, W, 3]`; each side is resized on its own.
        image_size: Side of the result in pixels.

    Returns:
        uint8 `[image_size, image_size, 3]`.
    """
    image = tf.ensure_shape(image, (None, None, 3))
    size = tf.minimum(tf.shape(image)[:2], image_size)
    image = tf.image.resize(image, size, method="area")
    image = tf.image.resize(image, (image_size, image_size), method="bilinear")
    return tf.cast(tf.round(image), tf.uint8)


def is_nearly_black(encoded: bytes, pixels: np.ndarray) -> bool:
    """Whether a file is a 16-bit PNG of which only 12 bits or fewer are used.

    Cameras and scanners of 12 bits write such files: decoded in the range of 16 bits,
    they show next to nothing.

    Args:
        encoded: An image file.
        pixels: uint8 `[H, W, 3]`, what it was decoded to.
    """
    return is_16_bit_png(encoded) and int(pixels.max()) <= 2**12 >> 8


def is_16_bit_png(encoded: bytes) -> bool:
    """Whether a file is a PNG of 16 bits a channel, by its header."""
    return encoded[:4] == b"\x89PNG" and encoded[24:25] == b"\x10"


@functools.cache
def make_decoder(image_size: int) -> Callable[[bytes], np.ndarray]:
    """`decode_image` as a Python function that may be called from many threads.

    Returns:
        A function from encoded bytes to uint8 `[image_size, image_size, 3]`. It
        raises `DecodeError`, whose message is the reason, for an unusable image.
    """
    graph = tf.function(
        lambda encoded: decode_image(encoded, image_size), autograph=False
    )
    decode_bytes = graph.get_concrete_function(tf.TensorSpec((), tf.string))

    def decode(encoded: bytes) -> np.ndarray:
        try:
            return decode_bytes(tf.constant(encoded)).numpy()
        except tf.errors.OpError as error:
            raise DecodeError(refusal(error.message, len(encoded))) from None

    return decode


def _decode_jpeg(encoded: tf.Tensor, header: tf.Tensor, image_size: int) -> tf.Tensor:
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
    # Turning the small square is the same as turning the photo, and much cheaper.
    return _upright(resize_image(image, image_size), _exif_orientation(encoded))


def _decode_png(encoded: tf.Tensor, header: tf.Tensor, image_size: int) -> tf.Tensor:
    encoded = require(
        encoded,
        _starts_with(header[8:], b"\0\0\0\rIHDR"),
        "damaged: a PNG that does not start with its header (IHDR)",
    )
    height, width = _big_endian(header[20:24]), _big_endian(header[16:20])
    encoded = _within_pixel_limit(encoded, height, width)
    return resize_image(tf.io.decode_png(encoded, channels=3), image_size)


def _decode_gif(encoded: tf.Tensor, header: tf.Tensor, image_size: int) -> tf.Tensor:
    frame, margins = _first_frame(encoded, header)
    image = tf.pad(tf.io.decode_gif(frame)[0], margins)
    return resize_image(image, image_size)


def _decode_bmp(encoded: tf.Tensor, header: tf.Tensor, image_size: int) -> tf.Tensor:
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
    return resize_image(tf.io.decode_bmp(encoded)[..., :3], image_size)


def _decode_webp(encoded: tf.Tensor, header: tf.Tensor, image_size: int) -> tf.Tensor:
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
    # With channels=3 TensorFlow refuses a WebP that has alpha.
    frames = tf.io.decode_image(encoded, channels=0, expand_animations=True)
    return resize_image(tf.ensure_shape(frames, [None] * 4)[0, ..., :3], image_size)


def _refuse_unknown(
    encoded: tf.Tensor, header: tf.Tensor, image_size: int
) -> tf.Tensor:
    tiff = _starts_with(header, b"II*\0") | _starts_with(header, b"MM\0*")
    avif = _starts_with(header[4:], b"ftyp")
    empty = tf.strings.length(encoded) == 0
    reason = tf.where(empty, "an empty file", "not an image")
    reason = tf.where(tiff, "a TIFF; convert it to JPEG or PNG", reason)
    reason = tf.where(avif, "an AVIF or HEIC; convert it to JPEG or PNG", reason)
    with tf.control_dependencies([require(encoded, tf.constant(False), reason)]):
        return tf.zeros((image_size, image_size, 3), tf.uint8)


def _upright(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Undoes an EXIF orientation (1 to 8) of a square image."""

    def is_any(*values: int) -> tf.Tensor:
        return tf.reduce_any(orientation == tf.constant(values))

    def turn() -> tf.Tensor:
        turned = tf.where(is_any(5, 6, 7, 8), tf.transpose(image, (1, 0, 2)), image)
        turned = tf.where(is_any(2, 3, 6, 7), turned[:, ::-1], turned)
        return tf.where(is_any(3, 4, 7, 8), turned[::-1], turned)

    return tf.cond(orientation > 1, turn, lambda: image)


def _exif_orientation(encoded: tf.Tensor) -> tf.Tensor:
    """int32 1 to 8 of a JPEG; 1 where it says nothing or nothing valid.

    Walks the application and comment segments that a file starts with, where EXIF
    2.32 wants its own. Source of the layout: JPEG annex B.
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
    """int32 value of tag 0x0112 in the first directory of a TIFF block."""
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
    """A GIF cut off after its first image, and what `tf.pad` puts around that image.

    A frame that reaches out of the screen enlarges the canvas, as in Pillow. The cut
    bounds what decoding can cost. The image is moved to the screen's corner: TensorFlow
    crops what lies elsewhere. Source: GIF89a specification.
    """
    length = tf.strings.length(encoded)

    def byte(position: tf.Tensor) -> tf.Tensor:
        return _integers(tf.strings.substr(encoded, position, 1), 1)[0]

    def table_size(flags: tf.Tensor) -> tf.Tensor:
        size = 3 * tf.bitwise.left_shift(2, tf.bitwise.bitwise_and(flags, 7))
        return tf.where(flags >= 0x80, size, 0)

    limit = _MOST_BLOCKS + length // _LEAST_BLOCK

    def mark(position: tf.Tensor, steps: tf.Tensor) -> tf.Tensor:
        """The byte there; 0, which ends a walk, where it has gone too far."""
        is_far = (position >= length) | (steps >= limit)
        return tf.where(is_far, 0, byte(tf.minimum(position, length - 1)))

    def after_blocks(
        position: tf.Tensor, steps: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        end, steps = tf.while_loop(
            lambda at, steps: mark(at, steps) > 0,
            lambda at, steps: (at + 1 + byte(at), steps + 1),
            (position, steps),
            parallel_iterations=1,
        )
        return end + 1, steps + 1

    def require_few(steps: tf.Tensor) -> tf.Tensor:
        return require(encoded, steps < limit, "a GIF of too many small blocks")

    # Extensions come first: a mark, a label, and blocks of data.
    position, steps = tf.while_loop(
        lambda at, steps: mark(at, steps) == 0x21,
        lambda at, steps: after_blocks(at + 2, steps),
        (13 + table_size(header[10]), tf.constant(0)),
        parallel_iterations=1,
    )
    encoded = require_few(steps)
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
    end, steps = after_blocks(position + 11 + table_size(frame[9]), steps)
    encoded = require_few(steps)
    encoded = require(encoded, end <= length, "damaged or truncated in its first image")
    before = tf.strings.substr(encoded, 0, position + 1)
    after = tf.strings.substr(encoded, position + 5, end - position - 5)
    return tf.strings.join([before, b"\0\0\0\0", after, b";"]), [
        [top, height - bottom],
        [left, width - right],
        [0, 0],
    ]


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
    """Bounds how often a JPEG makes its decoder go over the pixels.

    Splitting counts the marks of scans at less than a nanosecond a byte. Those of
    thumbnails count too.
    """
    parts = tf.raw_ops.StringSplitV2(
        input=[encoded], sep=b"\xff\xda", maxsplit=_MOST_SCANS_OF_SMALL + 1
    ).values
    scans = tf.size(parts) - 1
    passes = _product(scans, height, width)
    few = (passes <= _MOST_SCANS * MAX_PIXELS) & (scans <= _MOST_SCANS_OF_SMALL)
    return require(encoded, few, "a JPEG of too many scans")


def _product(*factors: tf.Tensor) -> tf.Tensor:
    """In float64, where that of hostile 32-bit numbers does not overflow."""
    return tf.reduce_prod(tf.cast(tf.stack(factors), tf.float64))


def require(
    tensor: tf.Tensor, condition: tf.Tensor, reason: str | tf.Tensor
) -> tf.Tensor:
    """A tensor, but only to be had where the condition holds.

    An assertion alone would not do: decoders have no side effects, so TensorFlow
    may run them before it.
    """
    message = tf.strings.join([REFUSED, reason])
    with tf.control_dependencies([tf.debugging.Assert(condition, [message])]):
        return tf.identity(tensor)


def _integers(encoded: tf.Tensor, count: int) -> tf.Tensor:
    """int32 `[count]`: the first bytes, zeros where there are fewer."""
    data = tf.io.decode_raw(encoded, tf.uint8, fixed_length=count)
    return tf.cast(data, tf.int32)


def _starts_with(data: tf.Tensor, magic: bytes) -> tf.Tensor:
    return tf.reduce_all(data[: len(magic)] == tf.constant(list(magic)))


def _little_endian(data: tf.Tensor) -> tf.Tensor:
    return _big_endian(data[::-1])


def _big_endian(data: tf.Tensor) -> tf.Tensor:
    shifts = 8 * tf.range(tf.size(data) - 1, -1, -1)
    return tf.reduce_sum(tf.bitwise.left_shift(data, shifts))
