"""Regression targets, contrast and several grids under ZeRO-3: the losses, gradient norms and
weights of one process in plain torch, on one, two and three ranks some of which have no metaquery;
and an encoder of targets that is on every rank and in no checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from tiny import (
    GRADIENT_ROUNDING,
    SampleList,
    assert_near,
    counts_of,
    full_parameters,
    parameter_rounding,
    plain_adamw,
    plain_objective,
    recipe,
    sharded_config,
)
from vision_folders import write_dinov2

from uno_ds.objectives.uno import UnoObjective
from uno_ds.recipe import Recipe
from uno_ds.sequence.batch import PackedBatch
from uno_ds.settings import SettingsError
from uno_ds.training.checkpoint import _check_model
from uno_ds.training.engine import Engine

STEPS, PACKS, LR, CLIP = 2, 6, 1e-2, 0.4
SPATIAL = {"regression_target_norm": "spatial", "regression_mean_share": 0.7}
KNOBS: dict[str, dict[str, Any]] = {
    "encoder, spatial, two grids": {"regression_target": "encoder", **SPATIAL, "grid": [3, 2]},
    "vit, spatial": SPATIAL,
    # Its features come through weights that ZeRO-3 gathers.
    "connector": {"regression_target": "connector"},
    "hog, contrastive": {"regression_target": "hog", "regression_loss": "contrastive"},
    "contrastive over ranks": {
        "regression_loss": "contrastive",
        "regression_negatives": "ranks",
        "grid": [3, 1],
    },
}


def settings_of(config: str, knobs: dict[str, Any], folder: str) -> Recipe:
    given = dict(knobs)
    grid = given.pop("grid", 2)
    if given.get("regression_target") == "encoder":
        given["regression_encoder"] = folder
    # See test_parity for eps.
    return recipe(
        optimizer={"lr": LR, "eps": 1e-3, "weight_decay": 0.1, "ema": 0},
        objective={"regression_weight": 0.5, **given},
        sequence={"metaquery_grid": grid},
        engine={"deepspeed": config, "packs_per_step": PACKS, "clip": CLIP},
    )


def make_packs(settings: Recipe) -> list[PackedBatch]:
    """On three ranks the second has never a metaquery, on two the second only once."""
    make = SampleList(settings)
    packs = [
        [make.text_to_image(0), make.edit(1)],
        [make.conversation(2)],
        [make.text_to_image(3)],
        [make.edit(4)],
        [make.conversation(5)],
        [make.text_to_image(6, metaqueries=False)],
    ]
    return [make.collate(samples) for samples in packs]


def train_on_ranks(config: str, knobs: dict[str, Any], folder: str) -> dict[str, Any]:
    """Runs on every rank."""
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    settings = settings_of(config, knobs, folder)
    engine = Engine(settings, torch.device("cpu"), read_answers=True)
    packs = make_packs(settings)[rank::world_size]
    losses = []
    for _ in range(STEPS):
        result = engine.train_step(packs, LR)
        of_step = [result.loss[None], result.losses, result.grad_norm[None].double()]
        losses.append(torch.cat(of_step))
    parameters = dict(full_parameters(engine))
    engine.engine.destroy()
    return {"losses": torch.stack(losses), "parameters": parameters}


def targets_of(objective: UnoObjective, packs: list[PackedBatch]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    assert objective.regression is not None
    handle = objective.regression.register_forward_pre_hook(
        lambda _, arguments: found.append(arguments[1])
    )
    with torch.no_grad():
        for pack in packs:
            objective(pack, counts_of(packs))
    handle.remove()
    return found


def train_plainly(knobs: dict[str, Any], folder: str, ranks: int) -> tuple:
    """(losses and norms, parameters) of the same steps in this process."""
    settings = settings_of("zero0", knobs, folder)
    objective, packs = plain_objective(settings), make_packs(settings)
    targets = targets_of(objective, packs)
    optimizer = plain_adamw(settings, objective)
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    rows = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses = torch.zeros(5, dtype=torch.float64)
        for number, pack in enumerate(packs):
            if knobs.get("regression_negatives") == "ranks":
                first = number // ranks * ranks
                every = torch.cat(targets[first : first + ranks])
                before = sum(map(len, targets[first:number]))
                objective.regression.gather = lambda _, all=(every, before): all
            total, parts = objective(pack, counts_of(packs))
            total.backward()
            losses += torch.cat([total.detach()[None], parts]).double()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        rows.append(torch.cat([losses, norm.detach()[None].double()]))
    return torch.stack(rows), dict(objective.named_parameters())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_dinov2(tmp_path_factory.mktemp("encoders") / "dinov2", patch=2))


@pytest.mark.parametrize("size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KNOBS)
def test_ranks_train_like_one_process(
    ranks: Callable[[int], Ranks], tmp_path: Path, encoder: str, name: str, size: int
):
    config = sharded_config("zero3", tmp_path)
    given = {"knobs": KNOBS[name], "folder": encoder}
    answers = ranks(size).call(train_on_ranks, config=config, **given)
    losses, parameters = train_plainly(**given, ranks=size)
    assert (losses[:, 3] > 0).all() and losses[0, 3] != losses[1, 3]
    for answer in answers:
        assert_near(answer["losses"], losses, GRADIENT_ROUNDING, "losses and gradient norms")
        for parameter, values in parameters.items():
            error = (answer["parameters"][parameter] - values).abs().max()
            assert error <= parameter_rounding(STEPS, LR), f"{parameter} is off by {error:.1e}"


def refusals(config: str, folder: str, other: str) -> dict[str, Any]:
    """Runs on every rank: what a checkpoint of this engine says to engines of other regressions."""
    settings = settings_of(config, KNOBS["encoder, spatial, two grids"], folder)
    engine = Engine(settings, torch.device("cpu"), read_answers=True)
    shapes: dict[str, list[int]] = {}
    manifest = {
        "shapes": {},
        "ema_updates": None,
        "frozen": engine.frozen_hashes,
        "regression": engine.regression,
    }
    said = []
    saved = engine.regression
    names = [name for name, _ in full_parameters(engine)]
    for regression in (
        saved,
        saved | {"encoder": other},
        saved | {"grids": [2, 3]},
        {"grids": [3, 2]},
        {},
    ):
        engine.regression = regression
        try:
            _check_model(Path("step_1"), manifest, engine, None, shapes)
            said.append("")
        except SettingsError as error:
            said.append(str(error))
    engine.engine.destroy()
    return {"said": said, "saved": saved, "names": names}


def test_an_encoder_is_in_no_checkpoint_and_its_hash_in_every_one(
    ranks: Callable[[int], Ranks], tmp_path: Path, encoder: str
):
    config = sharded_config("zero3", tmp_path)
    answers = ranks(2).call(refusals, config=config, folder=encoder, other="0123456789abcdef")
    for answer in answers:
        assert answer["saved"].keys() == {"grids", "target", "encoder", "norm"}
        assert not [name for name in answer["names"] if "encoder" in name.split(".")[0]]
        assert answer["said"][0] == ""
        for line in answer["said"][1:]:
            assert line.startswith("--resume: step_1 was trained with another regression: ")
            assert "\n" not in line
