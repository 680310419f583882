"""Engines: pixels -> what the frozen part of a model says of them."""

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Literal, TypeVar

import keras
import numpy as np
import tensorflow as tf

from keras_transfer.config import Precision
from keras_transfer.errors import UsageError
from keras_transfer.runtime.openvino import cpu_has_bf16, import_openvino

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
        seconds: How long was waited for outputs so far.
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

        Raises:
            UsageError: If bfloat16 is asked for and cannot be had here.
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
            if self.precision == "bf16" and not cpu_has_bf16():
                raise UsageError(
                    "This CPU has no bfloat16. Received: precision bf16. Use auto."
                )
            self._compiled = self._compile(self.precision)
        elif precision == "bf16":
            raise UsageError(
                f"bfloat16 needs OpenVINO on a CPU, but {self.notes[-1]}. Received: "
                "precision bf16. Use auto."
            )

    def run(
        self, batches: Iterable[tuple[_Tag, np.ndarray]]
    ) -> Iterator[tuple[_Tag, np.ndarray]]:
        """Predicts batches while the next ones are being made.

        Args:
            batches: Pairs of anything and uint8 `[n, H, W, 3]` pixels, n at most
                `BATCH_SIZE`.

        Yields:
            Pairs of the same thing and float32 `[n, ...]` outputs, in order.
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
        return np.concatenate([outputs for _, outputs in self.run(batches)])

    def measure(self, sample: np.ndarray) -> float:
        """Seconds an image takes, measured on uint8 `[N, H, W, 3]` pixels."""
        times = []
        for _ in range(2):  # the first is slower
            start = time.perf_counter()
            self.predict(sample)
            times.append(time.perf_counter() - start)
        self.seconds, self.images = 0.0, 0
        return min(times) / len(sample)

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
        # No callbacks: OpenVINO would call them in its own threads, which then wait
        # for Python's lock while Python waits for those threads to end.
        count = 2 * self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        requests = [self._compiled.create_infer_request() for _ in range(count)]
        waiting: deque = deque()

        def finish() -> tuple[_Tag, np.ndarray, float]:
            request, tag, length = waiting.popleft()
            start = time.perf_counter()
            request.wait()
            seconds = time.perf_counter() - start
            return tag, request.get_output_tensor().data[:length].copy(), seconds

        failure: BaseException | None = None

        def until_failure() -> Iterator[tuple[_Tag, np.ndarray]]:
            nonlocal failure
            try:
                yield from batches
            except BaseException as error:  # raised again when what runs is finished
                failure = error

        try:
            pairs = zip(until_failure(), itertools.cycle(requests), strict=False)
            for (tag, pixels), request in pairs:
                if len(waiting) == count:  # the longest running one is `request`
                    yield finish()
                request.start_async({0: self._fill(pixels)})
                waiting.append((request, tag, len(pixels)))
            while waiting:
                yield finish()
            if failure:
                raise failure
        finally:
            for request, _, _ in waiting:
                request.wait()

    def _fill(self, pixels: np.ndarray) -> np.ndarray:
        missing = BATCH_SIZE - len(pixels)
        if not missing:
            return pixels
        return np.pad(pixels, ((0, missing), (0, 0), (0, 0), (0, 0)))

    def _convert(self) -> None:
        if tf.config.list_physical_devices("GPU"):
            self.notes.append("engine keras: there is a GPU")
            return
        function = self._function.get_concrete_function()
        try:
            # By itself it makes an output of every operation with its own gradient.
            self._converted = import_openvino().convert_model(
                function, output=function.outputs[0].name
            )
        except Exception as error:  # OpenVINO raises many types for "cannot convert"
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = next((x for x in lines if "No conversion rule" in x), lines[0])
            self.notes.append(f"engine keras: OpenVINO cannot convert it ({reason})")

    def _compile(self, precision: str):
        return (
            import_openvino()
            .Core()
            .compile_model(
                self._converted,
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": precision,
                    "PERFORMANCE_HINT": "THROUGHPUT",
                },
            )
        )

    def _choose_precision(self, sample: np.ndarray) -> None:
        """Takes bfloat16 if the CPU has it, it is faster here, and changes little."""
        if not cpu_has_bf16():
            self.notes.append("precision f32: this CPU has no bfloat16")
            return
        outputs, seconds = {}, {}
        for precision in ("f32", "bf16"):
            self._compiled = self._compile(precision)
            outputs[precision] = self.predict(sample)
            seconds[precision] = self.measure(sample)
        change = float(np.linalg.norm(outputs["bf16"] - outputs["f32"]))
        error = change / max(float(np.linalg.norm(outputs["f32"])), 1e-12)
        speed = seconds["f32"] / seconds["bf16"]
        if error <= MAX_BF16_ERROR and speed > 1.0:
            self.precision = "bf16"
        self.notes.append(
            f"precision {self.precision}: on {len(sample)} images bfloat16 is "
            f"{speed:.1f} times as fast and changes features by {error:.1%} "
            f"(at most {MAX_BF16_ERROR:.0%} is accepted)"
        )
