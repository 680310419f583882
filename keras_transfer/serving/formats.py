"""A run's model in the formats of other runtimes, each verified on real images.

Each file takes float32 `[N, image_size, image_size, 3]` RGB pixels in [0, 255] and
returns float32 `[N, C]` probabilities; input scaling is included. Decoding is left to
the caller, and should be as close as possible to `decode.decode_image`.
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
from keras_transfer.errors import KerasTransferError, first_line
from keras_transfer.evaluation.of_run import run_splits
from keras_transfer.models.flip import flip_averaged
from keras_transfer.runs.run import Run
from keras_transfer.runtime.openvino import import_openvino
from keras_transfer.serving.sample import Sample, flip_averaged_sample
from keras_transfer.serving.signatures import flip_averaged_network, frozen_network

EXPORTED = "exported"
"""Folder in a run that contains a folder for each exported format."""

TOLERANCE = 1e-4
"""Maximum absolute difference of a probability from the model's, without quantization.
It is not 0, because runtimes round differently."""

_CALIBRATION_IMAGES = 100
_OPSET = 18  # of ONNX

Predict = Callable[[np.ndarray], np.ndarray]
"""Takes float32 `[N, image_size, image_size, 3]` pixels; returns probabilities."""


@dataclass(frozen=True)
class Job:
    """An export to write.

    Attributes:
        model: Keras model from [0, 255] RGB pixels to probabilities.
        sample: Images with the model's outputs.
        quantize: Kind of quantization; None for none.
        calibration: Yields training images to calibrate quantization with.
        flip_tta: Whether the exported model averages probabilities over each image and
            its mirror image.
    """

    model: keras.Model
    sample: Sample
    quantize: Quantization | None
    calibration: Callable[[], Iterator[list[np.ndarray]]]
    flip_tta: bool = False

    def expected(self) -> np.ndarray:
        """Computes what the exported model has to say of the sample, `[n, C]`."""
        sample = self.sample
        if self.flip_tta:
            sample = flip_averaged_sample(sample, self.model)
        return sample.expected["probabilities"]


@dataclass(frozen=True)
class Runtime:
    """A format's file name, required modules, writer and loader.

    Attributes:
        file: Name of the model's file.
        modules: Modules that must be installed.
        write: Writes a job's model to a path.
        load: Loads the model at a path in the format's own runtime.
    """

    file: str
    modules: Sequence[str]
    write: Callable[[Job, Path], None]
    load: Callable[[Path], Predict]


def check_installed(form: Format) -> None:
    """Checks that the packages of a format are installed.

    Raises:
        KerasTransferError: If one is missing; the message says what to install.
    """
    for module in RUNTIMES[form].modules:
        if importlib.util.find_spec(module) is None:
            raise KerasTransferError(
                f"Format {form} needs packages that are not installed. Received: no "
                f"{module}. Install them: pip install 'keras-transfer[{form}]'."
            )


def write_format(form: Format, job: Job, folder: Path) -> Predict:
    """Writes a model's file to a folder and loads it in the format's own runtime.

    Returns:
        A function that runs the loaded model.
    """
    runtime = RUNTIMES[form]
    path = folder / runtime.file
    runtime.write(job, path)
    return runtime.load(path)


def check_agreement(form: Format, predict: Predict, job: Job) -> float:
    """Compares an exported model with the original.

    Returns:
        The largest absolute difference of their probabilities on the sample.

    Raises:
        KerasTransferError: If a probability is not finite, or the difference exceeds
            `TOLERANCE` without quantization.
    """
    actual = predict(job.sample.pixels.astype(np.float32))
    difference = float(np.abs(actual - job.expected()).max())
    if not np.isfinite(actual).all() or (not job.quantize and difference > TOLERANCE):
        raise KerasTransferError(
            f"The {form} model does not agree with the model: probabilities differ by "
            f"{difference:.2g}, at most {TOLERANCE} is allowed. Nothing was exported."
        )
    return difference


@contextlib.contextmanager
def explaining_refusals(form: Format) -> Iterator[None]:
    """Converts any exception of a converter or runtime to a `KerasTransferError`."""
    try:
        yield
    except (KerasTransferError, OSError):
        raise
    except Exception as error:
        raise KerasTransferError(
            f"Format {form} cannot express this model: {first_line(error)}. Nothing "
            "was exported."
        ) from error


def calibration_images(run: Run, model: keras.Model) -> Iterator[list[np.ndarray]]:
    """Yields up to 100 training images in the form that the LiteRT converter expects.

    Each is a list with one float32 `[1, image_size, image_size, 3]` array.
    """
    sample = sample_images(run_splits(run), model.input_shape[1], _CALIBRATION_IMAGES)
    for _, _, pixels in sample:
        yield [pixels[None].astype(np.float32)]


def _constant_function(job: Job) -> Any:
    """Converts the model to a `tf.function` with constant weights."""
    network, _ = frozen_network(job.model, job.sample.pixels, job.sample.expected)
    if job.flip_tta:
        network = flip_averaged_network(network)
    return tf.function(
        lambda pixels: {"probabilities": network(pixels)["probabilities"]},
        [tf.TensorSpec((None, *job.model.input_shape[1:]), tf.float32, "pixels")],
        autograph=False,
    )


def _write_keras(job: Job, path: Path) -> None:
    (flip_averaged(job.model) if job.flip_tta else job.model).save(path)


def _load_keras(path: Path) -> Predict:
    model = keras.saving.load_model(path, compile=False)
    return lambda pixels: keras.ops.convert_to_numpy(model(pixels, training=False))


def _write_openvino(job: Job, path: Path) -> None:
    openvino = import_openvino()
    converted = openvino.convert_model(_constant_function(job).get_concrete_function())
    openvino.save_model(converted, path, compress_to_fp16=False)


def _load_openvino(path: Path) -> Predict:
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = import_openvino().Core().compile_model(path, "CPU", options)
    return lambda pixels: compiled(pixels)[0]


def _write_onnx(job: Job, path: Path) -> None:
    import tf2onnx

    function = _constant_function(job)
    tf2onnx.convert.from_function(
        function,
        function.input_signature,
        opset=_OPSET,
        custom_op_handlers={"Erfc": (_replace_erfc, [])},
        output_path=str(path),
    )


def _replace_erfc(graph: Any, node: Any, *_: Any) -> None:
    """Replaces an Erfc node, which ONNX does not have, by 1 - Erf: exact GELU."""
    (x,), (output,) = node.input, node.output
    shape, dtype = graph.get_shape(output), graph.get_dtype(output)
    graph.remove_node(node.name)
    one = graph.make_const(f"{node.name}_one", np.ones((), np.float32))
    erf = graph.make_node("Erf", [x], shapes=[shape], dtypes=[dtype])
    graph.make_node(
        "Sub",
        [one.output[0], erf.output[0]],
        outputs=[output],
        shapes=[shape],
        dtypes=[dtype],
    )


def _load_onnx(path: Path) -> Predict:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (pixels_name,) = [tensor.name for tensor in session.get_inputs()]
    return lambda pixels: session.run(None, {pixels_name: pixels})[0]


def _write_litert(job: Job, path: Path) -> None:
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [_constant_function(job).get_concrete_function()], tf.Module()
    )
    if job.quantize:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if job.quantize == "int8":
        converter.representative_dataset = job.calibration
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    with warnings.catch_warnings():
        # The converter asks for statistics of inputs even though they stay float32.
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


RUNTIMES: dict[Format, Runtime] = {
    "keras": Runtime("model.keras", (), _write_keras, _load_keras),
    "openvino": Runtime("model.xml", ("openvino",), _write_openvino, _load_openvino),
    "onnx": Runtime("model.onnx", ("tf2onnx", "onnxruntime"), _write_onnx, _load_onnx),
    "litert": Runtime("model.tflite", ("ai_edge_litert",), _write_litert, _load_litert),
}
"""The formats."""
