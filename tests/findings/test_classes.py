"""Classes and splits: what is doubtful is found, and what is by chance is not."""

import numpy as np
import pytest
from made_audits import audited

from keras_transfer.evaluation.intervals import Groups, from_trials, wilson
from keras_transfer.findings.classes import (
    class_findings,
    single_group_findings,
    training_groups,
)
from keras_transfer.findings.telling import fraction_interval


def findings(images, said=None):
    if said is None:
        said = np.full((len(images), len(images.class_names)), np.nan, np.float32)
    return {one.kind: one for one in class_findings(images, said)}


def sure(classes, count=2):
    return np.eye(count, dtype=np.float32)[classes]


def test_balanced_classes_and_splits_have_no_finding():
    targets = np.arange(400) % 2
    split = ["test" if i % 10 < 2 else "train" for i in range(400)]
    assert findings(audited(targets, split=split), sure(targets)) == {}


def test_classes_that_are_taken_for_each_other_look_alike():
    targets = np.arange(200) % 2
    said = targets.copy()
    said[:40] = 1 - said[:40]
    found = findings(audited(targets), sure(said))["classes that look alike"]
    low, high = wilson(0.2, 200)
    assert found.figures == pytest.approx(
        {"share": 0.2, "low": low, "high": high, "images": 40}
    )
    assert "'cat' and 'dog'" in found.message
    said[:40] = targets[:40]
    said[:24] = 1 - said[:24]  # 12%, but its interval begins below 10%
    assert "classes that look alike" not in findings(audited(targets), sure(said))


def test_only_the_worst_pairs_are_told():
    names = [str(i) for i in range(10)]
    targets = np.arange(1000) % 10
    said = np.random.default_rng(0).integers(0, 10, 1000)
    found = class_findings(audited(targets, class_names=names), sure(said, 10))
    assert sum(x.kind == "classes that look alike" for x in found) == 5


def test_classes_with_few_images():
    names = [f"c{i}" for i in range(8)]
    targets = np.repeat(np.arange(8), [3, 9, 10, 49, 50, 60, 60, 60])
    found = findings(audited(targets, class_names=names))
    too_few = found["classes with too few images"]
    assert too_few.severity == "medium"
    assert "'c0' 3, 'c1' 9" in too_few.message
    assert "'c2' 10, 'c3' 49" in found["classes with few images"].message
    assert found["classes with few images"].severity == "low"


def test_classes_that_a_split_lacks():
    targets = np.repeat([0, 1, 2], 60)
    split = np.array(["train"] * 180)
    split[:20] = "test"
    split[120:] = "test"
    images = audited(targets, split=split.tolist(), class_names=("a", "b", "c"))
    found = findings(images)
    assert "'c'" in found["classes absent from train"].message
    assert "'b'" in found["classes absent from test"].message
    assert found["classes absent from test"].severity == "medium"


def test_another_mix_of_classes_in_the_test_split():
    targets = np.concatenate([np.repeat([0, 1], 300), np.repeat([0, 1], [20, 180])])
    split = ["train"] * 600 + ["test"] * 200
    found = findings(audited(targets, split=split))["class balance of test"]
    assert found.severity == "medium"
    assert found.figures["classes"] == 2
    assert {found.figures["train"], found.figures["test"]} in ({0.5, 0.1}, {0.5, 0.9})


def of_patients(patients, test, seed, *, mixed=False):
    """Images of 25 to a patient, whose classes follow the patient."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), 25)
    targets = rng.integers(0, 2, patients)[patient]
    if mixed:
        targets = np.where(rng.random(len(patient)) < 0.3, 1 - targets, targets)
    split = np.where(
        np.isin(patient, rng.permutation(patients)[:test]), "test", "train"
    )
    groups = [f"p{i}" for i in patient]
    return audited(targets, split=split.tolist(), groups=groups)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_few_patients_differ_from_others_by_chance(mixed):
    found = [findings(of_patients(40, 8, seed, mixed=mixed)) for seed in range(40)]
    assert sum("class balance of test" in one for one in found) <= 2


@pytest.mark.parametrize("mixed", [False, True])
def test_another_mix_of_patients_in_the_test_split(mixed):
    images = of_patients(200, 40, 0, mixed=mixed)
    patient = np.repeat(np.arange(200), 25)
    is_test, row = images.split == "test", np.arange(len(images))
    unit = row if mixed else patient
    share = np.where(is_test, 0.85, 0.4)
    targets = (np.random.default_rng(0).random(len(images))[unit] < share).astype(int)
    uneven = audited(targets, split=images.split.tolist(), groups=images.table.groups)
    assert "class balance of test" in findings(uneven)


def test_intervals_count_groups():
    images = of_patients(40, 8, 0)
    said = images.table.targets.copy()
    number = np.unique(images.table.groups, return_inverse=True)[1]
    said[number % 6 == 0] = 1 - said[number % 6 == 0]  # 175 of 1,000, of 7 patients
    found = findings(images, sure(said))
    assert "classes that look alike" not in found
    small = found["small test set"]
    assert "With 200 test images of 8 groups an accuracy" in small.message
    is_test = images.split == "test"
    right = (said == images.table.targets)[is_test].astype(float)
    groups = Groups.of(images.table.select(is_test).groups)
    low, high = fraction_interval(right, groups)
    assert (small.figures["low"], small.figures["high"]) == pytest.approx((low, high))
    alike = findings(of_patients(40, 8, 0), sure(1 - images.table.targets))
    low, high = from_trials(1.0, 40, 39)
    assert alike["classes that look alike"].figures["low"] == pytest.approx(low)


def test_a_small_test_set_says_little():
    targets = np.arange(100) % 2
    split = ["test"] * 20 + ["train"] * 80
    found = findings(audited(targets, split=split), sure(targets))
    assert "small test set" not in found  # all are right: 0.84 to 1
    said = targets.copy()
    said[::4] = 1 - said[::4]
    found = findings(audited(targets, split=split), sure(said))["small test set"]
    assert found.figures["high"] - found.figures["low"] > 0.2
    assert found.severity == "low"


def test_groups_that_are_divided_between_splits_are_high():
    targets = np.arange(120) % 2
    split = ["test"] * 60 + ["train"] * 60
    groups = [""] * 120
    groups[3] = groups[4] = groups[70] = "p"
    groups[5] = "q"
    found = findings(audited(targets, split=split, groups=groups))
    one = found["groups divided between splits"]
    assert one.severity == "high"
    assert [(x.path, x.other) for x in one.suspects] == [("3", "p"), ("4", "p")]


def test_multi_label_data_and_no_images_at_all():
    targets = (np.random.default_rng(0).random((200, 2)) < 0.5).astype(np.uint8)
    split = ["test" if i % 4 == 0 else "train" for i in range(200)]
    assert findings(audited(targets, split=split), np.full((200, 2), 0.5)) == {}
    assert "small test set" not in findings(audited(np.zeros(0, int)))


def test_classes_of_a_single_group_cannot_be_judged():
    targets = np.repeat([0, 1, 2], [5, 5, 1])
    groups = [*"aaaaa", *"bbcc", "", ""]
    images = audited(targets, groups=groups, class_names=("cat", "dog", "eel"))
    assert training_groups(images).tolist() == [1, 3, 1]
    (found,) = single_group_findings(images)
    assert found.kind == "classes of a single group" and found.severity == "medium"
    assert "2 of 3 classes have" in found.message and "'cat', 'eel'" in found.message
    split = ["test"] * 5 + ["train"] * 6
    images = audited(targets, split=split, groups=groups, class_names=("a", "b", "c"))
    assert training_groups(images).tolist() == [0, 3, 1]
    labels = np.array([[1, 0], [1, 1], [0, 1]], np.uint8)
    assert training_groups(audited(labels, groups=["x", "x", ""])).tolist() == [1, 2]


def test_few_images_and_one_class_have_their_own_words():
    found = findings(audited([0, 1]), sure([1, 0]))
    assert "classes that look alike" not in found
    split = ["test"] * 2 + ["train"] * 6
    one = audited(np.zeros(8, int), split=split, class_names=("cat",))
    assert "small test set" not in findings(one)
    images = audited(np.arange(8) % 2, split=["test", *["train"] * 7])
    assert "With 1 test image an" in findings(images)["small test set"].message
