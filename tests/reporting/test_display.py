"""What notebooks show: results as tables, and progress."""

import json
import logging
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import draw, encode
from nbclient import NotebookClient

from keras_transfer.advice.ranking import rank_by_accuracy
from keras_transfer.evaluation.drift import Judged, compare_sets
from keras_transfer.evaluation.metrics import evaluate
from keras_transfer.events import Listener
from keras_transfer.findings.finding import Audit, Finding, Suspect
from keras_transfer.markup import MOST_ROWS, escaped, html_table
from keras_transfer.reporting.display import in_notebook, told
from keras_transfer.runs.manifest import Estimate

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e\udcff&'\""
ESCAPED = (
    "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[31m\\u202e\\udcff&amp;&#x27;&quot;"
)


def check(shown: str) -> None:
    """The name is there, but only as text, and the page can be sent."""
    assert ESCAPED in shown
    assert "<script" not in shown
    shown.encode()


def test_results_are_tables_without_what_a_name_brings():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, 40)
    names = [HOSTILE, "other"]
    probabilities = rng.dirichlet([1, 1], 40).astype("f4")
    evaluation = evaluate(targets, probabilities, names)
    shown = evaluation._repr_html_()
    check(shown)
    assert f"accuracy {evaluation.accuracy:.3f} (" in shown
    assert "log loss" in shown and "mean average precision" not in shown

    sets = [Judged(p > 0.5, p[:, 0] > 0.9) for p in (probabilities, probabilities)]
    shown = compare_sets(*sets, names)._repr_html_()
    check(shown)
    assert "+0.000 (" in shown

    suspect = Suspect(path="x.jpg", score=0.5)
    finding = Finding(
        kind="outliers", severity="low", message=HOSTILE, suspects=(suspect,)
    )
    audit = Audit.of(HOSTILE, {HOSTILE: 3}, 3, [finding], [HOSTILE])
    check(audit._repr_html_())
    assert "1 finding in 3 images" in audit._repr_html_()

    accuracy = Estimate(mean=0.5, low=0.4, high=0.6, values=(0.5,))
    fields = {"logme": 1, "images_per_second": 2, "parameters": 3, "megabytes": 4}
    ranked = rank_by_accuracy(
        [{"base": HOSTILE, "accuracy": accuracy, **fields}], {"b": HOSTILE}
    )
    check(ranked._repr_html_())
    assert "0.500 (0.400 to 0.600)" in ranked._repr_html_()


def test_findings_about_the_data_have_no_number_of_images():
    found = Finding(kind="few images", severity="low", message="There are few.")
    shown = Audit.of("data", {"a": 3}, 3, [found])._repr_html_()
    assert "There are few.</td><td style='text-align:left'></td>" in shown


def test_columns_of_numbers_are_at_the_right():
    rows = [("a", "1,200", "0.5 (0.4 to 0.6)", "x"), ("b", "–", 1.5, "")]
    shown = html_table("x", ("", "images", "accuracy", "why"), rows)
    assert shown.count("<th scope='col' style='text-align:right'>") == 2
    assert shown.count("<td style='text-align:right'>") == 4
    assert "<th scope='col' style='text-align:left'>y" in html_table("x", "y", [])


def test_long_tables_end():
    shown = html_table("x", (), [(i, i) for i in range(MOST_ROWS + 5)])
    assert shown.count("<tr>") == MOST_ROWS and "and 5 more" in shown
    assert escaped("日本 é\n") == "日本 é\\n"


def test_outside_of_notebooks_notes_are_logged(capsys, caplog):
    assert not in_notebook()
    # Libraries that other tests use may have raised the level.
    with caplog.at_level(logging.WARNING, logger="keras_transfer"):
        told(()).note("logged")
        told([Listener()]).note("unseen")
    assert caplog.record_tuples == [("keras_transfer", logging.WARNING, "logged")]
    assert capsys.readouterr().out == ""

    class Notes(Listener):
        def note(self, text):
            print(text)

    told([Notes()]).note("seen")
    assert capsys.readouterr().out == "seen\n"


@pytest.mark.long
def test_a_notebook_shows_results_and_progress(tmp_path: Path):
    rng = np.random.default_rng(0)
    hostile = "<b onclick=x>"
    for name, shape in (("circle", "circle"), (hostile, "stripes")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(12):
            path = tmp_path / "data" / name / f"{index}.png"
            path.write_bytes(encode(draw(shape, rng), "PNG"))
    cells = [
        "import keras_transfer",
        "run = keras_transfer.fit('data', image_size=32, folds=2, name='x')",
        "run",
        "run.evaluate()",
        "run = keras_transfer.unfreeze_and_finetune(run, unfreeze='from:top_conv', "
        "epochs=2, batch_size=8)",
        "run.evaluate('data', listeners=[keras_transfer.Listener()])",
    ]
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(x) for x in cells]
    )
    client = NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    pages = [
        [
            output["data"].get("text/html", "")
            for output in cell["outputs"]
            if "data" in output
        ]
        for cell in notebook["cells"]
    ]
    _, fitted, run, evaluated, tuned, silent = map("".join, pages)
    assert len(pages[1]) == len(pages[4]) == 1  # updated in place
    assert "<progress" in fitted and "features: 24 of 24" in fitted
    for end in (fitted, tuned):  # nothing looks as if it was still going on
        for done, total in re.findall(r"value='(\d+)' max='(\d+)'", end):
            assert done == total
    assert "Run x" in run and "efficientnet_lite0" in run and "accuracy" in run
    assert "&lt;b onclick=x&gt;" in evaluated
    assert "training: " in tuned and "learning rate" in tuned
    assert "- an epoch of" in tuned
    assert "<progress" not in silent and "&lt;b onclick=x&gt;" in silent
    assert "<b onclick" not in json.dumps(notebook)
