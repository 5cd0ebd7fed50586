"""A rank that cannot write makes the save fail on all ranks, and a base that UNO wrote brings its
metaqueries and their head."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_case import settings_of, start, write_base
from ranks import Ranks
from safetensors.torch import save_file
from tiny import full_parameters, sharded_config

from uno_ds.training import saving
from uno_ds.training.checkpoint import CheckpointSettings
from uno_ds.training.engine import Engine
from uno_ds.training.saving import Saver


def write_where_one_rank_cannot(config: str, base: str, folder: str, background: bool) -> str:
    """Runs on every rank: rank 1's disk is full."""
    engine, ema, _ = start(settings_of(config, base))
    if dist.get_rank():

        def full(*arguments: Any) -> None:
            raise OSError(28, "No space left on device", "there")

        saving.write_tensors, kept = full, saving.write_tensors
    reported: list[str] = []
    try:
        saver = Saver(
            Path(folder), CheckpointSettings(asynchronous=background), engine, ema, reported.append
        )
        saved = saver.save(1, {}, {}) and saver.settle()
        assert not saved and (saver.saved, saver.failed) == (0, 1)
    finally:
        if dist.get_rank():
            saving.write_tensors = kept
        engine.engine.destroy()
    return reported[0] if reported else ""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("configs")
    return lambda name: sharded_config(name, folder)


@pytest.mark.parametrize("background", [False, True])
def test_a_rank_that_cannot_write_makes_the_save_fail_on_all_in_one_line_and_leaves_nothing(
    ranks: Callable[[int], Ranks],
    configs: Callable[[str], str],
    base: Path,
    tmp_path: Path,
    background: bool,
):
    lines = ranks(2).call(
        write_where_one_rank_cannot,
        config=configs("zero3"),
        base=str(base),
        folder=str(tmp_path),
        background=background,
    )
    assert (
        "step 1 could NOT be saved" in lines[0]
        and "No space left on device" in lines[0]
        and not lines[1]
    )
    assert not list(tmp_path.iterdir())


def extra_weights(config: str, base: str, grid: int) -> dict[str, torch.Tensor]:
    """Runs on every rank: metaqueries and head of an engine built on the base."""
    settings = settings_of(config, base)
    settings = dataclasses.replace(
        settings, sequence=dataclasses.replace(settings.sequence, metaquery_grid=grid)
    )
    engine = Engine(settings, torch.device("cpu"), read_answers=False)
    found = {
        name: tensor for name, tensor in full_parameters(engine) if not name.startswith("model.")
    }
    engine.engine.destroy()
    return found


@pytest.mark.parametrize("config", ["zero3", "zero1"])
def test_a_base_that_uno_wrote_brings_its_metaqueries_and_head(
    ranks: Callable[[int], Ranks],
    configs: Callable[[str], str],
    base: Path,
    tmp_path: Path,
    config: str,
):
    folder = shutil.copytree(base, tmp_path / "base")
    drawn = ranks(2).call(extra_weights, config=configs(config), base=str(folder), grid=2)[0]
    kept = {name: torch.randn(tensor.shape) for name, tensor in drawn.items()}
    save_file(kept, folder / "uno.safetensors")
    for found in ranks(2).call(extra_weights, config=configs(config), base=str(folder), grid=2):
        assert len(found) == 2 and all(torch.equal(found[name], kept[name]) for name in kept)
    other = ranks(2).call(extra_weights, config=configs(config), base=str(folder), grid=3)[0]
    assert other["metaqueries.weight"].shape[0] == 9 and torch.equal(
        other["regression.weight"], kept["regression.weight"]
    )
