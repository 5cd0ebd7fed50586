"""Whole runs of a small model on forked ranks: start, fault, resume, and compare with a run without
a fault."""

import json
import time
from pathlib import Path
from typing import Any

import metric_runs
import pytest
import torch
import yaml
from fault_table import TABLE, Survived
from ranks import ForkedRun, ForkServer
from safetensors.torch import load_file
from small_runs import random_base, tree

from uno_ds.recipe import merge
from uno_ds.training.metrics import read_metrics

STEPS, EVERY, PACKS = 6, 2, 4
# A guard, in seconds: no machine is so slow.
HANGS = 400
REPEATED = tuple(field for field in metric_runs.REPEATED if field != "skipped")
GO_ON = ("--resume", "auto")


class Place:
    """A folder with a base and drawn data, and runs in it."""

    def __init__(self, folder: Path, server: ForkServer):
        self.folder, self.server = folder, server
        self.base = random_base(folder / "base")
        self.tree = tree(
            folder,
            ["scenes/t2i"],
            steps=STEPS,
            model={"base": str(self.base)},
            optimizer={"lr": 1e-3, "ema": 0.9},
            checkpoint={"every": EVERY, "export": False},
            logging={"every": 1},
            sequence={"token_budget": 320},
            engine={"packs_per_step": PACKS},
            health={"stall_seconds": 30},
        )
        del self.tree["model"]["architecture"], self.tree["model"]["tokenizer"]

    def start(
        self,
        name: str,
        *flags: str,
        fault: dict[str, Any] | None = None,
        ranks: int = 2,
        **changes: Any,
    ) -> ForkedRun:
        home = self.folder / f"home_{name}"
        home.mkdir(exist_ok=True)
        (home / "recipe.yaml").write_text(
            yaml.safe_dump(merge({**self.tree, "name": name}, changes))
        )
        return self.server.start(home, ranks, ["--recipe", "recipe.yaml", *flags], fault)

    def run(self, name: str, *flags: str, **options: Any) -> ForkedRun:
        run = self.start(name, *flags, **options)
        assert run.wait() == [0] * len(run.pids), run.output()
        return run

    def of(self, name: str) -> Path:
        return self.folder / "runs" / name

    def steps(self, name: str) -> list[int]:
        path = self.of(name) / "metrics.jsonl"
        return [row["step"] for row in read_metrics(path)] if path.exists() else []

    def summary(self, name: str) -> dict[str, Any]:
        return json.loads((self.of(name) / "summary.json").read_text())


def curve(place: Place, name: str) -> list[dict[str, Any]]:
    return [
        {field: row[field] for field in REPEATED}
        for row in read_metrics(place.of(name) / "metrics.jsonl")
    ]


def assert_same(place: Place, ours: str, theirs: str, ranks: int = 2) -> None:
    assert curve(place, ours) == curve(place, theirs) and len(curve(place, ours)) == STEPS
    for rank in range(ranks):
        file = f"checkpoints/step_{STEPS}/rank_{rank:05}.safetensors"
        first, second = load_file(place.of(ours) / file), load_file(place.of(theirs) / file)
        assert first.keys() == second.keys() and all(
            torch.equal(first[name], second[name]) for name in first
        )
    lanes = [
        json.loads((place.of(name) / f"checkpoints/step_{STEPS}/manifest.json").read_text())[
            "lanes"
        ]
        for name in (ours, theirs)
    ]
    assert lanes[0] == lanes[1]


def go_on(place: Place, name: str, whole: str, label: str, **changes: Any) -> str:
    """Starts the run again, notes what it cost, and compares its end with the run that nothing
    happened to; returns rank 0's output."""
    before = max(place.steps(name), default=0)
    run, seconds = place.start(name, *GO_ON, **changes), None
    while None in run.poll():
        # The lines of steps that are done again are removed before the first of them.
        output = run.logs[0].read_text()
        if seconds is None and "\nstep " in output:
            seconds = time.time() - run.started
        time.sleep(0.02)
        assert time.time() < run.started + HANGS, run.output()
    output = run.logs[0].read_text()
    resumed = (
        int(output.split("continues after step ")[1].split()[0])
        if "continues after step" in output
        else 0
    )
    survived = run.codes == [0, 0] and curve(place, name) == curve(place, whole)
    TABLE.append(Survived(label, survived, before - resumed, seconds))
    assert run.codes == [0, 0], run.output()
    assert_same(place, name, whole)
    return output


def slow_unless(chosen: Any, cases: list[Any]) -> list[Any]:
    return [
        case if case == chosen else pytest.param(*case, marks=pytest.mark.slow) for case in cases
    ]
