"""Trained on some sources, tested on another."""

import numpy as np
from audited import audited

from keras_transfer.findings.sources import source_findings


def made(seed: int, shortcut: bool, count: int = 240) -> tuple:
    """(targets, hospitals, features) of images with a shortcut in all but hospital C.

    A weak feature tells the class everywhere. A strong one tells it in A and B, and
    says nothing in C.
    """
    rng = np.random.default_rng(seed)
    y, hospital = rng.integers(0, 2, count), rng.integers(0, 3, count)
    sign = 2.0 * y - 1
    strong = 3 * np.where(hospital < 2, sign, rng.choice([-1, 1], count) * shortcut)
    features = rng.normal(0, 1, (count, 8))
    features[:, 0] += 0.7 * sign
    features[:, 1] += strong if shortcut else 0
    return y, np.array(["A", "B", "C"])[hospital], features.astype(np.float32)


def test_a_head_that_learned_a_shortcut_fails_where_it_is_absent():
    y, hospital, features = made(0, shortcut=True)
    # In C, the shortcut speaks for the wrong class.
    features[hospital == "C", 1] = -3 * (2 * y[hospital == "C"] - 1)
    images = audited(y, features=features, columns={"hospital": hospital})
    (found,) = source_findings(images, 0)
    assert found.kind == "worse on another source" and found.severity == "high"
    assert found.message.startswith(
        "Trained on A, B and tested on C of the column 'hospital': accuracy 0."
    )
    assert found.figures["accuracy"] < found.figures["all_sources"] - 0.2
    assert found.figures["images"] == (hospital == "C").sum()


def test_sources_that_do_not_differ_are_no_finding():
    for seed in range(2):
        y, hospital, features = made(seed, shortcut=False)
        images = audited(y, features=features, columns={"hospital": hospital})
        assert source_findings(images, seed) == []


def test_sources_of_one_class_each_cannot_be_tested():
    y, _, features = made(0, shortcut=True)
    images = audited(y, features=features, columns={"hospital": np.where(y, "A", "B")})
    assert source_findings(images, 0) == []


def test_long_names_of_sources_are_cut():
    y, hospital, features = made(0, shortcut=True)
    features[hospital == "C", 1] = -3 * (2 * y[hospital == "C"] - 1)
    names = np.array([x * 90 for x in hospital])
    images = audited(y, features=features, columns={"hospital": names})
    (found,) = source_findings(images, 0)
    start = f"Trained on {'A' * 40}..., {'B' * 40}... and tested on {'C' * 40}... of"
    assert found.message.startswith(start) and "C" * 41 not in found.message
