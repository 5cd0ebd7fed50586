"""The moving average in the place of the trained weights, and back, under every stage of ZeRO."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from tiny import SampleList, full_average, full_parameters, recipe, sharded_config

from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine

PACKS, STEPS, LR, DECAY = 2, 3, 1e-2, 0.5
CASES = [
    (2, "zero3", "fp32"),
    (2, "zero3", "bf16"),
    (2, "zero2", "bf16"),
    (1, "zero0", "fp32"),
    pytest.param(2, "zero1", "fp32", marks=pytest.mark.slow),
    pytest.param(2, "zero2", "fp32", marks=pytest.mark.slow),
    pytest.param(2, "zero3_offload", "fp32", marks=pytest.mark.slow),
    pytest.param(2, "zero3_offload", "bf16", marks=pytest.mark.slow),
    pytest.param(2, "zero3_bf16_states", "bf16", marks=pytest.mark.slow),
]


def train_on_ranks(config: str, precision: str, looks: bool) -> dict[str, Any]:
    """Runs on every rank: STEPS steps, and with `looks` a forward pass with the average before the
    last of them."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    settings = recipe(
        engine={"deepspeed": config, "packs_per_step": PACKS, "precision": precision},
        optimizer={"lr": LR, "eps": 1e-3, "ema": DECAY},
    )
    engine = Engine(settings, torch.device("cpu"), read_answers=True)
    ema = Ema(engine, DECAY)
    make = SampleList(settings)
    packs = [make.collate([make.text_to_image(n), make.edit(n + 10)]) for n in range(PACKS)]
    own = packs[rank::world_size]
    found: dict[str, Any] = {}
    for step in range(1, STEPS + 1):
        if step == STEPS and looks:
            # At stage 0 they are the average itself, which the next step moves.
            found["average"] = {name: values.clone() for name, values in full_average(ema)}
            ones = torch.ones(4, dtype=torch.float64)
            with torch.no_grad():
                found["trained losses"] = engine.objective(own[0], ones)[1]
            with ema.in_use(), torch.no_grad():
                found["losses"] = engine.objective(own[0], ones)[1]
                # A forward pass leaves some parameters whole, which must not outlive the block.
                found["inside"] = dict(full_parameters(engine))
            with torch.no_grad():
                found["losses after"] = engine.objective(own[0], ones)[1]
        result = engine.train_step(own, LR)
        ema.update()
        found[f"step {step}"] = torch.cat([result.loss[None], result.losses])
    found["parameters"], found["end"] = dict(full_parameters(engine)), dict(full_average(ema))
    engine.engine.destroy()
    return found


@pytest.mark.parametrize(("size", "config", "precision"), CASES)
def test_forward_passes_see_the_average_and_training_goes_on_as_without(
    ranks: Callable[[int], Ranks], tmp_path: Path, size: int, config: str, precision: str
):
    file, group = sharded_config(config, tmp_path), ranks(size)
    looked = group.call(train_on_ranks, config=file, precision=precision, looks=True)
    plain = group.call(train_on_ranks, config=file, precision=precision, looks=False)
    for ours, theirs in zip(looked, plain, strict=True):
        assert not torch.equal(ours["losses"], ours["trained losses"])
        assert torch.equal(ours["losses after"], ours["trained losses"])
        for name, average in ours["average"].items():
            seen = ours["inside"][name]
            assert torch.equal(seen, average.to(seen.dtype)), name
        for step in range(1, STEPS + 1):
            assert torch.equal(ours[f"step {step}"], theirs[f"step {step}"]), step
        for kind in ("parameters", "end"):
            for name, values in theirs[kind].items():
                assert torch.equal(ours[kind][name], values), (kind, name)
