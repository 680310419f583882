"""Loads and runs a SavedModel with TensorFlow's C API, as TensorFlow Serving does.

The C++ loader and session are the ones TensorFlow Serving uses. TensorFlow's Python
package is not imported, so it cannot mask an incomplete bundle, and startup takes a
fraction of the time.
"""

import ctypes
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keras_transfer.errors import KerasTransferError, UsageError

ABOUT = Path("assets.extra") / "keras_transfer.json"
"""File in a version directory that describes it, including its signatures' tensors."""

Arrays = dict[str, np.ndarray]
"""Arrays by name; a string tensor is an object array of `bytes`."""

_STRING = 7  # TF_STRING
_DTYPES = {
    1: np.float32,
    2: np.float64,
    3: np.int32,
    4: np.uint8,
    9: np.int64,
    10: np.bool_,
    _STRING: np.object_,
}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_STRING_BYTES = 24  # sizeof(TF_TString)


class _Output(ctypes.Structure):
    """TF_Output: an operation and the index of one of its outputs."""

    _fields_ = [("operation", c_void_p), ("index", c_int)]


_FUNCTIONS = {
    "TF_NewStatus": (c_void_p, ()),
    "TF_DeleteStatus": (None, (c_void_p,)),
    "TF_GetCode": (c_int, (c_void_p,)),
    "TF_Message": (c_char_p, (c_void_p,)),
    "TF_NewGraph": (c_void_p, ()),
    "TF_DeleteGraph": (None, (c_void_p,)),
    "TF_NewSessionOptions": (c_void_p, ()),
    "TF_DeleteSessionOptions": (None, (c_void_p,)),
    "TF_LoadSessionFromSavedModel": (
        c_void_p,
        (
            c_void_p,  # session options
            c_void_p,  # run options
            c_char_p,  # directory
            POINTER(c_char_p),  # tags
            c_int,
            c_void_p,  # graph
            c_void_p,  # meta graph
            c_void_p,  # status
        ),
    ),
    "TF_DeleteSession": (None, (c_void_p, c_void_p)),
    "TF_SessionRun": (
        None,
        (
            c_void_p,
            c_void_p,  # run options
            POINTER(_Output),
            POINTER(c_void_p),
            c_int,
            POINTER(_Output),
            POINTER(c_void_p),
            c_int,
            c_void_p,  # targets
            c_int,
            c_void_p,  # run metadata
            c_void_p,  # status
        ),
    ),
    "TF_GraphOperationByName": (c_void_p, (c_void_p, c_char_p)),
    "TF_AllocateTensor": (c_void_p, (c_int, POINTER(c_int64), c_int, c_size_t)),
    "TF_DeleteTensor": (None, (c_void_p,)),
    "TF_TensorType": (c_int, (c_void_p,)),
    "TF_NumDims": (c_int, (c_void_p,)),
    "TF_Dim": (c_int64, (c_void_p, c_int)),
    "TF_TensorData": (c_void_p, (c_void_p,)),
    "TF_StringInit": (None, (c_void_p,)),
    "TF_StringCopy": (None, (c_void_p, c_char_p, c_size_t)),
    "TF_StringGetDataPointer": (c_void_p, (c_void_p,)),
    "TF_StringGetSize": (c_size_t, (c_void_p,)),
}


@dataclass(frozen=True)
class Request:
    """A request to a signature.

    Attributes:
        signature: Name of the signature, such as `serving_default`.
        inputs: Arrays by input name.
    """

    signature: str
    inputs: Arrays


class Session:
    """A loaded SavedModel from `kt export`; close it, or use it in a `with` statement.

    Attributes:
        about: Content of `assets.extra/keras_transfer.json`.
    """

    def __init__(self, saved_model: Path):
        """Loads a SavedModel.

        Args:
            saved_model: A version directory made by `kt export`.

        Raises:
            UsageError: If the directory was not made by `kt export`.
            KerasTransferError: If TensorFlow cannot load it.
        """
        self.about = read_about(saved_model)
        self._tf = tf = _library()
        self._status = tf.TF_NewStatus()
        self._graph = tf.TF_NewGraph()
        options = tf.TF_NewSessionOptions()
        self._session = tf.TF_LoadSessionFromSavedModel(
            options,
            None,
            os.fsencode(saved_model),
            (c_char_p * 1)(b"serve"),
            1,
            self._graph,
            None,
            self._status,
        )
        tf.TF_DeleteSessionOptions(options)
        self._check()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the graph and its weights. Call it only once."""
        if self._session:
            self._tf.TF_DeleteSession(self._session, self._status)
        self._tf.TF_DeleteGraph(self._graph)
        self._tf.TF_DeleteStatus(self._status)

    def run(self, request: Request) -> Arrays:
        """Runs a signature.

        Returns:
            Arrays by output name.

        Raises:
            UsageError: If the signature does not exist.
            KerasTransferError: If TensorFlow reports an error, with its message.
        """
        tf, signatures = self._tf, self.about["signatures"]
        if request.signature not in signatures:
            raise UsageError(
                f"A bundle has the signatures {', '.join(signatures)}. Received: "
                f"{request.signature!r}."
            )
        signature = signatures[request.signature]
        names = [signature["inputs"][name] for name in request.inputs]
        outputs = signature["outputs"]
        fed, fetched = len(names), len(outputs)
        values = (c_void_p * fed)()
        found = (c_void_p * fetched)()
        try:
            for index, array in enumerate(request.inputs.values()):
                values[index] = _to_tensor(tf, array)
            tf.TF_SessionRun(
                self._session,
                None,
                (_Output * fed)(*map(self._output, names)),
                values,
                fed,
                (_Output * fetched)(*map(self._output, outputs.values())),
                found,
                fetched,
                None,
                0,
                None,
                self._status,
            )
            self._check()
            return {
                name: _to_array(tf, tensor)
                for name, tensor in zip(outputs, found, strict=True)
            }
        finally:
            for tensor in (*values, *found):
                if tensor:
                    tf.TF_DeleteTensor(tensor)

    def _output(self, tensor_name: str) -> _Output:
        name, _, index = tensor_name.partition(":")
        operation = self._tf.TF_GraphOperationByName(self._graph, name.encode())
        if not operation:
            raise KerasTransferError(f"The graph has no operation {name!r}.")
        return _Output(operation, int(index))

    def _check(self) -> None:
        if self._tf.TF_GetCode(self._status):
            message = self._tf.TF_Message(self._status).decode(errors="replace")
            raise KerasTransferError(message.strip())


def read_about(saved_model: Path) -> dict[str, Any]:
    """Reads the description of a version directory made by `kt export`.

    Raises:
        UsageError: If the directory was not made by `kt export`.
    """
    try:
        about: dict[str, Any] = json.loads(
            (saved_model / ABOUT).read_text(encoding="utf-8")
        )
        return about
    except (OSError, ValueError) as error:
        raise UsageError(
            f"This is no version directory of kt export. Received: {saved_model} "
            f"({type(error).__name__} at {ABOUT}). Name one such as "
            "saved_models/RUN/1."
        ) from None


def answer_elsewhere(
    saved_model: Path, requests: Sequence[Request]
) -> list[Arrays | str]:
    """Runs requests in a separate process, where an abort does no harm.

    Args:
        saved_model: A version directory made by `kt export`.
        requests: The requests to run, in order.

    Returns:
        For each request, the outputs by name, or TensorFlow's error message.

    Raises:
        KerasTransferError: If the SavedModel cannot be loaded, or the process dies.
    """
    # -P keeps the working directory off sys.path. If the package is not installed,
    # the appended path makes it importable.
    package = str(Path(__file__).parents[2])
    code = (
        f"import sys; sys.path.append({package!r})\n"
        f"from {__name__} import answer; answer()"
    )
    process = subprocess.run(
        [sys.executable, "-P", "-c", code],
        input=pickle.dumps((saved_model, requests)),
        capture_output=True,
        # Verification does not need a GPU and must not reserve its memory.
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
    )
    if process.returncode:
        said = process.stderr.decode(errors="replace").strip().splitlines()
        raise KerasTransferError(
            f"{saved_model} cannot be served: exit status {process.returncode}, "
            f"{said[-1] if said else 'and nothing was said'}"
        )
    answers: list[Arrays | str] = pickle.loads(process.stdout)
    return answers


def answer() -> None:
    """Runs the requests that `answer_elsewhere` sends to standard input."""
    answers_file = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # stray prints must not mix with the pickled answers
    saved_model, requests = pickle.load(sys.stdin.buffer)
    answers: list[Arrays | str] = []
    try:
        with Session(saved_model) as session:
            for request in requests:
                try:
                    answers.append(session.run(request))
                except KerasTransferError as error:
                    answers.append(str(error))
    except KerasTransferError as error:
        sys.exit(str(error))
    with answers_file:
        pickle.dump(answers, answers_file)


def _library() -> ctypes.CDLL:
    """Loads TensorFlow's shared library without importing the Python package."""
    spec = importlib.util.find_spec("tensorflow")
    if spec is None or spec.origin is None:
        raise KerasTransferError("TensorFlow is not installed.")
    folder = Path(spec.origin).parent
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read when the library loads
    is_mac = sys.platform == "darwin"
    path = folder / f"libtensorflow_cc.{'2.dylib' if is_mac else 'so.2'}"
    try:
        # RTLD_LOCAL keeps the OpenSSL that is linked into the library from replacing
        # the one that Python's ssl and hashlib use.
        library = ctypes.CDLL(str(path), ctypes.RTLD_LOCAL)
    except OSError as error:
        raise KerasTransferError(
            f"TensorFlow's C library cannot be loaded from {folder}: {error}."
        ) from None
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _to_tensor(tf: ctypes.CDLL, array: np.ndarray) -> int:
    array = np.asarray(array)
    if array.dtype not in _CODES:
        raise KerasTransferError(f"Tensors of {array.dtype} cannot be sent.")
    is_string = array.dtype == np.object_
    shape = (c_int64 * array.ndim)(*array.shape)
    size = array.size * _STRING_BYTES if is_string else array.nbytes
    tensor = tf.TF_AllocateTensor(_CODES[array.dtype], shape, array.ndim, size)
    data = tf.TF_TensorData(tensor)
    if is_string:
        for index, value in enumerate(array.flat):
            place = data + index * _STRING_BYTES
            tf.TF_StringInit(place)
            tf.TF_StringCopy(place, value, len(value))
    elif size:
        ctypes.memmove(data, array.tobytes(), size)
    return tensor


def _to_array(tf: ctypes.CDLL, tensor: int) -> np.ndarray:
    shape = [tf.TF_Dim(tensor, axis) for axis in range(tf.TF_NumDims(tensor))]
    array: np.ndarray = np.empty(shape, _DTYPES[tf.TF_TensorType(tensor)])
    data = tf.TF_TensorData(tensor)
    if array.dtype == np.object_:
        for index in range(array.size):
            place = data + index * _STRING_BYTES
            start, size = tf.TF_StringGetDataPointer(place), tf.TF_StringGetSize(place)
            array.flat[index] = ctypes.string_at(start, size)
    elif array.nbytes:
        ctypes.memmove(array.ctypes.data, data, array.nbytes)
    return array
