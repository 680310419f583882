"""Converts formats that the decoder's graph cannot decode to PNG, losslessly.

The graph is what TensorFlow Serving runs, and it decodes JPEG, PNG, GIF, BMP and WebP.
TIFF, HEIC, AVIF, DICOM and arrays are converted here first, in training, in `kt
predict` and by clients of the server alike. TensorFlow is not imported.
"""

import hashlib
import io
import os
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from keras_transfer.data.formats.limits import check_pixels
from keras_transfer.data.formats.pixels import (
    is_image_shape,
    is_pixel_dtype,
    to_array,
    upright,
)
from keras_transfer.data.formats.silence import silenced
from keras_transfer.errors import DecodeError

CONVERTER_VERSION = 1
"""Changes whenever the pixels of any converted image change: features are cached."""

_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"RIFF": "WebP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",  # BigTIFF
    b"MM\0+": "TIFF",
    b"\x93NUMPY": "array",
}
_HEIC_BRANDS = frozenset(b"heic heix heim heis hevc hevx hevm hevs".split())
_AVIF_BRANDS = frozenset(b"avif avis".split())
_CONTAINER_BRANDS = frozenset(b"mif1 mif2 mif3 msf1 miaf".split())

# An item information entry (ISO 14496-12, 8.11.6) that announces EXIF metadata.
_EXIF_ITEM = re.compile(rb"(infe[\2\3]...(?:..|....)\0\0)Exif", re.DOTALL)


def file_type(encoded: bytes) -> str:
    """Tells an image's format by its first bytes.

    Args:
        encoded: The file's content, or at least its first 512 bytes.

    Returns:
        "JPEG", "PNG", "GIF", "BMP", "WebP", "TIFF", "HEIC", "AVIF", "DICOM", "array"
        (.npy); "" if it is none of them.
    """
    for magic, name in _MAGIC.items():
        if encoded.startswith(magic):
            return name
    if encoded[4:8] == b"ftyp":
        return _type_of_brands(encoded)
    return "DICOM" if encoded[128:132] == b"DICM" else ""


def _type_of_brands(encoded: bytes) -> str:
    """Tells HEIC from AVIF by the brands of the ftyp box (ISO 14496-12, 4.3)."""
    end = min(int.from_bytes(encoded[:4]), 512)
    major = encoded[8:12]
    brands = {major, *(encoded[i : i + 4] for i in range(16, end - 3, 4))}
    if major in _HEIC_BRANDS:
        return "HEIC"
    if brands & _AVIF_BRANDS:
        return "AVIF"
    return "HEIC" if brands & (_HEIC_BRANDS | _CONTAINER_BRANDS) else ""


def image_digest(encoded: bytes) -> bytes:
    """Computes the 32 bytes that an image's features are cached by.

    That is the SHA-256 of the file or, if it is converted, of the converter's version
    and the file: the PNG that it is converted to may change with zlib.
    """
    digest = hashlib.sha256()
    if file_type(encoded) in _CONVERTERS:
        digest.update(b"keras_transfer converter %d\n" % CONVERTER_VERSION)
    digest.update(encoded)
    return digest.digest()


def to_png(image: str | os.PathLike[str] | bytes | np.ndarray) -> bytes:
    """Converts an image that a model's server does not decode to PNG.

    A client can pass every image through it: what the server decodes itself (JPEG, PNG,
    GIF, BMP, WebP) is returned as it is, and so is what is no image, which the server
    refuses.

    Args:
        image: The path or content of a file, or an array: `[H, W]`, `[H, W, 1]` or
            `[H, W, 2]` gray, `[H, W, 3]` or `[H, W, 4]` RGB, the second or fourth
            channel being alpha, which is dropped. Integers or floating point numbers
            of at most 64 bits within 0 to 255; the latter are rounded, and refused if
            they look like 0 to 1: their maximum is above 0 and at most 1. Of a TIFF the
            first page is taken and of a DICOM the first frame; see
            `dicom.decode_dicom` for its window.

    Returns:
        The file's content, or a PNG of 8 bits, or of 16 if it is a gray TIFF or HEIC of
        more than 8.

    Raises:
        DecodeError: If the image cannot be converted. The message is the reason.
        OSError: If the file cannot be read.
    """
    if isinstance(image, np.ndarray):
        _check_form(image.shape, image.dtype)
        if image.dtype.kind == "f" and 0 < image.max() <= 1:
            raise DecodeError(
                f"an array of floats of at most {image.max():g}; 0 to 255 is expected, "
                "not 0 to 1: multiply it by 255"
            )
        return encode_png(_from_array(image))
    encoded = image if isinstance(image, bytes) else Path(image).read_bytes()
    pixels = converted_pixels(encoded)
    return encoded if pixels is None else encode_png(pixels)


def converted_pixels(encoded: bytes) -> np.ndarray | None:
    """Decodes an image that is in a format which is converted.

    Args:
        encoded: The file's content.

    Returns:
        uint8 `[H, W]` or RGB `[H, W, 3]`, or uint16 `[H, W]`; None if the format is not
        converted.

    Raises:
        DecodeError: If the image cannot be decoded. The message is the reason.
    """
    kind = file_type(encoded)
    if kind not in _CONVERTERS:
        return None
    try:
        with silenced():
            return _CONVERTERS[kind](encoded)
    except DecodeError:
        raise
    except MemoryError:
        raise DecodeError("not enough memory to decode it") from None
    except Exception:  # what libraries raise for damaged files has no common class
        raise DecodeError(
            f"a damaged or truncated {kind}, {len(encoded):,} bytes"
        ) from None


def _from_tiff(encoded: bytes) -> np.ndarray:
    from keras_transfer.data.formats.tiff import decode_tiff

    return decode_tiff(encoded)


def _from_dicom(encoded: bytes) -> np.ndarray:
    _extra("pydicom", "a DICOM, which needs pydicom")
    from keras_transfer.data.formats.dicom import decode_dicom

    return decode_dicom(encoded)


def _from_heic(encoded: bytes) -> np.ndarray:
    """Decodes a HEIC. libheif turns it upright; its EXIF orientation is ignored.

    Source: ISO 23008-12, in which the transformations of the container are normative.
    """
    pillow_heif: Any = _extra("pillow_heif", "a HEIC, which needs pillow-heif")
    image = pillow_heif.open_heif(encoded, convert_hdr_to_8bit=True)
    check_pixels(*image.size)
    pixels = np.asarray(image)
    check_pixels(pixels.shape[1], pixels.shape[0])
    return _without_alpha(pixels)


def _from_avif(encoded: bytes) -> np.ndarray:
    """Decodes an AVIF and turns it as its container says.

    EXIF is hidden from Pillow, which would parse all of it, at any length, for an
    orientation that AVIF ignores (ISO 23000-22, 7.3.10).
    """
    from PIL.AvifImagePlugin import AvifImageFile

    hidden = _EXIF_ITEM.sub(rb"\1none", encoded)
    with AvifImageFile(io.BytesIO(hidden)) as image:
        check_pixels(*image.size)
        image.load()
        orientation = image.getexif().get(0x0112, 1)
        return upright(_without_alpha(to_array(image)), orientation)


def _from_npy(encoded: bytes) -> np.ndarray:
    """Reads an array as `numpy.save` writes it, without copying it."""
    file = io.BytesIO(encoded)
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, is_fortran, dtype = readers[version](file, max_header_size=10_000)
    _check_form(shape, dtype)
    count = int(np.prod(shape))
    array = np.frombuffer(encoded, dtype, count, file.tell())
    return _from_array(array.reshape(shape, order="F" if is_fortran else "C"))


def _check_form(shape: tuple[int, ...], dtype: np.dtype) -> None:
    if not is_pixel_dtype(dtype):
        raise DecodeError(
            f"an array of {str(dtype)[:50]}; integers or floats of at most 64 bits are "
            "expected"
        )
    if not is_image_shape(shape):
        raise DecodeError(
            f"an array of shape {shape}; [H, W] or [H, W, 1 to 4] is expected"
        )
    check_pixels(shape[1], shape[0])


def _from_array(array: np.ndarray) -> np.ndarray:
    """Rounds an array of a valid form; returns uint8 `[H, W]` or `[H, W, 3]`."""
    array = _without_alpha(array)
    if array.dtype == np.uint8:
        return array
    # Written so that NaN fails the comparison too.
    if not (array.min() >= 0 and array.max() <= 255):
        raise DecodeError(
            f"an array of values from {array.min():g} to {array.max():g}; 0 to 255 is "
            "expected"
        )
    # Rounds half to even, as the decoder does.
    return (np.rint(array) if array.dtype.kind == "f" else array).astype(np.uint8)


def _without_alpha(pixels: np.ndarray) -> np.ndarray:
    """Returns `[H, W]` or `[H, W, 3]` of `[H, W]` or `[H, W, 1 to 4]`."""
    if pixels.ndim == 2:
        return pixels
    return pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., 0]


def _extra(module: str, what: str) -> ModuleType:
    """Imports a package of the extra `formats`.

    Raises:
        DecodeError: If it is not installed.
    """
    try:
        return import_module(module)
    except ImportError:
        raise DecodeError(f"{what}: pip install 'keras-transfer[formats]'") from None


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 `[H, W]` or `[H, W, 3]`, or uint16 `[H, W]`."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


_CONVERTERS: dict[str, Callable[[bytes], np.ndarray]] = {
    "TIFF": _from_tiff,
    "HEIC": _from_heic,
    "AVIF": _from_avif,
    "DICOM": _from_dicom,
    "array": _from_npy,
}
