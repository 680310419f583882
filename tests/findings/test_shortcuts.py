"""What tells the class is found, and what does not is not."""

import datetime
import re

import numpy as np
import pyarrow as pa
import pytest
from audited import audited
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_transfer.data.quality import FILE_TYPES
from keras_transfer.findings.shortcuts import shortcut_findings

JPEG, PNG = FILE_TYPES.index("JPEG"), FILE_TYPES.index("PNG")
Y = np.arange(200) % 2


def kinds(images, **options) -> dict[str, str]:
    """Severities of the findings by their kinds."""
    found = shortcut_findings(images, None, 0, **options)
    return {one.kind: one.severity for one in found}


def test_a_file_type_that_tells_the_class_is_said_in_words():
    rng = np.random.default_rng(0)
    is_png = np.where(rng.random(200) < 0.9, Y == 1, Y == 0)
    images = audited(
        Y,
        names=("healthy", "ill"),
        file_type=np.where(is_png, PNG, JPEG),
        jpeg_quality=np.where(is_png, 0, 90),
    )
    (found,) = shortcut_findings(images, None, 0)
    assert found.kind == "class told from the file type" and found.severity == "high"
    told = (is_png == (Y == 1)).mean()
    assert found.figures["accuracy"] == pytest.approx(told)
    assert found.figures["baseline"] == 0.5 and found.figures["images"] == 200
    assert found.figures["low"] < told < found.figures["high"]
    share = is_png[Y == 1].mean()
    assert f"{told:.2f} (" in found.message
    assert "(0.50 by always saying 'healthy')" in found.message
    assert f": 'PNG' in {share:.0%} of 'ill', " in found.message or ": 'JPEG' in " in (
        found.message
    )
    assert "DeGrave" in found.message


def test_severity_is_by_the_way_to_the_models_own_accuracy():
    rng = np.random.default_rng(0)
    y = np.arange(800) % 2
    tells = rng.random(800) < 0.72
    images = audited(y, width=np.where(tells, y, 1 - y) * 10 + 64)
    assert [x.severity for x in shortcut_findings(images, None, 0)] == ["medium"]
    assert [x.severity for x in shortcut_findings(images, 0.75, 0)] == ["high"]


@pytest.mark.parametrize("seed", range(5))
def test_what_has_nothing_to_do_with_the_class_is_not_found(seed):
    rng = np.random.default_rng(seed)
    images = audited(
        rng.integers(0, 3, 300),
        [f"{'ab'[i % 2]}/img_{i}.jpg" for i in range(300)],
        columns={"hospital": rng.integers(0, 4, 300), "age": rng.normal(50, 9, 300)},
        width=rng.integers(50, 90, 300),
        brightness=rng.normal(100, 20, 300),
        jpeg_quality=rng.choice([80, 90, 95], 300),
        is_gray=rng.random(300) < 0.5,
    )
    assert kinds(images) == {}


def test_a_rare_class_is_told_though_the_accuracy_cannot_show_it():
    y = (np.arange(400) < 20).astype(np.int64)
    gray = (y == 1) | (np.arange(400) % 8 == 0)
    (found,) = shortcut_findings(audited(y, is_gray=gray), None, 0)
    assert found.kind == "class told from color or grayscale"
    assert "accuracy" not in found.figures
    assert found.figures["balanced_accuracy"] > 0.9
    assert "Color or grayscale alone tells 'class 1' from all others" in found.message
    assert ": 'gray' in 100% of 'class 1', " in found.message


def test_one_class_of_three_that_is_told_is_of_high_severity():
    y = np.arange(90) % 3
    images = audited(y, file_type=np.where(y == 2, JPEG, PNG), jpeg_quality=0)
    (found,) = shortcut_findings(images, None, 0)
    assert found.severity == "high" and "balanced accuracy of 1.00" in (found.message)
    assert found.figures["accuracy"] == pytest.approx(2 / 3, abs=0.1)


def test_brightness_may_be_what_is_shown():
    rng = np.random.default_rng(0)
    images = audited(Y, brightness=100 + 30 * Y + rng.normal(0, 12, 200))
    (found,) = shortcut_findings(images, None, 0)
    assert found.severity == "low" and "What is shown may be the reason" in (
        found.message
    )
    images = audited(Y, brightness=100 + 12 * Y + rng.normal(0, 12, 200))
    assert kinds(images) == {}


def test_files_tell_more_together():
    rng = np.random.default_rng(0)
    y, gray = rng.integers(0, 2, (2, 400))
    images = audited(y, is_gray=gray == 1, width=64 + 10 * (y ^ gray))
    (found,) = shortcut_findings(images, None, 0)
    assert found.kind == "class told from how the files were made"
    assert found.severity == "high"


def test_the_label_in_paths_is_no_shortcut_but_shared_folders_are():
    names = ("cat", "dog")
    paths = [f"train/{names[y]}/{names[y]}_{i}.jpg" for i, y in enumerate(Y)]
    assert kinds(audited(Y, paths, names=names)) == {}
    subclass = [f"{names[y]}/{names[y]} {i % 3}/{i}.jpg" for i, y in enumerate(Y)]
    assert kinds(audited(Y, subclass, names=names)) == {}
    rng = np.random.default_rng(0)
    site = np.where(rng.random(200) < 0.9, Y, 1 - Y)
    shared = [f"{names[y]}/site{site[i]}/{i}.jpg" for i, y in enumerate(Y)]
    assert kinds(audited(Y, shared, names=names)) == {
        "class told from the folder": "medium"
    }
    shapes = [f"{names[y]}/{'IMG-' * y}{i}.jpg" for i, y in enumerate(Y)]
    (found,) = shortcut_findings(audited(Y, shapes, names=names), None, 0)
    assert found.kind == "class told from the form of the file name"
    assert found.severity == "medium"
    assert re.search(r"names such as '(IMG-)?\d+.jpg' in 100% of ", found.message)


def test_numbers_are_told_with_units_and_few_digits():
    noise = np.random.default_rng(0).integers(-300, 300, 200)
    (found,) = shortcut_findings(
        audited(Y, bytes=np.where(Y, 114_200, 63_210) + noise), None, 0
    )
    assert "median file size 114 KB of 'class 1', 63 KB of 'class 0'" in found.message
    (found,) = shortcut_findings(
        audited(Y, sharpness=np.where(Y, 5.52, 2.21) + noise / 1e4), None, 0
    )
    assert "median sharpness 5.5 of 'class 1', 2.2 of 'class 0'" in found.message
    y = np.arange(200) % 4
    size = np.where(y == 1, 572, 1024) + noise // 20
    (found,) = shortcut_findings(audited(y, width=size), None, 0)
    assert "'class 1' from all others with a balanced accuracy of 1.00" in found.message
    assert re.search("width 57. pixels of 'class 1', 1,0.. of", found.message)


def test_a_column_whose_values_go_with_the_class():
    hospital = np.array(["A", "B", "C"])[np.where(Y, 2, np.arange(200) // 2 % 2)]
    images = audited(
        Y,
        columns={
            "hospital": hospital,
            "label": [f"class {y}" for y in Y],  # the label once more
            "row": np.argsort(Y, kind="stable").argsort(),  # sorted by class
            "patient": [f"P{i}" for i in range(200)],
        },
    )
    (found,) = shortcut_findings(images, None, 0)
    assert found.kind == "class told from a column" and found.severity == "high"
    assert "The column 'hospital'" in found.message
    assert "Each class has sources of its own" in found.message
    images = audited(Y, columns={"code": np.where(Y, "x", "y")})
    (found,) = shortcut_findings(images, None, 0)
    assert found.severity == "medium" and "under another name" in found.message


@pytest.mark.parametrize(
    "name", ["study", "StudyID", "MRIScanner", "site2", "data_set", "hospitalid"]
)
def test_columns_of_sources_are_known_by_words(name):
    (found,) = shortcut_findings(
        audited(Y, columns={name: np.where(Y, "x", "y")}), 1, 0
    )
    assert found.severity == "high" and "sources of its own" in found.message


@pytest.mark.parametrize("name", ["velocity", "capacity", "opposite", "original"])
def test_parts_of_words_are_no_sources(name):
    (found,) = shortcut_findings(
        audited(Y, columns={name: np.where(Y, "x", "y")}), 1, 0
    )
    assert found.severity == "medium" and "sources of its own" not in found.message


def test_the_column_of_suspects_is_no_shortcut():
    marks = np.where(Y, "label errors", "")
    assert kinds(audited(Y, columns={"suspect": marks, "Suspect ": marks})) == {}


def test_files_measured_of_one_class_only_say_nothing():
    is_known = Y == 1
    width = np.where(np.arange(200) % 4 < 2, 64, 80)
    quality = np.arange(200) // 2 % 3 + 80
    images = audited(Y, bytes=is_known * 1000, width=width, jpeg_quality=quality)
    assert kinds(images) == {}


def test_groups_are_not_divided():
    # All images of a patient have one width and one class; widths are random.
    rng = np.random.default_rng(1)
    patient = np.arange(400) // 25
    y = rng.permutation(np.arange(16) % 2)[patient]
    width = rng.permutation(16)[patient] + 64
    groups = [f"patient {p}" for p in patient]
    assert kinds(audited(y, width=width)) == {
        "class told from the size of the image": "high"
    }
    assert kinds(audited(y, groups=groups, width=width)) == {}


def test_classes_of_multi_label_images():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, (300, 4)).astype(np.uint8)
    images = audited(
        targets,
        is_gray=np.where(rng.random(300) < 0.9, targets[:, 2], 1 - targets[:, 2]) == 1,
        width=rng.integers(50, 90, 300),
    )
    (found,) = shortcut_findings(images, None, 0)
    assert found.kind == "class told from color or grayscale"
    assert "alone tells 'class 2' from all others" in found.message
    assert "class 1" not in found.message


def test_few_or_unmeasured_images_say_nothing():
    assert shortcut_findings(audited(Y[:8], width=Y[:8] + 60), None, 0) == []
    assert shortcut_findings(audited(Y, bytes=0, width=Y + 60), None, 0) == []
    assert kinds(audited(Y * 0, width=np.arange(200))) == {}  # a single class


CELLS = st.one_of(
    st.lists(st.none() | st.text(max_size=3), min_size=40, max_size=40),
    st.lists(st.none() | st.floats(), min_size=40, max_size=40),
    st.lists(st.none() | st.integers(-(2**40), 2**40), min_size=40, max_size=40),
    st.lists(st.none() | st.booleans(), min_size=40, max_size=40),
    st.lists(st.none() | st.dates(), min_size=40, max_size=40),
    st.lists(st.none() | st.binary(max_size=3), min_size=40, max_size=40),
)


@settings(max_examples=10, deadline=None)
@given(CELLS, st.text(min_size=1, max_size=8))
def test_columns_may_hold_anything(cells, name):
    images = audited(Y[:40], columns={name: pa.array(cells)})
    shortcut_findings(images, None, 0)


def test_dates_and_categories_tell_the_class_too():
    day = [datetime.date(2020 + int(y), 1, 1 + i % 28) for i, y in enumerate(Y)]
    site = pa.array(np.where(Y, "A", "B").tolist()).dictionary_encode()
    found = shortcut_findings(audited(Y, columns={"day": day, "site": site}), None, 0)
    assert [x.kind for x in found] == ["class told from a column"] * 2
