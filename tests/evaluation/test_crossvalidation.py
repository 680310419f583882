"""Out-of-fold figures: corrected for what they chose, and never certain by accident."""

from dataclasses import replace

import numpy as np
import pytest

from keras_transfer.data.tables import Table
from keras_transfer.evaluation import crossvalidation
from keras_transfer.evaluation.crossvalidation import (
    FOLDS,
    OutOfFold,
    can_be_right,
    evaluate_out_of_fold,
    fold_numbers,
    head_folds,
    quick_folds,
    selection_bias,
)
from keras_transfer.evaluation.metrics import metrics_of, score

NAMES = ("a", "b", "c")


def table(targets: np.ndarray, groups: tuple[str, ...] = ()) -> Table:
    names = tuple(map(str, range(len(targets))))
    return Table(names, targets, groups or ("",) * len(targets))


def losses(targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    right = probabilities[..., np.arange(len(targets)), targets]
    return -np.log(np.maximum(right, 1e-7))


def noise(candidates: int, images: int, seed: int):
    """Candidates that know nothing: which one is best is luck."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 2, images)
    said = rng.dirichlet([1, 1], (candidates, images)).astype(np.float32)
    return targets, said


def out_of_fold(targets, said, metric=None, folds=None) -> OutOfFold:
    each = losses(targets, said)
    keys = [
        (score(metric, targets, p) if metric else 0.0, -loss.mean())
        for p, loss in zip(said, each, strict=True)
    ]
    chosen = max(range(len(keys)), key=keys.__getitem__)
    numbers = np.arange(len(targets)) % 5 if folds is None else folds
    return OutOfFold(numbers, said, each, chosen)


def test_the_best_of_many_that_know_nothing_is_no_better_than_chance():
    plain, corrected = [], []
    for seed in range(40):
        targets, said = noise(20, 60, seed)
        found = out_of_fold(targets, said, "accuracy")
        bias = selection_bias(targets, found, ("",) * 60, "accuracy", seed)
        plain.append(score("accuracy", targets, said[found.chosen]))
        corrected.append(plain[-1] + bias["accuracy"])
    assert np.mean(plain) > 0.6  # flatters, though the truth is 0.5
    assert np.mean(corrected) == pytest.approx(0.5, abs=0.02)


def test_a_single_candidate_was_not_chosen_and_needs_no_correction():
    targets, said = noise(1, 60, 0)
    found = out_of_fold(targets, said)
    assert set(selection_bias(targets, found, ("",) * 60, None, 0).values()) == {0.0}


def test_equal_metrics_are_told_apart_by_the_loss_in_the_bootstrap_too():
    targets = np.arange(40) % 2
    sure, unsure = (
        np.eye(2, dtype="f4")[targets] * p + (1 - p) / 2 for p in (0.9, 0.1)
    )
    found = out_of_fold(targets, np.stack([unsure, sure]), "accuracy")
    assert found.chosen == 1
    figures, _ = evaluate_out_of_fold(
        table(targets), found, NAMES[:2], None, "accuracy", 0
    )
    assert figures.log_loss == pytest.approx(losses(targets, sure).mean(), rel=1e-3)


def test_folds_that_agree_do_not_make_a_figure_certain():
    targets = np.arange(50) % 2
    said = np.eye(2, dtype="f4")[targets] * 0.8 + 0.1
    found = out_of_fold(targets, said[None])
    figures, folds = evaluate_out_of_fold(
        table(targets), found, NAMES[:2], None, None, 0
    )
    assert figures.accuracy == folds.mean == 1
    assert figures.intervals["accuracy"] == (folds.low, folds.high)
    # Below 0.929, Wilson's of 50 of 50: other training images may do worse.
    assert folds.low == pytest.approx(0.875, abs=0.001)


def test_a_fold_in_which_the_metric_is_undefined_does_not_count():
    targets = np.repeat([0, 1, 0, 1], 5)
    said = np.eye(2, dtype="f4")[targets] * 0.8 + 0.1
    found = out_of_fold(targets, said[None], folds=np.repeat([0, 1, 2, 3], 5))
    figures, folds = evaluate_out_of_fold(
        table(targets), found, NAMES[:2], None, "auc", 0
    )
    assert figures.roc_auc == folds.mean == 1
    mixed = out_of_fold(targets, said[None], folds=np.repeat([0, 0, 1, 2], 5))
    _, folds = evaluate_out_of_fold(table(targets), mixed, NAMES[:2], None, "auc", 0)
    assert folds.values == (1.0,)


@pytest.mark.parametrize("metric", [None, "balanced_accuracy", "log_loss", "auc"])
def test_images_in_no_fold_do_not_count(metric):
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, 90)
    said = rng.dirichlet([1, 1, 1], 30).astype("f4")[None]
    folds = np.where(np.arange(90) < 30, 0, -1)
    each = losses(targets[:30], said)
    found = OutOfFold(folds, said, each, 0)
    figures, estimated = evaluate_out_of_fold(
        table(targets), found, NAMES, None, metric, 0
    )
    assert figures.images == 30 and estimated is None
    assert figures.accuracy == (said[0].argmax(1) == targets[:30]).mean()


def test_every_figure_of_the_metrics_is_corrected():
    for targets in (
        np.arange(30) % 3,
        (np.arange(90).reshape(30, 3) % 2 > 0).astype("u1"),
    ):
        said = np.random.default_rng(0).random((4, 30, 3)).astype("f4")
        found = OutOfFold(np.arange(30) % 5, said, said[..., 0], 0)
        bias = selection_bias(targets, found, ("",) * 30, None, 0)
        assert tuple(bias) == metrics_of(targets)


def test_as_many_folds_as_there_can_be_or_a_tenth_of_many_images(monkeypatch):
    targets = np.arange(60) % 3
    assert set(head_folds(table(targets), 3, None, 0)) == {0, 1, 2, 3, 4}
    assert set(head_folds(table(targets[:3]), 3, None, 0)) == {0, 1, 2}
    assert head_folds(table(targets[:1]), 3, None, 0) is None
    in_groups = table(targets, tuple("ab" * 30))
    assert set(head_folds(in_groups, 3, None, 0)) == {0, 1}
    monkeypatch.setattr(crossvalidation, "MOST_CROSS_VALIDATED", 50)
    tenth = head_folds(table(targets), 3, None, 0)
    assert (tenth == 0).sum() == 6 and (tenth == -1).sum() == 54
    assert set(head_folds(table(targets), 3, 4, 0)) == {0, 1, 2, 3}  # if asked for
    np.testing.assert_array_equal(
        head_folds(table(targets), 3, 4, 0), fold_numbers(table(targets), 3, 4, 0)
    )


def test_a_model_knows_the_classes_that_the_other_folds_show():
    folds = np.array([0, 0, 1, 1, 2, -1])
    one = table(np.array([0, 1, 0, 1, 2, 0]))
    assert can_be_right(one, 3, folds).tolist() == [True] * 4 + [False] * 2
    weighted = replace(one, sample_weight=np.array([1, 0, 1, 1, 1, 1], np.float32))
    assert can_be_right(weighted, 3, folds).tolist() == [
        *(True, True, True, False, False, False)  # only image 1 shows class 1 as well
    ]
    film = table(np.repeat([0, 1], 3))
    assert not can_be_right(film, 2, np.repeat([0, 1], 3)).any()
    uneven = table(np.array([0, 0, 1, 0]))  # class 0 alone was learned
    found = can_be_right(uneven, 2, np.array([0, 1, 0, 1]))
    assert found.tolist() == [False, True, False, True]


def test_a_model_of_several_labels_knows_which_are_shown_and_which_are_not():
    targets = np.array([[1, 0], [1, 1], [0, 1], [1, 0]], np.uint8)
    found = can_be_right(table(targets), 2, np.arange(4))
    assert found.tolist() == [True, True, False, True]  # all others show class 0


def test_one_image_stands_for_its_group():
    targets = np.arange(40) % 2
    grouped = replace(table(targets), groups=tuple(str(i // 4) for i in range(40)))
    folds = quick_folds(grouped, 2, 0)
    assert {len(set(folds[i : i + 4])) for i in range(0, 40, 4)} == {1}
    assert sorted(set(folds)) == [0, 1, 2, 3, 4]
    few = replace(grouped, groups=tuple(str(i // 10) for i in range(40)))
    assert quick_folds(few, 2, 0) is None
    alone = table(targets)
    np.testing.assert_array_equal(
        quick_folds(alone, 2, 0), fold_numbers(alone, 2, FOLDS, 0)
    )
