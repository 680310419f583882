"""Vision transformers against KerasHub and Hugging Face transformers.

These packages are not installed for the other tests: 1.5 GB. Run with
`pip install '.[test,reference]'`; `test_vision_transformer.py` compares with NumPy.
"""

from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
from test_alexnet import as_checkpoint
from test_weights import as_zip

from keras_transfer.models.bases import get_base
from keras_transfer.models.classifier import build_base

WHY = "needs pip install 'keras-transfer[reference]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore"),  # those of other packages
]

SMALL, VIT = get_base("dinov2_small"), get_base("vit_base_patch16")
SIZES = pytest.mark.parametrize("size", [56, 112])


def randomized(model):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        is_scale = ("norm" in name and name.endswith("weight")) or "lambda" in name
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.05 * noise + float(is_scale)
    return model.eval()


@pytest.fixture(scope="module")
def dinov2():
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14
    )
    return randomized(transformers.Dinov2WithRegistersModel(config))


def pixels_of(size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (2, size, size, 3)).astype(np.float32)


def scaled(pixels: np.ndarray) -> np.ndarray:
    return (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]


def by_hugging_face(model, image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        x = torch.tensor(image.transpose(0, 3, 1, 2), dtype=torch.float32)
        return model(x).last_hidden_state.numpy()


def class_and_mean(tokens: np.ndarray) -> np.ndarray:
    return np.concatenate([tokens[:, 0], tokens[:, 5:].mean(1)], 1)


def save_safetensors(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def save_as_dinov2(model, folder: Path) -> Path:
    """As a .pth file by the names of DINOv2's repository."""
    old = {name: x.numpy() for name, x in model.state_dict().items()}
    new = {
        "cls_token": old["embeddings.cls_token"],
        "register_tokens": old["embeddings.register_tokens"],
        "pos_embed": old["embeddings.position_embeddings"],
    }
    for field in ("weight", "bias"):
        new |= {
            f"patch_embed.proj.{field}": old[
                f"embeddings.patch_embeddings.projection.{field}"
            ],
            f"norm.{field}": old[f"layernorm.{field}"],
        }
        for i in range(12):
            block, attention = f"encoder.layer.{i}", f"encoder.layer.{i}.attention"
            new[f"blocks.{i}.attn.qkv.{field}"] = np.concatenate(
                [old[f"{attention}.{x}_proj.{field}"] for x in "qkv"]
            )
            new[f"blocks.{i}.attn.proj.{field}"] = old[f"{attention}.o_proj.{field}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                new[f"blocks.{i}.{part}.{field}"] = old[f"{block}.{part}.{field}"]
    for i in range(12):
        for n in (1, 2):
            gamma = old[f"encoder.layer.{i}.layer_scale{n}.lambda1"]
            new[f"blocks.{i}.ls{n}.gamma"] = gamma
    path = folder / "dinov2.pth"
    path.write_bytes(as_zip(as_checkpoint(new)))
    return path


@SIZES
@pytest.mark.parametrize("save", [save_safetensors, save_as_dinov2])
def test_dinov2_is_that_of_hugging_face(
    dinov2, tmp_path, size: int, save: Callable[..., Path]
):
    model = build_base(SMALL, str(save(dinov2, tmp_path)), size, 0)
    pixels = pixels_of(size)
    expected = class_and_mean(by_hugging_face(dinov2, scaled(pixels)))
    np.testing.assert_allclose(model(pixels), expected, atol=1e-4)


def test_vit_is_that_of_hugging_face(tmp_path):
    config = transformers.ViTConfig(layer_norm_eps=1e-6)
    vit = randomized(transformers.ViTModel(config, add_pooling_layer=False))
    model = build_base(VIT, str(save_safetensors(vit, tmp_path)), 224, 0)
    pixels = pixels_of(224)
    expected = by_hugging_face(vit, pixels / 127.5 - 1)[:, 0]
    np.testing.assert_allclose(model(pixels), expected, atol=1e-4)


@pytest.mark.parametrize("size", [64, 320])
def test_vit_at_another_size_is_that_of_hugging_face(tmp_path, size):
    """With position embeddings interpolated by torch as timm does: antialiased."""
    config = transformers.ViTConfig(layer_norm_eps=1e-6)
    vit = randomized(transformers.ViTModel(config, add_pooling_layer=False))
    model = build_base(VIT, str(save_safetensors(vit, tmp_path)), size, 0)
    config.image_size = size
    other = transformers.ViTModel(config, add_pooling_layer=False)
    state, name = vit.state_dict(), "embeddings.position_embeddings"
    grid = state[name][:, 1:].reshape(1, 14, 14, 768).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(
        grid, (size // 16, size // 16), mode="bicubic", antialias=True
    )
    rows = grid.permute(0, 2, 3, 1).reshape(1, -1, 768)
    state[name] = torch.cat([state[name][:, :1], rows], 1)
    other.load_state_dict(state)
    pixels = pixels_of(size)
    expected = by_hugging_face(other.eval(), pixels / 127.5 - 1)[:, 0]
    np.testing.assert_allclose(model(pixels), expected, atol=1e-4)


# KerasHub's weights, by the names of the layers here

OF_HUB = {
    "block{}_norm1": "encoder/layers_{}/norm1",
    "block{}_attention": "encoder/layers_{}/attention/attention",
    "block{}_attention_scale": "encoder/layers_{}/layer_scale1",
    "block{}_norm2": "encoder/layers_{}/norm2",
    "block{}_fc1": "encoder/layers_{}/mlp/fc1",
    "block{}_fc2": "encoder/layers_{}/mlp/fc2",
    "block{}_scale": "encoder/layers_{}/layer_scale2",
}


@SIZES
def test_dinov2_is_that_of_keras_hub(dinov2, tmp_path, size):
    keras_hub = pytest.importorskip("keras_hub", reason=WHY)

    def backbone(side: int) -> keras.Model:
        return keras_hub.models.DINOV2Backbone(
            patch_size=14,
            num_layers=12,
            hidden_dim=384,
            num_heads=6,
            intermediate_dim=1536,
            num_register_tokens=4,
            image_shape=(side, side, 3),
            antialias_in_interpolation=True,
        )

    path = save_safetensors(dinov2, tmp_path)
    ours, whole = build_base(SMALL, str(path), 518, 0), backbone(518)
    weights = {variable.path: variable for variable in whole.weights}
    names = {"patches": "embeddings/patch_embeddings/projection", "norm": "layernorm"}
    for i in range(12):
        names |= {k.format(i + 1): v.format(i) for k, v in OF_HUB.items()}
    for name, prefix in names.items():
        theirs = [v for path, v in weights.items() if path.startswith(f"{prefix}/")]
        for one, other in zip(ours.get_layer(name).weights, theirs, strict=True):
            other.assign(one)
    state = dinov2.state_dict()
    for name in ("cls_token", "register_tokens", "position_embeddings"):
        weights[f"embeddings/{name}"].assign(state[f"embeddings.{name}"].numpy())
    weights["embeddings/interpolated_position_embeddings"].assign(
        state["embeddings.position_embeddings"].numpy()
    )
    whole.save_weights(tmp_path / "hub.weights.h5")
    hub = backbone(size)
    hub.load_weights(tmp_path / "hub.weights.h5")  # which interpolates
    pixels = pixels_of(size)
    tokens = hub({"images": scaled(pixels).astype(np.float32)}, training=False)
    expected = class_and_mean(np.asarray(tokens))
    model = build_base(SMALL, str(path), size, 0)
    np.testing.assert_allclose(model(pixels), expected, atol=1e-4)
