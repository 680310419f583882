"""Sure predictions and thresholds per class: the same in a run and in its exports."""

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_export import CLASSES, SIZE, tiny_model

import keras_transfer
from keras_transfer.data.tables import Prediction
from keras_transfer.errors import UsageError
from keras_transfer.evaluation.decisions import DecisionRule
from keras_transfer.runs.files import check_output
from keras_transfer.runs.manifest import Abstention, Manifest
from keras_transfer.runs.run import Run
from keras_transfer.runtime.c_api import ABOUT, Request, Session
from keras_transfer.serving.savedmodel import undecided
from keras_transfer.serving.server import predict_bundle

ABSTENTION = Abstention(
    target=0.9, threshold=0.0, coverage=0.5, accuracy=0.95, images=60, independent=60
)


def change(run: Run, **values: object) -> Run:
    manifest = run.manifest.model_copy(update=values)
    (run.run_dir / "manifest.json").write_text(manifest.to_json())
    return run


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Run:
    """A run with a tiny model, which is sure of half of the photos."""
    folder = tmp_path_factory.mktemp("runs")
    options = {"image_size": SIZE, "name": "single", "folds": 2, "report": False}
    run = keras_transfer.fit(
        str(photos), runs_dir=folder, cache_dir=folder / "cache", **options
    )
    tiny_model().save(run.model_path)
    run.far_path.unlink()  # of the features of the model before
    largest = np.sort([x.probabilities.max() for x in predicted(run, photos)])
    threshold = float(np.float32((largest[30] + largest[31]) / 2))
    return change(
        run, abstention=ABSTENTION.model_copy(update={"threshold": threshold})
    )


def copied(run: Run, name: str, **values: object) -> Run:
    copy = run.run_dir.with_name(name)
    shutil.copytree(run.run_dir, copy, ignore=shutil.ignore_patterns("[0-9]*"))
    return change(keras_transfer.open_run(copy), **values)


@pytest.fixture(scope="module")
def multi(single: Run, photos: Path) -> Run:
    """A copy whose images may show several classes; half of the photos show each."""
    middle = np.median([x.probabilities for x in predicted(single, photos)], 0)
    thresholds = dict(zip(CLASSES, map(float, middle), strict=True))
    changes = {"multi_label": True, "abstention": None, "thresholds": thresholds}
    return copied(single, "multi", **changes)


@pytest.fixture(scope="module")
def both(single: Run, multi: Run) -> Run:
    """A copy that has every threshold, to export once what takes seconds."""
    return copied(multi, "both", abstention=single.manifest.abstention)


@pytest.fixture(scope="module")
def bundle(both: Run) -> Path:
    return both.export()


def predicted(run: Run, photos: Path) -> list[Prediction]:
    return [*run.predict(photos, recursive=True)]


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_predictions_of_a_run_are_sure_or_not(single, photos, kt):
    found = predicted(single, photos)
    threshold = np.float32(single.manifest.abstention.threshold)
    assert {x.sure for x in found} == {True, False}
    for prediction in found:
        assert prediction.sure == (prediction.probabilities.max() >= threshold)
        assert prediction.classes == (CLASSES[prediction.probabilities.argmax()],)
    printed = rows(kt("predict", single.run_dir, photos, "--recursive").stdout)
    assert [*printed[0]] == ["path", "error", "class_1", "score_1", "sure"]
    expected = ["true" if x.sure else "false" for x in found]
    assert [row["sure"] for row in printed] == expected


def test_all_classes_above_their_thresholds_are_predicted(multi, photos, kt):
    found = predicted(multi, photos)
    thresholds = np.array([*multi.manifest.thresholds.values()], np.float32)
    assert {len(x.classes) for x in found} >= {1, 2}
    for prediction in found:
        assert prediction.sure is None
        above = np.flatnonzero(prediction.probabilities >= thresholds)
        assert {*prediction.classes} == {CLASSES[i] for i in above}
    printed = rows(kt("predict", multi.run_dir, photos, "--recursive").stdout)
    assert [row["classes"] for row in printed] == ["|".join(x.classes) for x in found]
    arguments = ["predict", multi.run_dir, found[0].source, "--format", "jsonl"]
    lines = kt(*arguments).stdout.splitlines()
    assert json.loads(lines[0])["classes"] == [*found[0].classes]


def test_a_bundle_decides_as_its_run(both, bundle, photos, kt):
    Path("broken.jpg").write_bytes(b"broken")
    paths = [photos / "square", "broken.jpg", photos / "circle"]
    ours = kt("predict", both.run_dir, *paths)
    theirs = kt("predict", "--bundle", bundle, *paths)
    assert theirs.exit_code == 0, theirs.stderr
    found = rows(theirs.stdout)
    assert {"classes", "sure"} < found[0].keys()
    for one, other in zip(rows(ours.stdout), found, strict=True):
        score = other.pop("score_1")
        assert not score or float(score) == pytest.approx(float(one["score_1"]), 1e-3)
        assert other == {key: one[key] for key in other}


def test_the_outputs_of_a_bundle(bundle, photos):
    file = np.array([(photos / "circle/00.jpg").read_bytes()], object)
    with Session(bundle) as session:
        answer = session.run(Request("serving_default", {"image_bytes": file}))
        signatures = session.about["signatures"]
    usual = {"probabilities", "classes", "scores", "indices"}
    assert {*answer} == usual | {"sure", "predicted"}
    assert answer["sure"].dtype == answer["predicted"].dtype == bool
    assert answer["sure"].shape == (1,) and answer["predicted"].shape == (1, 3)
    for name in ("predict_images", "predict_tensor"):
        assert signatures[name]["outputs"].keys() == {*answer}
    assert signatures["classify"]["outputs"].keys() == {"classes", "scores"}


def test_thresholds_are_described_in_exports(both, bundle):
    for file in (bundle / ABOUT, both.export(format="keras") / "keras_transfer.json"):
        about = json.loads(file.read_text())
        assert about["abstention"] == both.manifest.abstention.model_dump()
        assert about["thresholds"] == both.manifest.thresholds
        assert about["multi_label"] is True


def test_a_bundle_of_before_there_were_thresholds(bundle, photos, monkeypatch):
    """Its answers have no `predicted` and no `sure`."""
    answers = Session.run

    def older(self, request):
        found = answers(self, request)
        return {name: found[name] for name in found if name in ("probabilities",)}

    monkeypatch.setattr(Session, "run", older)
    (prediction,) = predict_bundle(bundle, photos / "circle/00.jpg").rows
    assert prediction.classes == () and prediction.sure is None
    assert prediction.probabilities is not None


PROBABILITIES = np.array([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0]], np.float32)
RULE = DecisionRule(0.6, np.array([0.5, 0.2, 0.1], np.float32))
DECIDED = {
    "probabilities": PROBABILITIES,
    "sure": np.array([False, True]),
    "predicted": np.array([[True, True, True], [True, False, False]]),
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"sure": np.array([True, True])}, "sure does not follow"),
        ({"predicted": np.zeros((2, 3), bool)}, "predicted does not follow"),
        ({"sure": None}, "sure is missing"),
    ],
)
def test_decisions_are_verified(change, said):
    answer = {**DECIDED, **change}
    answer = {name: array for name, array in answer.items() if array is not None}
    assert undecided(answer, RULE).startswith(said)
    assert bool(undecided(answer, RULE)) == bool(said)


def test_decisions_without_a_threshold_are_verified_too():
    assert "sure is not expected" in undecided(DECIDED, replace(RULE, sure=None))
    assert undecided({"classes": np.array([])}, RULE) == ""  # of `classify`


def test_without_thresholds_of_its_own_a_class_has_a_half(single):
    values = single.manifest.model_dump()
    for name in ("abstention", "thresholds", "coverage"):
        del values[name]  # as in manifests of before
    old = Manifest.model_validate(values)
    rule = DecisionRule.of(old, CLASSES)
    assert rule.sure is None and rule.classes is None and rule.columns == ()
    rule = DecisionRule.of(old.model_copy(update={"multi_label": True}), CLASSES)
    assert rule.classes.tolist() == [0.5] * 3
    unusable = Prediction("x", None, "damaged")
    assert [*rule.decide([unusable], CLASSES)] == [unusable]


def test_evaluation_says_how_many_are_sure(single, multi, photos, kt):
    found = single.evaluate(photos)
    sure = [x for x in predicted(single, photos) if x.sure]
    right = [x for x in sure if Path(x.source).parent.name in x.classes]
    assert found.sure.images == len(sure)
    assert found.sure.coverage == len(sure) / 60
    assert found.sure.accuracy == pytest.approx(len(right) / len(sure))
    shown = kt("evaluate", single.run_dir, photos).stdout
    assert f"{len(sure)} of 60" in shown and f"{len(right)} of {len(sure)}" in shown
    printed = json.loads(kt("evaluate", single.run_dir, photos, "--json").stdout)
    assert printed["sure"]["images"] == len(sure)


def test_evaluation_uses_the_thresholds_of_the_classes(multi, photos):
    lines = [f"{path},{path.parent.name}|circle" for path in photos.rglob("*.jpg")]
    Path("data.csv").write_text("\n".join(["path,label", *lines]))
    found = multi.evaluate("data.csv")
    assert found.sure is None
    shown = [x for x in predicted(multi, photos) if "circle" in x.classes]
    assert found.classes["circle"].recall == len(shown) / 60
    assert found.classes["circle"].precision == 1


# Files and folders of predictions


def test_rows_are_written_to_a_file(single, photos, kt):
    arguments = ["predict", single.run_dir, photos / "circle", "--top", 2]
    printed = kt(*arguments).stdout
    written = kt(*arguments, "--output", "out.csv")
    assert written.exit_code == 0, written.stderr
    assert written.stdout == "" and "out.csv" in written.stderr
    assert Path("out.csv").read_text() == printed
    Path("link.csv").symlink_to("out.csv")
    kt(*arguments, "--output", "link.csv", "--format", "jsonl")
    assert Path("link.csv").is_symlink()
    assert len([*map(json.loads, Path("out.csv").read_text().splitlines())]) == 20


def test_an_interrupted_file_is_not_there(single, photos, kt, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("keras_transfer.data.sorting.SortedFolders.put", interrupt)
    Path("out.csv").write_text("of before")
    arguments = ["--output", "out.csv", "--sort-into", "sorted"]
    result = kt("predict", single.run_dir, photos / "circle", *arguments)
    assert result.exit_code == 130
    assert Path("out.csv").read_text() == "of before"
    assert {path.name for path in Path().iterdir()} <= {"out.csv", "cache"}


@pytest.mark.parametrize("output", ["missing/out.csv", "folder", "/dev/null"])
def test_a_file_that_cannot_be_written_is_a_usage_error(single, photos, kt, output):
    Path("folder").mkdir()
    result = kt("predict", single.run_dir, photos / "circle", "--output", output)
    assert result.exit_code == 2
    assert f"--output {output}" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    with pytest.raises(UsageError, match="output="):
        check_output(Path(output))


@pytest.mark.parametrize("is_bundle", [False, True])
def test_images_are_sorted(single, bundle, photos, kt, is_bundle):
    Path("broken.jpg").write_bytes(b"broken")
    of = ["--bundle", bundle] if is_bundle else [single.run_dir]
    options = ["--recursive", "--sort-into", "sorted"]
    result = kt("predict", *of, photos, "broken.jpg", *options)
    assert result.exit_code == 0, result.stderr
    assert "Sorted into sorted: " in result.stderr
    files = [path for path in Path("sorted").rglob("*") if path.is_file()]
    for row in rows(result.stdout)[:-1]:
        classes = (row["classes"] or "_none").split("|") if is_bundle else []
        folders = {*classes} or {row["class_1"]}
        there = [path for path in files if path.samefile(row["path"])]
        expected = folders if row["sure"] == "true" else {"_unsure"}
        assert {path.parent.name for path in there} == expected
        assert len(there) == len(expected)
    Path("file").touch()
    options = ["--sort-into", "file"]
    assert kt("predict", *of, photos / "circle", *options).exit_code == 2
