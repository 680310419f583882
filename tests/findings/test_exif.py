"""Names of cameras and devices in headers of files."""

import io
from dataclasses import replace

import numpy as np
import pillow_heif
import pydicom
import pytest
from audited import audited
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset

from keras_transfer.findings.exif import named_devices, source_properties
from keras_transfer.findings.shortcuts import shortcut_findings


def encoded(kind: str, make: str = "Canon", model: str = "Canon EOS 5D") -> bytes:
    exif = Image.Exif()
    exif[271], exif[272] = make, model
    buffer = io.BytesIO()
    image = Image.new("RGB", (32, 32))
    if kind == "HEIF":
        heif = pillow_heif.from_pillow(image)
        heif.save(buffer, exif=exif.tobytes())
    else:
        image.save(buffer, kind, exif=exif)
    return buffer.getvalue()


def dicom() -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = meta.MediaStorageSOPInstanceUID = "1.2.3"
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset = FileDataset("x", {}, file_meta=meta, preamble=bytes(128))
    dataset.Manufacturer, dataset.InstitutionName = "GE ", "Mercy"
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "HEIF"])
def test_the_camera_is_read(kind):
    assert named_devices(encoded(kind)) == {"the camera": "Canon EOS 5D"}
    assert named_devices(encoded(kind, "NIKON\0\0", "D90\n")) == {
        "the camera": "NIKON D90"
    }


def test_the_devices_of_a_dicom_are_read():
    found = named_devices(dicom())
    assert found == {"the maker of the device": "GE", "the institution": "Mercy"}


def test_files_without_names_have_none():
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    assert named_devices(buffer.getvalue()) == {}
    np.save(buffer := io.BytesIO(), np.zeros((8, 8)))
    assert named_devices(buffer.getvalue()) == {}


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["JPEG", "PNG", "TIFF", "HEIF", ""]))
def test_damaged_headers_are_no_error(noise, kind):
    whole = encoded(kind) if kind else dicom()
    place = len(noise) % len(whole)
    damaged = whole[:place] + noise + whole[place + len(noise) :]
    for content in (damaged, whole[:place], noise):
        assert all(map(str.isprintable, named_devices(content).values()))


def test_a_camera_for_each_class_is_a_shortcut():
    y = np.arange(60) % 2
    files = [encoded("JPEG"), encoded("JPEG", "NIKON", "D90")]
    images = audited(y)
    contents = {x: files[c] for x, c in zip(images.table.sources, y, strict=True)}
    images = replace(images, read=lambda names: ((x, contents[x]) for x in names))
    (camera,) = source_properties(images, 0)
    assert camera.name == "the camera" and sorted(camera.labels) == [
        "Canon EOS 5D",
        "NIKON D90",
    ]
    (found,) = shortcut_findings(images, None, 0, [camera])
    assert found.kind == "class told from the camera" and found.severity == "high"
