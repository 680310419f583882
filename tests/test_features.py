"""Feature cache: what was computed stays, and damage costs only what it hit."""

import contextlib
import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from keras_transfer import features as features_module
from keras_transfer.errors import KerasTransferError
from keras_transfer.features import FeatureCache, FeatureSpec

SPEC = FeatureSpec("base", "digest", 64, "pool", "f32", 1)
WIDTH = 5

# What a helper process starts with: the same rows as here, without the tests.
PREAMBLE = f"""
import hashlib, os, signal, sys, time
from pathlib import Path
import numpy as np
from keras_transfer.features import FeatureCache, FeatureSpec

def digest(i):
    return hashlib.sha256(str(i).encode()).digest()

def row(i):
    return np.random.default_rng(i).standard_normal({WIDTH}, np.float32)

def table(directory):
    return FeatureCache(Path(directory)).table({SPEC!r})
"""


def digest(i: int) -> bytes:
    return hashlib.sha256(str(i).encode()).digest()


def row(i: int) -> np.ndarray:
    return np.random.default_rng(i).standard_normal(WIDTH, np.float32)


def fill(cache: FeatureCache, *shards: range) -> Path:
    """Adds rows, a flush after each range; returns the table's folder."""
    table = cache.table(SPEC)
    for numbers in shards:
        for i in numbers:
            table.add(digest(i), row(i))
        table.flush()
    return cache.directory / SPEC.key()


def held(cache: FeatureCache, asked: range) -> list[int]:
    """Which rows a newly opened table has; those it has must be right to the bit."""
    table = cache.table(SPEC)
    found = [i for i in asked if digest(i) in table]
    rows = table.features([digest(i) for i in found])[:]
    expected = np.array([row(i) for i in found], np.float32)
    assert rows.tobytes() == expected.tobytes()
    return found


def start(script: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", PREAMBLE + script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@contextlib.contextmanager
def without_root_powers():
    """Runs as a user whom file permissions bind."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(65_534, 65_534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path / "features-of-test")


@pytest.fixture
def public_directory():
    """A directory that other users may look into, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_rows_come_back_to_the_bit_in_any_order(cache):
    special = np.array([np.nan, -0.0, np.inf, 1e-42, np.pi], np.float32)
    table = cache.table(SPEC)
    table.add(b"s" * 32, special)
    fill(cache, range(0, 4), range(4, 5), range(5, 11))
    assert b"s" * 32 in table
    table.flush()

    order = np.random.default_rng(0).permutation(11)
    reopened = cache.table(SPEC)
    digests = [digest(i) for i in order] + [b"s" * 32]
    assert all(one in reopened for one in digests)
    found = reopened.features(digests)
    expected = np.stack([row(i) for i in order] + [special])
    assert found.shape == expected.shape
    assert (len(found), found.nbytes) == (12, expected.nbytes)
    picks = (slice(None), slice(3, 9), slice(9, 99), slice(0, 0), np.array([7, 0, 7]))
    for index in picks:
        assert found[index].dtype == np.float32
        assert found[index].shape == expected[index].shape
        assert found[index].tobytes() == expected[index].tobytes()


def test_rows_of_more_dimensions_and_other_dtypes_become_float32(cache):
    table = cache.table(SPEC)
    values = np.arange(24, dtype=np.float64).reshape(2, 3, 4) / 7
    table.add(digest(0), values)
    table.flush()
    rows = cache.table(SPEC).features([digest(0)])[:]
    assert rows.dtype == np.float32
    assert np.array_equal(rows[0], values.astype(np.float32))


def test_only_flushed_rows_are_seen_by_others(cache):
    table = cache.table(SPEC)
    table.add(digest(0), row(0))
    assert digest(0) in table
    assert held(cache, range(1)) == []
    table.flush()
    assert held(cache, range(1)) == [0]


@pytest.mark.parametrize(
    ("limit", "value"), [("_SHARD_BYTES", 3 * 4 * WIDTH), ("_SHARD_SECONDS", 0.0)]
)
def test_rows_reach_the_disk_without_being_asked_to(cache, monkeypatch, limit, value):
    monkeypatch.setattr(features_module, limit, value)
    table = cache.table(SPEC)
    for i in range(20):
        table.add(digest(i), row(i))
    assert held(cache, range(20))[:16] == list(range(16))


@pytest.mark.parametrize("field", dataclasses.fields(FeatureSpec), ids=lambda f: f.name)
def test_each_field_of_the_spec_makes_another_table(cache, field):
    fill(cache, range(3))
    value = getattr(SPEC, field.name)
    other = value + 1 if isinstance(value, int) else value + "x"
    changed = dataclasses.replace(SPEC, **{field.name: other})
    assert changed.key() != SPEC.key()
    assert digest(0) not in cache.table(changed)
    assert (cache.rows(SPEC), cache.rows(changed)) == (3, 0)


def test_a_killed_process_keeps_every_flushed_shard(cache):
    script = """
filled = table(sys.argv[1])
for i in range(10**6):
    filled.add(digest(i), row(i))
    if i % 3 == 2:
        filled.flush()
        print(i, flush=True)
"""
    process = start(script, cache.directory.parent)
    assert process.stdout is not None
    flushed = 0
    for _ in range(20):
        flushed = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    found = held(cache, range(flushed + 1000))
    assert found == list(range(len(found)))
    assert len(found) > flushed

    fill(cache, range(len(found), len(found) + 2))
    assert held(cache, range(len(found) + 5)) == list(range(len(found) + 2))


def test_a_kill_at_any_write_loses_no_more_than_the_shard_being_written(tmp_path):
    script = """
def kill_before_write(number):
    count = 0
    def count_down(function):
        def wrapper(*arguments, **options):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return wrapper
    for name in ("fsync", "replace", "chmod"):
        setattr(os, name, count_down(getattr(os, name)))

for number in range(1, 99):
    child = os.fork()
    if child == 0:
        kill_before_write(number)
        filled = table(Path(sys.argv[1], str(number)))
        for i in range(6):
            filled.add(digest(i), row(i))
            if i % 3 == 2:
                filled.flush()
                Path(sys.argv[1], f"{number}.flushed").write_text(str(i + 1))
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(number, flush=True)
"""
    output, _ = start(script, tmp_path).communicate(timeout=60)
    last = int(output)
    assert last >= 10
    for number in range(1, last):
        note = tmp_path / f"{number}.flushed"
        flushed = int(note.read_text()) if note.exists() else 0
        cache = FeatureCache(tmp_path / str(number))
        assert held(cache, range(6)) in ([*range(flushed)], [*range(flushed + 3)])
        fill(cache, range(6))
        assert held(cache, range(6)) == [*range(6)]
        assert [table["base"] for table in cache.list()] == ["base"]


def test_leftovers_are_harmless(cache):
    folder = fill(cache, range(4))
    rows = next(folder.glob("*.npy")).read_bytes()
    index = next(folder.glob("*.index")).read_bytes()
    (folder / "9-half.tmp").write_bytes(rows[:100])
    (folder / "9-unindexed.npy").write_bytes(rows)
    (folder / "9-alone.index").write_bytes(index)
    (folder / ".9.index.x1").write_bytes(index[:7])
    assert held(cache, range(5)) == [0, 1, 2, 3]


def test_a_flipped_byte_costs_one_row_which_can_be_added_again(cache):
    folder = fill(cache, range(4), range(4, 6))
    shard = min(folder.glob("*.npy"))
    damaged = bytearray(shard.read_bytes())
    damaged[-4 * WIDTH - 3] ^= 1
    shard.write_bytes(damaged)
    assert held(cache, range(6)) == [0, 1, 3, 4, 5]
    fill(cache, range(2, 3))
    assert held(cache, range(6)) == [0, 1, 2, 3, 4, 5]


def cut_to(share: float):
    return lambda data: data[: int(share * len(data))]


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".npy", cut_to(0)),
        (".npy", cut_to(0.3)),
        (".npy", lambda data: data[:128]),
        (".npy", lambda data: data[:-1]),
        (".npy", lambda data: b"\0" * len(data)),
        (".npy", lambda data: data[:128] + b"\0" * (len(data) - 128)),
        (".npy", lambda data: data.replace(b"<f4", b"<i4")),
        (".npy", lambda data: data.replace(b"<f4", b">f4")),
        (".index", cut_to(0)),
        (".index", cut_to(0.5)),
        (".index", cut_to(0.6)),
        (".index", lambda data: data[:-1]),
        (".index", lambda data: data + data[:36]),
        (".index", lambda data: b"\xa5" * len(data)),
        (".index", lambda data: b"junk"),
    ],
)
def test_a_damaged_file_costs_its_own_rows_only(cache, suffix, damage):
    folder = fill(cache, range(4), range(4, 6))
    file = min(folder.glob(f"*{suffix}"))
    original = file.read_bytes()
    file.write_bytes(damage(original))
    assert file.read_bytes() != original
    assert held(cache, range(6)) == [4, 5]
    fill(cache, range(4))
    assert held(cache, range(6)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "suffix",
    [
        ".npy",
        ".index",
    ],
)
def test_no_damaged_byte_raises_or_yields_a_wrong_row(cache, suffix):
    folder = fill(cache, range(4), range(4, 6))
    file = min(folder.glob(f"*{suffix}"))
    original = file.read_bytes()
    for position in range(min(len(original), 160)):
        for mask in (0x01, 0x04, 0x10, 0x40):
            damaged = bytearray(original)
            damaged[position] ^= mask
            file.write_bytes(damaged)
            assert held(cache, range(6))[-2:] == [4, 5]


def test_processes_may_add_to_one_table_at_the_same_time(cache):
    script = """
directory, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
filled = table(directory)
print("ready", flush=True)
while not (directory / "go").exists():
    time.sleep(0.001)
for i in range(first, last):
    filled.add(digest(i), row(i))
    if i % 2:
        filled.flush()
filled.flush()
"""
    directory = cache.directory.parent
    directory.mkdir()
    processes = [start(script, directory, *span) for span in ((0, 120), (80, 200))]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    (directory / "go").touch()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert held(cache, range(201)) == list(range(200))


def age(folder: Path, days: float) -> None:
    then = time.time() - days * 86_400
    os.utime(folder, (then, then))


def test_prune_deletes_only_what_was_not_used(cache):
    other = dataclasses.replace(SPEC, view=1)
    folder = fill(cache, range(4), range(4, 6))
    table = cache.table(other)
    table.add(digest(0), row(0))
    table.flush()
    age(folder, 40)
    age(cache.directory / other.key(), 20)

    listed = {found["view"]: found for found in cache.list()}
    assert {view: found["images"] for view, found in listed.items()} == {0: 6, 1: 1}
    assert listed[0] | dataclasses.asdict(SPEC) == listed[0]
    assert listed[0]["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert listed[0]["days_unused"] == pytest.approx(40, abs=0.01)
    assert listed[1]["days_unused"] == pytest.approx(20, abs=0.01)

    assert cache.prune(41) == (0, 0)
    assert cache.prune(30) == (1, listed[0]["bytes"])
    assert not folder.exists()
    assert [found["view"] for found in cache.list()] == [1]
    assert (cache.rows(SPEC), cache.rows(other)) == (0, 1)
    cache.table(other)
    assert cache.prune(10) == (0, 0)
    assert cache.prune(0)[0] == 1
    assert list(cache.list()) == []


def test_a_pruned_table_can_still_be_read_and_added_to(cache):
    fill(cache, range(4))
    table = cache.table(SPEC)
    assert digest(1) in table
    cache.prune(0)
    assert np.array_equal(table.features([digest(1)])[:], [row(1)])
    table.add(digest(9), row(9))
    table.flush()
    assert held(cache, range(10)) == [9]
    assert [found["images"] for found in cache.list()] == [1]


def test_no_cache_is_an_empty_cache(cache):
    assert list(cache.list()) == []
    assert cache.prune(0) == (0, 0)
    assert cache.rows(SPEC) == 0


def test_prune_leaves_foreign_files_alone(cache):
    fill(cache, range(2))
    stray = cache.directory / ".DS_Store"
    stray.touch()
    assert cache.prune(0)[0] == 1
    assert stray.exists()


@pytest.mark.parametrize("text", ["", "{", '{"base": 1}'])
def test_list_survives_a_damaged_spec(cache, text):
    folder = fill(cache, range(2))
    (folder / "spec.json").write_text(text)
    assert len(list(cache.list())) <= 1


@pytest.mark.parametrize("blocked", [".", "features", "below/it"])
def test_a_file_in_the_way_of_the_cache_is_one_clear_line(tmp_path, blocked):
    directory = tmp_path / "kt"
    file = directory if blocked == "below/it" else directory / blocked
    file.parent.mkdir(exist_ok=True)
    file.touch()
    used = directory / "below/it" if blocked == "below/it" else directory
    with pytest.raises(KerasTransferError) as caught:
        FeatureCache(used).table(SPEC)
    assert "\n" not in str(caught.value)
    assert str(used) in str(caught.value)
    assert "--cache-dir" in str(caught.value)


@pytest.mark.parametrize(
    "exists",
    [
        False,
        True,
    ],
)
def test_nothing_can_be_added_to_a_read_only_cache(public_directory, exists):
    cache = FeatureCache(public_directory)
    if exists:
        cache.directory.mkdir()
        cache.directory.chmod(0o555)
    public_directory.chmod(0o555)
    with without_root_powers():
        table = cache.table(SPEC)
        assert digest(0) not in table
        with pytest.raises(KerasTransferError, match="--cache-dir"):
            table.prepare()
        table.add(digest(0), row(0))
        with pytest.raises(KerasTransferError, match="--cache-dir"):
            table.flush()


def test_the_cache_needs_no_tensorflow():
    heavy = {"tensorflow", "keras", "openvino", "sklearn", "scipy"}
    code = f"import sys, keras_transfer.features; print(*{heavy} & set(sys.modules))"
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.split() == []
