"""DoRA under every stage: what ranks compute is what a dense fp64 model computes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from ranks import Ranks
from tiny import (
    GRADIENT_ROUNDING,
    LOSS_ROUNDING,
    SampleList,
    assert_near,
    counts_of,
    full_parameters,
    plain_objective,
    recipe,
    sharded_config,
)
from torch import nn

from uno_ds.model.adapters import adapted_modules
from uno_ds.objectives.uno import UnoObjective
from uno_ds.recipe import Recipe
from uno_ds.sequence.batch import PackedBatch
from uno_ds.training.engine import Engine

PACKS, STEPS, LR, BETA = 2, 3, 3e-2, 0.9


def settings_of(config: str, dropout: float = 0.0, recompute: bool = False) -> Recipe:
    return recipe(
        model={"train": "lora", "recompute": recompute},
        lora={"rank": 4, "alpha": 6.0, "dora": True, "dropout": dropout},
        engine={"deepspeed": config, "packs_per_step": PACKS, "clip": 1e6},
        optimizer={"lr": LR, "eps": 1e-8, "ema": 0, "betas": [BETA, 0.95]},
    )


def packs_of(settings: Recipe) -> list[PackedBatch]:
    make = SampleList(settings)
    return [
        make.collate([make.text_to_image(number), make.edit(number + 10)])
        for number in range(PACKS)
    ]


def step_on_ranks(config: str, recompute: bool) -> dict[str, Any]:
    """Runs on every rank: the weights before the last of STEPS steps, and that step's losses and
    gradients, found from the first moments."""
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    settings = settings_of(config, recompute=recompute)
    engine = Engine(settings, torch.device("cpu"), read_answers=True)
    packs = packs_of(settings)[rank::world_size]
    start = dict(full_parameters(engine))
    for _ in range(STEPS - 1):
        assert not engine.train_step(packs, LR).skipped
    before = moments(engine)
    weights = dict(full_parameters(engine))
    result = engine.train_step(packs, LR)
    after = moments(engine)
    engine.engine.destroy()
    return {
        "start": start,
        "weights": weights,
        "losses": torch.cat([result.loss[None], result.losses]),
        "gradients": {
            name: (moment.double() - BETA * before[name].double()) / (1 - BETA)
            for name, moment in after.items()
        },
    }


def moments(engine: Engine) -> dict[str, torch.Tensor]:
    """First moments of all that trains. Collective."""
    return {
        name: safe_get_full_optimizer_state(parameter, "exp_avg").clone()
        for name, parameter in engine.named_parameters()
        if parameter.requires_grad
    }


def dense(objective: UnoObjective, scaling: float) -> UnoObjective:
    """Each adapted projection by the formula of its whole weight: magnitude / norm as a constant,
    times W + s B A."""

    def forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        base = module.base_layer
        moved = base.weight + scaling * (
            module.lora_B["default"].weight @ module.lora_A["default"].weight
        )
        norm = moved.detach().square().sum(1).sqrt()
        magnitude = module.lora_magnitude_vector["default"].weight
        return nn.functional.linear(x, (magnitude / norm)[:, None] * moved, base.bias)

    for name in adapted_modules(objective.model):
        module = objective.model.get_submodule(name)
        module.forward = partial(forward, module)
    return objective


CASES = [
    (1, "zero3", False),
    (2, "zero3", False),
    (2, "zero3", True),
    (2, "zero2", False),
    pytest.param(2, "zero3_offload", False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("size", "config", "recompute"), CASES)
def test_losses_and_gradients_of_dora_are_those_of_the_dense_reference(
    ranks: Callable[[int], Ranks], tmp_path: Path, size: int, config: str, recompute: bool
):
    path = sharded_config(config, tmp_path)
    answers = ranks(size).call(step_on_ranks, config=path, recompute=recompute)
    settings = settings_of(path)
    objective = dense(plain_objective(settings), settings.lora.scaling).double()
    packs, moved = packs_of(settings), 0
    for answer in answers:
        start, weights = answer["start"], answer["weights"]
        for name, parameter in objective.named_parameters():
            parameter.data = weights[name].double()
            if ".lora_magnitude_vector." in name:
                base = name.replace("lora_magnitude_vector.default", "base_layer")
                torch.testing.assert_close(start[name], start[base].norm(dim=1))
                moved += int(not torch.equal(start[name], weights[name]))
        objective.zero_grad()
        losses = torch.zeros(5, dtype=torch.float64)
        for pack in packs:
            total, parts = objective(pack, counts_of(packs))
            total.backward()
            losses += torch.cat([total.detach()[None], parts]).double()
        assert_near(answer["losses"].double(), losses, LOSS_ROUNDING, "losses")
        for name, parameter in objective.named_parameters():
            if not parameter.requires_grad:
                assert name not in answer["gradients"]
                continue
            ours, theirs = answer["gradients"][name], parameter.grad
            # A difference of moments loses what STEPS of them round.
            largest = theirs.abs().max()
            error = (ours - theirs).abs().max()
            assert largest > 1e-6, f"{name} gets no gradient"
            assert error <= 1e-7 + STEPS * GRADIENT_ROUNDING * largest / (1 - BETA), (
                f"gradient of {name} is off by {error:.1e} of {largest:.1e}"
            )
    assert moved == size * len(adapted_modules(objective.model))


def test_dropout_changes_what_dora_reads_and_every_rank_takes_the_step(
    ranks: Callable[[int], Ranks], tmp_path: Path
):
    """With dropout peft computes the base's product a second time, from the gathered weight."""
    path = sharded_config("zero3", tmp_path)
    answers = ranks(2).call(step_with_dropout, config=path)
    for answer in answers:
        assert answer["skipped"] == [False] * STEPS
        assert len(set(answer["losses"])) == STEPS


def step_with_dropout(config: str) -> dict[str, Any]:
    """Runs on every rank."""
    settings = settings_of(config, dropout=0.5)
    engine = Engine(settings, torch.device("cpu"), read_answers=True)
    packs = packs_of(settings)[torch.distributed.get_rank() :: 2]
    results = [engine.train_step(packs, LR) for _ in range(STEPS)]
    engine.engine.destroy()
    return {
        "skipped": [bool(result.skipped) for result in results],
        "losses": [float(result.loss) for result in results],
    }
