"""Weights by noise level and step, the end of supervision, flow contrast, negative captions and
balance under ZeRO-3: on any number of ranks, some of which lack what a loss needs, training is that
of one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ForkServer, Ranks
from runs import Place, assert_same
from tiny import (
    GRADIENT_ROUNDING,
    LOSS_ROUNDING,
    SPECIAL,
    SampleList,
    assert_near,
    counts_of,
    full_parameters,
    parameter_rounding,
    plain_adamw,
    plain_objective,
    plain_step,
    recipe,
    sharded_config,
)

from uno_ds.inspection.gradients import latent_norms
from uno_ds.recipe import Recipe
from uno_ds.sequence.batch import PackedBatch
from uno_ds.sequence.composition import SampleComposer
from uno_ds.sequence.packing import Packer
from uno_ds.sequence.segments import Sample
from uno_ds.training.balance import KEY, LossBalance
from uno_ds.training.engine import Engine
from uno_ds.training.metrics import FIELDS, MORE, read_metrics

PACKS, LR, CLIP, SUPERVISION, RATIO = 6, 1e-2, 0.4, 0.6, 0.4
# A resumed run: the first of them has the scale of the checkpoint, the second measures, and from
# the third on nothing is supervised.
STEPS, RESTORED = (2, 3, 4, 5), 0.5
LAST_SUPERVISED = 3
SUPERVISED = ("caption", "regression", "negative")
OBJECTIVE = {
    "caption_weight_by_t": [[0.2, 2.0], [0.8, 0.5]],
    "regression_weight_by_t": [[0.0, 0.5], [1.0, 1.5]],
    "flow_contrast": 0.2,
    "negative_weight": 0.4,
    "negative_source": "pack",
    "balance": "gradient_norm",
    "balance_ratio": RATIO,
    "balance_every": 2,
}


class Samples(SampleList):
    """Composed as the recipe says, at a step before or after the end of supervision."""

    def __init__(self, settings: Recipe, step: int):
        super().__init__(settings)
        self.supervised = step <= LAST_SUPERVISED

    def _composer(self, captions: bool, metaqueries: bool) -> SampleComposer:
        composer = self.settings.composer(None)
        assert composer.tokens == SPECIAL
        composer.captions = captions and self.supervised
        composer.metaqueries = metaqueries and self.supervised
        return composer


def settings_of(config: str) -> Recipe:
    return recipe(
        objective=OBJECTIVE | {"supervise_until": LAST_SUPERVISED / 1000},
        optimizer={"lr": LR, "eps": 1e-3, "ema": 0},
        engine={"deepspeed": config, "packs_per_step": PACKS, "clip": CLIP},
    )


def packs_of(settings: Recipe, step: int) -> list[PackedBatch]:
    """Packs 2 and 5, which are those of the last of three ranks, have neither a caption nor a
    partner for a noised image."""
    make = Samples(settings, step)
    contents = [
        [make.text_to_image(0), make.edit(1), make.conversation(2)],
        [make.text_to_image(3), make.text_to_image(4, caption=False), make.text_to_image(5)],
        [make.conversation(6)],
        [make.edit(7), make.text_to_image(8, metaqueries=False), make.edit(9)],
        [make.text_to_image(10), make.conversation(11)],
        [make.text_to_image(12, caption=False)],
    ]
    factor = SUPERVISION if make.supervised else 1.0
    return [_packed(settings, samples, factor) for samples in contents]


def _packed(settings: Recipe, samples: list[Sample], factor: float) -> PackedBatch:
    packer = Packer(settings.sequence.token_budget, negatives=True)
    assert all(map(packer.offer, samples))
    return settings.collator(SPECIAL)(packer.samples, supervision=factor)


def train_on_ranks(config: str) -> dict[str, Any]:
    """Runs on every rank: STEPS."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    settings = settings_of(config)
    engine = Engine(settings, torch.device("cpu"), read_answers=True)
    balance = LossBalance(settings, engine)
    balance.restore({KEY: RESTORED})
    losses, norms, scales = [], [], []
    for step in STEPS:
        packs = packs_of(settings, step)[rank::world_size]
        if balance.due(step):
            balance.measure(step, packs)
        scales.append(balance.scale)
        result = engine.train_step(packs, LR)
        losses.append(torch.cat([result.loss[None], result.losses]))
        norms.append(result.grad_norm)
    parameters = dict(full_parameters(engine))
    engine.engine.destroy()
    return {"losses": losses, "norms": norms, "scales": scales, "parameters": parameters}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """The same steps of one process in plain torch."""
    settings = settings_of("zero0")
    objective = plain_objective(settings)
    optimizer = plain_adamw(settings, objective)
    losses, norms, scales = [], [], []
    groups = [["flow", "contrast"], list(SUPERVISED)]
    scale = RESTORED
    for step in STEPS:
        packs = packs_of(settings, step)
        counts = counts_of(packs, objective.losses)
        if step == STEPS[1]:
            flow, understanding = latent_norms(objective, packs, counts, groups)
            scale = RATIO * flow / understanding
        objective.scales = {name: scale if name in groups[1] else 1.0 for name in objective.losses}
        scales.append(scale)
        loss, norm = plain_step(objective, optimizer, packs, CLIP)
        losses.append(loss)
        norms.append(norm)
    parameters = {name: p.detach() for name, p in objective.named_parameters()}
    return {"losses": losses, "norms": norms, "scales": scales, "parameters": parameters}


def test_some_ranks_lack_what_a_loss_needs():
    packs = packs_of(settings_of("zero0"), LAST_SUPERVISED)
    counts = [pack.loss_counts for pack in packs]
    partners = [len(pack.latents.partner_X) for pack in packs]
    assert [number for number, rows in enumerate(partners) if not rows] == [2, 4, 5]
    for name, lacking in (("negative", [2, 4, 5]), ("caption", [2, 5]), ("contrast", [2])):
        assert [number for number, pack in enumerate(counts) if not pack[name]] == lacking, name
    assert sum(pack["negative"] for pack in counts) >= 4


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_any_number_of_ranks_trains_as_one_process(
    ranks: Callable[[int], Ranks], tmp_path: Path, expected: dict[str, Any], size: int
):
    answers = ranks(size).call(train_on_ranks, config=sharded_config("zero3", tmp_path))
    for answer in answers:
        assert answer["scales"] == answers[0]["scales"]
        for step in range(len(STEPS)):
            ours, theirs = answer["scales"][step], expected["scales"][step]
            assert ours == pytest.approx(theirs, rel=2 * GRADIENT_ROUNDING)
            # The scale multiplies the understanding part of the total.
            rounding = LOSS_ROUNDING + 2 * GRADIENT_ROUNDING
            assert_near(answer["losses"][step], expected["losses"][step], rounding, f"step {step}")
            assert_near(
                answer["norms"][step],
                expected["norms"][step],
                3 * GRADIENT_ROUNDING,
                f"step {step}",
            )
        for name, parameter in expected["parameters"].items():
            error = (answer["parameters"][name] - parameter).abs().max()
            assert error <= 3 * parameter_rounding(len(STEPS), LR), f"{name} is off by {error:.1e}"
    names = tuple(settings_of("zero0").objective.weights)
    for step, losses in zip(STEPS, expected["losses"], strict=True):
        present = {name for name, loss in zip(names, losses[1:], strict=True) if loss > 0}
        assert present == set(names) - set(SUPERVISED if step > LAST_SUPERVISED else ())
    assert expected["scales"][0] == RESTORED != expected["scales"][1]


@pytest.mark.slow
@pytest.mark.parametrize(("fault_step", "resumed"), [(3, 2), (6, 4)])
def test_a_run_that_is_stopped_and_resumed_equals_one_that_is_not(
    server: ForkServer, tmp_path: Path, fault_step: int, resumed: int
):
    """Supervision ends after step 4 of 6, and the scale is measured before step 4. The run is
    stopped before that, or after the end."""
    place = Place(tmp_path, server)
    objective = OBJECTIVE | {
        "supervise_until": 4 / 6,
        "supervision_decay": "cosine",
        "balance_every": 3,
    }
    place.run("whole", objective=objective)
    fault = {"kind": "backward", "rank": 1, "step": fault_step}
    run = place.start("cut", objective=objective, fault=fault)
    assert 0 not in run.wait()
    output = place.run("cut", "--resume", "auto", objective=objective).logs[0].read_text()
    assert f"continues after step {resumed}" in output
    assert ("balance before step 4" in output) == (resumed < 4)
    assert_same(place, "cut", "whole")
    rows, whole = (read_metrics(place.of(name) / "metrics.jsonl") for name in ("cut", "whole"))
    for field in MORE:
        assert [row[field] for row in rows] == [row[field] for row in whole]
    assert all(set(row) == set(FIELDS) | set(MORE) for row in whole)
    scales = [row["understanding_scale"] for row in whole]
    assert scales[2] != scales[3] == scales[4] == scales[5]
    for field in ("loss_caption", "loss_regression", "loss_negative"):
        assert [row["step"] for row in whole if row[field] is not None] == [1, 2, 3, 4]
    assert all(row["loss_contrast"] is not None for row in whole)
