"""Tables of images: how their columns are found, and what is kept of the others."""

import os
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keras_transfer.config import ListingConfig, SplitsConfig
from keras_transfer.data.loading import load, load_all
from keras_transfer.data.table_files import list_table, list_table_file
from keras_transfer.data.tables import Listing
from keras_transfer.data.text_cells import read_table
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.runs.files import csv_text

ROWS = [("a.jpg", "x", "train", "p"), ("b.jpg", "y", "test", "q")]


def written(text: str, name: str = "data.csv") -> Path:
    Path(name).write_text(text, encoding="utf-8")
    return Path(name)


def parquet(columns: dict | pa.Table, name: str = "data.parquet") -> Path:
    pq.write_table(
        columns if isinstance(columns, pa.Table) else pa.table(columns), name
    )
    return Path(name)


def listed(source: Path | pa.Table, usual: dict | None = None, **options) -> Listing:
    lister = list_table if isinstance(source, pa.Table) else list_table_file
    return lister(source, ListingConfig(**options), False, ListingConfig(**usual or {}))


def four(listing: Listing) -> list[tuple]:
    """(file name, label, split, group) of each image."""
    return [
        (Path(source).name, "|".join(labels), split, group)
        for source, labels, split, group in zip(
            listing.sources,
            listing.labels,
            listing.splits,
            listing.groups,
            strict=True,
        )
    ]


def refusal(error: type[Exception], source: object, **options) -> str:
    with pytest.raises(error) as caught:
        listed(source, **options)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


def load_refusal(source: object, **options) -> str:
    with pytest.raises(KerasTransferError) as caught:
        load(source, options=ListingConfig(**options))
    assert type(caught.value) is KerasTransferError
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Forms


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_delimiter_is_told_by_the_line_of_names(delimiter):
    names = ["path", "label", '"note, or; two\t"', "split", "group"]
    lines = [(path, label, '","', *more) for path, label, *more in ROWS]
    text = "\n".join(delimiter.join(line) for line in (names, *lines))
    listing = listed(written(text))
    assert four(listing) == ROWS
    assert listing.extra.to_pydict() == {"note, or; two": [",", ","]}


def test_a_comma_in_a_name_does_not_hide_the_semicolons():
    text = "path;label;age, in years, at, the, visit\na.jpg;x;3\nb.jpg;y;\n"
    assert listed(written(text)).extra.column(0).to_pylist() == [3, None]


def test_names_given_as_options_tell_the_delimiter_too():
    text = "Datei;Art, deutsch;Nr,a,b,c\na.jpg;x;1\n"
    options = {"path_column": "Datei", "label_column": "Art, deutsch"}
    assert four(listed(written(text), **options)) == [("a.jpg", "x", "", "")]


def test_tables_of_runs_are_read_whatever_their_classes_are_called():
    file = written("path,label,split,a;b;c;d,e\tf\n1.jpg,x,test,0,1\n", "run.csv")
    row = {"path": "1.jpg", "label": "x", "split": "test", "a;b;c;d": "0", "e\tf": "1"}
    assert read_table(file) == [(2, row)]


_CELL = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8
)


@settings(
    deadline=None,
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    cells=st.lists(st.tuples(_CELL, _CELL, _CELL, _CELL), min_size=1, max_size=8),
    splits=st.lists(st.sampled_from(["", "train", " Test "]), min_size=8, max_size=8),
)
def test_any_cells_mean_the_same_in_every_form(tmp_path, cells, splits):
    names = ("path", "label", "patient", "note", "split")
    rows = [
        (f"{i}/{path}", f"c{label}", group, f"n{note}", split)
        for i, ((path, label, group, note), split) in enumerate(
            zip(cells, splits, strict=False)
        )
    ]
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    files = [tmp_path / f"data.{i}" for i in range(5)]
    text = csv_text(names, rows)
    files[0].write_bytes(text.encode())
    for file, delimiter in zip(files[1:3], ";\t", strict=True):
        quoted = [[f'"{x.replace(chr(34), chr(34) * 2)}"' for x in row] for row in rows]
        lines = [delimiter.join(row) for row in ([*names], *quoted)]
        file.write_bytes("\n".join(lines).encode())
    pq.write_table(pa.table(columns), files[3])
    coded = {name: pa.array(x).dictionary_encode() for name, x in columns.items()}
    pq.write_table(pa.table(coded), files[4])
    listings = [listed(file) for file in files] + [listed(pa.table(columns))]
    first = listings[0]
    assert [labels for *_, labels in four(first)] == [row[2].strip() for row in rows]
    notes = [row[3].strip() for row in rows]
    for listing in listings:
        sources = [x.removeprefix(f"{Path.cwd().as_posix()}/") for x in listing.sources]
        assert sources == first.sources
        assert listing.labels == first.labels
        assert listing.splits == first.splits
        assert listing.groups == first.groups
        assert listing.multi_label == first.multi_label
        assert [x.strip() for x in listing.extra["note"].to_pylist()] == notes


@pytest.mark.parametrize("name", ["data.parquet", "data.PQ", "data.csv", "data"])
def test_parquet_is_known_by_its_suffix_or_its_first_bytes(name):
    columns = [pa.array(column) for column in zip(*ROWS, strict=True)]
    table = pa.table(columns, ["path", "label", "split", "group"])
    assert four(listed(parquet(table, name))) == ROWS


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (pa.array([5, 0, -1], pa.int8()), ["5", "0", "-1"]),
        (pa.array([5.0, 0.0, 2.5]), ["5", "0", "2.5"]),
        (pa.array([0.1, 0.5, 3.0], pa.float32()), ["0.1", "0.5", "3"]),
        (pa.array([True, False, True]), ["True", "False", "True"]),
        (pa.array([" a", "b", "a "]), ["a", "b", "a"]),
        (pa.array(["a", "b", "a"], pa.large_string()), ["a", "b", "a"]),
        (pa.array(["a", "b", "a"], pa.string_view()), ["a", "b", "a"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([7, 8, 7]).dictionary_encode(), ["7", "8", "7"]),
        (pa.array([Decimal("1.50"), Decimal(2), Decimal(0)]), ["1.50", "2.00", "0.00"]),
    ],
)
def test_typed_values_become_text(values, names):
    table = pa.table({"path": ["1.jpg", "2.jpg", "3.jpg"], "label": values})
    assert listed(table).labels == [(name,) for name in names]
    assert listed(parquet(table)).labels == [(name,) for name in names]


def test_null_is_nothing():
    table = pa.table(
        {
            "path": ["1.jpg", "2.jpg"],
            "label": [1, 2],
            "split": ["test", None],
            "group": [3.0, float("nan")],
            "subject": pa.nulls(2),
        }
    )
    listing = listed(table, group_column="group")
    assert listing.splits == ["test", ""]
    assert listing.groups == ["3", ""]
    table = table.set_column(1, "label", [pa.array([1, None])])
    assert "row 2: " in refusal(KerasTransferError, table, group_column="group")
    empty = table.set_column(0, "path", [pa.array(["1.jpg", None])])
    said = refusal(KerasTransferError, empty, group_column="group")
    assert said == "the table, row 2: the path is empty."


@pytest.mark.parametrize(
    "values",
    [
        pa.array([["a"], [], None, ["b", "a", None]]),
        pa.array([["a"], [], None, ["b", "a", None]], pa.large_list(pa.string())),
        pa.array([["a"], [], None, ["b", "a"]]).cast(
            pa.list_(pa.dictionary(pa.int32(), pa.string()))
        ),
    ],
)
def test_a_column_of_lists_is_multi_label(values):
    table = pa.table({"path": list("1234"), "label": values})
    for source in (table, parquet(table), table.slice(0, 3)):
        listing = listed(source)
        assert listing.multi_label
        expected = [("a",), (), (), ("b", "a")]
        assert listing.labels == expected[: len(listing.labels)]


def test_a_label_in_a_list_is_one_label():
    table = pa.table({"path": ["1", "2"], "label": [["a"], ["b|c"]]})
    said = refusal(KerasTransferError, table)
    assert said.startswith("the table, row 2: ") and "'b|c'" in said


def test_a_damaged_parquet_file_is_one_line():
    good = parquet({"path": ["1", "2"] * 500, "label": [3, 4] * 500}).read_bytes()
    rng = np.random.default_rng(0)
    samples = [b"", b"PAR1", good[:-9], good[:200], b"path,label\n1,a\n"]
    for _ in range(150):
        changed = bytearray(good)
        for place in rng.integers(len(good), size=4):
            changed[place] = rng.integers(256)
        samples.append(bytes(changed))
    found = 0
    for sample in samples:
        Path("damaged.parquet").write_bytes(sample)
        try:
            listed(Path("damaged.parquet"))
        except (UsageError, KerasTransferError) as error:
            assert "\n" not in str(error)
            assert "damaged.parquet" in str(error)
            found += "is no Parquet file, or it is damaged" in str(error)
    assert found >= 50


IMAGE = {"bytes": b"\xff\xd8\xff", "path": "a.jpg"}


def test_images_in_the_table_itself_are_refused():
    said = refusal(UsageError, parquet({"image": [IMAGE] * 2, "label": [0, 1]}))
    assert "column 'image' holds no paths of image files" in said
    assert "struct<bytes: binary, path: string>" in said
    assert "path_column=NAME" in said


def test_files_in_further_columns_are_neither_read_nor_kept():
    table = pa.table(
        {
            "image": [IMAGE] * 2,
            "raw": [b"1", b"2"],
            "all": [[b"1"], []],
            "file": ["1.jpg", "2.jpg"],
            "label": [0, 1],
            "box": [[1, 2], [3, 4]],
            "length": pa.nulls(2, pa.month_day_nano_interval()),
        }
    )
    listing = listed(table)
    assert listing.extra.column_names == ["box"]
    assert listing.warnings == [
        "Of the columns, 'file' is the path, 'label' is the label; kept for reports: "
        "'box'; not kept: 'image', 'raw', 'all', 'length'."
    ]
    assert [Path(source).name for source in listing.sources] == ["1.jpg", "2.jpg"]
    file = parquet(table.drop_columns(["length"]))
    assert listed(file).extra.equals(pa.table({"box": [[1, 2], [3, 4]]}))


@pytest.mark.parametrize("role", ["label", "split", "group"])
def test_a_column_of_another_kind_is_refused(role):
    columns = {"path": ["1"], "label": ["a"], "odd": [{"a": 1}]}
    said = refusal(UsageError, pa.table(columns), **{f"{role}_column": "odd"})
    assert "'odd'" in said and "struct<a: int64>" in said
    assert f"{role}_column=NAME" in said


def test_weights_of_another_kind_are_refused():
    columns = {"path": ["1"], "label": ["a"], "sample_weight": [[1]]}
    assert "list<" in refusal(UsageError, pa.table(columns))


# Columns


@pytest.mark.parametrize("path", ["path", "filename", "File", "image", "IMAGE_PATH"])
@pytest.mark.parametrize("label", ["label", "class", "Target", "category"])
def test_usual_names_are_found(path, label):
    listing = listed(written(f"{label},{path}\nx,a.jpg\ny,b.jpg\n"))
    assert four(listing) == [("a.jpg", "x", "", ""), ("b.jpg", "y", "", "")]


@pytest.mark.parametrize("split", ["split", "Fold", "subset"])
@pytest.mark.parametrize("group", ["group", "patient", "Patient_ID", "subject"])
def test_usual_names_of_splits_and_groups_are_found(split, group):
    text = csv_text(("path", "label", split, group), ROWS)
    assert four(listed(written(text))) == ROWS


@pytest.mark.parametrize("form", ["csv", "parquet", "memory"])
def test_options_name_columns(form):
    names = ("Scan", "diagnosis", "use for", "case no", "label", "path", "split")
    rows = [(*row, "?", "?", "?") for row in ROWS]
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    source = {
        "csv": lambda: written(csv_text(names, rows)),
        "parquet": lambda: parquet(columns),
        "memory": lambda: pa.table(columns),
    }[form]()
    options = {
        "path_column": "scan",
        "label_column": " diagnosis ",
        "split_column": "use for",
        "group_column": "CASE NO",
    }
    listing = listed(source, **options)
    assert four(listing) == ROWS
    assert listing.extra.column_names == ["label", "path", "split"]
    assert listing.warnings == [
        "Of the columns, 'Scan' is the path, 'diagnosis' is the label, 'use for' is "
        "the split, 'case no' is the group; kept for reports: 'label', 'path', 'split'."
    ]


def test_the_exact_name_is_preferred_to_one_in_another_case():
    table = pa.table({"path": ["1"], "label": ["a"], "Class": ["b"], "class": ["c"]})
    assert listed(table, label_column="class").labels == [("c",)]
    assert listed(table, label_column="Class").labels == [("b",)]
    said = refusal(UsageError, table, label_column="CLASS")
    assert "'Class', 'class'" in said and "label_column=Class" in said


def test_columns_that_go_without_saying_are_not_told():
    assert listed(written("Path,label,GROUP\na.jpg,x,\n")).warnings == []
    assert listed(written("file,label\na.jpg,x\n")).warnings == [
        "Of the columns, 'file' is the path, 'label' is the label."
    ]


def test_of_many_further_columns_some_are_told():
    names = [f"c{i}" for i in range(12)]
    text = csv_text(("path", "label", *names), [("a.jpg", "x", *names)])
    (line,) = listed(written(text)).warnings
    assert line.endswith("'c6', 'c7' and 4 more.")


@pytest.mark.parametrize(
    ("header", "options", "words"),
    [
        ("path,image,label", {}, ["'path', 'image'", "path_column=path"]),
        ("path,class,category", {}, ["'class', 'category'", "label_column=class"]),
        ("path,label,split,subset", {}, ["'split', 'subset'", "split_column=split"]),
        ("path,label,group,patient", {}, ["'patient'", "group_column=group"]),
        ("scan,label", {}, ["path, filename, file, image or image_path", "path_col"]),
        ("path,dx", {}, ["label, class, target or category", "'path,dx'"]),
        (
            "path,label,sex",
            {"group_column": "sexx"},
            ["group_column=sexx", "'sex'?", "'path', 'label', 'sex'"],
        ),
        ("path,label", {"split_column": "zz"}, ["split_column=zz", "columns are"]),
        (
            "path,label",
            {"group_column": "label", "label_column": "label"},
            ["label_column=label and group_column=label"],
        ),
        ("path,label,a b", {"path_column": "a c"}, ["path_column='a c'", "'a b'?"]),
        ("path,label,x,X", {}, ["line 1", "'x'", "2 times"]),
        (
            "path,label,category",
            {"label_column": "path"},
            ["image_path beside 'path', the label.", "path_column=NAME"],
        ),
    ],
)
def test_a_column_that_is_not_told_is_one_line(header, options, words):
    cells = ",".join(["test"] * (header.count(",") + 1))
    said = refusal(UsageError, written(f"{header}\n{cells}\n"), **options)
    assert all(word in said for word in words)
    assert "data.csv" in said or "A column is for one thing" in said


def test_a_column_name_that_is_there_twice_is_refused_in_parquet_too():
    table = pa.table([["1"], ["a"], ["b"]], names=["path", "label", "label "])
    assert "'label' is there 2 times" in refusal(UsageError, table)


def test_a_chosen_column_is_no_candidate_for_another_role():
    text = "path,label,patient,group\na.jpg,x,p,q\n"
    listing = listed(written(text), label_column="group")
    assert four(listing) == [("a.jpg", "q", "", "p")]
    assert listing.extra.column_names == ["label"]


def test_numbers_of_folds_are_no_splits():
    text = "path,label,fold\na.jpg,x,0\nb.jpg,y,1\n"
    listing = listed(written(text))
    assert listing.splits == ["", ""]
    assert listing.extra.to_pydict() == {"fold": [0, 1]}
    assert any("'fold' is not used as the split" in x for x in listing.warnings)
    both = "path,label,fold,subset\na.jpg,x,0,train\nb.jpg,y,1,test\n"
    assert listed(written(both)).splits == ["train", "test"]
    said = load_refusal(written(text), split_column="fold")
    assert "line 2" in said and "'0'" in said
    said = load_refusal(written(text.replace("fold", "Split")))
    assert "line 2" in said and "'0'" in said


def test_names_of_another_table_are_used_where_they_are():
    usual = {"path_column": "scan", "label_column": "dx", "split_column": "use"}
    text = "scan,dx,label\na.jpg,x,l\n"
    assert four(listed(written(text), usual)) == [("a.jpg", "x", "", "")]
    assert four(listed(written("path,class\na.jpg,x\n"), usual)) == [
        ("a.jpg", "x", "", "")
    ]
    assert listed(written(text), usual, label_column="label").labels == [("l",)]


def test_a_column_of_another_table_is_for_one_thing_too():
    usual = {"label_column": "diagnosis", "group_column": "category"}
    text = "path,category,class\na.jpg,p,x\n"
    assert four(listed(written(text), usual)) == [("a.jpg", "x", "", "p")]
    text = "path,category\na.jpg,x\n"
    with pytest.raises(UsageError) as caught:
        listed(written(text), usual)
    said = str(caught.value)
    assert "no column label, class, target or category beside 'category', the" in said
    assert "label_column=NAME" in said and "\n" not in said
    found = listed(written(text), usual, label_column="category")
    assert four(found) == [("a.jpg", "x", "", "")]
    swapped = {"path_column": "label", "label_column": "path"}
    text = "path,label\nx,a.jpg\n"
    assert four(listed(written(text), swapped)) == [("a.jpg", "x", "", "")]


def test_splits_and_weights_are_checked_where_they_are_used():
    text = "path,label,split,sample_weight\na.jpg,x,train,1\nb.jpg,y,holdout,heavy\n"
    columns = {
        "path": ["a.jpg", "b.jpg"],
        "label": ["x", "y"],
        "split": ["train", "holdout"],
    }
    for source, place in (
        (written(text), "data.csv, line 3"),
        (parquet(columns), "data.parquet, row 2"),
        (pa.table(columns), "the table, row 2"),
    ):
        table, listing = load_all(source, ("x", "y"), False)
        assert len(table) == 2 and table.sample_weight is None
        assert listing.splits == ["", ""]
        said = load_refusal(source)
        expected = ": a split is train, val or test. Received: 'holdout'."
        assert said == place + expected
    table, _ = load_all(written(text.replace("holdout", "test")), ("x", "y"), False)
    assert table.sample_weight is None


# Paths


def test_paths_are_absolute_or_relative_to_the_file(tmp_path, monkeypatch):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).write_text(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = [str(tmp_path / "a.jpg"), "../b.jpg", "~/c.jpg"]
    (tmp_path / "inner").mkdir()
    text = csv_text(("path", "label"), [(path, "x") for path in paths])
    file = tmp_path / "inner" / "data.csv"
    file.write_text(text)
    listing = listed(file)
    expected = [paths[0], "../b.jpg", str(tmp_path / "c.jpg")]
    assert listing.sources == expected
    assert [x for _, x in listing.read(expected)] == [b"a.jpg", b"b.jpg", b"c.jpg"]


def test_paths_in_memory_are_relative_to_here_and_become_absolute(tmp_path):
    Path("a.jpg").write_text("a")
    Path("b.jpg").write_text("b")
    paths = ["a.jpg", str(tmp_path / "b.jpg")]
    listing = listed(pa.table({"path": paths, "label": [1, 2]}))
    assert listing.sources == [str(tmp_path / x) for x in ("a.jpg", "b.jpg")]
    assert listing.root == Path("/")
    assert listing.labels == [("1",), ("2",)]
    os.chdir("/")  # what was listed does not depend on it
    assert [x for _, x in listing.read(listing.sources)] == [b"a", b"b"]


@pytest.mark.parametrize("url", ["https://x.org/a.jpg", "s3://b/a", "file:///a.jpg"])
def test_urls_are_not_read(url):
    said = refusal(KerasTransferError, written(f"path,label\na.jpg,x\n{url},y\n"))
    assert said.startswith("data.csv, line 3: ")
    assert url in said and "Download" in said


def test_an_image_that_is_there_twice_is_refused():
    table = pa.table({"path": ["a.jpg", "./a.jpg"], "label": ["x", "y"]})
    said = refusal(KerasTransferError, table)
    assert "row 2: " in said and "on row 1 already" in said and "into one row" in said


def test_names_that_are_not_utf8_are_kept():
    name = b"caf\xe9"
    Path("b.csv").write_bytes(b"path,label,N%b\n%b.jpg,x,%b\n" % (name, name, name))
    listing = listed(Path("b.csv"))
    assert listing.sources == [os.fsdecode(name + b".jpg")]
    assert listing.extra.to_pydict() == {r"Ncaf\xe9": [r"caf\xe9"]}
    paths = pa.array([name + b".jpg"]).view(pa.string())
    table = pa.table({"path": paths, "label": ["x"]})
    assert Path(listed(table).sources[0]).name == listing.sources[0]
    assert listed(parquet(table)).sources == listing.sources


# Weights and further columns


def test_weights_are_read_and_read_back():
    text = "path,label,sample_weight\n" + "".join(
        f"{i}.jpg,{'xy'[i % 2]},{0.1 * i}\n" for i in range(20)
    )
    file = written(text)
    listing = listed(file)
    np.testing.assert_allclose(listing.sample_weight, 0.1 * np.arange(20))
    splits = load(str(file), SplitsConfig(test=0.25))
    assert len(splits.test.sample_weight) == 5
    for source, weight in zip(
        splits.train.sources, splits.train.sample_weight, strict=True
    ):
        assert weight == np.float32(0.1 * int(source.removesuffix(".jpg")))
    again = written(splits.to_csv(), "splits.csv")
    back = load(str(again))
    assert back.to_csv() == splits.to_csv()
    np.testing.assert_array_equal(back.train.sample_weight, splits.train.sample_weight)
    table = pa.table({"path": ["1", "2"], "label": [1, 2], "Sample_Weight": [0, 2]})
    assert listed(table).sample_weight == [0.0, 2.0]
    both = table.append_column("sample_weight", [[1, 1]])
    said = refusal(UsageError, both)
    assert "2 columns could be the sample_weight" in said and "Remove or" in said


@pytest.mark.parametrize("weight", ["-1", "nan", "inf", "", "heavy", "0,5", "1e39"])
def test_a_weight_that_is_none_is_refused(weight):
    text = f'path,label,sample_weight\na.jpg,x,1\nb.jpg,y,"{weight}"\n'
    said = load_refusal(written(text))
    assert said.startswith("data.csv, line 3: a sample_weight is a number from 0")
    assert said.endswith(f"Received: {weight!r}.")


def test_some_training_image_has_a_weight():
    rows = "a,x,0,train\nb,y,0,train\nc,x,1,test\n"
    file = written(f"path,label,sample_weight,split\n{rows}")
    with pytest.raises(KerasTransferError, match="2 training images, all with 0"):
        load(str(file))


@pytest.mark.parametrize(
    ("cells", "kind", "values"),
    [
        (["1", " -2", ""], pa.int64(), [1, -2, None]),
        (["1", "2.5", ""], pa.float64(), [1.0, 2.5, None]),
        (["1e3", "nan", "5"], pa.float64(), None),
        (["1", "a", ""], pa.string(), ["1", "a", None]),
        (["007", "12", ""], pa.string(), ["007", "12", None]),
        (["0", "0.5", "-0.1"], pa.float64(), [0.0, 0.5, -0.1]),
        (["12345678901234567890", "1", "2"], pa.string(), None),
        (["", "", ""], pa.string(), [None] * 3),
        (["2020-01-01", "x", "y"], pa.string(), None),
    ],
)
def test_text_becomes_numbers_where_all_of_it_does(cells, kind, values):
    rows = [(f"{i}.jpg", "x", cell) for i, cell in enumerate(cells)]
    extra = listed(written(csv_text(("path", "label", "more"), rows))).extra
    assert extra["more"].type == kind
    if values is not None:
        assert extra["more"].to_pylist() == values


def test_further_columns_of_typed_tables_keep_their_types():
    table = pa.table(
        {
            "path": ["1", "2"],
            "label": [0, 1],
            "age": pa.array([5, None], pa.uint8()),
            "site": pa.array(["a", "b"]).dictionary_encode(),
            "seen": pa.array([1, 2], pa.timestamp("s")),
            "view": pa.array(["a", None], pa.string_view()),
        }
    )
    extra = listed(table).extra
    kinds = [table.schema.field(name).type for name in ("age", "site", "seen")]
    assert extra.schema.types == [*kinds, pa.string()]
    assert listed(parquet(table)).extra.to_pydict() == extra.to_pydict()


def test_a_column_without_a_name_is_not_kept():
    assert listed(written(",path,label\n0,a.jpg,x\n")).extra is None


def test_an_index_of_pandas_is_neither_kept_nor_told():
    frame = pd.DataFrame({"path": ["a.jpg", "b.jpg"], "label": ["x", "y"]}, [5, 7])
    frame.to_parquet("data.parquet")
    assert "__index_level_0__" in pq.read_schema("data.parquet").names
    listing = listed(Path("data.parquet"))
    assert listing.extra is None and listing.warnings == []


def test_no_images_is_worded_by_the_form_of_the_data(tmp_path):
    frame = pd.DataFrame({"path": [], "label": []})
    folder = tmp_path / "empty"
    folder.mkdir()
    for source, received, expected in (
        (written("path,label\n"), "data.csv", "a row for each image"),
        (frame, "memory:paths", "a row or a pair for each image"),
        (folder, str(folder), "class folders that hold JPEG"),
    ):
        start = f"There are no images. Received: {received}. Expected {expected}"
        assert load_refusal(source).startswith(start)
        with pytest.raises(KerasTransferError) as caught:
            load_all(source, ("x", "y"), False)
        assert str(caught.value).startswith(start)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (bytes(128) + b"DICM" + bytes(40), "an image (DICOM)"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "an image (PNG)"),
        (bytes(100), "a binary file, or text in UTF-16"),
        ("path,label\na.jpg,x\n".encode("utf-16"), "a binary file, or text in UTF-16"),
    ],
)
def test_what_is_no_text_is_told_from_a_table(content, what):
    Path("scan.dcm").write_bytes(content)
    said = refusal(UsageError, Path("scan.dcm"))
    assert said.startswith(f"This is {what}, not a table. Received: scan.dcm. ")


def test_a_column_may_begin_like_an_image():
    text = "BMI,path,label\n25,a.jpg,x\n"
    assert four(listed(written(text))) == [("a.jpg", "x", "", "")]
