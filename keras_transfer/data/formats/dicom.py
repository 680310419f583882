"""DICOM -> pixels as a viewer would show them, through pydicom.

Sections refer to DICOM PS3.3.
"""

import io
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_transfer.data.formats.limits import MAX_PIXELS, check_pixels
from keras_transfer.errors import DecodeError

if TYPE_CHECKING:
    from pydicom import Dataset

_TRANSFER_SYNTAXES = {
    "1.2.840.10008.1.2": "",  # uncompressed: implicit, explicit, big endian
    "1.2.840.10008.1.2.1": "",
    "1.2.840.10008.1.2.2": "",
    "1.2.840.10008.1.2.5": "pydicom",  # RLE
    "1.2.840.10008.1.2.4.50": "pillow",  # JPEG baseline and extended
    "1.2.840.10008.1.2.4.51": "pillow",
    "1.2.840.10008.1.2.4.90": "pillow",  # JPEG 2000
    "1.2.840.10008.1.2.4.91": "pillow",
}
"""Transfer syntaxes that are decoded, each with pydicom's name of the decoder."""

_TAGS: list[int | str] = [
    *("PixelData", "FloatPixelData", "DoubleFloatPixelData"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("NumberOfFrames", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit"),
    *("PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    *("RescaleIntercept", "RescaleSlope", "ModalityLUTSequence"),
    *(
        f"{segmented}{color}PaletteColorLookupTable{part}"
        for color in ("Red", "Green", "Blue")
        for segmented, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
    ),
]
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
# pydicom reads once or a few times per element, each of which takes 4 microseconds, and
# parses a sequence again when it is asked for. An item of a sequence, of 8 bytes or
# more, takes 15 microseconds and 0.7 KB. Enhanced files of a thousand frames have about
# 20,000 items. With these limits, no file takes more than about 3 seconds.
_MOST_READS = 500_000
_MOST_SEQUENCE_BYTES = 2**22
_MOST_ITEMS = 50_000
_ITEM_TAGS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # little and big endian
_BLOCK_PIXELS = 2**22
# Decoding takes up to 40 bytes per pixel: JPEG 2000 in color, and what pydicom copies.
_MOST_COMPRESSED = MAX_PIXELS // 4


def decode_dicom(encoded: bytes) -> np.ndarray:
    """Decodes the first frame of a DICOM file.

    Stored values go through the modality LUT or rescale slope and intercept, and then
    through the first VOI LUT or window. Without a window, values of at most 8 bits keep
    their range and others are scaled from the frame's minimum to its maximum, apart
    from padding. MONOCHROME1 is inverted last.

    Args:
        encoded: The file's content.

    Returns:
        uint8 `[H, W]` or RGB `[H, W, 3]`.

    Raises:
        DecodeError: If there are no pixels, or they are too many or in an unsupported
            form.
        Exception: Of any kind, if it is damaged.
    """
    syntax = _transfer_syntax(encoded)
    if syntax not in _TRANSFER_SYNTAXES:
        raise DecodeError(_unsupported(syntax))
    dataset = _read(encoded)
    if not any(name in dataset for name in _PIXELS):
        raise DecodeError("a DICOM without pixels")
    decoder = _TRANSFER_SYNTAXES[syntax]
    limit = _MOST_COMPRESSED if decoder else MAX_PIXELS
    check_pixels(dataset.Columns, dataset.Rows, limit)
    stored = _first_frame(dataset, decoder)
    interpretation = str(dataset.PhotometricInterpretation)
    if interpretation == "PALETTE COLOR":
        return _from_palette(stored, dataset)
    if stored.ndim == 3:
        return (stored >> max(dataset.BitsStored - 8, 0)).astype(np.uint8, copy=False)
    if interpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise DecodeError(f"a DICOM of {interpretation} pixels in one channel")
    shown = _to_gray(stored, dataset)
    return ~shown if interpretation == "MONOCHROME1" else shown


def _transfer_syntax(encoded: bytes) -> str:
    """Reads the transfer syntax from the file meta group; "" if it has none.

    pydicom inflates a deflated file before it can be asked for its transfer syntax, and
    a small file may inflate to any size. Source of the layout: PS3.5 section 7.1.2.
    """
    position, syntax = 132, ""
    while encoded[position : position + 2] == b"\2\0":
        element, kind, size = struct.unpack_from("<H2sH", encoded, position + 2)
        position += 8
        if kind in (b"OB", b"OW", b"UN", b"SQ", b"UT", b"OF"):
            (size,) = struct.unpack_from("<I", encoded, position)
            position += 4
        if element == 0x10:
            value = encoded[position : position + size]
            syntax = value.rstrip(b" \0").decode("ascii", "replace")
        position += size
    return syntax


def _unsupported(syntax: str) -> str:
    from pydicom.uid import UID

    if not syntax:
        return "a DICOM that does not name its transfer syntax"
    return (
        f"a DICOM in the transfer syntax {' '.join(UID(syntax).name.split())[:100]}; "
        "save it uncompressed, or as RLE or JPEG 2000"
    )


class _Limited(io.BytesIO):
    """A file that may be read from a limited number of times."""

    _left = _MOST_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise DecodeError("a DICOM of too many elements")
        return super().read(size)


def _read(encoded: bytes) -> "Dataset":
    """Reads the elements that pixels need."""
    import pydicom

    # Pixels are counted too, but hold a tag by chance only once in 4 GB.
    if sum(map(encoded.count, _ITEM_TAGS)) > _MOST_ITEMS:
        raise DecodeError("a DICOM of too many elements")
    dataset = pydicom.dcmread(_Limited(encoded), specific_tags=_TAGS)
    size = 0
    for element in list(dataset.keys()):
        value = getattr(dataset.get_item(element), "value", None)
        is_sequence = getattr(dataset.get_item(element), "VR", "") == "SQ"
        if is_sequence and isinstance(value, bytes):
            size += len(value)
    if size > _MOST_SEQUENCE_BYTES:
        raise DecodeError("a DICOM of too many elements")
    return dataset


def _first_frame(dataset: "Dataset", decoder: str) -> np.ndarray:
    """Decodes `[H, W]` stored values or RGB `[H, W, 3]` pixels."""
    from pydicom.pixels import pixel_array

    if decoder:
        _check_frame(dataset, decoder)
    samples, bits = dataset.SamplesPerPixel, dataset.BitsAllocated
    if "PixelData" in dataset and bits not in (1, 8, 16, 32):
        raise DecodeError(f"a DICOM of {bits} bits per pixel; at most 32 are decoded")
    if samples == 3 and bits not in (8, 16):
        raise DecodeError(f"a DICOM of colors in {bits} bits; save it with 8 bits")
    frame = pixel_array(dataset, index=0, decoding_plugin=decoder)
    if samples == 1 and dataset.PhotometricInterpretation == "PALETTE COLOR":
        return frame.reshape(frame.shape[:2])
    return np.ascontiguousarray(frame)


def _check_frame(dataset: "Dataset", decoder: str) -> None:
    """Rejects a compressed frame that would decode to more than the header says."""
    from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
    from PIL.JpegImagePlugin import JpegImageFile
    from pydicom.encaps import get_frame

    frame = get_frame(
        dataset.PixelData, 0, number_of_frames=int(dataset.get("NumberOfFrames") or 1)
    )
    area = dataset.Rows * dataset.Columns
    if decoder == "pydicom":
        # PackBits lengthens what it cannot shorten by 1/128.
        size = area * dataset.SamplesPerPixel * dataset.BitsAllocated // 8
        is_right = len(frame) <= 2 * size + 1024
    else:
        opener = JpegImageFile if frame[:2] == b"\xff\xd8" else Jpeg2KImageFile
        with opener(io.BytesIO(frame)) as image:
            is_right = image.size == (dataset.Columns, dataset.Rows)
    if not is_right:
        raise DecodeError("a damaged DICOM: its pixels do not have the size it says")


def _blocks(pixels: np.ndarray) -> Iterator[slice]:
    """Yields slices of rows, which bound the memory of what is computed on them."""
    height, width = pixels.shape[:2]
    step = max(_BLOCK_PIXELS // width, 1)
    return (slice(start, start + step) for start in range(0, height, step))


def _every_value(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the stored bit patterns as indices, and each index's value."""
    unsigned = np.dtype(f"u{stored.dtype.itemsize}")
    every = np.arange(256**unsigned.itemsize, dtype=unsigned).view(stored.dtype)
    return stored.view(unsigned), every


def _look_up(indices: np.ndarray, table: np.ndarray) -> np.ndarray:
    found = np.empty(indices.shape + table.shape[1:], table.dtype)
    for rows in _blocks(indices):
        found[rows] = table[indices[rows]]
    return found


def _from_palette(stored: np.ndarray, dataset: "Dataset") -> np.ndarray:
    """Looks stored values up in the palette. Source: section C.7.6.3.1.5."""
    from pydicom.pixels import apply_color_lut

    if stored.dtype.itemsize > 2:
        raise DecodeError("a DICOM palette of more than 16 bits per pixel")
    for color in ("Red", "Green", "Blue"):
        data = dataset.get(f"Segmented{color}PaletteColorLookupTableData")
        if data:
            bits = dataset[f"{color}PaletteColorLookupTableDescriptor"].value[2]
            order = "<" if dataset.original_encoding[1] else ">"
            _check_segments(np.frombuffer(data, "u1" if bits == 8 else order + "u2"))
    indices, every = _every_value(stored)
    colors = apply_color_lut(every[None], dataset)[0, :, :3]
    if colors.dtype.itemsize > 1:
        colors = (colors >> 8).astype(np.uint8)
    return _look_up(indices, colors)


def _check_segments(data: np.ndarray) -> None:
    """Rejects a segmented palette that would expand to more than 65,536 entries.

    Segments that refer to others are rejected too, as these may do so in turn. Source:
    section C.7.9.2.
    """
    position = entries = 0
    while position + 1 < len(data):
        kind, length = data[position : position + 2].tolist()
        position += 2 + (length if kind == 0 else 1)
        entries += length
        if kind > 1 or entries > 2**16:
            raise DecodeError("a DICOM with a palette of unsupported segments")


def _to_gray(stored: np.ndarray, dataset: "Dataset") -> np.ndarray:
    """Computes uint8 `[H, W]` from stored values."""
    modality = _modality(dataset)
    if stored.dtype.itemsize > 2:  # too many values for a table
        lowest, highest = _extremes(modality, stored, dataset)
        show = _display(dataset, lowest, highest)
        shown = np.empty(stored.shape, np.uint8)
        for rows in _blocks(stored):
            shown[rows] = show(modality(stored[rows]))
        return shown
    indices, every = _every_value(stored)
    bits = int(dataset.BitsStored)
    if bits <= 8 and every.dtype.kind == "u":
        lowest, highest = _range(modality(every[[0, 2**bits - 1]]))
    else:
        is_used = np.zeros(every.shape, bool)
        for rows in _blocks(indices):
            is_used[indices[rows]] = True
        lowest, highest = _extremes(modality, every[is_used], dataset)
    return _look_up(indices, _display(dataset, lowest, highest)(modality(every)))


def _range(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _extremes(
    modality: "_Map", stored: np.ndarray, dataset: "Dataset"
) -> tuple[float, float]:
    """Computes the extremes without padding values. Source: section C.7.5.1.1.2."""
    padding = dataset.get("PixelPaddingValue")
    ends: list[float] = []
    for rows in _blocks(stored.reshape(len(stored), -1)):
        block = stored[rows]
        if padding is not None:
            limit = dataset.get("PixelPaddingRangeLimit", padding)
            low, high = sorted((int(padding), int(limit)))
            rest = block[(block < low) | (block > high)]
            block = rest if rest.size else block[:0]
        if block.size:
            ends += _range(modality(block))
    if not ends:  # all is padding
        return _range(modality(stored.ravel()[:1]))
    if not np.isfinite(ends).all():
        raise DecodeError("a DICOM with values that are not numbers (NaN or infinity)")
    return min(ends), max(ends)


def _group(dataset: "Dataset", name: str) -> "Dataset":
    """Returns where a multi-frame file keeps a group's elements of its first frame.

    That is the file itself if it has no such group. Source: section C.7.6.16.
    """
    for where in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        if frames := dataset.get(where):
            if group := frames[0].get(name):
                return group[0]
    return dataset


_Map = Callable[[np.ndarray], np.ndarray]


def _modality(dataset: "Dataset") -> _Map:
    """Returns the map from stored values to float64 values. Source: section C.11.1."""
    if luts := dataset.get("ModalityLUTSequence"):
        return _lut(luts[0], dataset)
    group = _group(dataset, "PixelValueTransformationSequence")
    slope, intercept = group.get("RescaleSlope"), group.get("RescaleIntercept")
    slope = 1.0 if slope is None else float(slope)
    intercept = 0.0 if intercept is None else float(intercept)
    return lambda stored: stored * np.float64(slope) + intercept


def _lut(item: "Dataset", dataset: "Dataset") -> _Map:
    """Returns the map of a lookup table to float64. Source: section C.11.1.1."""
    count, first, _ = map(int, item.LUTDescriptor)
    data = item.LUTData
    if isinstance(data, bytes):
        count = count or 2**16
        order = "<" if dataset.original_encoding[1] else ">"
        data = np.frombuffer(data, "u1" if len(data) < 2 * count else order + "u2")
    table = np.asarray(data, np.float64)

    def look_up(values: np.ndarray) -> np.ndarray:
        indices = np.rint(values.astype(np.float64) - first)
        return table[indices.clip(0, len(table) - 1).astype(np.intp)]

    return look_up


def _display(dataset: "Dataset", lowest: float, highest: float) -> _Map:
    """Returns the map from values to uint8. Source: section C.11.2.

    Args:
        dataset: The file's elements.
        lowest: Value that is black if there is neither a window nor a LUT.
        highest: Value that is white then.
    """
    fraction: _Map
    if luts := dataset.get("VOILUTSequence"):
        look_up, white = _lut(luts[0], dataset), 2 ** int(luts[0].LUTDescriptor[2]) - 1

        def fraction(values: np.ndarray) -> np.ndarray:
            return look_up(values) / white

    else:
        window = _window(_group(dataset, "FrameVOILUTSequence"))
        fraction = window or _full_range(lowest, highest)
    return lambda values: np.rint(255 * fraction(values).clip(0, 1)).astype(np.uint8)


def _full_range(lowest: float, highest: float) -> _Map:
    """Returns the map from values to 0 (lowest) to 1 (highest)."""
    span = highest - lowest or 1
    return lambda values: (values - lowest) / span


def _window(group: "Dataset") -> _Map | None:
    """Returns the map from values to 0 (black) to 1; None if there is no window.

    Source: section C.11.2.1.
    """
    center, width = _first(group.get("WindowCenter")), _first(group.get("WindowWidth"))
    if center is None or width is None:
        return None
    function = str(group.get("VOILUTFunction") or "LINEAR")
    if function == "LINEAR" and width >= 1:
        if width == 1:
            return lambda values: (values > center - 0.5).astype(np.float64)
        return lambda values: (values - (center - 0.5)) / (width - 1) + 0.5
    if function == "LINEAR_EXACT" and width > 0:
        return lambda values: (values - center) / width + 0.5
    if function == "SIGMOID" and width > 0:
        return lambda values: 0.5 + 0.5 * np.tanh(2 * (values - center) / width)
    raise DecodeError(f"a DICOM with an invalid window ({function}, width {width:g})")


def _first(value: Any) -> float | None:
    """Returns the first of one or several numbers; None if there are none."""
    if value is None or isinstance(value, str) and not value.strip():
        return None
    several = np.atleast_1d(np.asarray(value, np.float64))
    return float(several[0]) if several.size else None
