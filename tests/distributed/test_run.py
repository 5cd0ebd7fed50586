"""Whole runs through the real command line, under each launcher: the run folder, the same numbers
again, and going on."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from metric_runs import REPEATED
from PIL import Image
from ranks import ForkServer, free_port, run_command
from safetensors.torch import load_file
from small_runs import IMAGES
from tiny import ARCHITECTURE, GRADIENT_ROUNDING, plain_objective, recipe, write_home

from uno_ds.commands.weights import main as weights_command
from uno_ds.generation.inference_model import open_model
from uno_ds.model.architecture import read_architecture
from uno_ds.recipe import load_recipe
from uno_ds.settings import to_plain
from uno_ds.training.metrics import FIELDS, read_metrics
from uno_ds.training.report import REQUIRED

TRAIN = Path(__file__).parents[2] / "scripts" / "train.py"
STEPS, PACKS, TIMEOUT = 6, 2, 480.0
LOSSES = tuple(field for field in FIELDS if field.startswith("loss"))

RECIPE = {
    "name": "whole",
    "output": "runs",
    "steps": STEPS,
    "seed": 5,
    "model": {"base": "base"},
    "objective": {
        "flow_weight": 1.0,
        "caption_weight": 0.3,
        "regression_weight": 0.5,
        "answer_weight": 0.2,
    },
    "sequence": {"token_budget": 400, "max_text_tokens": 32, "metaquery_grid": 2},
    "data": {
        "folder": "data",
        "scenes": {"rows": 40},
        "latent_image": IMAGES,
        "vit_image": IMAGES,
        "sources": [
            {"path": "scenes/t2i", "weight": 2},
            {"path": "scenes/edit"},
            {"path": "scenes/vlm", "weight": 2},
        ],
    },
    "optimizer": {"lr": 1e-3, "eps": 1e-6, "ema": 0.9, "schedule": "constant"},
    "engine": {"deepspeed": "sharded.json", "packs_per_step": PACKS, "precision": "fp32"},
    "samples": {
        "prompts": ["a red circle.", "two blue squares."],
        "height": 16,
        "width": 16,
        "steps": 2,
    },
    "logging": {"every": 4},
}
# Pictures and TensorBoard are looked at once; the other runs are about numbers.
BARE = ("--set", "samples.prompts=[]", "--set", "logging.tensorboard=false")


def deepspeed(ranks: int) -> list[str]:
    return [_script("deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port())]


def torchrun(ranks: int) -> list[str]:
    return [
        _script("torchrun"),
        "--nproc_per_node",
        str(ranks),
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(free_port()),
    ]


def _script(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def train(home: Path, launcher: list[str], *flags: str) -> str:
    code, output = run_command([*launcher, str(TRAIN), *flags], home, TIMEOUT)
    assert code == 0, f"exit code {code}:\n{output[-6000:]}"
    return output


def train_forked(server: ForkServer, home: Path, ranks: int, *flags: str) -> None:
    """The same without a launcher and without its imports: for the runs that are about numbers."""
    run = server.start(home, ranks, [*flags, *BARE])
    assert run.wait(TIMEOUT) == [0] * ranks, run.output()


def curve(run: Path, fields: tuple[str, ...] = REPEATED) -> list[dict[str, Any]]:
    return [{field: row[field] for field in fields} for row in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a recipe, a DeepSpeed configuration and a base of random weights."""
    folder = tmp_path_factory.mktemp("home")
    objective = plain_objective(recipe())
    parameters = dict(objective.model.named_parameters())
    with torch.no_grad():
        # Fresh weights predict no velocity at all, and pictures of base and trained model would
        # hardly differ.
        parameters["llm2vae.weight"].normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    write_home(folder, RECIPE, parameters)
    return folder


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    """Two ranks under deepspeed, all steps."""
    train(home, deepspeed(2), "--recipe", "recipe.yaml")
    return home / "runs" / "whole"


@pytest.fixture(scope="module")
def resumed(home: Path, server: ForkServer) -> Path:
    """Two ranks: half of the steps under torchrun, then the rest from that run's own
    recipe.yaml."""
    half = ("--set", "name=resumed", "--set", f"steps={STEPS // 2}")
    train(home, torchrun(2), "--recipe", "recipe.yaml", *half, *BARE)
    run = home / "runs" / "resumed"
    steps = [row["step"] for row in read_metrics(run / "metrics.jsonl")]
    assert steps == list(range(1, STEPS // 2 + 1))
    rest = ("--set", f"steps={STEPS}", "--resume", "auto")
    train_forked(server, home, 2, "--recipe", "runs/resumed/recipe.yaml", *rest)
    return run


@pytest.fixture(scope="module")
def alone(home: Path) -> Path:
    """One process, without a launcher, with as many packs per step."""
    train(home, [sys.executable], "--recipe", "recipe.yaml", "--set", "name=alone", *BARE)
    return home / "runs" / "alone"


def test_the_run_folder_is_complete(whole: Path):
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert tuple(row) == FIELDS
        # Utilisation needs the peak speed of the hardware, which is unknown for a CPU.
        # A step without a question-answer sample has no loss of answers, rather than one of 0.
        assert (
            all(row[field] is not None for field in FIELDS if field not in ("mfu", "loss_answer"))
            and row["loss_answer"] != 0
        )
        assert (
            row["skipped"] == 0 and 0 < row["tokens"] <= PACKS * RECIPE["sequence"]["token_budget"]
        )
        weighted = sum(
            RECIPE["objective"][f"{name}_weight"] * (row[f"loss_{name}"] or 0)
            for name in ("flow", "caption", "regression", "answer")
        )
        assert row["loss"] == pytest.approx(weighted, rel=1e-5)
    for name in ("curves.png", "samples.png"):
        with Image.open(whole / name) as picture:
            assert len(np.unique(np.asarray(picture.convert("L")))) > 10, f"{name} shows nothing"
    assert (whole / "summary.md").read_text().startswith("# Run whole: completed")
    assert list((whole / "tensorboard").iterdir())
    assert (whole / "checkpoints" / "latest").read_text().strip() == f"step_{STEPS}"
    assert (whole / "checkpoints" / f"step_{STEPS}" / "manifest.json").exists()


def test_the_summary_counts_parameters_and_its_frozen_checksums_are_equal(whole: Path):
    summary = json.loads((whole / "summary.json").read_text())
    assert set(REQUIRED) <= set(summary)
    assert (summary["exit"], summary["steps"], summary["world_size"], summary["seed"]) == (
        "completed",
        STEPS,
        2,
        RECIPE["seed"],
    )
    assert summary["checksums"]["frozen_start"] == summary["checksums"]["frozen_end"]
    sizes = {True: 0, False: 0}
    for parameter in plain_objective(recipe()).parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    assert summary["parameters"] == {"trainable": sizes[True], "frozen": sizes[False]}
    assert (
        summary["losses"]["first"]["loss"] == curve(whole)[0]["loss"]
        and summary["losses"]["last"]["loss"] == curve(whole)[-1]["loss"]
    )


def test_the_exported_model_is_a_base_whose_frozen_weights_are_those_of_the_base(
    whole: Path, home: Path
):
    before, after = (
        load_file(home / "base" / "ema.safetensors"),
        load_file(whole / "model" / "ema.safetensors"),
    )
    assert (
        set(after) - set(before) == {"latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"}
        and before.keys() <= after.keys()
    )
    for name in before:
        trained = "moe_gen" in name or name.split(".")[0] in ("vae2llm", "llm2vae", "time_embedder")
        assert torch.equal(before[name], after[name]) != trained, name
    assert read_architecture(whole / "model") == read_architecture(home / "base")
    assert open_model(whole / "model").model.shape.hidden == ARCHITECTURE["hidden"]


def test_exporting_the_last_checkpoint_gives_the_bytes_of_the_model_that_the_run_left(
    whole: Path, tmp_path: Path
):
    assert weights_command(["export", str(whole), str(tmp_path / "out"), "--ema"]) == 0
    files = sorted(file.name for file in (whole / "model").iterdir())
    assert {"ema.safetensors", "uno.safetensors", "config.json", "tokenizer.json"} <= set(files)
    assert files == sorted(file.name for file in (tmp_path / "out").iterdir())
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (whole / "model" / file).read_bytes(), file


def test_the_runs_recipe_is_the_recipe_again(
    whole: Path, home: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(home)
    assert to_plain(load_recipe(str(whole / "recipe.yaml"))) == to_plain(load_recipe("recipe.yaml"))


def test_the_same_seed_gives_the_same_curve_bit_for_bit_also_under_another_launcher(
    whole: Path, resumed: Path
):
    assert curve(resumed)[: STEPS // 2] == curve(whole)[: STEPS // 2]


@pytest.mark.slow
def test_another_seed_gives_another_curve(home: Path, server: ForkServer, alone: Path):
    other_seed = ("--set", "name=other", "--set", f"seed={RECIPE['seed'] + 1}")
    train_forked(server, home, 1, "--recipe", "recipe.yaml", *other_seed)
    first, second = curve(alone), curve(home / "runs" / "other")
    for row, other in zip(first, second, strict=True):
        assert all(row[field] != other[field] for field in ("loss", "loss_flow", "grad_norm")), (
            f"step {row['step']}"
        )


def test_two_ranks_report_the_losses_of_one(whole: Path, alone: Path):
    for row, single in zip(curve(whole), curve(alone), strict=True):
        assert row["tokens"] == single["tokens"]
        for field in (*LOSSES, "grad_norm"):
            assert row[field] == pytest.approx(single[field], rel=GRADIENT_ROUNDING, abs=1e-5), (
                f"{field} of step {row['step']}"
            )


def test_resuming_half_way_gives_the_numbers_and_weights_of_an_uninterrupted_run_bit_for_bit(
    whole: Path, resumed: Path
):
    assert curve(resumed) == curve(whole)
    pieces = [f"checkpoints/step_{STEPS}/rank_{rank:05}.safetensors" for rank in range(2)]
    for file in (*pieces, "model/ema.safetensors", "model/uno.safetensors"):
        ours, theirs = load_file(resumed / file), load_file(whole / file)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), f"{name} in {file}"


def test_one_rank_goes_on_where_two_stopped_with_the_same_samples_and_losses(
    whole: Path, resumed: Path, home: Path, server: ForkServer
):
    half_way = resumed / "checkpoints" / f"step_{STEPS // 2}"
    flags = ("--set", "name=fewer", "--resume", str(half_way))
    train_forked(server, home, 1, "--recipe", "recipe.yaml", *flags)
    rows = curve(home / "runs" / "fewer")
    assert [row["step"] for row in rows] == list(range(STEPS // 2 + 1, STEPS + 1))
    for row, expected in zip(rows, curve(whole)[STEPS // 2 :], strict=True):
        assert row["tokens"] == expected["tokens"]
        for field in (*LOSSES, "grad_norm"):
            assert row[field] == pytest.approx(expected[field], rel=GRADIENT_ROUNDING, abs=1e-5), (
                f"{field} of step {row['step']}"
            )
