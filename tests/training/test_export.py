"""Models out of checkpoints and in from other layouts: the right tensors, whole or absent, and
every mistake one line."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import KINDS, trained_tensors, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import ARCHITECTURE, picture, random_base

from uno_ds.commands import sample
from uno_ds.commands.weights import main
from uno_ds.generation.inference_model import open_model
from uno_ds.model import tensor_file
from uno_ds.model.architecture import Architecture
from uno_ds.model.weights import WeightsFile, bagel_name, check_base_folder, meta_tensors
from uno_ds.settings import SettingsError, build
from uno_ds.training.checkpoint_file import CheckpointTensors, open_checkpoint

TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return random_base(tmp_path / "base")


@pytest.fixture
def trained() -> dict[str, dict[str, torch.Tensor]]:
    return trained_tensors()


@pytest.fixture
def run(tmp_path: Path, base: Path, trained: dict[str, dict[str, torch.Tensor]]) -> Path:
    write_checkpoint(tmp_path / "run", base, trained)
    return tmp_path / "run"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("ema*.safetensors")
        for name, tensor in load_file(file).items()
    }


def hashes(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
    }


def refused(capsys: pytest.CaptureFixture, *arguments: str | Path) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    return error


@pytest.mark.parametrize(("flags", "kind"), [((), "weight"), (("--ema",), "average")])
def test_an_export_holds_trained_tensors_of_the_checkpoint_and_frozen_ones_of_the_base(
    run: Path, base: Path, tmp_path: Path, trained, flags, kind
):
    assert main(["export", str(run), str(tmp_path / "out"), *flags]) == 0
    before, after = load_file(base / "ema.safetensors"), weights_of(tmp_path / "out")
    assert set(after) == {
        bagel_name(name) for name in meta_tensors(build(Architecture, ARCHITECTURE))
    } and set(after) == {*before, *TABLES}
    for name in meta_tensors(build(Architecture, ARCHITECTURE)):
        ours = after[bagel_name(name)]
        expected = trained[kind].get(f"model.{name}", before.get(bagel_name(name)))
        assert ours.dtype == torch.bfloat16
        if bagel_name(name) not in TABLES:
            assert torch.equal(ours, expected.bfloat16()), name
    extra = load_file(tmp_path / "out" / "uno.safetensors")
    assert set(extra) == {"metaqueries.weight", "regression.weight"}
    assert all(
        torch.equal(tensor, trained[kind][name].bfloat16()) for name, tensor in extra.items()
    )
    check_base_folder(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        base / "tokenizer.json"
    ).read_bytes()
    written = open_model(tmp_path / "out").model.layers[1].gen.down_proj.weight
    assert torch.equal(
        written, trained[kind]["model.layers.1.gen.down_proj.weight"].bfloat16().float()
    )


def test_a_checkpoint_is_named_by_its_folder_by_latest_or_by_its_run(
    run: Path, base: Path, tmp_path: Path, trained, capsys
):
    other = {
        kind: {name: tensor + 1 for name, tensor in tensors.items()}
        for kind, tensors in trained.items()
    }
    write_checkpoint(run, base, other, step=9)
    for number, (name, step) in enumerate(
        [("checkpoints/step_7", 7), ("checkpoints/step_9", 9), ("checkpoints/latest", 9), (".", 9)]
    ):
        assert main(["export", str(run / name), str(tmp_path / str(number))]) == 0
        assert f"weights after step {step}" in capsys.readouterr().out
    assert (
        hashes(tmp_path / "1")
        == hashes(tmp_path / "2")
        == hashes(tmp_path / "3")
        != hashes(tmp_path / "0")
    )


@pytest.mark.parametrize("flags, kind", [([], "average"), (["--no-ema"], "weight")])
def test_a_checkpoint_is_sampled_as_it_is_without_an_export(
    run: Path, base: Path, tmp_path: Path, trained, flags, kind, monkeypatch, capsys
):
    opened = []
    monkeypatch.setattr(
        sample, "generate", lambda model, *rest: opened.append(model) or [picture()]
    )
    assert (
        sample.main(
            [
                "generate",
                "--checkpoint",
                str(run),
                "--prompt",
                "x",
                "--out",
                str(tmp_path / "out"),
                *flags,
            ]
        )
        == 0
    )
    parameters, frozen = dict(opened[0].named_parameters()), WeightsFile(base)
    for name, parameter in parameters.items():
        expected = trained[kind].get(f"model.{name}")
        assert torch.equal(
            parameter, frozen.read(bagel_name(name)).float() if expected is None else expected
        ), name
    shutil.move(base, tmp_path / "moved")
    assert (
        sample.main(
            ["generate", "--checkpoint", str(run), "--prompt", "x", "--out", str(tmp_path / "new")]
        )
        == 2
    )
    assert str(base) in capsys.readouterr().err
    assert (
        sample.main(
            [
                "generate",
                "--checkpoint",
                str(run),
                "--base",
                str(tmp_path / "moved"),
                "--prompt",
                "x",
                "--out",
                str(tmp_path / "new"),
            ]
        )
        == 0
    )


def test_pieces_give_whole_tensors_and_any_part_of_them(run: Path, trained):
    tensors = CheckpointTensors(*open_checkpoint(run, "run"))
    for kind in KINDS:
        for name, expected in trained[kind].items():
            assert torch.equal(tensors.read(kind, name), expected)
            start, count = expected.numel() // 5, expected.numel() // 2
            assert torch.equal(
                tensors.read_flat(kind, name, start, count),
                expected.flatten()[start : start + count],
            )


def test_shards_are_within_their_size_and_read_like_one_file(run: Path, tmp_path: Path):
    limit = 20_000
    assert main(["export", str(run), str(tmp_path / "one")]) == 0
    assert main(["export", str(run), str(tmp_path / "many"), "--shard-size", str(limit / 1e9)]) == 0
    index = json.loads((tmp_path / "many" / "ema.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "many").glob("ema-*.safetensors"))
    assert (
        len(files) > 2
        and files[0] == f"ema-00001-of-{len(files):05}.safetensors"
        and not (tmp_path / "many" / "ema.safetensors").exists()
    )
    total = 0
    for file in files:
        tensors = load_file(tmp_path / "many" / file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= limit or len(tensors) == 1
        assert all(index["weight_map"][name] == file for name in tensors)
        total += size
    assert index["metadata"]["total_size"] == total
    one, many = load_file(tmp_path / "one" / "ema.safetensors"), weights_of(tmp_path / "many")
    assert one.keys() == many.keys() == index["weight_map"].keys() and all(
        torch.equal(tensor, many[name]) for name, tensor in one.items()
    )
    read = WeightsFile(tmp_path / "many")
    assert all(torch.equal(read.read(name), tensor) for name, tensor in one.items())
    one, many = (open_model(tmp_path / name).model.parameters() for name in ("one", "many"))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(one, many, strict=True))
    with safe_open(tmp_path / "one" / "ema.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("size", ["5", "0.00002"])
def test_importing_an_export_gives_the_same_bytes(run: Path, tmp_path: Path, size: str):
    assert main(["export", str(run), str(tmp_path / "out"), "--shard-size", size]) == 0
    assert (
        main(["import", str(tmp_path / "out"), str(tmp_path / "again"), "--shard-size", size]) == 0
    )
    exported = {
        name: digest
        for name, digest in hashes(tmp_path / "out").items()
        if name != "uno.safetensors"
    }
    assert exported == hashes(tmp_path / "again")


def test_any_layout_of_a_source_becomes_the_same_base(base: Path, tmp_path: Path):
    """fp32, in two files, the patch embedding as a convolution, without position tables: against
    the plain folder."""
    tensors = {name: tensor.float() for name, tensor in load_file(base / "ema.safetensors").items()}
    name = "vit_model.vision_model.embeddings.patch_embedding.weight"
    matrix = tensors[name]
    convolution, side = torch.empty(matrix.shape[0], 3, 8, 8), 8
    for row in range(side):
        for column in range(side):
            for channel in range(3):
                convolution[:, channel, row, column] = matrix[
                    :, (row * side + column) * 3 + channel
                ]
    tensors[name] = convolution
    source = tmp_path / "source"
    shutil.copytree(base, source, ignore=shutil.ignore_patterns("*.safetensors"))
    halves, names = {"a.safetensors": {}, "b.safetensors": {}}, sorted(tensors)
    for number, key in enumerate(names):
        halves["ab"[number % 2] + ".safetensors"][key] = tensors[key]
    for file, half in halves.items():
        save_file(half, source / file)
    (source / "ema.safetensors.index.json").write_text(
        json.dumps({"weight_map": {key: file for file, half in halves.items() for key in half}})
    )
    for given, out in ((source, "from_layout"), (base, "plain")):
        assert main(["import", str(given), str(tmp_path / out)]) == 0
    assert hashes(tmp_path / "from_layout") == hashes(tmp_path / "plain")
    assert torch.equal(load_file(tmp_path / "plain" / "ema.safetensors")[name], matrix.bfloat16())


def test_a_base_that_moved_or_changed_is_one_line_that_names_it_and_nothing_is_written(
    run: Path, base: Path, tmp_path: Path, capsys
):
    base.rename(tmp_path / "moved")
    assert f"{base}: does not exist" in refused(capsys, "export", run, tmp_path / "out")
    assert (
        main(["export", str(run), str(tmp_path / "found"), "--base", str(tmp_path / "moved")]) == 0
    )
    tensors = load_file(tmp_path / "moved" / "ema.safetensors")
    tensors["connector.fc2.bias"][3] += 1
    save_file(tensors, tmp_path / "moved" / "ema.safetensors")
    line = refused(capsys, "export", run, tmp_path / "out", "--base", tmp_path / "moved")
    assert str(tmp_path / "moved") in line and "connector.fc2.bias differs" in line
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [("byte", "its hash differs"), ("cut", "bytes instead of"), ("gone", "is missing")],
)
def test_a_damaged_checkpoint_is_one_line_that_names_the_file(
    run: Path, tmp_path: Path, capsys, damage: str, words: str
):
    file = run / "checkpoints" / "step_7" / "rank_00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.unlink()
    if damage != "gone":
        file.write_bytes(content if damage == "byte" else content[:-8])
    line = refused(capsys, "export", run, tmp_path / "out")
    assert str(file) in line and words in line and not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(run: Path, base: Path, tmp_path: Path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for arguments in (("export", run), ("import", base)):
        assert f"{tmp_path / 'full'}: exists and is not an empty folder" in refused(
            capsys, *arguments, tmp_path / "full"
        )
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    assert main(["export", str(run), str(tmp_path / "empty")]) == 0


def test_a_full_disk_is_one_line_and_leaves_no_folder_that_looks_whole(
    run: Path, tmp_path: Path, capsys, monkeypatch
):
    kept, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        kept(descriptor)

    monkeypatch.setattr(tensor_file.os, "fsync", full)
    line = refused(capsys, "export", run, tmp_path / "out", "--shard-size", "0.00002")
    assert "cannot be written: No space left on device" in line and "ema-00002" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_a_checkpoint_and_what_lies_beside_a_model_are_described_for_what_they_are(
    run: Path, tmp_path: Path, capsys
):
    for path in (run, run / "checkpoints" / "latest", run / "checkpoints" / "step_7"):
        assert main(["inspect", str(path)]) == 0
        output = capsys.readouterr().out
        assert (
            "step 7, written by 3 rank(s) under ZeRO stage 3" in output
            and "moving average over 7 updates" in output
        )
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    save_file({"decoder.conv_in.weight": torch.zeros(3)}, tmp_path / "out" / "ae.safetensors")
    assert main(["inspect", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert "unexpected: 0" in output and "metaqueries" not in output and "1 file(s)" in output


def test_everything_that_a_base_lacks_is_named_in_one_line(base: Path):
    check_base_folder(base)
    interface = json.loads((base / "config.json").read_text())
    del interface["vae_config"]["codec"]
    (base / "config.json").write_text(json.dumps(interface))
    for file in ("llm_config.json", "vit_config.json", "ema.safetensors", "tokenizer.json"):
        (base / file).unlink()
    with pytest.raises(SettingsError) as error:
        check_base_folder(base)
    assert error.value.key == "model.base"
    for name in (
        str(base),
        "llm_config.json",
        "vit_config.json",
        "ema.safetensors",
        "tokenizer.json",
        "ae.safetensors",
    ):
        assert name in str(error.value)
    with pytest.raises(SettingsError) as error:
        check_base_folder(base, tokenizer=False)
    assert "tokenizer" not in str(error.value)
    with pytest.raises(SettingsError, match="is not a folder"):
        check_base_folder(base / "nowhere")


def test_a_base_without_one_of_its_shards_or_with_misshaped_tensors_names_them(
    base: Path, tmp_path: Path
):
    assert main(["import", str(base), str(tmp_path / "many"), "--shard-size", "0.00002"]) == 0
    for number in (2, 4):
        next((tmp_path / "many").glob(f"ema-{number:05}-*")).unlink()
    with pytest.raises(SettingsError, match="lacks ema-00002-of-.*, ema-00004-of-"):
        check_base_folder(tmp_path / "many")
    tensors = load_file(base / "ema.safetensors")
    tensors["llm2vae.bias"] = torch.zeros(7)
    del tensors["vae2llm.bias"]
    save_file(tensors, base / "ema.safetensors")
    with pytest.raises(
        SettingsError,
        match=r"vae2llm.bias is missing; llm2vae.bias has shape \[7\] instead of \[48\]",
    ):
        check_base_folder(base)
