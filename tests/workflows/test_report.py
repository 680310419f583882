"""`kt report` on real runs: what the page has, and what it must not have."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Told

import keras_transfer
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.evaluation.of_run import load_model, run_splits
from keras_transfer.features.base import frozen_base
from keras_transfer.features.frozen_part import Storage, frozen_features
from keras_transfer.findings.finding import LABEL_ERRORS, Audit, Finding, Suspect
from keras_transfer.findings.images import AuditedImages
from keras_transfer.reporting.of_run import charts as run_charts
from keras_transfer.reporting.of_run.page import ReportOptions
from keras_transfer.reporting.of_run.record import Loaded, RunRecord
from keras_transfer.workflows.report import audit_page, report_run

LEAST = {
    *("headline", "confusion", "classes", "curves", "galleries", "findings"),
    "provenance",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> keras_transfer.Run:
    folder = tmp_path_factory.mktemp("report")
    copied = folder / "my photos"
    shutil.copytree(photos, copied)
    return keras_transfer.fit(
        copied,
        image_size=32,
        name="shapes",
        runs_dir=folder / "runs",
        cache_dir=folder / "cache",
        splits={"test": 0.5},
        report=False,
    )


@pytest.fixture
def run(made: keras_transfer.Run, tmp_path: Path) -> keras_transfer.Run:
    """A copy of the run, which a test may change."""
    return keras_transfer.open_run(shutil.copytree(made.run_dir, tmp_path / "shapes"))


def sections(html: str) -> set[str]:
    return {*re.findall(r'<section id="(\w+)"', html)}


def images(html: str) -> list:
    (data,) = re.findall(r'id="data">(.*?)</script>', html)
    return json.loads(data)["images"]


def pictures(html: str) -> int:
    """Counts the pictures of images, in the page and for its script."""
    standing = {*re.findall(r'<img data-image="(\d+)"', html)}
    return len(standing) + sum(bool(row[5]) for row in images(html))


def test_the_page_of_a_run(run):
    told = Told()
    path = keras_transfer.report(run, listeners=[told])
    assert path == run.report_path and told.artifacts == [(path, "report")]
    html = path.read_text(encoding="utf-8")
    assert sections(html) == LEAST | {"feature_map", "learning"}
    assert "30 test images" in html and "efficientnet_lite0" in html
    assert "kt fit &#39;my photos&#39; --image-size 32 --set splits.test=0.5" in html
    assert len(html) < 2_000_000
    for part in ("/tmp", str(run.config.data), str(Path.home()) + "/"):
        assert part not in html
    # Every image that the model did not learn from is on the map, with its picture.
    assert len(images(html)) == 60
    assert html.count('data-gid="point-') == 2 * 60  # PCA and t-SNE
    again = run.report(output="again.html", images=False, thumbnails=5)
    assert pictures(again.read_text(encoding="utf-8")) == 0
    none = run.report(output="again.html", thumbnails=0).read_text(encoding="utf-8")
    assert pictures(none) == 0 and "Show where" not in none
    quick = report_run(run, ReportOptions(7, is_thorough=False))
    shares = [
        re.findall(r"Mean heat on[^%]*15% of \d+ images.*?[\d.]+%", text, re.DOTALL)
        for text in (html, quick.read_text(encoding="utf-8"))
    ]
    assert shares[0] == shares[1]


def test_what_is_in_memory_is_not_loaded_again(run, made):
    config = made.config
    splits, part = run_splits(made), frozen_base(config)
    features = frozen_features(part, splits, 0, Storage("f32"), Told())
    known = Loaded(splits, features, load_model(made))
    quick = ReportOptions(thumbnails=7, is_thorough=False)
    html = report_run(run, quick, known=known).read_text(encoding="utf-8")
    assert sections(html) == LEAST | {"feature_map", "learning"}
    assert html.count('data-gid="point-') == 60 and "Learning curve" in html
    assert pictures(html) == 7


def test_a_run_whose_images_are_gone_has_a_page_without_pictures(run):
    config = run.run_dir / "config.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("my photos", "moved"), encoding="utf-8")
    html = keras_transfer.report(run).read_text(encoding="utf-8")
    assert "There are no pictures" in html and pictures(html) == 0
    assert sections(html) == LEAST | {"learning"}
    assert str(run.config.data) not in html


def test_a_run_without_predictions_says_what_its_page_lacks(run):
    run.predictions_path.unlink()
    html = report_run(run, known=Loaded()).read_text(encoding="utf-8")
    assert sections(html) == {"headline", "learning", "findings", "provenance"}
    assert "neither a confusion matrix nor curves: the run was made by a" in html
    assert "hardest class" not in html and "average precision 0.0%" not in html
    assert "most frequent mistake" in html or "No image was wrong" in html


def test_captions_of_grouped_data_say_that_intervals_are_of_single_images(run):
    drawn = [*run_charts.curves(RunRecord.of(run))]
    assert len(drawn) == 4 and not any("group" in one.caption for one in drawn)
    header, *rows = run.splits_path.read_text(encoding="utf-8").splitlines()
    assert header == "path,label,split,group" and rows[0].endswith(",")
    rows[0] += "patient 1"
    run.splits_path.write_text("\n".join([header, *rows]), encoding="utf-8")
    drawn = [*run_charts.curves(RunRecord.of(run))]
    said = {x.name for x in drawn if "images of a group as independent" in x.caption}
    assert said == {"reliability", "accuracy_coverage"}  # others have no intervals
    run.splits_path.unlink()
    assert not RunRecord.of(run).is_grouped


def test_a_map_of_four_images_is_no_tsne(run, made):
    record, splits = RunRecord.of(run), run_splits(made)
    features = frozen_features(
        frozen_base(made.config), splits, 0, Storage("f32"), Told()
    )
    for count, names in ((5, ["PCA", "t-SNE"]), (4, ["PCA"])):
        few = replace(record, kept=record.kept.select(np.arange(count)))
        _, views = run_charts.mapped(few, Loaded(splits, features), True)
        assert [name for name, _ in views] == names


def test_images_that_changed_are_left_out(run, made, photos, tmp_path):
    data = shutil.copytree(photos, tmp_path / "my photos")
    changed = data / "circle" / "00.jpg"
    shutil.copy(data / "square" / "01.jpg", changed)
    config = run.run_dir / "config.yaml"
    text = config.read_text(encoding="utf-8").replace(str(made.config.data), str(data))
    config.write_text(text, encoding="utf-8")
    html = keras_transfer.report(run).read_text(encoding="utf-8")
    assert "1 image has changed since the run was made and is left" in html
    by_name = {row[0]: row for row in images(html)}
    assert by_name["circle/00.jpg"][5] == ""
    assert not re.search(r'<img data-image[^>]*alt="circle/00.jpg"', html)


def test_findings_of_a_run_and_of_data_alone(run, made):
    splits, part = run_splits(made), frozen_base(made.config)
    features = frozen_features(part, splits, 0, Storage("f32", quality=True), Told())
    audited = AuditedImages.of(splits, features)
    one, other, *_ = audited.table.sources
    found = Audit.of(
        made.config.data,
        {"circle": 20, "square": 20, "stripes": 20},
        60,
        [
            Finding(
                kind="near duplicates <b>",
                severity="high",
                message=f"Two in {made.config.data} are alike.",
                suspects=(Suspect(path=one, score=1.0, other=other),),
            )
        ],
        ["EXIF was not looked at."],
    )
    run.audit_path.write_text(found.model_dump_json(), encoding="utf-8")
    label = Finding(
        kind=LABEL_ERRORS,
        severity="low",
        message="One.",
        suspects=(Suspect(path="circle/00.jpg", score=0.987, other="square"),),
    )
    page = audit_page(Audit.of("x", {}, 60, [label]), audited)
    assert "labeled circle, looks like square" in page and "0.987" not in page
    assert "--fix cleaned.csv" in page and "audit.csv" in page
    p = np.full((60, 3), np.nan, np.float32)
    p[0] = (0.9, 0.1, 0)
    for table, html in {
        "audit.json": keras_transfer.report(run).read_text(encoding="utf-8"),
        "audit.csv": audit_page(found, audited, p),
    }.items():
        assert "findings" in sections(html) and f'"{table}"' in html
        assert "Near duplicates &lt;b&gt;" in html and "Two in my photos" in html
        assert f'alt="{one}"' in html and f'alt="{other}"' in html
        assert str(made.config.data.rpartition("/")[0]) not in html
    run.audit_path.write_text("{}", encoding="utf-8")
    with pytest.raises(KerasTransferError, match="audit.json is damaged"):
        keras_transfer.report(run)


def test_runs_side_by_side(run, made, kt):
    rows = run.predictions_path.read_text(encoding="utf-8").splitlines()
    at = next(i for i, row in enumerate(rows) if ",test,test,circle,circle," in row)
    rows[at] = rows[at].replace("circle,circle", "circle,square")
    run.predictions_path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    result = kt("report", made.run_dir, run.run_dir)
    assert result.exit_code == 0, result.stderr
    html = Path("report-shapes-shapes.html").read_text(encoding="utf-8")
    assert sections(html) == {"compared"}
    assert "shapes (2)" in html and "on 30 common test images" in html
    assert "Images that only shapes gets right" in html
    title = "Only shapes gets these right; the predictions are those of shapes"
    assert f'"{title}"' in html
    assert len(images(html)) == 1
    assert '"predictions.csv"' in html
    (run.run_dir / "predictions.csv").unlink()
    many = ["report", *[made.run_dir] * 6, run.run_dir]
    result = kt(*many)
    assert result.exit_code == 0, result.stderr
    html = Path("report-shapes-and-6-more.html").read_text(encoding="utf-8")
    assert "was made by a version that kept none" in html
    Path("report-shapes-and-6-more.html").unlink()
    Path("report-shapes-and-6-more.html").mkdir()
    assert kt(*many).exit_code == 2


def test_charts_as_files(run, kt):
    result = kt("report", run.run_dir, "--format", "png")
    assert result.exit_code == 0, result.stderr
    folder = run.run_dir / "charts"
    assert Path(result.stdout.strip()) == folder
    assert {path.stem for path in folder.iterdir()} >= {
        *("confusion_matrix", "classes", "roc", "precision_recall", "reliability"),
        *("accuracy_coverage", "feature_map_pca", "feature_map_tsne", "l2_path"),
    }
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in folder.iterdir())


@pytest.mark.long
def test_no_export_carries_the_page(run):
    keras_transfer.report(run, images=False)
    version = run.export()
    assert not [path for path in version.rglob("*") if "report" in path.name]


def test_wrong_requests(run, kt, tmp_path):
    with pytest.raises(UsageError, match="There is no run here"):
        keras_transfer.report("nothing")
    with pytest.raises(UsageError, match="at most 1,000 pictures"):
        keras_transfer.report(run, thumbnails=1001)
    result = kt("report", run.run_dir, run.run_dir, "--format", "png")
    assert result.exit_code == 2 and "--format png and 2 runs" in result.stderr
    result = kt("report", run.run_dir, "--output", tmp_path / "none" / "x.html")
    assert result.exit_code == 2 and "--output" in result.stderr
