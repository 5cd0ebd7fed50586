"""Adapters are on the modules that their targets name, start as the base, and get the gradient of W
+ s B A."""

import importlib.util
import math
from typing import Any

import numpy as np
import pytest
import torch
from dense import uno_loss
from tiny_objective import (
    collate,
    edit,
    loss_counts,
    make_composer,
    mixed_pack,
    tiny_objective,
    tiny_shape,
)

from uno_ds.model.adapters import LoraSettings, adapted_modules, count_adapters, target_modules
from uno_ds.objectives.uno import UnoObjective
from uno_ds.recipe import load_recipe
from uno_ds.recipe_checks import warnings_of_recipe
from uno_ds.settings import SettingsError, build
from uno_ds.training.adapter_start import seed_dropout

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = 3
WEIGHTS = dict(flow_weight=0.7, caption_weight=0.4, regression_weight=0.9, answer_weight=0.3)


def adapted(random: bool = True, recompute: bool = False, **lora: Any) -> UnoObjective:
    """The tiny objective with adapters; `random`: none of them at zero."""
    objective = tiny_objective(recompute=recompute, **WEIGHTS)
    settings = build(LoraSettings, {"rank": 3, "alpha": 5} | lora)
    objective.choose_trainable("lora", settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in objective.named_parameters():
        if ".lora_" in name:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = 0.2 * values if random or ".lora_A." in name else 0 * values
    return objective


def gradients(objective: UnoObjective, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    objective.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad for name, parameter in objective.named_parameters()}


@pytest.mark.parametrize("stop", [True, False], ids=["stop", "flow"])
@pytest.mark.parametrize("lora", [{}, {"rslora": True}, {"targets": "attention"}], ids=str)
def test_gradients_of_adapters_are_those_of_the_dense_reference_and_nothing_frozen_has_one(
    lora: dict[str, Any], stop: bool
):
    objective = adapted(**lora)
    samples = mixed_pack(0, make_composer())
    counts = loss_counts(collate(samples)) + torch.tensor([3.0, 5.0, 2.0, 7.0])
    expected_total, expected_losses = uno_loss(objective, samples, counts, stop)
    expected = gradients(objective, expected_total)
    total, losses = objective(collate(samples, stop), counts)
    torch.testing.assert_close(total, expected_total.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(losses, expected_losses.detach(), rtol=1e-9, atol=1e-12)
    # In the last layer the keys of latents reach the supervision; its other projections feed the
    # velocity only.
    found = gradients(objective, total)
    assert found.keys() == expected.keys()
    trained = 0
    for name, gradient in found.items():
        if not dict(objective.named_parameters())[name].requires_grad:
            assert gradient is None, f"{name} is frozen and has a gradient"
            continue
        assert gradient.abs().max() > 1e-9, f"{name} gets no gradient"
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-11, msg=name)
        trained += ".lora_" in name
    modules = 4 if lora.get("targets") == "attention" else 7
    assert trained == 2 * modules * LAYERS


def test_new_adapters_leave_every_loss_as_it_is_bit_for_bit():
    samples = [edit(np.random.default_rng(0), make_composer()), *mixed_pack(1, make_composer())]
    batch, counts = collate(samples), torch.ones(4)
    total, losses = tiny_objective(**WEIGHTS)(batch, counts)
    for lora in ({}, {"rslora": True, "targets": "attention"}):
        ours, our_losses = adapted(random=False, **lora)(batch, counts)
        assert torch.equal(ours, total) and torch.equal(our_losses, losses)
    moved, _ = adapted(random=True)(batch, counts)
    assert not torch.equal(moved, total), "adapters that are not zero change nothing"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attention+mlp", [(n, p) for n in range(LAYERS) for p in PROJECTIONS]),
        ("attention", [(n, p) for n in range(LAYERS) for p in PROJECTIONS[:4]]),
        (["q_proj_moe_gen", r"layers\.1\.mlp_moe_gen"], None),
    ],
)
def test_the_modules_that_the_targets_name_get_an_adapter_and_no_other(
    targets: Any, expected: list[tuple[int, str]] | None
):
    if expected is None:
        expected = [(0, "q_proj")]
        expected += [(1, name) for name in ("q_proj", "gate_proj", "up_proj", "down_proj")]
        expected += [(2, "q_proj")]
    names = [f"layers.{number}.gen.{projection}" for number, projection in expected]
    objective = adapted(targets=targets)
    assert adapted_modules(objective.model) == names
    counted = count_adapters(objective.model, LoraSettings(rank=3, alpha=5.0))
    assert counted["modules"] == len(names) == sum(counted["by_projection"].values())
    assert counted["scaling"] == 5 / 3


def test_what_trains_beside_the_adapters_is_what_also_train_names():
    def trained(**lora: Any) -> set[str]:
        return {
            name.split(".")[0] if not name.startswith("model.") else name.split(".")[1]
            for name, parameter in adapted(**lora).named_parameters()
            if parameter.requires_grad
        }

    interface = {"vae2llm", "llm2vae", "time_embedder"}
    assert trained(also_train=[]) == {"layers"}
    assert trained(also_train=["interface"]) == {"layers", *interface}
    assert trained(also_train=["metaqueries"]) == {"layers", "metaqueries", "regression"}
    assert trained() == {"layers", "metaqueries", "regression", *interface}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "rank: must be at least 1, got 0."),
        ({"alpha": 0}, "alpha: must be greater than 0, got 0.0."),
        ({"dropout": 1}, "dropout: must be below 1, got 1.0."),
        ({"targets": []}, "targets: is empty, so that no module would get an adapter."),
        ({"targets": "mlp"}, "targets: must be attention+mlp, attention or a list of regular"),
        ({"targets": ["("]}, "targets: '(' is no regular expression: missing )"),
        ({"also_train": ["norms"]}, "also_train: must be one of interface, metaqueries; got"),
    ],
)
def test_a_setting_that_makes_no_adapter_is_refused_in_one_line(given: dict, message: str):
    with pytest.raises(SettingsError) as raised:
        build(LoraSettings, given)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("q_prj", "lora.targets: 'q_prj' matches no module; those that may get an adapter are"),
        (
            r"self_attn\.q_proj$",
            "lora.targets: 'self_attn\\.q_proj$' names only modules that get no adapter, such as "
            "vit_model.vision_model.encoder.layers.0.self_attn.q_proj: adapters go on",
        ),
        ("lm_head", "lora.targets: 'lm_head' names only modules that get no adapter, such as"),
    ],
)
def test_a_pattern_that_names_no_projection_of_the_generation_expert_is_refused(
    pattern: str, message: str
):
    settings = build(LoraSettings, {"targets": ["q_proj_moe_gen", pattern]})
    with pytest.raises(SettingsError) as raised:
        target_modules(settings, tiny_shape(LAYERS))
    assert str(raised.value).startswith(message)


def test_without_the_library_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError) as raised:
        adapted()
    assert str(raised.value) == (
        "model.train: lora needs the package peft, which is not installed: "
        "pip install 'uno_ds[lora]'."
    )


def test_scaling_is_alpha_over_rank_or_over_its_root():
    assert LoraSettings(rank=16, alpha=8.0).scaling == 0.5
    assert LoraSettings(rank=16, alpha=8.0, rslora=True).scaling == 2.0
    assert LoraSettings(rank=3, alpha=5.0, rslora=True).scaling == 5 / math.sqrt(3)


def test_what_dropout_drops_depends_on_seed_step_and_rank_alone():
    objective = adapted(dropout=0.5)
    objective.train()
    batch, counts = collate(mixed_pack(0, make_composer())), torch.ones(4)
    recipe = load_recipe("tiny", ["model.train=lora", "lora.dropout=0.5"])

    def loss(step: int, rank: int) -> torch.Tensor:
        seed_dropout(recipe, step, rank)
        return objective(batch, counts)[0].detach()

    first = loss(3, 0)
    torch.rand(7)
    assert torch.equal(loss(3, 0), first)
    assert not torch.equal(loss(4, 0), first) and not torch.equal(loss(3, 1), first)


LORA = "model.train=lora"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([LORA, "lora.rank=0"], "lora.rank: must be at least 1, got 0."),
        ([LORA, "lora.alpha=0"], "lora.alpha: must be greater than 0, got 0"),
        ([LORA, "lora.targets=[q_prj]"], "lora.targets: 'q_prj' matches no module"),
        ([LORA, "lora.targets=[lm_head]"], "lora.targets: 'lm_head' names only modules that get"),
        (
            [LORA, "lora.also_train=[interface]"],
            "lora.also_train: lacks metaqueries, but objective.regression_weight is above 0",
        ),
        (
            [
                LORA,
                "lora.dora=true",
                "engine.deepspeed=zero2",
                "model.frozen_precision=int8",
            ],
            "lora.dora: does not go with model.frozen_precision = int8",
        ),
        (["model.adapter=x"], "model.adapter: needs model.train = lora, and it is generation;"),
        (
            [LORA, "model.adapter=/nowhere"],
            "model.adapter: /nowhere/adapter_config.json cannot be read: No such file",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_recipe_whose_adapters_cannot_train_is_refused_in_one_line(
    changes: list[str], message: str
):
    with pytest.raises(SettingsError) as raised:
        load_recipe("tiny", changes)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_settings_of_adapters_without_adapters_are_warned_of():
    with_settings = load_recipe("tiny", ["lora.rank=8"])
    assert [line for line in warnings_of_recipe(with_settings) if line.startswith("lora is set")]
    for changes in ([], [LORA, "lora.rank=8"]):
        assert not [
            line
            for line in warnings_of_recipe(load_recipe("tiny", changes))
            if line.startswith("lora is set")
        ]
