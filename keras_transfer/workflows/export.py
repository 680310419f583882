"""The workflow of `kt export`: exports a run's model for other programs."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from keras_transfer.config import Format, Quantization
from keras_transfer.data.decode import make_decoder
from keras_transfer.errors import KerasTransferError, explaining_full_disk
from keras_transfer.evaluation.decisions import DecisionRule
from keras_transfer.evaluation.metrics import evaluate
from keras_transfer.evaluation.of_run import held_out_images
from keras_transfer.evaluation.prediction import note_flip_tta
from keras_transfer.events import SILENT, Listener
from keras_transfer.runs.files import temporary_directory, write_atomic
from keras_transfer.runs.manifest import now, versions
from keras_transfer.runs.run import LABELS, Run, updating
from keras_transfer.runtime.c_api import ABOUT
from keras_transfer.serving.formats import (
    EXPORTED,
    Job,
    Predict,
    calibration_images,
    check_agreement,
    check_installed,
    explaining_refusals,
    write_format,
)
from keras_transfer.serving.sample import (
    Trained,
    check_accuracy,
    flip_averaged_sample,
    load_trained,
    sample_of_run,
)
from keras_transfer.serving.savedmodel import (
    decisions,
    describe,
    prune_versions,
    publish,
    verify,
    write_savedmodel,
)
from keras_transfer.serving.signatures import ServingBundle, frozen_network
from keras_transfer.workflows.evaluate import evaluate_run


def export_savedmodel(
    run: Run,
    min_accuracy: float | None = None,
    keep: int | None = None,
    listener: Listener = SILENT,
    flip_tta: bool = False,
) -> Path:
    """Implements `api.export` for a SavedModel.

    Args:
        run: The run.
        min_accuracy: Minimum accuracy on the test images, from 0 to 1; None for no
            limit.
        keep: Number of versions to keep, including the new one; None keeps all.
        listener: Receives notes and the artifact.
        flip_tta: Whether the SavedModel averages probabilities over each image and its
            mirror image.

    Returns:
        The new version directory.

    Raises:
        UsageError: If `min_accuracy` is given but the run has no test images.
        KerasTransferError: If the accuracy is too low, the SavedModel does not agree
            with the model, or another process changed the run in the meantime.
    """
    trained = _load(run, min_accuracy, flip_tta)
    sample = sample_of_run(run, trained.model, listener)
    network, is_folded = frozen_network(trained.model, sample.pixels, sample.expected)
    if not is_folded:
        listener.note(
            "BatchNormalization is not folded: it would change what is predicted"
        )
    image_size = trained.manifest.image_size
    rule = DecisionRule.of(trained.manifest, trained.class_names)
    bundle = ServingBundle(network, image_size, trained.class_names, rule, flip_tta)
    if flip_tta:
        note_flip_tta(rule, listener)
        sample = flip_averaged_sample(sample, trained.model)
    with temporary_directory(run.run_dir) as staging:
        write_savedmodel(staging, bundle, sample)
        about = describe(run, trained, is_folded, staging, flip_tta)
        write_atomic(staging / ABOUT, json.dumps(about, indent=1, ensure_ascii=False))
        verify(staging, sample, trained.class_names, rule)
        version = publish(staging, run.run_dir, trained.identity)
    if keep is not None:
        prune_versions(run.run_dir, keep)
    listener.artifact(version, "savedmodel")
    return version


def _load(run: Run, min_accuracy: float | None, flip_tta: bool) -> Trained:
    """Loads the model to export; see `load_trained`.

    The run's metrics are of the model alone. That of a model that averages over flips
    is measured.
    """
    if not flip_tta or min_accuracy is None:
        return load_trained(run, min_accuracy)
    trained = load_trained(run, 0.0)  # any accuracy, but of test images
    found = evaluate_run(run, flip_tta=True)
    check_accuracy(found.accuracy, found.images, min_accuracy)
    return trained


@dataclass(frozen=True)
class Exported:
    """The result of `kt export --format`.

    Attributes:
        path: Folder with the model's file, `labels.txt` and `keras_transfer.json`.
        max_difference: Largest absolute difference of its probabilities from the
            model's, on sample images.
        accuracy: Accuracies of the original and of the quantized model, from 0 to 1;
            None without quantization or without held-out images.
        images: Number of images that `accuracy` was computed on.
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
    run: Run,
    form: Format,
    quantize: Quantization | None = None,
    min_accuracy: float | None = None,
    listener: Listener = SILENT,
    flip_tta: bool = False,
) -> Exported:
    """Implements `api.export` for the formats of other runtimes.

    Args:
        run: The run.
        form: The format.
        quantize: For `litert` only: `dynamic` stores weights in 8 bits; `int8` also
            computes in 8 bits, with ranges calibrated on training images.
        min_accuracy: Minimum accuracy on the test images, from 0 to 1, that the model
            (and the quantized model, if any) must reach; None for no limit.
        listener: Receives notes and the artifact.
        flip_tta: Whether the exported model averages probabilities over each image and
            its mirror image.

    Returns:
        A description of what was written to `exported/FORMAT/` in the run.

    Raises:
        UsageError: If `min_accuracy` is given but the run has no test images.
        KerasTransferError: If packages are missing, the model cannot be converted, the
            result does not agree with the model or is less accurate than
            `min_accuracy`, or another process changed the run in the meantime. An
            earlier export is then left as it is.
    """
    check_installed(form)
    trained = _load(run, min_accuracy, flip_tta)
    model = trained.model
    sample = sample_of_run(run, model, listener)
    job = Job(model, sample, quantize, lambda: calibration_images(run, model), flip_tta)
    if flip_tta:
        note_flip_tta(DecisionRule.of(trained.manifest, trained.class_names), listener)
    place = Path(EXPORTED, form)
    with updating(run.run_dir, trained.identity, removed=[str(place)]) as staging:
        folder = staging / place
        folder.mkdir(parents=True)
        size = 5 * model.count_params()  # 4 bytes per weight, and some for the graph
        with explaining_refusals(form), explaining_full_disk(run.run_dir, size):
            predict = write_format(form, job, folder)
            difference = check_agreement(form, predict, job)
        exported = Exported(run.run_dir / place, difference)
        if quantize:
            exported = _measured(
                exported, run, predict, min_accuracy, listener, flip_tta
            )
        _describe(folder, trained, exported, job)
    listener.artifact(exported.path, form)
    return exported


def _measured(
    exported: Exported,
    run: Run,
    predict: Predict,
    min_accuracy: float | None,
    listener: Listener,
    flip_tta: bool,
) -> Exported:
    """Adds the effect of quantization on the accuracy, if it can be measured.

    Raises:
        KerasTransferError: If `min_accuracy` is given and the accuracy is lower or
            cannot be measured.
    """
    try:
        accuracy, images = _accuracies(run, predict, flip_tta)
    except KerasTransferError as error:
        if min_accuracy is not None:
            raise
        listener.note(f"What that does to the accuracy was not measured: {error}")
        return exported
    if min_accuracy is not None:
        check_accuracy(accuracy[1], images, min_accuracy)
    return replace(exported, accuracy=accuracy, images=images)


def _describe(folder: Path, trained: Trained, exported: Exported, job: Job) -> None:
    """Writes `labels.txt` and `keras_transfer.json` beside an exported model."""
    manifest = trained.manifest
    write_atomic(folder / LABELS, "".join(f"{x}\n" for x in trained.class_names))
    about = {
        "created": now(),
        "base": manifest.base,
        "phase": manifest.phase,
        "multi_label": manifest.multi_label,
        **decisions(manifest),
        "image_size": manifest.image_size,
        "quantize": job.quantize,
        "flip_tta": job.flip_tta,
        "max_difference": exported.max_difference,
        "accuracy": exported.accuracy,
        "versions": versions(),
    }
    write_atomic(folder / "keras_transfer.json", json.dumps(about, indent=1))


def _accuracies(
    run: Run, predict: Predict, flip_tta: bool
) -> tuple[tuple[float, float], int]:
    """Computes the accuracy of a model and of its quantized form on held-out images.

    Returns:
        ((accuracy of the model, accuracy of the quantized model), number of images).

    Raises:
        KerasTransferError: If there are no held-out images, or none can be read.
    """
    before = evaluate_run(run, flip_tta=flip_tta)
    images = held_out_images(run)
    table = images.table.keep({*images.table.sources} - before.skipped.keys())
    decode = make_decoder(run.manifest.image_size)
    said = {
        source: predict(decode(encoded)[None])[0]
        for source, encoded in images.read(table.sources)
        if isinstance(encoded, bytes)
    }
    table = table.keep(said)
    probabilities = np.stack([said[source] for source in table.sources])
    rule = DecisionRule.of(run.manifest, run.class_names)
    after = evaluate(
        table.targets, probabilities, run.class_names, table.groups, rule.classes
    )
    return (before.accuracy, after.accuracy), len(table)
