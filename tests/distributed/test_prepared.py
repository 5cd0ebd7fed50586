"""Preparation and training through the real command lines, on two ranks under ZeRO-3: the numbers
of training from pixels."""

import sys
from pathlib import Path

import pytest
from metric_runs import REPEATED
from ranks import ForkServer, free_port, run_command
from small_runs import IMAGES
from tiny import plain_objective, recipe, write_home

from uno_ds.training.metrics import read_metrics

PREPARE = Path(__file__).parents[2] / "scripts" / "prepare_data.py"
TIMEOUT, STEPS = 240.0, 4
SETS = ("t2i", "edit", "vlm")


# Every loss over all three layouts.
RECIPE = {
    "name": "pixels",
    "output": "runs",
    "steps": STEPS,
    "seed": 5,
    "model": {"base": "base"},
    "objective": {"caption_weight": 0.3, "regression_weight": 0.5, "answer_weight": 0.2},
    "sequence": {
        "token_budget": 400,
        "max_text_tokens": 32,
        "metaquery_grid": 3,
        "conversation_images": "both",
    },
    "data": {
        "folder": "data",
        "scenes": {"rows": 40},
        "latent_image": IMAGES,
        "vit_image": IMAGES,
        "sources": [
            {"path": f"scenes/{name}", "weight": weight} for name, weight in zip(SETS, (2, 1, 2))
        ],
    },
    "optimizer": {"lr": 1e-3, "eps": 1e-6, "ema": 0.9},
    "samples": {"prompts": []},
    "logging": {"tensorboard": False},
    "engine": {"deepspeed": "sharded.json", "packs_per_step": 2, "precision": "fp32"},
}


def prepare(home: Path) -> str:
    launcher = [
        str(Path(sys.executable).parent / "torchrun"),
        *("--nproc_per_node", "2", "--master_addr", "127.0.0.1"),
        *("--master_port", str(free_port())),
    ]
    flags = ["--recipe", "recipe.yaml", "--out", "ready", "--rows-per-shard", "7"]
    code, output = run_command([*launcher, str(PREPARE), *flags], home, TIMEOUT)
    assert code == 0, f"exit code {code}:\n{output[-6000:]}"
    return output


def train(server: ForkServer, home: Path, *flags: str) -> None:
    run = server.start(home, 2, ["--recipe", "recipe.yaml", *flags])
    assert run.wait(TIMEOUT) == [0, 0], run.output()


@pytest.mark.slow
def test_two_ranks_train_from_what_two_ranks_prepared_as_from_pixels_bit_for_bit(
    tmp_path: Path, server: ForkServer
):
    write_home(tmp_path, RECIPE, dict(plain_objective(recipe()).model.named_parameters()))
    said = prepare(tmp_path)
    assert (
        "0_t2i, rank 0 of 2: 21 rows in 3 shards" in said
        and "0_t2i, rank 1 of 2: 19 rows in 3 shards" in said
    )
    train(server, tmp_path)
    paths: list[str] = []
    for number, name in enumerate(SETS):
        paths += ["--set", f"data.sources.{number}.path=ready/{number}_{name}"]
    train(server, tmp_path, "--set", "name=prepared", *paths)

    def curve(name: str) -> list[dict]:
        rows = read_metrics(tmp_path / "runs" / name / "metrics.jsonl")
        return [{field: row[field] for field in REPEATED} for row in rows]

    pixels = curve("pixels")
    assert len(pixels) == STEPS
    assert all(pixels[0][f"loss_{name}"] > 0 for name in ("flow", "caption", "regression"))
    assert pixels == curve("prepared")
