"""Groups by file name: what is grouped, what is told, and when it is suggested."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keras_transfer.config import ListingConfig, SplitsConfig
from keras_transfer.data.grouping import group_by_name, hint_at_groups
from keras_transfer.data.loading import load, load_all
from keras_transfer.data.reading import read_files
from keras_transfer.data.tables import Listing, Splits, Table
from keras_transfer.errors import KerasTransferError, UsageError

NIH = r"^(\d{8})_"


def by_name(regex: str, **options: object) -> ListingConfig:
    return ListingConfig(group_regex=regex, **options)


def listing(*sources: str, groups: Sequence[str] = ()) -> Listing:
    found = Listing(lambda paths: read_files(paths, Path()))
    for i, source in enumerate(sources):
        found.add(source, ("a",), group=groups[i] if groups else "")
    return found


def folder(root: Path, *paths: str) -> str:
    """A folder of empty files."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return str(root)


def xrays(patients: int = 30, images: int = 4, first: int = 1) -> list[str]:
    """Paths as those of NIH ChestX-ray14, of patients with one label or several."""
    return [
        f"{('ill', 'well')[(patient + (patient % 7 == image)) % 2]}/"
        f"{patient:08d}_{image:03d}.png"
        for patient in range(first, first + patients)
        for image in range(images)
    ]


def groups_of(splits: Splits) -> dict[str, str]:
    return {
        source: group
        for _, table in splits.items()
        for source, group in zip(table.sources, table.groups, strict=True)
    }


# Groups by an expression


def test_images_of_a_patient_stay_together_and_the_rest_is_told(tmp_path):
    odd = ["ill/scan.png", "well/0000_1.png"]
    data = folder(tmp_path, *xrays(), *odd)
    splits = load(data, options=by_name(NIH))
    found = groups_of(splits)
    assert {source: found.pop(source) for source in odd} == dict.fromkeys(odd, "")
    assert all(Path(source).name.startswith(x + "_") for source, x in found.items())
    assert not {*splits.train.groups} & {*splits.test.groups} - {""}
    assert len(splits.test) > 5
    assert splits.warnings == (
        "Groups by group_regex: 30, of 120 images.",
        "2 of 122 names do not match group_regex, such as scan.png: each is a group "
        "of its own.",
    )


@pytest.mark.parametrize(
    ("regex", "expected"),
    [
        (r"(\d+)", ["12", "12", "345", "", "7"]),
        (r"^([a-z]+)_", ["p", "p", "q", "", ""]),
        (r"_(\d)?-", ["", "", "", "", ""]),
        (r"(?i)(P)_|-(P)|(P)8", ["p", "p", "", "", ""]),
        (r"q_(\d+)|P(\d+)", ["", "", "345", "", ""]),  # the first group took no part
        (r"^(\d*)", ["", "", "", "", "7"]),  # or matched nothing
        (r"^(?:q_)?(?P<patient>\d+)(?=[_.-])(.*)", ["", "", "345", "", "7"]),
    ],
)
def test_the_first_group_is_searched_for_in_the_name_alone(regex, expected):
    found = listing("99/p_12-1.png", "88/p_12-2.png", "q_345.png", "77/x.png", "7-P8")
    if not any(expected):
        with pytest.raises(UsageError):
            group_by_name(found, regex)
        group_by_name(found, regex, strict=False)
        assert found.warnings == []
    else:
        group_by_name(found, regex)
        missing = expected.count("")
        told = re.findall(r"^(\d+) of 5 names", "\n".join(found.warnings), re.M)
        assert told == ([str(missing)] if missing else [])
    assert found.groups == expected


def test_an_expression_that_matches_no_name_is_an_error(tmp_path):
    data = folder(tmp_path, *xrays())
    with pytest.raises(UsageError) as caught:
        load(data, options=by_name(r"^(\d{4})_"))
    message = str(caught.value)
    assert "\n" not in message
    assert all(x in message for x in (r"'^(\d{4})_'", "00000001_001.png", "120"))
    with pytest.raises(UsageError):  # the folder is not part of the name
        load(data, options=by_name("(ill|well)"))


def test_what_has_no_images_has_no_groups(tmp_path):
    with pytest.raises(KerasTransferError, match="no images"):
        load(folder(tmp_path), options=by_name(NIH))


def test_an_expression_wins_over_groups_that_were_found(tmp_path):
    rows = [f"{path},{path.split('/')[0]},g{i}" for i, path in enumerate(xrays(8))]
    (tmp_path / "data.csv").write_text("\n".join(["path,label,group", *rows]))
    splits = load(str(tmp_path / "data.csv"), options=by_name(NIH))
    assert {*groups_of(splits).values()} == {f"{i:08d}" for i in range(1, 9)}
    assert splits.warnings[0].startswith("The groups that the data have are not used")
    kept = load(str(tmp_path / "data.csv"))
    assert {*groups_of(kept).values()} == {f"g{i}" for i in range(32)}


def test_a_column_and_an_expression_are_too_many():
    found = listing("1_2.png")
    with pytest.raises(
        UsageError, match=r"group_column=patient and group_regex=\^"
    ) as e:
        group_by_name(found, r"^(\d)_", "patient")
    assert "\n" not in str(e.value)
    assert found.groups == [""]


def test_groups_stay_where_no_name_matches_if_that_is_allowed():
    found = listing("a.png", "b.png", groups=["1", ""])
    group_by_name(found, NIH, strict=False)
    assert (found.groups, found.warnings) == (["1", ""], [])
    group_by_name(found, "(a)", strict=False)
    assert found.groups == ["a", ""]


def test_all_of_other_data_are_grouped_too(tmp_path):
    data = folder(tmp_path, *xrays(3))
    table, _ = load_all(data, ("ill", "well"), False, by_name(NIH))
    assert {*table.groups} == {"00000001", "00000002", "00000003"}


# The hint


def split(sources: Sequence[str], test: float = 0.2) -> Splits:
    """Splits of a random fifth of the images, or of what lies in train/ and test/."""
    rng = np.random.default_rng(0)
    classes = len({Path(source).parent.name for source in sources})
    in_test = [source.startswith("test/") for source in sources]
    if not any(in_test):
        in_test = (rng.random(len(sources)) < test).tolist()
    tables = {}
    for name, wanted in (("train", False), ("val", None), ("test", True)):
        chosen = [x for x, y in zip(sources, in_test, strict=True) if y == wanted]
        targets = rng.integers(classes, size=len(chosen))
        tables[name] = Table(tuple(chosen), targets, ("",) * len(chosen))
    names = tuple(f"c{i}" for i in range(classes))
    return Splits(
        **tables, class_names=names, multi_label=False, read=None, warnings=()
    )


def suggested(splits: Splits) -> str:
    """The expression that is suggested; "" for none. It must do what is said."""
    hints = hint_at_groups(splits)
    if not hints:
        return ""
    (line,) = hints
    assert "\n" not in line
    words = shlex.split(line)
    regex = words[words.index("--group-regex") + 1]
    ListingConfig(group_regex=regex)
    train, test = listing(*splits.train.sources), listing(*splits.test.sources)
    for part in (train, test):
        group_by_name(part, regex, strict=False)
    shared = {*train.groups} & {*test.groups} - {""}
    count = sum(group in shared for group in test.groups)
    assert line.startswith(f"{count} of {len(test.groups)} test images share ")
    one, other = re.search(r"such as (\S+) and (\S+)\. If", line).groups()
    assert re.search(regex, one)[1] == re.search(regex, other)[1]
    return regex


def test_shared_beginnings_are_told_once_with_the_remedy(tmp_path):
    data = folder(tmp_path, *xrays())
    (line,) = load(data).warnings
    assert line.startswith("18 of 18 test images share the beginning of their name ")
    assert r"--group-regex '^(\d{8})_' (in Python: group_regex)." in line
    assert "share" not in "".join(load(data, options=by_name(NIH)).warnings)


def person(i: int, kind: str, number: int) -> str:
    return f"PNEUMONIA/person{i}_{kind}_{number}.jpeg"


REAL = {
    "NIH": (xrays(), NIH),
    "NIH, no years": (xrays(40, first=1_950), NIH),
    "NIH, and others": (
        [*xrays(), *(f"ill/all142{i}-fig-m-{'abcd'[i % 4]}.jpg" for i in range(40))],
        NIH,
    ),
    "Kermany": (
        [person(i, "virus", 2 * i + j) for i in range(1, 150) for j in range(2)]
        + [person(i, "bacteria", 3 * i + j) for i in range(1, 150) for j in range(3)]
        + [f"NORMAL/IM-{i:04d}-0001.jpeg" for i in range(200)]
        + [f"NORMAL/NORMAL2-IM-{i:04d}-0001.jpeg" for i in range(80)],
        r"^(person\d+)_",
    ),
    "OCT2017": (
        [
            f"{kind}/{kind}-{7 * i + 10**(6 + i % 2)}-{j}.jpeg"
            for kind in ("CNV", "DME", "DRUSEN", "NORMAL")
            for i in range(20)
            for j in range(1, 8)
        ],
        r"^([A-Za-z]+-\d+)-",
    ),
    "DICOM": (
        [f"data/patient{i:04d}_{j}.dcm" for i in range(40) for j in range(3)],
        r"^(patient\d{4})_",
    ),
    "Market-1501": (
        [
            f"{'ab'[i % 2]}/{i:04d}_c{1 + j % 6}s1_{13 * j:04d}_0{j % 3}.jpg"
            for i in range(30)
            for j in range(17)
        ],
        r"^(\d{4})_",
    ),
    "retinopathy": (
        [
            f"{(i + (i + 1) % 5 // 4 * j) % 3}/{i}_{side}.jpeg"
            for i in range(1, 200)
            for j, side in enumerate(("left", "right"))
        ],
        r"^(\d+)_",
    ),
    "GTSRB": (
        [f"{c}/{c:05d}_{t:05d}_{f:05d}.ppm" for c in range(2) for t in range(9)
         for f in range(30)],
        r"^(\d{5}_\d{5})_",
    ),
    "augmented": (
        [f"dog/IMG_{i:04d}_{how}.jpg" for i in range(50) for how in ("flip", "blur")],
        r"^(IMG_\d{4})_",
    ),
    "videos": (
        [f"{'ab'[i % 2]}/video{i}_frame_{j:04d}.jpg" for i in range(30)
         for j in range(0, 300, 10)],
        r"^(video\d+)_",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_names_of_patients_and_objects_are_seen(name):
    sources, regex = REAL[name]
    assert suggested(split(sources)) == regex


FINE = {
    "camera": [f"{'ab'[i % 2]}/IMG_{i:04d}.jpg" for i in range(300)],
    "two cameras": [f"{x}/DSC{i % 2}_{i:04d}.jpg" for i in range(300) for x in "ab"],
    "class and number": [f"{x}/{x}_{i:03d}.jpg" for i in range(99) for x in "dc"],
    "ImageNet": [f"n{s:08d}/n{s:08d}_{i}.jpg" for s in range(60) for i in range(20)],
    "ImageNet, in few": [f"{s % 3}/n{s:08d}_{i}.jpg" for s in range(99) for i in "12"],
    "Caltech": [f"{c:03d}.x/{c:03d}_{i:04d}.jpg" for c in range(40) for i in range(30)],
    "Flickr": [f"a/{i * 7919 % 10**7}_{i * 104729:010x}_n.jpg" for i in range(1, 400)],
    "numbers": [f"{'ab'[i % 2]}/{i}.jpg" for i in range(300)],
    "numbers anew in each split": [
        f"{part}/{'cat dog ship'.split()[(i * seed) % 3]}/{i}_{(i * seed) % 3}.png"
        for part, count, seed in (("train", 900, 7), ("test", 200, 11))
        for i in range(count)
    ],
    "numbers anew in a class": [f"{c}/{i}_{c}.png" for c in "abc" for i in range(99)],
    "dates": [
        f"a/{year}{month:02d}{day:02d}_{i:06d}.jpg"
        for year in (2019, 2024) for month in range(1, 13) for day in (1, 30)
        for i in range(5)
    ],
    "dates with dashes": [
        f"a/2021-{month:02d}-{day:02d} {i}.jpg"
        for month in range(1, 13) for day in range(1, 28) for i in range(5)
    ],
    "telephones": [
        f"a/IMG_2021{month:02d}{day:02d}_{i * 7:06d}_HDR.jpg"
        for month in range(1, 13) for day in range(1, 28) for i in range(5)
    ],
    "times": [f"a/{20170116184024 + i // 3}_{i}.jpg" for i in range(200)],
    "frames": [f"a/frame_{i:05d}.jpg" for i in range(400)],
    "cameras": [f"a/cam{c}_{i:04d}.jpg" for c in range(8) for i in range(40)],
    "sites": [f"a/site{c}_{i:04d}.jpg" for c in range(20) for i in range(90)],
    "people": [f"a/{x}_Lindsey_{i:04d}.jpg" for x in ("Jo", "Al") for i in range(99)],
    "split by patient": [
        f"{'test' if path[-9] == '7' else 'train'}/{path}" for path in xrays()
    ],
    "few": xrays(4, 30),
    "one pair": [*xrays(400, 1), "test/ill/00000003_007.png"],
    "nothing": [],
}  # fmt: skip


@pytest.mark.parametrize("name", FINE)
def test_names_that_say_nothing_of_groups_are_left_alone(name):
    assert hint_at_groups(split(FINE[name])) == []


def test_images_with_groups_need_no_hint():
    splits = split(xrays())
    assert suggested(splits) == NIH
    groups = ("g", *splits.train.groups[1:])
    table = Table(splits.train.sources, splits.train.targets, groups)
    grouped = Splits(**{**vars(splits), "train": table})
    assert hint_at_groups(grouped) == []


def test_without_test_images_folds_share_what_training_images_share(tmp_path):
    sources = [*xrays(), "ill/99999999_000.png"]
    (line,) = hint_at_groups(split(sources, test=0.0))
    assert line.startswith(
        "120 of 121 training images share the beginning of their name with one "
        "another, such as 00000001_000.png and 00000001_001.png. "
    )
    assert "figures of cross-validation flatter" in line
    assert rf"--group-regex '{NIH}' (in Python: group_regex)." in line
    data = folder(tmp_path, *xrays())
    warnings = load(data, SplitsConfig(test=0)).warnings
    assert "120 of 120 training images share" in "\n".join(warnings)


@pytest.mark.parametrize("name", sorted(FINE.keys() - {"split by patient"}))
def test_without_test_images_fine_names_are_left_alone_too(name):
    sources = [x.removeprefix("test/") for x in FINE[name]]
    assert hint_at_groups(split(sources, test=0.0)) == []


_WORD = st.sampled_from(["", "p", "Case_", "IMG-", "scan-x_", "é_", "n", "2"])
_SEPARATOR = st.sampled_from(["_", "-", "_", "-", ""])


@st.composite
def names(draw: st.DrawFn) -> list[str]:
    """Names of one form, and some others among them."""
    before, after = draw(_WORD), draw(_WORD)
    separator, width = draw(_SEPARATOR), draw(st.integers(1, 8))
    ids = draw(st.lists(st.integers(0, 10**4), min_size=9, max_size=60, unique=True))
    per_id = draw(st.integers(1, 5))
    form = [
        f"{before}{number:0{width}d}{separator}{after}{i}.png"
        for number in ids
        for i in range(per_id)
    ]
    text = st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=9)
    return list(dict.fromkeys([*form, *draw(st.lists(text, max_size=20))]))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(names(), st.sampled_from(["a", "ab", "abcd"]), st.randoms(use_true_random=False))
def test_whatever_is_suggested_gives_the_groups_that_were_counted(
    found, folders, random
):
    sources = [f"{random.choice(folders)}/{name}" for name in found]
    # White space in a name would only disturb how the test reads the line.
    suggested(split([x for x in sources if not re.search(r"[\s'\"\\]", x)]))
