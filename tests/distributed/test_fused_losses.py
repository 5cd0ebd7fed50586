"""Fused losses and kernels under ZeRO-3: the losses and gradients of the plain ones in one process,
on one rank and on two, with batches that lack a loss, and with every weight sharded, the smallest
too. And a run with all of them together."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from ranks import Ranks
from tiny import (
    GRADIENT_ROUNDING,
    SampleList,
    assert_near,
    parameter_rounding,
    plain_adamw,
    plain_objective,
    plain_step,
    recipe,
    sharded_config,
)

from uno_ds.kernels.cross_entropy import chunked
from uno_ds.recipe import Recipe
from uno_ds.sequence.batch import PackedBatch
from uno_ds.training.engine import Engine

STEPS, PACKS, LR, CLIP = 2, 2, 1e-2, 0.4
PLAIN = {
    "attention": "sdpa",
    "regression": "reference",
    "norm_rope": "reference",
    "cross_entropy": "reference",
    "pointwise": "reference",
    "experts": "separate",
}
has_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
has_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel"
)
# (ranks, what trains, kernels that are not the plain ones)
CASES = [
    (2, "generation", {"cross_entropy": "chunked"}),
    (2, "all", {"cross_entropy": "chunked"}),
    (2, "generation", {"experts": "grouped"}),
    (2, "all", {"experts": "grouped"}),
    pytest.param(2, "generation", {"regression": "triton"}, marks=has_triton),
    pytest.param(
        1,
        "generation",
        {"regression": "triton", "norm_rope": "triton", "cross_entropy": "chunked"},
        marks=has_triton,
    ),
    pytest.param(
        2,
        "all",
        {"regression": "triton", "norm_rope": "triton", "cross_entropy": "chunked"},
        marks=has_triton,
    ),
    pytest.param(2, "generation", {"cross_entropy": "liger"}, marks=has_liger),
    pytest.param(2, "all", {"cross_entropy": "liger"}, marks=has_liger),
]


def settings_of(config: str, train: str, kernels: dict[str, str]) -> Recipe:
    # See test_parity for eps.
    return recipe(
        optimizer={"lr": LR, "eps": 1e-3, "weight_decay": 0.1, "ema": 0},
        kernels=PLAIN | kernels,
        model={"train": train},
        engine={"deepspeed": config, "packs_per_step": PACKS, "clip": CLIP},
    )


def make_packs(settings: Recipe) -> list[PackedBatch]:
    """Two packs; the second has neither captions nor metaqueries."""
    make = SampleList(settings)
    return [
        make.collate([make.text_to_image(0), make.edit(1), make.conversation(2)]),
        make.collate(
            [
                make.text_to_image(3, caption=False, metaqueries=False),
                make.conversation(4, answer=False),
            ]
        ),
    ]


def train_on_ranks(config: str, train: str, kernels: dict[str, str]) -> dict[str, Any]:
    """Runs on every rank."""
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    settings = settings_of(config, train, kernels)
    # 64 rows of logits at a time, so that there are several chunks.
    chunked.LOGITS_BYTES = 16 * 4 * settings.architecture.vocabulary
    engine = Engine(settings, torch.device("cpu"), read_answers=True)
    packs = make_packs(settings)[rank::world_size]
    losses = []
    for _ in range(STEPS):
        result = engine.train_step(packs, LR)
        losses.append(
            torch.cat([result.loss[None], result.losses, result.grad_norm[None].double()])
        )
    parameters = {
        name: safe_get_full_fp32_param(parameter).clone()
        for name, parameter in engine.named_parameters()
        if parameter.requires_grad
    }
    engine.engine.destroy()
    return {"losses": torch.stack(losses), "parameters": parameters}


@pytest.fixture(scope="module")
def plain() -> Callable[[str], tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The same steps with plain kernels in plain torch, one process."""
    made: dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]] = {}

    def of(train: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if train not in made:
            settings = settings_of("zero0", train, {})
            objective = plain_objective(settings)
            optimizer, losses = plain_adamw(settings, objective), []
            for _ in range(STEPS):
                loss, norm = plain_step(objective, optimizer, make_packs(settings), CLIP)
                losses.append(torch.cat([loss, norm[None].double()]))
            made[train] = (
                torch.stack(losses),
                {
                    name: value.detach()
                    for name, value in objective.named_parameters()
                    if value.requires_grad
                },
            )
        return made[train]

    return of


@pytest.mark.parametrize(("size", "train", "kernels"), CASES)
def test_fused_losses_train_like_plain_ones(
    ranks: Callable[[int], Ranks],
    plain: Callable,
    tmp_path: Path,
    size: int,
    train: str,
    kernels: dict[str, str],
):
    config = Path(sharded_config("zero3", tmp_path))
    content = json.loads(config.read_text())
    # Even the weights of QK-norm are taken away after the forward of their module.
    content["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    config.write_text(json.dumps(content))
    answers = ranks(size).call(train_on_ranks, config=str(config), train=train, kernels=kernels)
    losses, parameters = plain(train)
    for answer in answers:
        assert_near(answer["losses"], losses, GRADIENT_ROUNDING, "losses and gradient norms")
        assert answer["parameters"].keys() == parameters.keys()
        for name, parameter in parameters.items():
            error = (answer["parameters"][name] - parameter).abs().max()
            assert error <= parameter_rounding(STEPS, LR), (
                f"{name} is off by {error:.1e} after {STEPS} steps"
            )


# Heads of 16 values, which the triton attention takes.
WIDE_HEADS = {"heads": 2, "kv_heads": 1, "vit_hidden": 32, "vit_heads": 2}
FUSED = {
    "attention": "triton",
    "regression": "triton",
    "norm_rope": "triton",
    "cross_entropy": "chunked",
}


def curve(kernels: dict[str, str], steps: int) -> torch.Tensor:
    """[steps, 6]: total, the four losses and the norm of the gradient of a run in this process."""
    settings = recipe(
        optimizer={"lr": LR, "eps": 1e-3, "ema": 0},
        kernels=PLAIN | kernels,
        model={"architecture": WIDE_HEADS, "recompute": True},
        engine={"clip": CLIP},
    )
    objective, make, rows = plain_objective(settings), SampleList(settings), []
    optimizer = plain_adamw(settings, objective)
    for step in range(steps):
        batch = make.collate([make.text_to_image(2 * step), make.conversation(2 * step + 1)])
        loss, norm = plain_step(objective, optimizer, [batch], CLIP)
        rows.append(torch.cat([loss, norm[None].double()]))
    return torch.stack(rows)


@pytest.mark.slow
@has_triton
@pytest.mark.parametrize("steps", [3, 20])
def test_a_run_with_every_fused_kernel_has_the_curve_of_a_run_with_references(
    steps: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chunked, "LOGITS_BYTES", 4 * 4 * 512)
    plain = curve({"attention": "reference"}, steps)
    assert plain[0, 0] != plain[-1, 0]
    assert_near(curve(FUSED, steps), plain, GRADIENT_ROUNDING, "losses and gradient norms")
