"""The workflow of `kt export`: a run's model -> what other programs serve."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from keras_transfer.config import Format, Quantization, check_quantization
from keras_transfer.data.decode import make_decoder
from keras_transfer.errors import KerasTransferError, UsageError, explaining_full_disk
from keras_transfer.evaluation.metrics import evaluate
from keras_transfer.evaluation.of_run import held_out_images
from keras_transfer.events import OnNote
from keras_transfer.runs.files import temporary_directory, write_atomic
from keras_transfer.runs.manifest import now, versions
from keras_transfer.runs.run import LABELS, Run, open_run, updating
from keras_transfer.runtime.c_api import ABOUT
from keras_transfer.serving.formats import (
    EXPORTED,
    RUNTIMES,
    TOLERANCE,
    Job,
    Predict,
    calibration_images,
    check_installed,
    explaining_refusals,
)
from keras_transfer.serving.sample import check_accuracy, load_trained, sample_of_run
from keras_transfer.serving.savedmodel import (
    SAVING,
    describe,
    finish_graph,
    prune_versions,
    publish,
    verify,
    warmup_requests,
)
from keras_transfer.serving.signatures import ServingBundle, frozen_network
from keras_transfer.serving.warmup import RECORDS, write_records
from keras_transfer.workflows.evaluate import evaluate_run


def export(
    run: str | Path | Run,
    *,
    min_accuracy: float | None = None,
    keep: int | None = None,
    on_note: OnNote = lambda _: None,
) -> Path:
    """Publishes a run's model.keras as its next version directory.

    Args:
        run: A run or its directory.
        min_accuracy: Refuses a model whose accuracy on the test images is lower.
        keep: How many versions, the new one among them, are left; None for all.
        on_note: Told what the user should know.

    Returns:
        The version directory, complete: it appears under its number only after what
        was saved has been loaded again and agreed with the model.

    Raises:
        UsageError: If there is no such run, or it has no test images to judge by.
        KerasTransferError: If the model is worse than `min_accuracy`, the bundle does
            not agree with it, or another process changed the run meanwhile. Nothing is
            published then.
    """
    run = open_run(run)
    if keep is not None and keep < 1:
        raise UsageError(f"At least one version is kept. Received: --keep {keep}.")
    trained = load_trained(run, min_accuracy)
    sample = sample_of_run(run, trained.model, on_note)
    network, is_folded = frozen_network(trained.model, sample.pixels, sample.expected)
    if not is_folded:
        on_note("BatchNormalization is not folded: it would change what is predicted")
    image_size = trained.manifest.image_size
    bundle = ServingBundle(network, image_size, trained.class_names)
    with temporary_directory(run.run_dir) as staging:
        tf.saved_model.save(tf.Module(), str(staging), bundle.signatures, SAVING)
        (staging / "assets").rmdir()  # empty
        finish_graph(staging)
        (staging / RECORDS).parent.mkdir()
        write_records(staging / RECORDS, warmup_requests(sample))
        about = describe(run, trained, is_folded, staging)
        write_atomic(staging / ABOUT, json.dumps(about, indent=1, ensure_ascii=False))
        verify(staging, sample, trained.class_names)
        version = publish(staging, run.run_dir, trained.identity)
    if keep is not None:
        prune_versions(run.run_dir, keep)
    return version


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
    runtime = RUNTIMES[form]
    check_installed(form, runtime)
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

    job = Job(model, make_function, quantize, lambda: calibration_images(run, model))
    place = Path(EXPORTED, form)
    with updating(run.run_dir, trained.identity, removed=[str(place)]) as staging:
        folder = staging / place
        folder.mkdir(parents=True)
        path = folder / runtime.file
        size = 5 * model.count_params()  # of float32, with what describes them
        with explaining_refusals(form), explaining_full_disk(run.run_dir, size):
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
