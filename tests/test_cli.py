"""`kt` itself: start-up, usage mistakes, and what is documented."""

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from keras_transfer.bases import BASES
from keras_transfer.cli import main
from keras_transfer.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(group: click.Group = main, prefix: str = "kt") -> dict[str, click.Command]:
    found = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= commands(command, f"{prefix} {name}")
        else:
            found[f"{prefix} {name}"] = command
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["fit", "--help"],
        ["unfreeze-and-finetune", "--help"],
        ["bases"],
        ["cache", "list"],
    ],
)
def test_what_needs_no_tensorflow_does_not_import_it(arguments):
    script = (
        "import sys\n"
        "from keras_transfer.cli import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "heavy = {'tensorflow', 'keras', 'openvino', 'sklearn', 'scipy'}\n"
        "sys.exit(bool(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "/nowhere"], ["DATA does not exist", "/nowhere"]),
        (["fit"], ["No data given"]),
        (["fit", "digits", "--base", "resnet5"], ["resnet5", "ResNet50"]),
        (["fit", "digits", "--set", "hed.kind=mlp"], ["'hed'", "'head'"]),
        (["fit", "digits", "--head", "tree"], ["tree", "linear"]),
        (["fit", "digits", "--name", "7"], ["'7'", "--name"]),
        (["fit", "digits", "--weights", "nope.h5"], ["nope.h5"]),
        (["fit", "digits", "--image-size", "3"], ["image_size", "3"]),
        (["fit", "--config", "nope.yaml"], ["nope.yaml"]),
        (["unfreeze-and-finetune", "nowhere"], ["nowhere", "kt fit"]),
        (["evaluate", "nowhere"], ["nowhere", "kt fit"]),
        (["predict", "nowhere", "x.jpg"], ["nowhere"]),
        (["export", "nowhere"], ["nowhere"]),
    ],
)
def test_a_mistake_in_usage_is_one_line_and_exits_with_2(kt, arguments, words):
    result = kt(*arguments)
    assert result.exit_code == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    for word in words:
        assert word in last
    assert "Traceback" not in result.output
    assert not list(Path("saved_models").glob("*"))


@pytest.mark.parametrize("command", ["fit", "advise", "rank"])
@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("data", ["nowhere"]),
        ("csv", ["line 3", "3 cells"]),
        ("cache", ["cache", "--cache-dir"]),
        ("runs", ["runs directory", "--runs-dir"]),
        ("name", ["exists already"]),
    ],
)
def test_mistakes_are_found_before_tensorflow_is_imported(
    tmp_path, photos, command, mistake, words
):
    if command != "fit" and mistake in ("runs", "name"):
        pytest.skip("only kt fit makes a run")
    (tmp_path / "a file").touch()
    (tmp_path / "bad.csv").write_text("path,label\n1.jpg,a\nb, 2.jpg,b\n")
    (tmp_path / "saved_models/taken").mkdir(parents=True)
    options = {
        "data": ["nowhere"],
        "csv": ["bad.csv"],
        "cache": [str(photos), "--cache-dir", "a file/cache"],
        "runs": [str(photos), "--runs-dir", "a file/runs"],
        "name": [str(photos), "--name", "taken"],
    }
    script = (
        "import sys\n"
        "from keras_transfer.cli import main\n"
        "try:\n"
        f"    main({[command, *options[mistake]]!r})\n"
        "finally:\n"
        "    heavy = {'tensorflow', 'keras', 'openvino', 'sklearn', 'scipy'}\n"
        "    print(*heavy & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout.split() == []
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ") and all(word in line for word in words)


def test_debug_shows_where_an_error_comes_from():
    command = [sys.executable, "-m", "keras_transfer.cli", "--debug", "fit", "/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_nothing_but_our_own_words_is_printed(photos, tmp_path):
    command = [sys.executable, "-m", "keras_transfer.cli", "fit", photos]
    options = ["--image-size", "32", "--weights", "none", "--name", "quiet"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("- ") for line in done.stderr.splitlines())
    assert "accuracy" in done.stdout and "Next: kt predict" in done.stdout


def test_the_cache_is_listed_and_pruned(kt, photos):
    kt("fit", photos, "--image-size", 32, "--name", "x")
    assert "efficientnet_lite0" in kt("cache", "list").stdout
    path = Path(kt("cache", "path").stdout.strip())
    assert len(list(path.iterdir())) == 1
    assert kt("cache", "prune").stdout.startswith("0 tables")
    assert kt("cache", "prune", "--unused-days", 0).stdout.startswith("1 tables")
    assert list(path.iterdir()) == []


def test_every_base_is_listed(kt):
    lines = kt("bases").stdout.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [base.name for base in BASES]


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_is_documented_and_shows_an_example(name):
    assert name in README
    command = commands()[name]
    assert command.help
    assert len(command.help.splitlines()) <= 15
    if command.params and name.split()[1] != "cache":
        assert f"{name} " in command.help


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=str)
def test_every_config_parses_and_says_what_it_is_for(path):
    load_config(path)
    text = path.read_text(encoding="utf-8")
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert f"kt fit --config configs/{path.name}" in text
    assert any(line.startswith("# Purpose:") for line in header)
    assert any(line.startswith("# Expected:") for line in header)
    assert path.name in README
    assert isinstance(yaml.safe_load(text), dict)
