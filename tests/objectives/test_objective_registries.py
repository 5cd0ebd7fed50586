"""Regression targets, tasks of recorded sampling, codecs and renormalisations: one that is added to
its table alone is handled everywhere, and an unknown one raises."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import random_base
from tiny_objective import (
    collate,
    loss_counts,
    make_composer,
    mixed_pack,
    tiny_objective,
    tiny_shape,
)

from uno_ds.cost.memory import Sharding, memory
from uno_ds.cost.parameters import parameters_of
from uno_ds.cost.scenario import Scenario
from uno_ds.cost.step_flops import codec_flops
from uno_ds.cost.utilisation import plan_of
from uno_ds.generation.sampler import RENORMALISATIONS, SamplerSettings, guide
from uno_ds.kernels.selection import KernelSettings
from uno_ds.model.architecture import CODEC_NAMES
from uno_ds.model.codec import CODECS, PixelCodec, build_codec, check_codec, get_codec
from uno_ds.model.weights import missing_files
from uno_ds.objectives.golden import load_case
from uno_ds.objectives.preparation import TargetEncoder
from uno_ds.objectives.regression_target import REGRESSION_TARGETS, RegressionTarget
from uno_ds.objectives.sampling_case import load_sampling_case
from uno_ds.objectives.sampling_replay import replay
from uno_ds.objectives.sampling_task import TASKS, PictureTask
from uno_ds.objectives.uno import ObjectiveSettings, UnoObjective
from uno_ds.recipe import load_recipe
from uno_ds.settings import SettingsError, build


def with_target(recipe, name: str):
    objective = dataclasses.replace(recipe.objective, regression_target=name)
    return dataclasses.replace(recipe, objective=objective)


def regression_loss(target: str) -> float:
    """Mean cosine loss of a fixed pack. The head, where there is one, is fixed too."""
    objective = tiny_objective()
    settings = dataclasses.replace(objective.settings, regression_target=target)
    kernels = KernelSettings().resolved()
    changed = UnoObjective(objective.model, objective.codec, settings, kernels, 4).double()
    changed.load_state_dict(objective.state_dict(), strict=False)
    batch = collate(mixed_pack(0, make_composer()))
    _, losses = changed(batch, loss_counts(batch))
    return float(losses[2])


@pytest.mark.parametrize("like", ["vit", "connector"])
def test_a_regression_target_that_is_added_to_the_registry_alone_is_handled_everywhere(
    like, monkeypatch
):
    """The opposite of a known target: the cosine changes its sign."""
    known = REGRESSION_TARGETS[like]
    opposite = dataclasses.replace(known, features=lambda *given: -known.features(*given))
    monkeypatch.setitem(REGRESSION_TARGETS, "opposite", opposite)
    loss = regression_loss(like)
    assert loss != pytest.approx(1, abs=1e-4)
    assert regression_loss("opposite") == pytest.approx(2 - loss, rel=1e-9)

    recipe = load_recipe("tiny")
    assert plan_of(with_target(recipe, "opposite"), False) == plan_of(
        with_target(recipe, like), False
    )
    assert plan_of(with_target(recipe, "vit"), False) != plan_of(
        with_target(recipe, "connector"), False
    )
    shape = tiny_shape()
    batch = collate(mixed_pack(0, make_composer()))
    features = []
    for name in (like, "opposite"):
        encoder = TargetEncoder(shape, name).to_empty(device="cpu").double()
        for number, parameter in enumerate(encoder.parameters()):
            torch.nn.init.normal_(
                parameter, std=0.1, generator=torch.Generator().manual_seed(number)
            )
        features.append(encoder(batch.vision))
    assert torch.equal(features[0], -features[1]) and features[0].any()


def test_a_name_that_is_no_regression_target_raises_in_every_place_that_takes_one():
    recipe = with_target(load_recipe("tiny"), "nobody")
    places = [
        lambda: regression_loss("nobody"),
        lambda: TargetEncoder(tiny_shape(), "nobody"),
        lambda: plan_of(recipe, False),
    ]
    for place in places:
        with pytest.raises(
            ValueError, match="Unknown regression target 'nobody'; allowed are vit, connector"
        ):
            place()
    with pytest.raises(
        SettingsError, match="regression_target: .*vit, connector, .*; got .*nobody"
    ):
        build(ObjectiveSettings, {"regression_target": "nobody"})
    with pytest.raises(TypeError, match="head_width"):
        RegressionTarget(lambda *given: given[0], uses_connector=False)


def recorded_case(folder: Path, task: str) -> Path:
    """One run of a recorded case, under another name of its task."""
    goldens = Path(__file__).parents[1] / "goldens" / "sampling"
    description = json.loads((goldens / "t2i.json").read_text())
    description |= {"task": task, "model": str(goldens / "base"), "runs": description["runs"][:1]}
    path = folder / "case.json"
    path.write_text(json.dumps(description))
    save_file(load_file(goldens / "t2i.safetensors"), folder / "case.safetensors")
    return path


def test_a_task_of_recorded_sampling_that_is_added_to_the_table_alone_is_replayed(
    tmp_path, monkeypatch
):
    drawn = []

    def draw(opened, sources, texts, settings, size, noise_BGC, observe):
        drawn.append((len(sources), texts))
        known.draw(opened, sources, texts, settings, size, noise_BGC, observe)

    known = TASKS["text_to_image"]
    assert isinstance(known, PictureTask)
    expected = list(replay(recorded_case(tmp_path, "text_to_image"), "sdpa", 1e-4))
    monkeypatch.setitem(TASKS, "sketch", dataclasses.replace(known, draw=draw))
    assert list(replay(recorded_case(tmp_path, "sketch"), "sdpa", 1e-4)) == expected
    assert drawn and all(sources == 0 and texts for sources, texts in drawn)


def test_a_name_that_is_no_task_of_recorded_sampling_raises_and_so_does_a_task_of_no_kind(
    tmp_path, monkeypatch
):
    path = recorded_case(tmp_path, "video")
    with pytest.raises(SettingsError, match="one of text_to_image, edit, caption; got 'video'"):
        load_sampling_case(path)
    monkeypatch.setitem(TASKS, "video", SimpleNamespace(has_sources=False))
    with pytest.raises(AssertionError, match="unreachable"):
        load_sampling_case(path)


def test_a_recorded_training_case_with_an_unknown_kind_of_item_is_refused(tmp_path):
    goldens = Path(__file__).parents[1] / "goldens"
    name = "flow_and_vlm"
    text = (goldens / f"{name}.json").read_text().replace("vae_image", "audio")
    (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / f"{name}.safetensors").symlink_to(goldens / f"{name}.safetensors")
    with pytest.raises(SettingsError, match="must be text, vit_image or vae_image; got 'audio'"):
        load_case(tmp_path / f"{name}.json")


def bytes_of(recipe, codec: str) -> tuple[int, int]:
    """(weights, activations) of a codec, as the memory model estimates them for an empty pack."""
    shape = dataclasses.replace(recipe.architecture, codec=codec)
    needed = memory(
        parameters_of(recipe),
        shape,
        Sharding.of(recipe, 1, "fp32"),
        Scenario(prompt=0, latents=0, caption=0, metaqueries=0, samples=1),
        recompute=False,
        average=False,
        image_pixels=10**6,
        codec_bytes=4,
        attention="sdpa",
    )
    return needed.resident["codec"], needed.working.get("codec", 0)


def test_a_codec_that_is_added_to_the_registry_alone_is_handled_everywhere(tmp_path, monkeypatch):
    added = dataclasses.replace(
        CODECS["pixel"], weights_file="blocks.safetensors", parameters=7, values_per_pixel=3
    )
    encoder = torch.nn.Conv2d(3, 1, 1, device="meta")
    added = dataclasses.replace(added, empty_encoder=lambda: encoder)
    monkeypatch.setitem(CODECS, "blocks", added)
    recipe = load_recipe("tiny")
    shape = dataclasses.replace(recipe.architecture, codec="blocks")
    check_codec(shape, None)
    assert isinstance(build_codec(shape), PixelCodec)
    assert bytes_of(recipe, "blocks") == (7 * 4, 3 * 10**6 * 4)
    assert bytes_of(recipe, "pixel") == (0, 0)
    assert codec_flops("blocks", 8, 4) == 2 * 3 * 8 * 4
    base = random_base(tmp_path / "base")
    assert missing_files(base) == []
    config = json.loads((base / "config.json").read_text())
    config["vae_config"]["codec"] = "blocks"
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingsError, match=r"\.codec: must be flux, pixel; got blocks"):
        missing_files(base)
    monkeypatch.setattr("uno_ds.model.architecture.CODEC_NAMES", (*CODEC_NAMES, "blocks"))
    assert missing_files(base) == ["blocks.safetensors"]


def test_a_name_that_is_no_codec_raises_in_every_place_that_takes_one():
    assert set(CODEC_NAMES) == set(CODECS)
    recipe = load_recipe("tiny")
    shape = dataclasses.replace(recipe.architecture, codec="nobody")
    places = [
        lambda: get_codec("nobody"),
        lambda: build_codec(shape),
        lambda: check_codec(shape, None),
        lambda: codec_flops("nobody", 8, 8),
        lambda: bytes_of(recipe, "nobody"),
    ]
    for place in places:
        with pytest.raises(ValueError, match="Unknown codec 'nobody'; allowed are flux, pixel"):
            place()


def test_every_renormalisation_of_guidance_has_a_formula_and_an_unknown_one_raises():
    velocities = {name: torch.randn(1, 3, 4) for name in ("full", "without_text")}
    for name in RENORMALISATIONS:
        assert guide(velocities, SamplerSettings(renormalise=name)).shape == (1, 3, 4)
    with pytest.raises(ValueError, match="Unknown renormalisation 'nobody'; allowed are global"):
        guide(velocities, SamplerSettings(renormalise="nobody"))
