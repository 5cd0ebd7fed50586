"""An adapter folder is read back as it was written, and refused in one line where it does not
fit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import random_base

from uno_ds.generation.inference_model import open_model
from uno_ds.model.adapter_files import (
    Adapted,
    AdapterFolder,
    adapter_parts,
    base_hash,
    write_adapter,
)
from uno_ds.model.adapter_merging import merge_adapters, open_merged, read_share
from uno_ds.model.adapters import LoraSettings, generation_projections
from uno_ds.model.architecture import read_architecture
from uno_ds.model.regression_metadata import identity_in
from uno_ds.model.weights import WeightsFile, meta_tensors
from uno_ds.settings import SettingsError

SETTINGS = LoraSettings(rank=4, alpha=6.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tensors(base: Path) -> dict[str, torch.Tensor]:
    """What a run with adapters trains, by the objective's names, with random values."""
    shape = read_architecture(base)
    like = meta_tensors(shape)
    shapes = {"model.vae2llm.bias": like["vae2llm.bias"].shape, "metaqueries.weight": (4, 32)}
    for module in generation_projections(shape.layers):
        out, inner = like[f"{module}.weight"].shape
        a, b = adapter_parts(module, dora=False)
        shapes |= {f"model.{a}": (4, inner), f"model.{b}": (out, 4)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, generator=generator) for name, size in shapes.items()}


@pytest.fixture(scope="module")
def adapter(
    base: Path, tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    modules = generation_projections(read_architecture(base).layers)
    hash_of_base = base_hash(modules, WeightsFile(base).digest)
    write_adapter(folder, SETTINGS, shapes, tensors.__getitem__, str(base), hash_of_base)
    return folder


def test_what_is_written_is_read_back_bit_for_bit(
    base: Path, adapter: Path, tensors: dict[str, torch.Tensor]
):
    folder = AdapterFolder(adapter, read_architecture(base), "--adapter")
    folder.check_base(WeightsFile(base).digest)
    assert folder.modules == generation_projections(2)
    assert (folder.settings.rank, folder.settings.scaling) == (4, 1.5)
    assert folder.beside.keys() == {"model.vae2llm.bias", "metaqueries.weight"}
    for name, tensor in tensors.items():
        assert torch.equal(folder.read(name), tensor), name


def test_the_folder_and_what_is_merged_from_it_say_what_metaqueries_were_trained_for(
    base: Path, adapter: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
):
    identity = {"grids": [2, 1], "target": "hog"}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    modules = generation_projections(read_architecture(base).layers)
    hash_of_base = base_hash(modules, WeightsFile(base).digest)
    folder = tmp_path / "adapter"
    folder.mkdir()
    given = (SETTINGS, shapes, tensors.__getitem__, str(base), hash_of_base)
    write_adapter(folder, *given, identity)
    assert identity_in(folder) == identity and identity_in(adapter) == {}
    merge_adapters(base, tmp_path / "merged", [(folder, 1.0)])
    assert identity_in(tmp_path / "merged") == identity


def test_the_change_of_a_weight_is_scaled_b_a_and_with_dora_keeps_the_magnitude():
    generator = torch.Generator().manual_seed(1)
    weight, a, b = (torch.randn(size, generator=generator) for size in ((6, 8), (2, 8), (6, 2)))
    plain = Adapted(a, b, 1.5).change(weight)
    torch.testing.assert_close(plain, 1.5 * b @ a)
    magnitude = torch.rand(6, generator=generator) + 0.5
    moved = weight + Adapted(a, b, 1.5, magnitude).change(weight)
    torch.testing.assert_close(moved.norm(dim=1), magnitude)
    direction = weight + plain
    expected = direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(moved / moved.norm(dim=1, keepdim=True), expected)


def test_one_adapter_gives_what_trained_in_full_to_the_bit_and_shares_are_parts_of_it(
    base: Path, adapter: Path, tensors: dict[str, torch.Tensor]
):
    weights, shape, trained = WeightsFile(base), read_architecture(base), "vae2llm.bias"
    before, after = weights.read(trained).float(), tensors[f"model.{trained}"]
    # Otherwise base + (trained - base) would be the trained tensor to the bit, too.
    assert not torch.equal(before + (after - before), after)
    assert torch.equal(open_merged(weights, shape, [(adapter, 1.0)]).read(trained), after)
    shared = open_merged(weights, shape, [(adapter, 0.25), (adapter, 0.5)]).read(trained)
    torch.testing.assert_close(shared, 0.25 * before + 0.75 * after)


def test_a_share_follows_the_folder(tmp_path: Path):
    assert read_share("runs/a") == (Path("runs/a"), 1.0)
    assert read_share("runs/a:0.25") == (Path("runs/a"), 0.25)
    odd = tmp_path / "name:with:colons"
    odd.mkdir()
    assert read_share(str(odd)) == (odd, 1.0)
    for text in ("runs/a:half", "runs/a:nan"):
        with pytest.raises(SettingsError, match="--adapter: expects DIR or DIR:SHARE, got"):
            read_share(text)


def spoiled(adapter: Path, folder: Path, change: Callable[[dict, dict], None]) -> Path:
    """A copy of the adapter whose configuration and tensors were changed."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(config, tensors)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _another_base(config: dict, tensors: dict) -> None:
    config["uno_ds"]["hash_of_base"] = "0" * 32


def _another_shape(config: dict, tensors: dict) -> None:
    name = next(name for name in tensors if name.endswith("q_proj_moe_gen.lora_A.weight"))
    tensors[name] = tensors[name][:, :-1].contiguous()


def _of_understanding(config: dict, tensors: dict) -> None:
    name = next(iter(tensors))
    tensors[name.replace("_moe_gen", "")] = tensors.pop(name)


def _rank_0(config: dict, tensors: dict) -> None:
    config["r"] = 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_another_base, "was trained on another base: the hash of the weights that it adapts"),
        (_another_shape, "has shape [4, 31] instead of [4, 32]"),
        (_of_understanding, "adapts no projection of the generation expert"),
        (_rank_0, "adapter_config.json: rank: must be at least 1, got 0."),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(
    base: Path, adapter: Path, tmp_path: Path, change: Callable, message: str
):
    folder = spoiled(adapter, tmp_path / "spoiled", change)
    with pytest.raises(SettingsError) as raised:
        open_model(base, adapters=[(folder, 1.0)])
    text = str(raised.value)
    assert text.startswith("--adapter: ") and message in text and "\n" not in text
