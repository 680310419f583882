"""The run directory: its file names, how they are written, how it is found again.

`saved_models/<run>/` is also a TensorFlow Serving model base path: `kt export` adds
integer-named version directories, and Serving ignores every other file. A run is
built in a hidden sibling directory and renamed when it is complete, so whoever lists
`saved_models/` sees a whole run or none. Changes of a run, up to its replacement, are
prepared in a hidden directory too: renaming that to `.committed` decides, and whoever
opens the run next finishes what a killed process had decided.
"""

import contextlib
import csv
import errno
import glob
import io
import itertools
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from keras_transfer.config import Config, FinetuneConfig, load_config
from keras_transfer.errors import (
    KerasTransferError,
    UsageError,
    explaining_full_disk,
)

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

SERVING = "serving"
"""The folder with TensorFlow Serving's configuration."""

_UNFINISHED = ".kt-unfinished."
"""How the names begin of hidden files and folders that a process is making."""

_COMMITTED = ".committed"
"""The folder of a run with what is decided to be in it, but not in its place yet."""

_REMOVED = ".removed"
"""A file in that folder: the names, as JSON, of what has to go first."""

_READS = 5
_NO_LOCKS = {errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}

OnNote = Callable[[str], object]
"""Told what was decided, in words."""

OnProgress = Callable[[str, int, int], object]
"""Told what is being done, how much of it is done, and of how much."""

Phase = Literal["fit", "finetune"]

_T = TypeVar("_T")

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

    def to_json(self) -> str:
        """The text of manifest.json, escaped: not every path can be text in UTF-8."""
        return json.dumps(self.model_dump(mode="json"), indent=1)


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
    def identity(self) -> bytes:
        """manifest.json as it is: a run that is changed or replaced gets another.

        Nothing, if there is no run.
        """
        try:
            return (self.run_dir / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return b""

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
            values = json.loads((self.run_dir / MANIFEST).read_bytes())
            return Manifest.model_validate(values)
        except (OSError, ValueError) as error:
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

    What a killed process had decided is finished first, and what it had not is removed.

    Raises:
        UsageError: If there is no run.
    """
    if isinstance(run, Run):
        return run
    for run_dir in (Path(run), Path("saved_models") / run):
        _recover(run_dir)
        if (run_dir / MANIFEST).is_file():
            remove_left_overs(run_dir)
            remove_left_overs(run_dir.resolve().parent)
            return Run(run_dir)
    raise UsageError(
        f"There is no run here. Received: {run}. A run is a directory that `kt fit` "
        f"made, such as saved_models/NAME."
    )


def read_together(run: Run, read: Callable[[], _T]) -> _T:
    """What `read` reads in a run's files, all of them of one and the same run.

    A run may be replaced, or fine-tuned, between one file and the next. Then they are
    read again.

    Raises:
        KerasTransferError: If it is changed again and again.
    """

    def is_unchanged() -> bool:
        # In this order, for the manifest is what a commit moves last.
        return not (run.run_dir / _COMMITTED).exists() and run.identity == before

    for _ in range(_READS):
        _recover(run.run_dir)
        before = run.identity
        try:
            result = read()
        except Exception:  # what was read may be half of one run, half of another
            if is_unchanged():
                raise
        else:
            if is_unchanged():
                return result
    raise _changed(run.run_dir)


def _changed(run_dir: Path) -> KerasTransferError:
    return KerasTransferError(
        f"Another process changed the run meanwhile. Received: {run_dir}. Nothing was "
        "made of it. Try again."
    )


@dataclass
class NewRun:
    """A run that is about to be made.

    Attributes:
        run_dir: Where it is to be; after `building`, where it is.
        replaces: The `identity` of the run there that it replaces, if any.
    """

    run_dir: Path
    replaces: bytes | None = None


def new_run(runs_dir: Path, name: str, overwrite: bool) -> NewRun:
    """Where a new run will be, checked before any work is done.

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
    remove_left_overs(runs_dir)
    _recover(run_dir)
    if not run_dir.exists():
        return NewRun(run_dir)
    if not overwrite:
        raise UsageError(
            f"The run exists already. Received: {run_dir}. Choose another name with "
            "--name, or replace it with --overwrite."
        )
    if not (run_dir / MANIFEST).is_file():
        raise UsageError(
            f"--overwrite replaces only runs of kt, and this is something else. "
            f"Received: {run_dir}. Choose another name with --name."
        )
    with only_process(run_dir):  # which would put its results into the new run
        return NewRun(run_dir, Run(run_dir).identity)


def version_dirs(run_dir: Path) -> list[Path]:
    """What TensorFlow Serving takes for a version, oldest first; even files."""
    found = [p for p in run_dir.iterdir() if p.name.isascii() and p.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name))


@contextlib.contextmanager
def building(new: NewRun) -> Iterator[Path]:
    """A hidden directory to build a run in; it becomes `new.run_dir` on success only.

    A run replaces only the one that was to be replaced, as that was when the work
    began. Where something else is by then, or another process is changing it, the new
    run gets the next free name, which `new.run_dir` says afterwards. Versions that were
    exported stay where they are, so that a server has one at any moment.
    """
    parent = new.run_dir.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    with temporary_directory(parent) as staging:
        yield staging
        settle(staging)
        if new.replaces is None or not _replace(staging, new.run_dir, new.replaces):
            new.run_dir = rename_to_first_free(staging, numbered(new.run_dir))


def _replace(staging: Path, run_dir: Path, replaced: bytes) -> bool:
    """Whether a run could be put in the place of the one with this identity."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(run_dir))
        except (BlockingIOError, FileNotFoundError):
            return False
        stack.enter_context(committing(run_dir))
        if Run(run_dir).identity != replaced:
            return False
        _commit(staging, run_dir, _outdated(run_dir, staging))
    return True


def _outdated(run_dir: Path, staging: Path) -> list[str]:
    """What of a run has to go when another takes its place."""
    published = {SERVING, *(path.name for path in version_dirs(run_dir))}
    # What is a file in both is replaced by one rename.
    renewed = {path.name for path in staging.iterdir() if path.is_file()}
    return [
        path.name
        for path in run_dir.iterdir()
        if path.name not in published
        and not path.name.startswith(_UNFINISHED)  # another process's
        and not (path.name in renewed and path.is_file())
    ]


@contextlib.contextmanager
def updating(
    run_dir: Path, made_from: bytes | None = None, removed: Sequence[str] = ()
) -> Iterator[Path]:
    """A hidden directory for new files of a run, which replace the old ones together.

    When the block ends well the directory is renamed, and with that the update is
    decided; a process killed while it moves the files leaves the rest to whoever opens
    the run.

    Args:
        run_dir: The run.
        made_from: The `identity` of the run, if only that one may be updated.
        removed: What has to go, relative to the run.

    Raises:
        KerasTransferError: If the run is not the one that `made_from` says.
    """
    with temporary_directory(run_dir) as staging:
        yield staging
        settle(staging)
        with committing(run_dir, made_from):
            _commit(staging, run_dir, removed)


@contextlib.contextmanager
def committing(run_dir: Path, made_from: bytes | None = None) -> Iterator[None]:
    """Keeps other processes from changing which files a run has, for a moment.

    Args:
        run_dir: The run.
        made_from: The `identity` it must have.

    Raises:
        KerasTransferError: If it has another.
    """
    # A run's own lock may be held for hours, by a process that trains.
    with locked(run_dir.resolve().parent, wait=True):
        _finish(run_dir)
        if made_from is not None and Run(run_dir).identity != made_from:
            raise _changed(run_dir)
        yield


def _commit(staging: Path, run_dir: Path, removed: Sequence[str]) -> None:
    write_atomic(staging / _REMOVED, json.dumps(removed))
    staging.rename(run_dir / _COMMITTED)  # from here on nobody can undo it
    sync(run_dir)
    _finish(run_dir)


def _finish(run_dir: Path) -> None:
    """Does what a commit decided; again, from anywhere, if it was killed meanwhile."""
    committed = run_dir / _COMMITTED
    if not committed.is_dir():
        return
    removed = committed / _REMOVED
    # Where directories are not locked another process may do the same.
    with contextlib.suppress(FileNotFoundError):
        if removed.exists():
            for name in json.loads(removed.read_text()):
                _remove(run_dir / name)
            sync(run_dir)
            removed.unlink()
            sync(committed)  # before anything is moved, which must not be removed
        # The manifest last: until then a reader can tell that its files change.
        for path in sorted(committed.iterdir(), key=lambda path: path.name == MANIFEST):
            _move(path, run_dir / path.name)
        committed.rmdir()
    sync(run_dir)


def _move(source: Path, target: Path) -> None:
    """Moves a file, or a folder into what there is of it."""
    if source.is_dir() and target.is_dir():
        for path in source.iterdir():
            _move(path, target / path.name)
        source.rmdir()
    else:
        source.replace(target)


def _recover(run_dir: Path) -> None:
    """Finishes, or undoes, what a killed process was doing to a run."""
    if (run_dir / _COMMITTED).is_dir():
        with committing(run_dir):
            pass
    if not run_dir.exists():  # which version 0.1.0 moved away before it replaced it
        pattern = f".replaced.????????/{glob.escape(run_dir.name)}"
        for moved in run_dir.parent.glob(pattern):
            moved.rename(run_dir)
            moved.parent.rmdir()
            break


def numbered(path: Path) -> Iterator[Path]:
    """PATH, PATH-2, PATH-3 and so on."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}")


def rename_to_first_free(directory: Path, paths: Iterable[Path]) -> Path:
    """Gives a directory the first of these names that nothing has.

    Two processes never get the same.

    Returns:
        The name.
    """
    for path in paths:
        try:
            directory.rename(path)
        except OSError:
            if not os.path.lexists(path):
                raise
        else:
            sync(path.parent)
            return path
    raise AssertionError("there is always a free name")


@contextlib.contextmanager
def temporary_directory(parent: Path) -> Iterator[Path]:
    """A hidden directory to build something in, which is renamed when it is complete.

    What has not been renamed by the end of the block is removed.
    """
    with _unfinished(
        parent, lambda: tempfile.mkdtemp(dir=parent, prefix=_UNFINISHED)
    ) as path:
        yield path


@contextlib.contextmanager
def _unfinished(parent: Path, make: Callable[[], str]) -> Iterator[Path]:
    """A file or directory that is locked while its process lives, then removed."""
    remove_left_overs(parent)
    with explaining_full_disk(parent), contextlib.ExitStack() as stack:
        while True:
            path = Path(make())
            stack.callback(_remove, path)
            # Another process may have removed it before it was locked.
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                stack.enter_context(locked(path))
                if path.exists():
                    break
        yield path


def remove_left_overs(parent: Path) -> None:
    """Removes what killed processes left unfinished in a directory.

    What a process still works on it has locked.
    """
    for left_over in parent.glob(f"{_UNFINISHED}*"):
        with contextlib.suppress(OSError), locked(left_over) as is_held:
            if is_held:
                _remove(left_over)


def _remove(path: Path) -> None:
    """Deletes a file or a directory, as far as it is there and can be deleted."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def settle(directory: Path) -> None:
    """Lets everyone read what is in a directory, and waits until it is on the disk.

    Servers run as other users, and umask may be anything.
    """
    for path in (*directory.rglob("*"), directory):
        path.chmod(0o755 if path.is_dir() else 0o644)
        sync(path)


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
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Holds a lock on a file or directory, which a killed process gives back.

    Args:
        path: The file or directory.
        wait: Whether to wait for a process that holds it.

    Yields:
        Whether it does: NFS among others, and Windows, lock no directories.

    Raises:
        BlockingIOError: If another process holds it.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        is_held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
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

    def make() -> str:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=_UNFINISHED)
        os.close(descriptor)
        return name

    with _unfinished(path.parent, make) as temporary:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        sync(path.parent)


def phase_model(phase: Phase) -> str:
    """File name of the model of a phase that is not the run's."""
    return f"model.{phase}.keras"


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The text of a CSV file."""
    return "".join(f"{csv_line(cells)}\n" for cells in (header, *rows))


def csv_line(cells: Sequence[object]) -> str:
    """A line of a CSV file, without its end.

    It reads back to the same cells, whatever they hold.
    """
    # Where lines end in a line feed, csv does not quote a carriage return by itself,
    # and takes it for the end of a line when it reads it.
    has_return = any("\r" in str(cell) for cell in cells)
    quoting: Literal[0, 1] = csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", quoting=quoting).writerow(cells)
    return text.getvalue().removesuffix("\n")


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


def nearest_directory(path: Path) -> Path:
    """A path, or the nearest of its parents that exists."""
    return next(x for x in (path, *path.absolute().parents) if x.exists())


def is_writable(directory: Path) -> bool:
    """Whether a directory can be written, or made where it is not there yet."""
    existing = nearest_directory(directory)
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def sync(path: Path) -> None:
    """Waits until a file or a directory is on the disk."""
    if os.name == "nt":  # where a directory cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
