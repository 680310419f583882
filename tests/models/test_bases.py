"""The table of bases, against what Keras itself does."""

import gc
import hashlib
import importlib
import shutil
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import CLASSES
from keras.src.utils import file_utils

from keras_transfer.config import Format, HeadConfig, choices
from keras_transfer.errors import UsageError, WeightsError
from keras_transfer.models.bases import BASES, Base, get_base, weights_path
from keras_transfer.models.classifier import (
    POOL,
    attach_head,
    build_base,
    build_head,
    scale,
    weights_digest,
)
from keras_transfer.models.cut import cut

FORMATS = choices(Format)
KERAS_BASES = [base for base in BASES if base.module == "keras.applications"]
EVERY_BASE = pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)


PATCHES = {"dinov2_small": 56, "dinov2_base": 56, "vit_base_patch16": 64}
"""Side in pixels of small images of whole patches."""


def family(base):
    """The module that a base's constructor is defined in."""
    if base.module != "keras.applications":
        return importlib.import_module(base.module)
    return sys.modules[getattr(keras.applications, base.name).__module__]


SMALLEST = list(
    {
        family(base).__name__: base
        for base in sorted(BASES, key=lambda base: -base.parameters)
    }.values()
)


QUICK = ("efficientnet_lite0", "MobileNetV2", "alexnet")


def in_time(base):
    """A parameter: a few families always, the others by `-m families`, all by slow."""
    if base not in SMALLEST:
        return pytest.param(base, marks=pytest.mark.slow, id=base.name)
    marks = [] if base.name in QUICK else [pytest.mark.families]
    return pytest.param(base, marks=marks, id=base.name)


FAMILIES_IN_TIME = list(map(in_time, SMALLEST))
EVERY_BASE_IN_TIME = pytest.mark.parametrize("base", list(map(in_time, BASES)))


def without_weights(base, weights: str = "none") -> keras.Model:
    """A base at its own size, whose variables have shapes but no values."""
    try:
        with keras.StatelessScope(initialize_variables=False):
            return build_base(base, weights, base.image_size, 0)
    finally:
        keras.utils.clear_session()  # which would fill them in later


def stage_ends(model: keras.Model, base) -> list[str]:
    """The layers that end a base's stem and stages, by their names in this model."""
    ends = []
    for end in base.stage_ends:
        if end.startswith("before:"):
            tensor = model.get_layer(end.removeprefix("before:")).input
            end = tensor._keras_history.operation.name
        ends.append(end)
    return ends


def test_the_table_holds_every_model_of_keras_applications():
    of_keras = {name for name in dir(keras.applications) if name[0].isupper()}
    assert len(of_keras) == 40
    assert {base.name for base in KERAS_BASES} == of_keras
    ours = [base.name for base in BASES if base not in KERAS_BASES]
    assert ours == [
        *(f"efficientnet_lite{number}" for number in range(3)),
        *("dinov2_small", "dinov2_base", "vit_base_patch16"),
        *("alexnet", "alexnet_fc7"),
    ]


@EVERY_BASE
def test_scaling_is_that_of_the_family(base):
    rng = np.random.default_rng(0)
    pixels = rng.uniform(0, 255, (2, 6, 5, 3)).astype(np.float32)
    pixels[0, 0, 0], pixels[0, 0, 1] = 0, 255
    image = keras.Input(pixels.shape[1:])
    scaled = np.asarray(keras.Model(image, scale(image, base.scaling))(pixels))
    if base.name.startswith("efficientnet_lite"):
        expected = (pixels.astype(np.float64) - 127) / 128
    elif base.name == "vit_base_patch16":
        expected = (pixels.astype(np.float64) / 255 - 0.5) / 0.5
    elif base not in KERAS_BASES:  # as torchvision's weights want it
        mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
        expected = (pixels.astype(np.float64) / 255 - mean) / std
    else:
        expected = family(base).preprocess_input(pixels.copy())
    if base.scaling.name == "built in":
        assert np.array_equal(expected, pixels)
        assert np.array_equal(scaled, pixels)
    else:
        assert np.abs(expected - pixels).max() > 1
    tolerance = 1e-3 if base.scaling.bgr else 1e-5
    np.testing.assert_allclose(scaled, expected, rtol=0, atol=tolerance)


@EVERY_BASE
def test_names_are_found_however_they_are_written(base):
    parts = "_".join(base.name.replace("_", ""))
    for name in (base.name, base.name.upper(), base.name.lower(), f"-{parts}-"):
        assert get_base(name) is base


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("ResNet51", "ResNet50"),
        ("mobilnetv2", "MobileNetV2"),
        ("efficientnetlite0b", "efficientnet_lite0"),
        ("vgg-16b", "VGG16"),
        ("resnext101_32x8d", "ResNet101V2"),
    ],
)
def test_an_unknown_name_brings_up_the_nearest(name, nearest):
    with pytest.raises(UsageError) as caught:
        get_base(name)
    assert f"Received: {name!r}." in str(caught.value)
    assert f"Did you mean {nearest!r}?" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "swin", "banana split"])
def test_a_name_that_is_near_to_none_is_not_guessed(name):
    with pytest.raises(UsageError, match="`kt bases` lists all") as caught:
        get_base(name)
    assert "Did you mean" not in str(caught.value)


def token_net(image):
    """Patches of 8 x 8 pixels as a sequence of tokens."""
    x = keras.layers.Conv2D(6, 8, strides=8, name="patches")(image)
    tokens = keras.layers.Reshape((-1, 6), name="tokens")(x)
    return keras.Model(keras.utils.get_source_inputs(image), tokens)


def test_a_base_of_tokens_is_averaged_over_them():
    row = Base(
        name="token_net",
        image_size=32,
        scaling=get_base("MobileNetV2").scaling,
        parameters=0,
        weights_file="",
        stage_ends=("patches",),
        pooling="tokens",
        module=__name__,
    )
    model = build_base(row, "none", 32, seed=0)
    assert model.output_shape == (None, 6)
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3))
    tokens = keras.Model(model.input, model.get_layer("tokens").output)(pixels)
    np.testing.assert_allclose(model(pixels), np.mean(tokens, axis=1), atol=1e-5)


def test_what_keras_says_of_a_download_is_passed_on(monkeypatch):
    def get_file(*_, **__):
        raise OSError("not to be downloaded")

    monkeypatch.setattr(file_utils, "get_file", get_file)
    with pytest.raises(WeightsError, match="not to be downloaded"):
        without_weights(get_base("MobileNetV2"), "imagenet")


@pytest.mark.parametrize("number", range(3))
def test_weights_of_a_package_are_installed(number):
    base = get_base(f"efficientnet_lite{number}")
    data = weights_path(base).read_bytes()
    assert hashlib.sha256(data).hexdigest() == base.weights_sha256


@EVERY_BASE
def test_weights_file_parameters_and_stage_ends_of_every_base(base, monkeypatch):
    asked = []

    def get_file(fname=None, *_, **__):
        asked.append(fname)
        return "downloaded"

    def load_weights(model, file):
        assert file == "downloaded"

    monkeypatch.setattr(file_utils, "get_file", get_file)
    monkeypatch.setattr(keras.Model, "load_weights", load_weights)
    if base in KERAS_BASES:
        model = without_weights(base, "imagenet")
        assert asked == [base.weights_file]  # which is what Keras asks for
    else:
        model = without_weights(base)
    assert model.input_shape == (None, base.image_size, base.image_size, 3)
    assert model.count_params() == base.parameters
    assert not model.trainable_weights
    below = [0]
    for end in stage_ends(model, base):
        if "NASNet" in base.name:  # each of its cells reads the two before it
            with pytest.raises(UsageError, match=f"cannot be cut at '{end}'"):
                cut(model, end)
            extractor = keras.Model(model.input, model.get_layer(end).output)
        else:
            extractor, tail = cut(model, end)
            assert tail.input_shape == extractor.output_shape
            assert extractor.count_params() + tail.count_params() == base.parameters
        below.append(extractor.count_params())
    assert 3 <= len(below) <= 5
    assert [*below, base.parameters] == sorted({*below, base.parameters})


@pytest.mark.parametrize("base", FAMILIES_IN_TIME)
def test_a_base_cut_in_two_computes_the_same(base):
    size = PATCHES.get(base.name, 75)  # the least that all the others take
    model = build_base(base, "none", size, seed=0)
    if base.name not in PATCHES:  # they have a position embedding for each patch
        assert model.count_params() == base.parameters
    pixels = np.random.default_rng(0).uniform(0, 255, (2, size, size, 3))
    pixels = pixels.astype(np.float32)
    whole = np.asarray(model(pixels, training=False))
    assert whole.shape == (2, model.output_shape[1])
    assert not np.array_equal(whole[0], whole[1])
    ends = ["stem_bn1"] if "NASNet" in base.name else stage_ends(model, base)
    for layer in ("image", *ends):
        extractor, tail = cut(model, layer)
        halves = tail(extractor(pixels, training=False), training=False)
        largest = np.abs(whole).max()
        np.testing.assert_allclose(halves, whole, rtol=0, atol=1e-5 * largest)


@pytest.fixture(scope="module")
def mobilenet() -> keras.Model:
    return build_base(get_base("MobileNetV2"), "none", 64, seed=0)


@pytest.mark.parametrize("layer", ["block_2_expand_relu", "block_2_project_BN"])
def test_a_cut_beside_a_branch_is_refused(mobilenet, layer):
    with pytest.raises(UsageError) as caught:
        cut(mobilenet, layer)
    assert str(caught.value) == (
        f"MobileNetV2 cannot be cut at {layer!r}: layers above it read more than its "
        "output."
    )


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("block_99_add", "block_9_add"),
        ("before:block_2_add", "block_2_add"),
        ("Image", "image"),
        ("", None),
    ],
)
def test_an_unknown_layer_brings_up_the_nearest(mobilenet, name, nearest):
    with pytest.raises(UsageError) as caught:
        cut(mobilenet, name)
    assert f"MobileNetV2 has no such layer. Received: {name!r}." in str(caught.value)
    if nearest:
        assert f"Did you mean {nearest!r}?" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_below_the_input_layer_pixels_are_passed_on(mobilenet):
    extractor, tail = cut(mobilenet, "image")
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3))
    pixels = pixels.astype(np.float32)
    assert np.array_equal(extractor(pixels), pixels)
    assert tail.count_params() == mobilenet.count_params()


def test_a_classifier_is_cut_between_base_and_head(mobilenet):
    head = build_head(HeadConfig(), mobilenet.output_shape[1], 3, multi_label=False)
    model = attach_head(mobilenet, head)
    assert model.trainable_weights == head.trainable_weights
    extractor, tail = cut(model, POOL)
    pixels = np.full((1, 64, 64, 3), 99, np.float32)
    features = mobilenet(pixels, training=False)
    assert np.array_equal(extractor(pixels, training=False), features)
    assert np.array_equal(tail(features), model(pixels, training=False))


@pytest.mark.parametrize(("name", "size"), [("Xception", 70), ("VGG16", 16)])
def test_images_too_small_for_a_base_are_refused(name, size):
    base = get_base(name)
    with pytest.raises(
        UsageError, match=f"{name} cannot be built for images of {size}"
    ):
        build_base(base, "none", size, seed=0)


# BGR by an operation without weights, and a scaling per channel
@pytest.mark.parametrize(
    "name", ["VGG16", pytest.param("DenseNet121", marks=pytest.mark.families)]
)
def test_a_saved_model_gives_the_same_bits(tmp_path, name):
    base = build_base(get_base(name), "none", 32, seed=0)
    head = build_head(HeadConfig(), base.output_shape[1], 3, multi_label=False)
    model = attach_head(base, head)
    pixels = np.random.default_rng(0).uniform(0, 255, (4, 32, 32, 3))
    pixels = pixels.astype(np.float32) * [0.2, 0.6, 1.0]
    expected = np.asarray(model(pixels, training=False))
    assert not np.allclose(model(pixels[..., ::-1], training=False), expected)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    assert np.array_equal(loaded(pixels, training=False), expected)
    assert weights_digest(loaded) == weights_digest(model)
    predicted = loaded.predict(pixels, verbose=0)
    np.testing.assert_allclose(predicted, expected, atol=1e-5)


def two_layers(seed: int) -> keras.Model:
    image = keras.Input((4,))
    dense = keras.layers.Dense(6, bias_initializer="ones")
    model = keras.Model(image, keras.layers.BatchNormalization()(dense(image)))
    rng = np.random.default_rng(seed)
    model.set_weights([rng.normal(size=value.shape) for value in model.weights])
    return model


def test_the_digest_is_of_shapes_and_values_only():
    one, other = two_layers(0), two_layers(0)
    names = [[variable.path for variable in model.weights] for model in (one, other)]
    assert names[0] != names[1]
    assert weights_digest(one) == weights_digest(other) != weights_digest(two_layers(1))
    assert len(weights_digest(one)) == 64

    for index, value in enumerate(other.get_weights()):
        changed = [array.copy() for array in one.get_weights()]
        changed[index].flat[-1] = np.nextafter(value.flat[-1], np.float32(99))
        other.set_weights(changed)
        assert weights_digest(other) != weights_digest(one)

    flat, deep = (
        keras.Sequential(
            [keras.Input(shape), keras.layers.Dense(units, use_bias=False)]
        )
        for shape, units in (((2,), 3), ((3,), 2))
    )
    flat.set_weights([np.arange(6).reshape(2, 3)])
    deep.set_weights([np.arange(6).reshape(3, 2)])
    assert weights_digest(flat) != weights_digest(deep)


def test_random_weights_depend_on_the_seed_only():
    base = get_base("MobileNetV3Small")
    digests = [weights_digest(build_base(base, "none", 32, s)) for s in (0, 1, 0)]
    assert digests[0] == digests[2] != digests[1]
    assert weights_digest(build_base(base, "none", 48, 0)) == digests[0]


# From images to what is served


LEAST = {
    **PATCHES,
    "alexnet": 64,
    "alexnet_fc7": 224,
    "InceptionResNetV2": 75,
    "InceptionV3": 75,
    "Xception": 71,
}
"""Side in pixels of the smallest images, where it is not 32."""


@pytest.fixture(scope="session")
def few_photos(photos, tmp_path_factory) -> Path:
    """A folder of two classes of 8 photos each: two batches are enough here."""
    folder = tmp_path_factory.mktemp("few")
    for name in CLASSES[:2]:
        (folder / name).mkdir()
        for photo in sorted((photos / name).iterdir())[:8]:
            shutil.copy(photo, folder / name)
    return folder


def succeed(kt, *arguments) -> str:
    result = kt(*arguments)
    gc.collect()  # the graphs of an export: gigabytes, in reference cycles
    assert result.exit_code == 0, result.output
    return result.stdout


def fit_options(base) -> tuple:
    size = LEAST.get(base.name, 32)
    return ("--base", base.name, "--weights", "none", "--image-size", size)


@pytest.mark.parametrize(
    "base",
    [
        # Two consist of the same layers as another.
        pytest.param(
            base,
            marks=pytest.mark.slow
            if base.name in ("InceptionResNetV2", "VGG19")
            else pytest.mark.families,
            id=base.name,
        )
        for base in SMALLEST
    ],
)
def test_a_base_of_every_family_is_trained_and_exported(kt, few_photos, base):
    keras.utils.clear_session()
    succeed(kt, "fit", few_photos, "--name", "run", *fit_options(base))
    assert succeed(kt, "export", "saved_models/run").strip() == "saved_models/run/1"
    form = FORMATS[SMALLEST.index(base) % len(FORMATS)]  # each by some family
    if base.name in PATCHES:
        form = "onnx"  # whose operations do not include GELU's
    elif base.parameters > 6_000_000:  # a format takes up to 80 times the weights
        return
    exported = succeed(kt, "export", "saved_models/run", "--format", form)
    assert exported.startswith(f"saved_models/run/exported/{form}:")


def export_every_format(kt, run: Path, base) -> None:
    """Exports a run in each format that can express its base."""
    # Its depthwise convolutions of 7 x 7 become calls of XLA, which these do not know.
    cannot = ("onnx", "openvino") if base.name.startswith("ConvNeXt") else ()
    if base.name in PATCHES:  # LiteRT cannot prepare their attention
        cannot = ("litert",)
    for form in FORMATS:
        result = kt("export", run, "--format", form)
        if form in cannot:
            assert result.exit_code == 1
            (line,) = result.stderr.strip().splitlines()
            assert f"Format {form} cannot express this model" in line
        else:
            assert result.exit_code == 0, result.output
    exported = {path.name for path in (run / "exported").iterdir()}
    assert exported == set(FORMATS) - set(cannot)


@pytest.mark.slow
@EVERY_BASE
def test_every_base_is_fine_tuned_and_exported_in_every_format(kt, few_photos, base):
    keras.utils.clear_session()
    succeed(kt, "fit", few_photos, "--name", "run", "--export", *fit_options(base))
    run = Path("saved_models/run")
    assert (run / "1" / "saved_model.pb").is_file()
    export_every_format(kt, run, base)
    finetune = ("unfreeze-and-finetune", run, "--force", "--epochs", 1)
    succeed(kt, *finetune)
    assert succeed(kt, "export", run).strip() == "saved_models/run/2"
    export_every_format(kt, run, base)
