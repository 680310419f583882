"""Formats that are converted: the pixels of real files, reasons, bounds and silence."""

import io
import json
import logging
import math
import os
import struct
import subprocess
import sys
import textwrap
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import made_formats
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import CLASSES, Told, draw, encode
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from made_formats import (
    DEEP,
    GRAY,
    RGB,
    TWELVE,
    dicom,
    heic,
    npy,
    saved,
    shown,
    tiff,
)
from PIL import Image
from pydicom.encaps import encapsulate

import keras_transfer
from keras_transfer.data.decode import decode_image, make_measuring_decoder
from keras_transfer.data.folders import find_images
from keras_transfer.data.formats import convert
from keras_transfer.data.formats.convert import (
    CONVERTER_VERSION,
    file_type,
    image_digest,
    to_png,
)
from keras_transfer.data.formats.limits import MAX_PIXELS
from keras_transfer.data.quality import FILE_TYPES, measure_quality
from keras_transfer.data.reading import hashing
from keras_transfer.errors import DecodeError
from keras_transfer.features.file_index import FileIndex
from keras_transfer.serving.server import predict_bundle

MADE = {
    (kind, name): one for kind, make in made_formats.ALL.items()
    for name, one in make().items()
}  # fmt: skip
PHOTO = Image.fromarray(RGB)
AS_THEY_ARE = {
    form: encode(RGB, form) for form in ("JPEG", "PNG", "GIF", "BMP", "WebP")
}


def reason(image: object) -> str:
    with pytest.raises(DecodeError) as caught:
        to_png(image)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Pixels


@pytest.mark.parametrize("kind", made_formats.ALL)
def test_the_pixels_are_those_that_the_file_was_made_of(kind):
    made = {name: one for (of, name), one in MADE.items() if of == kind}
    assert len(made) > 10
    for name, one in made.items():
        assert file_type(one.encoded) == kind, name
        pixels = shown(one.encoded)
        assert (pixels.shape, pixels.dtype) == (one.expected.shape, one.expected.dtype)
        difference = abs(pixels.astype(int) - one.expected).max()
        assert difference <= one.tolerance, (name, difference)


def test_the_graph_decodes_what_an_image_is_converted_to():
    decode = make_measuring_decoder(32)
    for name in ("8-bit RGB", "16-bit gray", "8-bit RGBA", "16-bit RGB"):
        encoded = MADE["TIFF", f"{name}, little endian"].encoded
        plain = {"16-bit gray": DEEP, "8-bit RGBA": made_formats.ALPHA}.get(name, RGB)
        image = decode(encoded)
        expected = decode(encode(plain, "PNG"))
        np.testing.assert_array_equal(image.pixels, expected.pixels)
        assert (image.height, image.width) == RGB.shape[:2]
        assert image.is_16_bit == (name == "16-bit gray")


@pytest.mark.parametrize("kind", made_formats.ALL)
def test_training_sees_what_a_client_sends(kind):
    decode = make_measuring_decoder(32)
    for encoded in {one.encoded for (of, _), one in MADE.items() if of == kind}:
        ours, theirs = decode(encoded), decode(to_png(encoded))
        np.testing.assert_array_equal(ours.pixels, theirs.pixels)
        assert ours[1:] == theirs[1:]


@pytest.mark.parametrize("alpha", [RGB[..., :1], RGB[..., :1] * 0])
def test_alpha_is_dropped_as_the_decoder_drops_it(alpha):
    decode = make_measuring_decoder(32)
    for pixels in (RGB, GRAY[..., None]):
        with_alpha = np.concatenate([pixels, alpha], -1)
        image = Image.fromarray(with_alpha)
        theirs = decode(saved(image, "PNG")).pixels
        for ours in (saved(image, "TIFF"), npy(with_alpha)):
            np.testing.assert_array_equal(decode(ours).pixels, theirs)


arrays = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2, 3, 4])),
    elements=st.floats(0, 255, width=32),
)


@settings(deadline=None, max_examples=50)
@given(arrays)
def test_numbers_are_rounded_half_to_even(array):
    expected = np.round(array).astype(np.uint8)
    expected = expected[..., :3] if array.shape[2] > 2 else expected[..., 0]
    with Image.open(io.BytesIO(to_png(npy(array)))) as image:
        np.testing.assert_array_equal(np.asarray(image), expected)
    if 0 < array.max() <= 1:
        assert "0 to 255 is expected, not 0 to 1" in reason(array)
    else:
        assert to_png(array) == to_png(npy(array))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((2, 2), np.nan), "nan"),
        (np.full((2, 2), 255.5), "255.5"),
        (np.full((2, 2), -1), "-1 to -1; 0 to 255"),
        (np.full((2, 2), 256, np.uint16), "256"),
        (np.full((2, 2, 3), np.inf, np.float16), "inf"),
        (np.zeros(4), "(4,)"),
        (np.zeros((2, 2, 5)), "(2, 2, 5)"),
        (np.zeros((1, 2, 2, 3)), "(1, 2, 2, 3)"),
        (np.zeros((0, 3)), "3x0 pixels"),
        (np.zeros((2, 2), bool), "bool"),
        (np.zeros((2, 2), complex), "complex"),
        (np.zeros((2, 2), "S3"), "S3"),
        (np.zeros((2, 2), [("a", "i4")]), "i4"),
    ],
)
def test_arrays_that_are_no_images_are_refused(array, words):
    assert words in reason(array)
    assert words in reason(npy(array))


def test_arrays_of_objects_and_lying_headers_are_refused():
    buffer = io.BytesIO()
    np.save(buffer, np.full((2, 2), {}, object), allow_pickle=True)
    assert "object" in reason(buffer.getvalue())
    large = npy(np.zeros((100, 100), np.uint8))
    assert "damaged" in reason(large[:-1])
    lying = large.replace(b"(100, 100), }", b"(99999,9999)}")
    assert len(lying) == len(large)
    assert "9999x99999 pixels; at most" in reason(lying)
    long = b"\x93NUMPY\x02\0" + struct.pack("<I", 20_000) + b"(" * 20_000
    assert "damaged" in reason(long)


# Kinds and digests


@pytest.mark.parametrize("form", AS_THEY_ARE)
def test_what_the_graph_decodes_is_returned_as_it_is(form, tmp_path):
    encoded = AS_THEY_ARE[form]
    assert file_type(encoded) == form
    assert to_png(encoded) is encoded
    path = tmp_path / "image"
    path.write_bytes(encoded)
    assert to_png(path) == to_png(str(path)) == encoded
    assert image_digest(encoded) == sha256(encoded).digest()


@pytest.mark.parametrize("encoded", [b"", b"\xff", b"text" * 99, b"RI", b"PK\3\4"])
def test_what_is_no_image_is_returned_as_it_is(encoded):
    assert file_type(encoded) == ""
    assert to_png(encoded) is encoded


def test_a_path_that_cannot_be_read_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        to_png(tmp_path / "missing.tif")
    assert keras_transfer.to_png is to_png
    (tmp_path / "a.tif").write_bytes(saved(PHOTO, "TIFF"))
    assert to_png(tmp_path / "a.tif") == to_png(saved(PHOTO, "TIFF"))


@pytest.mark.parametrize(
    ("brands", "kind"),
    [
        (b"heic", "HEIC"), (b"heix", "HEIC"), (b"hevc", "HEIC"), (b"avif", "AVIF"),
        (b"avis", "AVIF"), (b"mif1 heic", "HEIC"), (b"mif1 miaf avif", "AVIF"),
        (b"msf1 hevc", "HEIC"), (b"msf1 avis", "AVIF"), (b"mif1", "HEIC"),
        (b"heic mif1 avif", "HEIC"), (b"isom mp41", ""), (b"crx ", ""),
    ],
)  # fmt: skip
def test_heic_is_told_from_avif_by_its_brands(brands, kind):
    major, *compatible = (x.ljust(4) for x in brands.split())
    body = b"ftyp" + major + bytes(4) + major + b"".join(compatible)
    assert file_type(struct.pack(">I", 4 + len(body)) + body + b"avif heic") == kind


def test_digests_of_converted_images_depend_on_the_converter(monkeypatch, tmp_path):
    encoded = saved(PHOTO, "TIFF")
    before = image_digest(encoded)
    assert before != sha256(encoded).digest()
    assert before == image_digest(encoded) != image_digest(encoded + b"\0")
    digests: dict[str, bytes] = {}
    read = hashing(lambda names: ((x, encoded) for x in names), digests)
    assert len(list(read(["a.tif"]))) == 1
    assert digests == {"a.tif": before}
    (tmp_path / "a.tif").write_bytes(encoded)
    os.utime(tmp_path / "a.tif", ns=(10**18, 10**18))
    real = os.stat

    def aged(path, **options):
        found = real(path, **options)
        fields = {name: getattr(found, name) for name in dir(found) if "st_" in name}
        fields["st_ctime_ns"] -= 10**11
        return type("Found", (), fields)()

    monkeypatch.setattr("keras_transfer.features.file_index.os.stat", aged)
    FileIndex(tmp_path / "i", tmp_path, ["a.tif"]).remember(digests)
    assert FileIndex(tmp_path / "i", tmp_path, ["a.tif"]).known() == digests
    later = CONVERTER_VERSION + 1
    monkeypatch.setattr(convert, "CONVERTER_VERSION", later)
    monkeypatch.setattr("keras_transfer.features.file_index.CONVERTER_VERSION", later)
    assert image_digest(encoded) != before
    assert FileIndex(tmp_path / "i", tmp_path, ["a.tif"]).known() == {}


# What is measured and found


def test_file_types_keep_their_codes():
    assert FILE_TYPES[:5] == ("JPEG", "PNG", "GIF", "BMP", "WebP")
    decode = make_measuring_decoder(32)
    for kind, name in (
        ("TIFF", "mode RGB, tiff_lzw"), ("HEIC", "RGB"), ("AVIF", "RGB"),
        ("DICOM", "RGB"), ("array", "[H, W, 3], uint8"),
    ):  # fmt: skip
        encoded = MADE[kind, name].encoded
        row = measure_quality(encoded, decode(encoded))
        assert FILE_TYPES[row["file_type"]] == kind
        assert row["bytes"] == len(encoded)
        assert (row["width"], row["height"]) == (RGB.shape[1], RGB.shape[0])
        assert row["jpeg_quality"] == 0


def test_a_tiff_of_12_bits_in_16_is_nearly_black_as_a_png_is():
    decode = make_measuring_decoder(32)
    for pixels, is_black in ((TWELVE, True), (DEEP, False), (GRAY // 32, False)):
        for form in ("PNG", "TIFF"):
            encoded = saved(Image.fromarray(pixels), form)
            row = measure_quality(encoded, decode(encoded))
            assert row["is_nearly_black"] == is_black


def test_dicoms_named_by_uid_are_images_and_their_index_is_not(tmp_path):
    names = {"a.dcm", "b.DICOM", "c.hif", "1.2.840.113619.2.55", "no-suffix", "d.heic"}
    for name in (*names, "DICOMDIR", "dicomdir", "x.1a", "notes.txt", "y.²"):
        (tmp_path / name).write_bytes(b"x")
    assert {path.name for path in find_images(tmp_path)} == names


# Reasons


def truncated(kind: str, name: str, share: float = 0.7) -> bytes:
    encoded = MADE[kind, name].encoded
    return encoded[: int(len(encoded) * share)]


FLOAT = Image.fromarray(RGB[..., 0].astype(np.float32))
WIDE = Image.fromarray(RGB[..., 0].astype(np.int32))
GRAY_TIFF = tiff([GRAY])
REASONS = {
    "float TIFF": (saved(FLOAT, "TIFF"), "floating point pixels; save it with 8 or 16"),
    "32-bit TIFF": (saved(WIDE, "TIFF"), "signed pixels; save it with 8 or 16 bits"),
    "unsigned 32-bit TIFF": (tiff([GRAY.astype(np.uint32)]), "32-bit pixels; save it"),
    "signed TIFF": (tiff([GRAY], t339=2), "signed pixels; save it with 8 or 16 bits"),
    "16-bit planes": (tiff([DEEP] * 3), "16-bit planes; save it with interleaved"),
    "unknown compression": (tiff([GRAY], t259=34712), "compression 34712, which Pill"),
    "WebP in TIFF": (tiff([RGB], t259=50001), "compression 50001, which Pillow"),
    "gray of two channels": (tiff([RGB[..., :2]]), "combination of channels and bits"),
    "TIFF without width": (tiff([GRAY], t256=None), "pixels; at most"),
    "wide TIFF": (tiff([GRAY], t256=2**20, t257=2**20), "1048576x1048576 pixels"),
    "TIFF of no rows": (tiff([GRAY], t257=0), "50x0 pixels"),
    "large tiles": (tiff([GRAY], side=64, t322=60_000, t323=60_000), "too large tiles"),
    "many strips": (tiff([GRAY], t273=list(range(65_537))), "too many or too large"),
    "overlapping tags": (
        tiff([GRAY], **{f"t{tag}": [7] * 99 for tag in range(512, 522)})
        .replace(struct.pack("<HI", 3, 99), struct.pack("<HI", 3, 500)),
        "damaged TIFF",
    ),
    "truncated TIFF": (truncated("TIFF", "mode RGB, tiff_lzw"), "TIFF, "),
    "truncated pixels": (tiff([GRAY], t273=3000), "damaged or truncated TIFF, "),
    "empty TIFF": (b"II*\0", "damaged or truncated TIFF, 4 bytes"),
    "empty HEIC": (b"\0\0\0\x14ftypmif1\0\0\0\0mif1", "damaged or truncated HEIC"),
    "truncated HEIC": (truncated("HEIC", "RGB"), "HEIC, "),
    "truncated AVIF": (truncated("AVIF", "RGB"), "damaged or truncated AVIF, "),
    "truncated array": (truncated("array", "[H, W], uint8"), "truncated array"),
    "DICOM without pixels": (dicom(None), "a DICOM without pixels"),
    "truncated DICOM": (truncated("DICOM", "8-bit"), "damaged or truncated DICOM, "),
    "DICOM without rows": (dicom(GRAY, Rows=0), "50x0 pixels"),
    "large compressed DICOM": (
        dicom(GRAY, "1.2.840.10008.1.2.5", Rows=8000, Columns=8000,
              PixelData=encapsulate([b"1234"])), "at most 44,739,242 are decoded"),
    "large DICOM": (dicom(GRAY, Rows=65_535, Columns=65_535), "65535x65535 pixels"),
    "width of 0": (dicom(GRAY, WindowCenter=5, WindowWidth=0), "(LINEAR, width 0"),
    "unknown function": (
        dicom(GRAY, WindowCenter=5, WindowWidth=9, VOILUTFunction="CUBIC"), "CUBIC"),
    "JPEG-LS": (
        dicom(GRAY, "1.2.840.10008.1.2.4.80", PixelData=encapsulate([b"1234"])),
        "the transfer syntax JPEG-LS Lossless Image Compression; save it",
    ),
    "lossless JPEG": (
        dicom(GRAY, "1.2.840.10008.1.2.4.70", PixelData=encapsulate([b"1234"])),
        "the transfer syntax JPEG Lossless, Non-Hierarchical, First-Order",
    ),
    "deflated": (dicom(GRAY, "1.2.840.10008.1.2.1.99"), "Deflated Explicit VR"),
    "of another size": (
        dicom(GRAY, "1.2.840.10008.1.2.4.50",
              PixelData=encapsulate([encode(np.zeros((9, 9), np.uint8), "JPEG")])),
        "its pixels do not have the size it says",
    ),
    "RLE bomb": (
        dicom(GRAY, "1.2.840.10008.1.2.5", PixelData=encapsulate(
            [struct.pack("<16L", 1, 64, *[0] * 14) + b"\x81\0" * 10_000])),
        "its pixels do not have the size it says",
    ),
    "12-bit JPEG": (
        dicom(TWELVE, "1.2.840.10008.1.2.4.51", BitsStored=12, HighBit=11,
              PixelData=encapsulate([encode(GRAY, "JPEG")])),
        "a damaged or truncated DICOM",
    ),
    "not a number": (
        dicom(np.where(GRAY > 99, np.nan, 1).astype(np.float32)), "not numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_what_cannot_be_converted_has_a_reason(name):
    encoded, words = REASONS[name]
    assert words in reason(encoded)


def test_the_graph_says_how_to_convert():
    for kind, words in (
        ("TIFF", "a TIFF"), ("HEIC", "an AVIF or HEIC"), ("AVIF", "an AVIF or HEIC"),
        ("DICOM", "a DICOM"),
    ):  # fmt: skip
        encoded = next(one.encoded for key, one in MADE.items() if key[0] == kind)
        with pytest.raises(Exception, match="keras_transfer.to_png") as caught:
            decode_image(encoded, 32)
        assert words in str(caught.value)


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(keras_transfer.__file__).parents[1],
    )


def test_a_missing_package_is_named_and_tensorflow_is_not_imported(tmp_path):
    for kind in made_formats.ALL:
        encoded = next(one.encoded for key, one in MADE.items() if key[0] == kind)
        (tmp_path / kind).write_bytes(encoded)
    done = run_python(
        """
        import sys
        from pathlib import Path
        sys.modules["pillow_heif"] = sys.modules["pydicom"] = None
        import keras_transfer
        from keras_transfer.errors import DecodeError
        for path in sorted(Path(sys.argv[1]).iterdir()):
            try:
                print(path.name, keras_transfer.to_png(path)[:4])
            except DecodeError as error:
                print(path.name, error)
        assert "tensorflow" not in sys.modules
        """,
        tmp_path,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        r"AVIF b'\x89PNG'",
        "DICOM a DICOM, which needs pydicom: pip install 'keras-transfer[formats]'",
        "HEIC a HEIC, which needs pillow-heif: pip install 'keras-transfer[formats]'",
        r"TIFF b'\x89PNG'",
        r"array b'\x89PNG'",
    ]


# Hostile files: bounded time and memory, no crash, no noise


def elements(count: int) -> bytes:
    """A DICOM of many empty private elements."""
    head = dicom(None)
    return head + b"".join(
        struct.pack("<HH2sH", 0x6001, i % 65_536, b"LO", 0) for i in range(count)
    )


def items(count: int) -> bytes:
    """A DICOM of a sequence of many empty items."""
    body = struct.pack("<HHI", 0xFFFE, 0xE000, 0) * count
    start = struct.pack("<HH2sHI", 0x5200, 0x9230, b"SQ", 0, len(body))
    return dicom(None) + start + body


def sequences(size: int) -> bytes:
    """A DICOM of two sequences of one large item each."""
    body = struct.pack("<HHI", 0xFFFE, 0xE000, size) + bytes(size)
    return dicom(GRAY) + b"".join(
        struct.pack("<HH2sHI", 0x5200, tag, b"SQ", 0, len(body)) + body
        for tag in (0x9229, 0x9230)
    )


def nested(depth: int) -> bytes:
    """A DICOM of sequences in sequences."""
    start = struct.pack("<HH2sHI", 0x5400, 0x100, b"SQ", 0, 2**32 - 1)
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 2**32 - 1)
    return dicom(None) + (start + item) * depth


def tags_of_everything(count: int, size: int) -> bytes:
    """A TIFF directory of tags, each of which is the whole of its block."""
    tags = b"".join(struct.pack("<HHII", 40_000 + i, 7, size, 0) for i in range(count))
    return b"II*\0" + struct.pack("<IH", 8, count) + tags + bytes(4)


def exif_bomb() -> bytes:
    """An AVIF with EXIF of 3 MB, that is read 20,000 times by who parses it."""
    block = tags_of_everything(20_000, 3_000_000).ljust(3_000_010, b"\0")
    dummy = b"Exif\0\0II*\0" + bytes(5) + b"\1" + bytes(len(block) - 10)
    encoded = saved(PHOTO, "AVIF", exif=dummy)
    assert dummy[6:] in encoded
    return encoded.replace(dummy[6:], block)


def bomb(side: int = 13_300) -> bytes:
    """A small TIFF of as many pixels as are decoded."""
    rows = zlib.compress(bytes(side * 64), 9)
    strips = math.ceil(side / 64)
    return tiff([GRAY], t256=side, t257=side, t278=64, t259=8,
                t273=[8] * strips, t279=[len(rows)] * strips)  # fmt: skip


@pytest.mark.parametrize(
    ("encoded", "words"),
    [
        (elements(500_100), "too many elements"),
        (nested(40_000), "damaged"),
        (tags_of_everything(4000, 48_000) + bytes(9), "pixels; at most"),
        (GRAY_TIFF[:4] + struct.pack("<I", 2) + GRAY_TIFF[8:], "0x0 pixels"),
        (items(50_100), "too many elements"),
        (sequences(5 * 2**19), "too many elements"),
        (b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**60), "too many tags"),
        (bomb(), "damaged or truncated TIFF"),
    ],
    ids=["elements", "nested", "tags", "loop", "items", "sequences", "BigTIFF",
         "pixels"],
)  # fmt: skip
def test_a_hostile_file_is_refused_soon(encoded, words):
    start = time.process_time()
    assert words in reason(encoded)
    assert time.process_time() - start < 30  # seconds of CPU; a hang takes hours


def test_metadata_of_an_avif_are_never_parsed():
    start = time.process_time()
    assert shown(exif_bomb()).shape == RGB.shape
    assert time.process_time() - start < 5


def test_mutations_neither_crash_nor_hang_nor_print(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "always", made_formats.__file__, "250", "0", "6000"],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(Path(keras_transfer.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found.keys() == made_formats.ALL.keys()
    for counts in found.values():
        assert counts["errors"] == []
        assert counts["converted"] + counts["refused"] == 250
        assert counts["converted"] > 20 and counts["refused"] > 20
        assert counts["longest"] < 20
        assert counts["peak_mb"] < 2000


NOISY = {
    "a TIFF that is cut": lambda: truncated("TIFF", "mode RGB, tiff_adobe_deflate"),
    "fax": lambda: bytes(MADE["TIFF", "mode 1, group4"].encoded[:8]) + b"\xa5" * 60
    + MADE["TIFF", "mode 1, group4"].encoded[68:],
    "a large TIFF": lambda: tiff([np.zeros((9500, 9500), np.uint8)], deflate=True),
    "an odd DICOM": lambda: dicom(GRAY, PixelData=GRAY.tobytes() + bytes(9)),
    "a DICOM of an odd VR": lambda: dicom(GRAY, WindowCenter="1e400").replace(
        b"DS", b"US"),
    "implicit, not explicit": lambda: dicom(GRAY).replace(
        b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\0\0\0"),
}  # fmt: skip


def test_nothing_is_printed_warned_or_logged_by_threads(capfd, caplog):
    files = [make() for make in NOISY.values()]

    def convert(encoded: bytes) -> None:
        try:
            to_png(encoded)
        except DecodeError as error:
            assert "Warning" not in str(error)

    def warn(_: int) -> bool:
        """Warnings of other threads are still there."""
        with pytest.warns(UserWarning, match="mine"):
            warnings.warn("mine", stacklevel=1)
        return True

    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("always")
        list(pool.map(convert, files * 3))
    assert caught == []
    assert warn(0)
    logging.getLogger("pydicom").warning("mine")
    assert [record.getMessage() for record in caplog.records] == ["mine"]
    assert capfd.readouterr() == ("", "")


def test_threads_convert_at_once_as_one_does_alone():
    files = [one.encoded for one in MADE.values()]
    alone = [to_png(encoded) for encoded in files]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            assert list(pool.map(to_png, files)) == alone


def test_pillow_is_left_as_it_was():
    limit, openers = Image.MAX_IMAGE_PIXELS, set(Image.OPEN)
    for encoded in (MADE["HEIC", "RGB"].encoded, MADE["AVIF", "RGB"].encoded):
        to_png(encoded)
    assert Image.MAX_IMAGE_PIXELS == limit == MAX_PIXELS // 2
    assert "HEIF" not in openers | set(Image.OPEN)


# End to end


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Class folders whose files take turns among the formats."""
    folder = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir()
        for index in range(20):
            image = Image.fromarray(draw(name, rng))
            suffix, encoded = (
                (".tif", saved(image, "TIFF", compression="tiff_lzw")),
                (".heic", heic(image)),
                (".avif", saved(image, "AVIF")),
                (f".{index}", dicom(np.asarray(image))),
                (".png", saved(image, "PNG")),
            )[index % 5]
            (folder / name / f"{index:02d}{suffix}").write_bytes(encoded)
    (folder / "circle" / "bad.dcm").write_bytes(dicom(None))
    return folder


@pytest.mark.long
def test_a_run_of_mixed_formats_predicts_and_exports(mixed, tmp_path, kt):
    told = Told()
    run = keras_transfer.fit(
        mixed, base="alexnet", image_size=64, weights="none", folds=2, head={"l2": 0.1},
        name="run", runs_dir=tmp_path / "runs", cache_dir=tmp_path / "cache",
        max_skipped=0.2, listeners=[told],
    )  # fmt: skip
    rows = pq.read_table(run.images_path).to_pylist()
    kinds = {row["file_type"] for row in rows if row["reason"] is None}
    assert kinds == {"TIFF", "HEIC", "AVIF", "DICOM", "PNG"}
    reasons = [row["reason"] for row in rows if row["reason"]]
    assert reasons == ["a DICOM without pixels"]
    for row in rows:
        if row["reason"] is None:
            encoded = (mixed / row["source"]).read_bytes()
            assert row["sha256"] == image_digest(encoded)
            assert (row["width"], row["height"]) == (72, 72)
    again = Told()
    run.evaluate(listeners=[again])
    assert not [note for note in again.notes if "changed" in note]
    exported = run.export(listeners=[again])
    assert not [note for note in again.notes if "noise" in note or "changed" in note]
    paths = sorted((mixed / "circle").iterdir())
    ours = {x.source: x for x in keras_transfer.predict(run, paths)}
    done = kt("predict", "--bundle", exported, *paths)
    assert done.exit_code == 0, done.stderr
    assert "a DICOM without pixels" in done.stdout + done.stderr
    theirs = {x.source: x for x in predict_bundle(exported, paths).rows}
    assert len(theirs) == len(ours) == 21
    for path, prediction in ours.items():
        other = theirs[path]
        assert prediction.error == other.error
        if prediction.probabilities is not None:
            np.testing.assert_allclose(
                prediction.probabilities, other.probabilities, atol=1e-4
            )
