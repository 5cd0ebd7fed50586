"""What crosses the interface between hosts, and what a slow network costs, against the traffic
model's prediction."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from cluster import Cluster, PausedRun
from small_runs import random_base

from uno_ds.cost.memory import Sharding
from uno_ds.cost.parameters import parameters_of
from uno_ds.cost.traffic import Traffic, traffic
from uno_ds.recipe import load_recipe
from uno_ds.training.metrics import read_metrics

# Bytes are counted from the one to the other.
FIRST, LAST = 4, 10
# Wide, so that weights and not messages of a few bytes are what is sent.
WIDE = {"hidden": 128, "mlp": 512}


@pytest.fixture(scope="module")
def wide(cluster: Cluster) -> str:
    return str(random_base(cluster.folder / "wide", **WIDE))


def zero3(cluster: Cluster, **changes: Any) -> str:
    """ZeRO-3 that keeps no weight whole and gathers each where it is used."""
    path = cluster.folder / f"zero3_{'_'.join(changes)}.json"
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        **changes,
    }
    path.write_text(json.dumps({"zero_optimization": zero}))
    return str(path)


def predicted(cluster: Cluster, name: str, ranks: int) -> Traffic:
    recipe = load_recipe(str(cluster.folder / f"{name}.yaml"))
    sharding = Sharding.of(recipe, ranks, "fp32")
    return traffic(parameters_of(recipe), sharding, recipe.model.recompute)


def sent_per_step(cluster: Cluster, name: str, base: str, config: str, packs: int) -> list[float]:
    """Bytes by each host's interface."""
    run = PausedRun(
        cluster,
        name,
        [FIRST, LAST],
        steps=LAST + 1,
        model={"base": base},
        checkpoint={"every": 0},
        engine={"packs_per_step": packs, "deepspeed": config},
    )
    counts = []
    for step in (FIRST, LAST):
        run.wait_until_paused(step)
        counts.append([host.bytes_sent() for host in cluster.hosts.hosts])
        run.go_on(step)
    run.command.succeed()
    return [(after - before) / (LAST - FIRST) for before, after in zip(*counts)]


def test_what_crosses_the_interface_in_a_step_is_what_was_predicted(cluster: Cluster, wide: str):
    sent = sent_per_step(cluster, "counted", wide, zero3(cluster), packs=2)
    expected = predicted(cluster, "counted", ranks=2)
    print(f"sent {sent}, predicted {expected}")
