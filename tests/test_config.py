"""Config: three layers, strict keys, one line for each mistake."""

import itertools
import json

import pytest
import yaml

from keras_transfer.config import Config, load_config, to_yaml, with_finetune
from keras_transfer.errors import UsageError


def test_later_layers_win_and_only_what_is_given_counts(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("data: photos\nseed: 3\nhead:\n  kind: mlp\n  dropout: 0.1\n")
    overrides = {"seed": 5, "base": None, "head.dropout": 0.2}
    config = load_config(file, overrides, ["head.hidden=[8, 4]", "weights=none"])
    assert (config.data, config.seed, config.base) == (
        "photos",
        5,
        Config(data="").base,
    )
    assert config.head.kind == "mlp"
    assert config.head.dropout == 0.2
    assert config.head.hidden == (8, 4)
    assert config.weights == "none"


def test_saved_config_loads_to_the_same_config(tmp_path):
    config = load_config(None, {"data": "ünï", "head.l2": [0.1, 1e-4], "name": "x"})
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("overrides", "assignments", "words"),
    [
        ({"dta": "x"}, [], ["'dta'", "'data'"]),
        ({"data": "x", "head.drop_out": 1}, [], ["'head.drop_out'", "'head.dropout'"]),
        ({"data": "x"}, ["head.dropout=1.5"], ["head.dropout", "1.5"]),
        ({"data": "x"}, ["seed=-1"], ["seed", "-1"]),
        ({"data": "x"}, ["image_size=4"], ["image_size", "4"]),
        ({"data": "x"}, ["head.kind=tree"], ["head.kind", "tree", "linear"]),
        ({"data": "x"}, ["nonsense"], ["key=value", "nonsense"]),
        ({"data": "x"}, ["finetune.unfreeze=stages:0"], ["finetune.unfreeze"]),
        ({"data": "x"}, ["finetune.unfreeze=from:"], ["finetune.unfreeze"]),
        ({"data": "x"}, ["finetune.layer_decay=1.5"], ["finetune.layer_decay", "1.5"]),
        ({"data": "x"}, ["finetune.augment=off line"], ["finetune.augment"]),
        ({"data": "x"}, ["finetune.warm_up=0.2"], ["'finetune.warmup'"]),
        ({"data": "x"}, ["seed.x=1"], ["seed"]),
        ({"data": "x", "splits.test": 1.0}, [], ["splits.test", "below 1", "1.0"]),
        ({"data": "x", "splits.val": 0.2}, [], ["'splits.val'", "splits.test"]),
        ({"data": "x", "splits": {"val": 0.2}}, [], ["'splits.val'", "splits.test"]),
        ({"data": "x"}, ["splits.val=0.2"], ["'splits.val'", "splits.test"]),
        ({"data": "x"}, ["folds=1"], ["folds", "at least 2", "1"]),
        ({"data": "x"}, ["folds=2.5"], ["folds", "whole number", "2.5"]),
        ({"data": "x"}, ["metric=f1"], ["metric", "macro_f1", "'f1'"]),
        ({"data": "x"}, ["abstain_at_accuracy=1"], ["abstain_at_accuracy", "below 1"]),
        ({"data": "x"}, ["abstain_at_accuracy=0"], ["abstain_at_accuracy", "above 0"]),
        ({"data": "x"}, ["abstain_at_accuracy=95%"], ["a number", "'95%'"]),
        ({"data": "x"}, ["head.logit_adjustment=-0.1"], ["at least 0", "-0.1"]),
        ({"data": "x"}, ["head.logit_adjustment=.inf"], ["logit_adjustment", "inf"]),
        ({"data": "x"}, ["head.logit_adjustment=.nan"], ["logit_adjustment", "nan"]),
        ({"data": "x", "group_regex": "^[0-9]+_"}, [], ["group_regex", "parentheses"]),
        ({"data": "x", "group_regex": r"(?:\d+)\("}, [], ["parentheses", r"(?:\\d+)"]),
        ({"data": "x", "group_regex": "(a"}, [], ["no regular expression", "'(a'"]),
        ({"data": "x", "group_regex": r"(a)\2"}, [], ["group_regex", "reference 2"]),
        ({"data": "x", "group_regex": 5}, [], ["group_regex", "text", "5"]),
        ({"data": "x"}, ["group_regex=([)"], ["group_regex", "'([)'"]),
        ({}, [], ["No data"]),
    ],
)
def test_a_mistake_is_one_line_that_says_what_was_received(
    overrides, assignments, words
):
    if "seed.x=1" in assignments:
        overrides = {**overrides, "seed": 1}
    with pytest.raises(UsageError) as caught:
        load_config(None, overrides, assignments)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_validation_of_earlier_versions_is_dropped_from_a_file_only(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("data: photos\nsplits:\n  val: 0.1\n  test: 0.2\n  file: null\n")
    assert load_config(file) == load_config(
        None, {"data": "photos", "splits.test": 0.2}
    )
    assert "val" not in to_yaml(load_config(file))
    file.write_text("data: photos\nsplits:\n  valid: 0.1\n")
    with pytest.raises(UsageError, match=r"'splits\.valid'"):
        load_config(file)


@pytest.mark.parametrize("regex", [r"^(\d{8})_", "(?P<id>[a-z]+)", "()", "(?:x)|(y)"])
def test_an_expression_with_a_group_is_kept_in_a_file(tmp_path, regex):
    config = load_config(None, {"data": "x", "group_regex": regex})
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(config))
    assert load_config(file).group_regex == regex


def test_what_is_not_given_is_chosen_later():
    config = Config(data="x")
    assert config.splits.test == 0.15
    assert config.metric is config.folds is config.abstain_at_accuracy is None
    assert config.head.class_weight == "none"
    assert config.head.logit_adjustment == 0


@pytest.mark.parametrize(
    "metric", ["accuracy", "balanced_accuracy", "macro_f1", "log_loss", "auc"]
)
def test_how_figures_are_made_is_kept_in_a_file(tmp_path, metric):
    config = load_config(
        None,
        {"data": "x", "metric": metric, "folds": 2},
        ["abstain_at_accuracy=0.95", "head.logit_adjustment=0.5"],
    )
    assert (config.metric, config.folds) == (metric, 2)
    assert (config.abstain_at_accuracy, config.head.logit_adjustment) == (0.95, 0.5)
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(config))
    assert load_config(file) == config


NAMES = (
    "cat",
    "a.b",
    "..",
    "head.kind",
    "no",
    "1",
    "狐 fox",
    "a: b",
    "balanced",
    "=",
    "",
)


@pytest.mark.parametrize("form", ["key", "section", "file", "assignment", "config"])
def test_weights_of_classes_of_any_name_are_one_value(tmp_path, form):
    weights = {name: index / 2 for index, name in enumerate(NAMES)}
    values = {"data": "x", "head": {"class_weight": weights}}
    config = load_config(None, {"data": "x", "head.class_weight": weights})
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    found = {
        "key": lambda: config,
        "section": lambda: load_config(None, values),
        "file": lambda: load_config(file),
        "assignment": lambda: load_config(
            None, {"data": "x"}, [f"head.class_weight={json.dumps(weights)}"]
        ),
        "config": lambda: load_config(load_config(config), {"seed": 0}),
    }[form]()
    assert found.head.class_weight == weights
    assert found == config
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(file) == config
    assert with_finetune(config, {"epochs": 10}) == config


def test_weights_of_classes_are_replaced_and_not_merged(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "data: x\nhead:\n  dropout: 0.1\n  class_weight: {cat: 3, dog: 2}\n"
    )
    given = {"head": {"class_weight": {"cow": 4}}}
    for config, expected in [
        (load_config(file), {"cat": 3, "dog": 2}),
        (load_config(file, given), {"cow": 4}),
        (load_config(load_config(file), given), {"cow": 4}),
        (load_config(file, given, ["head.class_weight={cat: 2}"]), {"cat": 2}),
        (load_config(file, given, ["head.class_weight={}"]), {}),
        (load_config(file, given, ["head.class_weight=balanced"]), "balanced"),
        (load_config(file, {"head.class_weight": "none"}), "none"),
    ]:
        assert config.head.class_weight == expected
        assert config.head.dropout == 0.1
    assert given == {"head": {"class_weight": {"cow": 4}}}


@pytest.mark.parametrize(
    ("value", "received"),
    [
        ("{cat: -1}", "-1"),
        ("{cat: .nan}", "nan"),
        ("{cat: .inf}", "inf"),
        ("{cat: heavy}", "heavy"),
        ("{cat: }", "None"),
        ("{cat: [1, 2]}", "[1, 2]"),
        ("{cat: {dog: 1}}", "{'dog': 1}"),
        ('{"a\\nb\\x1b": -1}', r"a\nb\x1b"),
        ("[cat, 1]", "['cat', 1]"),
        ("even", "'even'"),
        ("2", "2"),
        ("{" + "cat: -1, " * 9_000 + "}", "-1"),
    ],
    ids=lambda value: value[:20],
)
def test_weights_that_cannot_be_are_a_mistake_of_one_line(value, received):
    with pytest.raises(UsageError) as caught:
        load_config(None, {"data": "x"}, [f"head.class_weight={value}"])
    message = str(caught.value)
    assert message.startswith("Config key 'head.class_weight'")
    assert "balanced or none" in message and "by class name" in message
    assert received in message.partition("Received: ")[2]
    assert "\n" not in message and "\x1b" not in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("name", "received"),
    [("1", "1"), ("no", "False"), ("2024-01-01", "datetime.date"), ("null", "None")],
)
def test_a_class_name_that_yaml_does_not_read_as_text_needs_quotes(
    tmp_path, name, received
):
    file = tmp_path / "c.yaml"
    file.write_text(f"data: x\nhead:\n  class_weight: {{{name}: 2}}\n")
    with pytest.raises(UsageError, match=f"Received: {received}.*quotes"):
        load_config(file)
    file.write_text(f"data: x\nhead:\n  class_weight: {{'{name}': 2}}\n")
    assert load_config(file).head.class_weight == {name: 2}


def test_a_weight_may_be_assigned_by_its_key_and_changes_no_given_mapping():
    given = {"dog": 1.0}
    overrides = {"data": "x", "head.class_weight": given}
    config = load_config(None, overrides, ["head.class_weight.cat=2"])
    assert config.head.class_weight == {"dog": 1, "cat": 2}
    assert given == {"dog": 1.0}
    overrides["head.class_weight"] = "balanced"
    with pytest.raises(UsageError, match="'class_weight' is a value, not a section"):
        load_config(None, overrides, ["head.class_weight.cat=2"])


@pytest.mark.parametrize("text", ["- a list", "a: [", "just text"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"c\.yaml"):
        load_config(file)


BOMB = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [*{last}, *{last}]\n"
    for last, name in itertools.pairwise("abcdefghijklmnopqrstuvwxyz")
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "line 2: aliases"),
        ("data: &a x\nname: *a", "line 2: aliases"),
        ("data: " + "[" * 50_000, "nested too deeply"),
        ("head: " + "{a: " * 20_000, "nested too deeply"),
        ("- " * 40_000, "nested too deeply"),
        ("seed: 1\n" * 12_501, "longer than 100,000 characters"),
        ("seed: " + "9" * 5_000, "4300 digits"),
        ("name: 2024-13-45", "month"),
        ("name: \0", "special characters"),
        ("name: !!int ''", "not valid YAML"),
        ("data: [" + "[" * 90 + "]" * 90 + "]", "'data'"),
    ],
    ids=lambda value: value[:20],
)
def test_text_that_is_hostile_to_a_parser_is_a_mistake_of_one_line(
    tmp_path, text, words
):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_config(file)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("data=[&a [x], *a]", "aliases"),
        ("data=" + "[" * 50_000, "nested too deeply"),
        ("data=" + "x" * 100_001, "longer than 100,000 characters"),
        ("data=[" + "x," * 40_000 + "]", "'data'"),
        ("data=2024-13-45", "month"),
        ("seed=" + "1:" * 10_000 + "1", "a number of"),  # of base 60
    ],
    ids=lambda value: value[:20],
)
def test_a_hostile_value_is_a_mistake_of_one_line(assignment, words):
    with pytest.raises(UsageError) as caught:
        load_config(None, {"data": "x"}, [assignment])
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert len(message) < 400


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"nope\.yaml"):
        load_config(tmp_path / "nope.yaml")


def test_options_of_fine_tuning_go_into_its_section():
    before = load_config(None, {"data": "x", "finetune.epochs": 3, "head.l2": [0.1]})
    after = with_finetune(before, {"unfreeze": "from:block_1", "augment": "2"})
    assert after.finetune.unfreeze == "from:block_1"
    assert after.finetune.augment == 2
    assert after.finetune.epochs == 3
    assert after.model_dump(exclude={"finetune"}) == before.model_dump(
        exclude={"finetune"}
    )
    assert with_finetune(before, {"augment": "online"}).finetune.augment == "online"
    with pytest.raises(UsageError, match=r"Did you mean 'finetune\.epochs'"):
        with_finetune(before, {"epoch": 3})


@pytest.mark.parametrize(
    ("values", "decay"),
    [
        ({}, 0.3),
        ({"base_lr": 1e-4}, 1.0),
        ({"layer_decay": 0.5}, 0.5),
        ({"layer_decay": 0.5, "base_lr": 1e-4}, 0.5),
    ],
)
def test_rates_fall_from_stage_to_stage_unless_one_is_given(values, decay):
    assert with_finetune(Config(data="x"), values).finetune.decay == decay
