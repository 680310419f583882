"""A run's model in the formats of other runtimes, each verified on real images.

Each file is a function of float32 `[N, image_size, image_size, 3]` RGB pixels in
[0, 255] to float32 `[N, C]` probabilities; input scaling is inside. Decoding is left
to the caller: as near as it comes to `decode.decode_image` it gives what the model
gives.
"""

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_transfer.config import Format, Quantization
from keras_transfer.data.samples import sample_images
from keras_transfer.errors import KerasTransferError
from keras_transfer.evaluation.of_run import run_splits
from keras_transfer.runs.run import Run
from keras_transfer.runtime.openvino import import_openvino

EXPORTED = "exported"
"""The folder of a run with a folder for each of these formats."""

TOLERANCE = 1e-4
"""How far a probability may be from the model's: runtimes round differently."""

_CALIBRATION_IMAGES = 100
_OPSET = 18  # of ONNX

Predict = Callable[[np.ndarray], np.ndarray]
"""From float32 pixels to probabilities."""


@dataclass(frozen=True)
class Job:
    """What is to be written.

    Attributes:
        model: The model.
        make_function: Makes the same a `tf.function`, its weights constants.
        quantize: How its weights are to be kept.
        calibration: Gives training images, to quantize by.
    """

    model: keras.Model
    make_function: Callable[[], Any]
    quantize: Quantization | None
    calibration: Callable[[], Iterator[list[np.ndarray]]]


@dataclass(frozen=True)
class _Runtime:
    """A format: its file, the modules it needs, how it is written and run."""

    file: str
    modules: Sequence[str]
    write: Callable[[Job, Path], None]
    load: Callable[[Path], Predict]


def check_installed(form: Format, runtime: _Runtime) -> None:
    """Refuses a format whose packages are missing.

    Raises:
        KerasTransferError: With what to install.
    """
    for module in runtime.modules:
        if importlib.util.find_spec(module) is None:
            raise KerasTransferError(
                f"--format {form} needs packages that are not installed. Received: no "
                f"{module}. Install them: pip install 'keras-transfer[{form}]'."
            )


@contextlib.contextmanager
def explaining_refusals(form: Format) -> Iterator[None]:
    """Says what a converter or a runtime refuses; each raises its own types."""
    try:
        yield
    except (KerasTransferError, OSError):
        raise
    except Exception as error:
        cause = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
        raise KerasTransferError(
            f"--format {form} cannot express this model: {cause}. Nothing was exported."
        ) from error


def calibration_images(run: Run, model: keras.Model) -> Iterator[list[np.ndarray]]:
    """Some training images, as the LiteRT converter wants them."""
    sample = sample_images(run_splits(run), model.input_shape[1], _CALIBRATION_IMAGES)
    for _, _, pixels in sample:
        yield [pixels[None].astype(np.float32)]


def _write_keras(job: Job, path: Path) -> None:
    job.model.save(path)


def _load_keras(path: Path) -> Predict:
    model = keras.saving.load_model(path, compile=False)
    return lambda pixels: keras.ops.convert_to_numpy(model(pixels, training=False))


def _write_openvino(job: Job, path: Path) -> None:
    openvino = import_openvino()
    converted = openvino.convert_model(job.make_function().get_concrete_function())
    openvino.save_model(converted, path, compress_to_fp16=False)


def _load_openvino(path: Path) -> Predict:
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = import_openvino().Core().compile_model(path, "CPU", options)
    return lambda pixels: compiled(pixels)[0]


def _write_onnx(job: Job, path: Path) -> None:
    import tf2onnx

    function = job.make_function()
    tf2onnx.convert.from_function(
        function, function.input_signature, opset=_OPSET, output_path=str(path)
    )


def _load_onnx(path: Path) -> Predict:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (pixels_name,) = [tensor.name for tensor in session.get_inputs()]
    return lambda pixels: session.run(None, {pixels_name: pixels})[0]


def _write_litert(job: Job, path: Path) -> None:
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [job.make_function().get_concrete_function()], tf.Module()
    )
    if job.quantize:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if job.quantize == "int8":
        converter.representative_dataset = job.calibration
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    with warnings.catch_warnings():
        # Statistics of quantized inputs are asked for even where inputs stay float32.
        warnings.filterwarnings("ignore", message="Statistics for quantized inputs")
        path.write_bytes(converter.convert())


def _load_litert(path: Path) -> Predict:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    (given,), (result,) = (
        interpreter.get_input_details(),
        interpreter.get_output_details(),
    )

    def predict(pixels: np.ndarray) -> np.ndarray:
        rows = []
        for image in pixels:
            interpreter.set_tensor(given["index"], image[None].astype(np.float32))
            interpreter.invoke()
            rows.append(interpreter.get_tensor(result["index"])[0])
        return np.stack(rows)

    return predict


RUNTIMES: dict[Format, _Runtime] = {
    "keras": _Runtime("model.keras", (), _write_keras, _load_keras),
    "openvino": _Runtime("model.xml", ("openvino",), _write_openvino, _load_openvino),
    "onnx": _Runtime("model.onnx", ("tf2onnx", "onnxruntime"), _write_onnx, _load_onnx),
    "litert": _Runtime(
        "model.tflite", ("ai_edge_litert",), _write_litert, _load_litert
    ),
}
