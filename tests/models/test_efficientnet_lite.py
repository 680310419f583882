"""EfficientNet-Lite's numbers, computed here from the checkpoints by NumPy alone."""

import keras
import numpy as np
import pytest
from conftest import encode
from sklearn.datasets import load_sample_images

from keras_transfer.data.decode import make_decoder
from keras_transfer.models.bases import get_base, weights_path
from keras_transfer.models.classifier import build_base
from keras_transfer.models.torch_checkpoint import read_torch_checkpoint

VARIANTS = pytest.mark.parametrize("number", range(3))
STRIDED_STAGES = (2, 3, 4, 6)


def pad(x: np.ndarray, kernel: int, stride: int) -> np.ndarray:
    """Pads [H, W, C] as TensorFlow does: what is odd goes to the end."""
    missing = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[:2]]
    return np.pad(x, [(m // 2, m - m // 2) for m in missing] + [(0, 0)])


def convolve(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """[H, W, C] by torch's [D, C, h, w], or [C, 1, h, w] channel by channel."""
    size = kernel.shape[-1]
    x = pad(x, size, stride)
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (0, 1))
    windows = windows[::stride, ::stride]  # [H, W, C, h, w]
    if kernel.shape[1] == 1 and x.shape[-1] > 1:
        return np.einsum("HWChw,Chw->HWC", windows, kernel[:, 0])
    return np.einsum("HWChw,DChw->HWD", windows, kernel, optimize=True)


class Checkpoint:
    def __init__(self, number: int):
        base = get_base(f"efficientnet_lite{number}")
        self.arrays = read_torch_checkpoint(weights_path(base))

    def layer(self, x, conv: str, norm: str, stride: int = 1, relu6: bool = True):
        x = convolve(x, self.arrays[f"{conv}.weight"], stride)
        gamma, beta, mean, variance = (
            self.arrays[f"{norm}.{field}"]
            for field in ("weight", "bias", "running_mean", "running_var")
        )
        x = (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta
        return np.clip(x, 0, 6) if relu6 else x

    def block(self, x, name: str, stride: int):
        y = x
        if f"{name}._expand_conv.weight" in self.arrays:
            y = self.layer(y, f"{name}._expand_conv", f"{name}._bn0")
        y = self.layer(y, f"{name}._depthwise_conv", f"{name}._bn1", stride)
        y = self.layer(y, f"{name}._project_conv", f"{name}._bn2", relu6=False)
        return x + y if x.shape == y.shape else y

    def outputs(self, pixels: np.ndarray) -> list[np.ndarray]:
        """What stem, each block and head give, [H, W, C] each.

        A stage begins where the number of filters changes.
        """
        x = self.layer((pixels - 127.0) / 128, "_conv_stem", "_bn0", stride=2)
        found, stage, filters = [x], 0, None
        for number in range(sum("_depthwise_conv" in name for name in self.arrays)):
            name = f"_blocks.{number}"
            new_filters = len(self.arrays[f"{name}._project_conv.weight"])
            begins = new_filters != filters
            stage, filters = stage + begins, new_filters
            stride = 2 if begins and stage in STRIDED_STAGES else 1
            found.append(x := self.block(x, name, stride))
        assert stage == 7
        return [*found, self.layer(x, "_conv_head", "_bn1")]


@VARIANTS
def test_every_block_is_that_computed_by_hand(number):
    base = get_base(f"efficientnet_lite{number}")
    model = build_base(base, "imagenet", 70, 0)
    blocks = [layer for layer in model.layers if layer.name.endswith("_project_bn")]
    names = {layer.name for layer in model.layers}
    ends = [layer.name.removesuffix("_project_bn") for layer in blocks]
    ends = [f"{x}_add" if f"{x}_add" in names else f"{x}_project_bn" for x in ends]
    ends = ["stem_activation", *ends, "top_activation"]
    outputs = [model.get_layer(end).output for end in ends]
    pixels = np.random.default_rng(1).integers(0, 256, (70, 70, 3), np.uint8)
    actual = keras.Model(model.input, outputs)(pixels[None].astype(np.float32))
    expected = Checkpoint(number).outputs(pixels)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert other.std() > 1e-3
        np.testing.assert_allclose(one[0], other, atol=1e-4 * np.abs(other).max())
    assert {*base.stage_ends} < {*ends}


@pytest.mark.long
@VARIANTS
def test_a_palace_is_classified(number):
    base = get_base(f"efficientnet_lite{number}")
    model = build_base(base, "imagenet", base.image_size, 0)
    photo = load_sample_images().images[0]  # china.jpg
    pixels = make_decoder(base.image_size)(encode(photo, "PNG"))[None]
    arrays = Checkpoint(number).arrays
    features = np.asarray(model(pixels.astype(np.float32)))
    logits = features @ arrays["_fc.weight"].T + arrays["_fc.bias"]
    # bell cote, boathouse, castle, monastery, palace, stupa
    assert logits.argmax() in [442, 449, 483, 663, 698, 832]
