"""Whole runs with adapters: from the launcher to a picture drawn with the exported adapter."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ranks import ForkServer, free_port, run_command
from runs import EVERY, STEPS, Place
from safetensors.torch import load_file

from uno_ds.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SERVING = ROOT / "tests/goldens/serving/vllm_omni.json"
# q, k, v, o, gate, up and down in each layer: 2 of the small base, 5 of the tiny one.
SMALL_MODULES, TINY_MODULES = 2 * 7, 5 * 7
EACH = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def place(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("lora"), server)


def announced(rank: int, modules: int, scaling: str) -> str:
    each = ", ".join(f"{modules // len(EACH)} {name}" for name in EACH)
    return f"adapters of rank {rank} on {modules} modules ({each}), scaled by {scaling}"


@pytest.mark.slow
def test_a_run_with_adapters_names_them_averages_saves_and_resumes_on_one_rank(place: Place):
    lora = {
        "model": {"base": str(place.base), "train": "lora"},
        "lora": {"rank": 4, "alpha": 6},
        "optimizer": {"lr": 1e-2, "ema": 0.5},
    }
    first = place.run("lora", steps=EVERY, **lora)
    assert announced(4, SMALL_MODULES, "1.5") in first.logs[0].read_text()
    half = place.summary("lora")
    rest = place.run("lora", "--resume", "auto", ranks=1, **lora)
    assert f"continues after step {EVERY}" in rest.logs[0].read_text()
    assert announced(4, SMALL_MODULES, "1.5") in rest.logs[0].read_text()
    whole = place.summary("lora")
    assert (half["world_size"], whole["world_size"]) == (2, 1)
    assert place.steps("lora") == list(range(1, STEPS + 1))
    frozen = set()
    for summary in (half, whole):
        assert summary["exit"] == "completed"
        assert summary["adapters"]["modules"] == SMALL_MODULES
        assert summary["adapters"]["by_projection"] == dict.fromkeys(EACH, 2)
        frozen |= set(summary["checksums"].values())
    assert len(frozen) == 1
    saved = load_file(place.of("lora") / f"checkpoints/step_{STEPS}/rank_00000.safetensors")
    adapted = [name for name in saved if ".lora_B." in name]
    assert adapted and all(saved[name].any() for name in adapted)


def command(folder: Path, *arguments: str) -> str:
    """Runs a command of scripts/ as a user types it; returns what it printed."""
    script, *rest = arguments
    line = [sys.executable, str(ROOT / "scripts" / script), *rest]
    code, output = run_command(line, folder, timeout=600)
    assert code == 0, output
    return output


def launch(folder: Path, ranks: int, *arguments: str) -> str:
    launcher = str(Path(sys.executable).parent / "deepspeed")
    flags = ["--num_gpus", str(ranks), "--master_port", str(free_port())]
    line = [launcher, *flags, str(ROOT / "scripts/train.py"), *arguments]
    code, output = run_command(line, folder, timeout=1200)
    assert code == 0, output
    return output


def drawn(folder: Path, name: str, *arguments: str) -> np.ndarray:
    out = folder / name
    more = ["--prompt", "a red circle in the center.", "--steps", "8", "--seed", "3"]
    command(folder, "sample.py", "generate", *more, "--out", str(out), *arguments)
    picture = next(file for file in sorted(out.rglob("*.png")))
    return np.asarray(Image.open(picture).convert("RGB")).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "frozen"), [("zero3", "bf16"), ("zero2", "nf4"), ("zero1", "nf4")]
)
def test_adapters_go_from_the_launcher_to_a_picture(tmp_path: Path, config: str, frozen: str):
    recipe = [
        "--recipe",
        "tiny",
        "--ds-config",
        config,
        "--set",
        "model.train=lora",
        "--set",
        f"model.frozen_precision={frozen}",
        "--set",
        "lora={rank: 8, alpha: 16}",
        "--set",
        "optimizer={lr: 1.0e-2, warmup: 0, ema: 0.5}",
        "--set",
        "checkpoint.every=2",
        "--set",
        f"output={tmp_path}",
        "--set",
        f"data.folder={tmp_path / 'data'}",
        "--set",
        "data.scenes={rows: 200, seed: 1, size: 28}",
    ]
    sentence = announced(8, TINY_MODULES, "2")
    output = launch(tmp_path, 2, *recipe, "--set", "steps=4")
    assert sentence in output
    folder = tmp_path / "tiny"
    output = launch(tmp_path, 1, *recipe, "--set", "steps=8", "--resume", "auto")
    assert sentence in output and "continues after step 4" in output
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["exit"], summary["world_size"]) == ("completed", 1)
    assert summary["adapters"]["modules"] == TINY_MODULES
    assert summary["checksums"]["frozen_start"] == summary["checksums"]["frozen_end"]
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == list(range(1, 9))
    assert (folder / "samples.png").stat().st_size > 500
    assert any(name.startswith("events.") for name in os.listdir(folder / "tensorboard"))

    command(tmp_path, "weights.py", "export", str(folder), str(tmp_path / "merged"))
    serving = json.loads(SERVING.read_text())
    assert not [
        name for name in serving["files_opened"] if not (tmp_path / "merged" / name).exists()
    ]
    adapter = tmp_path / "adapter"
    command(tmp_path, "weights.py", "export", str(folder), str(adapter), "--adapter")
    assert len(load_file(adapter / "adapter_model.safetensors")) == 2 * TINY_MODULES
    size = ("--height", "28", "--width", "28")
    base = drawn(tmp_path, "base", "--checkpoint", "tiny_base", *size)
    ours = drawn(tmp_path, "ours", "--checkpoint", "tiny_base", "--adapter", str(adapter), *size)
    merged = drawn(tmp_path, "merged_out", "--checkpoint", str(tmp_path / "merged"), *size)
    # The merged weights are rounded to bf16; the adapter moves the picture further than that.
    assert np.abs(ours - merged).mean() < 0.5 * np.abs(ours - base).mean()
