"""Vision transformers' numbers, computed here from state dicts by NumPy alone."""

import struct
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from scipy.special import erf
from test_alexnet import as_checkpoint
from test_weights import as_zip

from keras_transfer.errors import UsageError, WeightsError
from keras_transfer.models.bases import get_base, weights_path
from keras_transfer.models.classifier import POOL, build_base
from keras_transfer.models.pooling import pool
from keras_transfer.models.safetensors_file import read_safetensors

SMALL = get_base("dinov2_small")
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
HUGGING_FACE = {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
HUGGING_FACE_BLOCK = {
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}


def random_arrays(width: int, patch: int, side: int, registers: int) -> dict:
    """A state dict by the names of DINOv2's repository."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, mean: float = 0.0) -> np.ndarray:
        return rng.normal(mean, 0.05, shape).astype(np.float32)

    arrays = {
        "cls_token": normal(1, 1, width),
        "pos_embed": normal(1, 1 + side**2, width),
        "patch_embed.proj.weight": normal(width, 3, patch, patch),
        "patch_embed.proj.bias": normal(width),
        "norm.weight": normal(width, mean=1),
        "norm.bias": normal(width),
    }
    if registers:
        arrays["register_tokens"] = normal(1, registers, width)
        arrays["mask_token"] = normal(1, width)
    for block in (f"blocks.{number}" for number in range(12)):
        for name, out, inp in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            arrays[f"{block}.{name}.weight"] = normal(out, inp)
            arrays[f"{block}.{name}.bias"] = normal(out)
        for number in (1, 2):
            arrays[f"{block}.norm{number}.weight"] = normal(width, mean=1)
            arrays[f"{block}.norm{number}.bias"] = normal(width)
            if registers:
                arrays[f"{block}.ls{number}.gamma"] = normal(width, mean=0.5)
    return arrays


def as_hugging_face(arrays: dict) -> dict:
    renamed = {}
    for name, array in arrays.items():
        _, number, *rest = name.split(".") if name.startswith("blocks") else ("", "")
        part = ".".join(rest)
        if part.startswith("attn.qkv"):
            field = part.rpartition(".")[2]
            for which, third in zip(
                ("query", "key", "value"), np.split(array, 3), strict=True
            ):
                new = f"encoder.layer.{number}.attention.attention.{which}.{field}"
                renamed[new] = np.ascontiguousarray(third)
            continue
        table = HUGGING_FACE_BLOCK if rest else HUGGING_FACE
        new = part or name
        for old, other in table.items():
            if new == old or new.startswith(f"{old}."):
                new = other + new.removeprefix(old)
        renamed[f"encoder.layer.{number}.{new}" if rest else new] = array
    return renamed


def as_timm(arrays: dict) -> dict:
    """As timm stores DINOv2: the class token includes its position."""
    changed = {k: v for k, v in arrays.items() if k != "mask_token"}
    changed["reg_token"] = changed.pop("register_tokens")
    positions = changed["pos_embed"]
    changed["cls_token"] = changed["cls_token"] + positions[:, :1]
    changed["pos_embed"] = positions[:, 1:].copy()
    return changed


def resized(positions: np.ndarray, side: int) -> np.ndarray:
    """[s, s, D] -> [side, side, D]: bicubic (a = -0.5), antialiased, by definition."""
    size = len(positions)
    scale = size / side
    stretch = max(scale, 1.0)
    centers = (np.arange(side) + 0.5) * scale - 0.5
    x = np.abs(np.arange(size) - centers[:, None]) / stretch
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x <= 1, near, np.where(x < 2, far, 0))
    weights /= weights.sum(1, keepdims=True)
    return np.einsum("ai,bj,ijd->abd", weights, weights, positions)


def normalized(x, arrays, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]


def dense(x, arrays, name):
    return x @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"]


def by_hand(image: np.ndarray, arrays: dict, patch: int, heads: int) -> np.ndarray:
    """[1 + registers + patches, D] of a scaled float64 [S, S, 3] image."""
    side = len(image) // patch
    squares = image.reshape(side, patch, side, patch, 3).transpose(0, 2, 4, 1, 3)
    kernel = arrays["patch_embed.proj.weight"]
    x = squares.reshape(side**2, -1) @ kernel.reshape(len(kernel), -1).T
    x = x + arrays["patch_embed.proj.bias"]
    positions = arrays["pos_embed"][0].astype(np.float64)
    grid = positions[1:].reshape(*2 * [round(len(positions[1:]) ** 0.5)], -1)
    x = x + resized(grid, side).reshape(side**2, -1)
    registers = arrays.get("register_tokens", np.zeros((1, 0, len(kernel))))[0]
    x = np.concatenate([arrays["cls_token"][0] + positions[:1], registers, x])
    one = np.ones(1)
    for block in (f"blocks.{number}" for number in range(12)):
        y = dense(normalized(x, arrays, f"{block}.norm1"), arrays, f"{block}.attn.qkv")
        q, k, v = y.reshape(len(x), 3, heads, -1).transpose(1, 2, 0, 3)
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = scores / scores.sum(-1, keepdims=True) @ v
        y = y.transpose(1, 0, 2).reshape(len(x), -1)
        y = dense(y, arrays, f"{block}.attn.proj")
        x = x + y * arrays.get(f"{block}.ls1.gamma", one)
        y = dense(normalized(x, arrays, f"{block}.norm2"), arrays, f"{block}.mlp.fc1")
        y = dense(y * (1 + erf(y / np.sqrt(2))) / 2, arrays, f"{block}.mlp.fc2")
        x = x + y * arrays.get(f"{block}.ls2.gamma", one)
    return normalized(x, arrays, "norm")


@pytest.fixture(scope="module")
def small_arrays() -> dict:
    return random_arrays(384, 14, 37, 4)


def write(folder: Path, arrays: dict, form: str) -> Path:
    if form == "DINOv2's .pth":
        path = folder / "dinov2.pth"
        path.write_bytes(as_zip(as_checkpoint(arrays)))
        return path
    path = folder / "model.safetensors"
    renamed = {"Hugging Face": as_hugging_face, "timm": as_timm}[form](arrays)
    save_file(renamed, path)
    return path


def pixels_of(size: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (size, size, 3), np.uint8)


@pytest.mark.parametrize(
    ("form", "size"),
    [
        ("DINOv2's .pth", 56),
        ("Hugging Face", 98),
        pytest.param("Hugging Face", 56, marks=pytest.mark.long),
        pytest.param("timm", 84, marks=pytest.mark.long),
    ],
)
def test_dinov2_is_computed_by_hand(tmp_path, small_arrays, form, size):
    path = write(tmp_path, small_arrays, form)
    model = build_base(SMALL, str(path), size, 0)
    pixels = pixels_of(size)
    actual = np.asarray(model(pixels[None].astype(np.float32)))[0]
    tokens = by_hand((pixels / 255 - MEAN) / STD, small_arrays, 14, 6)
    expected = np.concatenate([tokens[0], tokens[5:].mean(0)])
    assert expected.std() > 0.1
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.families
@pytest.mark.parametrize("size", [224, 64])
def test_vit_is_computed_by_hand(tmp_path, size):
    arrays = random_arrays(768, 16, 14, 0)
    save_file(
        arrays | {"head.weight": np.zeros((9, 768), "f4")}, tmp_path / "x.safetensors"
    )
    base = get_base("vit_base_patch16")
    model = build_base(base, str(tmp_path / "x.safetensors"), size, 0)
    pixels = pixels_of(size)
    actual = np.asarray(model(pixels[None].astype(np.float32)))[0]
    expected = by_hand(pixels / 127.5 - 1, arrays, 16, 12)[0]
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["dinov2_small", "vit_base_patch16"])
def test_a_side_that_is_no_multiple_of_the_patch_is_refused(name):
    with pytest.raises(UsageError) as caught:
        build_base(get_base(name), "none", 100, 0)
    assert f"{name} cannot be built for images of 100 pixels" in str(caught.value)
    assert "98 and 112" in str(caught.value) or "96 and 112" in str(caught.value)


def test_weights_without_a_known_hash_are_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    base = replace(SMALL, weights_sha256="")
    assert not get_base("dinov2_base").weights_sha256
    with pytest.raises(WeightsError) as caught:
        build_base(base, "imagenet", 56, 0)
    assert f"Download {base.weights_url} to {weights_path(base)}" in str(caught.value)
    weights_path(base).parent.mkdir()
    weights_path(base).write_bytes(b"not a checkpoint")
    with pytest.raises(WeightsError, match="is no torch checkpoint"):
        build_base(base, "imagenet", 56, 0)


# Pooling


@pytest.mark.parametrize("name", ["class", "class+mean", "tokens"])
def test_tokens_of_any_layer_are_pooled(name):
    base = replace(SMALL, pooling=name, prefix_tokens=3)
    inputs = keras.Input((8, 5))
    model = keras.Model(inputs, [pool(inputs, base, x) for x in (POOL, "other")])
    tokens = np.random.default_rng(0).normal(size=(2, 8, 5)).astype(np.float32)
    first, mean = tokens[:, 0], tokens[:, 3:].mean(1)
    expected = {
        "class": first,
        "class+mean": np.concatenate([first, mean], 1),
        "tokens": tokens.mean(1),
    }[name]
    for one in model(tokens):
        np.testing.assert_allclose(one, expected, atol=1e-6)
    assert model.get_layer("other").output.shape == (None, expected.shape[1])


# Files that are no safetensors


def header(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        header(b"{}", 2**62),
        header(b"[" * 100_000),
        header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
        header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}') + b"1234",
        header(b'{"a":{"dtype":"F9","shape":[1],"data_offsets":[0,4]}}') + b"1234",
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}') + b"12345678",
        header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}') + b"1234",
    ],
)
def test_a_hostile_header_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"x\.safetensors") as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        arrays = read_safetensors(path)
    except WeightsError as error:
        assert "\n" not in str(error)
    else:
        assert sum(array.nbytes for array in arrays.values()) < 1000


def test_every_number_type_becomes_float32(tmp_path):
    rows = b"".join(
        [np.float32(1.5).tobytes(), np.float16(2.5).tobytes(), b"\x20\x40"]  # bfloat16
    )
    about = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"F16","shape":[1],"data_offsets":[4,6]},'
        b'"c":{"dtype":"BF16","shape":[1],"data_offsets":[6,8]}}'
    )
    path = tmp_path / "x.safetensors"
    path.write_bytes(header(about) + rows)
    arrays = read_safetensors(path)
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "a": [1.5],
        "b": [2.5],
        "c": [2.5],
    }
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
