"""`--dry-run --execute` of recipes that train adapters, quantise what is frozen, or keep bf16
states: every module runs and every trained weight moves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from no_launcher import environment_without_launcher

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("recipe", "ranks", "changes", "stage", "adapted"),
    [
        pytest.param("bagel_7b_uno_lora_24gb", 1, [], 2, 2 * 7, marks=SLOW),
        pytest.param("bagel_7b_uno_lora", 1, [], 2, 2 * 7, marks=SLOW),
        pytest.param(
            "bagel_7b_uno_lora",
            64,
            ["engine.deepspeed=zero3", "engine.packs_per_step=64"],
            3,
            2 * 7,
            marks=SLOW,
        ),
        pytest.param(
            "bagel_7b_uno_lora", 8, ["engine.deepspeed=zero3", "lora.dora=true"], 3, 14, marks=SLOW
        ),
        pytest.param(
            "bagel_7b_uno_lora",
            2,
            ["model.frozen_precision=nf4", "engine.deepspeed=zero1"],
            1,
            14,
            marks=SLOW,
        ),
        pytest.param("bagel_7b_uno_80gb", 1, [], 3, 0, marks=SLOW),
    ],
)
def test_one_step_of_a_recipe_for_a_card_reaches_every_trained_weight(
    tmp_path: Path, recipe: str, ranks: int, changes: list[str], stage: int, adapted: int
):
    flags = ["--recipe", recipe, "--world-size", str(ranks), "--json", "--execute"]
    flags += [flag for change in changes for flag in ("--set", change)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/train.py"), "--dry-run", *flags],
        cwd=tmp_path,
        env=environment_without_launcher() | {"OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ran = json.loads(done.stdout)["executed"]
    assert (ran["ranks"], ran["stage"], ran["step_applied"]) == (ranks, stage, True)
    assert ran["adapted_modules"] == adapted
    assert ran["modules_called"] == ran["modules"] > 60
    assert ran["trained_weights_moved"] == ran["trained_weights_of_rank"] > 0
    # A and B of each adapted module, and what trains beside them.
    assert ran["trained_weights"] > 2 * adapted
    if stage == 3 or ranks == 1:
        assert ran["trained_weights_of_rank"] == ran["trained_weights"]
    assert os.listdir(tmp_path) == []
