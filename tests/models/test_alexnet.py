"""AlexNet's numbers, computed here from the checkpoint by NumPy alone."""

import hashlib
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import draw
from PIL import Image
from test_weights import FORMATS, Storage, Tensor, as_zip

import keras_transfer
from keras_transfer.errors import UsageError, WeightsError
from keras_transfer.features.parity import is_close
from keras_transfer.models import weights as weights_module
from keras_transfer.models.bases import get_base, weights_path
from keras_transfer.models.classifier import build_base

CONVOLUTIONS = {
    # torch's name: shape [out, in, height, width], stride, padding, pooled after
    "features.0": ((64, 3, 11, 11), 4, 2, True),
    "features.3": ((192, 64, 5, 5), 1, 2, True),
    "features.6": ((384, 192, 3, 3), 1, 1, False),
    "features.8": ((256, 384, 3, 3), 1, 1, False),
    "features.10": ((256, 256, 3, 3), 1, 1, True),
}
DENSE = {"classifier.1": (4096, 256 * 6 * 6), "classifier.4": (4096, 4096)}
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def random_arrays(with_dense: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, (shape, *_) in CONVOLUTIONS.items()}
    arrays = {}
    for name, shape in {**shapes, **(DENSE if with_dense else {})}.items():
        scale = np.sqrt(2 / np.prod(shape[1:]))
        arrays[f"{name}.weight"] = rng.normal(0, scale, shape).astype(np.float32)
        arrays[f"{name}.bias"] = rng.normal(0, 0.1, shape[0]).astype(np.float32)
    return arrays


def as_checkpoint(arrays: dict[str, np.ndarray]) -> OrderedDict:
    tensors = OrderedDict()
    for number, (name, array) in enumerate(arrays.items()):
        strides = tuple(step // array.itemsize for step in array.strides)
        storage = Storage(str(number), array.ravel())
        tensors[name] = Tensor(storage, 0, array.shape, strides)
    return tensors


def convolve(x: np.ndarray, kernel: np.ndarray, stride: int, pad: int) -> np.ndarray:
    """[C, H, W] by [out, C, h, w]: the definition, a position at a time."""
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    size = kernel.shape[-1]
    height, width = ((side - size) // stride + 1 for side in x.shape[1:])
    y = np.empty((len(kernel), height, width))
    for i in range(height):
        for j in range(width):
            window = x[
                :, i * stride : i * stride + size, j * stride : j * stride + size
            ]
            y[:, i, j] = np.tensordot(kernel, window, 3)
    return y


def pool(x: np.ndarray) -> np.ndarray:
    """The largest of each 3 x 3 window, at a stride of 2."""
    height, width = ((side - 3) // 2 + 1 for side in x.shape[1:])
    return np.array(
        [
            [
                x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2))
                for j in range(width)
            ]
            for i in range(height)
        ]
    ).transpose(2, 0, 1)


def by_hand(pixels: np.ndarray, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """[256, h, w] of uint8 [H, W, 3]."""
    x = ((pixels / 255 - MEAN) / STD).transpose(2, 0, 1)
    for name, (_, stride, padding, pooled) in CONVOLUTIONS.items():
        x = convolve(x, arrays[f"{name}.weight"], stride, padding)
        x = np.maximum(x + arrays[f"{name}.bias"][:, None, None], 0)
        x = pool(x) if pooled else x
    return x


def by_keras(name: str, checkpoint: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(pixels, what a base with a checkpoint's weights says of them)."""
    model = build_base(get_base(name), str(checkpoint), size, 0)
    pixels = np.random.default_rng(1).integers(0, 256, (size, size, 3), np.uint8)
    return pixels, np.asarray(model(pixels[None].astype(np.float32), training=False))[0]


@FORMATS
def test_features_are_those_computed_by_hand(tmp_path, write):
    arrays = random_arrays(with_dense=False)
    path = tmp_path / "alexnet.pth"
    path.write_bytes(write(as_checkpoint(arrays)))
    pixels, actual = by_keras("alexnet", path, 95)
    expected = by_hand(pixels, arrays).mean((1, 2))  # pooled over places
    assert expected.std() > 0.01
    np.testing.assert_allclose(actual, expected, atol=1e-4 * expected.max())


def test_fc7_is_computed_by_hand(tmp_path):
    arrays = random_arrays(with_dense=True)
    path = tmp_path / "alexnet.pth"
    path.write_bytes(as_zip(as_checkpoint(arrays)))
    pixels, actual = by_keras("alexnet_fc7", path, 224)
    x = by_hand(pixels, arrays).ravel()  # torch flattens [C, H, W]
    for name in DENSE:
        x = np.maximum(arrays[f"{name}.weight"] @ x + arrays[f"{name}.bias"], 0)
    np.testing.assert_allclose(actual, x, atol=1e-4 * x.max())


def test_fc7_needs_images_of_its_own_size():
    with pytest.raises(UsageError, match="Its own size is 224"):
        build_base(get_base("alexnet_fc7"), "none", 160, 0)


@pytest.fixture
def in_keras_cache(tmp_path, monkeypatch):
    """A checkpoint where Keras would have put it, taken for torchvision's own."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    content = as_zip(as_checkpoint(random_arrays(with_dense=False)))
    digest = hashlib.sha256(content).hexdigest()
    base = replace(get_base("alexnet"), weights_sha256=digest)
    weights_path(base).parent.mkdir()
    weights_path(base).write_bytes(content)
    return base


def test_imagenet_weights_come_from_the_keras_cache(in_keras_cache):
    base = in_keras_cache
    one = build_base(base, "imagenet", 95, 0)
    other = build_base(base, str(weights_path(base)), 95, 0)
    for a, b in zip(one.weights, other.weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_file_with_another_hash_is_not_taken(in_keras_cache, monkeypatch):
    base, path = in_keras_cache, weights_path(in_keras_cache)
    path.write_bytes(path.read_bytes() + b"x")
    asked = []

    def offline(origin, *rest):
        asked.append(origin)
        raise OSError("no network")

    monkeypatch.setattr(keras.src.utils.file_utils, "urlretrieve", offline)
    with pytest.raises(WeightsError, match="could not be downloaded. Put alexnet-owt"):
        build_base(base, "imagenet", 95, 0)
    assert asked == [base.weights_url]
    assert weights_module.keras_cache() == path.parent


def test_a_download_of_something_else_is_not_taken(in_keras_cache, monkeypatch):
    base, path = in_keras_cache, weights_path(in_keras_cache)
    path.unlink()
    monkeypatch.setattr(
        keras.src.utils.file_utils,
        "urlretrieve",
        lambda origin, target, *rest: Path(target).write_bytes(b"x"),
    )
    with pytest.raises(WeightsError, match="is not the file that alexnet needs"):
        build_base(base, "imagenet", 95, 0)


def test_a_head_is_trained_on_gray_color_and_transparent_files(kt):
    rng = np.random.default_rng(0)
    for index, name in enumerate(("bright", "dark")):
        Path("xrays", name).mkdir(parents=True)
        for number in range(12):
            pixels = draw("circle", rng) // (1 + 3 * index)
            mode = ("L", "RGB", "RGBA")[number % 3]
            image = Image.fromarray(pixels).convert(mode)
            image.save(Path("xrays", name, f"{number}.png"))
    result = kt("fit", "xrays", "--base", "alexnet", "--weights", "none")
    assert result.exit_code == 0, result.output
    run = keras_transfer.open_run("saved_models/xrays-alexnet")
    assert run.manifest.images_forwarded == 24 and run.manifest.skipped == 0
    assert is_close(run.manifest.parity)
