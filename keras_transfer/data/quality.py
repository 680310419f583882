"""Quality measures of an image's file and pixels, computed while decoding.

They become columns of a run's image table, for inspection and audits.
"""

import functools
import io

import numpy as np
from PIL.JpegImagePlugin import JpegImageFile

from keras_transfer.data.decode import DecodedImage
from keras_transfer.data.formats.convert import file_type

QUALITY_VERSION = 1
"""Changes whenever a measure of any image changes, because measures are cached."""

FILE_TYPES = (
    *("JPEG", "PNG", "GIF", "BMP", "WebP"),
    *("TIFF", "HEIC", "AVIF", "DICOM", "array"),
)

QUALITY_DTYPE = np.dtype(
    [
        ("bytes", "<i8"),  # size of the file
        ("width", "<i4"),  # of the full image in pixels, after EXIF rotation
        ("height", "<i4"),  # of the full image in pixels, after EXIF rotation
        ("brightness", "<f4"),  # mean luminance, 0 (black) to 255 (white)
        ("contrast", "<f4"),  # standard deviation of luminance, 0 to 127.5
        ("sharpness", "<f4"),  # variance of the Laplacian of luminance
        ("perceptual_hash", "<u8"),  # 64 bits; similar images differ in few of them
        ("file_type", "u1"),  # index into FILE_TYPES
        ("jpeg_quality", "u1"),  # libjpeg's quality, 1 to 100; 0 if not a JPEG
        ("is_gray", "?"),
        ("is_nearly_black", "?"),  # 16 bits, at most 1/16 brightness, resized
    ]
)

_LUMINANCE = (0.299, 0.587, 0.114)  # Rec. ITU-R BT.601
_GRAY_LEVELS = 8  # tolerance between channels, as JPEG changes gray pixels slightly
# Luminance quantization table at quality 50, row by row. Source: JPEG annex K.1.
_LUMINANCE_TABLE = np.array(
    [
        *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55),
        *(14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62),
        *(18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
        *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
    ]
)
_HASH_SIDE = 8


def measure_quality(encoded: bytes, image: DecodedImage) -> np.ndarray:
    """Measures the quality of a decoded image.

    Brightness, contrast, sharpness, the hash and the two flags are computed on the
    resized pixels that the base sees, so they depend on the image size.

    Args:
        encoded: The file's bytes.
        image: The decoded image.

    Returns:
        A scalar of `QUALITY_DTYPE`.
    """
    luminance, red_green, green_blue = _channels(image.pixels)
    row = np.zeros((), QUALITY_DTYPE)
    row["bytes"] = len(encoded)
    row["width"], row["height"] = image.width, image.height
    row["brightness"] = luminance.mean()
    row["contrast"] = _spread(luminance)
    row["sharpness"] = _spread(_laplacian(luminance)) ** 2
    row["perceptual_hash"] = _perceptual_hash(luminance)
    row["file_type"] = FILE_TYPES.index(file_type(encoded))
    row["jpeg_quality"] = _jpeg_quality(encoded)
    row["is_gray"] = max(np.ptp(red_green), np.ptp(green_blue)) <= _GRAY_LEVELS
    row["is_nearly_black"] = image.is_16_bit and image.pixels.max() <= 2**12 >> 8
    return row


def _channels(pixels: np.ndarray) -> np.ndarray:
    """Computes float32 `[3, H, W]`: luminance, red - green, green - blue."""
    mix = np.array([_LUMINANCE, (1, -1, 0), (0, 1, -1)], np.float32)
    height, width, _ = pixels.shape
    flat = pixels.reshape(-1, 3).astype(np.float32)
    return (mix @ flat.T).reshape(3, height, width)


def _laplacian(x: np.ndarray) -> np.ndarray:
    """Computes the Laplacian of all inner values; blurred regions are near 0.

    Source: Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy".
    """
    difference = -4 * x[1:-1, 1:-1]
    for neighbours in (x[:-2, 1:-1], x[2:, 1:-1], x[1:-1, :-2], x[1:-1, 2:]):
        difference += neighbours
    return difference


def _spread(x: np.ndarray) -> float:
    """Computes the standard deviation; a dot product is 10 times as fast as `x.std`."""
    centered = (x - x.mean()).ravel()
    return float(np.sqrt(centered @ centered / x.size))


def _perceptual_hash(luminance: np.ndarray) -> int:
    """Computes 64 bits: which of the 8x8 lowest frequencies exceed their median.

    Source: Zauner 2010, "Implementation and benchmarking of perceptual image hash
    functions" (pHash).
    """
    waves = _cosines(len(luminance))
    frequencies = waves @ luminance @ waves.T
    bits = frequencies > np.median(frequencies)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@functools.cache
def _cosines(size: int) -> np.ndarray:
    """Computes the first 8 rows of the discrete cosine transform, float32 `[8, size]`.

    They are not normalized.
    """
    frequency = np.arange(_HASH_SIDE)[:, None]
    return np.cos(np.pi / size * (np.arange(size) + 0.5) * frequency, dtype=np.float32)


def _jpeg_quality(encoded: bytes) -> int:
    """Estimates libjpeg's quality setting from the luminance quantization table.

    For tables that do not come from libjpeg, this is the nearest setting. Returns 0 if
    the file is not a JPEG or its table cannot be read.
    """
    if file_type(encoded) != "JPEG":
        return 0
    try:
        table = JpegImageFile(io.BytesIO(encoded)).quantization[0]
    except Exception:  # Pillow may reject files that TensorFlow decodes, in many ways
        return 0
    return int(np.abs(_table_sums() - sum(table)).argmin()) + 1


@functools.cache
def _table_sums() -> np.ndarray:
    """Computes int64 `[100]` sums of libjpeg's tables for quality 1 to 100."""
    quality = np.arange(1, 101)[:, None]
    percent = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return np.clip((_LUMINANCE_TABLE * percent + 50) // 100, 1, 255).sum(axis=1)
