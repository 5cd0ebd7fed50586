"""`weights.py export --adapter`: what a run trained, as a folder for other programs."""

from pathlib import Path

import pytest
import torch
from checkpoints import KINDS, write_checkpoint
from random_adapter import adapter_tensors
from small_runs import random_base

from uno_ds.commands.weights import main
from uno_ds.model.adapter_files import AdapterFolder
from uno_ds.model.adapters import MLP, LoraSettings, is_adapter
from uno_ds.model.architecture import read_architecture

# That of a checkpoint without a recipe.
RANK = LoraSettings().rank


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_base(tmp_path_factory.mktemp("base"))


def checkpoint(folder: Path, base: Path, projections: tuple[str, ...]) -> tuple[Path, dict]:
    """(checkpoint of a run that trained adapters on these projections, its weights)."""

    def chosen(name: str) -> bool:
        return not is_adapter(name) or any(f".{one}." in name for one in projections)

    trained = {
        kind: {
            name: tensor
            for name, tensor in adapter_tensors(base, 2, RANK, seed).items()
            if chosen(name)
        }
        for seed, kind in enumerate(KINDS)
    }
    return write_checkpoint(folder, base, trained), trained["weight"]


def test_a_packed_adapter_of_a_run_gives_back_every_number(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    path, trained = checkpoint(tmp_path / "run", base, MLP)
    out = tmp_path / "out"
    assert main(["export", str(path), str(out), "--adapter", "--packed"]) == 0
    assert "in uno.safetensors: programs that read peft's format only" in capsys.readouterr().out
    files = {file.name for file in out.iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json", "uno.safetensors"}
    folder = AdapterFolder(out, read_architecture(base), "--adapter")
    assert len(folder.modules) == 2 * len(MLP)
    for name, tensor in trained.items():
        assert torch.equal(folder.read(name), tensor), name


def test_an_adapter_that_cannot_be_packed_leaves_nothing_behind(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    path, _ = checkpoint(tmp_path / "run", base, ("q_proj", *MLP))
    out = tmp_path / "out"
    assert main(["export", str(path), str(out), "--adapter", "--packed"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --packed: vLLM-Omni has no place for an adapter with ")
    assert error.count("\n") == 1 and [entry.name for entry in tmp_path.iterdir()] == ["run"]
