"""Photos that the tests make, and a `kt` that runs in this process."""

import contextlib
import gc
import io
import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from keras_transfer.cli import main
from keras_transfer.events import Listener

CLASSES = ("circle", "square", "stripes")

RUN_FILES = {
    "audit.json",
    "config.yaml",
    "far.npz",
    "history.csv",
    "images.parquet",
    "labels.txt",
    "manifest.json",
    "metrics.json",
    "model.keras",
    "predictions.csv",
    "skipped.csv",
    "splits.csv",
}
"""What `kt fit --no-report` leaves."""


class Told(Listener):
    """Keeps what it is told.

    Attributes:
        notes, steps, epochs, artifacts: The arguments of each call.
    """

    def __init__(self, on_progress: Callable[..., object] = lambda *_: None):
        self.notes: list[str] = []
        self.steps: list[tuple[str, int, int]] = []
        self.epochs: list[tuple[str, int, dict[str, float]]] = []
        self.artifacts: list[tuple[Path, str]] = []
        self._on_progress = on_progress

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, step: str, done: int, total: int) -> None:
        self.steps.append((step, done, total))
        self._on_progress(step, done, total)

    def epoch(self, phase: str, number: int, figures) -> None:
        self.epochs.append((phase, number, dict(figures)))

    def artifact(self, path: Path, kind: str) -> None:
        self.artifacts.append((path, kind))


@pytest.fixture(autouse=True)
def _own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has its own working and cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True, scope="module")
def _collect_garbage() -> Iterator[None]:
    """Frees the graphs of a file's tests, which are cycles of gigabytes."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three class folders of 20 small JPEGs each, easy to tell apart."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir()
        for index in range(20):
            path = folder / name / f"{index:02d}.jpg"
            path.write_bytes(encode(draw(name, rng), "JPEG"))
    return folder


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """A directory that other users may look into, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture
def kt() -> Callable[..., Result]:
    """Runs `kt ARGUMENT...` here; the result has exit_code, stdout and stderr."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MB, for tests that fill it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk: Path, left: int) -> None:
    """Leaves some bytes of a disk free."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    found = os.statvfs(disk)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - left)


@contextlib.contextmanager
def without_root_powers() -> Iterator[None]:
    """Runs as a user whom file permissions bind."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(65_534, 65_534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture(scope="module")
def other_process() -> Iterator[Executor]:
    """A process to measure memory in; a crash of it fails the test that waits."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


def draw(name: str, rng: np.random.Generator, size: int = 72) -> np.ndarray:
    """uint8 `[size, size, 3]`: the shape somewhere, in some color, on noise."""
    y, x = np.mgrid[:size, :size]
    center = rng.uniform(0.35, 0.65, 2) * size
    radius = rng.uniform(0.2, 0.3) * size
    if name == "circle":
        inside = np.hypot(y - center[0], x - center[1]) < radius
    elif name == "square":
        inside = np.maximum(abs(y - center[0]), abs(x - center[1])) < radius
    else:
        inside = (x + y + int(center[0])) % 16 < 8
    background = rng.integers(0, 80, (size, size, 3))
    color = rng.integers(150, 256, 3)
    return np.where(inside[..., None], color, background).astype(np.uint8)


def encode(pixels: np.ndarray, form: str, **options: object) -> bytes:
    """The bytes of an image file, written by Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()
