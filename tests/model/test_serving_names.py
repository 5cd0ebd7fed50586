"""Exported folders have the files and names that serving engines look for.

tests/goldens/serving/ records what a published package opens and binds, as read from its wheel; the
packages themselves are not needed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import random_base

from uno_ds.model.adapter_files import (
    AdapterFolder,
    adapter_parts,
    write_adapter,
    write_packed_adapter,
)
from uno_ds.model.adapters import LoraSettings, target_modules
from uno_ds.model.architecture import Architecture, read_architecture
from uno_ds.model.base_folder import import_base
from uno_ds.model.weights import bagel_name, meta_tensors
from uno_ds.settings import SettingsError

RECORDED = Path(__file__).parents[1] / "goldens/serving/vllm_omni.json"
RANK = 4


def test_the_documentation_names_each_package_that_was_read_and_what_it_can_load():
    text = (Path(__file__).parents[2] / "docs/adapters.md").read_text()
    files = sorted(RECORDED.parent.glob("*.json"))
    assert [file.stem for file in files] == ["sglang", "vllm_omni"]
    for file in files:
        read = json.loads(file.read_text())
        (row,) = (line for line in text.splitlines() if line.startswith(f"| {read['title']} "))
        assert row.startswith(f"| {read['title']} {read['version']} |")
        names = read.get("files_opened") or read["naming_bagel"]
        assert ("no code for BAGEL" in row) == (not names)


@pytest.fixture(scope="module")
def engine() -> dict[str, Any]:
    return json.loads(RECORDED.read_text())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written from a base as old ones are, with the files only that this program needs."""
    base = random_base(tmp_path_factory.mktemp("base"))
    out = tmp_path_factory.mktemp("out") / "model"
    assert not (base / "preprocessor_config.json").exists()
    import_base(base, out)
    return out


def test_the_folder_has_every_file_and_key_that_is_opened(exported: Path, engine: dict[str, Any]):
    assert not [name for name in engine["files_opened"] if not (exported / name).is_file()]
    config = json.loads((exported / "config.json").read_text())
    assert set(engine["keys_read"]["config.json"]) <= config.keys()
    assert {key: config[key] for key in engine["recognised_by"]} == engine["recognised_by"]
    for part in ("llm_config", "vit_config"):
        assert config[part] == json.loads((exported / f"{part}.json").read_text())
    assert set(engine["keys_read"]["vae_config"]) <= config["vae_config"].keys()
    vision = json.loads((exported / "vit_config.json").read_text())
    processor = json.loads((exported / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": vision["image_size"], "width": vision["image_size"]}


def test_a_base_without_config_json_gets_one_of_the_shape_of_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from uno_ds.model import base_folder

    base = random_base(tmp_path / "base")
    shape = read_architecture(base)
    (base / "config.json").unlink()
    target = tmp_path / "out"
    target.mkdir()
    base_folder.copy_companions(target, shape, base, base)
    assert read_architecture(target) == shape


def test_a_config_json_without_what_engines_recognise_gets_it_and_keeps_its_own_values(
    tmp_path: Path, engine: dict[str, Any]
):
    """As the bases that earlier versions wrote."""
    base = random_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    for key in (*engine["recognised_by"], "llm_config", "vit_config"):
        del config[key]
    config["model_type"] = "of its own"
    (base / "config.json").write_text(json.dumps(config))
    import_base(base, tmp_path / "out")
    completed = json.loads((tmp_path / "out/config.json").read_text())
    assert completed | config == completed and completed["model_type"] == "of its own"
    assert completed["architectures"] == engine["recognised_by"]["architectures"]
    assert completed["llm_config"] and completed["vit_config"]


def test_every_weight_is_one_that_is_looked_for(exported: Path, engine: dict[str, Any]):
    names = load_file(exported / "ema.safetensors").keys()
    assert not [name for name in names if not name.startswith(tuple(engine["weight_prefixes"]))]
    layer = "language_model.model.layers.1."
    inside = {name.removeprefix(layer) for name in names if name.startswith(layer)}
    projections = {
        name.rpartition(".")[0] for name in inside if "proj" in name and name.endswith("weight")
    }
    assert projections == set(engine["projections_of_a_layer"])
    for prefix in engine["weight_prefixes"]:
        assert any(name.startswith(prefix) for name in names), prefix


def adapter_of(folder: Path, shape: Architecture, **settings: Any) -> AdapterFolder:
    """With random values."""
    lora = LoraSettings(rank=RANK, alpha=6.0, **settings)
    like, generator = meta_tensors(shape), torch.Generator().manual_seed(0)
    tensors = {}
    for module in target_modules(lora, shape):
        out, inner = like[f"{module}.weight"].shape
        a, b = adapter_parts(module, dora=False)
        tensors[f"model.{a}"] = torch.randn(RANK, inner, generator=generator)
        tensors[f"model.{b}"] = torch.randn(out, RANK, generator=generator)
    folder.mkdir()
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    write_adapter(folder, lora, shapes, tensors.__getitem__, "base", "0")
    return AdapterFolder(folder, shape, "--adapter")


def test_a_packed_adapter_binds_and_changes_the_same_weights(
    exported: Path, tmp_path: Path, engine: dict[str, Any]
):
    shape = read_architecture(exported)
    source = adapter_of(tmp_path / "plain", shape, targets=["mlp_moe_gen"])
    out = tmp_path / "packed"
    out.mkdir()
    write_packed_adapter(source, out)
    config = json.loads((out / "adapter_config.json").read_text())
    tensors = load_file(out / "adapter_model.safetensors")
    bound = engine["adapter_modules_of_the_generation_expert"]
    expected = {
        f"{engine['adapter_prefix']}{number}.{module}.lora_{half}.weight"
        for number in range(shape.layers)
        for module in bound
        for half in "AB"
    }
    assert tensors.keys() == expected
    assert sorted(config["target_modules"]) == sorted(bound)
    assert (config["r"], config["lora_alpha"] / config["r"]) == (2 * RANK, 6 / RANK)
    for number in range(shape.layers):
        start = f"{engine['adapter_prefix']}{number}.mlp_moe_gen."

        def change(module: str, start: str = start) -> torch.Tensor:
            a, b = (tensors[f"{start}{module}.lora_{half}.weight"] for half in "AB")
            assert len(a) == b.shape[1] == config["r"]
            return config["lora_alpha"] / config["r"] * b @ a

        parts = [
            source.adapted(f"layers.{number}.gen.{name}").change(torch.zeros(1))
            for name in ("gate_proj", "up_proj")
        ]
        torch.testing.assert_close(change("gate_up_proj"), torch.cat(parts))
        down = source.adapted(f"layers.{number}.gen.down_proj").change(torch.zeros(1))
        torch.testing.assert_close(change("down_proj"), down)


def test_an_adapter_that_the_engine_cannot_hold_is_refused_in_one_line(
    exported: Path, tmp_path: Path, engine: dict[str, Any]
):
    shape = read_architecture(exported)
    source = adapter_of(tmp_path / "attention", shape)
    with pytest.raises(SettingsError) as raised:
        write_packed_adapter(source, tmp_path)
    name = bagel_name("layers.0.gen.q_proj.weight")
    assert str(raised.value) == (
        f"--packed: vLLM-Omni has no place for an adapter with {name}: train with "
        "lora.targets=[mlp_moe_gen], or export the merged model."
    )
    assert not any(
        "q_proj" in module for module in engine["adapter_modules_of_the_generation_expert"]
    )
    half = adapter_of(tmp_path / "half", shape, targets=["mlp_moe_gen.up_proj"])
    with pytest.raises(SettingsError, match="needs adapters on gate_proj and up_proj of a layer"):
        write_packed_adapter(half, tmp_path)
