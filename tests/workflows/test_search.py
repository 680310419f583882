"""`kt search`: what it tries, what it looks at, and how it ends."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import RUN_FILES, Told

import keras_transfer
from keras_transfer.advice.effort import Effort
from keras_transfer.advice.evidence import Trial
from keras_transfer.advice.rules import expected_gain, weighed_gain
from keras_transfer.advice.space import Proposal, Way, proposals
from keras_transfer.advice.trial import Folded, tune_in_folds
from keras_transfer.config import FinetuneConfig, load_config
from keras_transfer.errors import UsageError
from keras_transfer.features.base import frozen_base
from keras_transfer.features.cache import FeatureCache
from keras_transfer.features.frozen_part import Storage, frozen_features
from keras_transfer.features.usable import usable_splits
from keras_transfer.runs.run import Run
from keras_transfer.workflows.inputs import prepare

BASES = ["MobileNetV3Small", "MobileNetV2"]
OPTIONS = {"weights": "none", "image_size": 48, "report": False}


def search(photos: Path, folder: Path, **options: object):
    places = {"runs_dir": folder / "runs", "cache_dir": folder / "cache"}
    usual = {"name": "found", "bases": BASES, "budget": None, "trials": 2, **OPTIONS}
    return keras_transfer.search(photos, **{**places, **usual, **options})


class Interrupting(Told):
    """Raises when a number of ways have been tried."""

    def __init__(self, after: int, error: type[BaseException]):
        super().__init__()
        self._after, self._error = after, error

    def progress(self, step: str, done: int, total: int) -> None:
        if step == "search" and done == self._after:
            raise self._error
        super().progress(step, done, total)


def ways(found) -> list[str]:
    return [str(one.way) for one in found.outcomes]


@pytest.mark.long
def test_a_search_that_died_goes_on_and_makes_a_run_in_the_best_way(photos, tmp_path):
    whole = search(photos, tmp_path)
    merits = [one.merit for one in whole.outcomes]
    assert len(merits) == 2 and merits == sorted(merits, reverse=True)
    assert whole.front and set(map(id, whole.front)) <= set(map(id, whole.outcomes))
    run, best = Run(whole.run.run_dir), whole.outcomes[0].way
    assert run.manifest.base == best.base and "test" in run.metrics["fit"]
    rows = json.loads((run.run_dir / "search.json").read_text())
    assert [row["way"] for row in rows] == ways(whole)
    assert {x.name for x in run.run_dir.iterdir()} >= RUN_FILES
    shown = whole._repr_html_()
    assert str(best) in shown and "none is both faster and better" in shown

    # Again, and it dies: with the same cache, which has only gained test images.
    seen: list[int] = []
    elsewhere = tmp_path / "again"

    class Dying(Interrupting):
        def progress(self, step: str, done: int, total: int) -> None:
            if step == "search":
                rows = FeatureCache(elsewhere / "cache").list()
                seen.append(max(row["images"] for row in rows))
            super().progress(step, done, total)

    with pytest.raises(SystemExit):
        search(photos, elsewhere, listeners=[Dying(1, SystemExit)])
    assert seen == [51]  # the training images
    left = [x.name for x in (elsewhere / "runs").iterdir()]
    assert left == ["found.search.json"]
    told = Told()
    found = search(photos, elsewhere, listeners=[told])
    tried = [note for note in told.notes if note.startswith("way ")]
    assert len(tried) == 1 and tried[0].startswith("way 2: ")
    assert ways(found) == ways(whole)
    assert [x.value for x in found.outcomes] == [x.value for x in whole.outcomes]
    assert [x.name for x in (elsewhere / "runs").iterdir()] == ["found"]


@pytest.mark.long
def test_ctrl_c_keeps_the_best_so_far(photos, tmp_path):
    # A base that cannot be built at this size is left out.
    stopping, bases = Interrupting(2, KeyboardInterrupt), ["InceptionV3", *BASES]
    options = {"bases": bases, "budget": 60, "trials": 9, "metric": "log_loss"}
    found = search(photos, tmp_path, listeners=[stopping], **options)
    assert len(found.outcomes) == 2
    assert found.outcomes[0].value < found.outcomes[1].value
    assert any("interrupted" in note for note in stopping.notes)
    assert any(note.startswith("InceptionV3 is left out") for note in stopping.notes)
    assert found.listed.metric == "log_loss" and found.listed.value
    assert Run(found.run.run_dir).metrics["fit"]


@pytest.mark.long
def test_the_best_way_is_fine_tuned_and_limits_are_those_of_now(photos, tmp_path):
    options = {"bases": ["MobileNetV3Small"]}
    with pytest.raises(SystemExit):
        search(photos, tmp_path, listeners=[Interrupting(1, SystemExit)], **options)
    path = tmp_path / "runs/found.search.json"
    content = json.loads(path.read_text())
    (alone,) = content["outcomes"]
    trial = Trial(
        "accuracy", 51, 10, before=0.2, after=0.9, low=0.6, high=0.8, seconds=1
    )
    alone["value"] = 0.98  # so that no other head is better
    way = {**alone["way"], "tuning": []}
    tuned = {**alone, "way": way, "value": 0.99, "trial": vars(trial)}
    content["outcomes"].append(tuned)
    path.write_text(json.dumps(content))

    with pytest.raises(UsageError, match="No way can be used.* ms are more than 1e-05"):
        search(photos, tmp_path, max_latency=1e-5, **options)
    found = search(photos, tmp_path, **options)
    assert found.outcomes[0].trial == trial
    run = Run(found.run.run_dir)
    assert run.manifest.phase == "finetune"
    assert "together with +0.700 in a trial" in run.manifest.finetune.reason
    assert not path.exists()


@pytest.mark.long
def test_the_command_shows_what_was_tried(kt, photos):
    options = ("--bases", "efficientnet_lite0", "--image-size", 48, "--trials", 1)
    shown = kt("search", photos, *options)
    assert shown.exit_code == 0, shown.stderr
    assert "<- none is both faster and better" in shown.stdout
    run = f"saved_models/{photos.name}-search"
    assert f"Run: {run}" in shown.stdout
    again = kt("search", photos, *options)
    assert again.exit_code == 2 and "exists already" in again.stderr
    result = kt("search", photos, *options, "--overwrite", "--json")
    found = json.loads(result.stdout)
    (outcome,) = found["outcomes"]
    assert outcome["pareto"] and outcome["options"]["base"] == "efficientnet_lite0"


@pytest.mark.long
def test_trials_use_the_options_of_fine_tuning_and_end_early(photos, tmp_path):
    options = {**OPTIONS, "base": "MobileNetV3Small", "cache_dir": tmp_path / "cache"}
    tuned = {"epochs": 1, "precision": "f32"}

    def said(calls: int = 3, **more: object) -> np.ndarray:
        config = load_config(
            None, {**options, "data": str(photos), "finetune": {**tuned, **more}}
        )
        inputs = prepare(config, makes_run=False)
        part = frozen_base(inputs.config)
        storage = Storage("f32", quality=True)
        features = frozen_features(part, inputs.splits, 0, storage, Told())
        splits = usable_splits(inputs.config, inputs.splits, features.extraction)
        seen: list[int] = []

        def is_worth_more(found: Folded) -> bool:
            seen.append(len(found.table))
            return len(seen) < calls

        found = tune_in_folds(
            inputs.config, splits, part, features, 60, Told(), is_worth_more
        )
        assert len(seen) == min(calls, 2)
        assert len(found.table) == (len(splits.train) if calls > 2 else seen[-1])
        return found.mixes[1.0]

    plain = said(calls=1)
    for more in ({"augment": 1}, {"label_smoothing": 0.2}, {"learning_rate": 0.1}):
        assert not np.allclose(plain, said(calls=1, **more), atol=1e-4), more
    assert len(said()) > len(plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "trials=0"),
        ({"budget": -1}, "budget=-1"),
        ({"base": "MobileNetV2"}, "chooses base itself.* Use bases."),
        ({"head": {"kind": "mlp"}}, "chooses head.kind itself"),
        ({"finetune": {"learning_rate": 0.1}}, "chooses finetune.learning_rate itself"),
        ({"export": True}, "Received: export=True. Export the run"),
        ({"weights": "some.h5"}, "weights=.*some.h5 for 2 bases"),
        ({"bases": []}, "needs bases"),
        ({"bases": ["efficientnet_lite0+MobileNetV2"]}, "no such base"),
        ({"max_size": 0.1}, "the smallest, MobileNetV3Small, has .* MB"),
    ],
)
def test_mistakes_are_found_before_anything_is_computed(
    photos, tmp_path, options, message
):
    with pytest.raises(UsageError, match=message):
        search(photos, tmp_path, **options)


def test_what_fine_tuning_gained_is_weighed_without_a_floor():
    bad = Trial(
        "accuracy", 400, 10, before=0.8, after=0.75, low=-0.07, high=-0.03, seconds=1
    )
    assert expected_gain(bad, (0.03, 0.04), 1200) == 0.03  # more images may gain more
    assert weighed_gain(bad, (0.03, 0.04)) < -0.03
    loss = replace(bad, metric="log_loss")
    assert loss.gain == pytest.approx(0.05)


def test_proposals_are_new_ways_from_the_best_one():
    best, usual = Way("efficientnet_lite0"), 0.03
    both = ["efficientnet_lite0", "efficientnet_lite2"]
    found = proposals(best, [best], both, usual, seed=0)
    assert best not in [one.way for one in found]
    assert {one.way.base for one in found} == {*both, "+".join(both)}
    tuned = [one for one in found if one.way.tuning is not None]
    assert tuned == [Proposal(Way("efficientnet_lite0", tuning=()), usual)]

    tried = [best, tuned[0].way]
    more = proposals(best, tried, both[:1], usual, seed=0)
    drawn = [one for one in more if one.way.tuning]
    assert len(drawn) == 1 and drawn[0].gain == usual / 2
    FinetuneConfig(**dict(drawn[0].way.tuning))  # every one is valid
    assert more == proposals(best, tried, both[:1], usual, seed=0)
    assert more != proposals(best, tried, both[:1], usual, seed=1)


def test_what_is_cached_costs_nothing_again():
    effort = Effort(images=100, others=20, tried=50, epochs=10)
    one, two = Way("efficientnet_lite0"), Way("MobileNetV2")
    alone = effort.of_trial(one)
    effort.add(one)
    assert effort.of_trial(one) < alone == Effort(100, 20, 50, 10).of_trial(one)
    joined = Way("efficientnet_lite0+MobileNetV2")
    assert effort.of_trial(joined) < alone + effort.of_trial(two)
    # Ten epochs take more than a pass, and views of their own more again.
    tuned = effort.of_trial(replace(one, tuning=()))
    assert tuned > alone
    assert effort.of_trial(replace(one, tuning=(("augment", 2),))) > tuned
    assert effort.of_run(one) < effort.of_run(replace(one, tuning=()))
