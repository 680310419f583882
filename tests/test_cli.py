"""`kt` itself: start-up, usage mistakes, and what is documented."""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from keras_transfer.cli import main
from keras_transfer.config import USUAL_NAMES, load_config
from keras_transfer.evaluation.metrics import evaluate
from keras_transfer.features.cache import FeatureCache
from keras_transfer.features.shards import FeatureSpec
from keras_transfer.features.throughput import Throughput, remember, remembered
from keras_transfer.markup import printable
from keras_transfer.models.bases import BASES
from keras_transfer.terminal import show_evaluation

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
        ["runs", "--help"],
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


def test_the_command_line_starts_without_what_only_some_commands_need():
    script = (
        "import sys, keras_transfer.cli\n"
        "sys.exit(bool({'numpy', 'rich', 'tensorflow'} & set(sys.modules)))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "/nowhere"], ["DATA does not exist", "/nowhere"]),
        (["fit"], ["No data given"]),
        (["fit", "digits", "--base", "resnet5"], ["resnet5", "ResNet50"]),
        (["fit", "digits", "--set", "hed.kind=mlp"], ["'hed'", "'head'"]),
        (["fit", "digits", "--head", "tree"], ["tree", "linear"]),
        (["fit", "digits", "--class-weight", "1=-2"], ["head.class_weight", "-2"]),
        (["fit", "digits", "--class-weight", "1=nan"], ["head.class_weight", "nan"]),
        (["fit", "digits", "--logit-adjustment", "11"], ["logit_adjustment", "11"]),
        (["fit", "digits", "--metric", "f1"], ["f1", "macro_f1"]),
        (["fit", "digits", "--folds", "1"], ["folds", "at least 2"]),
        (["fit", "digits", "--abstain-at-accuracy", "1"], ["abstain_at", "below 1"]),
        (["fit", "digits", "--set", "splits.val=0.1"], ["splits.val", "splits.test"]),
        (["fit", "digits", "--name", "7"], ["--name '7'"]),
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("balanced", "balanced"),
        ("none", "none"),
        ("cat=2,dog=1", {"cat": 2, "dog": 1}),
        (" cat = 2 , red fox=.5 ", {"cat": 2, "red fox": 0.5}),
        ("a.b=1e-3,head.kind=0", {"a.b": 1e-3, "head.kind": 0}),
        ("a=b=2,none=3", {"a=b": 2, "none": 3}),
        ("狐=2,1=3", {"狐": 2, "1": 3}),
    ],
)
def test_weights_of_classes_are_names_and_numbers(text, expected):
    context = commands()["kt fit"].make_context("fit", ["x", "--class-weight", text])
    given = context.params["head__class_weight"]
    assert given == expected
    config = load_config(None, {"data": "x", "head.class_weight": given})
    assert config.head.class_weight == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cat",
        "cat=",
        "=2",
        "cat=2,dog",
        "cat=x",
        "cat=2,",
        "cat=2,cat=3",
        "Balanced",
    ],
)
def test_weights_of_another_form_are_a_mistake_in_usage(kt, text):
    result = kt("fit", "/nowhere", "--class-weight", text)
    assert result.exit_code == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: Invalid value for '--class-weight'")
    assert repr(text) in last and "cat=2,dog=1" in last


@pytest.mark.parametrize("command", ["fit", "advise", "rank"])
@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("data", ["nowhere"]),
        ("csv", ["line 3", "3 cells"]),
        ("cache", ["cache", "--cache-dir"]),
        ("runs", ["runs directory", "--runs-dir"]),
        ("name", ["exists already", "--name NEW", "--overwrite"]),
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


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ("photos", ["--class-weight", "sqare=2"], ["'sqare'", "'square'?", "circle, "]),
        ("photos", ["--abstain-at-accuracy", "0.95"], ["--abstain-at", "59", "51"]),
        ("photos", ["--folds", "60"], ["60 folds", "51"]),
        ("several.csv", ["--metric", "accuracy"], ["--metric accuracy", "multi-label"]),
        ("several.csv", ["--logit-adjustment", "1"], ["--logit-adjustment 1"]),
        (
            "many.csv",
            ["--class-weight", "x=2"],
            ["'x'. Classes are c0, c1, c10, c11, "],
        ),
    ],
)
def test_options_that_do_not_fit_the_images_are_found_before_tensorflow_is_imported(
    tmp_path, photos, data, options, words
):
    rows = [f"{i}.jpg,a{'|b' * (i % 2)}" for i in range(40)]
    (tmp_path / "several.csv").write_text("\n".join(["path,label", *rows]))
    rows = [f"{i}.jpg,c{i // 2}" for i in range(80)]
    (tmp_path / "many.csv").write_text("\n".join(["path,label", *rows]))
    for i in range(80):
        (tmp_path / f"{i}.jpg").touch()
    script = (
        "import sys\n"
        "import keras_transfer.cli\n"
        "try:\n"
        f"    keras_transfer.cli.main({['fit', *[data], *options]!r})\n"
        "finally:\n"
        "    print(*{'tensorflow', 'keras', 'openvino'} & set(sys.modules))\n"
    ).replace("'photos'", repr(str(photos)))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout.split() == []
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ") and all(word in line for word in words)
    assert "c13" not in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"path,image,label\na,b,x\n", ["'path', 'image'", "--path-column path."]),
        (b"path,label,category\na,x,y\n", ["--label-column label."]),
        (b"path,dx\na,x\n", ["no column label, class,", "--label-column NAME."]),
        (bytes(128) + b"DICM" + bytes(9), ["This is an image (DICOM), not a table."]),
    ],
)
def test_a_table_that_is_not_understood_is_one_line(kt, content, words):
    Path("data.csv").write_bytes(content)
    result = kt("fit", "data.csv")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert all(word in line for word in words)
    assert line.isprintable() and "\\x00" not in line


def test_the_usual_names_of_columns_are_in_the_help(kt):
    said = " ".join(kt("fit", "--help").output.split())
    for names in USUAL_NAMES.values():
        assert f"[default: {', '.join(names[:-1])} or {names[-1]}]" in said


def test_the_name_of_data_is_shown_as_it_is(capsys):
    found = evaluate(np.arange(20) % 2, np.eye(2, dtype="f4")[np.arange(20) % 2], "ab")
    show_evaluation(found, "my_photos_x")
    assert capsys.readouterr().out.startswith("my_photos_x: accuracy 1.000")


def test_classes_without_images_have_no_figures_and_come_last(capsys):
    targets = np.arange(20) % 2 + 1
    said = np.eye(3, dtype="f4")[np.where(np.arange(20) < 15, targets, 0)]
    found = evaluate(targets, said, ["absent", "b", "c"])
    show_evaluation(found, "test")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[-1] == ["absent", *"–––", "0"]
    assert ["accuracy", "0.750"] in [line[:2] for line in lines]
    shown = found._repr_html_()
    assert shown.index(">b<") < shown.index(">absent<")
    assert shown.count("<td style='text-align:right'>–</td>") == 3
    assert ">macro F1<" in shown and ">ROC AUC<" in shown


def test_nothing_but_our_own_words_is_printed(photos, tmp_path):
    command = [sys.executable, "-m", "keras_transfer.cli", "fit", photos]
    options = ["--image-size", 32, "--weights", "none", "--folds", 2, "--name", "quiet"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
    done = subprocess.run(
        [*command, *map(str, options)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("- ") for line in done.stderr.splitlines())
    assert "accuracy" in done.stdout and "Next: kt predict" in done.stdout


HOSTILE = "\x1b[31m\x9bJ\u202e\u2028\r\n\x7f"
ESCAPED = r"\x1b[31m\x9bJ\u202e\u2028\r\n\x7f"


def test_what_steers_a_terminal_is_escaped():
    assert printable(HOSTILE) == ESCAPED
    assert printable("\udcff\ud800\u2066") == r"\udcff\ud800\u2066"
    ordinary = "C:\\photos\\n é 日本\u3000 \u200d\U0001f600 شکل\u200cها"
    assert printable(ordinary) == ordinary


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", f"/nowhere/{HOSTILE}"],
        ["evaluate", f"nowhere{HOSTILE}"],
        ["bases", HOSTILE],
        [HOSTILE],
        ["fit", "digits", "--set", HOSTILE],
        ["fit", "--config", HOSTILE],
    ],
)
def test_errors_show_names_escaped(kt, arguments):
    result = kt(*arguments)
    assert result.exit_code == 2
    last = result.stderr.rstrip("\n").split("\n")[-1]
    assert last.startswith("Error: ")
    assert ESCAPED in last or ESCAPED.replace("\\", "\\\\") in last
    assert last.isprintable()


posix = pytest.mark.skipif(os.name != "posix", reason="names files freely")


def run_kt(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    """`kt ARGUMENT...` in another process, which may write ASCII only."""
    command = [sys.executable, "-m", "keras_transfer.cli", *map(str, arguments)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, env=environment, check=False, **options
    )


def test_debug_shows_where_an_error_comes_from():
    done = run_kt("--debug", "fit", "/nowhere/é\x1b[31m", capture_output=True)
    assert done.returncode == 1
    assert b"Traceback" in done.stderr
    assert rb"/nowhere/\xe9\x1b[31m" in done.stderr
    assert b"\x1b" not in done.stderr


@posix
def test_a_path_is_exact_in_a_pipe():
    name = f"é\udcff{HOSTILE}"
    done = run_kt("cache", "path", "--cache-dir", name, capture_output=True)
    assert os.fsencode(name) in done.stdout
    assert done.stderr == b""


def on_terminal(*arguments: object, run: Callable[..., Any] = run_kt) -> bytes:
    """What `kt ARGUMENT...` writes to a terminal."""
    ours, its = os.openpty()
    with ThreadPoolExecutor() as pool, open(its, "wb") as terminal:
        done = pool.submit(run, *arguments, stdout=terminal, stderr=terminal)
        done.add_done_callback(lambda _: terminal.close())
        written = b""
        with contextlib.suppress(OSError):  # it has hung up
            while chunk := os.read(ours, 4096):
                written += chunk
    os.close(ours)
    assert done.result().returncode == 0, written
    return written


@posix
def test_a_path_is_escaped_on_a_terminal():
    written = on_terminal("cache", "path", "--cache-dir", f"é\udcff{HOSTILE}")
    assert rf"\xe9\udcff{ESCAPED}".encode() in written
    assert b"\x1b" not in written


EPOCHS = """
from keras_transfer.terminal import listening
with listening() as listener:
    listener.epoch("fit", 7, {"l2": 1.0, "loss": 0.5})
    for number in range(1, 41):
        listener.progress("training", number * 5, 250)
        rate = 0.0 if number == 40 else 1e-3
        row = {"loss": 2 / number, "accuracy": 0.75, "learning_rate": rate}
        row |= {"seconds": 2.0, "images_per_second": 1234.5}
        listener.epoch("finetune", number, row)
    listener.note("<- \x1b[31mdone")
"""


def test_each_epoch_is_a_line_in_a_pipe():
    done = subprocess.run(
        [sys.executable, "-c", EPOCHS], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    *lines, last = done.stderr.splitlines()
    assert len(lines) == 40 and last == r"- <- \x1b[31mdone"
    assert "highest rate 1.0e-03" in lines[39]  # which ends at 0
    assert lines[3] == (
        "- epoch 4: loss 0.5000, training accuracy 0.7500, highest rate 1.0e-03, "
        "img/s 1,234, time 2.0 s, time left 92.0 s"
    )


@posix
def test_epochs_are_a_table_on_a_terminal():
    """While it runs as many rows as fit, in the end all of them."""

    def run(**options: object) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", EPOCHS], check=False, **options)

    shown = click.unstyle(on_terminal(run=run).decode())
    last = shown[shown.rindex("epoch") :].splitlines()
    assert last[0].split()[:3] == ["epoch", "loss", "training"]
    rows = [line.split() for line in last if "0.7500" in line]
    assert [row[0] for row in rows] == [str(number) for number in range(1, 41)]
    assert rows[3][1:] == "0.5000 0.7500 1.0e-03 1,234 2.0 s 92.0 s".split()
    assert r"- <- \x1b[31mdone" in shown


@pytest.mark.long
@posix
def test_names_of_classes_and_images_never_end_in_a_fault(kt, photos, tmp_path):
    data, new = tmp_path / "data", tmp_path / "new"
    shutil.copytree(photos / "circle", data / "é\u202eb")
    shutil.copytree(photos / "stripes", data / "日本")
    new.mkdir()
    name = "é\udcff\x1b[31m.jpg"
    shutil.copy(photos / "circle/00.jpg", new / name)
    (new / "\x1b.jpg").touch()
    options = ("--image-size", 32, "--weights", "none", "--folds", 2, "--name", "x")
    shown = kt("fit", data, *options)
    assert r"é\u202eb" in shown.stdout
    run = Path("saved_models/x")

    in_ascii = CliRunner(charset="ascii")
    evaluated = in_ascii.invoke(main, ["evaluate", str(run), str(data)])
    assert evaluated.exit_code == 0, evaluated.stderr
    assert rb"\xe9\u202eb" in evaluated.stdout_bytes
    assert rb"\u65e5\u672c" in evaluated.stdout_bytes

    for form in ("csv", "jsonl"):
        arguments = ["predict", str(run), str(new), "--format", form]
        rows = in_ascii.invoke(main, arguments)
        assert rows.exit_code == 0, rows.stderr
        shown = name if form == "csv" else name.replace("\x1b", r"\u001b")
        assert os.fsencode(new / shown) in rows.stdout_bytes
        assert b"damaged" in rows.stdout_bytes or b"empty" in rows.stdout_bytes

    written = on_terminal("predict", run, new, "--top", 2)
    assert rb"\xe9\udcff\x1b[31m.jpg" in written
    assert rb",\xe9\u202eb," in written
    assert rb",\u65e5\u672c," in written
    assert b"\x1b" not in written


def test_the_cache_is_listed_and_pruned(kt, photos):
    kt("fit", photos, "--image-size", 32, "--folds", 2, "--name", "x")
    assert "efficientnet_lite0" in kt("cache", "list").stdout
    path = Path(kt("cache", "path").stdout.strip())
    index = path / "files"
    assert [*index.glob("*.parquet")]
    assert len([*path.iterdir()]) == 3  # features, the quality of images, the index
    shutil.copytree(path, "copy")
    assert kt("cache", "prune").stdout.startswith("0 tables")
    prune = ["cache", "prune", "--max-size"]
    assert kt(*prune, "1GB", "--unused-days", 9).stdout.startswith("0 tables")
    assert kt(*prune, "0.001 kb").stdout.startswith("2 tables")
    assert list(path.iterdir()) == [index]
    shutil.copytree("copy", path, dirs_exist_ok=True)
    assert kt("cache", "prune", "--unused-days", 0).stdout.startswith("2 tables")
    assert list(path.iterdir()) == []


def test_what_a_size_limit_keeps_has_no_age_limit(kt):
    cache = FeatureCache()
    for view in range(2):
        table = cache.table(FeatureSpec("base", "", 1, "", "f32", 1, view))
        table.add(bytes(32), np.zeros(50_000, np.float32))
        table.flush()
        for folder in cache.directory.iterdir():
            os.utime(folder, (1e9 + view, 1e9 + view))
    (oldest, *_) = (found["view"] for found in cache.list() if found["view"] == 0)
    assert oldest == 0
    for size in ("20GB", "1 tb", "401KB", "500000"):
        assert kt("cache", "prune", "--max-size", size).stdout.startswith("0 tables")
    result = kt("cache", "prune", "--max-size", "399.9k")
    assert result.stdout == "1 tables deleted, 0.2 MB freed.\n"
    assert kt("cache", "prune").stdout.startswith("1 tables")


@pytest.mark.parametrize("size", ["-1", "20XB", "GB", "1e3", "", "20GiB"])
def test_what_is_no_size_is_refused(kt, size):
    result = kt("cache", "prune", "--max-size", size)
    assert result.exit_code == 2
    assert repr(size) in result.stderr and "20GB" in result.stderr


def test_prune_deletes_no_source_code(kt):
    source = Path("features/login/page.py")
    source.parent.mkdir(parents=True)
    source.write_text("pass")
    (source.parents[1] / "conftest.py").touch()
    for options in (("--unused-days", 0), ("--max-size", 0)):
        result = kt("cache", "prune", "--cache-dir", ".", *options)
        assert result.stdout == "0 tables deleted, 0.0 MB freed.\n"
    assert source.exists() and (source.parents[1] / "conftest.py").exists()


def test_every_base_is_listed(kt):
    lines = kt("bases").stdout.splitlines()[1:]
    listed = [line for line in lines if line and line[0].isalpha()][:-1]
    assert [line.split()[0] for line in listed] == [base.name for base in BASES]
    assert listed[0].split()[3:5] == ["75.1", "[1]"]
    assert "[1] TensorFlow TPU repository, efficientnet/lite" in lines


def test_measured_speeds_are_listed_with_their_base(kt, tmp_path, monkeypatch):
    here = {"engine": "openvino", "precision": "f32", "device": "AVX2"}
    cache = FeatureCache(tmp_path)
    for base, size, speed in (("VGG16", 224, 9.0), ("VGG16", 224, 21.4)):
        remember(
            cache,
            Throughput(base=base, image_size=size, images_per_second=speed, **here),
        )
    remember(
        cache,
        Throughput(base="VGG19", image_size=64, images_per_second=99.0, **here),
    )
    listed = kt("bases", "--cache-dir", tmp_path).stdout.splitlines()
    (vgg16,) = [line.split() for line in listed if line.startswith("VGG16")]
    (vgg19,) = [line.split() for line in listed if line.startswith("VGG19")]
    assert vgg16[5] == "21"
    assert vgg19[5] == "BGR"  # of another image size
    rows = {
        row["base"]: row
        for row in json.loads(kt("bases", "--cache-dir", tmp_path, "--json").stdout)[
            "bases"
        ]
    }
    assert [one["images_per_second"] for one in rows["VGG16"]["throughput"]] == [21.4]
    assert [one["image_size"] for one in rows["VGG19"]["throughput"]] == [64]
    assert rows["VGG16"]["top_1"] == 71.3
    assert rows["dinov2_small"]["top_1_source"].endswith("on frozen features")
    monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    assert remembered(cache) == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'[{"base": "VGG16"}]', b"\xff"]
)
def test_damaged_measurements_are_ignored(kt, tmp_path, content):
    path = FeatureCache(tmp_path).directory / "throughput.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert kt("bases", "--cache-dir", tmp_path).exit_code == 0


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
