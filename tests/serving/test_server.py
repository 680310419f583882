"""What is done with a published bundle: predicting, and starting TensorFlow Serving."""

import csv
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import text_format
from test_export import EXPORT, SIZE, WHOLE, strings, tiny_model

import keras_transfer
from keras_transfer.errors import KerasTransferError
from keras_transfer.runtime.c_api import Request, answer_elsewhere
from keras_transfer.serving import server as serving


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A run that tests only read or copy, with a model that is fast to export."""
    runs_dir = tmp_path_factory.mktemp("runs")
    options = {"image_size": SIZE, "name": "photos", "folds": 2, "report": False}
    folders = {"runs_dir": runs_dir, "cache_dir": runs_dir / "cache"}
    run = keras_transfer.fit(str(photos), **folders, **options)
    tiny_model().save(run.run_dir / "model.keras")
    run.far_path.unlink()  # of the features of the model before
    return run.run_dir


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    """Its version, which tests only read."""
    return keras_transfer.export(trained)


@pytest.fixture
def run_dir(exported: Path, tmp_path: Path) -> Path:
    """A copy of the run with its version."""
    return shutil.copytree(exported.parent, tmp_path / "copy")


def python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Runs code in a process of its own, as a user's, who set nothing."""
    unset = ("TF_CPP_MIN_LOG_LEVEL", "TF_FORCE_GPU_ALLOW_GROWTH")
    environment = {key: os.environ[key] for key in os.environ if key not in unset}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


# Predicting


def test_predictions_of_a_bundle_are_those_of_its_run(
    kt, exported, trained, photos, tmp_path
):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no")
    paths = (photos / "circle", "broken.jpg", "missing.png", photos / "square/00.jpg")
    of_bundle = kt("predict", "--bundle", exported, *paths)
    assert of_bundle.exit_code == 0, of_bundle.output
    of_run = kt("predict", trained, *paths)
    assert of_run.exit_code == 0, of_run.output
    one, other = (
        list(csv.DictReader(io.StringIO(result.stdout)))
        for result in (of_bundle, of_run)
    )
    assert len(one) == 23
    for row, expected in zip(one, other, strict=True):
        score, expected_score = row.pop("score_1"), expected.pop("score_1")
        assert row == expected
        if score:
            assert float(score) == pytest.approx(float(expected_score), abs=1e-4)


def test_a_bundle_is_used_without_tensorflows_python(exported, photos):
    code = (
        "import sys; from keras_transfer.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert not {'tensorflow', 'keras', 'sklearn'} & set(sys.modules)"
    )
    image = photos / "circle" / "00.jpg"
    Path("junk.jpg").write_bytes(b"junk")
    result = python(code, "predict", "--bundle", exported, image, "junk.jpg")
    assert result.returncode == 0, result.stderr
    assert result.stderr == "1 of 2 images were not classified.\n"
    assert "junk.jpg,not an image" in result.stdout
    assert re.search(r"00.jpg,,(circle|square|stripes),0\.", result.stdout)


@pytest.mark.parametrize("where", ["", "missing", "photos"])
def test_what_is_no_bundle_is_a_usage_error(kt, trained, photos, where):
    bundle = {"": trained, "missing": trained / "99", "photos": photos}[where]
    result = kt("predict", "--bundle", bundle, photos / "circle" / "00.jpg")
    assert result.exit_code == 2
    assert "no version directory" in result.stderr


def test_a_damaged_bundle_is_one_line(kt, exported, photos, tmp_path):
    copy = tmp_path / "1"
    shutil.copytree(exported, copy)
    whole = (copy / "saved_model.pb").read_bytes()
    (copy / "saved_model.pb").write_bytes(whole[: len(whole) // 2])
    result = kt("predict", "--bundle", copy, photos / "circle" / "00.jpg")
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1


PREDICT = (
    "import sys\n"
    "from keras_transfer.serving.server import predict_bundle\n"
    "def predict():\n"
    "    found = predict_bundle(*sys.argv[1:2], sys.argv[2:3])\n"
    "    return [row.probabilities.tolist() for row in found.rows]\n"
)
HANDSHAKE = """
import socket, ssl, threading
server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
server.load_cert_chain(sys.argv[3])
listener = socket.create_server(("127.0.0.1", 0))

def answer():
    with server.wrap_socket(listener.accept()[0], server_side=True) as connection:
        connection.sendall(b"hello")

threading.Thread(target=answer, daemon=True).start()
client = ssl.create_default_context(cafile=sys.argv[3])
plain = socket.create_connection(listener.getsockname(), timeout=60)
with client.wrap_socket(plain, server_hostname="localhost") as connection:
    print(connection.recv(5).decode(), connection.version())
"""


def test_after_a_bundle_was_used_https_works(exported, photos):
    certificate = Path(__file__).with_name("localhost.pem")
    code = f"{PREDICT}assert predict()\n{HANDSHAKE}"
    result = python(code, exported, photos / "circle" / "00.jpg", certificate)
    assert result.stdout == "hello TLSv1.3\n", result.stderr


def test_after_a_bundle_was_loaded_hashlib_is_imported(exported):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from keras_transfer.runtime.c_api import Session\n"
        "with Session(Path(sys.argv[1])):\n"
        "    assert not {'hashlib', '_hashlib', '_ssl'} & set(sys.modules)\n"
        "    import hashlib\n"
        "    print(hashlib.new('sha512', b'x', usedforsecurity=False).digest_size)"
    )
    result = python(code, exported)
    assert result.stdout == "64\n", (result.returncode, result.stderr)


IMPORT = "import tensorflow as tf; assert tf.reduce_sum(tf.range(4)) == 6\n"


@pytest.mark.long
@pytest.mark.parametrize(
    "code",
    [
        PREDICT + "before = predict()\n" + IMPORT + "print(before == predict())",
        PREDICT + IMPORT + "print(predict() == predict() != [])\n" + IMPORT,
    ],
    ids=["bundle-first", "tensorflow-first"],
)
def test_bundles_and_tensorflow_are_used_in_one_process(exported, photos, code):
    result = python(code, exported, photos / "circle" / "00.jpg")
    assert result.stdout == "True\n", (result.returncode, result.stderr)


def test_the_process_that_verifies_sees_no_gpu(exported, tmp_path, monkeypatch):
    seen, shown = tmp_path / "seen", tmp_path / "python"
    shown.write_text(
        f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES" >{seen}\nexec {sys.executable} "$@"'
    )
    shown.chmod(0o755)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(sys, "executable", str(shown))
    request = Request("serving_default", {"image_bytes": strings(WHOLE)})
    (answer,) = answer_elsewhere(exported, [request])
    assert answer["probabilities"].shape == (1, 3)
    assert seen.read_text() == "-1\n"


@pytest.mark.parametrize("given", [None, "false"])
def test_tensorflow_takes_of_a_gpu_what_it_needs_unless_told_otherwise(given):
    own = f"import os; os.environ['TF_FORCE_GPU_ALLOW_GROWTH'] = {given!r}\n"
    shown = "import os; print(os.environ['TF_FORCE_GPU_ALLOW_GROWTH'])"
    result = python(f"{own if given else ''}import keras_transfer\n{shown}")
    assert result.stdout == f"{given or 'true'}\n", result.stderr


# Starting a server


def test_serving_config_names_the_run(kt, run_dir):
    result = kt("export", run_dir, "--format", "keras", "--write-serving-config")
    assert result.exit_code == 0, result.output
    models, batching = result.stdout.splitlines()[1:]
    from tensorflow_serving.config import model_server_config_pb2

    config = text_format.Parse(
        Path(models).read_text(), model_server_config_pb2.ModelServerConfig()
    )
    (model,) = config.model_config_list.config
    assert (model.name, model.base_path) == ("copy", str(run_dir.resolve()))
    lines = Path(batching).read_text().splitlines()
    assert "enable_large_batch_splitting { value: true }" in lines
    assert "max_execution_batch_size { value: 32 }" in lines
    # Without it a server takes as many as it has cores: those of this machine are not
    # written into it.
    assert not [line for line in lines if line.startswith("num_batch_threads")]


def put_on_path(monkeypatch, folder: Path, **scripts: str) -> None:
    """Makes these, and nothing else, the programs that are found."""
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


PRINTS = """printf '%s\\n' "$0" "$@\""""
"""A program that starts, and says what it was given."""

NO_DAEMON = "echo Cannot connect to the Docker daemon. >&2; exit 1"


def served(run_dir: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [*EXPORT, "serve", run_dir, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_serve_starts_a_container_for_this_machine_alone(
    run_dir, tmp_path, monkeypatch
):
    scripts = {"docker": PRINTS, "tensorflow_model_server": "exit 1"}
    put_on_path(monkeypatch, tmp_path / "bin", **scripts)
    result = served(run_dir, "--rest-port", "9000", "--", "--enable_batching", "--x=1")
    assert result.returncode == 0, result.stderr
    assert "http://localhost:9000/v1/models/copy" in result.stderr
    assert result.stdout.splitlines() == [
        str(tmp_path / "bin" / "docker"),
        *("run", "--rm", "--init", "--entrypoint", "tensorflow_model_server"),
        *("-p", "127.0.0.1:8500:8500", "-p", "127.0.0.1:9000:8501"),
        *("--mount", f"type=bind,source={run_dir},target=/models/copy,readonly"),
        serving.IMAGE,
        *("--port=8500", "--rest_api_port=8501"),
        *("--model_name=copy", "--model_base_path=/models/copy"),
        *("--enable_batching", "--x=1"),
    ]


def test_where_all_may_ask_serve_starts_the_server(run_dir, tmp_path, monkeypatch):
    scripts = {"docker": "exit 1", "tensorflow_model_server": PRINTS}
    put_on_path(monkeypatch, tmp_path / "bin", **scripts)
    result = served(run_dir, "--host", "0.0.0.0", "--port", "9001", "--", "--x=1")
    assert result.returncode == 0, result.stderr
    assert "http://localhost:8501/v1/models/copy" in result.stderr
    assert result.stdout.splitlines() == [
        str(tmp_path / "bin" / "tensorflow_model_server"),
        *("--port=9001", "--rest_api_port=8501"),
        *("--model_name=copy", f"--model_base_path={run_dir}"),
        "--x=1",
    ]


def test_a_container_is_at_the_address_that_is_given(run_dir, tmp_path, monkeypatch):
    put_on_path(monkeypatch, tmp_path / "bin", docker=PRINTS)
    result = served(run_dir, "--host", "192.0.2.7")
    assert result.returncode == 0, result.stderr
    assert "192.0.2.7:8500:8500" in result.stdout.splitlines()
    assert "http://192.0.2.7:8501/v1/models/copy" in result.stderr


@pytest.mark.parametrize(
    ("scripts", "said"),
    [
        ({"docker": NO_DAEMON}, "answers (Cannot connect to the Docker daemon)."),
        ({"docker": NO_DAEMON}, f"`docker pull {serving.IMAGE}`"),
        ({}, "No docker is on PATH. Install"),
        ({}, "tensorflow.org/tfx/serving/setup"),
        ({"tensorflow_model_server": PRINTS}, "Received: --host 127.0.0.1. No docker"),
        (
            {"tensorflow_model_server": PRINTS, "docker": NO_DAEMON},
            "daemon). Start docker, or give --host 0.0.0.0",
        ),
    ],
)
def test_what_cannot_serve_this_machine_alone_is_one_line(
    kt, run_dir, monkeypatch, tmp_path, scripts, said
):
    put_on_path(monkeypatch, tmp_path / "bin", **scripts)
    result = kt("serve", run_dir)
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert said in result.stderr


def test_a_daemon_that_hangs_is_not_waited_for(run_dir, monkeypatch, tmp_path):
    put_on_path(monkeypatch, tmp_path / "bin", docker="exec /bin/sleep 600")
    monkeypatch.setattr(serving, "DAEMON_SECONDS", 0.5)
    with pytest.raises(KerasTransferError, match="no daemon that answers .in 0.5 s."):
        serving.server_command(run_dir, 8500, 8501)


@pytest.mark.parametrize("host", ["localhost", "::1", "127.0.0.1:80", ""])
def test_a_host_that_is_no_address_is_a_usage_error(kt, run_dir, host):
    result = kt("serve", run_dir, "--host", host)
    assert result.exit_code == 2
    assert f"no IPv4 address. Received: {host!r}" in result.stderr


def test_without_a_version_there_is_nothing_to_serve(kt, run_dir, exported):
    shutil.rmtree(run_dir / exported.name)
    result = kt("serve", run_dir)
    assert result.exit_code == 2
    assert f"kt export {run_dir}" in result.stderr


def test_the_readme_names_the_image_that_is_started():
    readme = Path(__file__).parents[2] / "README.md"
    named = re.findall(r"tensorflow/serving:?\S*", readme.read_text())
    assert set(named) == {serving.IMAGE}
