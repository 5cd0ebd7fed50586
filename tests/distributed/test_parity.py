"""The same samples give the same training, however many ranks, micro-batches and ZeRO stages they
are spread over."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from ranks import Ranks
from tiny import (
    CONFIGS,
    GRADIENT_ROUNDING,
    LOSS_ROUNDING,
    SampleList,
    assert_near,
    full_parameters,
    parameter_rounding,
    plain_adamw,
    plain_objective,
    plain_step,
    recipe,
    sharded_config,
)

from uno_ds.objectives.uno import LOSSES
from uno_ds.recipe import Recipe
from uno_ds.sequence.batch import PackedBatch
from uno_ds.training.engine import Engine

STEPS, SAMPLES, LR, CLIP = 5, 12, 1e-2, 0.4
# AdamW divides by sqrt(v) + eps. With the usual 1e-8 an entry of the gradient that is zero but for
# rounding is scaled up to a whole step of size lr. Entries here are 1e-7 to 1e-1 and rounding is
# 1e-9: under eps = 1e-3 it grows to at most LR * 1e-9 / 1e-3 = 1e-8 per step, while the larger
# entries still take steps of 1e-3 to 1e-2.
OPTIMIZER = {"lr": LR, "eps": 1e-3, "weight_decay": 0.1, "ema": 0}

# (ranks, micro-batches per rank, DeepSpeed configuration, changes of the model's settings)
CASES = [
    *((ranks, micro, config, {}) for ranks in (1, 2) for config in CONFIGS for micro in (1, 2)),
    *((3, micro, config, {}) for config in CONFIGS[:4] for micro in (1, 2)),
    (2, 2, "zero3", {"recompute": True}),
    (2, 1, "zero1", {"train": "all"}),
    (2, 2, "zero3", {"train": "all"}),
]


def settings_of(config: str, packs: int, model: dict[str, Any]) -> Recipe:
    return recipe(
        optimizer=OPTIMIZER,
        engine={"deepspeed": config, "packs_per_step": packs, "clip": CLIP},
        model=model,
    )


def make_packs(settings: Recipe, packs: int) -> list[PackedBatch]:
    """The twelve samples in `packs` packs of as many samples each, but of unequal tokens with each
    loss."""
    make = SampleList(settings)
    samples = [
        make.text_to_image(0),
        make.edit(1),
        make.text_to_image(2, caption=False),
        make.conversation(3),
        make.text_to_image(4),
        make.edit(5),
        make.conversation(6),
        make.conversation(7, image=False),
        make.edit(8, metaqueries=False),
        make.text_to_image(9),
        make.conversation(10),
        make.text_to_image(11, caption=False, metaqueries=False),
    ]
    assert len(samples) == SAMPLES
    return [
        make.collate(samples[start : start + SAMPLES // packs])
        for start in range(0, SAMPLES, SAMPLES // packs)
    ]


def train_on_ranks(config: str, micro: int, model: dict[str, Any]) -> dict[str, Any]:
    """Runs on every rank: STEPS steps on this rank's share of the packs."""
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    settings = settings_of(config, micro * world_size, model)
    engine = Engine(settings, torch.device("cpu"), read_answers=True)
    packs = make_packs(settings, micro * world_size)[rank::world_size]
    losses, norms = [], []
    moments: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        result = engine.train_step(packs, LR)
        losses.append(torch.cat([result.loss[None], result.losses]))
        norms.append(result.grad_norm)
        if not step:
            for name, parameter in engine.named_parameters():
                if parameter.requires_grad:
                    own = (
                        engine.optimizer.state[parameter]["exp_avg"] if engine.stage == 0 else None
                    )
                    moments[name] = (
                        safe_get_full_optimizer_state(parameter, "exp_avg") if own is None else own
                    ).clone()
    parameters = dict(full_parameters(engine))
    engine.engine.destroy()
    return {
        "losses": torch.stack(losses),
        "norms": torch.stack(norms),
        "moments": moments,
        "parameters": parameters,
        "stage": engine.stage,
    }


@dataclass(frozen=True)
class Reference:
    losses: torch.Tensor
    norms: torch.Tensor
    moments: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def reference() -> Callable[[dict[str, Any]], Reference]:
    """The same steps in plain torch, one process, all samples in one pack."""
    made: dict[str, Reference] = {}

    def train_plainly(model: dict[str, Any]) -> Reference:
        key = model.get("train", "generation")
        if key not in made:
            settings = settings_of("zero0", 1, {"train": key})
            objective = plain_objective(settings)
            optimizer, packs, losses, norms = (
                plain_adamw(settings, objective),
                make_packs(settings, 1),
                [],
                [],
            )
            moments: dict[str, torch.Tensor] = {}
            for step in range(STEPS):
                loss, norm = plain_step(objective, optimizer, packs, CLIP)
                losses.append(loss)
                norms.append(norm)
                if not step:
                    moments = {
                        name: optimizer.state[parameter]["exp_avg"].clone()
                        for name, parameter in objective.named_parameters()
                        if parameter.requires_grad
                    }
            tensors = {
                name: tensor.detach()
                for name, tensor in [*objective.named_parameters(), *objective.named_buffers()]
            }
            made[key] = Reference(torch.stack(losses), torch.stack(norms), moments, tensors)
        return made[key]

    return train_plainly


def test_packs_are_unequal_so_that_a_mean_of_means_would_be_another_loss():
    settings = settings_of("zero0", 1, {})
    for packs in (2, 3, 4, 6):
        counts = [pack.loss_counts for pack in make_packs(settings, packs)]
        for name in LOSSES:
            assert len({count[name] for count in counts}) > 1, (
                f"{packs} packs have equally many {name} tokens"
            )


@pytest.mark.parametrize(
    ("size", "micro", "config", "model"),
    CASES,
    ids=[
        "-".join([f"{size}ranks", f"{micro}x", config, *model])
        for size, micro, config, model in CASES
    ],
)
def test_gradients_losses_and_parameters_are_those_of_plain_torch(
    ranks: Callable[[int], Ranks],
    reference: Callable[[dict[str, Any]], Reference],
    tmp_path: Path,
    size: int,
    micro: int,
    config: str,
    model: dict[str, Any],
):
    answers = ranks(size).call(
        train_on_ranks, config=sharded_config(config, tmp_path), micro=micro, model=model
    )
    expected = reference(model)
    assert answers[0]["stage"] == (3 if config == "zero3_offload" else int(config[-1]))
    assert (expected.norms > CLIP).any(), "no step was clipped, so clipping is not tested"
    for answer in answers:
        assert_near(answer["losses"], expected.losses, LOSS_ROUNDING, "losses")
        assert_near(answer["norms"], expected.norms, GRADIENT_ROUNDING, "gradient norms")
        # The first moment after one step is 1 - beta1 times the gradient that AdamW was given:
        # averaged, accumulated and clipped. Unlike the gradient itself every stage keeps it beyond
        # the step.
        assert answer["moments"].keys() == expected.moments.keys()
        for name, moment in expected.moments.items():
            error = (answer["moments"][name] - moment).abs().max()
            assert error <= 1e-7 * CLIP + GRADIENT_ROUNDING * moment.abs().max(), (
                f"gradient of {name} is off by {error:.1e}"
            )
        assert answer["parameters"].keys() == expected.parameters.keys()
        for name, parameter in expected.parameters.items():
            error = (answer["parameters"][name] - parameter).abs().max()
            assert error <= parameter_rounding(STEPS, LR), (
                f"{name} is off by {error:.1e} after {STEPS} steps"
            )
