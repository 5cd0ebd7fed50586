"""Two hosts and runs of a small model on them."""

import json
import time
from pathlib import Path
from typing import Any

import yaml
from hosts import RUN_TIMEOUT, Command, Hosts
from small_runs import random_base, tree

from uno_ds.recipe import merge
from uno_ds.training.metrics import read_metrics

STEPS, EVERY = 6, 2


class Cluster:
    """Two hosts and runs of a small model on them. Their folders are shared, unless one is mounted
    over them on a host."""

    def __init__(self, hosts: Hosts, folder: Path):
        self.hosts, self.folder = hosts, folder
        folder.mkdir(exist_ok=True)
        base = random_base(folder / "base")
        self.tree = tree(
            folder,
            ["scenes/t2i"],
            steps=STEPS,
            model={"base": str(base)},
            optimizer={"lr": 1e-3, "ema": 0.9},
            checkpoint={"every": EVERY, "export": False},
            logging={"every": 1},
            sequence={"token_budget": 320},
            engine={"packs_per_step": 4},
            health={"stall_seconds": 20},
        )
        del self.tree["model"]["architecture"], self.tree["model"]["tokenizer"]

    def recipe(self, name: str, **changes: Any) -> str:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(merge({**self.tree, "name": name}, changes)))
        return str(path)

    def train(
        self, name: str, *flags: str, hostfile: Path | None = None, **changes: Any
    ) -> Command:
        recipe = self.recipe(name, **changes)
        return self.hosts.train("--recipe", recipe, *flags, hostfile=hostfile)

    def of(self, name: str) -> Path:
        return self.folder / "runs" / name

    def curve(self, name: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
        rows = read_metrics(self.of(name) / "metrics.jsonl")
        return [{field: row[field] for field in fields} for row in rows]

    def summary(self, name: str) -> dict[str, Any]:
        return json.loads((self.of(name) / "summary.json").read_text())


class PausedRun:
    """A run over the hosts that pauses in the forward pass of these steps, on the last rank; the
    others wait for it in a collective. In capitals: environment variables, else changes of the
    recipe."""

    def __init__(self, cluster: Cluster, name: str, pauses: list[int], *flags: str, **changes: Any):
        self.folder = cluster.folder / f"{name}_pauses"
        self.folder.mkdir()
        variables = {key: changes.pop(key) for key in list(changes) if key.isupper()}
        ranks = sum(int(line.split("=")[1]) for line in cluster.hosts.hostfile.open())
        where = [str(self.folder), str(ranks - 1), ",".join(map(str, pauses))]
        recipe = cluster.recipe(name, **changes)
        script = "tests/nodes/paused_train.py"
        self.command = cluster.hosts.train(
            *where, "--recipe", recipe, *flags, script=script, **variables
        )

    def wait_until_paused(self, step: int) -> None:
        while not (self.folder / f"paused_{step}").exists():
            ended = self.command.process.poll()
            late = time.monotonic() > self.command.started + RUN_TIMEOUT
            assert ended is None and not late, self.command.output()[-8000:]
            time.sleep(0.02)

    def go_on(self, step: int) -> None:
        (self.folder / f"go_{step}").touch()
