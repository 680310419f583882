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
from keras_transfer.evaluation.names import label
from keras_transfer.events import Listener
from keras_transfer.markup import html_table
from keras_transfer.reporting.display import told
from keras_transfer.runs import run as runs
from keras_transfer.runs.files import check_directory, check_fix, check_report
from keras_transfer.runs.manifest import Phase
from keras_transfer.workflows.leaderboard import (
    ListedRun,
    SortKey,
    list_run,
    list_runs_in,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from keras_transfer.advice.ranking import RankResult
    from keras_transfer.data.tables import Prediction
    from keras_transfer.findings.finding import Audit
    from keras_transfer.workflows.advise import Recommendation
    from keras_transfer.workflows.compare import RunComparison
    from keras_transfer.workflows.drift import RunDrift
    from keras_transfer.workflows.evaluate import RunEvaluation
    from keras_transfer.workflows.extract import ImageFeatures
    from keras_transfer.workflows.inputs import Inputs
    from keras_transfer.workflows.search import SearchResult


class Run(runs.Run):
    """A finished run on disk and the operations on it.

    Attributes:
        run_dir: The run's directory, such as `saved_models/<run>`.
    """

    def _repr_html_(self) -> str:
        """What notebooks show: the data, the base and the headline figure."""
        one = list_run(self.run_dir)
        rows = {
            "directory": one.run_dir,
            "data": one.data,
            "base": one.base,
            "phase": one.phase,
            label(one.metric): one.figure,
            "images": f"{one.images:,} {label(one.split)}",
            "made": one.created,
        }
        if one.problem:
            rows = {"directory": one.run_dir, "problem": one.problem}
        return html_table(f"Run {self.name}", (), rows.items())

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
        self,
        paths: str | Path | Iterable[str | Path],
        recursive: bool = False,
        **options: Any,
    ) -> "Iterator[Prediction]":
        """Classifies images; see `keras_transfer.predict`."""
        return predict(self, paths, recursive, **options)

    def export(self, **options: Any) -> Path:
        """Exports the model; see `keras_transfer.export`."""
        return export(self, **options)

    def report(self, *others: str | Path | runs.Run, **options: Any) -> Path:
        """Writes the report page; see `keras_transfer.report`."""
        return report(self, *others, **options)

    def show_batch(self, n: int = 9, seed: int = 0) -> "Figure":
        """Draws training images with their labels, as the model sees them.

        Args:
            n: Maximum number of images, at least 1.
            seed: Seed of their choice.

        Returns:
            A matplotlib figure, which a notebook shows.

        Raises:
            UsageError: If the images were given in Python, and so are not kept.
            KerasTransferError: If the data no longer exist.
        """
        from keras_transfer.workflows.notebook import draw_batch

        return draw_batch(self, n, seed)

    def plot_confusion(self) -> "Figure":
        """Draws the confusion matrix of the run's first figures in metrics.json.

        Returns:
            A matplotlib figure, which a notebook shows.

        Raises:
            UsageError: If images may show several classes, or none were held out.
        """
        from keras_transfer.workflows.notebook import draw_confusion

        return draw_confusion(self)

    def plot_top_losses(self, n: int = 9) -> "Figure":
        """Draws the images that the model was most wrong about, with heat maps.

        They are held-out images, and training images as they were predicted out of
        fold. Each is shown with its label and with the class that was predicted (of
        several labels, the one that costs most); heat is what speaks for that class.

        Args:
            n: Maximum number of images, at least 1.

        Returns:
            A matplotlib figure, which a notebook shows.

        Raises:
            UsageError: If the images were given in Python, and so are not kept, or the
                run was made by an earlier version, which kept no predictions.
            KerasTransferError: If the data no longer exist.
        """
        from keras_transfer.workflows.notebook import draw_top_losses

        return draw_top_losses(self, n)

    def plot_curves(self, phase: Phase | None = None) -> "Figure":
        """Draws how the model was trained.

        Args:
            phase: `fit` for the losses against the head's L2 strength, `finetune` for
                the epochs of fine-tuning; None for the last one.

        Returns:
            A matplotlib figure, which a notebook shows.

        Raises:
            UsageError: If the run was not fine-tuned and `phase` is `finetune`.
        """
        from keras_transfer.workflows.notebook import draw_curves

        return draw_curves(self, phase)


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

    return Run(extract_and_fit(inputs, told(listeners)).run.run_dir)


def unfreeze_and_finetune(
    run: str | Path | runs.Run,
    *,
    data: object | None = None,
    resume: bool | None = None,
    report: bool | None = None,
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
        report: Whether to make the report page; None does as `fit` did.
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

    run_finetuning(opened, options, resume, told(listeners), in_memory, report)
    return opened


def evaluate(
    run: str | Path | runs.Run,
    data: object | None = None,
    *,
    phase: Phase | None = None,
    flip_tta: bool = False,
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
        flip_tta: Whether to average probabilities over each image and its mirror image
            (test-time augmentation), at twice the cost.
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

    return evaluate_run(opened, images, given, phase, told(listeners), flip_tta)


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

    return measure_drift(opened, paths, told(listeners))


def predict(
    run: str | Path | runs.Run,
    paths: str | Path | Iterable[str | Path],
    recursive: bool = False,
    *,
    flip_tta: bool = False,
) -> "Iterator[Prediction]":
    """Classifies images as they are read, in order and with bounded memory.

    Args:
        run: A run, or its directory or name.
        paths: An image file or a folder of images, or several of them.
        recursive: Whether to search subfolders too.
        flip_tta: Whether to average probabilities over each image and its mirror image
            (test-time augmentation), at twice the cost. Thresholds remain those of the
            run, which were chosen without.

    Returns:
        An iterator over one prediction per image. For an unusable image it contains the
        reason instead of probabilities.

    Raises:
        UsageError: If the run does not exist, or a folder contains no images.
    """
    opened = open_run(run)
    from keras_transfer.workflows.predict import predict_run

    return predict_run(opened, paths, recursive, flip_tta).rows


def export(
    run: str | Path | runs.Run,
    *,
    format: Format | Literal["savedmodel"] = "savedmodel",
    quantize: Quantization | None = None,
    min_accuracy: float | None = None,
    keep: int | None = None,
    flip_tta: bool = False,
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
        flip_tta: Whether the exported model averages probabilities over each image and
            its mirror image (test-time augmentation), at twice the cost.
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
    opened, listener = open_run(run), told(listeners)
    check_export(format, quantize, keep)
    from keras_transfer.workflows.export import export_format, export_savedmodel

    if format == "savedmodel":
        return export_savedmodel(opened, min_accuracy, keep, listener, flip_tta)
    return export_format(
        opened, format, quantize, min_accuracy, listener, flip_tta
    ).path


def report(
    run: str | Path | runs.Run,
    *others: str | Path | runs.Run,
    output: str | Path | None = None,
    format: Literal["html", "png"] = "html",
    thumbnails: int = 200,
    images: bool = True,
    listeners: Iterable[Listener] = (),
) -> Path:
    """Writes the report page of a run, or one that shows several side by side.

    A page is one HTML file that loads nothing. It has small pictures of the images,
    without metadata, and relative paths.

    Args:
        run: A run, or its directory or name.
        *others: Further runs to show beside it.
        output: The file to write, or the folder of charts; None for report.html or
            `charts` in the run, or report-RUN-RUN.html (of more than three runs,
            report-RUN-and-3-more.html) in the working directory.
        format: `html` for a page, `png` for the charts of one run as files.
        thumbnails: Largest number of pictures, from 0 to 1,000.
        images: Whether the page has pictures.
        listeners: Receive progress if features are computed again, and artifacts.

    Returns:
        The page, or the folder of charts.

    Raises:
        UsageError: If a run does not exist, or an option does not fit.
        KerasTransferError: If a file of a run is damaged, or another process changed
            the run meanwhile.
    """
    opened = [open_run(one) for one in (run, *others)]
    path = None if output is None else Path(output)
    check_report(len(opened), format, thumbnails, path)
    from keras_transfer.reporting.of_run.page import ReportOptions
    from keras_transfer.workflows.report import draw_run, report_run, report_runs

    options, listener = ReportOptions(thumbnails, images), told(listeners)
    if format == "png":
        return draw_run(opened[0], options, listener, path)
    if others:
        return report_runs(opened, options, listener, path)
    return report_run(opened[0], options, listener, output=path)


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
            cached; None for no limit. A trial of fine-tuning takes at most a quarter of
            it, or five minutes without one.
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

    return measure(inputs, options, budget, told(listeners))


def search(
    data: object,
    *,
    budget: float | None = None,
    trials: int | None = None,
    bases: str | Iterable[str] | None = None,
    max_size: float | None = None,
    max_latency: float | None = None,
    listeners: Iterable[Listener] = (),
    **options: Any,
) -> "SearchResult":
    """Spends a budget on the best classifier that can be found, and makes a run of it.

    Bases, several of them as one, heads, augmented views and fine-tuning are tried,
    what promises most per second first. All are judged out of fold on the training
    images; test images are looked at in the end. Ctrl-C ends the search early; a
    search that was killed goes on where it was if it is started again.

    Args:
        data: Images in any form that `fit` accepts.
        budget: Maximum number of minutes, the final training included; None for 30, or
            for no limit with `trials`. Then nothing depends on the clock (unless
            `max_latency` is given), and the same seed gives the same result.
        trials: Maximum number of ways to try; None for no limit.
        bases: Name of a base to use, or several; None for all whose weights are on
            this machine.
        max_size: Largest size of the model's weights in units of 10^6 bytes.
        max_latency: Longest time for one image on this machine, in milliseconds.
        listeners: Receive notes, progress, epochs and artifacts.
        **options: Config keys that all ways share, such as `metric="macro_f1"`, but
            not those that the search chooses: base, augment, head.kind and what of
            finetune says how to train.

    Returns:
        The run, and what was tried, the best first.

    Raises:
        UsageError: If an option, the data or the run's name is not valid, or nothing
            fits the limits.
        KerasTransferError: If the data or the weights cannot be used.
    """
    name, in_memory = _named(data)
    from keras_transfer.workflows.inputs import prepare

    config = load_config(None, {**options, "data": name})
    inputs = prepare(config, in_memory=in_memory, ending="search")
    if not inputs.need_tensorflow:
        _ = inputs.splits
    from keras_transfer.workflows.search import Limits, search_best

    limits = Limits(budget, trials, max_size, max_latency)
    names = [bases] if isinstance(bases, str) else None if bases is None else [*bases]
    return search_best(inputs, limits, names, config.image_size, told(listeners))


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
    return measure_bases(inputs, names, told(listeners))


def audit(
    data: object,
    *,
    output: str | Path | None = None,
    fix: str | Path | None = None,
    listeners: Iterable[Listener] = (),
    **options: Any,
) -> "Audit":
    """Looks for what is wrong with images, labels and splits.

    It finds copies and near duplicates, also in several splits or with several labels;
    label errors (with `pip install 'keras-transfer[audit]'`); outliers; odd and
    unusable files; shortcuts, by which the class can be told from what should not
    matter; classes that look alike or have few images; and doubtful splits.

    Features are cached, so that `fit` does not compute them again.

    Args:
        data: Images in any form that `fit` accepts. One class is enough.
        output: Directory for `audit.csv` and the page `report.html`, which replace
            those of an earlier audit; None writes neither.
        fix: CSV file for a cleaned table, which `fit` reads in place of `data`: without
            copies, suspects marked in a column, and near duplicates in one group. None
            writes none. No image is touched.
        listeners: Receive notes, progress and artifacts.
        **options: Config keys, such as `base="MobileNetV2"` or
            `group_column="patient"`.

    Returns:
        The findings, the worst first, with the images that each is about.

    Raises:
        UsageError: If an option or the data are not valid, `fix` would replace
            something else than an earlier cleaned table, or it is given for images that
            are not files.
        KerasTransferError: If none of the images can be used, or the weights cannot.
    """
    inputs = _measured_inputs(data, options, fewest_classes=1)
    folder, file = (None if path is None else Path(path) for path in (output, fix))
    if folder:
        check_directory(folder)
    if file:
        check_fix(file, inputs.config.data, inputs.config.splits.file)
    if not inputs.need_tensorflow:
        _ = inputs.splits
    from keras_transfer.workflows.audit import audit_data

    return audit_data(inputs, told(listeners), folder, file)


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

    return features_of_data(inputs, told(listeners))


def list_runs(
    runs_dir: str | Path = "saved_models",
    *,
    data: str | None = None,
    sort: SortKey = "date",
) -> list[ListedRun]:
    """Lists runs with their headline figures; TensorFlow is not needed.

    Args:
        runs_dir: Directory that contains the runs.
        data: Lists only runs of these data: the DATA argument as it was given, a path
            to the same folder or file, or its last part; None for all.
        sort: `date`, `name`, `data`, `base`, `size`, `speed` or the name of a metric,
            which is then also the figure; the newest or best come first.

    Returns:
        One row per run. A run that cannot be read has the reason in `problem`, and
        comes last.

    Raises:
        UsageError: If the directory does not exist.
    """
    return list_runs_in(Path(runs_dir), data, sort)


def compare_runs(a: str | Path | runs.Run, b: str | Path | runs.Run) -> "RunComparison":
    """Tests whether one of two runs is better on the test images both have in common.

    Args:
        a: A run, or its directory or name.
        b: Another one. Classes are matched by name.

    Returns:
        Metrics of both on these images, the two-sided p-value of a paired test, and the
        number of test images that do not count, by reason.

    Raises:
        UsageError: If a run does not exist, or only one has multi-label data.
        KerasTransferError: If the runs have no test image in common, or were made by a
            version that kept no predictions.
    """
    first, second = open_run(a), open_run(b)
    from keras_transfer.workflows.compare import compare_two

    return compare_two(first, second)


def _named(data: object) -> tuple[str, object | None]:
    """Returns the name of DATA for a config, and the images if they are in memory."""
    images = settled(data)
    return name_of(images), None if isinstance(images, str) else images


def _measured_inputs(
    data: object, options: Mapping[str, Any], fewest_classes: int = 2
) -> "Inputs":
    """Checks the inputs of a measurement, which makes no run."""
    from keras_transfer.workflows.inputs import prepare

    name, in_memory = _named(data)
    config = load_config(None, {**options, "data": name})
    return prepare(
        config,
        makes_run=False,
        in_memory=in_memory,
        fewest_classes=fewest_classes,
    )
