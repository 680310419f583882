"""The run directory: whole or not there, and found again."""

import errno
import fcntl
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import fill

from keras_transfer.errors import KerasTransferError, UsageError, explaining_full_disk
from keras_transfer.runs.files import (
    only_process,
    replacing,
    temporary_directory,
    write_atomic,
)
from keras_transfer.runs.run import (
    MANIFEST,
    NewRun,
    Run,
    building,
    new_run,
    open_run,
    read_together,
    updating,
)


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden things too."""
    return sorted(path.name for path in folder.iterdir())


def make_run(run_dir: Path, text: str = "{}") -> Path:
    run_dir.mkdir(parents=True)
    (run_dir / MANIFEST).write_text(text)
    return run_dir


@pytest.mark.parametrize(
    ("content", "expected"),
    [("ünï\n", "ünï\n".encode()), (b"\0\r\n\xff", b"\0\r\n\xff"), ("", b"")],
)
def test_a_file_is_written_whole_and_alone(tmp_path, content, expected):
    path = tmp_path / "file.txt"
    path.write_text("something older and longer")
    write_atomic(path, content)
    assert path.read_bytes() == expected
    assert names(tmp_path) == ["file.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomic(path, b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_run_appears_when_it_is_complete(tmp_path):
    run_dir = tmp_path / "runs" / "new"
    with building(new_run(run_dir.parent, "new", overwrite=False)) as staging:
        (staging / "inside").mkdir()
        (staging / "inside" / "model").write_text("weights")
        assert not run_dir.exists()
        assert all(name.startswith(".") for name in names(run_dir.parent))
    assert names(run_dir.parent) == ["new"]
    assert (run_dir / "inside" / "model").read_text() == "weights"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [False, True])
def test_nothing_is_left_of_a_run_that_failed(tmp_path, error, exists):
    run_dir = tmp_path / "runs" / "new"
    if exists:
        make_run(run_dir, "old")
    new = new_run(run_dir.parent, "new", overwrite=True)
    with pytest.raises(error), building(new) as staging:
        (staging / MANIFEST).write_text("half")
        raise error
    assert names(run_dir.parent) == (["new"] if exists else [])
    if exists:
        assert (run_dir / MANIFEST).read_text() == "old"


def test_an_existing_run_is_replaced_only_at_the_end(tmp_path):
    run_dir = make_run(tmp_path / "runs" / "taken", "old")
    (run_dir / "only in the old one").touch()
    with building(new_run(run_dir.parent, "taken", overwrite=True)) as staging:
        (staging / MANIFEST).write_text("new")
        assert (run_dir / MANIFEST).read_text() == "old"
    assert names(run_dir.parent) == ["taken"]
    assert names(run_dir) == [MANIFEST]
    assert (run_dir / MANIFEST).read_text() == "new"


@pytest.mark.parametrize("exists", [False, True])
def test_a_kill_leaves_no_half_built_run(tmp_path, exists):
    run_dir = tmp_path / "runs" / "new"
    if exists:
        make_run(run_dir, "old")
    script = """
import sys, time
from pathlib import Path
from keras_transfer.runs.run import MANIFEST, building, new_run
with building(new_run(Path(sys.argv[1]).parent, "new", overwrite=True)) as staging:
    (staging / MANIFEST).write_text("half")
    print("building", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(run_dir)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"building\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    visible = [name for name in names(run_dir.parent) if not name.startswith(".")]
    assert visible == (["new"] if exists else [])
    assert len(names(run_dir.parent)) == len(visible) + 1
    if exists:
        assert (open_run(run_dir).run_dir / MANIFEST).read_text() == "old"
    else:
        new_run(run_dir.parent, "another", overwrite=False)
    assert names(run_dir.parent) == visible  # for whoever comes next removes the rest


KILLED_COMMITS = """
import itertools, os, shutil, signal, sys
from pathlib import Path
from keras_transfer.runs.run import MANIFEST, building, new_run, updating

folder, kind = Path(sys.argv[1]), sys.argv[2]
OLD = (MANIFEST, "model", "only old", "exported/keras/model", "checkpoint/state",
       "1/graph", "2/graph", "serving/config")

def write(directory, names, text):
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)

def commit(runs_dir):
    if kind == "updating":
        block = updating(runs_dir / "mine", removed=["exported/keras", "only old"])
    else:
        block = building(new_run(runs_dir, "mine", kind == "overwriting"))
    with block as staging:
        write(staging, (MANIFEST, "model", "only new", "inside/file"), "new")
        if kind == "colliding":
            write(runs_dir / "mine", OLD, "old")
        steps = itertools.count()
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "chmod", "fsync"):
            setattr(os, name, counted(getattr(os, name), steps))

def counted(original, steps):
    def step(*arguments, **options):
        if next(steps) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    return step

for moment in itertools.count():
    runs_dir = folder / str(moment)
    runs_dir.mkdir()
    if kind in ("overwriting", "updating"):
        write(runs_dir / "mine", OLD, "old")
    child = os.fork()
    if not child:
        commit(runs_dir)
        os._exit(0)
    if os.waitpid(child, 0)[1] != signal.SIGKILL:
        break
"""

NEW_FILES = dict.fromkeys((MANIFEST, "model", "only new", "inside/file"), "new")
PUBLISHED = dict.fromkeys(("1/graph", "2/graph", "serving/config"), "old")
OLD_FILES = PUBLISHED | dict.fromkeys(
    (MANIFEST, "model", "only old", "exported/keras/model", "checkpoint/state"), "old"
)


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, and what is in it."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("kind", ["fresh", "colliding", "overwriting", "updating"])
def test_a_commit_killed_at_any_step_is_there_whole_or_not_at_all(tmp_path, kind):
    command = [sys.executable, "-c", KILLED_COMMITS, str(tmp_path), kind]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    states = []
    for moment in range(len(names(tmp_path))):
        runs_dir = tmp_path / str(moment)
        if kind in ("overwriting", "updating"):  # which a server sees at any moment
            assert tree(runs_dir / "mine").items() >= PUBLISHED.items()
        else:  # what is there is whole before anybody finishes it
            visible = [*runs_dir.glob("[!.]*")]
            assert all(tree(x) in (OLD_FILES, NEW_FILES) for x in visible)
        new_run(runs_dir, "next", overwrite=False)
        for path in runs_dir.glob("[!.]*"):
            open_run(path)
        states.append({path.name: tree(path) for path in runs_dir.iterdir()})
        assert not [*runs_dir.rglob(".*")]
    before, after = {
        "fresh": ({}, {"mine": NEW_FILES}),
        "colliding": ({"mine": OLD_FILES}, {"mine": OLD_FILES, "mine-2": NEW_FILES}),
        "overwriting": ({"mine": OLD_FILES}, {"mine": NEW_FILES | PUBLISHED}),
        "updating": (
            {"mine": OLD_FILES},
            {"mine": NEW_FILES | PUBLISHED | {"checkpoint/state": "old"}},
        ),
    }[kind]
    decided = states.index(after)
    assert decided > 10  # every file is synchronized before
    assert states == [before] * decided + [after] * (len(states) - decided)
    if kind in ("overwriting", "updating"):
        assert len(states) - decided > 15


def test_of_two_runs_with_one_name_both_are_kept(tmp_path):
    one, other = (new_run(tmp_path, "mine", overwrite=False) for _ in range(2))
    for new, text in ((one, "first"), (other, "second")):
        with building(new) as staging:
            (staging / MANIFEST).write_text(text)
    assert (one.run_dir, other.run_dir) == (tmp_path / "mine", tmp_path / "mine-2")
    assert (one.run_dir / MANIFEST).read_text() == "first"
    assert (other.run_dir / MANIFEST).read_text() == "second"
    (tmp_path / "mine-3").touch()
    with building(third := NewRun(tmp_path / "mine")) as staging:
        (staging / MANIFEST).write_text("third")
    assert third.run_dir == tmp_path / "mine-4"
    assert names(tmp_path) == ["mine", "mine-2", "mine-3", "mine-4"]


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("meanwhile", ["another fit", "a fine-tuning", "the lock"])
def test_only_what_was_there_is_replaced(tmp_path, before, meanwhile):
    if before:
        make_run(tmp_path / "mine", before)
    new = new_run(tmp_path, "mine", overwrite=True)
    with building(new) as staging:
        (staging / MANIFEST).write_text("new")
        if meanwhile == "another fit":
            other = new_run(tmp_path, "mine", overwrite=True)
            with building(other) as its_staging:
                (its_staging / MANIFEST).write_text("its")
        elif meanwhile == "a fine-tuning":
            (tmp_path / "mine").mkdir(exist_ok=True)
            with updating(tmp_path / "mine") as its_staging:
                (its_staging / MANIFEST).write_text("its")
        else:
            make_run(tmp_path / "mine", "its") if not before else None
            process = hold(tmp_path / "mine")
    if meanwhile == "the lock":
        process.kill()
        process.communicate()
    kept = before if before and meanwhile == "the lock" else "its"
    assert (tmp_path / "mine" / MANIFEST).read_text() == kept
    assert new.run_dir == tmp_path / "mine-2"
    assert (new.run_dir / MANIFEST).read_text() == "new"
    assert names(tmp_path) == ["mine", "mine-2"]


def test_a_run_that_is_gone_by_the_end_is_not_missed(tmp_path):
    make_run(tmp_path / "mine", "old")
    new = new_run(tmp_path, "mine", overwrite=True)
    with building(new) as staging:
        (staging / MANIFEST).write_text("new")
        (tmp_path / "mine" / MANIFEST).unlink()
        (tmp_path / "mine").rmdir()
    assert new.run_dir == tmp_path / "mine"
    assert names(tmp_path) == ["mine"]


def test_what_an_older_version_moved_away_is_put_back(tmp_path):
    for name in ("one", "two"):
        make_run(tmp_path / "saved_models" / f".replaced.ab_cd{name}" / name)
    assert open_run("one").run_dir.name == "one"
    with pytest.raises(UsageError, match="exists already"):
        new_run(tmp_path / "saved_models", "two", overwrite=False)
    assert names(tmp_path / "saved_models") == ["one", "two"]


def test_what_a_living_process_makes_is_not_removed(tmp_path):
    script = """
import sys, time
from pathlib import Path
from keras_transfer.runs.files import replacing
from keras_transfer.runs.run import building, new_run, updating
runs_dir = Path(sys.argv[1])
with building(new_run(runs_dir, "its", overwrite=False)), updating(runs_dir / "run"):
    with replacing(runs_dir / "run" / "model") as file:
        file.write(b"half")
        print("writing", flush=True)
        time.sleep(60)
"""
    run_dir = make_run(tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    try:
        before = names(tmp_path), names(run_dir)
        assert len(before[0]) == 2 and len(before[1]) == 3
        open_run(run_dir)
        new_run(tmp_path, "another", overwrite=False)
        with updating(run_dir) as staging:
            (staging / "file").touch()
        assert names(tmp_path) == before[0]
        assert names(run_dir) == sorted([*before[1], "file"])
    finally:
        process.kill()
        process.communicate()
    open_run(run_dir)
    assert names(tmp_path) == ["run"]
    assert names(run_dir) == ["file", MANIFEST]


def refusing_locks(number: int):
    def flock(*arguments):
        raise OSError(number, os.strerror(number))

    return flock


def test_where_directories_are_not_locked_left_overs_stay(tmp_path, monkeypatch):
    other = tmp_path / ".kt-unfinished.other"  # it may be a process's that writes there
    other.mkdir()
    monkeypatch.setattr(fcntl, "flock", refusing_locks(errno.EBADF))
    with temporary_directory(tmp_path) as staging:
        assert {*tmp_path.iterdir()} == {other, staging}
    assert [*tmp_path.iterdir()] == [other]
    with only_process(tmp_path):
        pass


def test_where_locking_fails_no_directory_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refusing_locks(errno.EIO))
    with pytest.raises(OSError), temporary_directory(tmp_path):
        pass
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("umask", [0o077, 0o000])
@pytest.mark.parametrize("exists", [False, True])
def test_whatever_the_umask_everyone_may_read_a_run_and_only_its_owner_write(
    tmp_path, umask, exists
):
    if exists:
        make_run(tmp_path / "run", "old")
    before = os.umask(umask)
    try:
        with building(new_run(tmp_path, "run", overwrite=True)) as staging:
            (staging / "inside").mkdir()
            (staging / "inside" / "file").touch()
            (staging / "model").touch()
            write_atomic(staging / MANIFEST, "new")
        with updating(tmp_path / "run", removed=["inside"]) as staging:
            (staging / "folder" / "deeper").mkdir(parents=True)
            (staging / "folder" / "deeper" / "file").touch()
    finally:
        os.umask(before)
    found = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert {x.name for x in found if x.is_dir()} == {"run", "folder", "deeper"}
    for path in found:
        expected = 0o755 if path.is_dir() else 0o644
        assert stat.S_IMODE(path.stat().st_mode) == expected


@pytest.mark.parametrize("exists", [False, True])
def test_every_file_of_a_run_is_on_the_disk_before_it_has_its_name(
    tmp_path, monkeypatch, exists
):
    if exists:
        make_run(tmp_path / "run", "old")
    synced, rename, fsync = set(), os.rename, os.fsync
    renamed = []

    def noting_fsync(descriptor):
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def noting_rename(source, target):
        inside = {p.stat().st_ino for p in (Path(source), *Path(source).rglob("*"))}
        renamed.append(inside - synced)
        rename(source, target)

    with building(new_run(tmp_path, "run", overwrite=True)) as staging:
        (staging / "inside").mkdir()
        for name in ("inside/file", "model", MANIFEST):
            (staging / name).write_text("new")
        monkeypatch.setattr(os, "fsync", noting_fsync)
        monkeypatch.setattr(os, "rename", noting_rename)
    assert renamed == [set()]


OVERWRITING = """
import itertools, sys
from pathlib import Path
from keras_transfer.runs.run import MANIFEST, building, new_run
runs_dir = Path(sys.argv[1])
for number in itertools.count():
    with building(new_run(runs_dir, "mine", overwrite=True)) as staging:
        for name in (MANIFEST, "labels", "model"):
            (staging / name).write_text(str(number))
        (staging / f"file {number}").touch()
    if not number:
        print("there", flush=True)
"""


def test_what_is_read_together_is_of_one_run(tmp_path):
    command = [sys.executable, "-c", OVERWRITING, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"there\n"

    def read() -> list[str]:
        paths = [run.run_dir / name for name in (MANIFEST, "labels", "model")]
        return [
            *(path.read_text() for path in paths),
            *(path.name[5:] for path in run.run_dir.glob("file *")),
        ]

    seen = set()
    try:
        while len(seen) < 20:
            assert process.poll() is None
            run = open_run(tmp_path / "mine")
            try:
                first, *others = read_together(run, read)
            except KerasTransferError as error:
                assert "Another process changed the run" in str(error)
                continue
            assert others == [first] * 3
            seen.add(first)
    finally:
        process.kill()
        process.communicate()


class Steps:
    """Has a thread wait before each step that changes what is in a directory."""

    def __init__(self, monkeypatch, thread: threading.Thread):
        self.thread = thread
        self._arrived, self._go = threading.Semaphore(0), threading.Semaphore(0)
        for name in ("rename", "replace", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._waiting(getattr(os, name)))

    def _waiting(self, original):
        def step(*arguments, **options):
            if threading.current_thread() is self.thread:
                self._arrived.release()
                self._go.acquire()
            return original(*arguments, **options)

        return step

    def advance(self, steps: int) -> None:
        """Lets some steps be made, and returns before the next."""
        for _ in range(steps):
            self._arrived.acquire()
            self._go.release()
        self._arrived.acquire()

    def finish(self) -> None:
        self._go.release(1000)


@pytest.mark.parametrize("moment", range(10))
@pytest.mark.parametrize("when", ["before the files are read", "while they are read"])
def test_at_no_moment_of_a_commit_are_files_of_two_runs_read(
    tmp_path, monkeypatch, when, moment
):
    names = ("labels", MANIFEST, "model")
    run = Run(make_run(tmp_path / "mine", "old"))
    for name in names:
        (run.run_dir / name).write_text("old")
    (run.run_dir / "only old").touch()

    def commit():
        with building(new) as staging:
            for name in names:
                (staging / name).write_text("new")

    new = new_run(tmp_path, "mine", overwrite=True)
    steps = Steps(monkeypatch, threading.Thread(target=commit))
    identity, calls = Run.identity, []

    def advancing(run):
        if threading.current_thread() is not steps.thread:
            if not calls:
                steps.advance(moment)
            calls.append(run)
        return identity.fget(run)

    def read() -> tuple[list[str], bool]:
        if when == "while they are read":
            if not calls:
                steps.advance(moment)
            calls.append(run)
        found = [(run.run_dir / name).read_text() for name in names]
        has_old = (run.run_dir / "only old").exists()
        if when == "while they are read":  # and long after: it waits for the commit
            threading.Timer(0.05, steps.finish).start()
        else:
            steps.finish()
            steps.thread.join()
        return found, has_old

    steps.thread.start()
    if when == "before the files are read":
        monkeypatch.setattr(Run, "identity", property(advancing))
    found = read_together(run, read)
    steps.thread.join()
    assert found in ((["old"] * 3, True), (["new"] * 3, False))


UPDATING = """
import sys
from pathlib import Path
from keras_transfer.runs.run import MANIFEST, updating
run_dir, text = Path(sys.argv[1]), sys.argv[2]
for number in range(20):
    with updating(run_dir, removed=["folder"]) as staging:
        (staging / "folder").mkdir()
        for name in (MANIFEST, "labels", "model", "folder/file"):
            (staging / name).write_text(text)
"""


def test_processes_at_the_same_time_update_a_run_one_after_the_other(tmp_path):
    run_dir = make_run(tmp_path / "run", "old")
    command = [sys.executable, "-c", UPDATING, str(run_dir)]
    processes = [subprocess.Popen([*command, text]) for text in "abc"]
    assert [process.wait() for process in processes] == [0] * 3
    assert sorted(tree(run_dir)) == ["folder/file", "labels", MANIFEST, "model"]
    assert len({*tree(run_dir).values()}) == 1


def test_a_run_that_does_not_stay_the_same_is_an_error(tmp_path):
    run = Run(make_run(tmp_path / "mine", "0"))
    calls = []

    def read() -> str:
        with building(new_run(tmp_path, "mine", overwrite=True)) as staging:
            (staging / MANIFEST).write_text(f"{len(calls)} times")
        calls.append(1)
        if changing_once and len(calls) > 1:
            return "read"
        raise OSError("half")

    changing_once = False
    with pytest.raises(KerasTransferError) as caught:
        read_together(run, read)
    assert "Another process" in str(caught.value) and str(run.run_dir) in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("exists", [False, True])
def test_on_a_full_disk_what_was_there_stays(small_disk, exists):
    run_dir = make_run(small_disk / "run", "old") if exists else small_disk / "run"
    fill(small_disk, 200_000)
    before = tree(small_disk)
    new = new_run(small_disk, "run", overwrite=True)
    with pytest.raises(KerasTransferError) as caught, building(new) as staging:
        write_atomic(staging / "model", b"x" * 100_000)
        with (staging / MANIFEST).open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 10_000)
    message = str(caught.value)
    assert message.startswith("The disk is full. Received: ")
    assert str(small_disk) in message and "\n" not in message
    assert tree(small_disk) == before
    assert not list(small_disk.glob(".*"))
    if exists:
        with pytest.raises(KerasTransferError, match="The disk is full"):
            write_atomic(run_dir / MANIFEST, b"x" * 300_000)
        with pytest.raises(KerasTransferError, match="The disk is full"):
            with updating(run_dir) as staging:
                (staging / MANIFEST).write_bytes(b"x" * 300_000)
        assert tree(small_disk) == before
        assert names(run_dir) == [MANIFEST]


def test_where_a_library_does_not_say_that_the_disk_is_full_it_is_tried(small_disk):
    fill(small_disk, 500_000)  # which OpenVINO leaves when it could not write more
    with pytest.raises(KerasTransferError, match="The disk is full. Received: "):
        with explaining_full_disk(small_disk, 1_000_000):
            raise RuntimeError("basic_ios::clear: iostream error")
    with pytest.raises(RuntimeError, match="iostream"):
        with explaining_full_disk(small_disk, 100_000):
            raise RuntimeError("basic_ios::clear: iostream error")
    assert names(small_disk) == ["filler"]


@pytest.mark.parametrize("name", ["a", "7b", "_x", "photos-v1.2+b_3", "1.0", "Ünï"])
def test_usable_names(tmp_path, name):
    assert new_run(tmp_path, name, overwrite=False) == NewRun(tmp_path / name)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    ["", "7", "123", "٣", ".x", "-x", "+x", "a/b", "a b", "a\n", "..", "/a", "a:b"],
)
def test_unusable_names_are_refused(tmp_path, name):
    with pytest.raises(UsageError, match="Received: name=") as caught:
        new_run(tmp_path, name, overwrite=True)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["run", "folder", "file"])
def test_an_existing_name_is_refused(tmp_path, kind):
    run_dir = tmp_path / "taken"
    if kind == "run":
        make_run(run_dir)
    elif kind == "folder":
        run_dir.mkdir()
    else:
        run_dir.touch()
    with pytest.raises(UsageError) as caught:
        new_run(tmp_path, "taken", overwrite=False)
    for word in (str(run_dir), "name=NEW", "overwrite=True"):
        assert word in str(caught.value)


def test_overwrite_replaces_runs_and_nothing_else(tmp_path):
    run_dir = make_run(tmp_path / "run")
    assert new_run(tmp_path, "run", overwrite=True) == NewRun(run_dir, b"{}")
    assert new_run(tmp_path, "new", overwrite=True) == NewRun(tmp_path / "new")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    (tmp_path / "notes").touch()
    for name in ("thesis", "notes"):
        with pytest.raises(UsageError, match="Only a run can be") as caught:
            new_run(tmp_path, name, overwrite=True)
        assert "name=NEW" in str(caught.value)
    assert (tmp_path / "thesis" / "chapter").exists()


def test_a_run_is_opened_by_its_path_or_its_name(tmp_path):
    here = make_run(tmp_path / "elsewhere" / "mine")
    named = make_run(tmp_path / "saved_models" / "yours")
    for run in (here, str(here), "elsewhere/mine"):
        assert open_run(run).run_dir.resolve() == here
    for run in ("yours", Path("yours"), "saved_models/yours", named):
        opened = open_run(run)
        assert opened.run_dir.resolve() == named
        assert opened.name == "yours"
    assert open_run(opened) is opened
    assert isinstance(opened, Run)


@pytest.mark.parametrize("run", ["nope", "saved_models", "saved_models/empty", "f/x"])
def test_a_run_that_is_not_there_is_named(tmp_path, run):
    (tmp_path / "saved_models" / "empty").mkdir(parents=True)
    (tmp_path / "f").touch()
    with pytest.raises(UsageError) as caught:
        open_run(run)
    assert f"Received: {run}." in str(caught.value)
    assert "\n" not in str(caught.value)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_files_of_a_run_are_replaced_together(tmp_path):
    run_dir = make_run(tmp_path / "run", "old")
    (run_dir / "model").write_text("old")
    (run_dir / "other").write_text("kept")
    with updating(run_dir) as staging:
        assert staging.parent == run_dir and staging.name.startswith(".")
        (staging / MANIFEST).write_text("new")
        (staging / "model").write_text("new")
        (staging / "one more").write_text("new")
        assert (run_dir / MANIFEST).read_text() == "old"
        assert (run_dir / "model").read_text() == "old"
    assert contents(run_dir) == {
        MANIFEST: "new",
        "model": "new",
        "one more": "new",
        "other": "kept",
    }
    assert not [name for name in names(run_dir) if name.startswith(".")]
    assert stat.S_IMODE((run_dir / "one more").stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_update_that_fails_changes_nothing(tmp_path, error):
    run_dir = make_run(tmp_path / "run", "old")
    with pytest.raises(error), updating(run_dir) as staging:
        (staging / MANIFEST).write_text("new")
        raise error
    assert contents(run_dir) == {MANIFEST: "old"}
    assert names(run_dir) == [MANIFEST]


def test_a_decided_update_is_finished_by_whoever_opens_the_run(tmp_path):
    run_dir = make_run(tmp_path / "saved_models" / "mine", "old")
    committed = run_dir / ".committed"
    committed.mkdir()
    (committed / MANIFEST).write_text("new")
    assert open_run("mine").run_dir.resolve() == run_dir
    assert contents(run_dir) == {MANIFEST: "new"}
    assert names(run_dir) == [MANIFEST]


def test_a_replaced_file_is_the_old_one_until_the_block_ends(tmp_path):
    path = tmp_path / "state"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new and " * 100_000)
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new and " * 100_000
    assert names(tmp_path) == ["state"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_replacement_that_fails_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "state"
    path.write_bytes(b"old")
    with pytest.raises(error), replacing(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["state"]


LOCKING = """
import sys, time
from pathlib import Path
from keras_transfer.runs.files import only_process
with only_process(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def hold(run_dir: Path) -> subprocess.Popen:
    """A process that holds a run's lock, as one that fine-tunes it does."""
    command = [sys.executable, "-c", LOCKING, str(run_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"locked\n"
    return process


def test_one_process_at_a_time_changes_a_run(tmp_path):
    run_dir = make_run(tmp_path / "run")
    process = hold(run_dir)
    try:
        with pytest.raises(KerasTransferError) as caught, only_process(run_dir):
            pass
        assert str(run_dir) in str(caught.value)
        assert "\n" not in str(caught.value)
        with only_process(make_run(tmp_path / "other")):
            pass
        # What that process does must not end up in a run that took the place of its.
        with pytest.raises(KerasTransferError, match="Another process"):
            new_run(tmp_path, "run", overwrite=True)
        assert (run_dir / MANIFEST).read_text() == "{}"
        assert names(tmp_path) == ["other", "run"]
    finally:
        process.kill()  # which frees the run, whatever the process was doing
        process.communicate()
    with only_process(run_dir):
        pass
    with pytest.raises(ValueError, match="inside"), only_process(run_dir):
        raise ValueError("inside")
    with only_process(run_dir):
        pass
    assert names(run_dir) == [MANIFEST]
    assert new_run(tmp_path, "run", overwrite=True).run_dir == run_dir
