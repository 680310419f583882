"""A run's own images: in the splits that the run was made with."""

from pathlib import Path

import pytest

from keras_transfer.config import Config, to_yaml
from keras_transfer.evaluation.of_run import held_out_images, run_splits
from keras_transfer.runs.run import CONFIG, LABELS, SPLITS, Run


def made(tmp_path: Path, splits: list[str]) -> Run:
    """A run of eight images per class, of which the first are in the given splits."""
    lines = ["path,label,split,group"]
    for name in ("a", "b"):
        for i in range(8):
            image = tmp_path / "data" / name / f"{i}.jpg"
            image.parent.mkdir(parents=True, exist_ok=True)
            image.touch()
            split = splits[i] if i < len(splits) else "train"
            lines.append(f"{name}/{i}.jpg,{name},{split},")
    run = tmp_path / "run"
    run.mkdir()
    (run / CONFIG).write_text(to_yaml(Config(data=str(tmp_path / "data"))))
    (run / LABELS).write_text("a\nb\n")
    (run / SPLITS).write_text("\n".join(lines))
    return Run(run)


@pytest.mark.parametrize(
    ("splits", "held_out"),
    [
        (["val", "val", "test"], "test"),
        (["val", "val", "val"], "val"),
        (["test"], "test"),
    ],
    ids=["of_0.1.0", "of_0.1.0_without_test", "today"],
)
def test_a_run_has_the_splits_that_it_was_made_with(tmp_path, splits, held_out):
    run = made(tmp_path, splits)
    (tmp_path / "data/a/new.jpg").touch()
    (tmp_path / "data/b/7.jpg").unlink()
    found = run_splits(run)
    for name, part in found.items():
        numbers = [i for i in range(8) if (splits + ["train"] * 8)[i] == name]
        expected = {f"{x}/{i}.jpg" for x in "ab" for i in numbers} - {"b/7.jpg"}
        assert {*part.sources} == expected
        assert len(part) == len(expected)
    name, part, *_ = held_out_images(run)
    assert (name, len(part)) == (held_out, 2 * splits.count(held_out))
