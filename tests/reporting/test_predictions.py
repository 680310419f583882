"""Rows of predictions, read back by csv and json."""

import csv
import io
import json

import numpy as np
import pytest

from keras_transfer.data.tables import Prediction, Table
from keras_transfer.errors import UsageError
from keras_transfer.evaluation.decisions import DecisionRule
from keras_transfer.reporting.predictions import (
    PredictedTable,
    Rows,
    predictions_csv,
    read_predictions,
)

CLASSES = ("cat", "path", 'd"o,g')


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def read_rows(rows: Rows, *predictions: Prediction) -> list[dict[str, str]]:
    return read("\n".join([*rows.header(), *map(rows.line, predictions)]))


PREDICTION = Prediction(
    "a,b.jpg",
    np.array([0.2, 0.1, 0.7], np.float32),
    classes=('d"o,g', "cat"),
    sure=False,
)
UNUSABLE = Prediction("broken.jpg", None, "damaged")


def test_rows_of_new_images_in_csv():
    first, second = read_rows(
        Rows(CLASSES, ("classes", "sure"), top=9), PREDICTION, UNUSABLE
    )
    assert first == {
        "path": "a,b.jpg",
        "error": "",
        **{"class_1": 'd"o,g', "score_1": "0.700000"},
        **{"class_2": "cat", "score_2": "0.200000"},
        **{"class_3": "path", "score_3": "0.100000"},
        "classes": 'd"o,g|cat',
        "sure": "false",
    }
    assert second.pop("error") == "damaged" and second.pop("path") == "broken.jpg"
    assert set(second.values()) == {""}
    plain = Rows(CLASSES, ())
    assert [*plain.header()] == ["path,error,class_1,score_1"]
    assert plain.line(PREDICTION) == '"a,b.jpg",,"d""o,g",0.700000'


def test_rows_of_new_images_in_json():
    rows = Rows(CLASSES, ("classes", "sure"), "jsonl", 1)
    assert [*rows.header()] == []
    assert json.loads(rows.line(PREDICTION)) == {
        "path": "a,b.jpg",
        "predictions": [{"class": 'd"o,g', "score": 0.7}],
        "classes": ['d"o,g', "cat"],
        "sure": False,
    }
    broken = json.loads(rows.line(UNUSABLE))
    assert broken == {"path": "broken.jpg", "error": "damaged"}


def part(targets: np.ndarray, probabilities: np.ndarray, **more) -> PredictedTable:
    count = len(targets)
    table = Table(tuple(f"{i}.jpg" for i in range(count)), targets, ("",) * count)
    return PredictedTable(table, "train", "out of fold", probabilities, **more)


def test_a_run_lists_every_prediction():
    probabilities = np.array([[0.2, 0.1, 0.7], [0.5, 0.3, 0.2]], np.float32)
    train = part(np.array([2, 1]), probabilities, far=np.array([True, False]))
    test = PredictedTable(
        Table(("t.jpg",), np.array([1]), ("",)), "test", "test", probabilities[:1]
    )
    rows = read(predictions_csv([train, test], CLASSES, DecisionRule(0.6)))
    names = ["path", "split", "how", "label", "predicted"]
    names += ["p_cat", "p_path", 'p_d"o,g', "sure", "far"]
    assert [list(row) for row in rows] == [names] * 3
    assert [*rows[0].values()] == [
        *("0.jpg", "train", "out of fold", 'd"o,g', 'd"o,g'),
        *("0.200000", "0.100000", "0.700000", "true", "true"),
    ]
    assert [row["predicted"] for row in rows] == ['d"o,g', "cat", 'd"o,g']
    assert [row["sure"] for row in rows] == ["true", "false", "true"]
    assert [row["far"] for row in rows] == ["true", "false", ""]
    assert [row["how"] for row in rows] == ["out of fold", "out of fold", "test"]
    unknown = read(predictions_csv([train], CLASSES, DecisionRule()))
    assert [row["sure"] for row in unknown] == ["", ""]


def test_several_labels_are_joined():
    targets = np.array([[1, 0, 1], [0, 0, 0]], np.uint8)
    probabilities = np.array([[0.4, 0.6, 0.5], [0.1, 0.2, 0.3]], np.float32)
    rule = DecisionRule(classes=np.array([0.3, 0.7, 0.5], np.float32))
    first, second = read(predictions_csv([part(targets, probabilities)], CLASSES, rule))
    assert (first["label"], first["predicted"]) == ('cat|d"o,g', 'd"o,g|cat')
    assert (second["label"], second["predicted"]) == ("", "")


@pytest.mark.parametrize(("num_classes", "columns"), [(100, 107), (101, 17)])
def test_of_many_classes_the_most_likely_are_listed(num_classes, columns):
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(num_classes), 4).astype(np.float32)
    names = [f"c{i}" for i in range(num_classes)]
    rows = read(
        predictions_csv([part(np.arange(4), probabilities)], names, DecisionRule())
    )
    for row, expected in zip(rows, probabilities, strict=True):
        assert len(row) == columns
        best = np.argsort(-expected)
        assert row["predicted"] == names[best[0]]
        if columns == 17:
            listed = [row[f"class_{k}"] for k in range(1, 6)]
            assert listed == [names[i] for i in best[:5]]
            assert float(row["score_5"]) == pytest.approx(expected[best[4]], abs=1e-6)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("names", [("cat", "Cat", "dog"), tuple(map(str, range(150)))])
def test_kept_predictions_are_read_back(tmp_path, names, multi_label):
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(len(names), 0.1), 6).astype(np.float32)
    targets = rng.integers(0, len(names), 6)
    thresholds = None
    if multi_label:
        targets = (probabilities > 0.3).astype(np.uint8)
        targets[0] = 0
        thresholds = np.full(len(names), 0.2, np.float32)
    sources = ("a,b.jpg", 'c"d.jpg', "e\nf.jpg", "g\udcff.jpg", "ö.jpg", "6")
    table = Table(sources, targets, ("",) * 6)
    far = np.array([True, False] * 3)
    rule = DecisionRule(None if multi_label else 0.5, thresholds)
    parts = [PredictedTable(table, "test", "test", probabilities, far)]
    path = tmp_path / "predictions.csv"
    text = predictions_csv(parts, names, rule)
    path.write_bytes(text.encode(errors="surrogateescape"))
    found = read_predictions(path, names, multi_label)
    assert tuple(found.sources) == sources and {*found.how} == {"test"}
    assert np.array_equal(found.targets, targets)
    predicted = rule.predicted(probabilities)
    assert np.array_equal(found.is_predicted, predicted)
    expected = (
        probabilities
        if len(names) < 100
        else np.where(
            probabilities >= np.sort(probabilities, 1)[:, -5:-4], probabilities, 0
        )
    )
    assert np.abs(found.probabilities - expected).max() < 1e-6
    assert found.far.tolist() == [1, 0] * 3
    sure = [-1] * 6 if multi_label else (probabilities.max(1) >= 0.5).astype(int)
    assert np.array_equal(found.sure, sure)
    right = predicted == (targets if multi_label else np.eye(len(names))[targets])
    assert np.array_equal(found.is_right, right.all(1))
    assert found.select(found.far > 0).sources.tolist() == [*sources[::2]]


def test_damaged_predictions(tmp_path):
    path = tmp_path / "predictions.csv"
    with pytest.raises(UsageError, match="cannot be read"):
        read_predictions(path, CLASSES, False)
    for line in (
        "a,test",
        "a,test,test,owl,cat,1,0,0,,",
        "a,test,test,cat,cat,x,0,0,,",
    ):
        path.write_text(f"header\n{line}\n")
        with pytest.raises(UsageError, match="is damaged"):
            read_predictions(path, CLASSES, False)
