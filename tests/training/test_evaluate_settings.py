"""Settings of the evaluation in a run: what is refused before anything starts, and what would have
no effect."""

from pathlib import Path

import pytest
import yaml
from small_runs import random_base, tree

from uno_ds.run import prepare
from uno_ds.settings import SettingsError
from uno_ds.training.held_out import at_level


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    plain = tree(tmp_path, ["scenes/t2i"], model={"base": str(random_base(tmp_path / "base"))})
    del plain["model"]["architecture"], plain["model"]["tokenizer"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


REFUSED = [
    ("evaluate.benchmarks=[dpg]", "evaluate.benchmarks: must be one of scenes; got 'dpg'."),
    ("evaluate.benchmarks=[scenes, scenes]", "evaluate.benchmarks: names one of"),
    ("evaluate.times=[0.5, 2]", "evaluate.times: must be at most 1, got 2.0."),
    ("evaluate.sources=[{path: nowhere}]", "evaluate.sources.0"),
    (
        "evaluate.sources=[{path: scenes/t2i}, {path: scenes/t2i}]",
        "evaluate.sources.1.name: 'scenes/t2i' is",
    ),
    ("samples.height=17", "samples.height: must be a multiple of"),
    (
        "evaluate.weights=average",
        "evaluate.weights: is average, but optimizer.ema is 0, so that there is none; set "
        "optimizer.ema, or evaluate.weights=trained.",
    ),
]


@pytest.mark.parametrize("assignment, message", REFUSED)
def test_a_mistake_is_found_before_the_run_starts(assignment: str, message: str, recipe: Path):
    with pytest.raises(SettingsError) as caught:
        prepare(
            str(recipe),
            ["evaluate.every=1", "evaluate.benchmarks=[scenes]", "optimizer.ema=0", assignment],
        )
    assert str(caught.value).startswith(message)


def test_settings_without_effect_are_warned_of(recipe: Path):
    idle = prepare(str(recipe), ["evaluate.every=1"])
    assert any("there is nothing to evaluate" in line for line in idle.warnings)
    off = prepare(str(recipe), ["evaluate.benchmarks=[scenes]"])
    assert any(line.startswith("evaluate.every is 0: ") for line in off.warnings)
    both = prepare(str(recipe), ["evaluate.every=1", "evaluate.benchmarks=[scenes]"])
    assert not any("evaluate" in line for line in both.warnings)


def test_held_out_samples_have_all_conditions_and_supervision_at_every_level(recipe: Path):
    changes = ["evaluate.every=1", "evaluate.sources=[{path: scenes/edit, name: held}]"]
    changes += ["sequence.drop_text=1", "sequence.drop_vit=1", "sequence.drop_latent=1"]
    changes += ["sequence.supervision_window=[0, 0.1]", "evaluate.rows=5"]
    held_out = prepare(str(recipe), changes).held_out()
    assert held_out is not None
    ours, again = (list(held_out._samples(0, held_out.sources[0], 0, 1)) for _ in range(2))
    assert len(ours) == 5
    kinds = [[segment.kind.name for segment in sample.segments] for sample in ours]
    assert all(kind == ["CLEAN", "VIT", "TEXT", "NOISED", "CAPTION", "METAQUERY"] for kind in kinds)
    noises = [[sample.segments[3].noise for sample in samples] for samples in (ours, again)]
    assert all((one == other).all() for one, other in zip(*noises))
    levels = {at_level(sample, 0.25).segments[3].timestep for sample in ours}
    assert levels == {0.25} and at_level(ours[0], 0.25).segments[3].noise is noises[0][0]
    shares = [list(held_out._samples(0, held_out.sources[0], rank, 2)) for rank in range(2)]
    assert [sample.key for sample in shares[0]] == [sample.key for sample in ours[::2]]
    assert [sample.key for sample in shares[1]] == [sample.key for sample in ours[1::2]]


def test_the_average_is_evaluated_where_there_is_one(recipe: Path):
    def uses_average(*changes: str) -> bool:
        found = prepare(str(recipe), ["evaluate.every=1", "evaluate.benchmarks=[scenes]", *changes])
        return found.recipe.evaluate.uses_average(found.recipe.optimizer.ema)

    assert uses_average("optimizer.ema=0.9")
    assert not uses_average("optimizer.ema=0")
    assert not uses_average("optimizer.ema=0.9", "evaluate.weights=trained")


def test_without_evaluation_no_held_out_source_is_opened(recipe: Path):
    run = prepare(str(recipe), ["evaluate.sources=[{path: nowhere}]"])
    assert run.held_out_sources == [] and run.held_out() is None
