"""What is measured of an image beside its features."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from keras_transfer.data.decode import make_measuring_decoder
from keras_transfer.data.quality import FILE_TYPES, measure_quality

SIZE = 64


def photo(seed=0):
    """Smooth noise, as photos are."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    return small.resize((160, 120), Image.Resampling.BICUBIC)


def encode(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def measure(encoded):
    return measure_quality(encoded, make_measuring_decoder(SIZE)(encoded))


@pytest.mark.parametrize("form", FILE_TYPES[:5])
def test_size_and_kind_of_a_file(form):
    encoded = encode(photo(), form)
    row = measure(encoded)
    assert FILE_TYPES[row["file_type"]] == form
    assert (row["width"], row["height"]) == (160, 120)
    assert row["bytes"] == len(encoded)
    assert (row["jpeg_quality"] > 0) == (form == "JPEG")


def test_size_is_that_of_the_image_the_way_up_that_it_is_shown():
    exif = Image.Exif()
    exif[0x0112] = 6
    row = measure(encode(photo(), "JPEG", exif=exif))
    assert (row["width"], row["height"]) == (120, 160)


@pytest.mark.parametrize("quality", [5, 20, 49, 50, 75, 90, 95])
def test_jpeg_quality_is_that_it_was_written_in(quality):
    encoded = encode(photo(), "JPEG", quality=quality)
    assert abs(int(measure(encoded)["jpeg_quality"]) - quality) <= 1


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_flat_image(value):
    row = measure(encode(Image.new("RGB", (SIZE, SIZE), (value, value, value))))
    assert row["brightness"] == pytest.approx(value, abs=0.01)
    assert row["contrast"] == pytest.approx(0, abs=0.01)
    assert row["sharpness"] == pytest.approx(0, abs=0.01)
    assert row["is_gray"]
    assert not row["is_nearly_black"]  # a PNG of 8 bits


def test_brightness_contrast_and_sharpness_against_definitions():
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    row = measure(encode(Image.fromarray(pixels)))
    luminance = pixels.astype(np.float64) @ [0.299, 0.587, 0.114]
    assert row["brightness"] == pytest.approx(luminance.mean(), rel=1e-5)
    assert row["contrast"] == pytest.approx(luminance.std(), rel=1e-5)
    laplacian = [
        luminance[y - 1, x]
        + luminance[y + 1, x]
        + luminance[y, x - 1]
        + luminance[y, x + 1]
        - 4 * luminance[y, x]
        for y in range(1, SIZE - 1)
        for x in range(1, SIZE - 1)
    ]
    assert row["sharpness"] == pytest.approx(np.var(laplacian), rel=1e-4)
    assert not row["is_gray"]


def test_blur_is_less_sharp_and_gray_is_seen_through_jpeg():
    sharp, blurred = photo(), photo().filter(ImageFilter.GaussianBlur(6))
    assert measure(encode(blurred))["sharpness"] < measure(encode(sharp))["sharpness"]
    gray = sharp.convert("L").convert("RGB")
    assert measure(encode(gray, "JPEG", quality=50))["is_gray"]
    assert not measure(encode(sharp, "JPEG", quality=50))["is_gray"]


def test_similar_images_have_similar_hashes():
    def hashed(encoded):
        return int(measure(encoded)["perceptual_hash"])

    one = hashed(encode(photo()))
    assert (one ^ hashed(encode(photo(), "JPEG", quality=30))).bit_count() <= 6
    brighter = photo().point(lambda value: value * 0.8 + 30)
    assert (one ^ hashed(encode(brighter))).bit_count() <= 6
    others = [hashed(encode(photo(seed))) for seed in range(1, 20)]
    assert min((one ^ other).bit_count() for other in others) >= 12
