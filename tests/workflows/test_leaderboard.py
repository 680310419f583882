"""`kt runs`: what is listed, deleted and compared."""

import csv
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import keras_transfer
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.evaluation.comparison import mcnemar
from keras_transfer.events import Listener, announcing
from keras_transfer.runs.files import locked
from keras_transfer.runs.run import Run
from keras_transfer.terminal import console, show_runs
from keras_transfer.workflows.compare import compare_two
from keras_transfer.workflows.leaderboard import (
    delete_run,
    list_run,
    list_runs_in,
    runs_to_delete,
)


class Seen(Listener):
    """Keeps the events that only training sends."""

    def __init__(self):
        self.events: list[tuple] = []

    def started(self, *event):
        self.events.append(("started", *event))

    def finished(self, *event):
        self.events.append(("finished", *event))

    def failed(self, *event):
        self.events.append(("failed", *event))


@pytest.fixture(scope="module")
def seen() -> Seen:
    return Seen()


@pytest.fixture(scope="module")
def made(photos: Path, tmp_path_factory: pytest.TempPathFactory, seen: Seen) -> Path:
    """A run with half of its images to test on; tests work on copies."""
    folder = tmp_path_factory.mktemp("made")
    return keras_transfer.fit(
        str(photos),
        image_size=32,
        folds=2,
        name="a",
        splits={"test": 0.5},
        runs_dir=folder,
        cache_dir=folder / "cache",
        listeners=[seen],
    ).run_dir


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    """saved_models/ with runs a (the older one) and b."""
    folder = tmp_path / "saved_models"
    for name in "ab":
        shutil.copytree(made, folder / name)
    edit(folder / "a/manifest.json", created="2025-01-02T03:04:05+00:00")
    return folder


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_metrics(run_dir: Path, **values: object) -> None:
    path = run_dir / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["fit"]["test"] |= values
    path.write_text(json.dumps(metrics))


def test_runs_are_listed_with_their_figures(runs, kt, photos):
    edit_metrics(runs / "a", accuracy=0.5, intervals={"accuracy": [0.4, 0.625]})
    (runs / "a/7").mkdir()
    (runs / "a/7/file").write_bytes(bytes(2_000_000))
    found = {one.run_dir.name: one for one in keras_transfer.list_runs(runs)}
    assert list(found) == ["b", "a"]  # the newer one first
    a, manifest = found["a"], Run(runs / "a").manifest
    assert (a.value, a.low, a.high) == (0.5, 0.4, 0.625)
    assert (a.data, a.base, a.phase) == (str(photos), "efficientnet_lite0", "fit")
    assert (a.metric, a.split, a.images) == ("accuracy", "test", 30)
    assert a.images_per_second == pytest.approx(60 / manifest.timings["features"])
    files = [x for x in (runs / "a").rglob("*") if x.is_file()]
    assert a.size == sum(x.stat().st_size for x in files) > 2_000_000
    assert (a.versions, found["b"].versions, a.problem) == (1, 0, "")

    result = kt("runs", "--sort", "accuracy")
    assert result.exit_code == 0, result.output
    header, first, second = result.stdout.splitlines()
    assert "accuracy (95% interval)" in header
    assert first.startswith("b ") and second.startswith("a ")
    assert "0.500 (0.400 to 0.625)   30 test" in second
    assert "2025-01-02 03:04" in second
    listed = json.loads(kt("runs", "--json", "--sort", "size").stdout)
    assert [one["run_dir"] for one in listed] == ["saved_models/a", "saved_models/b"]
    assert listed[0]["value"] == 0.5
    assert "log loss" in kt("runs", "--sort", "log_loss").stdout


def test_few_test_images_are_not_the_headline(runs):
    edit_metrics(runs / "a", images=29)
    a, b = (list_run(runs / name) for name in "ab")
    assert (a.split, b.split) == ("out_of_fold", "test")


def test_a_narrow_terminal_shows_fewer_columns(runs, capsys, monkeypatch):
    monkeypatch.setattr(console, "width", 72)
    shutil.move(runs / "a", runs / "photos-efficientnet_lite0")
    show_runs(list_runs_in(runs))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and max(map(len, lines)) <= 72
    assert "accuracy (95% interval)" in lines[0] and "base" not in lines[0]
    assert lines[3].startswith("(a wider terminal shows more: base, data")


def test_training_says_when_it_starts_and_ends(made, seen):
    (_, phase, run_dir, parameters), (_, *end) = seen.events
    assert [event for event, *_ in seen.events] == ["started", "finished"]
    assert (phase, run_dir) == ("fit", made)
    assert parameters["splits"] == {"test": 0.5, "file": None}
    json.dumps(parameters)
    figures = json.loads(json.dumps(end[2]))
    assert (*end[:2], figures) == ("fit", made, Run(made).metrics["fit"])
    told = Seen()
    with pytest.raises(ZeroDivisionError), announcing(told, "fit", made, {}):
        1 / 0  # noqa: B018
    assert [event for event, *_ in told.events] == ["started", "failed"]


def test_runs_are_sorted_and_chosen(runs, kt, photos):
    edit_metrics(runs / "a", log_loss=9.0, accuracy=1.0)
    edit_metrics(runs / "b", log_loss=0.1, accuracy=0.1)
    edit(runs / "b/manifest.json", data="digits", base="ResNet50", images_forwarded=0)
    edit(runs / "b/manifest.json", created="2020-01-02T03:04:05+00:00")
    for sort, names in {
        "accuracy": "ab",
        "log_loss": "ba",
        "mean_average_precision": "ab",  # nobody has it
        "date": "ab",
        "name": "ab",
        "base": "ba",
        "speed": "ab",
    }.items():
        found = list_runs_in(runs, sort=sort)
        assert "".join(one.run_dir.name for one in found) == names, sort
    for data, names in {
        "digits": ["b"],
        str(photos): ["a"],
        f"{photos}/../{photos.name}/": ["a"],
        photos.name: ["a"],
        "nothing": [],
    }.items():
        assert [x.run_dir.name for x in list_runs_in(runs, data)] == names
    assert kt("runs", "--data", "nothing").stdout == "No runs.\n"
    assert kt("runs", "--runs-dir", "nowhere").exit_code == 2


def damage_manifest(run: Path) -> None:
    (run / "manifest.json").write_text('{"base": "\x1b[31m"')


def damage_metrics(run: Path) -> None:
    (run / "metrics.json").write_text('{"fit": {"test": {"images": "many"}}}')


def nest(run: Path) -> None:
    (run / "metrics.json").write_text("[" * 100_000)


def forget_metrics(run: Path) -> None:
    (run / "metrics.json").unlink()


def replace_by_folder(run: Path) -> None:
    (run / "manifest.json").unlink()
    (run / "manifest.json").mkdir()


def copy_half(run: Path) -> None:
    (run / "manifest.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        damage_manifest,
        damage_metrics,
        nest,
        forget_metrics,
        replace_by_folder,
        copy_half,
    ],
)
def test_a_damaged_run_is_a_row_with_the_reason(runs, kt, damage):
    damage(runs / "b")
    (runs / "not a run").mkdir()
    (runs / ".hidden").mkdir()
    result = kt("runs", "--sort", "name")
    assert result.exit_code == 0, result.output
    _, row, problem = result.stdout.splitlines()
    assert row.startswith("a ") and problem.startswith("b: ")
    assert "\x1b" not in result.stdout
    (last,) = [x for x in json.loads(kt("runs", "--json").stdout) if x["problem"]]
    assert last["value"] is None and last["run_dir"] == "saved_models/b"
    assert "problem" in keras_transfer.Run(runs / "b")._repr_html_()
    assert kt("runs", "rm", "b").exit_code == 1  # nobody answers
    assert kt("runs", "rm", "b", "--yes").exit_code == 0
    assert {x.name for x in runs.iterdir()} == {"a", "not a run", ".hidden"}


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    values=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(
                st.sampled_from(["fit", "test", "images", "accuracy", "intervals"]),
                x,
            )
        ),
    )
)
def test_whatever_metrics_hold_a_row_comes_out(made, tmp_path, values):
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    shutil.copy(made / "manifest.json", run)
    (run / "metrics.json").write_text(json.dumps(values))
    one = list_run(run)
    assert one.value is None or one.low is None or one.problem == ""
    assert isinstance(one.figure, str)


def test_listing_imports_no_numeric_library(runs):
    script = (
        "import sys\n"
        "from keras_transfer.cli import main\n"
        "main(['runs'], standalone_mode=False)\n"
        "heavy = {'tensorflow', 'keras', 'numpy', 'scipy', 'pyarrow', 'matplotlib'}\n"
        "sys.exit(bool(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.returncode == 0, done.stderr


# Deleting


def test_a_run_is_deleted_with_what_it_published(runs, kt, monkeypatch):
    (runs / "a/1").mkdir()
    (runs / "a/2").mkdir()
    asked = kt("runs", "rm", "a")  # nobody answers
    assert asked.exit_code == 1
    assert "2 exported versions" in asked.stderr and (runs / "a").is_dir()
    result = kt("runs", "rm", "a", runs / "a", "--yes")
    assert result.exit_code == 0, result.output
    assert [path.name for path in runs.iterdir()] == ["b"]
    result = kt("runs", "rm", "--runs-dir", runs, "b", "--yes")
    assert result.exit_code == 0, result.output
    assert list(runs.iterdir()) == []


def test_only_runs_are_deleted(runs, kt, tmp_path):
    (runs / "other").mkdir()
    (runs / "other/config.yaml").touch()
    (runs / "link").symlink_to(runs / "a")
    for name in ("other", "nowhere", ".", "..", "", "link", "./a"):
        result = kt("runs", "rm", "b", name, "--yes")  # all or nothing
        assert result.exit_code == 2, name
        assert result.stderr.startswith("Error: ")
    assert {x.name for x in runs.iterdir()} == {"a", "b", "other", "link"}
    assert "other" not in kt("runs").stdout
    assert kt("runs", "--json", "rm", "a").exit_code == 2
    assert kt("runs", "rm").exit_code == 2


def test_a_name_stands_for_one_directory_only(runs, kt, tmp_path):
    """A damaged run elsewhere never stands for the healthy one of the same name."""
    shutil.copytree(runs / "a", tmp_path / "more/a")
    copy_half(tmp_path / "more/a")
    for names in (["b", "--runs-dir", "more"], ["more/b"], ["./a"]):
        result = kt("runs", "rm", *names, "--yes")
        assert result.exit_code == 2 and "There is no run here" in result.stderr
    assert kt("runs", "rm", "a", "--runs-dir", "more", "--yes").exit_code == 0
    assert not (tmp_path / "more/a").exists()
    shutil.copytree(runs / "a", "a")
    assert kt("runs", "rm", "./a", "--yes").exit_code == 0
    assert not Path("a").exists()
    assert {x.name for x in runs.iterdir()} == {"a", "b"}


def test_a_run_that_changed_while_the_user_was_asked_stays(runs):
    chosen = runs_to_delete(["a"], runs)
    edit(runs / "a/manifest.json", phase="finetune")
    with pytest.raises(KerasTransferError, match="changed the run meanwhile"):
        delete_run(chosen[0])
    assert (runs / "a/model.keras").is_file()
    copy_half(runs / "b")
    chosen = runs_to_delete(["b"], runs)
    shutil.copy(runs / "a/manifest.json", runs / "b")  # the copy is finished
    with pytest.raises(KerasTransferError, match="changed the run meanwhile"):
        delete_run(chosen[0])
    assert (runs / "b/model.keras").is_file()


def hold(run: Path, is_held: object, is_over: object) -> None:
    with locked(run):
        is_held.set()
        is_over.wait()


@pytest.mark.skipif(os.name != "posix", reason="directories are not locked there")
def test_a_run_that_another_process_changes_is_not_deleted(runs, kt):
    context = multiprocessing.get_context("fork")
    is_held, is_over = context.Event(), context.Event()
    process = context.Process(target=hold, args=(runs / "a", is_held, is_over))
    process.start()
    try:
        assert is_held.wait(30)
        result = kt("runs", "rm", "b", "a", "--yes")
        assert result.exit_code == 1
        assert "Another process is changing this run" in result.stderr
        assert {x.name for x in runs.iterdir()} == {"a", "b"}
    finally:
        is_over.set()
        process.join()
    assert kt("runs", "rm", "a", "--yes").exit_code == 0


# Comparing


def worsen(run: Path, count: int) -> None:
    """Makes the first predictions of test images that are right wrong."""
    path = run / "predictions.csv"
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    names = header[5:-2]
    for row in rows:
        if count and row[1] == "test" and row[3] == row[4]:
            wrong = [x.removeprefix("p_") != row[3] for x in names]
            row[5:-2] = [str(float(x)) for x in wrong]
            row[5:-2] = [f"{float(x) / sum(wrong):.6f}" for x in row[5:-2]]
            row[4] = next(x for x in names if x != f"p_{row[3]}").removeprefix("p_")
            count -= 1
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def edit_images(run: Path, column: str, value: object, count: int | None) -> None:
    """Changes a column of the first test images; of all images without a count."""
    table = pq.read_table(run / "images.parquet")
    is_meant = np.array(table["split"].to_pylist()) == "test"
    test = np.flatnonzero(is_meant | (count is None))[:count]
    values = table[column].to_pylist()
    for row in test:
        values[row] = value(values[row]) if callable(value) else value
    index = table.schema.get_field_index(column)
    kind = pa.string() if column != "sha256" else pa.binary(32)
    table = table.set_column(index, column, pa.array(values, kind))
    pq.write_table(table, run / "images.parquet")


def test_a_worse_run_is_recognized(runs, kt):
    worsen(runs / "b", 12)
    found = keras_transfer.compare_runs(runs / "a", "b")
    assert found.first.images == found.second.images == 30
    assert found.first.correct - found.second.correct == 12
    assert found.difference == pytest.approx(-12 / 30)
    assert found.p_value == pytest.approx(2 * float(mcnemar(12, 0)))
    assert found.is_clear and found.left_out == {}
    assert found.sentence.startswith(f"{runs}/a is better than saved_models/b")
    swapped = compare_two(Run(runs / "b"), Run(runs / "a"))
    assert swapped.p_value == pytest.approx(found.p_value)
    assert swapped.difference == -found.difference
    result = kt("runs", "compare", "a", "b")
    assert result.exit_code == 0, result.output
    assert "Difference (95% interval): -0.400 (-0.5" in result.stdout
    assert ") on 30 common test images, p = " in result.stdout
    assert "saved_models/a is better than saved_models/b" in result.stdout


def test_images_are_the_same_whatever_their_names(runs):
    worsen(runs / "b", 12)
    plain = compare_two(Run(runs / "a"), Run(runs / "b"))
    # The names of the others, in the other order: each is the name of another image.
    path = runs / "b" / "predictions.csv"
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    names = [row[0] for row in rows]
    new = dict(zip(names, reversed(names), strict=True))
    with path.open("w", newline="") as file:
        renamed = [[new[name], *row] for name, *row in rows]
        csv.writer(file, lineterminator="\n").writerows([header, *renamed])
    edit_images(runs / "b", "source", new.__getitem__, None)
    found = compare_two(Run(runs / "a"), Run(runs / "b"))
    assert found == plain and len(found.lost) == 12


def test_too_little_is_said_to_be_too_little(runs):
    worsen(runs / "b", 2)
    found = compare_two(Run(runs / "a"), Run(runs / "b"))
    assert not found.is_clear and found.informative == 2
    assert "cannot be told" in found.sentence
    assert "differ for 2 of the common test images" in found.sentence
    assert f"about {found.needed:,} common test images, and there are 30" in str(found)
    same = compare_two(Run(runs / "a"), Run(runs / "a"))
    assert (same.difference, same.p_value) == (0, 1)


def test_only_common_unseen_images_count(runs):
    train = next(
        x
        for x in pq.read_table(runs / "b/images.parquet").to_pylist()
        if x["split"] == "train"
    )
    edit_images(runs / "a", "sha256", bytes(32), 3)
    edit_images(runs / "b", "sha256", train["sha256"], 1)
    edit_images(runs / "a", "sha256", train["sha256"], 1)
    found = compare_two(Run(runs / "a"), Run(runs / "b"))
    assert found.first.images == 27
    assert found.left_out == {
        "were training images of a run": 1,
        "have changed between the runs": 2,
    }


def test_images_of_a_group_count_once(runs):
    worsen(runs / "b", 6)
    alone = compare_two(Run(runs / "a"), Run(runs / "b"))
    edit_images(runs / "a", "group", "one patient", 30)
    grouped = compare_two(Run(runs / "a"), Run(runs / "b"))
    assert alone.p_value < 0.05 < grouped.p_value
    assert grouped.informative == 1


def test_classes_are_matched_by_name(runs):
    """The same predictions in another order, of a run with one more class."""
    expected = compare_two(Run(runs / "a"), Run(runs / "a"))
    path = runs / "b/predictions.csv"
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    names = header[5:-2]
    order = [*reversed(names), "p_zebra"]
    rows = [
        [*row[:5], *(dict(zip(names, row[5:-2], strict=True)).get(x, 0) for x in order)]
        + row[-2:]
        for row in rows
    ]
    with path.open("w", newline="") as file:
        lines = [[*header[:5], *order, *header[-2:]], *rows]
        csv.writer(file, lineterminator="\n").writerows(lines)
    labels = "".join(f"{x.removeprefix('p_')}\n" for x in order)
    (runs / "b/labels.txt").write_text(labels)
    found = compare_two(Run(runs / "a"), Run(runs / "b"))
    assert found.difference == 0 and found.first.images == 30
    assert found.second.log_loss == pytest.approx(expected.first.log_loss)
    assert list(found.first.classes) == ["circle", "square", "stripes", "zebra"]


def test_of_many_classes_only_what_is_known_counts(runs):
    """More than 100 classes: the probabilities of five are kept."""
    run = runs / "b"
    with (run / "predictions.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    names = [x.removeprefix("p_") for x in header[5:-2]]
    for row in rows:
        best = sorted(zip(names, row[5:-2], strict=True), key=lambda x: -float(x[1]))
        pairs = [cell for pair in best for cell in pair]
        row[5:-2] = [*pairs, *[""] * (10 - len(pairs))]
    scores = [f"{part}_{k}" for k in range(1, 6) for part in ("class", "score")]
    with (run / "predictions.csv").open("w", newline="") as file:
        lines = [[*header[:5], *scores, *header[-2:]], *rows]
        csv.writer(file, lineterminator="\n").writerows(lines)
    more = [f"class{i}" for i in range(100)]
    (run / "labels.txt").write_text("".join(f"{x}\n" for x in (*names, *more)))
    found = compare_two(Run(runs / "a"), Run(run))
    assert found.difference == 0
    for one in (found.first, found.second):
        assert (one.log_loss, one.roc_auc) == (None, None)
        assert "log_loss" not in one.intervals and "accuracy" in one.intervals
        assert one.classes["circle"].average_precision is None
    edit(runs / "a/manifest.json", multi_label=True)
    edit(runs / "b/manifest.json", multi_label=True)
    with pytest.raises(UsageError, match="of 103 classes"):
        compare_two(Run(runs / "a"), Run(run))


def test_runs_without_common_images_are_not_compared(runs, kt):
    edit_images(runs / "b", "sha256", bytes(32), 30)
    with pytest.raises(KerasTransferError, match="no test image in common.*30 have"):
        keras_transfer.compare_runs("a", "b")
    edit(runs / "b/manifest.json", multi_label=True)
    with pytest.raises(UsageError, match="one class per image"):
        keras_transfer.compare_runs("a", "b")
    shutil.copytree(runs / "a", runs / "old")
    (runs / "old/predictions.csv").unlink()
    with pytest.raises(KerasTransferError, match="kept none. Train it again"):
        keras_transfer.compare_runs("a", "old")
    (runs / "b/images.parquet").unlink()
    result = kt("runs", "compare", "a", "b")
    assert result.exit_code == 1
    assert "images.parquet cannot be read" in result.stderr
    assert kt("runs", "compare", "a", "nowhere").exit_code == 2
    same = kt("runs", "compare", "a", "./a")
    assert same.exit_code == 2 and "which are the same" in same.stderr
