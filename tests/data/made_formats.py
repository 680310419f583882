"""Files of the formats that are converted, each with the pixels that it must give.

    python made_formats.py COUNT SEED MEGABYTES [KIND ...]

converts COUNT mutations of each format with MEGABYTES of memory, and prints as JSON
what came of them.
"""

import io
import json
import random
import resource
import struct
import sys
import time
import zlib
from typing import NamedTuple

import numpy as np
import pillow_heif
import pydicom
from PIL import Image, ImageCms, ImageOps
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing
from pydicom.sequence import Sequence
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    RLELossless,
)

from keras_transfer.data.formats.convert import to_png
from keras_transfer.errors import DecodeError

H, W = 37, 50
RNG = np.random.default_rng(0)
RGB = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (5, 6, 3), np.uint8)).resize((W, H))
)
GRAY = RGB[..., 1]
ALPHA = np.dstack([RGB, RGB[::-1, :, 0]])
DEEP = (GRAY.astype(np.uint16) << 8) + RNG.integers(0, 256, (H, W), np.uint16)
DEEP_RGB = RGB.astype(np.uint16) * 257
PHOTO = Image.fromarray(RGB)


class Made(NamedTuple):
    """A file, the pixels that it must give, and by how much they may differ."""

    encoded: bytes
    expected: np.ndarray
    tolerance: int = 0


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def npy(array: np.ndarray, **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def shown(encoded: bytes) -> np.ndarray:
    """What a file is converted to, read from its PNG by Pillow."""
    with Image.open(io.BytesIO(to_png(encoded))) as image:
        assert image.format == "PNG"
        return np.asarray(image)


# TIFF, written by hand: Pillow writes few of the kinds that there are.


def tiff(
    planes: list[np.ndarray],
    order: str = "<",
    big: bool = False,
    deflate: bool = False,
    side: int = 0,
    **tags: object,
) -> bytes:
    """A TIFF of one `[H, W, C]` array, or of a `[H, W]` array a plane.

    `side` is that of its tiles; 0 for one strip. `tags` are called t258 and so on, and
    None leaves one out.
    """
    height, width = planes[0].shape[:2]
    parts = [
        np.pad(block, [(0, side - block.shape[0]), (0, side - block.shape[1])]
               + [(0, 0)] * (block.ndim - 2)) if side else block
        for plane in planes
        for top in range(0, height, side or height)
        for left in range(0, width, side or width)
        for block in [plane[top:, left:][: side or height, : side or width]]
    ]  # fmt: skip
    raw = [part.astype(part.dtype.newbyteorder(order)).tobytes() for part in parts]
    data = [zlib.compress(x) if deflate else x for x in raw]
    samples = planes[0].shape[2] if planes[0].ndim == 3 else len(planes)
    start = 16 if big else 8
    offsets = [start + sum(map(len, data[:i])) for i in range(len(data))]
    lengths = [len(x) for x in data]
    fields: dict[int, object] = {
        256: width,
        257: height,
        258: [8 * planes[0].dtype.itemsize] * samples,
        259: 8 if deflate else 1,
        262: 2 if samples > 2 else 1,
        277: samples,
        284: 2 if len(planes) > 1 else 1,
    }
    if side:
        fields |= {322: side, 323: side, 324: offsets, 325: lengths}
    else:
        fields |= {273: offsets, 278: height, 279: lengths}
    fields |= {int(name[1:]): value for name, value in tags.items()}
    return _tiff_file(b"".join(data), fields, order, big)


def _tiff_file(data: bytes, fields: dict, order: str, big: bool) -> bytes:
    offset = "Q" if big else "I"
    width = struct.calcsize(offset)
    start = 2 * width
    entries, values = [], b""
    kept = {tag: value for tag, value in sorted(fields.items()) if value is not None}
    size = (8 if big else 2) + len(kept) * (20 if big else 12) + width
    for tag, value in kept.items():
        several = value if isinstance(value, (list, bytes)) else [value]
        kind, form = (4, "I") if max(several) > 65_535 else (3, "H")
        packed = struct.pack(f"{order}{len(several)}{form}", *several)
        if len(packed) > width:
            place = start + len(data) + size + len(values)
            values += packed
            packed = struct.pack(order + offset, place)
        entries.append(
            struct.pack(f"{order}HH{offset}", tag, kind, len(several))
            + packed.ljust(width, b"\0")
        )
    header = (b"II" if order == "<" else b"MM") + (
        struct.pack(order + "HHHQ", 43, 8, 0, start + len(data))
        if big
        else struct.pack(order + "HI", 42, start + len(data))
    )
    count = struct.pack(order + ("Q" if big else "H"), len(entries))
    return header + data + count + b"".join(entries) + bytes(width) + values


def _channels(pixels: np.ndarray) -> list[np.ndarray]:
    return [np.ascontiguousarray(pixels[..., i]) for i in range(pixels.shape[2])]


def _tiffs_by_hand() -> dict[str, Made]:
    made = {}
    orders = {"little": "<", "big": ">"}
    for name, order in orders.items():
        for deflate in (False, True):
            for side in (0, 16):
                how = {"order": order, "deflate": deflate, "side": side}
                end = f"{name} endian{', deflate' * deflate}{', tiles' * bool(side)}"
                made |= {
                    f"8-bit gray, {end}": Made(tiff([GRAY], **how), GRAY),
                    f"8-bit gray, white is zero, {end}": Made(
                        tiff([~GRAY], t262=0, **how), GRAY
                    ),
                    f"16-bit gray, {end}": Made(tiff([DEEP], **how), DEEP),
                    f"16-bit gray, white is zero, {end}": Made(
                        tiff([~DEEP], t262=0, **how), DEEP
                    ),
                    f"8-bit RGB, {end}": Made(tiff([RGB], **how), RGB),
                    f"8-bit RGB in planes, {end}": Made(
                        tiff(_channels(RGB), **how), RGB
                    ),
                    f"8-bit RGBA, {end}": Made(tiff([ALPHA], t338=2, **how), RGB),
                    f"16-bit RGB, {end}": Made(tiff([DEEP_RGB], **how), RGB),
                }
        made[f"BigTIFF, 8-bit RGB, {name} endian"] = Made(
            tiff([RGB], order, big=True), RGB
        )
        made[f"BigTIFF, 16-bit gray, deflate, {name} endian"] = Made(
            tiff([DEEP], order, big=True, deflate=True), DEEP
        )
    twelve = DEEP >> 4
    pairs = twelve.reshape(-1, 2)
    packed = np.stack(
        [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1]], 1
    ).astype(np.uint8)
    made["12-bit gray, packed"] = Made(
        tiff([packed.reshape(H, -1)], t256=W, t258=12), twelve << 4 | twelve >> 8
    )
    return made


def _tiffs_of_pillow() -> dict[str, Made]:
    made = {}
    compressions = ("lzw", "adobe_deflate", "packbits", "zstd", "lzma", "deflate")
    for mode in ("L", "RGB", "RGBA", "LA", "1", "P", "CMYK", "I;16"):
        image = Image.fromarray(DEEP) if mode == "I;16" else PHOTO.convert(mode)
        kept = image.convert("L" if mode in ("1", "LA") else "RGB")
        expected = np.asarray(image if mode in ("L", "I;16") else kept)
        for name in (None, *(f"tiff_{x}" for x in compressions[:2]), *compressions[2:]):
            name = "tiff_deflate" if name == "deflate" else name
            encoded = saved(image, "TIFF", compression=name)
            made[f"mode {mode}, {name or 'no compression'}"] = Made(encoded, expected)
    bilevel = PHOTO.convert("1")
    for name in ("group3", "group4", "tiff_ccitt"):
        encoded = saved(bilevel, "TIFF", compression=name)
        made[f"mode 1, {name}"] = Made(encoded, np.asarray(bilevel.convert("L")))
    for mode, expected in (("RGB", RGB), ("L", np.asarray(PHOTO.convert("L")))):
        encoded = saved(PHOTO.convert(mode), "TIFF", compression="jpeg", quality=100)
        made[f"mode {mode}, jpeg"] = Made(encoded, expected, 90)
    made["mode YCbCr, LZW"] = Made(
        saved(PHOTO.convert("YCbCr"), "TIFF", compression="tiff_lzw"), RGB, 3
    )
    profiles = map(ImageCms.createProfile, ("sRGB", "LAB"))
    calm = Image.fromarray(RGB // 4 + 96)  # within the gamut
    lab = ImageCms.profileToProfile(calm, *profiles, outputMode="LAB")
    made["mode LAB"] = Made(saved(lab, "TIFF"), np.asarray(calm), 6)
    pages = {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]}
    made["of two pages"] = Made(saved(PHOTO, "TIFF", **pages), RGB)
    return made


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels that Pillow turns upright."""
    encoded = saved(Image.fromarray(pixels), "PNG", exif=exif(orientation))
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(ImageOps.exif_transpose(image))


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    tags[0x010F] = "a camera"
    return tags.tobytes()


def tiffs() -> dict[str, Made]:
    made = _tiffs_by_hand() | _tiffs_of_pillow()
    for o in range(1, 9):
        made[f"16-bit gray, orientation {o}"] = Made(
            tiff([DEEP], t274=o), turned(DEEP, o)
        )
        made[f"8-bit RGB, deflate, orientation {o}"] = Made(
            tiff([RGB], deflate=True, t274=o), turned(RGB, o)
        )
    return made


# HEIC and AVIF


EXACT = {"quality": -1, "chroma": 444, "matrix_coefficients": 0}


def heic(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, **EXACT | options)
    return buffer.getvalue()


def heics() -> dict[str, Made]:
    made = {
        "RGB": Made(heic(PHOTO), RGB, 1),
        "RGBA": Made(heic(Image.fromarray(ALPHA)), RGB, 1),
        "gray": Made(heic(Image.fromarray(GRAY)), GRAY, 1),
        "4:2:0": Made(heic(PHOTO, quality=95, chroma=420), RGB, 60),
        "10-bit gray": Made(heic(Image.fromarray(DEEP)), DEEP, 128),
        "12-bit RGB": Made(_deep_heic(), RGB, 1),
        "with a thumbnail": Made(heic(PHOTO, thumbnails=[16]), RGB, 1),
        "in tiles": Made(heic(PHOTO.resize((200, 90), 0), tile_size=64),
                         np.asarray(PHOTO.resize((200, 90), 0)), 1),
    }  # fmt: skip
    for o in range(1, 9):
        made[f"orientation {o}"] = Made(heic(PHOTO, exif=exif(o)), turned(RGB, o), 1)
    return made


def _deep_heic() -> bytes:
    buffer = io.BytesIO()
    pixels = np.ascontiguousarray(DEEP_RGB)
    file = pillow_heif.from_bytes("RGB;16", (W, H), pixels.tobytes())
    pillow_heif.options.SAVE_HDR_TO_12_BIT = True
    file.save(buffer, **EXACT)
    pillow_heif.options.SAVE_HDR_TO_12_BIT = False
    return buffer.getvalue()


def avifs() -> dict[str, Made]:
    exact = {"quality": 100, "subsampling": "4:4:4"}
    made = {
        "RGB": Made(saved(PHOTO, "AVIF", **exact), RGB, 3),
        "RGBA": Made(saved(Image.fromarray(ALPHA), "AVIF", **exact), RGB, 3),
        "gray": Made(saved(Image.fromarray(GRAY), "AVIF", quality=100), GRAY, 3),
        "4:2:0": Made(saved(PHOTO, "AVIF", quality=95), RGB, 60),
        "of two frames": Made(
            saved(PHOTO, "AVIF", save_all=True, append_images=[PHOTO.rotate(180)],
                  **exact), RGB, 3),
    }  # fmt: skip
    for o in range(1, 9):
        encoded = saved(PHOTO, "AVIF", exif=exif(o), **exact)
        made[f"orientation {o}"] = Made(encoded, turned(RGB, o), 3)
    return made


# DICOM


def dicom(pixels: np.ndarray | bytes | None, syntax: str = "", **elements: object):
    """A DICOM file of stored pixels, or of one encoded frame."""
    return _dicom_file(dataset_of(pixels, **elements), syntax)


def dataset_of(pixels: np.ndarray | bytes | None, **elements: object) -> Dataset:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    ds.PatientName = "Nobody"
    if isinstance(pixels, np.ndarray):
        bits = 8 * pixels.dtype.itemsize
        is_color = pixels.ndim == 3
        ds.Rows, ds.Columns = pixels.shape[:2]
        ds.SamplesPerPixel = 3 if is_color else 1
        ds.PhotometricInterpretation = "RGB" if is_color else "MONOCHROME2"
        ds.BitsAllocated = ds.BitsStored = bits
        ds.HighBit = bits - 1
        ds.PixelRepresentation = int(pixels.dtype.kind == "i")
        if is_color:
            ds.PlanarConfiguration = 0
        if pixels.dtype.kind == "f":
            ds.FloatPixelData = pixels.tobytes()
        else:
            data = pixels.tobytes()
            ds.PixelData = data + bytes(len(data) % 2)
            ds["PixelData"].VR = "OB" if bits == 8 else "OW"
    for name, value in elements.items():
        setattr(ds, name, value)
    if "PixelData" in elements:
        ds["PixelData"].VR = "OB"
    return ds


def _dicom_file(ds: Dataset, syntax: str) -> bytes:
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax or ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    if "PixelData" in ds and ds.file_meta.TransferSyntaxUID.is_encapsulated:
        ds["PixelData"].is_undefined_length = True
        ds["PixelData"].VR = "OB"
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def by_pydicom(stored: np.ndarray, ds: Dataset) -> np.ndarray:
    """The window or LUT as pydicom applies it, from black to white."""
    values = apply_modality_lut(stored, ds)
    if ds.get("VOILUTSequence"):
        bits = ds.VOILUTSequence[0].LUTDescriptor[2]
        result = apply_voi(values.astype(np.int64), ds) / (2**bits - 1)
    else:
        result = apply_windowing(values, ds)
        ends = [0, 2**ds.BitsStored - 1]
        if ds.PixelRepresentation:
            ends = [-(2 ** (ds.BitsStored - 1)), 2 ** (ds.BitsStored - 1) - 1]
        if ds.get("ModalityLUTSequence"):
            low, high = 0, 2 ** ds.ModalityLUTSequence[0].LUTDescriptor[2] - 1
        else:
            slope = float(ds.get("RescaleSlope", 1))
            low, high = (x * slope + float(ds.get("RescaleIntercept", 0)) for x in ends)
        result = (result - low) / (high - low)
    pixels = np.rint(255 * result.clip(0, 1)).astype(np.uint8)
    return ~pixels if ds.PhotometricInterpretation == "MONOCHROME1" else pixels


TWELVE = DEEP >> 4
SIGNED = (TWELVE.astype(np.int32) - 1024).astype(np.int16)


def lut(values: np.ndarray, first: int, bits: int) -> Sequence:
    item = Dataset()
    item.LUTDescriptor = [len(values), first, bits]
    item["LUTDescriptor"].VR = "US"
    item.LUTData = values.astype(np.uint16).tolist()
    item["LUTData"].VR = "US"
    return Sequence([item])


def windowed() -> dict[str, Made]:
    """Windows, rescale and LUTs, with pydicom as the reference."""
    made = {}
    curve = (np.sqrt(np.arange(4096) / 4095) * 1023).astype(int)
    windows: dict[str, dict[str, object]] = {
        "linear": {"WindowCenter": 900, "WindowWidth": 1500},
        "of width 1": {"WindowCenter": 1000, "WindowWidth": 1},
        "the first of two": {"WindowCenter": [700, 40], "WindowWidth": [900, 80]},
        "linear exact": {"WindowCenter": 900.5, "WindowWidth": 1500.25,
                         "VOILUTFunction": "LINEAR_EXACT"},
        "sigmoid": {"WindowCenter": 900, "WindowWidth": 1500,
                    "VOILUTFunction": "SIGMOID"},
        "VOI LUT": {"VOILUTSequence": lut(curve, 0, 10)},
    }  # fmt: skip
    rescales: dict[str, dict[str, object]] = {
        "": {},
        ", rescaled": {"RescaleSlope": 0.75, "RescaleIntercept": -17},
        ", modality LUT": {"ModalityLUTSequence": lut(np.arange(4096)[::-1], 0, 16)},
        ", LUT from 300": {"ModalityLUTSequence": lut(np.arange(2000), 300, 16)},
    }
    for kind, stored in (("12-bit", TWELVE), ("signed 12-bit", SIGNED)):
        for window, options in windows.items():
            for rescale, more in rescales.items():
                for photometric in ("MONOCHROME1", "MONOCHROME2"):
                    ds = dataset_of(
                        stored,
                        PhotometricInterpretation=photometric,
                        BitsStored=12 if stored is TWELVE else 16,
                        HighBit=11 if stored is TWELVE else 15,
                        **options,
                        **more,
                    )
                    expected = by_pydicom(stored, ds)
                    name = f"{kind} {photometric}, window {window}{rescale}"
                    # A half may be rounded either way.
                    made[name] = Made(_dicom_file(ds, ""), expected, 1)
    return made


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    fraction = (values.astype(np.float64) - low) / (high - low)
    return np.rint(255 * fraction.clip(0, 1)).astype(np.uint8)


def unwindowed() -> dict[str, Made]:
    full = _scaled(TWELVE, TWELVE.min(), TWELVE.max())
    padded = TWELVE.copy()
    padded[:5], padded[5:9] = 60_000, 59_000
    inside = padded[9:]
    twelve = {"BitsStored": 12, "HighBit": 11}
    floats = TWELVE.astype(np.float32) / 7 - 100
    wide = DEEP.astype(np.uint32) * 1000
    signed = _scaled(SIGNED, SIGNED.min(), SIGNED.max())
    black = np.zeros((H, W), np.uint8)
    return {
        "8-bit": Made(dicom(GRAY), GRAY),
        "8-bit MONOCHROME1": Made(
            dicom(GRAY, PhotometricInterpretation="MONOCHROME1"), ~GRAY
        ),
        "8-bit, rescaled": Made(dicom(GRAY, RescaleSlope=2, RescaleIntercept=5), GRAY),
        "4 of 8 bits": Made(
            dicom(GRAY >> 4, BitsStored=4, HighBit=3), (GRAY >> 4) * 17
        ),
        "12-bit": Made(dicom(TWELVE, **twelve), full),
        "12-bit MONOCHROME1": Made(
            dicom(TWELVE, PhotometricInterpretation="MONOCHROME1", **twelve), ~full
        ),
        "12-bit, slope below 0": Made(
            dicom(TWELVE, RescaleSlope=-1, RescaleIntercept=0, **twelve),
            _scaled(-TWELVE.astype(int), -int(TWELVE.max()), -int(TWELVE.min())),
        ),
        "signed 16-bit": Made(dicom(SIGNED), signed),
        "32-bit": Made(dicom(wide), _scaled(wide, wide.min(), wide.max())),
        "float": Made(dicom(floats), _scaled(floats, floats.min(), floats.max()), 1),
        "padding": Made(
            dicom(padded, PixelPaddingValue=60_000, PixelPaddingRangeLimit=59_000),
            _scaled(padded, inside.min(), inside.max()),
        ),
        "flat": Made(dicom(black.astype(np.uint16) + 777), black),
        "multi-frame": Made(
            dicom(GRAY, NumberOfFrames=2, PixelData=GRAY.tobytes() + (~GRAY).tobytes()),
            GRAY,
        ),
        "multi-frame, its own window": _enhanced(),
    }  # fmt: skip


def _enhanced() -> Made:
    window, rescale, shared, frame = Dataset(), Dataset(), Dataset(), Dataset()
    window.WindowCenter, window.WindowWidth = 900, 1500
    rescale.RescaleSlope, rescale.RescaleIntercept = 0.5, -20
    shared.PixelValueTransformationSequence = Sequence([rescale])
    frame.FrameVOILUTSequence = Sequence([window])
    options = {"BitsStored": 12, "HighBit": 11}
    flat = dataset_of(
        TWELVE, WindowCenter=900, WindowWidth=1500, RescaleSlope=0.5,
        RescaleIntercept=-20, **options,
    )  # fmt: skip
    encoded = dicom(
        TWELVE,
        SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence([frame]),
        NumberOfFrames=1,
        **options,
    )
    return Made(encoded, by_pydicom(TWELVE, flat), 1)


def colored() -> dict[str, Made]:
    planes = np.ascontiguousarray(RGB.transpose(2, 0, 1))
    ycbcr = np.asarray(PHOTO.convert("YCbCr"))
    blue, red = (np.repeat(ycbcr[:, ::2, i], 2, 1) for i in (1, 2))
    pairs = np.stack(
        [ycbcr[:, ::2, 0], ycbcr[:, 1::2, 0], ycbcr[:, ::2, 1], ycbcr[:, ::2, 2]], -1
    )
    bands = (Image.fromarray(band) for band in (ycbcr[..., 0], blue, red))
    shared = Image.merge("YCbCr", list(bands)).convert("RGB")
    table = RNG.integers(0, 256, (256, 3), np.uint8)

    def palette(
        values: np.ndarray, bits: int, segmented: bool = False
    ) -> dict[str, object]:
        found: dict[str, object] = {"PhotometricInterpretation": "PALETTE COLOR"}
        for i, color in enumerate(("Red", "Green", "Blue")):
            data = values[:, i].tobytes()
            if segmented:  # into two discrete segments
                data = struct.pack("<2H", 0, 56) + data[:112]
                data += struct.pack("<2H", 0, 200) + values[56:, i].tobytes()
            start = f"{'Segmented' * segmented}{color}Palette"
            found[f"{color}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
            found[f"{start}ColorLookupTableData"] = data
        return found

    deep = table.astype(np.uint16) * 257
    return {
        "RGB": Made(dicom(RGB), RGB),
        "RGB in planes": Made(
            dicom(RGB, PlanarConfiguration=1, PixelData=planes.tobytes()), RGB
        ),
        "16-bit RGB": Made(dicom(DEEP_RGB), RGB),
        "YBR_FULL": Made(dicom(ycbcr, PhotometricInterpretation="YBR_FULL"), RGB, 3),
        "YBR_FULL_422": Made(
            dicom(
                ycbcr,
                PhotometricInterpretation="YBR_FULL_422",
                PixelData=pairs.tobytes(),
            ),
            np.asarray(shared),
            3,
        ),
        "8-bit palette": Made(dicom(GRAY, **palette(table, 8)), table[GRAY]),
        "16-bit palette": Made(dicom(GRAY, **palette(deep, 16)), table[GRAY]),
        "segmented palette": Made(
            dicom(GRAY, **palette(deep, 16, segmented=True)), table[GRAY]
        ),
    }


def compressed() -> dict[str, Made]:
    """Transfer syntaxes, uncompressed ones too."""
    made = {}
    whole = {"BitsStored": 12, "HighBit": 11, "WindowCenter": 900, "WindowWidth": 1500}
    expected = by_pydicom(TWELVE, dataset_of(TWELVE, **whole))
    for syntax in (ImplicitVRLittleEndian, ExplicitVRLittleEndian):
        made[f"12-bit, {syntax.name}"] = Made(
            dicom(TWELVE, syntax, **whole), expected, 1
        )
    swapped = TWELVE.astype(">u2").tobytes()
    ds = dataset_of(TWELVE, **whole)
    ds.PixelData = swapped
    made[f"12-bit, {ExplicitVRBigEndian.name}"] = Made(
        _dicom_file(ds, ExplicitVRBigEndian), expected, 1
    )
    for name, stored, wanted in (
        ("8-bit", GRAY, GRAY), ("RGB", RGB, RGB), ("12-bit", TWELVE, expected),
    ):  # fmt: skip
        ds = dataset_of(stored, **(whole if name == "12-bit" else {}))
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(RLELossless, stored)
        made[f"{name}, RLE"] = Made(_dicom_file(ds, RLELossless), wanted, 1)

    def frame(stored: np.ndarray, syntax: str, encoded: bytes, **more: object) -> bytes:
        return dicom(stored, syntax, PixelData=encapsulate([encoded]), **more)

    for syntax in (JPEGBaseline8Bit, JPEGExtended12Bit):
        made[f"8-bit, {syntax.name}"] = Made(
            frame(GRAY, syntax, saved(Image.fromarray(GRAY), "JPEG", quality=100)),
            GRAY, 3,
        )  # fmt: skip
        made[f"YBR_FULL_422, {syntax.name}"] = Made(
            frame(RGB, syntax, saved(PHOTO, "JPEG", quality=100),
                  PhotometricInterpretation="YBR_FULL_422"), RGB, 60,
        )  # fmt: skip
    scaled = _scaled(DEEP, DEEP.min(), DEEP.max())
    for name, stored, image, more, wanted in (
        ("8-bit", GRAY, Image.fromarray(GRAY), {}, GRAY),
        ("RGB", RGB, PHOTO, {"PhotometricInterpretation": "YBR_RCT"}, RGB),
        ("16-bit", DEEP, Image.fromarray(DEEP), {}, scaled),
    ):  # fmt: skip
        encoded = saved(image, "JPEG2000", no_jp2=True)
        made[f"{name}, JPEG 2000"] = Made(
            frame(stored, JPEG2000Lossless, encoded, **more), wanted
        )
    return made


def dicoms() -> dict[str, Made]:
    return windowed() | unwindowed() | colored() | compressed()


def arrays() -> dict[str, Made]:
    made = {}
    for name, pixels in (
        ("[H, W]", GRAY), ("[H, W, 1]", GRAY[..., None]), ("[H, W, 3]", RGB),
        ("[H, W, 4]", ALPHA), ("[H, W, 2]", ALPHA[..., :2]),
    ):  # fmt: skip
        expected = pixels if pixels.ndim == 2 else pixels[..., 0]
        expected = pixels[..., :3] if pixels.shape[2:] > (2,) else expected
        for dtype in ("u1", "<i4", ">u2", "i8", "<f4", ">f8", "f2"):
            made[f"{name}, {np.dtype(dtype)}"] = Made(
                npy(pixels.astype(dtype)), expected
            )
    made["in Fortran's order"] = Made(npy(np.asfortranarray(RGB)), RGB)
    return made


ALL = {
    "TIFF": tiffs,
    "HEIC": heics,
    "AVIF": avifs,
    "DICOM": dicoms,
    "array": arrays,
}


# Mutations


def mutated(encoded: bytes, rng: random.Random) -> bytes:
    """A file with bytes changed, cut, repeated or taken out, mostly near its start."""
    data = bytearray(encoded)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        ends = (len(data), min(len(data), 600))
        place = rng.randrange(rng.choice(ends)) if data else 0
        kind = rng.randrange(6)
        if kind < 2:
            data[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 2:
            value = rng.choice((0, 1, 255, 65_535, 2**31 - 1, 2**32 - 1))
            data[place : place + 4] = struct.pack(rng.choice("<>") + "I", value)
        elif kind == 3:
            del data[place : place + rng.choice((1, 2, 40))]
        elif kind == 4:
            data[place:place] = data[place : place + rng.choice((2, 12, 300))]
        elif rng.random() < 0.3:
            del data[place:]
    return bytes(data)


def peak_megabytes() -> float:
    """Of this process alone, on Linux; `ru_maxrss` starts at the parent's peak."""
    with open("/proc/self/status") as file:
        found = [line.split()[1] for line in file if line.startswith("VmHWM:")]
    return int(found[0]) / 1024


def fuzz(count: int, seed: int, kinds: list[str]) -> dict[str, dict[str, object]]:
    """Converts mutations of each format, and counts what came of them."""
    rng = random.Random(seed)
    result = {}
    for kind in kinds:
        files = [one.encoded for one in ALL[kind]().values()]
        found: dict[str, object] = {"converted": 0, "refused": 0, "errors": []}
        longest = 0.0
        for _ in range(count):
            encoded = mutated(rng.choice(files), rng)
            start = time.process_time()
            try:
                to_png(encoded)
                found["converted"] += 1
            except DecodeError:
                found["refused"] += 1
            except Exception as error:
                found["errors"].append(repr(error))
            longest = max(longest, time.process_time() - start)
        found["longest"] = longest
        found["peak_mb"] = peak_megabytes()  # of this kind and those before it
        result[kind] = found
    return result


if __name__ == "__main__":
    wanted, first, megabytes = map(int, sys.argv[1:4])
    resource.setrlimit(resource.RLIMIT_AS, (megabytes * 2**20,) * 2)
    print(json.dumps(fuzz(wanted, first, sys.argv[4:] or list(ALL))))
