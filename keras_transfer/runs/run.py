"""The run directory: its file names, how it is written, and how it is opened.

`saved_models/<run>/` is also a TensorFlow Serving model base path: `kt export` adds
integer-named version directories, and TensorFlow Serving ignores every other file. A
run is built in a hidden sibling directory and renamed when it is complete, so a
listing of `saved_models/` contains complete runs only. Changes to a run, including its
replacement, are prepared in a hidden directory too. Renaming that to `.committed`
commits the change; if the process is then killed, the next one that opens the run
completes it.
"""

import contextlib
import glob
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from keras_transfer.config import Config, load_config
from keras_transfer.errors import KerasTransferError, UsageError, first_line
from keras_transfer.runs.files import (
    UNFINISHED,
    locked,
    numbered,
    only_process,
    remove,
    remove_left_overs,
    rename_to_first_free,
    settle,
    sync,
    temporary_directory,
    write_atomic,
)
from keras_transfer.runs.manifest import Manifest, Phase

AUDIT = "audit.json"
CONFIG = "config.yaml"
HISTORY = "history.csv"
IMAGES = "images.parquet"
LABELS = "labels.txt"
MANIFEST = "manifest.json"
METRICS = "metrics.json"
MODEL = "model.keras"
REPORT = "report.html"
SEARCH = "search.json"
SKIPPED = "skipped.csv"
SPLITS = "splits.csv"

FAR = "far.npz"
"""What tells images far from the training images; see `out_of_distribution`."""

PREDICTIONS = "predictions.csv"
"""A prediction of every image; those of training images out of fold, if there are."""

CHECKPOINT = "checkpoint"
"""Folder with the state of an unfinished phase."""

SERVING = "serving"
"""Folder with TensorFlow Serving's configuration files."""

_COMMITTED = ".committed"
"""Folder in a run with files that are committed but not moved into place yet."""

_REMOVED = ".removed"
"""File in that folder: a JSON list of names to delete before files are moved."""

_READS = 5  # attempts to read files of one consistent run

_T = TypeVar("_T")


class Run:
    """A finished run on disk.

    Attributes:
        run_dir: The run's directory, such as `saved_models/<run>`.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir

    def __repr__(self) -> str:
        return f"Run({str(self.run_dir)!r})"

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        return self.run_dir.name

    @property
    def identity(self) -> bytes:
        """The bytes of manifest.json, which differ after every change or replacement.

        Empty if there is no run.
        """
        try:
            return (self.run_dir / MANIFEST).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return b""

    @property
    def config(self) -> Config:
        """The resolved config that the run was made with."""
        return load_config(self.run_dir / CONFIG)

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of the model's outputs."""
        text = (self.run_dir / LABELS).read_text(encoding="utf-8")
        return text.removesuffix("\n").split("\n")

    @property
    def manifest(self) -> Manifest:
        """The content of manifest.json.

        Raises:
            KerasTransferError: If the file is missing or damaged.
        """
        try:
            values = json.loads((self.run_dir / MANIFEST).read_bytes())
            return Manifest.model_validate(values)
        except (OSError, ValueError) as error:
            raise KerasTransferError(
                f"{self.run_dir / MANIFEST} cannot be read: "
                f"{first_line(error)}. Train the run again."
            ) from None

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """The fields of `metrics.Evaluation` by phase and split.

        Raises:
            KerasTransferError: If the file is damaged.
        """
        try:
            text = (self.run_dir / METRICS).read_text(encoding="utf-8")
            values: dict[str, dict[str, Any]] = json.loads(text)
            return values
        except ValueError as error:
            raise KerasTransferError(
                f"{self.run_dir / METRICS} is damaged: {error}. Train the run again."
            ) from None

    @property
    def model_path(self) -> Path:
        """Path of the run's Keras model, from [0, 255] RGB pixels to probabilities."""
        return self.run_dir / MODEL

    def phase_model_path(self, phase: Phase) -> Path:
        """Returns the path of the Keras model of a phase.

        Raises:
            UsageError: If the run was not fine-tuned and `phase` is `finetune`.
        """
        manifest = self.manifest
        if phase == manifest.phase:
            return self.model_path
        if phase == "finetune" and manifest.finetune is None:
            raise UsageError(
                f"The run was not fine-tuned. Received: {self.run_dir}. "
                "Run: kt unfreeze-and-finetune "
                f"{shlex.quote(str(self.run_dir))}"
            )
        return self.run_dir / phase_model(phase)

    def check_resume(self, resume: bool | None) -> None:
        """Checks that a fine-tuning can be resumed, or started.

        Args:
            resume: Whether to continue an interrupted one; None only starts one if
                there is none to continue.

        Raises:
            UsageError: If it cannot.
        """
        exists = (self.checkpoint / CONFIG).exists()
        if resume and not exists:
            raise UsageError(
                f"There is nothing to go on with. Received: {self.run_dir} and "
                "resume=True. Start without it."
            )
        if exists and resume is None:
            raise UsageError(
                f"An earlier fine-tuning was not finished. Received: {self.run_dir}. "
                "Go on with resume=True, or start over with resume=False."
            )

    @property
    def checkpoint(self) -> Path:
        """Folder with the state of an unfinished phase."""
        return self.run_dir / CHECKPOINT

    @property
    def images_path(self) -> Path:
        """Path of the image table; `features.image_table` documents its columns."""
        return self.run_dir / IMAGES

    @property
    def audit_path(self) -> Path:
        """Path of the findings, an `Audit`; missing in runs of earlier versions."""
        return self.run_dir / AUDIT

    @property
    def far_path(self) -> Path:
        """Path of what tells far images; missing in runs of earlier versions."""
        return self.run_dir / FAR

    @property
    def predictions_path(self) -> Path:
        """Path of predictions.csv, with one line per image of the run."""
        return self.run_dir / PREDICTIONS

    @property
    def report_path(self) -> Path:
        """Path of the report page; missing if it was not wanted."""
        return self.run_dir / REPORT

    @property
    def splits_path(self) -> Path:
        """Path of splits.csv, with columns path,label,split,group."""
        return self.run_dir / SPLITS


def open_run(run: str | Path | Run) -> Run:
    """Opens a run by its directory or by its name under `saved_models/`.

    If a process was killed while changing the run, a change that it had committed is
    completed first, and leftovers of any other change are removed.

    Raises:
        UsageError: If no such run exists.
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
    """Reads several files of a run in one consistent state.

    A run may be replaced or fine-tuned between reading one file and the next. If that
    happens, `read` is called again.

    Args:
        run: The run.
        read: Reads files of the run.

    Returns:
        The result of `read`.

    Raises:
        KerasTransferError: If the run keeps changing.
    """

    def is_unchanged() -> bool:
        # The order matters because a commit moves the manifest last.
        return not (run.run_dir / _COMMITTED).exists() and run.identity == before

    for _ in range(_READS):
        _recover(run.run_dir)
        before = run.identity
        try:
            result = read()
        except Exception:  # the files may have belonged to two different runs
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
    """A run that is about to be created.

    Attributes:
        run_dir: The intended directory; after `building`, the actual one.
        replaces: The `identity` of the existing run that it replaces, if any.
    """

    run_dir: Path
    replaces: bytes | None = None


def new_run(runs_dir: Path, name: str, overwrite: bool) -> NewRun:
    """Checks where a new run will be created, before any work is done.

    Args:
        runs_dir: Directory that contains the runs.
        name: Name of the new run.
        overwrite: Whether an existing run of this name may be replaced.

    Raises:
        UsageError: If the name is not valid, or is taken and cannot be overwritten.
        KerasTransferError: If another process is changing the run to be overwritten.
    """
    if not re.fullmatch(r"[\w][\w.+-]*", name) or name.isdigit():
        raise UsageError(
            "A run's name is made of letters, digits and _.+-, starts with a letter, "
            f"digit or _ and is not only digits. Received: name={name!r}. Choose "
            "another."
        )
    run_dir = runs_dir / name
    remove_left_overs(runs_dir)
    _recover(run_dir)
    if not run_dir.exists():
        return NewRun(run_dir)
    if not overwrite:
        raise UsageError(
            f"The run exists already. Received: {run_dir}. Choose another with "
            "name=NEW, or replace it with overwrite=True."
        )
    if not (run_dir / MANIFEST).is_file():
        raise UsageError(
            f"Only a run can be overwritten, and this is something else. Received: "
            f"{run_dir}. Choose another name with name=NEW."
        )
    with only_process(run_dir):  # another one would write its results into the new run
        return NewRun(run_dir, Run(run_dir).identity)


def version_dirs(run_dir: Path) -> list[Path]:
    """Lists what TensorFlow Serving takes for versions, oldest first, even files."""
    found = [p for p in run_dir.iterdir() if p.name.isascii() and p.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name))


@contextlib.contextmanager
def building(new: NewRun) -> Iterator[Path]:
    """Yields a hidden directory to build a run in; on success it becomes the run.

    An existing run is replaced only if it is still the one in `new.replaces`. If it has
    changed or another process is changing it, the new run gets the next free name and
    `new.run_dir` is updated. Exported versions stay in place, so that a server always
    finds one.
    """
    parent = new.run_dir.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    with temporary_directory(parent) as staging:
        yield staging
        settle(staging)
        if new.replaces is None or not _replace(staging, new.run_dir, new.replaces):
            new.run_dir = rename_to_first_free(staging, numbered(new.run_dir))


def _replace(staging: Path, run_dir: Path, replaced: bytes) -> bool:
    """Replaces the run with this identity; returns False if that is not possible."""
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
    """Lists the entries of a run to delete when another run replaces it."""
    published = {SERVING, *(path.name for path in version_dirs(run_dir))}
    # Files that exist in both runs are replaced by a single rename.
    renewed = {path.name for path in staging.iterdir() if path.is_file()}
    return [
        path.name
        for path in run_dir.iterdir()
        if path.name not in published
        and not path.name.startswith(UNFINISHED)  # may belong to another process
        and not (path.name in renewed and path.is_file())
    ]


@contextlib.contextmanager
def updating(
    run_dir: Path, made_from: bytes | None = None, removed: Sequence[str] = ()
) -> Iterator[Path]:
    """Yields a hidden directory for new files that replace a run's files together.

    If the block succeeds, the directory is renamed, which commits the update. If the
    process is killed while moving the files into place, the next process that opens the
    run completes the update.

    Args:
        run_dir: The run's directory.
        made_from: The `identity` that the run must have; None for any.
        removed: Names in the run to delete.

    Raises:
        KerasTransferError: If the run's identity is not `made_from`.
    """
    with temporary_directory(run_dir) as staging:
        yield staging
        settle(staging)
        with committing(run_dir, made_from):
            _commit(staging, run_dir, removed)


@contextlib.contextmanager
def committing(run_dir: Path, made_from: bytes | None = None) -> Iterator[None]:
    """Keeps other processes from adding or replacing files of a run during the block.

    Args:
        run_dir: The run's directory.
        made_from: The `identity` that the run must have; None for any.

    Raises:
        KerasTransferError: If the run's identity is not `made_from`.
    """
    # Lock the parent: a training process may hold the run's own lock for hours.
    with locked(run_dir.resolve().parent, wait=True):
        _finish(run_dir)
        if made_from is not None and Run(run_dir).identity != made_from:
            raise _changed(run_dir)
        yield


def _commit(staging: Path, run_dir: Path, removed: Sequence[str]) -> None:
    write_atomic(staging / _REMOVED, json.dumps(removed))
    staging.rename(run_dir / _COMMITTED)  # the point of no return
    sync(run_dir)
    _finish(run_dir)


def _finish(run_dir: Path) -> None:
    """Completes a commit; can be repeated from any state that a killed process left."""
    committed = run_dir / _COMMITTED
    if not committed.is_dir():
        return
    removed = committed / _REMOVED
    # If directories cannot be locked, another process may be doing the same.
    with contextlib.suppress(FileNotFoundError):
        if removed.exists():
            for name in json.loads(removed.read_text()):
                remove(run_dir / name)
            sync(run_dir)
            removed.unlink()
            sync(committed)  # or a repeat could delete files that were already moved
        # Move the manifest last: until then, readers can tell that files are changing.
        for path in sorted(committed.iterdir(), key=lambda path: path.name == MANIFEST):
            _move(path, run_dir / path.name)
        committed.rmdir()
    sync(run_dir)


def _move(source: Path, target: Path) -> None:
    """Moves a file or folder; a folder is merged into an existing one."""
    if source.is_dir() and target.is_dir():
        for path in source.iterdir():
            _move(path, target / path.name)
        source.rmdir()
    else:
        source.replace(target)


def _recover(run_dir: Path) -> None:
    """Completes or undoes the change that a killed process was making to a run."""
    if (run_dir / _COMMITTED).is_dir():
        with committing(run_dir):
            pass
    if not run_dir.exists():  # version 0.1.0 moved a run away before replacing it
        pattern = f".replaced.????????/{glob.escape(run_dir.name)}"
        for moved in run_dir.parent.glob(pattern):
            moved.rename(run_dir)
            moved.parent.rmdir()
            break


def phase_model(phase: Phase) -> str:
    """Returns the file name of a phase's model if it is not the run's current model."""
    return f"model.{phase}.keras"


def phase_predictions(phase: Phase) -> str:
    """Returns the file name of an earlier phase's predictions, as `PREDICTIONS`."""
    return f"predictions.{phase}.csv"
