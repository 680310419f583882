"""A run's model in the formats of other runtimes, each verified on real images.

Each file is a function of float32 `[N, image_size, image_size, 3]` RGB pixels in
[0, 255] to float32 `[N, C]` probabilities; input scaling is inside. Decoding is left
to the caller: as near as it comes to `decode.decode_image` it gives what the model
gives.
"""

import contextlib
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_transfer.bundle import frozen_network
from keras_transfer.config import Format, Quantization, check_quantization
from keras_transfer.decode import make_decoder
from keras_transfer.errors import KerasTransferError, explaining_full_disk
from keras_transfer.evaluation import evaluate
from keras_transfer.extract import import_openvino
from keras_transfer.prediction import (
    evaluate_run,
    held_out_images,
    run_splits,
    sample_images,
)
from keras_transfer.run import (
    LABELS,
    OnNote,
    Run,
    now,
    open_run,
    updating,
    versions,
    write_atomic,
)
from keras_transfer.savedmodel import check_accuracy, load_trained, sample_of_run

EXPORTED = "exported"
"""The folder of a run with a folder for each of these formats."""

TOLERANCE = 1e-4
"""How far a probability may be from the model's: runtimes round differently."""

_CALIBRATION_IMAGES = 100
_OPSET = 18  # of ONNX

Predict = Callable[[np.ndarray], np.ndarray]
"""From float32 pixels to probabilities."""


@dataclass(frozen=True)
class Exported:
    """What `kt export --format` made.

    Attributes:
        path: The folder, with the model's file and `labels.txt`.
        max_difference: Of its probabilities from the model's, on real images.
        accuracy: With quantization: (of the model, of the quantized one), where there
            are images to measure it on.
        images: How many images `accuracy` is of.
    """

    path: Path
    max_difference: float
    accuracy: tuple[float, float] | None = None
    images: int = 0

    def __str__(self) -> str:
        text = f"{self.path}: probabilities within {self.max_difference:.1g}"
        if self.accuracy:
            before, after = self.accuracy
            text += f", accuracy on {self.images:,} images {before:.4f} -> {after:.4f}"
        return text


@dataclass(frozen=True)
class _Job:
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
    write: Callable[[_Job, Path], None]
    load: Callable[[Path], Predict]


def export_format(
    run: str | Path | Run,
    form: Format,
    *,
    quantize: Quantization | None = None,
    min_accuracy: float | None = None,
    on_note: OnNote = lambda _: None,
) -> Exported:
    """Writes a run's model in another format, if it says what the model says.

    Args:
        run: A run or its directory.
        form: The format.
        quantize: Of `litert`: `dynamic` keeps weights in 8 bits, `int8` computes in 8
            bits too, in ranges measured on training images.
        min_accuracy: Refuses a model whose accuracy on the test images is lower, and
            a quantized one.
        on_note: Told what the user should know.

    Returns:
        What was written to `exported/FORMAT/` in the run.

    Raises:
        UsageError: If there is no such run, or the format cannot be quantized.
        KerasTransferError: If the format's packages are not installed, it cannot
            express the model, the result does not agree with the model or is worse
            than `min_accuracy`, or another process changed the run meanwhile. What was
            there before stays.
    """
    run = open_run(run)
    check_quantization(form, quantize)
    runtime = _RUNTIMES[form]
    _check_installed(form, runtime)
    trained = load_trained(run, min_accuracy)
    model, manifest = trained.model, trained.manifest
    sample = sample_of_run(run, model, on_note)
    expected = sample.expected["probabilities"]

    def make_function() -> Any:
        network, _ = frozen_network(model, sample.pixels, sample.expected)
        return tf.function(
            lambda pixels: {"probabilities": network(pixels)["probabilities"]},
            [tf.TensorSpec((None, *model.input_shape[1:]), tf.float32, "pixels")],
            autograph=False,
        )

    job = _Job(model, make_function, quantize, lambda: _calibration(run, model))
    place = Path(EXPORTED, form)
    with updating(run.run_dir, trained.identity, removed=[str(place)]) as staging:
        folder = staging / place
        folder.mkdir(parents=True)
        path = folder / runtime.file
        size = 5 * model.count_params()  # of float32, with what describes them
        with _one_line(form), explaining_full_disk(run.run_dir, size):
            runtime.write(job, path)
            predict = runtime.load(path)
            actual = predict(sample.pixels.astype(np.float32))
        difference = float(np.abs(actual - expected).max())
        if not np.isfinite(actual).all() or (not quantize and difference > TOLERANCE):
            raise KerasTransferError(
                f"The {form} model does not agree with the model: probabilities "
                f"differ by {difference:.2g}, at most {TOLERANCE} is allowed. "
                "Nothing was exported."
            )
        accuracy, images = None, 0
        if quantize:
            try:
                accuracy, images = _accuracies(run, predict)
            except KerasTransferError as error:
                if min_accuracy is not None:
                    raise
                on_note(f"What that does to the accuracy was not measured: {error}")
        if accuracy and min_accuracy is not None:
            check_accuracy(accuracy[1], images, min_accuracy)
        write_atomic(folder / LABELS, "".join(f"{x}\n" for x in trained.class_names))
        about = {
            "created": now(),
            "base": manifest.base,
            "phase": manifest.phase,
            "image_size": manifest.image_size,
            "quantize": quantize,
            "max_difference": difference,
            "accuracy": accuracy,
            "versions": versions(),
        }
        write_atomic(folder / "keras_transfer.json", json.dumps(about, indent=1))
    return Exported(run.run_dir / place, difference, accuracy, images)


def _check_installed(form: Format, runtime: _Runtime) -> None:
    for module in runtime.modules:
        if importlib.util.find_spec(module) is None:
            raise KerasTransferError(
                f"--format {form} needs packages that are not installed. Received: no "
                f"{module}. Install them: pip install 'keras-transfer[{form}]'."
            )


@contextlib.contextmanager
def _one_line(form: Format) -> Iterator[None]:
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


def _calibration(run: Run, model: keras.Model) -> Iterator[list[np.ndarray]]:
    """Some training images, as the LiteRT converter wants them."""
    sample = sample_images(run_splits(run), model.input_shape[1], _CALIBRATION_IMAGES)
    for _, _, pixels in sample:
        yield [pixels[None].astype(np.float32)]


def _accuracies(run: Run, predict: Predict) -> tuple[tuple[float, float], int]:
    """Accuracy of a model and of its quantized form on the held-out images.

    Returns:
        (both, of how many images).

    Raises:
        KerasTransferError: If there are none, or none can be read.
    """
    before, _, skipped = evaluate_run(run)
    _, table, read = held_out_images(run)
    table = table.keep(set(table.sources) - skipped.keys())
    decode = make_decoder(run.manifest.image_size)
    said = {
        source: predict(decode(encoded)[None])[0]
        for source, encoded in read(table.sources)
        if isinstance(encoded, bytes)
    }
    table = table.keep(said)
    probabilities = np.stack([said[source] for source in table.sources])
    after = evaluate(table.targets, probabilities, run.class_names)
    return (before.accuracy, after.accuracy), len(table)


def _write_keras(job: _Job, path: Path) -> None:
    job.model.save(path)


def _load_keras(path: Path) -> Predict:
    model = keras.saving.load_model(path, compile=False)
    return lambda pixels: keras.ops.convert_to_numpy(model(pixels, training=False))


def _write_openvino(job: _Job, path: Path) -> None:
    openvino = import_openvino()
    converted = openvino.convert_model(job.make_function().get_concrete_function())
    openvino.save_model(converted, path, compress_to_fp16=False)


def _load_openvino(path: Path) -> Predict:
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = import_openvino().Core().compile_model(path, "CPU", options)
    return lambda pixels: compiled(pixels)[0]


def _write_onnx(job: _Job, path: Path) -> None:
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


def _write_litert(job: _Job, path: Path) -> None:
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


_RUNTIMES: dict[Format, _Runtime] = {
    "keras": _Runtime("model.keras", (), _write_keras, _load_keras),
    "openvino": _Runtime("model.xml", ("openvino",), _write_openvino, _load_openvino),
    "onnx": _Runtime("model.onnx", ("tf2onnx", "onnxruntime"), _write_onnx, _load_onnx),
    "litert": _Runtime(
        "model.tflite", ("ai_edge_litert",), _write_litert, _load_litert
    ),
}
