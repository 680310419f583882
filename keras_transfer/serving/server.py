"""What is done with a published bundle: predicting, and starting TensorFlow Serving.

Nothing here imports TensorFlow's Python.
"""

import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path

import numpy as np

from keras_transfer.data.folders import image_files
from keras_transfer.data.reading import read_files
from keras_transfer.data.tables import Prediction
from keras_transfer.errors import KerasTransferError, UsageError, refusal
from keras_transfer.runs.files import write_atomic
from keras_transfer.runs.run import SERVING, Run, open_run, version_dirs
from keras_transfer.runtime.c_api import Request, Session

IMAGE = "tensorflow/serving:2.20.0"
"""The container that serves: the first version that decodes WebP."""

_BATCH = 16
_TIMEOUT = 10  # seconds that docker's daemon has to answer

_MODELS = """\
# tensorflow_model_server --model_config_file=THIS_FILE
# In a container base_path must be there too, and with it this file:
# docker run -v BASE_PATH:BASE_PATH ... {image} --model_config_file=THIS_FILE
model_config_list {{
  config {{
    name: "{name}"
    base_path: "{base_path}"
    model_platform: "tensorflow"
  }}
}}
"""

_BATCHING = """\
# tensorflow_model_server --enable_batching --batching_parameters_file=THIS_FILE
# Requests that wait at the same time are answered together. Under load that gives
# more answers a second; a lone request waits batch_timeout_micros longer.
# What is answered together fails together: an unusable image fails the requests beside
# it, and so do images of different sizes in requests to predict_images. Where either
# is common, send files and leave batching off.
max_batch_size { value: 1024 }  # images in a request, which is split
enable_large_batch_splitting { value: true }
max_execution_batch_size { value: 32 }
batch_timeout_micros { value: 2000 }
max_enqueued_batches { value: 64 }
# num_batch_threads is left to the server: as many as it has cores.
"""


def predict_bundle(
    bundle: str | Path,
    paths: str | Path | Iterable[str | Path],
    recursive: bool = False,
) -> tuple[list[str], Iterator[Prediction]]:
    """Predicts images with what `kt export` published, by TensorFlow's C++ runtime.

    Args:
        bundle: A version directory, such as `saved_models/RUN/1`.
        paths: Image files, and folders of them; or one.
        recursive: Whether folders inside folders are searched too.

    Returns:
        (class names, a prediction an image, in order).

    Raises:
        UsageError: If there is no such bundle or path.
        KerasTransferError: If it cannot be loaded.
    """
    sources = list(image_files(paths, recursive))
    session = Session(Path(bundle))
    return session.about["labels"], _predictions(session, sources)


def _predictions(session: Session, sources: Sequence[str]) -> Iterator[Prediction]:
    batch: list[tuple[str, bytes | OSError]] = []
    with session:
        for item in read_files(sources, Path()):
            batch.append(item)
            if len(batch) == _BATCH:
                yield from _predict_batch(session, batch)
                batch = []
        yield from _predict_batch(session, batch)


def _predict_batch(
    session: Session, batch: Sequence[tuple[str, bytes | OSError]]
) -> Iterator[Prediction]:
    def probabilities(files: Sequence[bytes]) -> np.ndarray:
        inputs = {"image_bytes": np.array(files, object)}
        return session.run(Request("serving_default", inputs))["probabilities"]

    files = [encoded for _, encoded in batch if isinstance(encoded, bytes)]
    try:
        rows: Iterator[np.ndarray] | None = iter(probabilities(files) if files else ())
    except KerasTransferError:
        rows = None  # an image is unusable: one by one it turns out which
    for source, encoded in batch:
        if isinstance(encoded, OSError):
            yield Prediction(source, None, f"cannot be read: {encoded.strerror}")
        elif rows is not None:
            yield Prediction(source, next(rows))
        else:
            try:
                yield Prediction(source, probabilities([encoded])[0])
            except KerasTransferError as error:
                yield Prediction(source, None, refusal(str(error), len(encoded)))


def server_command(
    run: str | Path | Run,
    port: int,
    rest_port: int,
    host: str = "127.0.0.1",
    flags: Sequence[str] = (),
) -> list[str]:
    """The command that serves a run: TensorFlow Serving's binary, or its container.

    Args:
        run: A run or its directory.
        port: Of gRPC.
        rest_port: Of HTTP.
        host: The IPv4 address that both are at. The binary listens at all of the
            machine's and takes no option for it: it is used for 0.0.0.0 alone.
        flags: More of tensorflow_model_server's.

    Raises:
        UsageError: If nothing was exported, or the host is no such address.
        KerasTransferError: If there is nothing to serve with at that address.
    """
    run = open_run(run)
    if not version_dirs(run.run_dir):
        raise UsageError(
            f"The run has no version to serve. Received: {run.run_dir}. Run: "
            f"kt export {run.run_dir}"
        )
    is_everywhere = _is_everywhere(host)
    run_dir, name = run.run_dir.resolve(), run.run_dir.resolve().name
    server, docker = shutil.which("tensorflow_model_server"), shutil.which("docker")
    if server and is_everywhere:
        return [server, *_arguments(port, rest_port, name, str(run_dir)), *flags]
    trouble = _docker_trouble(docker) if docker else "No docker is on PATH."
    if docker and not trouble:
        base_path = f"/models/{name}"
        return [
            *(docker, "run", "--rm"),
            # The image's own entry point is a script that lets no Ctrl-C through.
            *("--init", "--entrypoint", "tensorflow_model_server"),
            *("-p", f"{host}:{port}:8500", "-p", f"{host}:{rest_port}:8501"),
            *("--mount", f"type=bind,source={run_dir},target={base_path},readonly"),
            IMAGE,
            *_arguments(8500, 8501, name, base_path),
            *flags,
        ]
    if server:
        raise KerasTransferError(
            "tensorflow_model_server listens at every address of this machine and has "
            f"no option for one. Received: --host {host}. {trouble} Start docker, or "
            "give --host 0.0.0.0 if whoever reaches this machine may ask."
        )
    raise KerasTransferError(
        "TensorFlow Serving cannot be started. Received: no tensorflow_model_server on "
        f"PATH. {trouble} Install the first as "
        "https://www.tensorflow.org/tfx/serving/setup says, or start docker and "
        f"`docker pull {IMAGE}`."
    )


def _is_everywhere(host: str) -> bool:
    """Whether an IPv4 address stands for all of the machine's."""
    try:
        return IPv4Address(host).is_unspecified
    except AddressValueError:
        raise UsageError(
            f"The host is no IPv4 address. Received: {host!r}. Give 127.0.0.1 for this "
            "machine alone, or 0.0.0.0 for whoever reaches it."
        ) from None


def _docker_trouble(docker: str) -> str:
    """Why docker cannot run a container: its client says so too, but later; or ""."""
    try:
        asked = subprocess.run(
            [docker, "version"], capture_output=True, text=True, timeout=_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return f"Docker has no daemon that answers (in {_TIMEOUT} s)."
    if asked.returncode:
        said = (asked.stderr.strip() or "it says nothing").splitlines()[-1]
        return f"Docker has no daemon that answers ({said.rstrip('.')})."
    return ""


def _arguments(port: int, rest_port: int, name: str, base_path: str) -> list[str]:
    return [
        f"--port={port}",
        f"--rest_api_port={rest_port}",
        f"--model_name={name}",
        f"--model_base_path={base_path}",
    ]


def write_serving_config(run: str | Path | Run) -> tuple[Path, Path]:
    """Writes a run's `serving/models.config` and `serving/batching.config`.

    Returns:
        Their paths.
    """
    run = open_run(run)
    folder, run_dir = run.run_dir / SERVING, run.run_dir.resolve()
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)  # whatever the umask, for the server reads it
    models, batching = folder / "models.config", folder / "batching.config"
    name, base_path = (
        text.replace("\\", "\\\\").replace('"', '\\"')
        for text in (run_dir.name, str(run_dir))
    )
    write_atomic(models, _MODELS.format(name=name, base_path=base_path, image=IMAGE))
    write_atomic(batching, _BATCHING)
    return models, batching
