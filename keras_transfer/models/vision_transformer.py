"""Vision transformers (ViT), and DINOv2 with registers.

Sources: Dosovitskiy et al. 2021, arXiv:2010.11929; Steiner et al. 2022,
arXiv:2106.10270 (augreg weights); Oquab et al. 2024, arXiv:2304.07193 (DINOv2);
Darcet et al. 2024, arXiv:2309.16588 (registers); Touvron et al. 2021, arXiv:2103.17239
(LayerScale).

A network consists of Keras's own layers, so that a saved model needs nothing of this
package. Two of them hold weights in an unusual way: the class token, the registers and
the position embeddings are the kernel of a `Dense` layer that reads a constant 1, and
LayerScale is an `EinsumDense` layer that multiplies each channel by a weight.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import keras
import numpy as np

_EPSILON = 1e-6  # of LayerNormalization, in DINOv2 and timm


@dataclass(frozen=True)
class _Shape:
    """The sizes in which the networks differ.

    Attributes:
        patch: Side of a patch in pixels.
        width: Number of features of a token.
        heads: Number of attention heads.
        registers: Number of register tokens.
        layer_scale: Whether the output of each branch is scaled channel by channel.
        blocks: Number of blocks.
    """

    patch: int
    width: int
    heads: int
    registers: int = 0
    layer_scale: bool = False
    blocks: int = 12


def dinov2_small(input_tensor: keras.KerasTensor) -> keras.Model:
    """Builds DINOv2's ViT-S/14 with 4 registers, with random weights.

    Args:
        input_tensor: float32 `[N, S, S, 3]` RGB pixels, normalized by ImageNet's mean
            and standard deviation; S is a multiple of 14.

    Returns:
        A model from the source of `input_tensor` to float32 `[N, 1 + 4 + T, 384]`
        tokens: the class token, the registers, and one for each of the T patches.

    Raises:
        ValueError: If S is no multiple of 14.
    """
    shape = _Shape(patch=14, width=384, heads=6, registers=4, layer_scale=True)
    return _vision_transformer(input_tensor, "dinov2_small", shape)


def dinov2_base(input_tensor: keras.KerasTensor) -> keras.Model:
    """Builds DINOv2's ViT-B/14 with 4 registers; see `dinov2_small`.

    Its tokens have 768 features.
    """
    shape = _Shape(patch=14, width=768, heads=12, registers=4, layer_scale=True)
    return _vision_transformer(input_tensor, "dinov2_base", shape)


def vit_base_patch16(input_tensor: keras.KerasTensor) -> keras.Model:
    """Builds ViT-B/16 with random weights.

    Args:
        input_tensor: float32 `[N, S, S, 3]` RGB pixels in [-1, 1]; S is a multiple of
            16.

    Returns:
        A model from the source of `input_tensor` to float32 `[N, 1 + T, 768]` tokens:
        the class token, and one for each of the T patches.

    Raises:
        ValueError: If S is no multiple of 16.
    """
    shape = _Shape(patch=16, width=768, heads=12)
    return _vision_transformer(input_tensor, "vit_base_patch16", shape)


def from_torch(model: keras.Model, arrays: Mapping[str, np.ndarray]) -> None:
    """Sets the weights of a model from a PyTorch state dict.

    Position embeddings for another number of patches are interpolated as by Hugging
    Face's Dinov2WithRegisters and by timm: bicubic, antialiased, without an offset.

    Args:
        model: A model built by one of the constructors.
        arrays: Arrays by the names of DINOv2's repository, of timm or of Hugging Face,
            such as `blocks.0.norm1.weight` or `encoder.layer.0.norm1.weight`.

    Raises:
        KeyError: If an array is missing.
        ValueError: If an array has the wrong shape.
    """
    arrays = {_short_name(name): array for name, array in arrays.items()}
    layers = {layer.name: layer for layer in model.layers if layer.weights}
    layers.pop("embeddings").set_weights([_embeddings(model, arrays)])
    for name, layer in layers.items():
        torch_name = _torch_name(name)
        if isinstance(layer, keras.layers.MultiHeadAttention):
            values = _attention(arrays, torch_name, layer.num_heads)
        elif isinstance(layer, keras.layers.EinsumDense):
            values = [arrays[f"{torch_name}.gamma"]]
        else:
            kernel, bias = (arrays[f"{torch_name}.{x}"] for x in ("weight", "bias"))
            # torch [out, in, h, w] -> Keras [h, w, in, out]; [out, in] -> [in, out]
            axes = (2, 3, 1, 0)[-kernel.ndim :] if kernel.ndim == 4 else (1, 0)
            values = [kernel if kernel.ndim == 1 else kernel.transpose(axes), bias]
        layer.set_weights([np.asarray(value, np.float32) for value in values])


_SHORT_NAMES = (
    # (part of a name of Hugging Face, the same in DINOv2's repository)
    (r"^(vit|dinov2_with_registers)\.", ""),
    (r"^embeddings\.(cls_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^reg_token$", "register_tokens"),  # of timm
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)


def _short_name(name: str) -> str:
    for pattern, replacement in _SHORT_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


_PARTS = {
    "norm1": "norm1",
    "attention": "attn",
    "attention_scale": "ls1",
    "norm2": "norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "scale": "ls2",
}


def _torch_name(layer: str) -> str:
    """Returns a layer's name in a state dict."""
    if layer in ("patches", "norm"):
        return {"patches": "patch_embed.proj", "norm": "norm"}[layer]
    block, _, part = layer.partition("_")
    return f"blocks.{int(block.removeprefix('block')) - 1}.{_PARTS[part]}"


def _attention(
    arrays: Mapping[str, np.ndarray], name: str, heads: int
) -> list[np.ndarray]:
    """Returns the weights of attention in Keras's order: query, key, value, output."""
    values = []
    for index, part in enumerate(("query", "key", "value")):
        for field in ("weight", "bias"):
            if f"{name}.qkv.{field}" in arrays:
                array = np.split(arrays[f"{name}.qkv.{field}"], 3)[index]
            else:
                array = arrays[f"{name}.{part}.{field}"]
            # torch [out, in] -> Keras [in, heads, out / heads]
            values.append(array.T.reshape(*array.T.shape[:-1], heads, -1))
    kernel, bias = (arrays[f"{name}.proj.{field}"] for field in ("weight", "bias"))
    return [*values, kernel.T.reshape(heads, -1, len(bias)), bias]


def _embeddings(model: keras.Model, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the kernel of the layer `embeddings`, `[1, T * D]`."""
    _, height, width, _ = model.get_layer("patches").output.shape
    positions = arrays["pos_embed"][0].astype(np.float32)  # [1 + patches, D]
    class_token = arrays["cls_token"][0].astype(np.float32)
    prefix = [class_token]
    if math.isqrt(len(positions)) ** 2 < len(positions):
        prefix = [class_token + positions[:1]]
        positions = positions[1:]
    if model.get_layer("tokens").output.shape[1] > 1 + height * width:
        prefix.append(arrays["register_tokens"][0])
    side = math.isqrt(len(positions))
    positions = positions.reshape(side, side, -1)
    if (side, side) != (height, width):
        positions = keras.ops.image.resize(
            positions, (height, width), "bicubic", antialias=True
        )
    rows = np.concatenate([*prefix, np.reshape(positions, (height * width, -1))])
    return rows.reshape(1, -1)


def _vision_transformer(
    input_tensor: keras.KerasTensor, name: str, shape: _Shape
) -> keras.Model:
    side = input_tensor.shape[1]
    if side % shape.patch:
        below = max(side // shape.patch, 1) * shape.patch
        raise ValueError(
            f"their side is no multiple of its patches' {shape.patch} pixels, as "
            f"{below} and {below + shape.patch} are"
        )
    x = _tokens(input_tensor, shape)
    for number in range(1, shape.blocks + 1):
        block = f"block{number}"
        y = _normalize(x, f"{block}_norm1")
        y = keras.layers.MultiHeadAttention(
            shape.heads, shape.width // shape.heads, name=f"{block}_attention"
        )(y, y)
        x = _add(x, y, f"{block}_attention", shape)
        y = _normalize(x, f"{block}_norm2")
        y = keras.layers.Dense(4 * shape.width, activation="gelu", name=f"{block}_fc1")(
            y
        )
        y = keras.layers.Dense(shape.width, name=f"{block}_fc2")(y)
        x = _add(x, y, block, shape)
    inputs = keras.utils.get_source_inputs(input_tensor)
    return keras.Model(inputs, _normalize(x, "norm"), name=name)


def _tokens(image: keras.KerasTensor, shape: _Shape) -> keras.KerasTensor:
    """Embeds patches, puts class token and registers first, and adds positions."""
    x = keras.layers.Conv2D(shape.width, shape.patch, shape.patch, name="patches")(
        image
    )
    x = keras.layers.Reshape((-1, shape.width), name="patch_sequence")(x)
    one = keras.ops.ones_like(x[:, 0, :1])
    x = keras.layers.ZeroPadding1D((1 + shape.registers, 0), name="padded")(x)
    # Row by row: class token with its position, registers, positions of patches.
    learned = keras.layers.Dense(
        math.prod(x.shape[1:]),
        use_bias=False,
        kernel_initializer=keras.initializers.TruncatedNormal(stddev=0.02),
        name="embeddings",
    )(one)
    learned = keras.layers.Reshape(x.shape[1:], name="embedding_sequence")(learned)
    return keras.layers.Add(name="tokens")([x, learned])


def _normalize(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    return keras.layers.LayerNormalization(epsilon=_EPSILON, name=name)(x)


def _add(
    x: keras.KerasTensor, branch: keras.KerasTensor, name: str, shape: _Shape
) -> keras.KerasTensor:
    """Adds a branch, scaled if there is LayerScale."""
    if shape.layer_scale:
        branch = keras.layers.EinsumDense(
            "btd,d->btd", x.shape[1:], kernel_initializer="ones", name=f"{name}_scale"
        )(branch)
    return keras.layers.Add(name=f"{name}_add")([x, branch])
