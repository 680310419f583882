"""Feature cache: what was computed stays, and damage costs only what it hit."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import without_root_powers

from keras_transfer.errors import KerasTransferError
from keras_transfer.features import cache as cache_module
from keras_transfer.features.cache import FeatureCache
from keras_transfer.features.shards import FeatureSpec, ShardStore

SPEC = FeatureSpec(
    "base", "digest", 64, "pool", "f32", 1, engine="openvino", device="AVX2"
)
WIDTH = 5

# What a helper process starts with: the same rows as here, without the tests.
PREAMBLE = f"""
import hashlib, os, signal, sys, time
from pathlib import Path
import numpy as np
from keras_transfer.features.cache import FeatureCache
from keras_transfer.features.shards import FeatureSpec

def digest(i):
    return hashlib.sha256(str(i).encode()).digest()

def row(i):
    return np.random.default_rng(i).standard_normal({WIDTH}, np.float32)

def table(directory):
    return FeatureCache(Path(directory)).table({SPEC!r})

def kill_before(number, *names):
    # Kills this process before that call of these functions of the system.
    count = 0
    def count_down(function):
        def wrapper(*arguments, **options):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return wrapper
    for name in names:
        setattr(os, name, count_down(getattr(os, name)))
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


def write_old_shard(cache: FeatureCache, numbers: range) -> None:
    """Writes rows as was done while a shard's name was a time."""
    folder = cache.directory / SPEC.key()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(dataclasses.asdict(SPEC), indent=1))
    path = folder / f"{numbers.start:020d}-{zlib.crc32(digest(numbers.start)):08x}"
    rows = np.stack([row(i) for i in numbers])
    np.save(path.with_suffix(".npy"), rows)
    index = b"".join(
        digest(i) + zlib.crc32(row(i).tobytes()).to_bytes(4, "little") for i in numbers
    )
    path.with_suffix(".index").write_bytes(index)


def shards(cache: FeatureCache) -> list[str]:
    return sorted(path.stem for path in cache.directory.glob("*/*.npy"))


def one_line(error: BaseException, *words: str) -> bool:
    return "\n" not in str(error) and all(word in str(error) for word in words)


def start(script: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", PREAMBLE + script, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path / "features-of-test")


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
    ("limit", "value"), [("SHARD_BYTES", 3 * 4 * WIDTH), ("SHARD_SECONDS", 0.0)]
)
def test_rows_reach_the_disk_without_being_asked_to(cache, monkeypatch, limit, value):
    monkeypatch.setattr(cache_module, limit, value)
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


def test_tables_of_an_earlier_version_keep_their_names():
    old = FeatureSpec("base", "digest", 64, "pool", "f32", 1)
    assert old.key() == "bffbd695f233ecd4ad15543e1a449f76"
    assert old.key() != SPEC.key()


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
for number in range(1, 99):
    child = os.fork()
    if child == 0:
        kill_before(number, "fsync", "replace", "chmod")
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
        left = {path.suffix for path in cache.directory.glob("*/*")}
        assert left <= {".npy", ".index", ".json"}
        fill(cache, range(6))
        assert held(cache, range(6)) == [*range(6)]
        assert [table["base"] for table in cache.list()] == ["base"]


def test_shards_that_are_named_by_time_are_adopted(cache):
    for first in (0, 4, 8):
        write_old_shard(cache, range(first, first + 4))
    assert cache.rows(SPEC) == 12
    assert held(cache, range(13)) == [*range(12)]
    fill(cache, range(12, 14))
    assert held(cache, range(15)) == [*range(14)]
    assert [table["images"] for table in cache.list()] == [14]


@pytest.mark.parametrize("numbers", [range(5), range(3, 9)])
def test_a_repeated_block_replaces_its_own(cache, numbers):
    fill(cache, numbers)
    before = shards(cache)
    other = FeatureCache(cache.directory.parent / "other")
    fill(other, numbers)
    assert shards(other) == before
    table = cache.table(SPEC)
    for i in numbers:
        table.add(digest(i), row(i))
    table.flush()
    assert shards(cache) == before
    assert cache.rows(SPEC) == len(numbers)

    (path,) = cache.directory.glob("*/*.npy")
    path.write_bytes(path.read_bytes()[:-1])
    assert held(cache, numbers) == []
    fill(cache, numbers)
    assert shards(cache) == before
    assert held(cache, numbers) == list(numbers)


def test_the_index_takes_at_most_70_bytes_a_row(cache):
    count = 20_000
    folder = fill(cache, range(1))
    index = np.empty(count, [("digest", "V32"), ("checksum", "<u4")])
    for shard in range(3):
        numbers = range(shard * count, (shard + 1) * count)
        digests = b"".join(map(digest, numbers))
        index["digest"] = np.frombuffer(digests, "V32")
        path = folder / f"{shard:020d}-00000000"
        np.save(path.with_suffix(".npy"), np.zeros((count, 1), np.float32))
        path.with_suffix(".index").write_bytes(index.tobytes())
    del index, digests
    tracemalloc.start()
    table = cache.table(SPEC)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert cache.rows(SPEC) == 3 * count + 1
    assert digest(0) in table
    assert size < 70 * 3 * count


def test_digests_that_start_alike_are_told_apart(cache):
    rng = np.random.default_rng(0)
    digests = [b"x" * 8 + rng.bytes(24) for _ in range(6)]
    table = cache.table(SPEC)
    for i, name in enumerate(digests[:4]):
        table.add(name, row(i))
    table.flush()
    for reader in (table, cache.table(SPEC)):
        found = reader.features(digests[3::-1])[:]
        assert np.array_equal(found, [row(i) for i in (3, 2, 1, 0)])
        assert [name in reader for name in digests] == 4 * [True] + 2 * [False]


# Many shards, and few file descriptors


def test_a_thousand_shards_need_few_file_descriptors(cache):
    for first in range(0, 3000, 3):
        write_old_shard(cache, range(first, first + 3))
    script = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
filled = table(sys.argv[1])
digests = [digest(i) for i in range(3000)]
expected = np.stack([row(i) for i in range(3000)])
assert all(one in filled for one in digests[::7])
order = np.random.default_rng(0).permutation(3000)
features = filled.features(digests)
assert np.array_equal(features[order], expected[order])
filled.add(digest(3000), row(3000))
filled.flush()
assert np.array_equal(features[order[::-1]], expected[order[::-1]])
print("done")
"""
    output, _ = start(script, cache.directory.parent).communicate(timeout=60)
    assert output == "done\n"
    assert len(shards(cache)) < 10
    assert held(cache, range(3002)) == [*range(3001)]


@pytest.mark.parametrize(
    "action",
    [
        "table(sys.argv[1])",
        "digest(0) in opened",
        "opened.features([digest(0)])",
        "opened.flush()",
    ],
)
def test_too_many_open_files_is_one_clear_line(cache, action):
    fill(cache, range(3))
    script = f"""
import resource
from keras_transfer.errors import KerasTransferError
opened = table(sys.argv[1])
opened.add(digest(9), row(9))
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
taken = []
try:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
try:
    {action}
except KerasTransferError as error:
    print(error)
os.close(taken.pop())
os.close(taken.pop())
os.close(taken.pop())
os.close(taken.pop())
opened.flush()
assert digest(0) in opened and digest(9) in opened
"""
    process = start(script, cache.directory.parent)
    (line,) = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    assert "Too many open files" in line and "ulimit -n" in line


@pytest.fixture
def merging(monkeypatch):
    """Merges as soon as there are four shards."""
    monkeypatch.setattr(cache_module, "MOST_SMALL_SHARDS", 4)


def test_small_shards_are_merged(cache, merging):
    table = cache.table(SPEC)
    for i in range(40):
        table.add(digest(i), row(i))
        table.flush()
        assert len(shards(cache)) < 4
    assert cache.rows(SPEC) == 40
    for reader in (table, cache.table(SPEC)):
        found = reader.features([digest(i) for i in range(40)])[:]
        assert np.array_equal(found, [row(i) for i in range(40)])


def test_merging_makes_shards_of_the_usual_size(cache, merging, monkeypatch):
    for first in range(0, 60, 3):
        write_old_shard(cache, range(first, first + 3))
    store = ShardStore(cache.directory / SPEC.key(), SPEC)
    one = sum(store.list().values()) // 20
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 5 * one)
    fill(cache, range(60, 61))
    sizes = store.list().values()
    assert 3 <= len(sizes) <= 5
    assert max(sizes) <= 6 * one
    assert held(cache, range(62)) == [*range(61)]


def test_merging_leaves_out_copies_and_damaged_rows(cache, merging):
    folder = fill(cache, range(4))
    path = next(folder.glob("*.npy"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    write_old_shard(cache, range(2, 6))
    write_old_shard(cache, range(6, 8))
    path = min(folder.glob("*.npy"))
    fill(cache, range(8, 9))
    assert len(shards(cache)) == 1
    assert cache.rows(SPEC) == 9
    assert held(cache, range(10)) == [*range(9)]


def test_a_process_survives_that_another_merges(cache, merging):
    table = cache.table(SPEC)
    for i in range(3):
        table.add(digest(i), row(i))
        table.flush()
    opened = cache.table(SPEC)
    features = table.features([digest(i) for i in range(3)])
    before = shards(cache)
    fill(cache, range(3, 4))
    assert not set(before) & set(shards(cache))
    expected = np.stack([row(i) for i in range(3)])
    assert np.array_equal(features[:], expected)
    assert np.array_equal(features[np.array([2, 0])], expected[[2, 0]])
    assert [digest(i) in opened for i in range(5)] == 4 * [True] + [False]


def test_a_process_survives_that_another_prunes(cache):
    table = cache.table(SPEC)
    for i in range(3):
        table.add(digest(i), row(i))
        table.flush()
    features = table.features([digest(i) for i in range(3)])
    opened = cache.table(SPEC)
    cache.prune(0)
    with pytest.raises(KerasTransferError) as caught:
        features[:]
    assert one_line(caught.value, "3 of 3", SPEC.key(), "again")
    assert digest(0) not in opened
    assert len(opened.features([])) == 0


def test_a_kill_while_merging_loses_nothing(tmp_path):
    script = """
from keras_transfer.features import cache
cache.MOST_SMALL_SHARDS = 3

for number in range(1, 99):
    directory = Path(sys.argv[1], str(number))
    for i in range(2):
        filled = table(directory)
        filled.add(digest(i), row(i))
        filled.flush()
    child = os.fork()
    if child == 0:
        filled = table(directory)
        filled.add(digest(2), row(2))
        kill_before(number, "fsync", "replace", "chmod", "unlink")
        filled.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(number, flush=True)
"""
    output, _ = start(script, tmp_path).communicate(timeout=60)
    last = int(output)
    assert last >= 15
    for number in range(1, last + 1):
        cache = FeatureCache(tmp_path / str(number))
        assert held(cache, range(3)) in ([0, 1], [0, 1, 2])
        suffixes = {path.suffix for path in cache.directory.glob("*/*")}
        assert suffixes == {".npy", ".index", ".json"}
    assert len(shards(cache)) == 1


# What killed writers leave


BLOCKED = """
fsync = os.fsync
def blocked(descriptor):
    print("writing", flush=True)
    sys.stdin.readline()
    fsync(descriptor)
os.fsync = blocked
filled = table(sys.argv[1])
filled.add(digest(7), row(7))
filled.flush()
"""


def test_only_the_temporary_files_of_dead_writers_are_removed(cache):
    folder = fill(cache, range(2))
    complete = set(folder.iterdir())
    process = start(BLOCKED, cache.directory.parent)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    writing = set(folder.iterdir()) - complete
    assert len(writing) == 2
    cache.table(SPEC)
    cache.prune(30)
    assert set(folder.iterdir()) == complete | writing
    process.stdin.write("\n" * 9)
    process.stdin.flush()
    process.communicate(timeout=60)
    assert held(cache, range(9)) == [0, 1, 7]

    for clean in (lambda: cache.table(SPEC), lambda: cache.prune(30)):
        process = start(BLOCKED.replace("(7)", "(8)"), cache.directory.parent)
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.kill()
        process.communicate()
        assert any(path.name.endswith(".tmp") for path in folder.iterdir())
        clean()
        assert not any(path.name.endswith(".tmp") for path in folder.iterdir())
    assert held(cache, range(9)) == [0, 1, 7]


def test_what_writers_left_before_there_were_locks_is_removed(cache):
    folder = fill(cache, range(2))
    before = set(folder.iterdir())
    name = "01700000000000000000-0123abcd"
    for left in (f"{name}.tmp", f"{name}.npy", f".{name}.index.k2_9xyz0"):
        (folder / left).write_bytes(b"half")
    (folder / ".spec.json.abcdefgh").touch()
    cache.table(SPEC)
    assert set(folder.iterdir()) == before


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


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_prune_deletes_the_least_recently_used_until_the_rest_fits(cache):
    specs = [dataclasses.replace(SPEC, view=view) for view in range(4)]
    sizes = []
    for spec, days in zip(specs, (4, 1, 3, 2), strict=True):
        table = cache.table(spec)
        for i in range(5 + spec.view):
            table.add(digest(i), row(i))
        table.flush()
        folder = cache.directory / spec.key()
        age(folder, days)
        sizes.append(sum(path.stat().st_size for path in folder.iterdir()))

    def views() -> set[int]:
        return {found["view"] for found in cache.list()}

    assert cache.prune() == (0, 0)
    assert cache.prune(max_bytes=sum(sizes)) == (0, 0)
    assert cache.prune(max_bytes=sum(sizes) - 1) == (1, sizes[0])
    assert views() == {1, 2, 3}
    assert cache.prune(unused_days=2.5, max_bytes=sizes[1] + sizes[3]) == (1, sizes[2])
    assert views() == {1, 3}
    assert cache.prune(unused_days=1.5, max_bytes=10**9) == (1, sizes[3])
    assert cache.prune(unused_days=99, max_bytes=0) == (1, sizes[1])
    assert tree(cache.directory) == set()


def test_prune_deletes_nothing_of_a_project_with_a_features_folder(tmp_path):
    directory = tmp_path / "features"
    key, other = SPEC.key(), "0123456789abcdef" * 2
    spec = json.dumps(dataclasses.asdict(SPEC))
    source = {
        "login.py": "import this",
        "deep/er/code.py": "pass",
        "spec.json": spec,
        "search/spec.json": spec,  # not the folder's name
        f"{other}/spec.json": spec,  # nor is this
        f"{other[::-1]}/notes.txt": "mine",
        f"{'c' * 32}/{'a' * 64}.npy/notes.txt": "mine",
        f"{'d' * 32}/spec.json": "[1, 2]",
        f"{'e' * 32}/spec.json": '{"base": "x"}',
        "f" * 32: "a file",
    }
    for name, text in source.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    elsewhere = FeatureCache(tmp_path / "elsewhere")
    fill(elsewhere, range(2))
    (directory / key).symlink_to(elsewhere.directory / key)
    before = tree(tmp_path)
    cache = FeatureCache(tmp_path)
    assert cache.prune(0) == cache.prune(max_bytes=0) == (0, 0)
    assert list(cache.list()) == []
    assert tree(tmp_path) == before


def test_prune_deletes_only_its_own_files_of_a_table(cache):
    folder = fill(cache, range(2))
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoint.npy").write_text("mine")
    (folder / "more").mkdir()
    assert cache.prune(0)[0] == 1
    assert tree(folder) == {"notes.txt", "checkpoint.npy", "more"}
    assert cache.prune(0) == (0, 0)


def test_prune_deletes_what_is_left_of_a_table(cache):
    for number, left in enumerate(((), (".k2_9xyz0.tmp",), (f"{'a' * 64}.npy",))):
        folder = cache.directory / f"{number:032d}"
        folder.mkdir(parents=True)
        for name in left:
            (folder / name).touch()
    assert cache.prune(0) == (3, 0)
    assert tree(cache.directory) == set()


def test_a_damaged_spec_is_mended_by_the_next_writer(cache):
    folder = fill(cache, range(2))
    (folder / "spec.json").write_text("{")
    assert cache.prune(0) == (0, 0)
    fill(cache, range(2, 3))
    assert [table["images"] for table in cache.list()] == [3]


def test_writers_prunes_and_lists_do_not_hinder_each_other(cache):
    writer = """
from keras_transfer.features import cache
cache.MOST_SMALL_SHARDS = 3
print("ready", flush=True)
sys.stdin.readline()
ends = time.monotonic() + 2
i = int(sys.argv[2])
while time.monotonic() < ends:
    filled = table(sys.argv[1])
    for i in range(i, i + 7):
        filled.add(digest(i), row(i))
        filled.flush()
        if digest(i - 3) in filled:
            pass
"""
    pruner = """
print("ready", flush=True)
sys.stdin.readline()
cache = FeatureCache(Path(sys.argv[1]))
ends = time.monotonic() + 2.2
while time.monotonic() < ends:
    assert all(found["bytes"] >= 0 for found in cache.list())
    cache.rows(SPEC)
    cache.prune(max_bytes=int(time.time_ns() % 3) * 2000)
"""
    pruner = f"SPEC = {SPEC!r}\n{pruner}"
    directory = cache.directory.parent
    processes = [start(writer, directory, first) for first in (0, 10_000)]
    processes += [start(pruner, directory) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    held(cache, range(2000))
    cache.prune(0)
    assert tree(cache.directory) == set()


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
    assert "cache_dir" in str(caught.value)


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
        with pytest.raises(KerasTransferError, match="cache_dir"):
            table.prepare()
        table.add(digest(0), row(0))
        with pytest.raises(KerasTransferError, match="cache_dir"):
            table.flush()


def test_a_warm_cache_that_is_read_only_works(public_directory):
    cache = FeatureCache(public_directory)
    folder = fill(cache, range(4), range(4, 6))
    (folder / ".k2_9xyz0.tmp").touch()  # which cannot be removed
    public_directory.chmod(0o555)
    cache.directory.chmod(0o555)
    folder.chmod(0o555)
    with without_root_powers():
        assert held(cache, range(7)) == [*range(6)]
        assert cache.rows(SPEC) == 6
        assert [table["images"] for table in cache.list()] == [6]
        assert cache.free_bytes() > 0
        table = cache.table(SPEC)
        table.flush()
        with pytest.raises(KerasTransferError) as caught:
            table.prepare()
        assert one_line(caught.value, "cannot be written", "cache_dir")
        assert cache.prune(30) == (0, 0)
        with pytest.raises(KerasTransferError) as caught:
            cache.prune(0)
        assert one_line(caught.value, "cannot be pruned", "Permission denied")
    assert held(cache, range(7)) == [*range(6)]


def test_free_space_is_known_before_there_is_a_cache(cache):
    assert cache.free_bytes() == pytest.approx(shutil.disk_usage("/tmp").free, rel=0.5)
    assert not cache.directory.parent.exists()


FILL_UP = """
from keras_transfer.errors import KerasTransferError
filled = table(sys.argv[1])
for i in range(3):
    filled.add(digest(i), row(i))
filled.flush()
big = np.random.default_rng(0).standard_normal((40, 1000, 5), np.float32)
try:
    for i in range(40):
        for k in range(1000):
            filled.add(digest(1000 * i + k + 9), big[i, k])
        LIMIT
        filled.flush()
except KerasTransferError as error:
    print(error)
"""


def small_disk(directory: Path) -> list[str]:
    """A command to run another with a disk of 256 KB there, which ends with it."""
    mount = 'mount -t tmpfs -o size=256k none "$0" && exec "$@"'
    return ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, str(directory)]


def test_a_full_disk_is_one_clear_line_and_leaves_what_was_finished(tmp_path):
    command = small_disk(tmp_path)
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    script = (
        f"{PREAMBLE}{FILL_UP.replace('LIMIT', '')}"
        + """
left = {path.suffix for path in Path(sys.argv[1]).glob("features/*/*")}
print(*sorted(left))
again = table(sys.argv[1])
print(all(digest(i) in again for i in range(3)), digest(9) in again)
"""
    )
    command += [sys.executable, "-c", script, str(tmp_path)]
    output = subprocess.check_output(command, text=True, timeout=60)
    error, left, found = output.splitlines()
    assert "feature cache cannot be written" in error
    assert "No space left on device" in error and "kt cache prune" in error
    assert left == ".index .json .npy"
    assert found == "True True"


def test_a_file_that_may_not_grow_leaves_nothing_partial(cache):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"
    process = start(FILL_UP.replace("LIMIT", limit), cache.directory.parent)
    (error,) = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    assert "feature cache cannot be written" in error and "File too large" in error
    assert {path.suffix for path in cache.directory.glob("*/*")} == {
        ".npy",
        ".index",
        ".json",
    }
    assert held(cache, range(12)) == [0, 1, 2]


def test_the_cache_needs_no_tensorflow():
    heavy = {"tensorflow", "keras", "openvino", "sklearn", "scipy"}
    code = (
        f"import sys, keras_transfer.features.cache; print(*{heavy} & set(sys.modules))"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.split() == []
