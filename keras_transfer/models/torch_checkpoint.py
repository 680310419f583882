"""Reads the tensors of a torch checkpoint without torch and without running its code.

A checkpoint is a pickle, and a pickle is a program. This reader allows the program to
refer only to the few types that a state dict consists of and refuses everything else.
Both formats are supported: the zip archive (torch >= 1.6) and the older sequence of
pickles.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from keras_transfer.errors import WeightsError

# The largest networks have a few thousand tensors, each taking 150 bytes of the pickle.
_MOST_MEMOS, _MOST_PICKLE = 2**20, 2**22
# Limit on the total size of all tensors over that of the file. Tied weights share their
# data between two or three tensors.
_MOST_SHARING = 8
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}


def read_torch_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """Reads the named tensors of a checkpoint file.

    If the checkpoint has a top-level `state_dict` key, as training scripts often write
    it, its value is read.

    Returns:
        Arrays in their stored dtype by name, such as `features.0.weight`.

    Raises:
        WeightsError: If the file cannot be read, is damaged, contains no named tensors,
            or its pickle refers to anything that tensors do not need.
    """
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                checkpoint = _read_zip(file)
            else:
                file.seek(0)
                checkpoint = _read_legacy(io.BytesIO(file.read()))
        if isinstance(checkpoint, Mapping) and "state_dict" in checkpoint:
            checkpoint = checkpoint["state_dict"]
        if not isinstance(checkpoint, Mapping):
            raise WeightsError("It holds no named tensors.")
        views = {
            name: value.view()
            for name, value in checkpoint.items()
            if isinstance(value, _Tensor)
        }
        if sum(v.nbytes for v in views.values()) > _MOST_SHARING * path.stat().st_size:
            raise WeightsError("Too many tensors of the checkpoint share their data.")
        return {name: view.copy() for name, view in views.items()}
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}.") from None
    except Exception as error:  # a damaged pickle or archive can cause any exception
        raise WeightsError(
            f"{path} is no torch checkpoint, or a damaged one "
            f"({type(error).__name__}: {error})."
        ) from None


class _StorageType(NamedTuple):
    dtype: str


class _Storage:
    """A flat buffer, which is filled after the pickle has been read."""

    def __init__(self, dtype: str, size: int):
        self.dtype = np.dtype(dtype)
        self.size = size
        self.data = b""

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self) -> np.ndarray:
        """Returns the tensor as an array that shares the storage's data."""
        flat = np.frombuffer(self.storage.data, self.storage.dtype)
        if not all(n > 0 for n in self.shape):
            return np.zeros(self.shape, flat.dtype)
        last = self.offset + sum(
            (n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)
        )
        inside = min(self.offset, *self.strides, 0) >= 0 and last < flat.size
        if not inside or math.prod(self.shape) > flat.size:
            raise WeightsError("A tensor of the checkpoint reaches outside its data.")
        return np.lib.stride_tricks.as_strided(
            flat[self.offset :],
            self.shape,
            [stride * flat.itemsize for stride in self.strides],
        )


def _rebuild_tensor(
    storage: _Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    *_: Any,
) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise WeightsError("A tensor of the checkpoint has no storage.")
    return _Tensor(storage, int(offset), tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    return tensor


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
} | {("torch", name): _StorageType(dtype) for name, dtype in _DTYPES.items()}


def _load(file: io.BytesIO, storages: dict[str, _Storage]) -> Any:
    """Unpickles an object after checking that it cannot allocate excessive memory."""
    start = file.tell()
    for opcode, argument, at in pickletools.genops(file):  # fails if truncated
        if (at or 0) - start > _MOST_PICKLE:
            raise WeightsError("The checkpoint's pickle is too long for tensors.")
        if "PUT" in opcode.name and int(argument or 0) > _MOST_MEMOS:
            raise WeightsError("The checkpoint's pickle refers too far.")
    file.seek(start)
    return _Unpickler(file, storages).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, storages: dict[str, _Storage]):
        super().__init__(file, encoding="latin1")
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise WeightsError(
                f"The checkpoint asks for {module}.{name}, which tensors do not need. "
                "Save a state_dict, not a whole model."
            ) from None

    def persistent_load(self, reference: Any) -> _Storage:
        kind, storage_type, key, _, size, *view = reference
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise WeightsError("The checkpoint refers to something other than tensors.")
        if any(part is not None for part in view):
            raise WeightsError("The checkpoint's tensors are views of views.")
        if key not in self._storages:
            self._storages[key] = _Storage(storage_type.dtype, size)
        return self._storages[key]


def _read_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = _plain_members(archive, file.seek(0, io.SEEK_END))
        root = next(n for n in members if n.endswith("data.pkl"))[: -len("data.pkl")]
        byte_order = f"{root}byteorder"
        if byte_order in members and archive.read(byte_order) != b"little":
            raise WeightsError("The checkpoint is big-endian.")
        storages: dict[str, _Storage] = {}
        pickled = io.BytesIO(archive.read(f"{root}data.pkl"))
        checkpoint = _load(pickled, storages)
        for key, storage in storages.items():
            member = members[f"{root}data/{key}"]
            if member.file_size != storage.nbytes:
                raise WeightsError("A tensor's data are of another size than it says.")
            storage.data = archive.read(member)
    return checkpoint


def _plain_members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Lists an archive's members, after checking that they fit into its size.

    torch stores tensors uncompressed. Members that are compressed, overlapping or have
    the same name could add up to any size.

    Args:
        archive: The archive.
        size: Size of the archive's file in bytes.

    Raises:
        WeightsError: If a member is compressed, a name is repeated, or the members
            together are larger than the file.
    """
    members = {member.filename: member for member in archive.infolist()}
    if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
        raise WeightsError("The checkpoint is compressed. Save it with torch.save.")
    if len(members) < len(archive.infolist()):
        raise WeightsError("The checkpoint holds two parts of one name.")
    if sum(member.file_size for member in members.values()) > size:
        raise WeightsError("The checkpoint's parts are larger than the file.")
    return members


def _read_legacy(file: io.BytesIO) -> Any:
    """Reads the legacy format.

    It consists of the magic number, the protocol, system information, the object and
    the storage keys, each pickled, followed by the raw storages.
    """
    storages: dict[str, _Storage] = {}
    if _load(file, {}) != _LEGACY_MAGIC:
        raise WeightsError(
            "The file is no torch checkpoint: its first number is wrong."
        )
    _load(file, {})
    if not _load(file, {}).get("little_endian"):
        raise WeightsError("The checkpoint is big-endian.")
    checkpoint = _load(file, storages)
    for key in _load(file, {}):
        storage = storages[key]
        size = int.from_bytes(file.read(8), "little")
        if size != storage.size:
            raise WeightsError("The checkpoint is cut off.")
        storage.data = file.read(storage.nbytes)
        if len(storage.data) < storage.nbytes:
            raise WeightsError("The checkpoint is cut off.")
    return checkpoint
