"""Adapters that were packed for vLLM-Omni are read back as the adapters that they were."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import random_base

from uno_ds.generation.inference_model import open_model
from uno_ds.model.adapter_files import (
    AdapterFolder,
    adapter_parts,
    base_hash,
    write_adapter,
    write_packed_adapter,
)
from uno_ds.model.adapters import LoraSettings, target_modules
from uno_ds.model.architecture import read_architecture
from uno_ds.model.weights import WeightsFile, meta_tensors
from uno_ds.settings import SettingsError

FILES = ("adapter_model.safetensors", "adapter_config.json")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_base(tmp_path_factory.mktemp("base"))


def plain(base: Path, folder: Path, lora: LoraSettings) -> AdapterFolder:
    """With random values."""
    shape = read_architecture(base)
    like, generator = meta_tensors(shape), torch.Generator().manual_seed(0)
    modules = target_modules(lora, shape)
    tensors = {"metaqueries.weight": torch.randn(4, 32, generator=generator)}
    for module in modules:
        out, inner = like[f"{module}.weight"].shape
        a, b = adapter_parts(module, dora=False)
        tensors[f"model.{a}"] = torch.randn(lora.rank, inner, generator=generator)
        tensors[f"model.{b}"] = torch.randn(out, lora.rank, generator=generator)
    folder.mkdir()
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    digest = base_hash(modules, WeightsFile(base).digest)
    write_adapter(folder, lora, shapes, tensors.__getitem__, str(base), digest)
    return AdapterFolder(folder, shape, "--adapter")


def packed(source: AdapterFolder, folder: Path) -> Path:
    folder.mkdir()
    write_packed_adapter(source, folder)
    (folder / "uno.safetensors").write_bytes((source.folder / "uno.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("alpha", "rslora", "targets"),
    [
        (6.0, False, "mlp_moe_gen"),
        (0.3, True, "mlp_moe_gen"),
        (5.0, False, "layers.1.mlp_moe_gen.(gate|up)"),
        (5.0, False, "mlp_moe_gen.down"),
    ],
)
def test_packing_unpacking_and_packing_again_is_the_identity(
    base: Path, tmp_path: Path, alpha: float, rslora: bool, targets: str
):
    lora = LoraSettings(rank=3, alpha=alpha, rslora=rslora, targets=[targets])
    source = plain(base, tmp_path / "plain", lora)
    folder = packed(source, tmp_path / "packed")
    back = AdapterFolder(folder, read_architecture(base), "--adapter")
    assert (back.settings.rank, back.settings.alpha, back.settings.rslora) == (3, alpha, rslora)
    assert back.modules == source.modules and back.beside == source.beside
    for module in source.modules:
        for part in adapter_parts(module, dora=False):
            ours = back.read(f"model.{part}")
            assert torch.equal(ours, source.read(f"model.{part}")), part
    again = packed(back, tmp_path / "again")
    for name in FILES:
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_packed_adapter_merges_to_the_same_weights_and_belongs_to_its_base(
    base: Path, tmp_path: Path
):
    source = plain(base, tmp_path / "plain", LoraSettings(rank=4, targets=["mlp_moe_gen"]))
    folder = packed(source, tmp_path / "packed")
    ours, theirs = (
        open_model(base, adapters=[(path, 1.0)]).model.state_dict()
        for path in (folder, source.folder)
    )
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    other = random_base(tmp_path / "other", hidden=32, mlp=64, layers=2)
    weights = load_file(other / "ema.safetensors")
    weights["language_model.model.layers.0.mlp_moe_gen.down_proj.weight"] += 1
    save_file(weights, other / "ema.safetensors")
    with pytest.raises(SettingsError, match="--adapter: .* was trained on another base"):
        open_model(other, adapters=[(folder, 1.0)])


def spoil(folder: Path, change: Callable[[dict, dict], None]) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_that_another_program_trained_packed_is_read_with_its_own_rank(
    base: Path, tmp_path: Path
):
    """Gate and up then have A in common, and nothing of B is 0."""
    source = plain(base, tmp_path / "plain", LoraSettings(rank=4, targets=["mlp_moe_gen"]))

    def train(config: dict, tensors: dict) -> None:
        del config["uno_ds"]
        for number, name in enumerate(tensors):
            generator = torch.Generator().manual_seed(number)
            tensors[name] = torch.randn(tensors[name].shape, generator=generator)

    folder = spoil(packed(source, tmp_path / "packed"), train)
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    back = AdapterFolder(folder, read_architecture(base), "--adapter")
    assert back.settings.rank == 8 and back.modules == source.modules
    path = "base_model.model.bagel.language_model.model.layers.0.mlp_moe_gen."
    for projections in (("gate_proj", "up_proj"), ("down_proj",)):
        name = "gate_up_proj" if len(projections) > 1 else "down_proj"
        a, b = (tensors[f"{path}{name}.lora_{half}.weight"] for half in "AB")
        parts = [
            back.adapted(f"layers.0.gen.{projection}").change(torch.zeros(1))
            for projection in projections
        ]
        expected = config["lora_alpha"] / config["r"] * b @ a
        torch.testing.assert_close(torch.cat(parts), expected)


@pytest.mark.parametrize(
    ("name", "place"), [("gate_up_proj.lora_B", (0, -1)), ("down_proj.lora_A", (-1, 0))]
)
def test_one_that_was_changed_since_it_was_packed_is_refused_in_one_line(
    base: Path, tmp_path: Path, name: str, place: tuple[int, int]
):
    source = plain(base, tmp_path / "plain", LoraSettings(rank=4, targets=["mlp_moe_gen"]))

    def change(config: dict, tensors: dict) -> None:
        first = next(one for one in tensors if name in one)
        tensors[first][place] = 1.0

    folder = spoil(packed(source, tmp_path / "packed"), change)
    with pytest.raises(SettingsError) as raised:
        open_model(base, adapters=[(folder, 1.0)])
    text = str(raised.value)
    assert text.startswith(f"--adapter: {folder / FILES[0]}: cannot be split: ")
    assert name in text and "\n" not in text
