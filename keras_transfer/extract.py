"""The frozen part of a model, run as fast as this machine can run it.

On a CPU that is OpenVINO, with several requests in flight, so that images are decoded
while others go through the base. Where there is a GPU, or where OpenVINO cannot
convert the model, it is Keras. Either way the model runs in inference mode: random
layers are off and BatchNormalization uses its stored statistics.
"""

import queue
import time
from collections.abc import Iterable, Iterator
from typing import Literal, TypeVar

import keras
import numpy as np
import tensorflow as tf

from keras_transfer.config import Precision

BATCH_SIZE = 8
"""Images in a request. A request is always full: the last one is padded, so that an
image's features do not depend on how many images came with it."""

MAX_BF16_ERROR = 0.01
"""How far bfloat16 features may be from float32 ones (relative L2 norm) for `auto`."""

Engine = Literal["openvino", "keras"]

_Tag = TypeVar("_Tag")


class Extractor:
    """A Keras model that only predicts.

    Attributes:
        engine: `openvino` or `keras`.
        precision: `f32` or `bf16`.
        notes: What was decided while it was made, and why; a line each.
        seconds: Time that requests have taken so far, summed over requests.
        images: Number of images run so far.
    """

    def __init__(
        self,
        model: keras.Model,
        precision: Precision = "f32",
        sample: np.ndarray | None = None,
        engine: Engine | None = None,
    ):
        """Prepares a model for prediction.

        Args:
            model: Any model from `[N, H, W, 3]` pixels in [0, 255] to one output.
            precision: `f32`, `bf16`, or `auto` to measure on the sample.
            sample: uint8 `[N, H, W, 3]` real pixels, needed for `auto` only.
            engine: None for the fastest here.
        """
        self.notes: list[str] = []
        self.seconds = 0.0
        self.images = 0
        self.precision: Literal["f32", "bf16"] = (
            "bf16" if precision == "bf16" else "f32"
        )
        self._shape = (BATCH_SIZE, *model.input_shape[1:])
        self._function = tf.function(
            lambda pixels: model(tf.cast(pixels, tf.float32), training=False),
            input_signature=[tf.TensorSpec(self._shape, tf.uint8)],
            autograph=False,
        )
        self._converted = None
        if engine != "keras":
            self._convert()
        self.engine = "keras" if self._converted is None else "openvino"
        if self.engine == "openvino":
            if precision == "auto":
                assert sample is not None
                self._choose_precision(sample)
            self._compiled = self._compile(self.precision)
        elif precision != "f32":
            self.precision = "f32"
            self.notes.append("precision f32: Keras runs the base")

    def run(
        self, batches: Iterable[tuple[_Tag, np.ndarray]]
    ) -> Iterator[tuple[_Tag, np.ndarray]]:
        """Predicts batches while the next ones are being made.

        Args:
            batches: Pairs of anything and uint8 `[n, H, W, 3]` pixels, n at most
                `BATCH_SIZE`.

        Yields:
            Pairs of the same thing and float32 `[n, ...]` outputs, as they come, not
            always in order.
        """
        run = self._run_openvino if self.engine == "openvino" else self._run_keras
        for tag, outputs, seconds in run(batches):
            self.seconds += seconds
            self.images += len(outputs)
            yield tag, outputs

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        """float32 `[N, ...]` outputs of uint8 `[N, H, W, 3]` pixels, in order."""
        starts = range(0, len(pixels), BATCH_SIZE)
        batches = ((start, pixels[start : start + BATCH_SIZE]) for start in starts)
        outputs = dict(self.run(batches))
        return np.concatenate([outputs[start] for start in starts])

    def _run_keras(
        self, batches: Iterable[tuple[_Tag, np.ndarray]]
    ) -> Iterator[tuple[_Tag, np.ndarray, float]]:
        for tag, pixels in batches:
            start = time.perf_counter()
            outputs = self._function(tf.constant(self._fill(pixels))).numpy()
            yield tag, outputs[: len(pixels)], time.perf_counter() - start

    def _run_openvino(
        self, batches: Iterable[tuple[_Tag, np.ndarray]]
    ) -> Iterator[tuple[_Tag, np.ndarray, float]]:
        import openvino

        requests = openvino.AsyncInferQueue(self._compiled)
        finished: queue.SimpleQueue = queue.SimpleQueue()

        def keep(request, userdata) -> None:
            tag, count = userdata
            outputs = request.get_output_tensor().data[:count].copy()
            finished.put((tag, outputs, request.latency / 1000))

        requests.set_callback(keep)
        try:
            for tag, pixels in batches:
                requests.start_async({0: self._fill(pixels)}, (tag, len(pixels)))
                while not finished.empty():
                    yield finished.get()
        finally:
            requests.wait_all()
        while not finished.empty():
            yield finished.get()

    def _fill(self, pixels: np.ndarray) -> np.ndarray:
        missing = BATCH_SIZE - len(pixels)
        if not missing:
            return pixels
        return np.pad(pixels, ((0, missing), (0, 0), (0, 0), (0, 0)))

    def _convert(self) -> None:
        if tf.config.list_physical_devices("GPU"):
            self.notes.append("engine keras: there is a GPU")
            return
        import openvino

        try:
            self._converted = openvino.convert_model(
                self._function.get_concrete_function()
            )
        except Exception as error:  # OpenVINO raises many types for "cannot convert"
            reason = str(error).strip().splitlines()[0]
            self.notes.append(f"engine keras: OpenVINO cannot convert it ({reason})")

    def _compile(self, precision: str):
        import openvino

        return openvino.Core().compile_model(
            self._converted,
            "CPU",
            {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "THROUGHPUT"},
        )

    def _choose_precision(self, sample: np.ndarray) -> None:
        """Takes bfloat16 if the CPU has it, it is faster here, and changes little."""
        import openvino

        capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if "BF16" not in capabilities:
            self.notes.append("precision f32: this CPU has no bfloat16")
            return
        outputs, seconds = {}, {}
        for precision in ("f32", "bf16"):
            self._compiled = self._compile(precision)
            times = []
            for _ in range(2):  # the first is slower
                start = time.perf_counter()
                outputs[precision] = self.predict(sample)
                times.append(time.perf_counter() - start)
            seconds[precision] = min(times)
        self.seconds, self.images = 0.0, 0
        error = float(
            np.linalg.norm(outputs["bf16"] - outputs["f32"])
            / max(np.linalg.norm(outputs["f32"]), 1e-12)
        )
        speed = seconds["f32"] / seconds["bf16"]
        if error <= MAX_BF16_ERROR and speed > 1.0:
            self.precision = "bf16"
        self.notes.append(
            f"precision {self.precision}: on {len(sample)} images bfloat16 is "
            f"{speed:.1f} times as fast and changes features by {error:.1%} "
            f"(at most {MAX_BF16_ERROR:.0%} is accepted)"
        )
