"""Copies are found whatever was done to them, and different images are not."""

import io
import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits

from keras_transfer.data.decode import make_measuring_decoder
from keras_transfer.data.formats.convert import image_digest
from keras_transfer.data.quality import QUALITY_DTYPE, measure_quality
from keras_transfer.data.tables import Table
from keras_transfer.features import copies
from keras_transfer.features.copies import connected, hash_distance, hash_pairs
from keras_transfer.findings.duplicates import Copies, copy_findings, find_copies
from keras_transfer.findings.images import AuditedImages
from keras_transfer.findings.neighbors import nearest_pairs
from keras_transfer.findings.registration import likeness

SIDE = 96


def texture(seed: int) -> Image.Image:
    """A random picture with structure of several sizes, as in a photo."""
    rng = np.random.default_rng(seed)
    waves = [
        gaussian_filter(rng.normal(size=(SIDE, SIDE, 3)), (x, x, 0), mode="wrap") * x
        for x in (2, 4, 8)
    ]
    pixels = sum(waves)
    pixels = (pixels - pixels.min()) / np.ptp(pixels) * 200
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def cropped(image: Image.Image) -> Image.Image:
    width, height = image.size
    x, y = round(0.1 * width), round(0.1 * height)
    return image.crop((x, y, width - x, height - y))


def mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


EDITS = {
    "re-encoded": lambda x: encoded(x, "JPEG", quality=60),
    "resized": lambda x: encoded(x.resize((60, 60)), "JPEG", quality=90),
    "cropped": lambda x: encoded(cropped(x)),
    "mirrored": lambda x: encoded(mirrored(x)),
    "brightened": lambda x: encoded(x.point(lambda value: min(255, 1.3 * value))),
    "gray": lambda x: encoded(x.convert("L")),
}


def audited(
    files: Sequence[bytes],
    split: Sequence[str] | None = None,
    targets: Sequence[object] | None = None,
    measured: bool = True,
) -> AuditedImages:
    """Puts files in a table; their features are their coarse pixels."""
    names = tuple(f"{i}.png" for i in range(len(files)))
    decode = make_measuring_decoder(SIDE)
    images = [decode(x) for x in files]
    quality = np.zeros(len(files), QUALITY_DTYPE)
    if measured:
        for i, (file, image) in enumerate(zip(files, images, strict=True)):
            quality[i] = measure_quality(file, image)
    coarse = [
        gaussian_filter(x.pixels.astype(np.float32), (4, 4, 0))[::8, ::8].ravel()
        for x in images
    ]
    by_name = dict(zip(names, files, strict=True))
    y = np.array([0] * len(files) if targets is None else targets)
    return AuditedImages(
        table=Table(names, y, ("",) * len(files)),
        split=np.array(["train"] * len(files) if split is None else split),
        class_names=("a", "b"),
        multi_label=y.ndim == 2,
        digests=[image_digest(x) for x in files],
        quality=quality,
        features=np.array(coarse, np.float32),
        read=lambda sources: ((x, by_name[x]) for x in sources),
        extra=None,
        is_file=False,
    )


def near(copies: Copies) -> set[tuple[int, ...]]:
    return {tuple(x) for x in copies.pairs[~copies.exact].tolist()}


@pytest.fixture(scope="module")
def textures() -> list[Image.Image]:
    return [texture(seed) for seed in range(12)]


@pytest.fixture(scope="module")
def all_edits(textures: list[Image.Image]) -> AuditedImages:
    """Twelve different images, and then one edited copy of each of the first six."""
    files = [encoded(x) for x in textures]
    edits = [edit(textures[i]) for i, edit in enumerate(EDITS.values())]
    return audited([*files, *edits])


def test_edited_copies_are_found_and_nothing_else(all_edits: AuditedImages):
    copies = find_copies(all_edits)
    assert near(copies) == {(i, 12 + i) for i in range(len(EDITS))}
    assert not copies.exact.any()
    assert (copies.similarity >= 0.9).all() and (copies.similarity <= 1).all()
    assert copies.groups[12:].tolist() == copies.groups[:6].tolist()
    assert len(np.unique(copies.groups)) == 12


def test_the_cheap_way_reads_nothing_and_finds_all_but_cropped(
    all_edits: AuditedImages,
):
    def refuse(sources):
        raise AssertionError(sources)

    fields = {**vars(all_edits), "read": refuse}
    copies = find_copies(AuditedImages(**fields), thorough=False)
    places = {(i, 12 + i) for i, name in enumerate(EDITS) if name != "cropped"}
    assert near(copies) == places


def test_a_chain_of_equal_files_is_one_group(textures: list[Image.Image]):
    one, other = encoded(textures[0]), encoded(textures[1])
    edit = EDITS["re-encoded"](textures[0])
    for thorough in (True, False):
        copies = find_copies(audited([one, other, one, edit, one]), thorough=thorough)
        assert copies.exact.tolist() == [True, True, False]
        assert copies.pairs.tolist() == [[0, 2], [2, 4], [0, 3]]
        first, second, *_ = copies.groups.tolist()
        assert copies.groups.tolist() == [first, second, first, first, first]
        assert first != second


@pytest.mark.parametrize("thorough", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_images_have_no_copies(
    textures: list[Image.Image], count: int, thorough: bool
):
    images = audited([encoded(x) for x in textures[:count]])
    copies = find_copies(images, thorough=thorough)
    assert copies.pairs.shape == (0, 2)
    assert len(copies.groups) == count
    assert copy_findings(images, copies) == []


def test_without_hashes_only_equal_bytes_are_found_cheaply(
    textures: list[Image.Image],
):
    files = [encoded(textures[0]), encoded(textures[1]), EDITS["gray"](textures[0])]
    images = audited([*files, files[1]], measured=False)
    cheap = find_copies(images, thorough=False)
    assert cheap.pairs.tolist() == [[1, 3]]
    assert near(find_copies(images)) == {(0, 2)}  # by features and pixels


def test_flat_images_are_not_copies():
    flat = [
        encoded(Image.new("RGB", (SIDE, SIDE), (x, x, x))) for x in (0, 1, 128, 255)
    ]
    for thorough in (True, False):
        assert not len(find_copies(audited(flat), thorough=thorough).pairs)


def test_images_that_vanished_are_left_out(textures: list[Image.Image]):
    images = audited([encoded(textures[0]), EDITS["gray"](textures[0])])

    def read(sources):
        for source in sources:
            yield source, OSError("gone") if source == "0.png" else encoded(textures[0])

    copies = find_copies(AuditedImages(**{**vars(images), "read": read}))
    assert not len(copies.pairs)
    assert copies.notes == ("near copies: 1 image could not be read again",)


def test_findings_say_where_copies_are(textures: list[Image.Image]):
    one, two, three = (encoded(x) for x in textures[:3])
    edits = [EDITS["re-encoded"](x) for x in textures[:3]]
    images = audited(
        [one, one, two, edits[1], three, edits[2], edits[0]],
        ["train", "test", "train", "test", "train", "train", "train"],
        [0, 0, 0, 1, 1, 1, 0],
    )
    found = {x.kind: x for x in copy_findings(images, find_copies(images))}
    listed = {
        kind: [(x.path, x.other) for x in one.suspects] for kind, one in found.items()
    }
    listed["near duplicates"].sort()
    assert listed == {
        "exact duplicates across splits": [("1.png", "0.png")],
        "near duplicates across splits": [("3.png", "2.png")],
        "near duplicates with other labels": [("2.png", "3.png"), ("3.png", "2.png")],
        "near duplicates": [("5.png", "4.png"), ("6.png", "0.png")],
    }
    severities = {kind: one.severity for kind, one in found.items()}
    assert severities["exact duplicates across splits"] == "high"
    assert severities["near duplicates across splits"] == "high"
    assert severities["near duplicates with other labels"] == "medium"
    assert severities["near duplicates"] == "low"
    assert found["exact duplicates across splits"].figures == {"test": 1}
    assert found["near duplicates"].message.startswith("2 training images have a near")


def test_near_copies_of_one_group_are_as_they_should_be(
    textures: list[Image.Image],
):
    edits = [EDITS["re-encoded"](x) for x in textures[:2]]
    files = [*(encoded(x) for x in textures[:2]), *edits, edits[0]]
    images = audited(files)
    table = replace(images.table, groups=("a", "b", "a", "c", "a"))
    images = replace(images, table=table)
    found = {x.kind: x for x in copy_findings(images, find_copies(images))}
    listed = {kind: [x.path for x in one.suspects] for kind, one in found.items()}
    # The same bytes count twice even in one group.
    assert listed == {"exact duplicates": ["4.png"], "near duplicates": ["3.png"]}


def test_labels_of_several_classes_are_compared_as_a_whole(
    textures: list[Image.Image],
):
    one, two = (encoded(x) for x in textures[:2])
    images = audited([one, one, two, two], targets=[[1, 0], [1, 1], [0, 0], [0, 0]])
    found = {x.kind: x for x in copy_findings(images, find_copies(images))}
    torn = found["exact duplicates with other labels"]
    assert torn.severity == "high"
    assert [(x.path, x.other, x.score) for x in torn.suspects] == [
        ("0.png", "1.png", 1),
        ("1.png", "0.png", 1),
    ]
    assert [x.path for x in found["exact duplicates"].suspects] == ["3.png"]


def measured(
    hashes: np.ndarray, file: np.ndarray, split: np.ndarray, label: np.ndarray
) -> AuditedImages:
    """Images that are known by their hashes only; those of a file have its hash."""
    quality = np.zeros(len(file), QUALITY_DTYPE)
    quality["contrast"], quality["perceptual_hash"] = 50, hashes[file]
    names = tuple(f"{i}.png" for i in range(len(file)))
    return AuditedImages(
        table=Table(names, label, ("",) * len(file)),
        split=np.array(["train", "val", "test"])[split],
        class_names=tuple(map(str, range(500))),
        multi_label=False,
        digests=[b"%032d" % x for x in file],
        quality=quality,
        features=np.zeros((len(file), 1), np.float32),
        read=lambda sources: iter(()),
        extra=None,
        is_file=False,
    )


def compared_one_by_one(
    images: AuditedImages, apart: np.ndarray
) -> dict[str, dict[str, float]]:
    """Similarity by kind of finding and image, from all pairs."""
    found: dict[str, dict[str, float]] = {}
    split = [("train", "val", "test").index(x) for x in images.split]
    label, digests = images.table.targets, images.digests
    told, torn = set(), np.zeros(len(images), bool)
    for kind in ("exact", "near"):
        is_equal = np.equal.outer(digests, digests)
        is_copy = is_equal if kind == "exact" else (apart <= 4) & ~is_equal
        torn |= (is_copy & np.not_equal.outer(label, label)).any(1)
        for i, j in itertools.product(range(len(images)), repeat=2):
            if i == j or not is_copy[i, j]:
                continue
            meant = {
                "duplicates across splits": split[i] > split[j],
                "duplicates with other labels": label[i] != label[j],
                "duplicates": split[i] == split[j] and i > j and not torn[i],
            }
            for what in [x for x, is_meant in meant.items() if is_meant]:
                if kind == "near" and (what, i) in told:
                    continue
                of_kind = found.setdefault(f"{kind} {what}", {})
                score = 1 - apart[i, j] / 64
                of_kind[f"{i}.png"] = max(score, of_kind.get(f"{i}.png", 0))
        told |= {
            (x.removeprefix("exact "), int(i[:-4])) for x in found for i in found[x]
        }
    return found


@pytest.mark.parametrize("seed", range(12))
def test_what_is_found_is_what_all_pairs_tell(
    seed: int, monkeypatch: pytest.MonkeyPatch
):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(copies, "MOST_NEAR", 1 + seed % 3)
    count, files = 60, int(rng.integers(2, 60))
    bits = rng.random((files, 9)).argsort(1) < rng.integers(0, 5)
    hashes = np.uint64(0x1234_5678_9ABC_DEF0) ^ (bits @ (1 << np.arange(9))).astype(
        "u8"
    )
    file = rng.integers(0, files, count)
    images = measured(
        hashes, file, rng.integers(0, 3, count), rng.integers(0, 1 + seed % 4, count)
    )
    apart = hash_distance(hashes[file, None], hashes[None, file])
    found = find_copies(images, thorough=False)
    told = {
        x.kind: {y.path: y.score for y in x.suspects}
        for x in copy_findings(images, found)
    }
    expected = compared_one_by_one(images, apart)
    assert {kind: {*told[kind]} for kind in told} == {
        k: {*expected[k]} for k in expected
    }
    for kind in expected.keys() - {"near duplicates"}:
        assert told[kind] == pytest.approx(expected[kind])
    assert len({*map(tuple, found.pairs.tolist())}) == len(found.pairs)
    # The pairs connect what all pairs would.
    number = connected(count, [np.argwhere(apart <= 4)])
    linked = connected(count, [found.pairs])
    assert len({*zip(number, linked, strict=True)}) == len({*number}) == len({*linked})


@pytest.mark.parametrize("classes", [1, 500])
@pytest.mark.parametrize("files", [1, 3000])
def test_of_many_that_are_alike_few_pairs_are_kept(files: int, classes: int):
    count = 3000
    file = np.arange(count) % files
    hashes = np.full(files, 0x1234_5678_9ABC_DEF0, np.uint64)
    images = measured(hashes, file, np.arange(count) % 3, np.arange(count) % classes)
    found = find_copies(images, thorough=False)
    assert len(found.pairs) <= 20 * count
    assert len({*connected(count, [found.pairs])}) == 1
    listed = {x.kind: len(x.suspects) for x in copy_findings(images, found)}
    kind = "exact" if files == 1 else "near"
    last = (" with other labels", 3000) if classes > 1 else ("", 2997)
    assert listed == {
        f"{kind} duplicates across splits": 2000,
        f"{kind} duplicates{last[0]}": last[1],
    }


def test_digits_are_too_much_alike_for_hashes():
    digits = load_digits().images[:400].astype(np.uint8) * 15
    images = audited([encoded(Image.fromarray(x)) for x in digits])
    assert len(hash_pairs(images.quality, 4)[0])
    assert not len(find_copies(images, thorough=False).pairs)


def test_pictures_are_laid_over_each_other():
    large = np.array(texture(1).convert("L").resize((128, 128)))
    part = large[20:110, 10:100]  # off the center
    wide = large[:, 12:116]  # of another aspect
    pictures = np.stack(
        [
            np.array(Image.fromarray(x).resize((64, 64), Image.Resampling.BOX))
            for x in (large, part, wide, part[:, ::-1], large[::-1])
        ]
    )
    pairs = np.array([[0, 1], [1, 0], [0, 2], [3, 0], [0, 4]])
    found = likeness(pictures, pairs)
    assert (found[:4] > 0.95).all()
    assert found[4] < 0.6
    assert likeness(pictures, pairs[:0]).shape == (0,)


def test_nearest_pairs_are_of_the_given_rows():
    x = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    x[7] = x[30] * 1.5
    rows = np.array([3, 7, 9, 12, 20, 30, 35, 39])
    pairs = nearest_pairs(x, rows, 1)
    assert np.isin(pairs, rows).all()
    assert [7, 30] in pairs.tolist()
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert nearest_pairs(x, rows[:1], 3).shape == (0, 2)
