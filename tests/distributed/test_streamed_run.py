"""A run over a streamed data set of the hub: stopped on two ranks it goes on on one with the packs
that it would have had."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import serving
from ranks import free_port, run_command
from small_runs import random_base, t2i_row, tree, write_t2i

from uno_ds.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STEPS, HALF = 6, 3
RUN = {"checkpoint": {"every": 1, "export": False}, "logging": {"every": 1, "tensorboard": False}}


def launch(folder: Path, recipe: Path, ranks: int, *more: str) -> str:
    launcher = str(Path(sys.executable).parent / "deepspeed")
    flags = ["--num_gpus", str(ranks), "--master_port", str(free_port())]
    script = [str(ROOT / "scripts/train.py"), "--recipe", str(recipe), *more]
    code, output = run_command([launcher, *flags, *script], folder, timeout=600)
    assert code == 0, output
    return output


@pytest.mark.slow
def test_a_streamed_run_goes_on_with_other_ranks_as_if_it_had_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for file in range(3):
        rows = [t2i_row(seed=8 * file + number) for number in range(8)]
        write_t2i(tmp_path / f"hub/data/train-{file:05d}.parquet", rows)
    base = random_base(tmp_path / "base")
    plain = tree(tmp_path, [], steps=STEPS, model={"base": str(base)}, **RUN)
    del plain["model"]["architecture"], plain["model"]["tokenizer"]
    plain["engine"]["packs_per_step"] = 2
    plain["data"]["sources"] = [{"path": "hf://datasets/them/cups/data", "streaming": True}]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(plain))
    with serving(tmp_path / "hub") as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        output = launch(tmp_path, recipe, 2, "--set", "name=whole")
        assert "is read as streamed rows of layout t2i" in output
        launch(tmp_path, recipe, 2, "--set", "name=parts", "--set", f"steps={HALF}")
        again = launch(tmp_path, recipe, 1, "--set", "name=parts", "--resume", "auto")
        assert f"continues after step {HALF}" in again
    whole, parts = (
        read_metrics(tmp_path / f"runs/{name}/metrics.jsonl") for name in ("whole", "parts")
    )
    assert [row["step"] for row in parts] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in parts] == [row["tokens"] for row in whole]
    # The same packs in fp32, summed over one rank or two.
    assert [row["loss"] for row in parts] == pytest.approx([row["loss"] for row in whole], rel=1e-3)
    lanes = [
        json.loads((tmp_path / f"runs/{name}/checkpoints/step_{STEPS}/manifest.json").read_text())
        for name in ("whole", "parts")
    ]
    assert lanes[0]["lanes"] == lanes[1]["lanes"] and lanes[0]["lanes"]["1"]["streams"]["0"]
