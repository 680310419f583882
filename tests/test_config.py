"""Config: three layers, strict keys, one line for each mistake."""

import itertools

import pytest

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
        ({"data": "x", "splits.val": 0.6, "splits.test": 0.5}, [], ["less than 1"]),
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
