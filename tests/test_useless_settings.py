"""Settings that would be accepted and then be fatal or without effect: refused, or warned of, in
one line."""

import dataclasses
import json
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import yaml
from small_runs import tree, write_photos

from uno_ds.commands.train import main
from uno_ds.generation.inference import CaptionSettings
from uno_ds.recipe import Recipe, load_recipe
from uno_ds.recipe_checks import warnings_of_budget, warnings_of_recipe
from uno_ds.settings import SettingsError, build


@pytest.mark.parametrize(
    "assignment, words",
    [
        ("steps=1000000000000000000", "at most 1000000000"),
        ("steps=9223372036854775808", "at most 1000000000"),
        ("seed=-1", "at least 0"),
        ("objective.flow_weight=.nan", "a finite number"),
        ("objective.flow_weight=.inf", "a finite number"),
        ("objective.flow_weight=1.0e+300", "at most 1000000.0"),
        ("objective.caption_weight=1.0e-300", "0 or at least 1e-09"),
        ("sequence.token_budget=1000000000000", "at most 100000000"),
        ("sequence.max_text_tokens=1000000000", "at most 1000000"),
        ("sequence.metaquery_grid=1000", "at most 256"),
        ("sequence.supervision_window=[1, 0]", "low <= high"),
        ("sequence.supervision_window=[0.5, 0.5]", "is empty"),
        ("sequence.supervised_fraction=0", "no sample gets a caption or metaqueries"),
        ("sequence.metaquery_grid=0", "objective.regression_weight is above 0"),
        ("sequence.timestep_shift=1.0e+30", "at most 1000.0"),
        ("data.prefetch=1000000000", "at most 1000"),
        ("data.prefetch=1e9", "must be of type int"),
        ("data.scenes.rows=1000000000000", "at most 10000000"),
        ("data.scenes.kinds.one=1.0e+308", "at most 1000000.0"),
        ("data.sources.0.weight=1.0e-300", "at least 1e-06"),
        ("data.max_samples_per_pack=1000000000", "at most 1000000"),
        ("data.latent_image.max_side=1000000000", "at most 65536"),
        ("data.latent_image.max_source_pixels=1000000000000", "at most 1000000000"),
        ("optimizer.lr=1.0e+30", "at most 1000.0"),
        ("optimizer.lr=1.0e-300", "at least 1e-12"),
        ("optimizer.betas=[0.9, 1]", "below 1"),
        ("optimizer.betas=[0.9, .nan]", "a finite number"),
        ("optimizer.eps=1.0e-300", "at least 1e-30"),
        ("optimizer.ema=1", "below 1"),
        ("optimizer.weight_decay=100000", "at most 1000.0"),
        ("engine.packs_per_step=1000000000", "at most 65536"),
        ("engine.clip=1.0e-300", "0 or at least 1e-09"),
        ("checkpoint.keep_every=1000000000000", "at most 1000000000"),
        ("health.stall_seconds=1.0e-9", "0 or at least 1"),
        ("health.stall_seconds=1.0e+300", "at most 10000000.0"),
        ("health.spike_window=9223372036854775808", "at most 10000"),
        ("health.spike_factor=0.5", "0 or greater than 1"),
        ("logging.every=1000000000000", "at most 100000"),
        ("samples.steps=1000000000", "at most 10000"),
        ("samples.shift=1.0e-300", "at least 0.001"),
        ("hardware.gpus=1000000000000", "at most 1000000"),
    ],
)
def test_a_value_that_no_run_can_use_is_refused(assignment: str, words: str):
    key = assignment.partition("=")[0]
    with pytest.raises(SettingsError) as caught:
        load_recipe("tiny", [assignment])
    assert caught.value.key.startswith(key) and words in str(caught.value)


def test_a_decay_that_overshoots_zero_is_refused():
    with pytest.raises(SettingsError, match="optimizer.weight_decay: times lr must be below 1"):
        load_recipe("tiny", ["optimizer.weight_decay=1000", "optimizer.lr=0.001"])


def test_a_temperature_that_overflows_is_refused():
    assert build(CaptionSettings, {"temperature": 0}).temperature == 0
    with pytest.raises(SettingsError, match="temperature: must be 0 or at least 0.001"):
        build(CaptionSettings, {"temperature": 1e-30})


@pytest.mark.parametrize(
    "layouts, weights, losses",
    [
        (["t2i"], {"answer": 1}, "caption, flow, regression"),
        (["edit", "t2i"], {"answer": 1}, "caption, flow, regression"),
        (["vlm"], {"flow": 1, "caption": 1, "regression": 1}, "answer"),
        (["t2i"], {"flow": 1}, None),
        (["edit"], {"caption": 1}, None),
        (["vlm", "t2i"], {"answer": 1}, None),
    ],
)
def test_a_run_whose_samples_have_no_token_of_a_weighted_loss_is_refused(
    layouts: list[str], weights: dict[str, float], losses: str | None
):
    names = ("flow", "caption", "regression", "answer")
    recipe = load_recipe(
        "tiny", [f"objective.{name}_weight={weights.get(name, 0)}" for name in names]
    )
    sources = [(layout, layout) for layout in layouts]
    if losses is None:
        recipe.check_data(sources, None)
        return
    with pytest.raises(SettingsError) as caught:
        recipe.check_data(sources, None)
    assert f"whose losses are {losses}, and all of their weights are 0" in str(caught.value)


def test_no_supervision_is_accepted_where_no_loss_asks_for_it():
    off = ["objective.caption_weight=0", "objective.regression_weight=0"]
    for assignment in (
        "sequence.supervised_fraction=0",
        "sequence.supervision_window=[0.5, 0.5]",
        "sequence.metaquery_grid=0",
    ):
        load_recipe("tiny", [*off, assignment])


@pytest.mark.parametrize(
    "assignments, key",
    [
        (["steps=20", "optimizer.warmup=20"], "optimizer.warmup"),
        (["steps=20", "health.spike_factor=3", "health.spike_window=20"], "health.spike_window"),
        (["health.spike_action=stop"], "health.spike_action"),
        (["steps=20", "health.kernel_check_every=21"], "health.kernel_check_every"),
        (["steps=20", "checkpoint.keep_every=7"], "checkpoint.keep_every"),
        (["objective.negative_form=hinge"], "objective.negative_form"),
        (["objective.balance_every=7"], "objective.balance_every"),
        (["steps=20", "checkpoint.every=3", "checkpoint.keep_every=7"], "checkpoint.keep_every"),
    ],
)
def test_a_setting_without_effect_is_warned_of(assignments: list[str], key: str):
    (warning,) = warnings_of_recipe(load_recipe("tiny", ["optimizer.warmup=0", *assignments]))
    assert warning.startswith(f"{key} is ")


@pytest.mark.parametrize(
    "assignments",
    [
        ["steps=20", "optimizer.warmup=19"],
        ["steps=20", "health.spike_factor=3", "health.spike_window=19"],
        ["steps=20", "health.kernel_check_every=20"],
        ["steps=20", "checkpoint.keep_every=10"],
        ["steps=20", "checkpoint.every=3", "checkpoint.keep_every=4"],
        ["steps=21", "checkpoint.every=3", "checkpoint.keep_every=7"],
    ],
)
def test_a_setting_with_effect_is_not_warned_of(assignments: list[str]):
    assert not warnings_of_recipe(load_recipe("tiny", ["optimizer.warmup=0", *assignments]))


def test_a_recipe_that_ships_has_no_setting_without_effect():
    for name in ("tiny", "tiny_base"):
        assert not warnings_of_recipe(load_recipe(name))


@pytest.mark.parametrize(
    "budget, most, rows, words",
    [
        (1000, 9, [("t2i", 50)], "no pack fills it"),
        (1000, 10, [("t2i", 50)], None),
        (1000, None, [("t2i", 9)], "holds some rows repeatedly"),
        (1000, None, [("t2i", 9), ("edit", 1)], None),
        (1000, None, [], None),
    ],
)
def test_a_budget_that_no_pack_fills_is_warned_of(
    budget: int, most: int | None, rows: list[tuple[str, int]], words: str | None
):
    recipe: Any = SimpleNamespace(
        sequence=SimpleNamespace(token_budget=budget),
        data=SimpleNamespace(max_samples_per_pack=most),
    )
    largest = {layout: {"t2i": 100, "edit": 100}[layout] for layout, _ in rows or [("t2i", 0)]}
    warnings = warnings_of_budget(recipe, largest, rows)
    assert len(warnings) == (words is not None)
    assert all(words in warning for warning in warnings)
    # A conversation may have any number of turns.
    assert not warnings_of_budget(recipe, largest | {"vlm": 1}, rows)


def test_a_dry_run_prints_what_has_no_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    photos = write_photos(tmp_path / "photos")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree(tmp_path, [photos["t2i"]])))
    changes = [
        "optimizer.warmup=1000",
        "data.max_samples_per_pack=1",
        "sequence.token_budget=90000",
    ]
    flags = [part for change in changes for part in ("--set", change)]
    assert main(["--recipe", str(recipe), "--dry-run", "--json", *flags]) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert [warning.split(" is ")[0] for warning in warnings] == [
        "optimizer.warmup",
        "sequence.token_budget",
    ]


def test_every_number_has_a_largest_value():
    """The sizes of a model are bounded where it is described."""

    def numbers(cls: type, path: str) -> list[tuple[str, dict]]:
        hints, found = typing.get_type_hints(cls), []
        for field in dataclasses.fields(cls):
            kinds = [hints[field.name], *typing.get_args(hints[field.name])]
            if not field.init or field.name == "architecture":
                continue
            found += [
                entry
                for kind in kinds
                if dataclasses.is_dataclass(kind)
                for entry in numbers(kind, f"{path}{field.name}.")
            ]
            if int in kinds or float in kinds:
                found.append((f"{path}{field.name}", field.metadata))
        return found

    found = numbers(Recipe, "") + numbers(CaptionSettings, "caption.")
    assert len(found) > 50
    for key, rules in found:
        upper = rules["maximum"] if rules["maximum"] is not None else rules["below"]
        assert upper is not None, key
