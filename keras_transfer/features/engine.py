"""Engines that run a model for inference: pixels -> outputs.

On a CPU the engine is OpenVINO, with several requests in flight, so that images are
decoded while others go through the base. If there is a GPU, or OpenVINO cannot convert
the model, the engine is Keras. Either way the model runs in inference mode: random
layers are off and BatchNormalization uses its stored statistics.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Protocol, TypeVar

import keras
import numpy as np
import tensorflow as tf

from keras_transfer.config import Precision
from keras_transfer.errors import UsageError
from keras_transfer.events import SILENT, Listener
from keras_transfer.runtime.openvino import (
    cpu_has_bf16,
    import_openvino,
    instruction_set,
)

BATCH_SIZE = 8
"""Number of images per request. The last request is padded, so that an image's features
do not depend on how many images are processed together."""

MAX_BF16_ERROR = 0.01
"""Largest relative error (L2 norm) of bfloat16 features that `auto` accepts."""

EngineName = Literal["openvino", "keras"]

_Tag = TypeVar("_Tag")


class Engine(Protocol):
    """Runs a model for inference.

    Attributes:
        name: `openvino` or `keras`.
        precision: Precision of the arithmetic: `f32` or `bf16`.
        device: The CPU's instruction set, or the GPU's name.
        batch_size: Maximum number of images per batch.
    """

    name: EngineName
    precision: Literal["f32", "bf16"]
    device: str
    batch_size: int

    def run(
        self, batches: Iterable[tuple[_Tag, np.ndarray]]
    ) -> Iterator[tuple[_Tag, np.ndarray]]:
        """Runs the model on batches while the next ones are being prepared.

        Args:
            batches: Pairs of an arbitrary tag and uint8 `[n, H, W, 3]` pixels, with n
                at most `batch_size`.

        Yields:
            Pairs of the same tag and float32 `[n, ...]` outputs, in order.
        """
        ...


class KerasEngine:
    """Runs a model with Keras in float32, on the CPU or a GPU; see `Engine`."""

    name: EngineName = "keras"
    precision: Literal["f32", "bf16"] = "f32"

    def __init__(
        self, model: keras.Model, batch_size: int = BATCH_SIZE, pads: bool = True
    ):
        """Prepares a model for inference.

        Args:
            model: Any model from `[N, H, W, 3]` pixels in [0, 255] to one output.
            batch_size: Maximum number of images per batch.
            pads: Whether to pad batches to the full size, so that an image's output
                does not depend on the number of images in its batch.
        """
        self.device = _keras_device()
        self.batch_size = batch_size
        self._output_shape = model.output_shape[1:]
        self._pads = pads
        self._function = pixel_function(model, batch_size if pads else None)

    def run(
        self, batches: Iterable[tuple[_Tag, np.ndarray]]
    ) -> Iterator[tuple[_Tag, np.ndarray]]:
        """Runs the model on one batch after the other; see `Engine.run`."""
        for tag, pixels in batches:
            if len(pixels):
                filled = _fill(pixels, self.batch_size) if self._pads else pixels
                outputs = self._function(tf.constant(filled)).numpy()[: len(pixels)]
            else:
                outputs = np.zeros((0, *self._output_shape), np.float32)
            yield tag, outputs


class OpenVinoEngine:
    """Runs a model with OpenVINO on the CPU, several requests at a time; see `Engine`.

    Batches are padded to the full size.
    """

    name: EngineName = "openvino"
    batch_size = BATCH_SIZE

    def __init__(self, network: Any, precision: Literal["f32", "bf16"]):
        """Compiles a network.

        Args:
            network: A network returned by `convert_to_openvino`.
            precision: Precision of the arithmetic.
        """
        self.precision = precision
        self.device = instruction_set()
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "THROUGHPUT",
        }
        self._compiled = import_openvino().Core().compile_model(network, "CPU", options)

    def run(
        self, batches: Iterable[tuple[_Tag, np.ndarray]]
    ) -> Iterator[tuple[_Tag, np.ndarray]]:
        """Runs the model while the next batches are prepared; see `Engine.run`."""
        # Callbacks could deadlock: OpenVINO calls them in its own threads, which wait
        # for the GIL while Python waits for those threads to end.
        count = 2 * self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        requests = [self._compiled.create_infer_request() for _ in range(count)]
        waiting: deque[tuple[Any, _Tag, int]] = deque()

        def finish() -> tuple[_Tag, np.ndarray]:
            request, tag, length = waiting.popleft()
            request.wait()
            return tag, request.get_output_tensor().data[:length].copy()

        failure: BaseException | None = None

        def until_failure() -> Iterator[tuple[_Tag, np.ndarray]]:
            nonlocal failure
            try:
                yield from batches
            except BaseException as error:  # raised again after running requests end
                failure = error

        try:
            pairs = zip(until_failure(), itertools.cycle(requests), strict=False)
            for (tag, pixels), request in pairs:
                if len(waiting) == count:  # then the oldest one is using `request`
                    yield finish()
                request.start_async({0: _fill(pixels, BATCH_SIZE)})
                waiting.append((request, tag, len(pixels)))
            while waiting:
                yield finish()
            if failure:
                raise failure
        finally:
            for request, _, _ in waiting:
                request.wait()


def make_engine(
    model: keras.Model,
    precision: Precision = "f32",
    sample: np.ndarray | None = None,
    name: EngineName | None = None,
    listener: Listener = SILENT,
) -> Engine:
    """Creates the fastest engine for a model on this machine.

    Args:
        model: Any model from `[N, H, W, 3]` pixels in [0, 255] to one output.
        precision: `f32`, `bf16`, or `auto` to choose by measuring on the sample.
        sample: uint8 `[N, H, W, 3]` pixels of real images; required for `auto` with
            OpenVINO.
        name: Name of the engine; None for the fastest.
        listener: Receives notes on what was chosen and why.

    Raises:
        UsageError: If bfloat16 is requested but is not available here.
    """
    network, reason = None, "Keras was asked for"
    if name != "keras":
        network, reason = convert_to_openvino(model)
        if network is None:
            listener.note(f"engine keras: {reason}")
    if network is None:
        if precision == "bf16":
            raise UsageError(
                f"bfloat16 needs OpenVINO on a CPU, but {reason}. Received: precision "
                "bf16. Use auto."
            )
        return KerasEngine(model)
    if precision == "auto":
        assert sample is not None
        return _in_better_precision(network, sample, listener)
    if precision == "bf16" and not cpu_has_bf16():
        raise UsageError(
            "This CPU has no bfloat16. Received: precision bf16. Use auto."
        )
    return OpenVinoEngine(network, precision)


def predict(engine: Engine, pixels: np.ndarray) -> np.ndarray:
    """Runs an engine on uint8 `[N, H, W, 3]` pixels; returns float32 `[N, ...]`."""
    size = engine.batch_size
    starts = range(0, len(pixels), size)
    batches = ((start, pixels[start : start + size]) for start in starts)
    return np.concatenate([outputs for _, outputs in engine.run(batches)])


def seconds_per_image(engine: Engine, sample: np.ndarray) -> float:
    """Measures the seconds per image on uint8 `[N, H, W, 3]` pixels."""
    times = []
    for _ in range(2):  # the first run is slower
        start = time.perf_counter()
        predict(engine, sample)
        times.append(time.perf_counter() - start)
    return min(times) / len(sample)


def pixel_function(model: keras.Model, batch_size: int | None) -> Any:
    """Compiles a model in inference mode as a `tf.function` of uint8 pixels.

    Args:
        model: Any model from `[N, H, W, 3]` pixels in [0, 255] to one output.
        batch_size: N; None for any number of images.
    """
    shape = (batch_size, *model.input_shape[1:])
    return tf.function(
        lambda pixels: model(tf.cast(pixels, tf.float32), training=False),
        input_signature=[tf.TensorSpec(shape, tf.uint8)],
        autograph=False,
    )


def convert_to_openvino(model: keras.Model) -> tuple[Any, str]:
    """Converts a model for OpenVINO, with a fixed batch size of `BATCH_SIZE`.

    Returns:
        (network, ""), or (None, the reason why Keras has to run the model).
    """
    if tf.config.list_physical_devices("GPU"):
        return None, "there is a GPU"
    function = pixel_function(model, BATCH_SIZE).get_concrete_function()
    try:
        # By default, every operation with a custom gradient becomes an output.
        return import_openvino().convert_model(
            function, output=function.outputs[0].name
        ), ""
    except Exception as error:  # OpenVINO raises many types for "cannot convert"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = next((x for x in lines if "No conversion rule" in x), lines[0])
        return None, f"OpenVINO cannot convert it ({reason})"


def likely_device(name: EngineName) -> str:
    """Predicts the `device` of an engine with this name, without creating it."""
    return instruction_set() if name == "openvino" else _keras_device()


def likely_names() -> tuple[EngineName, ...]:
    """Lists the engines that may run a model here, the most likely one first."""
    if tf.config.list_physical_devices("GPU"):
        return ("keras",)
    return ("openvino", "keras")


def _keras_device() -> str:
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return instruction_set()
    details = tf.config.experimental.get_device_details(gpus[0])
    return str(details.get("device_name", "GPU"))


def _fill(pixels: np.ndarray, batch_size: int) -> np.ndarray:
    missing = batch_size - len(pixels)
    if not missing:
        return pixels
    return np.pad(pixels, ((0, missing), (0, 0), (0, 0), (0, 0)))


def _in_better_precision(
    network: Any, sample: np.ndarray, listener: Listener
) -> OpenVinoEngine:
    """Chooses bfloat16 if it is available, faster, and accurate enough, else float32.

    A note gives the measured speed and error.
    """
    f32 = OpenVinoEngine(network, "f32")
    if not cpu_has_bf16():
        listener.note("precision f32: this CPU has no bfloat16")
        return f32
    bf16 = OpenVinoEngine(network, "bf16")
    exact, rounded = predict(f32, sample), predict(bf16, sample)
    change = float(np.linalg.norm(rounded - exact))
    error = change / max(float(np.linalg.norm(exact)), 1e-12)
    speed = seconds_per_image(f32, sample) / seconds_per_image(bf16, sample)
    chosen = bf16 if error <= MAX_BF16_ERROR and speed > 1.0 else f32
    listener.note(
        f"precision {chosen.precision}: on {len(sample)} images bfloat16 is "
        f"{speed:.1f} times as fast and changes features by {error:.1%} "
        f"(at most {MAX_BF16_ERROR:.0%} is accepted)"
    )
    return chosen
