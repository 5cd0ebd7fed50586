"""What `weights.py inspect` says of a folder, from headers alone."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from uno_ds.commands.weights import main
from uno_ds.generation.inference_model import open_model
from uno_ds.model.architecture import RECIPES, Architecture, read_architecture, write_architecture
from uno_ds.model.bagel import Bagel
from uno_ds.model.weights import bagel_name, write_weights
from uno_ds.settings import build

SHAPE = build(
    Architecture,
    dict(
        hidden=16,
        layers=2,
        heads=2,
        kv_heads=1,
        mlp=24,
        vocabulary=512,
        vit_hidden=8,
        vit_layers=1,
        vit_heads=2,
        vit_mlp=12,
        vit_patch=4,
        vit_side=4,
        codec="pixel",
        codec_downsample=2,
        latent_channels=12,
        latent_side=4,
    ),
)


@pytest.fixture
def folder(tmp_path) -> Path:
    torch.manual_seed(0)
    tensors = dict(Bagel(SHAPE).named_parameters())
    write_weights(tmp_path, tensors, tensors.__getitem__)
    write_architecture(SHAPE, tmp_path)
    shutil.copy(RECIPES / "tiny_base" / "tokenizer.json", tmp_path)
    return tmp_path


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "ema.safetensors")
    change(tensors)
    save_file(tensors, folder / "ema.safetensors")


def test_a_whole_folder_is_described_by_part_and_loads_again_bit_for_bit(folder, capsys):
    assert main(["inspect", str(folder)]) == 0
    output = capsys.readouterr().out
    model = open_model(folder).model
    generation = sum(
        p.numel() for name, p in model.named_parameters() if "moe_gen" in bagel_name(name)
    )
    assert (
        f"{generation:,}  generation expert" in output
        and "missing: 0" in output
        and "BF16" in output
    )
    tensors = load_file(folder / "ema.safetensors")
    assert all(
        torch.equal(p.bfloat16(), tensors[bagel_name(name)]) for name, p in model.named_parameters()
    )
    assert read_architecture(folder) == SHAPE


def test_missing_unexpected_and_misshaped_names_are_named(folder, capsys):
    def change(tensors):
        tensors.pop("connector.fc1.bias")
        tensors["connector.fc9.bias"] = torch.zeros(3)
        tensors["llm2vae.bias"] = torch.zeros(7)

    rewrite(folder, change)
    assert main(["inspect", str(folder)]) == 1
    output = capsys.readouterr().out
    assert (
        "missing: 1\n  connector.fc1.bias" in output
        and "unexpected: 1\n  connector.fc9.bias" in output
    )
    assert "llm2vae.bias: [7] instead of [48]" in output


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "absent"])
def test_a_damaged_file_is_one_line_that_names_it(folder, capsys, damage):
    file = folder / "ema.safetensors"
    content = file.read_bytes()
    if damage == "absent":
        file.unlink()
    else:
        file.write_bytes({"cut": content[:-10], "empty": b"", "garbage": b"\xff" * 100}[damage])
    assert main(["inspect", str(folder)]) == 2
    error = capsys.readouterr().err.strip()
    assert str(folder) in error and "\n" not in error
