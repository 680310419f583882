import functools
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from keras_transfer.evaluation.metrics import confidence_bins, evaluate
from keras_transfer.evaluation.thresholds import accuracy_coverage
from keras_transfer.reporting import charts
from keras_transfer.reporting.charts.curves import precision_recall_curve, roc_curve
from keras_transfer.reporting.charts.style import COLORS, thinned
from keras_transfer.reporting.of_run.charts import MOST_MAPPED, mapped_rows
from keras_transfer.reporting.text_chart import text_chart
from keras_transfer.runs.manifest import Estimate

HOSTILE = (
    "<script>alert(1)</script>",
    '$x$ & "y" \'',
    "a\nb\x00\x1b\ud800",
    "漢字" * 40,
)
ROWS = [
    {"l2": "1.0", "epoch": "7", "loss": "0.2", "val_loss": "0.4"},
    {"l2": "0.1", "epoch": "9", "loss": "0.1", "val_loss": "0.3"},
]
EPOCHS = [
    {"epoch": k, "loss": 1 / k, "val_accuracy": 0.9, "learning_rate": 0.1 / k, "l2": ""}
    for k in (1, 2, 3)
]


def predictions(classes: int, images: int = 120) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(classes)
    targets = np.arange(images) % classes
    logits = rng.normal(size=(images, classes)) + 2 * np.eye(classes)[targets]
    said = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return targets, said.astype(np.float32)


def estimated(mean: float) -> Estimate:
    return Estimate(mean=mean, low=mean - 0.1, high=mean + 0.05, values=(mean,))


@functools.cache
def svgs(names: tuple[str, ...]) -> dict[str, str]:
    return {k: charts.themed_svg(one) for k, one in all_charts(names).items()}


def all_charts(names: tuple[str, ...]) -> dict[str, object]:
    targets, said = predictions(len(names))
    right = said.argmax(1) == targets
    found = evaluate(targets, said, names)
    assert found.confusion is not None
    curve = [(count, estimated(0.7)) for count in (10, 20, 40)]
    points = np.random.default_rng(0).normal(size=(len(targets), 2))
    return {
        "confusion": charts.confusion_matrix(found.confusion, names),
        "bars": charts.class_bars(found.classes, "recall"),
        "roc": charts.roc_curves(targets, said, names),
        "pr": charts.precision_recall_curves(targets, said, names),
        "reliability": charts.reliability_diagram(said.max(1), right),
        "coverage": charts.accuracy_coverage_curve(accuracy_coverage(said, targets)),
        "l2": charts.l2_path(ROWS, 0.1),
        "epochs": charts.epoch_curves(EPOCHS),
        "rates": charts.layer_rates({name: 1e-3 * i for i, name in enumerate(names)}),
        "map": charts.feature_map(points, targets, right, names),
        "learning": charts.learning_curve(curve),
    }


@pytest.mark.parametrize("names", [HOSTILE, ("only",), tuple(map(str, range(30)))])
def test_svg_is_well_formed_harmless_and_without_ids_of_others(names):
    ids: list[str] = []
    for chart, text in svgs(names).items():
        root = ET.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg", chart
        assert "viewBox" in root.attrib and "width" not in root.attrib
        assert not {e.tag.rpartition("}")[2] for e in root.iter()} & {"script", "style"}
        assert "nan" not in text.lower().replace("dominant", ""), chart
        assert "font-family" not in text
        ids += [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
        for element in root.iter():
            target = element.get("href", "#")[1:]
            assert not target or target in ids
    assert len(ids) == len(set(ids))


def test_svg_has_only_colors_that_the_page_defines():
    css = charts.theme_css()
    for text in svgs(HOSTILE).values():
        for name, (light, _) in COLORS.items():
            text = text.replace(f"var(--{name},{light})", "")
            assert f"--{name}:{light}" in css
        assert "#" not in text.replace('href="#', "").replace("url(#", "")


def test_same_figure_gives_the_same_bytes():
    again = all_charts(HOSTILE)
    for chart in ("roc", "map", "l2"):
        assert charts.themed_svg(again[chart]) == svgs(HOSTILE)[chart]


def test_text_of_classes_is_shown_as_it_is():
    figure = charts.confusion_matrix([[3, 1], [0, 2]], ["a<b", "$c$"])
    root = ET.fromstring(charts.themed_svg(figure))
    texts = ["".join(e.itertext()) for e in root.iter() if e.tag.endswith("text")]
    assert texts.count("a<b") == texts.count("$c$") == 2


def test_confusions_of_many_classes_add_up():
    counts = np.random.default_rng(0).integers(0, 3, (60, 60))
    figure = charts.confusion_matrix(counts, [f"class {i}" for i in range(60)])
    root = ET.fromstring(charts.themed_svg(figure))
    texts = ["".join(e.itertext()) for e in root.iter() if e.tag.endswith("text")]
    shown = sum(int(x.replace(",", "")) for x in texts if x.replace(",", "").isdigit())
    assert shown == counts.sum()
    assert "46 others" in texts


def test_map_marks_each_image_once_and_mistakes_last():
    rng = np.random.default_rng(0)
    right = rng.random(1000) > 0.1
    targets = rng.integers(0, 12, 1000)
    rows = np.arange(1000) + 100_000
    figure = charts.feature_map(
        rng.normal(size=(1000, 2)), targets, right, [*"abcdefghijkl"], rows
    )
    text = charts.themed_svg(figure)
    root = ET.fromstring(text)
    gids = [e.get("data-gid") or "" for e in root.iter()]
    drawn = [int(gid.split("-")[1]) for gid in gids if gid.startswith("point-")]
    assert sorted(drawn) == rows.tolist()
    wrong = {*rows[~right].tolist()}
    assert {*drawn[-len(wrong) :]} == wrong  # above the others
    assert len(text) < 125_000


def test_mistakes_are_at_most_half_of_a_map():
    right = np.arange(9000) % 3 == 0
    kept = mapped_rows(right, 0)
    assert len(kept) == len(set(kept)) == MOST_MAPPED
    assert right[kept].sum() == MOST_MAPPED / 2
    assert len(mapped_rows(np.zeros(9000, bool), 0)) == MOST_MAPPED
    assert mapped_rows(np.ones(9, bool), 0).tolist() == [*range(9)]


def legend(figure) -> list[str]:
    return [text.get_text() for one in figure.legends for text in one.get_texts()]


def test_legends_have_classes_whose_names_begin_with_an_underscore():
    names = ["_neg", "cat", "__"]
    targets, said = predictions(3)
    for draw in (charts.roc_curves, charts.precision_recall_curves):
        assert [x.split(",")[0] for x in legend(draw(targets, said, names))] == names
    points = np.random.default_rng(0).normal(size=(len(targets), 2))
    figure = charts.feature_map(points, targets, np.ones(len(targets), bool), names)
    assert legend(figure) == names
    assert "\N{WORD JOINER}" not in charts.themed_svg(figure)


def test_legends_say_how_many_thin_curves_there_are():
    for count, says in (
        (30, "the other 24 classes"),
        (300, "37 of the other 294 classes"),
    ):
        targets = np.arange(5 * count) % count
        said = np.random.default_rng(0).dirichlet(np.ones(count), 5 * count)
        figure = charts.roc_curves(targets, said, [f"class {i}" for i in range(count)])
        assert any(text.startswith(says) for text in legend(figure))
        thin = [line for line in figure.axes[0].lines if line.get_alpha() == 0.3]
        assert len(thin) == (24 if count == 30 else 37)


def test_curves_of_few_images_are_pale_and_never_the_worst_or_best():
    targets = np.repeat([0, 1, 2], [30, 30, 2])
    said = np.random.default_rng(0).dirichlet(np.ones(3), 62)
    for draw in (charts.roc_curves, charts.precision_recall_curves):
        figure = draw(targets, said, [*"abc"])
        assert [x.endswith("(2 images)") for x in legend(figure)] == [0, 0, 1]
        widths = [line.get_linewidth() for line in figure.axes[0].lines[-3:]]
        assert widths[2] < widths[0] == widths[1]
    for images, says in ((9, "the other 24 classes"), (4, "all 30 classes")):
        shown = np.repeat(np.arange(30), [images] * 15 + [4] * 15)
        said = np.random.default_rng(0).dirichlet(np.ones(30), len(shown))
        names = [f"class {i}" for i in range(30)]
        texts = legend(charts.roc_curves(shown, said, names))
        assert texts[0] == says
        colored = [int(x.split(",")[0].split()[1]) for x in texts[1:-1]]
        assert (
            len(colored) == (6 if images == 9 else 0) and max(colored, default=0) < 15
        )


def test_reliability_has_bins_of_at_least_twenty_images():
    for images, bins in ((19, 1), (153, 7), (9000, 15)):
        confidence = np.random.default_rng(0).random(images)
        figure = charts.reliability_diagram(confidence, confidence > 0.5)
        points = figure.axes[0].lines[1]
        assert len(points.get_xdata()) == bins


def test_rates_are_points_amid_their_axis():
    figure = charts.layer_rates({"stem": 0.0, "stage_4": 3e-4, "head": 1e-3})
    axes = figure.axes[0]
    assert [line.get_xdata()[0] for line in axes.lines] == [3e-4, 1e-3]
    assert all(len(line.get_xdata()) == 1 for line in axes.lines)
    low, high = axes.get_xlim()
    assert 1e-4 < low < 3e-4 and 1e-3 < high < 3e-3
    assert [x.get_text() for x in axes.texts] == ["not trained", "0.0003", "0.001"]


def test_confusions_that_never_occur_are_zeros():
    figure = charts.confusion_matrix([[3, 0], [0, 2]], ["a", "b"])
    assert [x.get_text() for x in figure.axes[0].texts] == ["3", "0", "0", "2"]


@pytest.mark.parametrize("names", [("ants", "bees"), ("neg", "漢字漢字漢字")])
def test_legends_fit_and_their_marks_are_next_to_their_words(names):
    targets, said = predictions(2)
    points = np.random.default_rng(0).normal(size=(len(targets), 2))
    right = said.argmax(1) == targets
    figure = charts.feature_map(points, targets, right, names)
    assert figure.legends[0].handlelength < 1
    labels = [f"{name} and a name that is long" for name in "abcdefgh"]
    targets, said = predictions(8)
    figure = charts.roc_curves(targets, said, labels)
    figure.draw_without_rendering()
    ends = figure.legends[0].get_window_extent()
    assert ends.x0 >= 0 and ends.x1 <= figure.bbox.x1


def test_classes_without_images_have_no_bar():
    targets, said = predictions(3)
    found = evaluate(np.minimum(targets, 1), said, ["a", "b", "never shown"])
    figure = charts.class_bars(found.classes, "recall")
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(shown) == 2 and not any("never" in name for name in shown)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=3, max_size=40))
@settings(max_examples=20, deadline=None)
def test_areas_are_those_of_scikit_learn(images):
    positive = np.array([one for one, _ in images])
    positive[:2] = True, False
    scores = np.array([score for _, score in images]) / 6
    roc = roc_curve("a", positive, scores)
    assert roc.area == pytest.approx(roc_auc_score(positive, scores))
    assert (np.diff(roc.x) >= 0).all() and roc.x[-1] == roc.y[-1] == 1
    found = precision_recall_curve("a", positive, scores)
    assert found.area == pytest.approx(average_precision_score(positive, scores))


def test_curves_of_four_images_by_hand():
    # Scores from the top: hit, miss, hit and miss together.
    positive = np.array([True, False, True, False])
    scores = np.array([0.9, 0.8, 0.3, 0.3])
    roc = roc_curve("a", positive, scores)
    assert roc.x.tolist() == [0, 0, 0.5, 1] and roc.y.tolist() == [0, 0.5, 0.5, 1]
    found = precision_recall_curve("a", positive, scores)
    assert found.x.tolist() == [0, 0.5, 0.5, 1]
    assert found.y.tolist() == [1, 1, 0.5, 0.5]
    assert found.area == pytest.approx(0.75)


def test_long_curves_are_thinned_without_losing_their_shape():
    x = np.linspace(0, 1, 100_000)
    y = np.where(x < 0.001, 0.0, 1.0)
    kept = thinned(x, y, 300)
    assert len(kept) <= 300 and kept[0] == 0 and kept[-1] == 99_999
    assert np.abs(np.interp(x, x[kept], y[kept]) - y).mean() < 0.01
    targets, said = predictions(2, 20_000)
    assert len(charts.themed_svg(charts.roc_curves(targets, said, ["a", "b"]))) < 40_000


def test_bins_hold_equally_many_images():
    confidence = np.random.default_rng(0).random(1000) ** 9
    assert np.bincount(confidence_bins(confidence, 10)).tolist() == [100] * 10
    assert (
        confidence_bins(np.full(7, 0.5)).max() == confidence_bins(np.full(7, 0.5)).min()
    )


def test_multi_label_curves_and_maps():
    rng = np.random.default_rng(0)
    targets = (rng.random((60, 3)) < 0.4).astype(np.uint8)
    targets[:, 2] = 0  # a class that never occurs has no curve
    said = rng.random((60, 3)).astype(np.float32)
    text = charts.themed_svg(charts.roc_curves(targets, said, ["a", "b", "c"]))
    assert "a, AUC" in text and "c, AUC" not in text
    right = rng.random(60) > 0.5
    points = rng.normal(size=(60, 2))
    assert "wrong" in charts.themed_svg(
        charts.feature_map(points, targets, right, ["a", "b", "c"])
    )


def test_png_is_written_and_shown(tmp_path):
    figure = charts.learning_curve([(10, estimated(0.5)), (20, estimated(0.7))])
    charts.save_png(figure, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert figure._repr_png_().startswith(b"\x89PNG")  # what IPython asks for


def test_grid_and_overlay():
    pixels = np.full((4, 8, 8, 3), 100, np.uint8)
    heat = np.zeros((4, 2, 2), np.float32)
    heat[:, 0, 0] = 1
    laid = charts.overlay(pixels[0], heat[0])
    assert laid.shape == (8, 8, 3) and laid.dtype == np.uint8
    assert laid[0, 0].astype(int).std() > 20  # colored
    assert np.abs(laid[-1, -1].astype(int) - 100).max() <= 1  # as it was
    charts.themed_svg(charts.image_grid(pixels, ["a\nb"] * 4, heat))


def test_text_chart_says_where_points_are():
    points = [("25%", estimated(0.5)), ("100%", estimated(0.8))]
    lines = text_chart(points).split("\n")
    assert "●" in lines[0] + lines[1] and "0.800" in lines[0] + lines[1]
    assert [line[:6] for line in lines[:-2]] == [
        *(" 0.900", " 0.800", " 0.700", " 0.600", " 0.500", " 0.400")
    ]
    assert "100%" in lines[-1] and text_chart([]) == ""
    assert text_chart(points, "ascii").isascii() and text_chart(points, None).isascii()


def test_names_that_would_touch_are_turned():
    counts = np.eye(3, dtype=int)
    for names, turn in ((("a", "b", "c"), 0), (("ants", "bees", "x" * 15), 45)):
        axes = charts.confusion_matrix(counts, names).axes[0]
        assert axes.get_xticklabels()[0].get_rotation() == turn


def test_small_losses_are_written_in_full():
    rows = [
        {"epoch": n, "loss": 5e-5 / n, "learning_rate": 1e-5 / n} for n in (1, 2, 3)
    ]
    svg = charts.themed_svg(charts.epoch_curves(rows))
    assert ">4e-5<" in svg and ">1e\u22125<" not in svg
