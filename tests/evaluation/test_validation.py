"""Images set aside from training: how many, of which classes, and whole groups."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_transfer.data.tables import Table
from keras_transfer.errors import UsageError
from keras_transfer.evaluation.validation import (
    can_judge,
    carve,
    carve_again,
    halves,
    validation_images,
)


def table(targets: np.ndarray | list[int], groups: list[str] | None = None) -> Table:
    targets = np.asarray(targets)
    names = tuple(f"{i}.png" for i in range(len(targets)))
    return Table(names, targets, tuple(groups or [""] * len(targets)))


@pytest.mark.parametrize(
    ("images", "expected"),
    [(12, 3), (30, 8), (100, 25), (399, 100), (400, 100), (999, 100), (1010, 101)]
    + [(5000, 500)],
)
def test_a_tenth_is_set_aside_or_up_to_a_quarter_for_a_hundred(images, expected):
    assert validation_images(images) == expected
    train, val = carve(table(np.arange(images) % 4), 4, seed=0)
    assert len(val) == pytest.approx(expected, abs=1)
    assert len(train) + len(val) == images
    assert not set(train.sources) & set(val.sources)
    assert np.ptp(np.bincount(val.targets, minlength=4)) <= 2


def test_the_seed_decides_which():
    images = table(np.arange(200) % 5)
    one, same, other = (carve(images, 5, seed)[1].sources for seed in (1, 1, 2))
    assert one == same != other


@settings(max_examples=60, deadline=None)
@given(
    classes=st.lists(st.integers(0, 5), min_size=12, max_size=120),
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=120),
    several=st.booleans(),
    seed=st.integers(0, 9),
)
def test_groups_stay_whole_and_no_class_is_lost(classes, sizes, several, seed):
    groups = [
        str(i) if size else "" for i, size in enumerate(sizes) for _ in "x" * size
    ]
    groups = (groups + [""] * len(classes))[: len(classes)]
    targets = np.eye(6, dtype=np.uint8)[classes] if several else np.array(classes)
    images = table(targets, groups)
    try:
        train, val = carve(images, 6, seed)
    except UsageError:
        units = Counter(groups)
        most = max(Counter(classes).values())
        assert units.pop("", 0) + len(units) < 12 or most < len(classes) / 3
        return
    assert sorted(train.sources + val.sources) == sorted(images.sources)
    assert not (set(train.groups) & set(val.groups)) - {""}
    shown = train.targets.any(0) if several else np.isin(range(6), train.targets)
    assert shown[np.unique(classes)].all()
    assert can_judge(val)
    first = halves(val, 6, seed)
    assert first.any() and not first.all()
    names = np.array(val.groups)
    assert not (set(names[first]) & set(names[~first])) - {""}


def test_of_groups_about_as_many_images_are_set_aside():
    groups = [f"patient{i // 4}" for i in range(300)]
    images = table((np.arange(300) // 4) % 3, groups)
    _, val = carve(images, 3, seed=0)
    assert len(val) == pytest.approx(validation_images(300), abs=8)
    assert min(np.bincount(val.targets, minlength=3)) >= 16
    first = halves(val, 3, seed=0)
    assert first.mean() == pytest.approx(0.5, abs=0.08)


def test_a_class_with_one_image_or_one_group_trains():
    images = table([0] * 40 + [1])
    for seed in range(10):
        assert 1 not in carve(images, 2, seed)[1].targets
    grouped = table([0] * 40 + [1] * 8, [f"g{i // 4}" for i in range(40)] + ["x"] * 8)
    for seed in range(10):
        train, val = carve(grouped, 2, seed)
        assert "x" in train.groups and len(val)


@pytest.mark.parametrize("size", [1, 4])
def test_images_that_judged_judge_again_when_others_are_gone(size):
    groups = [f"patient{i // size}" for i in range(240)] if size > 1 else None
    before = table(np.arange(240) // 4 % 3, groups)
    learned, judged = carve(before, 3, seed=0)
    gone = {*before.sources[:8], *before.sources[100:104]}
    now = before.keep({*before.sources} - gone)
    train, val = carve_again(now, {*judged.sources})
    assert set(val.sources) == {*judged.sources} - gone
    assert set(train.sources) == {*learned.sources} - gone
    assert {*carve(now, 3, seed=0)[1].sources} & {*learned.sources}  # unlike this


def test_the_last_images_of_a_class_train_instead_of_judging_again():
    images = table([0] * 9 + [1])
    train, val = carve_again(images, {"0.png", "9.png"})
    assert val.sources == ("0.png",) and "9.png" in train.sources
    train, val = carve_again(images, set())
    assert (len(train), len(val)) == (10, 0)
    assert not can_judge(val)


def test_three_groups_or_images_can_judge():
    assert can_judge(table([0, 0, 0])) and not can_judge(table([0, 0]))
    assert can_judge(table([0] * 4, ["a", "a", "b", ""]))
    assert not can_judge(table([0] * 6, ["a", "a", "a", "b", "b", "b"]))


def test_halves_have_the_same_classes():
    val = table(np.repeat(np.arange(4), 10))
    first = halves(val, 4, seed=3)
    assert first.sum() == 20
    assert np.bincount(val.targets[first], minlength=4).tolist() == [5] * 4
    assert (halves(val, 4, seed=3) == first).all()
    assert (halves(val, 4, seed=4) != first).any()
    single = replace(val, targets=np.arange(40), groups=tuple("ab" * 20))
    assert halves(single, 40, seed=0).sum() == 20  # no class twice


@pytest.mark.parametrize(
    "images",
    [
        table([0, 1, 0]),
        table([0] * 6, ["a"] * 6),
        table([0] * 20 + [1] * 20, ["a"] * 20 + ["b"] * 20),
        table([0, 1] * 20, [f"g{i // 5}" for i in range(40)]),  # 8, half would judge
        table([0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_too_few_to_set_some_aside_is_one_line(images):
    with pytest.raises(UsageError, match=r"Received: \d+ .* Use more images, .*force"):
        carve(images, 8, seed=0)
