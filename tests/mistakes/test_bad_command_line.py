"""Mistakes in a recipe's file, a flag, the environment, a checkpoint or a base: one line that names
what is at fault, before anything starts."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from no_launcher import environment_without_launcher
from ranks import free_port
from refusals import overrides, said, write_recipe
from safetensors.torch import load_file, save_file
from small_runs import random_base, t2i_row, write_t2i

from uno_ds.recipe import read_tree
from uno_ds.training.manifest import digest_of_manifest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "text, key, words",
    [
        ("{", "--recipe", "not readable YAML"),
        ("- name: x", "--recipe", "must hold a mapping"),
        ("", "--recipe", "must hold a mapping"),
        ("when: 2001-99-99", "--recipe", "not readable YAML"),
        ("\x00", "--recipe", "not readable YAML"),
        ("extends: nothing", "extends", "'nothing' is neither a file nor one of bagel_7b_flow"),
        ("extends: recipe.yaml", "extends", "extends itself"),
        ("extends: sub/../recipe.yaml", "extends", ""),
        ("steps: 3", "name", "is required"),
        ("1: 2", "1", "unknown key"),
    ],
)
def test_a_recipe_that_is_no_recipe_is_one_line(place, capsys, text, key, words):
    (place.folder / "recipe.yaml").write_text(text)
    line = said(capsys, ["--recipe", str(place.folder / "recipe.yaml")])
    assert line.startswith(f"{key}: ") and words in line


def test_a_recipe_may_extend_a_file_beside_it_and_one_that_ships(place):
    """Values of the extending recipe win, key by key; its lists replace."""
    (place.folder / "sub").mkdir(exist_ok=True)
    (place.folder / "sub" / "below.yaml").write_text(
        "extends: tiny\nsteps: 5\nobjective: {caption_weight: 3}"
    )
    (place.folder / "sub" / "above.yaml").write_text(
        "extends: below.yaml\nobjective: {flow_weight: 7}\ndata: {sources: [{path: x}]}"
    )
    merged, tiny = read_tree(str(place.folder / "sub" / "above.yaml")), read_tree("tiny")
    assert merged["steps"] == 5 and merged["data"] == {**tiny["data"], "sources": [{"path": "x"}]}
    assert merged["objective"] == {**tiny["objective"], "caption_weight": 3, "flow_weight": 7}


@pytest.mark.parametrize(
    "arguments, key, words",
    [
        ([], "command line", "--recipe"),
        (
            ["--recipe", "nothing"],
            "--recipe",
            "'nothing' is neither a file nor one of bagel_7b_flow, bagel_7b_uno",
        ),
        (["--recipe", ""], "--recipe", ""),
        (["--recipe", 300 * "x"], "--recipe", "x"),
        (["--recipe", "photos"], "--recipe", "not readable"),
        (["--recipe", "tiny", "--sett", "a=1"], "command line", "--sett"),
        (["--recipe", "tiny", "--world-size", "two"], "command line", "--world-size"),
        (["--recipe", "tiny", "--world-size", "0"], "command line", "--world-size"),
        (
            ["--recipe", "recipe.yaml", "--world-size", "3"],
            "engine.packs_per_step",
            "give a multiple of 3",
        ),
        (
            ["--recipe", "recipe.yaml", "--ds-config", "zero9"],
            "engine.deepspeed",
            "zero9.json does not exist",
        ),
        (
            ["--recipe", "recipe.yaml", "--resume", "photos"],
            "--resume",
            "photos is not a complete checkpoint",
        ),
        (
            ["--recipe", "recipe.yaml", "--resume", "nowhere"],
            "--resume",
            "nowhere is not a complete checkpoint",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(place, capsys, arguments, key, words):
    write_recipe(place)
    line = said(capsys, arguments)
    assert line.startswith(f"{key}: ") and words in line


LANE = {"draws": 0, "positions": [0], "waiting": None, "skipped": {}}


@pytest.mark.parametrize(
    "manifest, key",
    [
        ({"format": 9}, "--resume"),
        ({"step": None}, "--resume"),
        ({"lanes": {"0": LANE | {"positions": [0, 0]}}}, "data.sources"),
        ({"lanes": {"0": LANE, "1": LANE}}, "engine.packs_per_step"),
    ],
)
def test_a_checkpoint_of_another_run_is_one_line(place, capsys, manifest, key):
    counts = ("step", "optimizer_steps", "world_size", "stage", "ema_updates", "skipped_steps")
    given = {
        "format": 1,
        **dict.fromkeys(counts, 1),
        **dict.fromkeys(("base", "tokenizer", "frozen_checksum"), ""),
        **{key: {} for key in ("architecture", "frozen", "files", "shapes", "rows")},
        "recent_losses": [],
        "lanes": {"0": LANE},
        **manifest,
    }
    (place.folder / "old").mkdir(exist_ok=True)
    (place.folder / "old" / "manifest.json").write_text(
        json.dumps({**given, "hash": digest_of_manifest(given)})
    )
    line = said(capsys, ["--recipe", write_recipe(place), "--resume", "old"])
    assert line.startswith(f"{key}: ")


@pytest.mark.parametrize(
    "ranks, key, words",
    [
        (
            "2",
            "engine.packs_per_step",
            "is 3 and does not divide into 2 ranks; give a multiple of 2",
        ),
        ("x", "WORLD_SIZE", "got 'x'"),
        ("0", "WORLD_SIZE", "got '0'"),
    ],
)
def test_the_number_of_ranks_of_the_launcher_is_checked(
    place, capsys, monkeypatch, ranks, key, words
):
    place_of_rank = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**place_of_rank, "WORLD_SIZE": ranks}.items():
        monkeypatch.setenv(name, value)
    line = said(capsys, ["--recipe", write_recipe(place, engine={"packs_per_step": 3})])
    assert line.startswith(f"{key}: ") and words in line


def missing(folder: Path) -> None:
    tensors = load_file(folder / "ema.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != "vae2llm.weight"},
        folder / "ema.safetensors",
    )


def misshapen(folder: Path) -> None:
    tensors = load_file(folder / "ema.safetensors")
    save_file({**tensors, "llm2vae.bias": torch.zeros(7)}, folder / "ema.safetensors")


def truncated(folder: Path) -> None:
    (folder / "ema.safetensors").write_bytes((folder / "ema.safetensors").read_bytes()[:5000])


def other_heads(folder: Path) -> None:
    config = json.loads((folder / "llm_config.json").read_text())
    (folder / "llm_config.json").write_text(json.dumps({**config, "num_attention_heads": 7}))


@pytest.mark.parametrize(
    "damage, words",
    [
        (missing, "vae2llm.weight is missing"),
        (misshapen, "llm2vae.bias has shape [7] instead of [48]"),
        (truncated, "not a readable safetensors file"),
        (other_heads, "heads"),
        (lambda folder: (folder / "ema.safetensors").unlink(), "lacks ema.safetensors"),
        (
            lambda folder: (folder / "llm_config.json").write_text("{"),
            "llm_config.json is not readable JSON",
        ),
        (lambda folder: (folder / "vit_config.json").unlink(), "lacks vit_config.json"),
    ],
)
def test_a_base_that_does_not_fit_is_one_line_that_names_what_is_wrong(
    place, tmp_path, capsys, damage, words
):
    base = random_base(tmp_path / "base")
    damage(base)
    line = said(
        capsys,
        [
            "--recipe",
            write_recipe(place),
            *overrides("model.architecture=", "model.tokenizer=", f"model.base={base}"),
        ],
    )
    assert line.startswith("model.base") and words in line


def command(
    place: SimpleNamespace, *arguments: str, launcher: tuple[str, ...] = (sys.executable,)
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher, str(ROOT / "scripts" / "train.py"), *arguments],
        cwd=place.folder,
        env=environment_without_launcher(),
        text=True,
        capture_output=True,
        timeout=600,
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["--recipe", "recipe.yaml", "--set", "sequence.metaquery_grid=0"],
            "sequence.metaquery_grid: is 0",
        ),
        (
            ["--recipe", "recipe.yaml", "--set", "data.sources.0.path=bad_only"],
            "data.sources.0.path: source 'bad_only'",
        ),
    ],
)
def test_the_command_line_refuses_with_one_line_and_exit_code_2_and_writes_nothing(
    place, arguments, words
):
    write_recipe(place)
    write_t2i(place.folder / "bad_only" / "a.parquet", [t2i_row(image=b"")] * 3)
    before = {path for path in place.folder.rglob("*") if "cache" not in path.parts}
    done = command(place, *arguments)
    assert (
        done.returncode == 2
        and done.stderr.startswith(f"error: {words}")
        and done.stderr.count("\n") == 1
    )
    assert "Traceback" not in done.stdout
    assert {path for path in place.folder.rglob("*") if "cache" not in path.parts} == before


def test_help_ends_well_and_names_every_flag(place):
    done = command(place, "--help")
    flags = (
        "--recipe",
        "--set",
        "--ds-config",
        "--resume",
        "--dry-run",
        "--world-size",
        "--json",
        "--execute",
        "exit codes:",
    )
    assert done.returncode == 0 and done.stderr == "" and all(flag in done.stdout for flag in flags)


@pytest.mark.distributed
def test_two_ranks_refuse_with_one_line_of_one_of_them(place):
    """The second rank would print after ten seconds; the launcher has ended it long before."""
    deepspeed = Path(sys.executable).parent / "deepspeed"
    launcher = (str(deepspeed), "--num_gpus", "2", "--master_port", str(free_port()))
    write_recipe(place, engine={"packs_per_step": 3})
    done = command(place, "--recipe", "recipe.yaml", launcher=launcher)
    errors = [line for line in (done.stdout + done.stderr).splitlines() if "error: " in line]
    assert (
        done.returncode == 2
        and len(errors) == 1
        and "engine.packs_per_step: is 3 and does not divide into 2 ranks" in errors[0]
    )
    assert "Traceback" not in done.stdout + done.stderr
