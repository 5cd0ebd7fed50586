"""A demo run teaches something, and ends by naming its pictures."""

import json
import sys
from pathlib import Path

import pytest
from ranks import free_port, run_command

from uno_ds.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]


STEPS = 60
# The largest share of each loss that may be left.
MARGINS = {"loss_flow": 0.7, "loss_caption": 0.7, "loss_regression": 0.8}


@pytest.mark.slow
def test_the_demo_recipe_lowers_every_loss_by_the_stated_margins_and_keeps_understanding_frozen(
    tmp_path: Path,
):
    """The command of `make demo`, cut to few steps. Means over the first and the last tenth; single
    steps vary by 10 %."""
    launcher = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command = [
        *launcher,
        str(ROOT / "scripts/train.py"),
        "--recipe",
        "tiny",
        "--set",
        f"steps={STEPS}",
        "--set",
        f"output={tmp_path}",
        "--set",
        f"data.folder={tmp_path / 'data'}",
    ]
    code, output = run_command(command, tmp_path, timeout=1200)
    assert code == 0, output
    folder = tmp_path / "tiny"
    for name in ("samples.png", "curves.png", "summary.md"):
        assert name in output
        assert (folder / name).stat().st_size > 500
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["exit"] == "completed" and summary["world_size"] == 2
    assert summary["checksums"]["frozen_start"] == summary["checksums"]["frozen_end"]
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    first, last = summary["losses"]["first"], summary["losses"]["last"]
    for name, margin in MARGINS.items():
        assert last[name] < margin * first[name], name
