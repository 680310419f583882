"""The public API of `keras_transfer`: its functions and the `Run` class.

Each function checks its arguments first and only then imports the workflow that does
the work, and TensorFlow along with it.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keras_transfer.config import (
    Config,
    Format,
    Quantization,
    check_export,
    listing_config,
    load_config,
)
from keras_transfer.data.in_memory.forms import name_of, settled
from keras_transfer.events import Broadcast, Listener
from keras_transfer.runs import run as runs
from keras_transfer.runs.manifest import Phase

if TYPE_CHECKING:
    from keras_transfer.advice.ranking import RankResult
    from keras_transfer.data.tables import Prediction
    from keras_transfer.workflows.advise import Recommendation
    from keras_transfer.workflows.drift import RunDrift
    from keras_transfer.workflows.evaluate import RunEvaluation
    from keras_transfer.workflows.extract import ImageFeatures
    from keras_transfer.workflows.inputs import Inputs


class Run(runs.Run):
    """A finished run on disk and the operations on it.

    Attributes:
        run_dir: The run's directory, such as `saved_models/<run>`.
    """

    def unfreeze_and_finetune(self, **options: Any) -> "Run":
        """Fine-tunes the model; see `keras_transfer.unfreeze_and_finetune`."""
        return unfreeze_and_finetune(self, **options)

    def evaluate(self, data: object | None = None, **options: Any) -> "RunEvaluation":
        """Evaluates the model; see `keras_transfer.evaluate`."""
        return evaluate(self, data, **options)

    def drift(
        self, paths: str | Path | Iterable[str | Path], **options: Any
    ) -> "RunDrift":
        """Compares new images with the run's own; see `keras_transfer.drift`."""
        return drift(self, paths, **options)

    def predict(
        self, paths: str | Path | Iterable[str | Path], recursive: bool = False
    ) -> "Iterator[Prediction]":
        """Classifies images; see `keras_transfer.predict`."""
        return predict(self, paths, recursive)

    def export(self, **options: Any) -> Path:
        """Exports the model; see `keras_transfer.export`."""
        return export(self, **options)


def open_run(run: str | Path | runs.Run) -> Run:
    """Opens a run by its directory or by its name under `saved_models/`.

    If a process was killed while changing the run, a change that it had committed is
    completed first, and leftovers of any other change are removed.

    Raises:
        UsageError: If no such run exists.
    """
    opened = runs.open_run(run)
    return opened if isinstance(opened, Run) else Run(opened.run_dir)


def fit(
    data: object | None = None,
    *,
    config: Config | str | Path | None = None,
    listeners: Iterable[Listener] = (),
    **options: Any,
) -> Run:
    """Trains a new head on a frozen base's features and evaluates the classifier.

    Args:
        data: Labeled images; None takes them from `config`. They may be the path of a
            folder of class folders or of a CSV, TSV or Parquet file; a table with the
            same columns (pandas, polars, pyarrow); `(paths, labels)` or pairs of them;
            `tfds:NAME[:VERSION]` or `digits`; arrays `(x, y)` or `(x, y,
            sample_weight)`, with x `[N, H, W]` or `[N, H, W, C]` of uint8 or of floats
            in [0, 255]; or a `tf.data.Dataset` of `(image, label)`.
        config: A `Config`, or the path of a YAML file of config keys.
        listeners: Receive notes, progress, epochs and artifacts.
        **options: Config keys that override those of `config`, such as
            `base="MobileNetV2"` or `head={"kind": "mlp"}`.

    Returns:
        The finished run.

    Raises:
        UsageError: If an option, the data or the run's name is not valid.
        KerasTransferError: If the data or the weights cannot be used for training.
    """
    in_memory = None
    if data is not None:
        options["data"], in_memory = _named(data)
    source = Path(config) if isinstance(config, str) else config
    from keras_transfer.workflows.inputs import prepare

    inputs = prepare(load_config(source, options), in_memory=in_memory)
    if not inputs.need_tensorflow:
        _ = inputs.splits
    from keras_transfer.workflows.fit import extract_and_fit

    return Run(extract_and_fit(inputs, Broadcast(listeners)).run.run_dir)


def unfreeze_and_finetune(
    run: str | Path | runs.Run,
    *,
    data: object | None = None,
    resume: bool | None = None,
    listeners: Iterable[Listener] = (),
    **options: Any,
) -> Run:
    """Fine-tunes a run's model and keeps the result if it is better.

    Args:
        run: A run made by `fit`, or its directory or name. If the run was fine-tuned
            before, training starts from its head-only model again, and the better of
            the two results is kept.
        data: The images that the run was made from, if they were arrays or a
            `tf.data.Dataset`, which are not kept.
        resume: True continues an interrupted fine-tuning after its last finished epoch,
            and False starts over. None raises an error if there is an interrupted
            fine-tuning.
        listeners: Receive notes, progress, epochs and artifacts. Decisions and expected
            times are announced before the work starts.
        **options: Keys of `config.FinetuneConfig`, such as `unfreeze="all"` or
            `epochs=5`.

    Returns:
        The run, with the added phase.

    Raises:
        UsageError: If an option does not fit the run.
        KerasTransferError: If the data no longer exist, activations exceed the disk
            budget, or a loss is not finite. The run's model is then unchanged.
    """
    opened = open_run(run)
    in_memory = None if data is None else settled(data)
    from keras_transfer.workflows.finetune import run_finetuning

    run_finetuning(opened, options, resume, Broadcast(listeners), in_memory)
    return opened


def evaluate(
    run: str | Path | runs.Run,
    data: object | None = None,
    *,
    phase: Phase | None = None,
    listeners: Iterable[Listener] = (),
    **options: Any,
) -> "RunEvaluation":
    """Evaluates a run's model on its test split or on other labeled images.

    Args:
        run: A run, or its directory or name.
        data: Labeled images in any form that `fit` accepts, all of which are used; None
            for the run's test split (of runs of version 0.1.0 without one, the
            validation split). If they are the arrays or the `tf.data.Dataset` that the
            run was made from, only its test split is used.
        phase: `fit` or `finetune`; None for the run's current model.
        listeners: Receive notes, and progress after each image.
        **options: Keys of `config.ListingConfig`, such as `label_column="diagnosis"`;
            those of the run apply again where they fit the data.

    Returns:
        The metrics, the name of the data they were computed on, and the images that
        were left out, with reasons.

    Raises:
        UsageError: If the run, the phase or the data do not exist.
        KerasTransferError: If a label is not one of the run's classes, or no image can
            be read.
    """
    opened, given = open_run(run), listing_config(options)
    images = None if data is None else settled(data)
    from keras_transfer.workflows.evaluate import evaluate_run

    return evaluate_run(opened, images, given, phase, Broadcast(listeners))


def drift(
    run: str | Path | runs.Run,
    paths: str | Path | Iterable[str | Path],
    *,
    listeners: Iterable[Listener] = (),
) -> "RunDrift":
    """Compares predictions for new images with those for a run's held-out images.

    Args:
        run: A run, or its directory or name.
        paths: An image file or a folder of images, searched recursively, or several of
            them. No labels are needed.
        listeners: Receive progress after each image.

    Returns:
        The shares of images far from the training images and of images predicted as
        each class, their shifts with 95% confidence intervals, and a test of whether
        the predicted classes differ.

    Raises:
        UsageError: If the run does not exist, or a folder contains no images.
        KerasTransferError: If the run was made by an earlier version, which kept
            nothing to compare with, or no image can be read.
    """
    opened = open_run(run)
    from keras_transfer.workflows.drift import measure_drift

    return measure_drift(opened, paths, Broadcast(listeners))


def predict(
    run: str | Path | runs.Run,
    paths: str | Path | Iterable[str | Path],
    recursive: bool = False,
) -> "Iterator[Prediction]":
    """Classifies images as they are read, in order and with bounded memory.

    Args:
        run: A run, or its directory or name.
        paths: An image file or a folder of images, or several of them.
        recursive: Whether to search subfolders too.

    Returns:
        An iterator over one prediction per image. For an unusable image it contains the
        reason instead of probabilities.

    Raises:
        UsageError: If the run does not exist, or a folder contains no images.
    """
    opened = open_run(run)
    from keras_transfer.workflows.predict import predict_run

    return predict_run(opened, paths, recursive).rows


def export(
    run: str | Path | runs.Run,
    *,
    format: Format | Literal["savedmodel"] = "savedmodel",
    quantize: Quantization | None = None,
    min_accuracy: float | None = None,
    keep: int | None = None,
    listeners: Iterable[Listener] = (),
) -> Path:
    """Exports a run's model after verifying that the export agrees with it.

    Args:
        run: A run, or its directory or name.
        format: `savedmodel` for TensorFlow Serving, or the format of another runtime.
        quantize: For `litert` only: `dynamic` stores weights in 8 bits; `int8` also
            computes in 8 bits, with ranges calibrated on training images.
        min_accuracy: Minimum accuracy on the test images, from 0 to 1, that the model
            (and the quantized model, if any) must reach to be exported.
        keep: Number of SavedModel versions to keep, including the new one; None keeps
            all of them.
        listeners: Receive notes and the artifact.

    Returns:
        The version directory, or `exported/FORMAT/`. It appears only when it is
        complete, after the export has been loaded again and compared with the model.

    Raises:
        UsageError: If the run does not exist, `min_accuracy` is given but there are no
            test images, or options are incompatible.
        KerasTransferError: If the accuracy is below `min_accuracy`, the export does not
            agree with the model, packages are missing, or another process changed the
            run in the meantime. Earlier exports are left as they are.
    """
    opened, told = open_run(run), Broadcast(listeners)
    check_export(format, quantize, keep)
    from keras_transfer.workflows.export import export_format, export_savedmodel

    if format == "savedmodel":
        return export_savedmodel(opened, min_accuracy, keep, told)
    return export_format(opened, format, quantize, min_accuracy, told).path


def advise(
    data: object,
    *,
    budget: float | None = None,
    listeners: Iterable[Listener] = (),
    **options: Any,
) -> "Recommendation":
    """Recommends a method for a task, based on measurements on this machine.

    Args:
        data: Images in any form that `fit` accepts.
        budget: Maximum number of minutes that the method may take once features are
            cached; None for no limit.
        listeners: Receive notes and progress.
        **options: Config keys, such as `base="MobileNetV2"`.

    Returns:
        The recommended method, the advice and evidence behind it, and the command to
        run.

    Raises:
        UsageError: If an option or the data are not valid, or no method fits the
            budget.
        KerasTransferError: If the data or the weights cannot be used.
    """
    inputs = _measured_inputs(data, options)
    from keras_transfer.workflows.advise import measure

    return measure(inputs, options, budget, Broadcast(listeners))


def rank(
    data: object,
    bases: str | Iterable[str] | None = None,
    *,
    listeners: Iterable[Listener] = (),
    **options: Any,
) -> "RankResult":
    """Compares bases on a task by accuracy and speed.

    Features are cached, so that `fit` with one of the bases does not compute them
    again.

    Args:
        data: Images in any form that `fit` accepts.
        bases: Names of bases; None for all whose weights are on this machine.
        listeners: Receive progress and a note for each base.
        **options: Config keys other than `base`.

    Returns:
        The measured bases, most accurate first, and the bases that were left out, with
        reasons.

    Raises:
        UsageError: If a base is unknown, or `bases` is empty.
        KerasTransferError: If no base has its weights or can be built.
    """
    inputs = _measured_inputs(data, options)
    from keras_transfer.workflows.rank import measure_bases

    names = None if bases is None else [bases] if isinstance(bases, str) else [*bases]
    return measure_bases(inputs, names, Broadcast(listeners))


def extract_features(
    data: object,
    *,
    base: str | None = None,
    listeners: Iterable[Listener] = (),
    **options: Any,
) -> "ImageFeatures":
    """Computes the features of all images of DATA, as arrays for other libraries.

    With scikit-learn:

        found = keras_transfer.extract_features("photos/")
        classifier = LogisticRegression().fit(found.features, found.labels)

    Features are cached, and are the same that `fit` trains its head on.

    Args:
        data: Images in any form that `fit` accepts. One class is enough. Splits are
            ignored.
        base: Name of the pretrained base; None for the default of `fit`.
        listeners: Receive notes and progress. Images that cannot be used are left out,
            which is a note.
        **options: Config keys, such as `image_size=128` or `group_column="patient"`.

    Returns:
        The features, labels, sources, groups and class names, in the order of DATA. It
        can be unpacked as `features, labels, sources = ...`.

    Raises:
        UsageError: If an option or the data are not valid.
        KerasTransferError: If there are no images, more than `max_skipped` of them
            cannot be used, or the weights cannot be used.
    """
    inputs = _measured_inputs(data, {**options, "base": base})
    from keras_transfer.workflows.extract import features_of_data

    return features_of_data(inputs, Broadcast(listeners))


def _named(data: object) -> tuple[str, object | None]:
    """Returns the name of DATA for a config, and the images if they are in memory."""
    images = settled(data)
    return name_of(images), None if isinstance(images, str) else images


def _measured_inputs(data: object, options: Mapping[str, Any]) -> "Inputs":
    """Checks the inputs of a measurement, which makes no run."""
    from keras_transfer.workflows.inputs import prepare

    name, in_memory = _named(data)
    config = load_config(None, {**options, "data": name})
    return prepare(config, makes_run=False, in_memory=in_memory)
