"""A base with adapters is one more model of a report, in all of its parts."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import KINDS, write_checkpoint
from random_adapter import adapter_tensors, random_adapter
from small_runs import random_base

from uno_ds.commands.inspect_flags import inspect_parser
from uno_ds.commands.inspect_model import Inspection, main
from uno_ds.generation.inference_model import open_model
from uno_ds.inspection.plan import PARTS
from uno_ds.model.adapters import LoraSettings
from uno_ds.training.export import TrainedModel

SIDE = 2
KEY = "base + style x 0.5"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return random_adapter(base.parent / "style", base, SIDE)


def words(base: Path, out: Path, *more: object) -> list[str]:
    flags = ["--checkpoint", base, *more, "--out", out, "--images", 20, "--batch", 8, "--steps", 1]
    flags += ["--t", "0.5", "--scene-prompts", 2, "--max-tokens", 4, "--gradient-images", 2]
    return [str(word) for word in flags]


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """A run that trained adapters, its moving average other than its weights."""
    rank = LoraSettings().rank
    trained = {kind: adapter_tensors(base, SIDE, rank, seed) for seed, kind in enumerate(KINDS)}
    return write_checkpoint(tmp_path / "run", base, trained).parents[1]


def test_every_part_has_the_base_beside_itself_with_the_adapter_and_a_run_with_adapters(
    base: Path, adapter: Path, run: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    others = ("--checkpoint", base, "--adapter", f"{adapter}:0.5", "--checkpoint", run)
    assert main(words(base, tmp_path / "out", *others)) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "out/results.json").read_text())
    for part in PARTS:
        if part != "maps":
            assert set(results[part]) == {"base", KEY, "run"}, part
    assert results["alignment"]["base"]["vit"]["cka"] != results["alignment"][KEY]["vit"]["cka"]
    # Both trained metaqueries, which the base has none of.
    assert "regression" in results["gradients"][KEY]["0.5"]["losses"]
    assert "regression" in results["gradients"]["run"]["0.5"]["losses"]
    assert "regression" not in results["gradients"]["base"]["0.5"]["losses"]
    assert (tmp_path / f"out/figures/metaqueries_{KEY}.png").is_file()
    assert f"{base}, with {adapter}:0.5" in (tmp_path / "out/report.html").read_text()


def test_the_weights_are_those_of_the_merged_model(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags = words(base, tmp_path / "out", "--checkpoint", base, "--adapter", f"{adapter}:0.5")
    found = Inspection(inspect_parser().parse_args(flags))
    merged = open_model(base, adapters=[(adapter, 0.5)]).model
    ours = dict(found._subject(KEY).objective.named_parameters())
    for name, parameter in merged.named_parameters():
        assert torch.equal(ours[f"model.{name}"], parameter), name
    plain = dict(found._subject("base").objective.named_parameters())
    assert not torch.equal(plain["model.vae2llm.bias"], ours["model.vae2llm.bias"])
    assert len(ours["metaqueries.weight"]) == SIDE**2 and "metaqueries.weight" not in plain


def test_the_weights_of_a_run_are_its_average_with_its_adapters_merged_in(
    base: Path, run: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags = words(base, tmp_path / "out", "--checkpoint", run)
    found = Inspection(inspect_parser().parse_args(flags))
    ours = dict(found._subject("run").objective.named_parameters())
    trained = TrainedModel(run, average=True)
    for name, parameter in ours.items():
        inside = name.removeprefix("model.")
        theirs = trained.read(inside) if inside != name else trained.read_added()[name]
        assert torch.equal(parameter, theirs.to(parameter.dtype)), name
    plain = dict(found._subject("base").objective.named_parameters())
    moved = "model.layers.0.gen.q_proj.weight"
    assert not torch.equal(ours[moved], plain[moved])


def test_a_run_takes_no_other_adapter(
    base: Path, adapter: Path, run: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(words(run, tmp_path / "out", "--adapter", adapter)) == 2
    assert "is the checkpoint of a run, whose own adapters" in capsys.readouterr().err


def test_work_of_another_share_or_adapter_is_not_taken_for_this_one(
    base: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    adapter = random_adapter(tmp_path / "own", base, SIDE)
    more = ("--only", "gradients")
    assert main(words(base, tmp_path / "out", "--adapter", adapter, *more)) == 0
    capsys.readouterr()
    assert main(words(base, tmp_path / "out", "--adapter", f"{adapter}:0.7", *more)) == 2
    assert "holds an inspection with checkpoints" in capsys.readouterr().err
    # Trained further in the same folder.
    random_adapter(adapter, base, SIDE, seed=1)
    assert main(words(base, tmp_path / "out", "--adapter", adapter, *more)) == 2
    assert "holds an inspection with checkpoints" in capsys.readouterr().err


def test_an_adapter_that_cannot_be_merged_is_refused_before_anything_is_computed(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    behind = ["--adapter", str(adapter), *words(base, tmp_path / "out")]
    cases = [
        (
            behind,
            "--adapter: has no --checkpoint before it; give it after the base that it belongs to.",
        ),
        (words(base, tmp_path / "out", "--adapter", "nowhere"), "--adapter: nowhere/adapter_conf"),
        (words(base, tmp_path / "out", "--adapter", f"{adapter}:x"), "--adapter: expects DIR or"),
    ]
    for flags, message in cases:
        assert main(flags) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {message}") and err.count("\n") == 1, err
    assert not list(tmp_path.glob("out/work/*/*"))
