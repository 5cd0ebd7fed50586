"""A base that one rank's share shows to be of no use is refused by all ranks alike, in the same
line, and nobody waits.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURE, recipe, sharded_config

from uno_ds.model.architecture import Architecture, write_architecture
from uno_ds.model.bagel import Bagel
from uno_ds.model.weights import write_weights
from uno_ds.settings import SettingsError, build
from uno_ds.training.engine import Engine

SPOILT = "language_model.model.layers.0.mlp.down_proj.weight"


def open_engine(config: str, base: str) -> str:
    """Runs on every rank: the refusal, or "" where the engine comes up."""
    settings = recipe(
        model={"base": base, "architecture": None},
        engine={"deepspeed": config, "packs_per_step": dist.get_world_size(), "precision": "fp32"},
    )
    try:
        engine = Engine(settings, torch.device("cpu"), read_answers=True)
    except SettingsError as error:
        return str(error)
    engine.engine.destroy()
    return ""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, shape = tmp_path_factory.mktemp("base"), build(Architecture, ARCHITECTURE)
    torch.manual_seed(0)
    parameters = dict(Bagel(shape).named_parameters())
    write_weights(folder, parameters, parameters.__getitem__)
    write_architecture(shape, folder)
    return folder


@pytest.mark.parametrize("config", ["zero3", "zero2"])
def test_nan_in_one_ranks_share_is_refused_by_every_rank(
    ranks: Callable[[int], Ranks], base: Path, tmp_path: Path, config: str
):
    spoilt = shutil.copytree(base, tmp_path / "spoilt")
    tensors = load_file(base / "ema.safetensors")
    # The last value: under ZeRO-3 in the share of rank 1, which rank 0 never reads.
    tensors[SPOILT].view(-1)[-1] = float("nan")
    save_file(tensors, spoilt / "ema.safetensors")
    path = sharded_config(config, tmp_path)
    lines = ranks(2).call(open_engine, config=path, base=str(spoilt))
    expected = f"model.base: {spoilt} holds NaN or infinite values in {SPOILT} (1)"
    assert lines[0] == lines[1] and lines[0].startswith(expected)
    assert ranks(2).call(open_engine, config=path, base=str(base)) == ["", ""]


def test_integers_and_adapters_are_refused_by_every_rank(
    ranks: Callable[[int], Ranks], base: Path, tmp_path: Path
):
    spoilt = shutil.copytree(base, tmp_path / "spoilt")
    tensors = load_file(base / "ema.safetensors")
    tensors |= {SPOILT: tensors[SPOILT].to(torch.int8), f"{SPOILT}.lora_A": torch.zeros(2)}
    save_file(tensors, spoilt / "ema.safetensors")
    path = sharded_config("zero3", tmp_path)
    lines = ranks(2).call(open_engine, config=path, base=str(spoilt))
    assert lines[0] == lines[1]
    assert f"{SPOILT} is stored as I8" in lines[0] and f"unexpected: {SPOILT}.lora_A" in lines[0]
