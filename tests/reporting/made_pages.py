"""Pages made of predictions that the tests make up, with pictures of real pixels."""

import io
from dataclasses import replace

import numpy as np
from conftest import draw, encode

from keras_transfer.evaluation.metrics import evaluate
from keras_transfer.evaluation.thresholds import accuracy_coverage
from keras_transfer.reporting import charts
from keras_transfer.reporting.album import Album, predicted_images
from keras_transfer.reporting.contents import (
    class_rows,
    confusion_of,
    figures_of,
    mistakes_and_doubts,
)
from keras_transfer.reporting.page import (
    Card,
    Chart,
    FeatureMap,
    Figure,
    Findings,
    Finetuning,
    Gallery,
    Heat,
    Page,
    Provenance,
    ShownFinding,
)
from keras_transfer.reporting.predictions import KeptPredictions
from keras_transfer.reporting.thumbnails import heat_overlay, make_thumbnails

HOSTILE = (
    "<script>alert(1)</script>",
    'a" onmouseover="alert(2)',
    "'><img src=x onerror=alert(3)>",
    "</style><!-- $x$ {{ 7 * 7 }} --></script>",
    "ro\u202ese \udcff",
)


def predictions(names, count: int = 120, multi_label: bool = False) -> KeptPredictions:
    """Predictions that are mostly right, of images with hostile names."""
    rng = np.random.default_rng(0)
    classes = len(names)
    targets = rng.integers(0, classes, count)
    logits = rng.normal(0, 1, (count, classes))
    logits[np.arange(count), targets] += 0.4 + np.log(classes)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    said = p.argmax(1)[:, None] == np.arange(classes)
    if multi_label:
        shown = rng.random((count, classes)) < 0.3
        p = np.clip(shown * 0.5 + rng.random((count, classes)) * 0.5, 0, 1)
        targets, said = shown.astype(np.uint8), p >= 0.5
    return KeptPredictions(
        sources=np.array([f"{names[i % classes]}/{i}.jpg" for i in range(count)]),
        split=np.full(count, "test"),
        how=np.full(count, "test"),
        targets=targets,
        is_predicted=said,
        probabilities=p.astype(np.float32),
        sure=np.full(count, -1, np.int8),
        far=np.zeros(count, np.int8),
    )


def read(sources):
    """Reads a photo for each source, with EXIF that nobody should see."""
    rng = np.random.default_rng(0)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\0SECRET"
    for source in sources:
        pixels = draw(("circle", "square", "stripes")[len(source) % 3], rng)
        yield source, encode(pixels, "JPEG", exif=exif)


def made_page(
    names=HOSTILE, multi_label: bool = False, count: int = 120, pictures: int = 60
) -> Page:
    """A page with every section that the data allow."""
    kept, album = predictions(names, count, multi_label), Album()
    album.tell(predicted_images(kept, names))
    evaluation = evaluate(kept.targets, kept.probabilities, names)
    limits = np.full(len(names), 0.5, np.float32) if multi_label else None
    groups = []
    for title, rows in zip(
        ("Mistakes", "Doubts"), mistakes_and_doubts(kept, limits, 6, 6), strict=True
    ):
        groups.append((title, kept.sources[rows].tolist()))
        for source in groups[-1][1]:
            album.number(source)
            album.first[source] = 128
    page = Page(
        kind="Report",
        title=names[0],
        facts=(names[0], "5 classes"),
        summary=(f"Asked for {names[0]}.", "Found.", names[-1]),
        notes=(names[1],),
        headline=(figures_of(evaluation, "test", np.full(len(names), 0.1)),),
        confusion=None if multi_label else confusion_of(kept, names, album),
        classes=class_rows(
            kept, names, evaluation.classes, {} if multi_label else None, album
        ),
        findings=_findings(names, kept, album),
        finetuning=_finetuning(names, kept, album),
        curves=_curves(names, kept),
        feature_map=_map(names, kept, album),
        learning=(Chart("L2 path", charts.themed_svg(_path()), names[2]),),
        heat=Heat(Figure("border", 0.3, baseline=0.5, against="even"), True, False),
        provenance=Provenance(
            (("Data", names[0]),), (("keras", "3"),), (names[1],), (names[2],)
        ),
    )
    made = make_thumbnails(read, dict.fromkeys(album.wanted(pictures), 96), 10**6)
    return replace(
        page,
        images=album.shown(made),
        sets=album.sets,
        galleries=tuple(
            Gallery(title, names[0], tuple(_card(x, album, made) for x in sources))
            for title, sources in groups
        ),
    )


def _card(source: str, album: Album, made) -> Card:
    heat = np.linspace(0, 1, 49, dtype=np.float32).reshape(7, 7)
    number = album.number(source)
    assert number is not None
    return Card(number, heat_overlay(heat, 96, 96) if source in made else None, 0.3)


def _findings(names, kept: KeptPredictions, album: Album) -> Findings:
    sources = kept.sources[:12].tolist()
    key = album.put("finding-0", names[0], sources, [names[0]] * 12)
    found = ShownFinding(names[1], "high", names[2], key)
    bare = ShownFinding(names[2], "low", names[0])
    return Findings((found, bare), (names[3 % len(names)],), (names[0],))


def _finetuning(names, kept: KeptPredictions, album: Album) -> Finetuning:
    gained = album.put("tuned-gained", names[0], kept.sources[:3].tolist())
    rates = charts.layer_rates({names[0]: 1e-4, "head": 1e-3})
    chart = Chart("Rates", charts.themed_svg(rates))
    return Finetuning(names[0], ((names[1], names[2]),), (chart,), gained, "")


def _curves(names, kept: KeptPredictions) -> tuple[Chart, ...]:
    p = kept.probabilities
    figures = {"ROC": charts.roc_curves(kept.targets, p, names)}
    if kept.targets.ndim == 1:
        points = accuracy_coverage(p, kept.targets)
        figures["Reliability"] = charts.reliability_diagram(p.max(1), kept.is_right)
        figures["Coverage"] = charts.accuracy_coverage_curve(points)
    return tuple(Chart(k, charts.themed_svg(v), k) for k, v in figures.items())


def _map(names, kept: KeptPredictions, album: Album) -> FeatureMap:
    rng = np.random.default_rng(0)
    numbers = np.array([album.number(x) for x in kept.sources.tolist()])
    views = tuple(
        Chart(
            name,
            charts.themed_svg(
                charts.feature_map(
                    rng.normal(size=(len(kept), 2)),
                    kept.targets,
                    kept.is_right,
                    names,
                    numbers,
                )
            ),
        )
        for name in ("PCA", "t-SNE")
    )
    return FeatureMap(views, len(kept), len(kept))


def _path():
    rows = [{"l2": 10.0**-k, "loss": 0.1 * k, "val_loss": 0.2} for k in range(3)]
    return charts.l2_path(rows, 0.1)


def jpeg_with_exif(orientation: int) -> bytes:
    """A JPEG, 40 wide and 20 high as stored, red in its upper left corner."""
    from PIL import Image

    pixels = np.full((20, 40, 3), 255, np.uint8)
    pixels[:10, :20] = (255, 0, 0)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    exif[0x010E] = "SECRET"
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif, quality=95)
    return file.getvalue()
