"""Label errors and outliers: planted ones are found, and what is believed is told."""

import numpy as np
import pytest
from made_audits import audited

from keras_transfer.data.tables import Table
from keras_transfer.findings.label_errors import judged_images, label_error_findings
from keras_transfer.findings.outliers import outlier_findings
from keras_transfer.training.out_of_fold import out_of_fold_probabilities

pytest.importorskip("cleanlab")
NAMES = ("cat", "dog", "eel")


def clusters(count=120, classes=3, seed=0):
    """Targets and features of classes that are mostly apart."""
    rng = np.random.default_rng(seed)
    targets = np.arange(count) % classes
    centers = rng.normal(size=(classes, 8)) * 6
    features = centers[targets] + rng.normal(size=(count, 8))
    return targets, features.astype(np.float32)


def table(targets, groups=None):
    names = tuple(map(str, range(len(targets))))
    return Table(names, targets, tuple(groups or [""] * len(targets)))


def test_flipped_labels_are_found_with_the_class_that_is_believed():
    targets, features = clusters()
    given = targets.copy()
    flipped = [3, 50, 77]
    given[flipped] = (given[flipped] + 1) % 3
    said = out_of_fold_probabilities(table(given), features, 3, 0)
    (found,) = label_error_findings(audited(given, class_names=NAMES), said)
    first = found.suspects[:3]
    assert {int(x.path) for x in first} == {*flipped}
    assert [x.other for x in first] == [NAMES[targets[int(x.path)]] for x in first]
    scores = [x.score for x in found.suspects]
    assert scores == sorted(scores, reverse=True)
    assert min(scores) >= 0 and max(scores) <= 1
    assert found.severity == "medium"
    assert len(found.suspects) <= 6


def test_right_labels_are_no_suspects():
    targets, features = clusters()
    said = out_of_fold_probabilities(table(targets), features, 3, 0)
    found = label_error_findings(audited(targets, class_names=NAMES), said)
    assert sum(len(one.suspects) for one in found) <= 2


def test_images_without_a_prediction_are_left_out():
    targets, features = clusters()
    given = targets.copy()
    given[[3, 50]] = (given[[3, 50]] + 1) % 3
    said = out_of_fold_probabilities(table(given), features, 3, 0)
    said[50] = np.nan
    (found,) = label_error_findings(audited(given, class_names=NAMES), said)
    assert "3" in {x.path for x in found.suspects}
    assert "50" not in {x.path for x in found.suspects}
    nothing = np.full_like(said, np.nan)
    assert label_error_findings(audited(given, class_names=NAMES), nothing) == []


def test_images_of_a_class_that_no_model_knows_are_no_suspects():
    targets, features = clusters()
    given = targets.copy()
    given[given == 2] = 1
    given[[5, 8]] = 2  # all that are labeled so
    images = audited(given, class_names=NAMES)
    said = np.full((len(given), 3), 0.01, np.float32)
    said[np.arange(len(given)), np.minimum(given, 1)] = 0.98
    said[10] = said[10, [1, 0, 2]]
    (found,) = label_error_findings(images, said)
    assert [x.path for x in found.suspects] == ["10"]
    assert np.flatnonzero(~judged_images(images, said)).tolist() == [5, 8]


def test_a_class_that_no_image_shows_is_no_matter():
    targets, features = clusters(classes=2)
    given = targets * 2
    given[4] = 2 - given[4]
    said = out_of_fold_probabilities(table(given), features, 3, 0)
    (found,) = label_error_findings(audited(given, class_names=NAMES), said)
    assert (found.suspects[0].path, found.suspects[0].other) == ("4", "cat")


def test_a_class_too_many_or_too_few_is_found():
    rng = np.random.default_rng(0)
    targets = (rng.random((150, 3)) < 0.5).astype(np.uint8)
    features = (targets * 9 + rng.normal(size=(150, 3))).astype(np.float32)
    given = targets.copy()
    given[10, 0] ^= 1
    given[20, 2] ^= 1
    said = out_of_fold_probabilities(table(given), features, 3, 0)
    (found,) = label_error_findings(audited(given, class_names=NAMES), said)
    first = {x.path: x.other for x in found.suspects[:4]}
    expected = {
        str(row): "|".join(np.array(NAMES)[targets[row] > 0]) for row in (10, 20)
    }
    assert expected.items() <= first.items()


def test_no_head_learns_from_the_group_of_what_it_predicts():
    rng = np.random.default_rng(0)
    features = np.repeat(rng.normal(size=(30, 6)), 2, axis=0).astype(np.float32)
    targets = np.repeat(rng.integers(0, 2, 30), 2)  # nothing to learn but the copy
    groups = [str(i // 2) for i in range(60)]
    said = out_of_fold_probabilities(table(targets, groups), features, 2, 0)
    accuracy = (said.argmax(1) == targets).mean()
    assert np.isfinite(said).all()
    assert accuracy < 0.75


def test_too_few_images_or_classes_give_no_predictions():
    one = out_of_fold_probabilities(table(np.zeros(9, int)), np.eye(9), 1, 0)
    assert one.shape == (9, 1) and np.isnan(one).all()
    few = out_of_fold_probabilities(table(np.arange(1)), np.eye(1), 2, 0)
    assert np.isnan(few).all()


def test_an_image_unlike_all_others_is_an_outlier_even_with_its_copy():
    targets, features = clusters()
    features = np.abs(features)
    assert outlier_findings(audited(targets, features=features), 0) == []
    features[[5, 9]] = [0, 0, 0, 0, 0, 0, 0, 900]
    features[9] += 0.01
    groups = ["x" if i in (5, 9) else "" for i in range(len(targets))]
    images = audited(targets, features=features, groups=groups)
    (found,) = outlier_findings(images, 0)
    assert {x.path for x in found.suspects[:2]} == {"5", "9"}
    assert found.severity == "low"
    assert outlier_findings(audited(targets[:10], features=features[:10]), 0) == []


def test_a_class_that_no_other_fold_shows_is_not_predicted():
    targets, features = clusters()
    groups = ["film" if y == 2 else "" for y in targets]
    said = out_of_fold_probabilities(table(targets, groups), features, 3, 0)
    is_known = np.isfinite(said).all(1)
    np.testing.assert_array_equal(is_known, targets != 2)
    found = label_error_findings(audited(targets, class_names=NAMES), said)
    assert all(targets[int(x.path)] != 2 for one in found for x in one.suspects)
    films = [str(y) for y in targets]
    assert np.isnan(
        out_of_fold_probabilities(table(targets, films), features, 3, 0)
    ).all()
