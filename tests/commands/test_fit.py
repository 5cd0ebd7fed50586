"""`--dry-run --fit` and the recipes for one card: the budget that is named fits, the next one does
not."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from uno_ds.commands import train
from uno_ds.commands.dry_run import estimate
from uno_ds.cost.fit import BUDGET_STEP, changes_that_save, largest_budget, largest_need
from uno_ds.cost.hardware import GPUS
from uno_ds.recipe import load_recipe
from uno_ds.run import load

CARDS = {
    "bagel_7b_uno_lora": (48, 8192),
    "bagel_7b_uno_lora_24gb": (24, 4096),
    "bagel_7b_uno_80gb": (80, 8192),
}


@pytest.mark.parametrize("name", CARDS)
def test_the_recipe_for_a_card_fits_it_by_the_estimate(name: str):
    recipe, ranks = load(name, absent=[])
    gigabytes, budget = CARDS[name]
    assert GPUS[recipe.hardware.gpu].memory == gigabytes * 10**9
    assert (ranks, recipe.sequence.token_budget) == (1, budget)
    estimated = estimate(recipe, ranks, ["t2i"])
    assert estimated.fits and estimated.memory.peak > gigabytes * 10**9 * 0.7


# Rows of the table "What fits where" in docs/adapters.md: (recipe, what is changed).
LORA, WHOLE = "bagel_7b_uno_lora", "bagel_7b_uno_80gb"
STATES = "engine.deepspeed=zero3_bf16_states"
ROWS = (
    ("bagel_7b_uno_lora_24gb", []),
    (LORA, ["model.frozen_precision=nf4"]),
    (LORA, ["model.frozen_precision=int8"]),
    (LORA, []),
    (LORA, []),
    (WHOLE, []),
    (WHOLE, [STATES]),
    (WHOLE, [STATES, "optimizer.ema=0.9999"]),
)


@pytest.mark.slow
def test_the_table_of_what_fits_where_says_what_the_estimate_says():
    table = (Path(__file__).parents[2] / "docs/adapters.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\d+) GB \|.* \| ([\d,]+) \| ([\d.]+) \| ([\d,]+) \|$", table, re.M)
    assert len(listed) == len(ROWS)
    for (name, changes), (gigabytes, *cells) in zip(ROWS, listed, strict=True):
        recipe, ranks = load(name, changes, absent=[])
        peak = estimate(recipe, ranks, ["t2i"]).memory.peak
        largest = largest_budget(recipe, ranks, ["t2i"], int(gigabytes) * 10**9)
        found = [f"{recipe.sequence.token_budget:,}", f"{peak / 1e9:.1f}", f"{largest:,}"]
        assert cells == found, (name, changes)


def test_the_budget_that_is_named_fits_and_the_next_one_does_not():
    recipe, ranks = load("bagel_7b_uno_lora_24gb", absent=[])
    room = GPUS["RTX4090-24GB"].memory
    found = largest_budget(recipe, ranks, ["t2i"], room)
    assert found is not None and found % BUDGET_STEP == 0

    def peak(budget: int) -> int:
        sequence = dataclasses.replace(recipe.sequence, token_budget=budget)
        resized = dataclasses.replace(recipe, sequence=sequence)
        return estimate(resized, ranks, ["t2i"]).memory.peak

    assert peak(found) <= room < peak(found + BUDGET_STEP)
    assert largest_budget(recipe, ranks, ["t2i"], 10**9) is None


def flags(folder: Path, *more: str) -> list[str]:
    return ["--recipe", "tiny", "--set", f"output={folder}", *more]


def test_fit_is_printed_in_both_forms_and_needs_a_card(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    gpu = ("--set", "hardware.gpu=L40S-48GB", "--set", f"data.folder={tmp_path}")
    assert train.main(flags(tmp_path, "--dry-run", "--fit", *gpu)) == 0
    sentence = "largest sequence.token_budget that fits a L40S-48GB, by the estimate: "
    printed = capsys.readouterr().out
    assert sentence in printed
    assert train.main(flags(tmp_path, "--dry-run", "--fit", "--json", *gpu)) == 0
    budget = json.loads(capsys.readouterr().out)["largest_token_budget"]
    assert f"{sentence}{budget:,}" in printed
    assert train.main(flags(tmp_path, "--dry-run", "--fit", *gpu[2:])) == 2
    assert "--fit: needs a GPU to fit: --set hardware.gpu=NAME" in capsys.readouterr().err


def test_adapters_have_their_own_default_learning_rate():
    assert load_recipe("tiny_base").optimizer.lr == 1.5e-3
    changes = ["model.train=lora", "optimizer={}", "objective.regression_weight=0"]
    assert load_recipe("tiny", changes).optimizer.lr == 1e-4
    assert load_recipe("tiny", [*changes[1:], "model.train=generation"]).optimizer.lr == 2e-5


def test_a_recipe_that_ran_out_of_memory_is_told_what_needs_less():
    recipe, ranks = load("bagel_7b_uno", ["model.recompute=false"], absent=[])
    need = largest_need(recipe, ranks, ["t2i"])
    changes = changes_that_save(recipe, ranks, ["t2i"], 80 * 10**9, on_gpu=True)
    peaks = {change.assignment.partition("=")[0]: change.peak for change in changes}
    assert set(peaks) == {"sequence.token_budget", "model.recompute", "engine.deepspeed"}
    assert all(peak < need.peak for peak in peaks.values())
    assert peaks["sequence.token_budget"] <= 80 * 10**9
    for change in changes:
        changed, _ = load("bagel_7b_uno", ["model.recompute=false", change.assignment], absent=[])
        assert largest_need(changed, ranks, ["t2i"]).peak == change.peak
    # Where the device should have held it, a quarter of what forward and backward need has to go.
    found = changes_that_save(recipe, ranks, ["t2i"], 10**12, on_gpu=False)
    less = need.peak - found[0].peak
    assert 0.25 <= less / sum(need.working.values()) < 0.3
    # In main memory an offloaded optimizer is where it was.
    on_cpu = changes_that_save(recipe, ranks, ["t2i"], 80 * 10**9, on_gpu=False)
    assert [change.assignment for change in on_cpu] == [
        change.assignment for change in changes if "deepspeed" not in change.assignment
    ]
