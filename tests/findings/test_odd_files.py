"""Odd files: what stands out is found, and what is usual in the data is not."""

import numpy as np
import pytest
from made_audits import audited, quality_of

from keras_transfer.findings.odd_files import odd_file_findings, unusable_findings

COUNT = 60


def findings(rows):
    found = odd_file_findings(audited([0] * len(rows), quality=rows))
    return {one.kind: one for one in found}


def paths(found):
    return [one.path for one in found.suspects]


ODD = {
    "tiny images": {"width": 20, "height": 30},
    "huge images": {"width": 4000, "height": 3000},
    "extreme shapes": {"width": 1200, "height": 200},
    "nearly black images": {"brightness": 6, "contrast": 3, "sharpness": 3},
    "nearly white images": {"brightness": 250, "contrast": 3, "sharpness": 3},
    "blank images": {"brightness": 128, "contrast": 0, "sharpness": 0},
    "blurry images": {"sharpness": 3, "contrast": 50},
    "12 bits in 16": {"brightness": 4, "contrast": 2, "is_nearly_black": True},
}


def made_odd(kind, rows, places):
    for name, value in ODD[kind].items():
        rows[name][places] = value
    return rows


def test_usual_photos_have_no_finding():
    assert findings(quality_of(COUNT)) == {}
    assert findings(quality_of(1)) == {}
    assert odd_file_findings(audited([])) == []


@pytest.mark.parametrize("kind", ODD)
def test_what_is_odd_is_found_alone(kind):
    found = findings(made_odd(kind, quality_of(COUNT), [7]))
    assert [*found] == [kind]
    assert paths(found[kind]) == ["7"]
    assert found[kind].figures["images"] == 1
    assert found[kind].severity == ("medium" if kind == "12 bits in 16" else "low")


@pytest.mark.parametrize(
    "kind", ["nearly black images", "nearly white images", "12 bits in 16"]
)
def test_what_many_images_are_is_one_finding_without_suspects(kind):
    found = findings(made_odd(kind, quality_of(COUNT), slice(0, 30)))
    assert [*found] == [kind]
    assert found[kind].suspects == ()
    assert "property of the data" in found[kind].message


def test_a_few_images_are_suspects_whatever_their_share():
    found = findings(made_odd("nearly black images", quality_of(7), [3]))
    assert paths(found["nearly black images"]) == ["3"]
    assert "1 of 7 images is nearly black" in found["nearly black images"].message


def test_images_that_are_all_small_are_one_finding():
    rows = quality_of(COUNT)
    rows["width"] = rows["height"] = 8
    rows["sharpness"] = 2
    found = findings(rows)
    assert [*found] == ["small images"]
    assert found["small images"].suspects == ()
    assert "All images are 8 x 8 pixels" in found["small images"].message
    rows["width"][0] = 9
    assert "at most 8 pixels" in findings(rows)["small images"].message


def test_suspects_are_sorted_and_scored():
    rows = quality_of(COUNT)
    rows["width"][3], rows["width"][4], rows["height"][[3, 4]] = 3000, 2000, 200
    found = findings(rows)["extreme shapes"]
    assert [(x.path, x.score) for x in found.suspects] == [("3", 15.0), ("4", 10.0)]


def test_a_clear_sky_is_not_blurry():
    rows = quality_of(COUNT)
    rows["contrast"][0], rows["sharpness"][0] = 5, 10
    assert findings(rows) == {}


def test_images_that_were_not_measured_are_left_out():
    rows = quality_of(COUNT)
    rows[:50] = np.zeros((), rows.dtype)
    made_odd("tiny images", rows, [55])
    found = findings(rows)
    assert paths(found["tiny images"]) == ["55"]
    assert "1 of 10 images" in found["tiny images"].message


def test_unusable_files_are_told_with_their_reason():
    assert unusable_findings({}) == []
    (found,) = unusable_findings({"a.jpg": "it is empty"})
    assert found.message.startswith("1 file cannot be read or decoded, and is left out")
    (found,) = unusable_findings({"a\udce9.jpg": "it is empty"})
    assert found.severity == "medium"
    assert [(x.path, x.other) for x in found.suspects] == [
        ("a\udce9.jpg", "it is empty")
    ]
