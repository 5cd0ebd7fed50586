"""Reading an experiment, what it refuses, and what it plans."""

import json
import threading
from itertools import chain
from pathlib import Path

import pytest
import yaml
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
from benchmarks.suite.gain_plan import (
    Speed,
    expected_steps,
    items_of,
    plan,
    plan_lines,
    seconds_of,
)
from benchmarks.suite.gain_results import collect
from benchmarks.suite.gain_runs import ArmRun, ChildFailed, Machine, run_child
from uno_ds.data.scene_language import captions
from uno_ds.data.scenes import content_of, place_of_content, prompts, write
from uno_ds.recipe import load_recipe
from uno_ds.recipe_file import read_tree
from uno_ds.settings import SettingsError

FLOW = ["objective.caption_weight=0", "objective.regression_weight=0"]
COMPARABLE = [
    "optimizer.schedule=constant",
    "data.sources=[{path: scenes/t2i}]",
    "data.max_samples_per_pack=4",
    "sequence.token_budget=1536",
]
SCENES = "data.scenes={rows: 24, kinds: {pair: 1, triple: 1}, held_out: 0.4}"


def plain(**changes):
    return {
        "name": "small",
        "recipe": "tiny",
        "overrides": [*COMPARABLE, SCENES],
        "arms": {"flow": FLOW, "uno": []},
        "steps": 8,
        "curve": 2,
        "curve_prompts": 4,
        "prompts": 6,
        "rows": 4,
        "times": [0.5],
    } | changes


def written(folder: Path, **changes) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(plain(**changes)))
    return path


def experiment_of(folder: Path, **changes):
    return read_experiment(str(written(folder, **changes)))


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


@pytest.mark.parametrize(
    ("flow", "other", "steps", "expected"),
    [
        # 8 steps of 1.5 cost 12 of 1.
        ([1.0] * 8, [1.5] * 8, 8, 12),
        # In doubt the baseline has more.
        ([1.0] * 8, [1.26] * 8, 8, 11),
        # The same arm: the same step, whatever the rounding of sums.
        ([0.1] * 8, [0.1] * 8, 8, 8),
        # Twice the steps of the same samples: the same step, though later packs are larger.
        ([1.0] * 8, [1.0] * 8 + [1.3] * 8, 16, 16),
        # It does not change once the baseline is trained beyond.
        ([1.0] * 8 + [9.0] * 8, [1.5] * 8, 8, 12),
        # A cheaper arm.
        ([1.0] * 8, [0.5] * 8, 8, 4),
    ],
)
def test_the_baseline_has_cost_as_much_at(tmp_path, flow, other, steps, expected):
    experiment = experiment_of(tmp_path, arms={"flow": FLOW, "other": [f"steps={steps}"]})
    runs = [ArmRun(experiment, arm, 0, tmp_path) for arm in ("flow", "other")]
    for run, flops in zip(runs, (flow, other), strict=True):
        run.folder.mkdir()
        lines = [json.dumps({"mfu": value / 1e12, "step_seconds": 1.0}) for value in flops]
        (run.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert runs[0].equal_flop_step(runs[1]) == expected


def test_the_baseline_trains_on_for_the_cost_of_the_others(tmp_path):
    experiment = experiment_of(tmp_path, arms={"flow": FLOW, "uno": [], "long": ["steps=20"]})
    speed = Speed({}, {"flow": 2.0, "uno": 2.7, "long": 2.0}, 1.0, 0.1, 1.0)
    assert expected_steps(experiment, ["uno"], speed) == 11
    assert expected_steps(experiment, ["uno", "long"], speed) == 20
    titles = [
        item.title
        for item in items_of(experiment, tmp_path, ["flow", "uno"], ["validation"], speed)
    ][:3]
    assert titles == [
        "flow-seed0 to step 8",
        "uno-seed0 to step 8",
        "flow-seed0 to step 11 (cost of uno)",
    ]


def test_seeds_count_on_from_the_first_one(tmp_path):
    experiment = experiment_of(tmp_path, seeds=2, arm_seeds={"uno": 1}, first_seed=5)
    items = items_of(experiment, tmp_path, ["uno", "flow"], ["validation"])
    names = [item.run.name for item in items]
    assert names == ["uno-seed5", "flow-seed5", "flow-seed5", "flow-seed6"]
    assert "seed=5" in items[0].run.train_command(8, Machine(1, 1))


def test_the_plan_leaves_out_what_does_not_fit_and_says_so(tmp_path):
    experiment = experiment_of(tmp_path, seeds=2)
    speed = Speed({"flow": 1.0, "uno": 2.0}, {"flow": 2.0, "uno": 3.0}, 10.0, 0.5, 4.0)
    splits = ["validation"]
    items = items_of(experiment, tmp_path, ["flow", "uno"], splits, speed)
    seconds = [seconds_of(item, speed, splits) for item in items]
    # 8 steps, two starts, 4 + 6 pictures, one last point; beyond: 4 steps more and 6 pictures.
    first = 8 * 1.0 + 2 * 10 + 10 * 0.5 + 4
    uno = 8 * 2.0 + 2 * 10 + 10 * 0.5 + 4
    beyond = 4 * 1.0 + 2 * 10 + 6 * 0.5 + 4
    assert seconds == [first, uno, beyond] * 2
    everything = plan(items, seconds, 1, None)
    assert [entry.end for entry in everything][-1] == 2 * (first + uno + beyond)
    some = plan(items, seconds, 1, first + uno + beyond + 1)
    assert [entry.end is not None for entry in some] == [True] * 3 + [False] * 3
    text = "\n".join(plan_lines(some, 1, 118.0))
    assert text.count("DOES NOT FIT") == 3 and "3 item(s) do not fit" in text


def test_the_baseline_beyond_its_steps_waits_and_holds_no_process_meanwhile(
    tmp_path,
):
    experiment = experiment_of(tmp_path, seeds=2)
    speed = Speed({"flow": 1.0, "uno": 2.0}, {"flow": 2.0, "uno": 3.0}, 10.0, 0.5, 4.0)
    items = items_of(experiment, tmp_path, ["flow", "uno"], ["validation"], speed)
    # flow, uno and the baseline beyond, of either seed.
    seconds = [30.0, 50.0, 20.0, 30.0, 50.0, 20.0]
    ends = [entry.end for entry in plan(items, seconds, 2, None)]
    assert ends == [30.0, 50.0, 70.0, 60.0, 110.0, 130.0]
    # Where the second UNO is left out, the baseline is not: its steps may be known.
    ends = [entry.end for entry in plan(items, seconds, 2, 90.0)]
    assert ends == [30.0, 50.0, 70.0, 60.0, None, 80.0]


def test_items_are_carried_out_as_they_were_planned(tmp_path, monkeypatch):
    path = written(tmp_path, seeds=2)
    experiment = read_experiment(str(path))
    controller = gain_controller.Controller(str(path), experiment, tmp_path / "runs", Machine(2, 1))
    items = items_of(experiment, tmp_path / "runs", ["flow", "uno"], ["validation"])
    titles = [f"{item.run.name}{' beyond' if item.equal_to else ''}" for item in items]
    log, both_run = [], threading.Barrier(2, timeout=60)

    def carried_out(self, item, splits, budget):
        title = titles[items.index(item)]
        log.append(("begins", title))
        # uno-seed0 goes on until the second seed's flow has begun beside it.
        if title in ("uno-seed0", "flow-seed1"):
            both_run.wait()
        log.append(("ends", title))

    monkeypatch.setattr(gain_controller.Controller, "_carry_out", carried_out)
    controller.carry_out(items, ["validation"], None)
    assert sorted(title for event, title in log if event == "ends") == sorted(titles)
    for seed in (0, 1):
        begun = log.index(("begins", f"flow-seed{seed} beyond"))
        for arm in ("flow", "uno"):
            assert log.index(("ends", f"{arm}-seed{seed}")) < begun


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
