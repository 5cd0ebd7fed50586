"""Gradients of the losses measured during training are those of one process, on any ranks and ZeRO
stage, and measuring changes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ForkServer, Ranks
from runs import Place
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import (
    GRADIENT_ROUNDING,
    SampleList,
    counts_of,
    full_parameters,
    plain_objective,
    recipe,
    sharded_config,
)

from uno_ds.inspection.gradients import flattened, measure_gradients, only, part_of, products
from uno_ds.recipe import Recipe
from uno_ds.sequence.batch import PackedBatch
from uno_ds.training.engine import Engine
from uno_ds.training.gradient_monitor import GradientMonitor
from uno_ds.training.metrics import FIELDS, read_metrics

PACKS, STEPS, LR = 2, 3, 1e-2
NAMES = ["flow", "caption", "regression", "answer"]
CASES = [
    (2, "zero3", {}),
    (1, "zero0", {}),
    (2, "zero2", {}),
    pytest.param(2, "zero3", {"train": "all"}, marks=pytest.mark.slow),
    (2, "zero2", {"train": "lora"}),
    pytest.param(2, "zero3", {"recompute": True}, marks=pytest.mark.slow),
    pytest.param(2, "zero1", {}, marks=pytest.mark.slow),
    pytest.param(2, "zero2", {"train": "all"}, marks=pytest.mark.slow),
    pytest.param(2, "zero3", {"train": "lora"}, marks=pytest.mark.slow),
    pytest.param(2, "zero3_offload", {}, marks=pytest.mark.slow),
    pytest.param(2, "zero3_offload", {"train": "all"}, marks=pytest.mark.slow),
]


def settings_of(config: str, model: dict[str, Any]) -> Recipe:
    return recipe(
        engine={"deepspeed": config, "packs_per_step": PACKS},
        optimizer={"lr": LR, "eps": 1e-3, "ema": 0},
        model=model,
        lora={"rank": 4, "alpha": 6.0},
    )


def packs_of(settings: Recipe) -> list[PackedBatch]:
    """One pack has no caption and no image of a conversation, so that ranks are unequal."""
    make = SampleList(settings)
    return [
        make.collate([make.text_to_image(0), make.edit(1), make.conversation(2)]),
        make.collate([make.text_to_image(3, caption=False), make.edit(4, caption=False)]),
    ]


def measure_on_ranks(config: str, model: dict[str, Any], every: int) -> dict[str, Any]:
    """Runs on every rank: STEPS steps, with a measurement before each `every`-th."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    settings = settings_of(config, model)
    engine = Engine(settings, torch.device("cpu"), read_answers=True)
    monitor = GradientMonitor(every, engine)
    packs = packs_of(settings)[rank::world_size]
    reports, losses = [], []
    for step in range(1, STEPS + 1):
        if monitor.due(step):
            reports.append(monitor.measure(packs))
        result = engine.train_step(packs, LR)
        losses.append(torch.cat([result.loss[None], result.losses, result.grad_norm[None]]))
    parameters = dict(full_parameters(engine))
    engine.engine.destroy()
    return {"reports": reports, "losses": torch.stack(losses), "parameters": parameters}


def separate_passes(settings: Recipe, packs: list[PackedBatch]) -> dict[str, Any]:
    """Products of every part's gradients, each loss by backward passes of its own over all packs of
    the step, in this process."""
    counts = counts_of(packs)
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    for name in NAMES:
        objective = plain_objective(settings)
        with only(objective, {name: 1.0}):
            for batch in packs:
                objective(batch, counts)[0].backward()
        gradients[name] = {
            key: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for key, parameter in objective.named_parameters()
            if parameter.requires_grad
        }
    parts = {part_of(key) for key in gradients[NAMES[0]]}
    found = {}
    for part in ["all", *parts]:
        rows = [
            torch.cat([g.flatten() for key, g in own.items() if part in ("all", part_of(key))])
            for own in gradients.values()
        ]
        matrix = torch.stack(rows).double()
        found[part] = products(matrix @ matrix.T, NAMES)
    return found


@pytest.mark.parametrize(("size", "config", "model"), CASES)
def test_products_are_those_of_one_process_and_the_steps_are_those_without_measuring(
    ranks: Callable[[int], Ranks], tmp_path: Path, size: int, config: str, model: dict[str, Any]
):
    file = sharded_config(config, tmp_path)
    group = ranks(size)
    measured = group.call(measure_on_ranks, config=file, model=model, every=2)
    plain = group.call(measure_on_ranks, config=file, model=model, every=0)
    for with_reports, without in zip(measured, plain, strict=True):
        assert len(with_reports["reports"]) == 1 and not without["reports"]
        assert torch.equal(with_reports["losses"], without["losses"])
        for name, parameter in without["parameters"].items():
            assert torch.equal(with_reports["parameters"][name], parameter), name
    assert len({str(sorted(flattened(a["reports"][0]["weights"]))) for a in measured}) == 1


@pytest.mark.parametrize(("size", "config", "model"), CASES)
def test_the_first_report_is_that_of_plain_torch(
    ranks: Callable[[int], Ranks], tmp_path: Path, size: int, config: str, model: dict[str, Any]
):
    answers = ranks(size).call(
        measure_on_ranks, config=sharded_config(config, tmp_path), model=model, every=1
    )
    settings = settings_of("zero0", {name: model[name] for name in model if name == "train"})
    packs = packs_of(settings)
    latents = measure_gradients(plain_objective(settings), packs, counts_of(packs))["latents"]
    expected = {"weights": separate_passes(settings, packs), "latents": latents}
    found = answers[0]["reports"][0]
    assert found["losses"] == NAMES
    assert set(found["weights"]) == set(expected["weights"]) >= {"all", "layer 1", "layer 2"}
    for kind, of_kind in expected.items():
        ours, theirs = dict(flattened(found[kind])), dict(flattened(of_kind))
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            # Norms relative to their size; cosines and shares are of size 1.
            allowed = 4 * GRADIENT_ROUNDING * max(1.0, abs(value))
            assert abs(ours[name] - value) <= allowed, (name, ours[name], value)


def test_a_run_writes_gradients_of_some_steps_to_its_metrics_and_to_tensorboard(
    server: ForkServer, tmp_path: Path
):
    place = Place(tmp_path, server)
    logging = {"every": 1, "gradients_every": 2, "tensorboard": True}
    place.run("measured", steps=4, checkpoint={"every": 0, "export": False}, logging=logging)
    rows = read_metrics(place.of("measured") / "metrics.jsonl")
    assert [row["step"] for row in rows if "gradients" in row] == [2, 4]
    assert all(set(row) - {"gradients"} == set(FIELDS) for row in rows)
    gradients = rows[1]["gradients"]
    assert gradients["losses"] == ["flow", "caption", "regression"]
    assert sum(gradients["weights"]["all"]["share"].values()) == pytest.approx(1)
    # Before clipping the step's own gradient is the sum of the parts.
    norms = gradients["weights"]["all"]["norm"]
    assert rows[1]["grad_norm"] <= sum(norms.values()) * (1 + GRADIENT_ROUNDING)
    events = EventAccumulator(str(place.of("measured") / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("gradients/weights/all/cosine/flow_caption")
    assert [event.step for event in scalars] == [2, 4]
    assert "gradients/latents/layer_1/0.33-0.67/share/flow" in events.Tags()["scalars"]
