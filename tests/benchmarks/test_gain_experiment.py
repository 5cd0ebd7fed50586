"""Reading an experiment, and what it refuses."""

import json
from itertools import chain

import pytest
from small_experiment import COMPARABLE, FLOW, SCENES, experiment_of, plain, written
from small_runs import random_base

from benchmarks.__main__ import main
from benchmarks.suite import gain_controller, gain_runs
from benchmarks.suite.gain_controller import base_line
from benchmarks.suite.gain_experiment import (
    FOLDER,
    SPLITS,
    read_experiment,
    recipe_of,
)
from benchmarks.suite.gain_measure import Measurement
from benchmarks.suite.gain_results import collect
from benchmarks.suite.gain_runs import ArmRun, ChildFailed, Machine, run_child
from uno_ds.data.scene_language import captions
from uno_ds.data.scenes import content_of, place_of_content, prompts, write
from uno_ds.recipe import load_recipe
from uno_ds.recipe_file import read_tree
from uno_ds.settings import SettingsError


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"baseline": "flw"}, "baseline", "'flw' is no arm; arms are flow, uno."),
        ({"arms": {"flow": ["seed=3"]}}, "arms.flow", "sets seed, which the command decides"),
        ({"overrides": ["checkpoint.every=5"]}, "overrides", "sets checkpoint.every"),
        ({"curve": 3}, "steps", "is 8, which does not divide into 3 points"),
        ({"kinds": {"four": 1}}, "kinds.four", "allowed are one, count, pair, triple"),
        ({"arms": {"flow": [], "a/b": []}}, "arms.a/b", "letters, digits"),
        ({"arm_seeds": {"flw": 1}}, "arm_seeds.flw", "is no arm"),
        ({"stepz": 1}, "stepz", "unknown"),
        ({"times": []}, "times", "is empty"),
        ({"arms": {"flow": [], "base": []}}, "arms.base", "what the arms start from"),
        ({"arms": {"flow": ["steps=4"]}}, "arms.flow", "compared with the baseline after 8 steps"),
        (
            {"arms": {"flow": [], "uno": ["samples.steps=4"]}},
            "arms.uno",
            "sets samples.steps, which is the same for all arms: set it in `overrides`.",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(tmp_path, changes, key, words):
    with pytest.raises(SettingsError) as caught:
        experiment_of(tmp_path, **changes)
    assert caught.value.key == key and words in str(caught.value)


def test_a_wrong_name_is_one_line(capsys):
    assert main(["gain", "no_such_experiment"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "planted, scenes" in error[0]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.schedule=cosine", "optimizer.schedule"),
        ("data.scenes.held_out=0", "data.scenes.held_out"),
        ("optimizer.lrr=1", "optimizer.lrr"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(tmp_path, override, key):
    experiment = experiment_of(tmp_path, overrides=[*COMPARABLE, SCENES, override])
    with pytest.raises(SettingsError) as caught:
        recipe_of(experiment, "uno")
    assert caught.value.key == key


def test_an_arm_whose_supervision_ends_early_is_timed_with_supervision(tmp_path, monkeypatch):
    """At 0.04 of all steps; of the few that are timed that would be none."""
    arms = {"flow": FLOW, "early": ["objective.supervise_until=0.04"]}
    path = written(tmp_path, arms=arms, steps=200)
    controller = gain_controller.Controller(
        str(path), read_experiment(str(path)), tmp_path / "runs", Machine(1, 1)
    )
    started = []

    def run_child(words, log, machine):
        started.append([word for word in words if "=" in word])
        raise ChildFailed("stand-in", "started")

    monkeypatch.setattr(gain_controller, "run_child", run_child)
    for arm in arms:
        with pytest.raises(ChildFailed):
            controller._time(arm)
    flow, early = (load_recipe("tiny", given) for given in started)
    assert early.supervised_steps == early.steps == flow.steps == gain_runs.TIMED_STEPS
    assert early.objective.caption_weight and not flow.objective.caption_weight


def test_a_baseline_whose_supervision_ends_is_refused(tmp_path):
    arms = {"flow": ["objective.supervise_until=0.5"], "early": ["objective.supervise_until=0.5"]}
    experiment = experiment_of(tmp_path, arms=arms)
    assert recipe_of(experiment, "early").objective.supervise_until == 0.5
    with pytest.raises(SettingsError, match="arms.flow: has an objective.supervise_until of 0.5"):
        recipe_of(experiment, "flow")


def test_the_experiments_of_the_project_can_be_read_and_their_recipes_fit_together():
    names = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    assert names == ["planted", "scenes", "scenes_test", "scenes_wide"]
    experiments = {name: read_experiment(name) for name in names}
    for arm in experiments["planted"].arms:
        recipe_of(experiments["planted"], arm)
    hard, base = read_tree(experiments["scenes"].recipe), read_tree("scenes_base")
    # The base has not been trained on the contents of the prompts either.
    assert hard["data"]["scenes"]["held_out"] == base["data"]["scenes"]["held_out"] > 0
    assert hard["model"]["base"] == base["name"] and load_recipe("scenes_base").base is None
    for arm in experiments["scenes"].arms:
        found = recipe_of(experiments["scenes"], arm)
        assert found.optimizer.schedule == "constant", arm
        assert (
            found.base is not None and found.architecture == load_recipe(base["name"]).architecture
        )
    choice, verdict = experiments["scenes"], experiments["scenes_test"]
    assert verdict.recipe == choice.recipe and verdict.steps == choice.steps
    assert verdict.arms.items() <= choice.arms.items()
    for arm in verdict.arms:
        assert not set(verdict.seeds_of(arm)) & set(choice.seeds_of(arm)), arm
    wide = load_recipe(str(FOLDER / "recipes" / "scenes_base_wide.yaml"))
    assert experiments["scenes_wide"].overrides[0] == f"model.base=runs/{wide.name}/model"
    assert wide.data == load_recipe("scenes_base").data and wide.architecture.hidden == 512
    with pytest.raises(SettingsError, match="model.base: .* It is made by: .*/scenes_base_wide"):
        recipe_of(experiments["scenes_wide"], "uno")


def test_no_prompt_has_the_content_of_a_training_scene(tmp_path):
    experiment = experiment_of(tmp_path)
    recipe = recipe_of(experiment, "flow")
    scenes = recipe.data.scenes
    write(scenes, tmp_path / "drawn")
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "drawn/t2i/00000.parquet").to_pylist()
    trained = {content_of(json.loads(row["scene"])) for row in table}
    drawn, named = {}, set()
    for split in SPLITS:
        part = experiment.part(split, scenes.held_out)
        asked = prompts(experiment.drawn_from(scenes), 40, SPLITS[split][2], part)
        drawn[split] = {content_of(scene) for _, scene in asked}
        assert all(place_of_content(scene) < scenes.held_out for _, scene in asked)
        assert {scene["kind"] for _, scene in asked} == {"pair", "triple"}
        # Wordings without the relation are those of a scene the other way round too.
        for text in chain.from_iterable(captions(scene) for _, scene in asked):
            if {"left", "right", "above", "below"} & set(text.split()):
                named.add(text)
        measured = Measurement(experiment, recipe)._prompts(split, 40)
        assert measured == asked
    assert not drawn["validation"] & drawn["test"]
    assert not trained & (drawn["validation"] | drawn["test"])
    negatives = {text for row in table for text in row["negative_captions"]}
    assert negatives and not negatives & named


def test_arms_train_on_the_same_samples_and_it_is_noticed_where_they_do_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = f"data.folder={tmp_path / 'drawn'}"
    machine = Machine(1, 1)

    def check(**changes):
        given = plain(**changes)
        given["overrides"] = [*given["overrides"], data]
        experiment = experiment_of(tmp_path, **given)
        return gain_controller.Controller("x", experiment, tmp_path, machine).check_samples()

    assert check() == []
    # Without a bound on their number, the longer samples of UNO fill a pack earlier.
    with pytest.raises(SettingsError, match="arms.uno: would train on other samples") as caught:
        check(overrides=[*COMPARABLE, SCENES, "data.max_samples_per_pack=100"])
    assert "data.max_samples_per_pack" in str(caught.value)
    other = {"flow": FLOW, "other": [*FLOW, "data.scenes.seed=5"]}
    assert check(arms=other) == ["Arm other has other data than flow, by its settings."]
    elsewhere = {"flow": FLOW, "elsewhere": [f"model.base={random_base(tmp_path / 'base')}"]}
    with pytest.raises(SettingsError, match="arms.elsewhere: starts from .*, the baseline from"):
        check(arms=elsewhere)
    leaky = {"flow": FLOW, "leaky": [*FLOW, "data.scenes.held_out=0.3"]}
    with pytest.raises(SettingsError, match="arms.leaky: has another data.scenes.held_out"):
        check(arms=leaky)


def test_the_line_of_the_base_names_each_kind_of_scene_also_where_there_is_one():
    rows = [
        {"content": str(number), "kind": "pair", "right": {"all": int(number == 0)}}
        for number in range(4)
    ]
    base = {"rows": rows, "captions_right": {"latents": {"pair": 0.969}}}
    assert base_line(base) == (
        "the base draws wholly right: pair 25.0 %; reads wholly right from clean latents: pair "
        "96.9 %"
    )
    rows.append({"content": "4", "kind": "one", "right": {"all": 1}})
    assert "draws wholly right: one 100.0 %, pair 25.0 %;" in base_line(base)


def test_a_run_that_is_beyond_a_step_trains_to_it_again_from_the_checkpoint_before(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(gain_runs, "complete_checkpoints", lambda at: sorted(at.glob("step_*")))
    run = ArmRun(experiment_of(tmp_path), "flow", 0, tmp_path)

    def start(steps: int) -> tuple[str, str]:
        words = run.train_command(steps, Machine(1, 1))
        name = next(word for word in words if word.startswith("name="))
        return name, words[words.index("--resume") + 1]

    assert start(8) == ("name=flow-seed0", "auto")
    checkpoints = run.folder / "checkpoints"
    for step in (4, 8, 12):
        (checkpoints / f"step_{step}").mkdir(parents=True)
    assert start(16) == ("name=flow-seed0", "auto")
    assert start(10) == ("name=flow-seed0-to-10", str(checkpoints / "step_8"))
    assert start(2) == ("name=flow-seed0-to-2", "auto")
    assert run.checkpoint(10) is None
    (run.branch(10) / "checkpoints" / "step_9").mkdir(parents=True)
    assert start(10) == ("name=flow-seed0-to-10", "auto")
    (run.branch(10) / "checkpoints" / "step_10").mkdir()
    assert run.checkpoint(10) == run.branch(10) / "checkpoints" / "step_10"
    assert run.checkpoint(8) == checkpoints / "step_8"


def test_what_a_folder_was_trained_as_is_not_mixed_with_other_settings(tmp_path, monkeypatch):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: tiny\nname: mine\n")
    experiment = experiment_of(tmp_path, recipe="mine.yaml")
    run = ArmRun(experiment, "uno", 0, tmp_path)
    run.check()
    run.remember()
    run.remember()
    arms = {"flow": FLOW, "uno": ["optimizer.lr=0.1"]}
    changed = experiment_of(tmp_path, recipe="mine.yaml", arms=arms)
    for check in (
        ArmRun(changed, "uno", 0, tmp_path).remember,
        lambda: gain_controller.Controller("x", changed, tmp_path, Machine(1, 1)),
        lambda: collect(changed, tmp_path, "identity"),
    ):
        with pytest.raises(SettingsError, match="was trained as another arm 'uno'"):
            check()
    ArmRun(changed, "flow", 0, tmp_path).check()
    recipe.write_text("extends: tiny\nname: mine\noptimizer: {lr: 0.5}\n")
    with pytest.raises(SettingsError, match="was trained as another arm 'uno'"):
        run.check()


def test_numbers_of_another_base_are_not_mixed_with_those_of_this_one(tmp_path):
    found = []
    for seed, folder in enumerate(("first", "second")):
        base = random_base(tmp_path / folder)
        weights = base / "ema.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= seed
        weights.write_bytes(content)
        overrides = [*COMPARABLE, SCENES, f"model.base={base}"]
        experiment = experiment_of(tmp_path, overrides=overrides)
        found.append(Measurement(experiment, recipe_of(experiment, "flow")).identity())
    assert found[0] != found[1]


def test_numbers_of_other_prompts_are_not_mixed_with_those_of_these(tmp_path):
    path = tmp_path / "point.json"
    assert gain_runs.read_measured(path, "a") is None
    path.write_text(json.dumps({"identity": "a", "rows": []}))
    assert gain_runs.read_measured(path, "a") == {"identity": "a", "rows": []}
    with pytest.raises(SettingsError, match="measured with other prompts"):
        gain_runs.read_measured(path, "b")
    first, second = (
        Measurement(experiment, recipe_of(experiment, "flow")).identity()
        for experiment in (experiment_of(tmp_path), experiment_of(tmp_path, prompts=7))
    )
    assert first != second


def test_a_failing_child_is_one_line_with_its_last_words(tmp_path):
    log = tmp_path / "logs" / "child.txt"
    assert run_child(["-c", "print('fine')"], log, Machine(1, 1)) > 0
    with pytest.raises(ChildFailed) as caught:
        run_child(["-c", "print('early'); raise SystemExit('no disk left')"], log, Machine(1, 1))
    assert "ended with code 1: no disk left" in str(caught.value)
    assert "fine" in log.read_text()
