"""The camera or device that made an image, read from the header of its file."""

import io
from collections.abc import Callable, Mapping
from importlib.util import find_spec

import numpy as np

from keras_transfer.data.formats.convert import file_type
from keras_transfer.data.formats.silence import silenced
from keras_transfer.findings.images import AuditedImages
from keras_transfer.findings.properties import Property, category

_MOST_IMAGES = 5_000  # of which files are read
_MOST_BYTES = 2**31  # of all files together
_MOST_TEXT = 80  # characters of a name
_MAKE, _MODEL = 271, 272  # tags of EXIF 2.3 and TIFF 6.0
_DEFLATED = b"1.2.840.10008.1.2.1.99"  # a DICOM that would be inflated whole
_DICOM = {
    "Manufacturer": "the maker of the device",
    "StationName": "the station",
    "InstitutionName": "the institution",
}
_CAMERA = "the camera"
_ADVICE = "Collect images of all classes with the same devices, at the same places."
_NONE = "no name"


def source_properties(images: AuditedImages, seed: int) -> list[Property]:
    """Reads which camera or device made the images, as their files say.

    At most 5,000 images or 2 GiB are read, and only headers are decoded. A file without
    a name, or whose header cannot be read, counts as one without a name: that alone may
    tell classes apart.

    Args:
        images: The images.
        seed: Seed of the choice of images.

    Returns:
        A property each of the camera (EXIF make and model) and, of DICOM files, of the
        maker of the device, the station and the institution, if there are several.
    """
    rows = np.random.default_rng(seed).permutation(len(images))[:_MOST_IMAGES]
    fits = np.cumsum(images.quality["bytes"][rows]) <= _MOST_BYTES
    sources = [images.table.sources[index] for index in rows[fits]]
    found: dict[str, Mapping[str, str]] = {}
    for source, encoded in images.read(sources):
        if isinstance(encoded, bytes):
            found[source] = named_devices(encoded)
    properties = []
    for name in dict.fromkeys(name for one in found.values() for name in one):
        values = [
            found[source].get(name, _NONE) if source in found else None
            for source in images.table.sources
        ]
        one = category(name, "file", values, _ADVICE)
        if one is not None:
            properties.append(one)
    return properties


def named_devices(encoded: bytes) -> dict[str, str]:
    """Reads the names of devices from an image's header; never raises an error.

    Args:
        encoded: The file's content.

    Returns:
        Names by what they are of, such as `the camera`; empty if there is none.
    """
    read = _READERS.get(file_type(encoded), _by_pillow)
    try:
        with silenced():
            return {
                key: text
                for key, value in read(encoded).items()
                if (text := _text(value))
            }
    except Exception:  # what libraries raise for damaged headers has no common class
        return {}


def _text(value: object) -> str:
    """Returns a name without the padding and the control characters of headers."""
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value or "")
    printable = "".join(x if x.isprintable() else " " for x in text.split("\0")[0])
    return " ".join(printable.split())[:_MOST_TEXT]


def _by_pillow(encoded: bytes) -> Mapping[str, object]:
    from PIL import Image

    if file_type(encoded) == "PNG" and b"eXIf" not in encoded:
        return {}  # Pillow would decode the pixels to look behind them
    with Image.open(io.BytesIO(encoded)) as image:
        return _camera(image.getexif())


def _by_tags(encoded: bytes) -> Mapping[str, object]:
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        return _camera(image.tag_v2)  # type: ignore[attr-defined]


def _camera(tags: Mapping[int, object]) -> Mapping[str, object]:
    make, model = _text(tags.get(_MAKE)), _text(tags.get(_MODEL))
    if model.casefold().startswith(make.casefold()):
        make = ""  # as in "Canon Canon EOS 5D"
    return {_CAMERA: f"{make} {model}"}


def _from_heif(encoded: bytes) -> Mapping[str, object]:
    if find_spec("pillow_heif") is None:
        return {}
    import pillow_heif
    from PIL import Image

    tags = Image.Exif()
    tags.load(pillow_heif.open_heif(io.BytesIO(encoded)).info.get("exif") or b"")
    return _camera(tags)


def _from_dicom(encoded: bytes) -> Mapping[str, object]:
    if find_spec("pydicom") is None or _DEFLATED in encoded[:4096]:
        return {}
    import pydicom

    dataset = pydicom.dcmread(
        io.BytesIO(encoded), stop_before_pixels=True, specific_tags=[*_DICOM]
    )
    return {name: dataset.get(key) for key, name in _DICOM.items()}


_READERS: dict[str, Callable[[bytes], Mapping[str, object]]] = {
    "TIFF": _by_tags,
    "HEIC": _from_heif,
    "DICOM": _from_dicom,
    "array": lambda _: {},
}
