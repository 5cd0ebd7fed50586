"""What a base may hold: every command that reads one refuses, in one line that names the tensor,
whatever would train or draw garbage; and what is written is what the public BAGEL code opens.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_runs import ARCHITECTURE, random_base, t2i_row, tree, write_t2i

from uno_ds.commands import sample, train, weights
from uno_ds.data.text import Tokenizer
from uno_ds.model import weights as model_weights
from uno_ds.model.architecture import Architecture, read_architecture
from uno_ds.model.bagel import Bagel
from uno_ds.model.flux import (
    FLUX_CONFIG,
    check_flux_weights,
    empty_autoencoder,
    flux_name,
    load_flux,
)
from uno_ds.model.weights import WeightsFile, meta_tensors, write_weights
from uno_ds.settings import SettingsError, build

PROJECTION = "language_model.model.layers.0.self_attn.q_proj.weight"
GENERATION = "language_model.model.layers.1.mlp_moe_gen.up_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return random_base(tmp_path / "base")


def rewrite(base: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(base / "ema.safetensors")
    change(tensors)
    save_file(tensors, base / "ema.safetensors")


def recipe_over(base: Path, folder: Path) -> Path:
    write_t2i(folder / "t2i" / "a.parquet", [t2i_row()])
    plain = tree(folder, [folder / "t2i"], model={"base": str(base)})
    del plain["model"]["architecture"], plain["model"]["tokenizer"]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def refusals(base: Path, folder: Path, capsys: pytest.CaptureFixture) -> dict[str, str]:
    """{command: the one line with which it ends} of import, dry run and sampling."""
    drawing = ["generate", "--checkpoint", str(base), "--prompt", "x", "--steps", "1"]
    commands = {
        "import": lambda: weights.main(["import", str(base), str(folder / "imported")]),
        "dry run": lambda: train.main(["--recipe", str(recipe_over(base, folder)), "--dry-run"]),
        "sample": lambda: sample.main([*drawing, "--out", str(folder / "drawn")]),
    }
    lines = {}
    for name, command in commands.items():
        capsys.readouterr()
        assert command() == 2, name
        lines[name] = capsys.readouterr().err.strip()
        assert lines[name].startswith("error: ") and "\n" not in lines[name]
        assert len(lines[name]) < 1200 and str(base) in lines[name]
    assert not (folder / "imported").exists() and not list((folder / "drawn").glob("*.png"))
    return lines


def as_fp8_with_scales(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1)


def as_int8_with_scales(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[name] = (tensors[name].float() * 100).to(torch.int8)
        tensors[name.replace("weight", "SCB")] = torch.ones(1)


def with_adapters(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("_moe_gen.weight")]:
        stem = name.removesuffix(".weight")
        tensors[f"{stem}.lora_A.weight"] = torch.zeros(2, 32)
        tensors[f"{stem}.lora_B.weight"] = torch.zeros(32, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (as_fp8_with_scales, ("is stored as F8_E4M3 (and ", "_proj.weight_scale_inv", "as F32, F")),
        (as_int8_with_scales, ("is stored as I8 (and ", ".SCB", "with its scales applied")),
        (with_adapters, ("unexpected: ", ".lora_A.weight", " more): merge adapters")),
        (
            lambda tensors: tensors.update({PROJECTION: tensors[PROJECTION].to(torch.int32)}),
            (f"{PROJECTION} is stored as I32:",),
        ),
    ],
    ids=["fp8", "int8", "adapters", "one integer tensor"],
)
def test_quantised_weights_and_adapters_are_refused_by_every_command(
    base, tmp_path, capsys, change, words
):
    rewrite(base, change)
    for command, line in refusals(base, tmp_path, capsys).items():
        for word in words:
            assert word in line, (command, line)
    assert weights.main(["inspect", str(base)]) == 1


def test_tensors_that_nothing_depends_on_may_lie_beside_the_weights(base, tmp_path, capsys):
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["language_model.model.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["vit_model.vision_model.embeddings.position_ids"] = torch.arange(16)[None]

    assert weights.main(["import", str(base), str(tmp_path / "plain")]) == 0
    rewrite(base, add)
    assert weights.main(["import", str(base), str(tmp_path / "out")]) == 0
    plain, out = (tmp_path / name / "ema.safetensors" for name in ("plain", "out"))
    assert plain.read_bytes() == out.read_bytes()
    # With the position tables, which import writes.
    recipe = recipe_over(tmp_path / "out", tmp_path)
    assert train.main(["--recipe", str(recipe), "--dry-run"]) == 0
    assert weights.main(["inspect", str(base)]) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_weights_that_are_no_numbers_are_named_by_import_and_sampling(
    base, tmp_path, capsys, value
):
    """3.4e38 is a number in fp32, and infinite in bf16."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name in (PROJECTION, GENERATION):
            tensors[name] = tensors[name].float()
            tensors[name].view(-1)[-2:] = value

    rewrite(base, spoil)
    out = tmp_path / "out"
    assert weights.main(["import", str(base), str(out)]) == 2
    line = capsys.readouterr().err.strip()
    assert f"{PROJECTION} (2)" in line and f"{GENERATION} (2)" in line
    assert "--allow-nonfinite" in line and "\n" not in line and not out.exists()
    drawing = ["generate", "--checkpoint", str(base), "--prompt", "x", "--steps", "1"]
    assert sample.main([*drawing, "--out", str(tmp_path / "drawn")]) == 2
    assert f"NaN or infinite values in {PROJECTION} (2)" in capsys.readouterr().err
    assert weights.main(["import", str(base), str(out), "--allow-nonfinite"]) == 0
    assert f"{PROJECTION} (2)" in capsys.readouterr().err and out.exists()


def test_reading_a_part_looks_at_that_part_alone(base):
    rewrite(base, lambda tensors: tensors[PROJECTION].view(-1)[-1:].fill_(float("nan")))
    assert WeightsFile(base).read_flat(PROJECTION, 0, 1023).isfinite().all()
    with pytest.raises(SettingsError, match=f"NaN or infinite values in {PROJECTION} \\(1\\)"):
        WeightsFile(base).read_flat(PROJECTION, 1000, 24)


def test_an_autoencoder_of_integers_or_nan_is_refused(tmp_path):
    config = tmp_path / "config"
    shutil.copytree(FLUX_CONFIG, config)
    settings = json.loads((config / "config.json").read_text())
    settings |= {"block_out_channels": [32] * 4, "layers_per_block": 1}
    (config / "config.json").write_text(json.dumps(settings))
    tensors = {
        flux_name(name): torch.zeros(parameter.shape)
        for name, parameter in empty_autoencoder(config).named_parameters()
    }
    name = "decoder.conv_in.weight"
    for spoilt, words in (
        (tensors[name].int(), f"{name} is stored as I32"),
        (tensors[name] / 0, f"NaN or infinite values in {name}"),
    ):
        save_file(tensors | {name: spoilt}, tmp_path / "ae.safetensors")
        with pytest.raises(SettingsError, match=words):
            check_flux_weights(tmp_path, config)
            load_flux(tmp_path, "cpu", torch.float32, config)


def test_a_name_in_two_files_or_twice_in_the_index_is_refused(base, tmp_path, capsys):
    many = tmp_path / "many"
    assert weights.main(["import", str(base), str(many), "--shard-size", "0.00002"]) == 0
    capsys.readouterr()
    index = many / "ema.safetensors.index.json"
    text = index.read_text()
    index.write_text(
        text.replace('"weight_map": {', '"weight_map": {"llm2vae.bias": "ema-00001.x",')
    )
    for line in refusals(many, tmp_path / "1", capsys).values():
        assert "the name 'llm2vae.bias' occurs twice" in line and index.name in line
    index.write_text(text)
    first, second = sorted(many.glob("ema-*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: torch.zeros(3)}, second)
    for line in refusals(many, tmp_path / "2", capsys).values():
        assert f"{name} occurs twice, in {first.name} and in {second.name}" in line


def test_an_index_that_does_not_say_where_the_weights_are_is_refused(base, tmp_path, capsys):
    many = tmp_path / "many"
    assert weights.main(["import", str(base), str(many), "--shard-size", "0.00002"]) == 0
    capsys.readouterr()
    shutil.copy(base / "ema.safetensors", many)
    for line in refusals(many, tmp_path / "1", capsys).values():
        assert "holds ema.safetensors and an index of other files" in line
    (many / "ema.safetensors").unlink()
    path = many / "ema.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["llm2vae.bias"] = next(
        file for file in files if file != index["weight_map"]["llm2vae.bias"]
    )
    path.write_text(json.dumps(index))
    for line in refusals(many, tmp_path / "2", capsys).values():
        assert "lists llm2vae.bias in " in line


def test_a_model_of_any_size_is_written_as_the_one_file_that_the_public_code_opens(
    tmp_path, monkeypatch
):
    """Of the published size, 29 GB: nothing is written, the names of the files and their tensors
    are noted.
    """
    written = {}
    monkeypatch.setattr(
        model_weights,
        "write_tensors",
        lambda path, specs, tensors, metadata: written.update({path.name: list(specs)}),
    )
    like = meta_tensors(
        read_architecture(Path(model_weights.__file__).parent.parent / "recipes/bagel_7b")
    )
    assert sum(tensor.numel() for tensor in like.values()) * 2 > 29e9
    write_weights(tmp_path, like, like.__getitem__)
    assert list(written) == ["ema.safetensors"] and len(written["ema.safetensors"]) == len(like)
    written.clear()
    write_weights(tmp_path, like, like.__getitem__, shard_bytes=5e9)
    assert len(written) > 5 and "ema.safetensors" not in written


def test_one_file_is_the_default_and_shards_come_with_a_note(base, tmp_path, capsys):
    assert weights.main(["import", str(base), str(tmp_path / "one")]) == 0
    assert "note" not in capsys.readouterr().out
    many = ["import", str(base), str(tmp_path / "many"), "--shard-size", "0.00002"]
    assert weights.main(many) == 0
    assert "the public BAGEL code opens ema.safetensors by name" in capsys.readouterr().out


def test_a_model_from_scratch_has_the_image_size_that_the_public_code_needs(base, tmp_path):
    vit = json.loads((base / "vit_config.json").read_text())
    assert vit["image_size"] == ARCHITECTURE["vit_side"] * ARCHITECTURE["vit_patch"]
    # As transformers' SiglipVisionEmbeddings counts positions.
    positions = (vit["image_size"] // vit["patch_size"]) ** 2
    stored = load_file(base / "ema.safetensors")
    table = stored["vit_model.vision_model.embeddings.position_embedding.weight"]
    assert table.shape[0] == positions
    shape = read_architecture(base)
    del vit["image_size"]
    (base / "vit_config.json").write_text(json.dumps(vit))
    assert read_architecture(base) == shape == build(Architecture, ARCHITECTURE)
    # What an earlier version made has it when it is written anew.
    assert weights.main(["import", str(base), str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "vit_config.json").read_text())
    assert written == vit | {"image_size": 32}


def test_import_and_sampling_refuse_a_tokenizer_with_more_ids_than_rows(base, tmp_path, capsys):
    path = base / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["zebra"] = 600
    path.write_text(json.dumps(tokenizer))
    for line in refusals(base, tmp_path, capsys).values():
        assert "has 601 tokens, but the model's vocabulary has 512 rows" in line


def test_a_base_of_another_depth_than_its_configuration_says_is_refused_at_once(
    base, tmp_path, capsys, monkeypatch
):
    path = base / "llm_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 900}))
    monkeypatch.setattr(Bagel, "__init__", None)
    for line in refusals(base, tmp_path, capsys).values():
        assert "tensors cannot hold 900 layers" in line


def test_the_packaged_base_is_accepted_as_it_is(capsys):
    tiny = Path(model_weights.__file__).parent.parent / "recipes/tiny_base"
    model_weights.check_base_folder(tiny)
    assert Tokenizer(tiny).warnings() == []
