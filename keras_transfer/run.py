"""The run directory: its file names, how they are written, how it is found again.

`saved_models/<run>/` is also a TensorFlow Serving model base path: `kt export` adds
integer-named version directories, and Serving ignores every other file. A run is
built in a hidden sibling directory and renamed when it is complete, so whoever lists
`saved_models/` sees a whole run or none.
"""

import contextlib
import csv
import errno
import io
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from keras_transfer.config import Config, FinetuneConfig, load_config
from keras_transfer.errors import KerasTransferError, UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CONFIG = "config.yaml"
HISTORY = "history.csv"
LABELS = "labels.txt"
MANIFEST = "manifest.json"
METRICS = "metrics.json"
MODEL = "model.keras"
SKIPPED = "skipped.csv"
SPLITS = "splits.csv"

OUT_OF_FOLD = "out_of_fold.csv"
"""What the heads of a cross-validation say of the images they were not trained on."""

CHECKPOINT = "checkpoint"
"""The folder of a phase that is not finished."""

_COMMITTED = ".committed"
_NO_LOCKS = {errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}

OnNote = Callable[[str], object]
"""Told what was decided, in words."""

OnProgress = Callable[[str, int, int], object]
"""Told what is being done, how much of it is done, and of how much."""

Phase = Literal["fit", "finetune"]

_PACKAGES = (
    "keras-transfer",
    "keras",
    "tensorflow",
    "openvino",
    "scikit-learn",
    "scipy",
    "numpy",
)


class Estimate(BaseModel):
    """A figure that was measured several times, on parts of the same images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: float
    low: float
    """Of the 95% confidence interval of the mean."""
    high: float
    values: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.mean:.4f} ({self.low:.4f} to {self.high:.4f})"


class FinetuneReport(BaseModel):
    """What `manifest.json` says of `kt unfreeze-and-finetune`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    created: str
    config: FinetuneConfig
    """What the user chose, resolved."""
    kept: bool
    """Whether the fine-tuned model became the run's model."""
    reason: str
    """Why, in words."""
    metric: str
    """What decided: `accuracy`, or of multi-label data `mean_average_precision`."""
    before: float | None
    """The metric of the run's model so far, on the validation images, if any."""
    after: float | None
    """The metric of the fine-tuned model, on the same images."""
    p_value: float | None
    """How likely a gain like this is if the new model is not better."""
    alpha: float
    """Share of the fine-tuned weights in the mix with those before; 1 is all."""
    alphas: dict[str, float]
    """alpha -> the metric on the validation images."""
    groups: dict[str, float]
    """Trained layer group -> its highest learning rate."""
    trained_parameters: int
    split_point: str
    """The layer up to which activations were computed once; `image`: pixels."""
    activation_bytes: int
    """Size on disk of an image's cached activation."""
    best_epoch: int
    epochs: int
    """Epochs trained, those before a `--resume` included."""
    engine: str
    """What ran the frozen part: `openvino` or `keras`; `cache` if it did not run."""
    precision: str
    """Arithmetic of training."""
    parity: dict[str, float]
    """The model on pixels against the cached activations; as in the manifest."""
    images_per_second: float
    """Of training, the median epoch."""
    timings: dict[str, float]
    """Wall seconds: `features`, `training`, `comparison`, `total`; of the last
    process that worked on it."""
    notes: list[str]


class Manifest(BaseModel):
    """What `manifest.json` says: where a run's model came from, to the byte."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = 1
    created: str
    """UTC time at which the run was completed, ISO 8601."""
    data: str
    """The DATA argument; folders and files as absolute paths."""
    data_fingerprint: str
    """SHA-256 over every usable image's split, name, bytes and labels."""
    class_counts: dict[str, dict[str, int]]
    """split -> class name -> number of usable images."""
    skipped: int
    """Images that could not be read or decoded; `skipped.csv` lists them."""
    multi_label: bool
    base: str
    weights: str
    weights_digest: str
    """SHA-256 over the shapes and values of the frozen base's weights."""
    image_size: int
    """Side of the square images that the model takes, in pixels."""
    decoder_version: int
    engine: str
    """What ran the frozen base: `openvino` or `keras`; `cache` if it did not run."""
    precision: str
    """Arithmetic of the features the head was trained on: `f32` or `bf16`."""
    notes: list[str]
    """What was decided on the way, each with its measurement."""
    folds: Estimate | None = None
    """With `--folds`, the accuracy (of multi-label data the mean average precision)
    of each fold, their mean and its 95% interval."""
    l2: float
    """The head's L2 strength, chosen on the validation split."""
    parity: dict[str, float]
    """model.keras against the cached features: `images`, `top1_agreement` (0 to 1),
    `max_probability_difference`, `tolerance`."""
    seed: int
    versions: dict[str, str]
    host: dict[str, str | int]
    timings: dict[str, float]
    """Wall seconds: `features`, and of these the `decode` and `forward` ones during
    which it waited for images and for the base; then `head`, `model`, `total`."""
    images_decoded: int
    images_forwarded: int
    phase: Phase = "fit"
    """Whose model `model.keras` is; the other phase's is `model.PHASE.keras`."""
    finetune: FinetuneReport | None = None


class Run:
    """A finished run on disk.

    Attributes:
        run_dir: The directory, `saved_models/<run>`.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir

    def __repr__(self) -> str:
        return f"Run({str(self.run_dir)!r})"

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.run_dir.name

    @property
    def config(self) -> Config:
        """What the user chose, resolved."""
        return load_config(self.run_dir / CONFIG)

    @property
    def class_names(self) -> list[str]:
        """The classes, in the order of the model's outputs."""
        text = (self.run_dir / LABELS).read_text(encoding="utf-8")
        return text.removesuffix("\n").split("\n")

    @property
    def manifest(self) -> Manifest:
        """Where the model came from."""
        try:
            return Manifest.model_validate_json((self.run_dir / MANIFEST).read_bytes())
        except (OSError, ValidationError) as error:
            raise KerasTransferError(
                f"{self.run_dir / MANIFEST} cannot be read: "
                f"{str(error).splitlines()[0]}. Train the run again."
            ) from None

    @property
    def metrics(self) -> dict[str, dict]:
        """For each phase and split, what `evaluation.Evaluation` documents."""
        try:
            return json.loads((self.run_dir / METRICS).read_text(encoding="utf-8"))
        except ValueError as error:
            raise KerasTransferError(
                f"{self.run_dir / METRICS} is damaged: {error}. Train the run again."
            ) from None

    @property
    def model_path(self) -> Path:
        """The Keras model, from [0, 255] RGB pixels to probabilities."""
        return self.run_dir / MODEL

    def phase_model_path(self, phase: Phase) -> Path:
        """The Keras model of a phase.

        Raises:
            UsageError: If the run has no such phase.
        """
        manifest = self.manifest
        if phase == manifest.phase:
            return self.model_path
        if phase == "finetune" and manifest.finetune is None:
            raise UsageError(
                f"The run was not fine-tuned. Received: {self.run_dir}. "
                f"Run: kt unfreeze-and-finetune {self.run_dir}"
            )
        return self.run_dir / phase_model(phase)

    @property
    def checkpoint(self) -> Path:
        """The folder of a phase that is not finished."""
        return self.run_dir / CHECKPOINT

    @property
    def splits_path(self) -> Path:
        """Which image was used for what: path,label,split,group."""
        return self.run_dir / SPLITS


def open_run(run: str | Path | Run) -> Run:
    """Opens a run by its directory, or by its name under `saved_models/`.

    Raises:
        UsageError: If there is no run.
    """
    if isinstance(run, Run):
        return run
    for run_dir in (Path(run), Path("saved_models") / run):
        if (run_dir / MANIFEST).is_file():
            _finish_update(run_dir)
            return Run(run_dir)
    raise UsageError(
        f"There is no run here. Received: {run}. A run is a directory that `kt fit` "
        f"made, such as saved_models/NAME."
    )


def run_path(runs_dir: Path, name: str, overwrite: bool) -> Path:
    """The directory a new run will get, checked before any work is done.

    Raises:
        UsageError: If the name is not usable, or taken and not to be overwritten.
        KerasTransferError: If another process is changing the run to be overwritten.
    """
    if not re.fullmatch(r"[\w][\w.+-]*", name) or name.isdigit():
        raise UsageError(
            "A run's name is made of letters, digits and _.+-, starts with a letter, "
            f"digit or _ and is not only digits. Received: {name!r}. Choose one with "
            "--name."
        )
    run_dir = runs_dir / name
    if run_dir.exists() and not overwrite:
        raise UsageError(
            f"The run exists already. Received: {run_dir}. Choose another name with "
            "--name, or replace it with --overwrite."
        )
    if run_dir.exists() and not (run_dir / MANIFEST).is_file():
        raise UsageError(
            f"--overwrite replaces only runs of kt, and this is something else. "
            f"Received: {run_dir}. Choose another name with --name."
        )
    if run_dir.exists():
        with only_process(run_dir):  # which would put its results into the new run
            pass
    return run_dir


def version_dirs(run_dir: Path) -> list[Path]:
    """What TensorFlow Serving takes for a version, oldest first; even files."""
    found = [p for p in run_dir.iterdir() if p.name.isascii() and p.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name))


@contextlib.contextmanager
def building(run_dir: Path) -> Iterator[Path]:
    """A hidden directory to build a run in; it becomes `run_dir` on success only.

    Raises:
        KerasTransferError: If another process is changing the run that is replaced.
    """
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=run_dir.parent, prefix=f".{run_dir.name}."))
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp's 0700 would lock TensorFlow Serving out
        sync(staging)
        if run_dir.exists():
            with only_process(run_dir):
                replaced = Path(
                    tempfile.mkdtemp(dir=run_dir.parent, prefix=".replaced.")
                )
                run_dir.rename(replaced / run_dir.name)
                staging.rename(run_dir)
            shutil.rmtree(replaced)
        else:
            staging.rename(run_dir)
        sync(run_dir.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def updating(run_dir: Path) -> Iterator[Path]:
    """A hidden directory for new files of a run, which replace the old ones together.

    When the block ends well the directory is renamed, and with that the update is
    decided; a process killed while it moves the files leaves the rest to `open_run`.
    """
    for left_over in run_dir.glob(".updating.*"):  # of a killed process
        shutil.rmtree(left_over, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(dir=run_dir, prefix=".updating."))
    try:
        yield staging
        for path in staging.iterdir():
            path.chmod(0o644)
            sync(path)
        sync(staging)
        staging.rename(run_dir / _COMMITTED)
        sync(run_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _finish_update(run_dir)


def _finish_update(run_dir: Path) -> None:
    committed = run_dir / _COMMITTED
    if not committed.is_dir():
        return
    for path in committed.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            path.replace(run_dir / path.name)
    with contextlib.suppress(FileNotFoundError):
        committed.rmdir()
    sync(run_dir)


@contextlib.contextmanager
def only_process(run_dir: Path) -> Iterator[None]:
    """Keeps a second process from changing the run meanwhile.

    Raises:
        KerasTransferError: If another process is changing it.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(run_dir))
        except BlockingIOError:
            raise KerasTransferError(
                f"Another process is changing this run. Received: {run_dir}. Wait for "
                "it, or stop it."
            ) from None
        yield


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[bool]:
    """Holds a lock on a directory, which a process that is killed gives back.

    Yields:
        Whether it does: NFS among others, and Windows, lock no directories.

    Raises:
        BlockingIOError: If another process holds it.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        is_held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            is_held = False
        yield is_held
    finally:
        os.close(descriptor)  # and with it the lock


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    data = content
    if isinstance(data, str):
        data = data.encode(errors="surrogateescape")  # names need not be UTF-8
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its place whole, when the block ends well."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync(path.parent)


def phase_model(phase: Phase) -> str:
    """File name of the model of a phase that is not the run's."""
    return f"model.{phase}.keras"


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The text of a CSV file."""
    return "".join(map(csv_line, (header, *rows)))


def csv_line(cells: Sequence[object]) -> str:
    """A line of a CSV file, which reads back to the same cells, whatever they hold."""
    # Where lines end in a line feed, csv does not quote a carriage return by itself,
    # and takes it for the end of a line when it reads it.
    has_return = any("\r" in str(cell) for cell in cells)
    quoting: Literal[0, 1] = csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", quoting=quoting).writerow(cells)
    return text.getvalue()


def now() -> str:
    """The time now in UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def duration(seconds: float) -> str:
    """In seconds, or from two minutes on in minutes."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def host() -> dict[str, str | int]:
    """The machine: system, processor architecture and usable CPU cores."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
    }


def sync(path: Path) -> None:
    """Waits until a file or a directory is on the disk."""
    if os.name == "nt":  # where a directory cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
