"""What crosses the interface between hosts, and what a slow network costs, against the traffic
model's prediction."""

import json
from dataclasses import replace
from statistics import median
from typing import Any

import metric_runs
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
REPEATED = tuple(field for field in metric_runs.REPEATED if field != "skipped")
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
    # gloo does a reduce-scatter by an all-reduce.
    sharding = replace(Sharding.of(recipe, ranks, "fp32"), scatters=False)
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
    for count in sent:
        assert expected.total <= count < at_most(expected)


def at_most(expected: Traffic) -> float:
    """Headers of packets (66 of 1,514 bytes), acknowledgements (66 bytes for two packets) and the
    small messages of a step add less than a tenth."""
    return 1.1 * expected.total


def seconds_per_step(cluster: Cluster, name: str, base: str, config: str) -> float:
    """The median of a run's steps without the first ones, in which DeepSpeed records the order of
    modules."""
    cluster.train(
        name,
        steps=LAST,
        model={"base": base},
        checkpoint={"every": 0},
        engine={"packs_per_step": 2, "deepspeed": config},
    ).succeed()
    rows = read_metrics(cluster.of(name) / "metrics.jsonl")
    return median(row["step_seconds"] for row in rows if row["step"] > 2)


@pytest.fixture(scope="module")
def unlimited(cluster: Cluster, wide: str) -> float:
    return seconds_per_step(cluster, "unlimited", wide, zero3(cluster))


def test_a_step_over_a_slow_network_takes_what_the_bytes_take(
    cluster: Cluster, wide: str, unlimited: float
):
    rate, burst = 40_000_000, 100_000
    with cluster.hosts.limited(rate, burst):
        seconds = seconds_per_step(cluster, "limited", wide, zero3(cluster))
    sent = predicted(cluster, "limited", ranks=2).total
    expected = unlimited + 8 * sent / rate
    print(
        f"{rate / 1e6:.0f} Mbit/s: {seconds:.2f} s a step, predicted {expected:.2f} "
        f"({unlimited:.2f} without a limit, {sent:,} bytes): {seconds / expected - 1:+.0%}"
    )
    assert seconds > 8 * (sent - burst) / rate


@pytest.mark.parametrize(("delay", "lost"), [(0.005, 0.0), (0.005, 0.01)])
def test_delays_and_losses_make_training_slower_and_change_no_number(
    cluster: Cluster, wide: str, unlimited: float, delay: float, lost: float
):
    name = f"far_{lost}"
    with cluster.hosts.far_apart(delay, lost) as by:
        seconds = seconds_per_step(cluster, name, wide, zero3(cluster))
    print(f"{by}: {delay * 1e3:.0f} ms, {lost:.0%} lost: {seconds:.2f} s a step, {unlimited:.2f}")
    # Without prefetching a module waits for the other host's share of its weights.
    parameters = parameters_of(load_recipe(str(cluster.folder / f"{name}.yaml")))
    modules = {parameter.name.rpartition(".")[0] for parameter in parameters}
    assert seconds > len(modules) * delay
    assert cluster.curve(name, REPEATED) == cluster.curve("unlimited", REPEATED)


def test_hpz_sends_trained_weights_once_a_step_and_frozen_ones_never_between_hosts(
    cluster: Cluster, wide: str, request: pytest.FixtureRequest
):
    """Two ranks on each of two hosts. DeepSpeed orders ranks by host, so that both of a secondary
    partition are on one."""
    cluster.hosts.write_hostfile(2)
    request.addfinalizer(lambda: cluster.hosts.write_hostfile(1))
    configs = {"plain": zero3(cluster), "hpz": zero3(cluster, zero_hpz_partition_size=2)}
    sent, expected = {}, {}
    for name, config in configs.items():
        sent[name] = sum(sent_per_step(cluster, name, wide, config, packs=4)) / 2
        expected[name] = predicted(cluster, name, ranks=4)
        # What is sent in a ring of ranks crosses each host's interface once. Within a host is what
        # does not.
        across = replace(expected[name], gather_within_node=0)
        assert across.total <= sent[name] < at_most(across)
    print(f"sent {sent}, predicted {expected}")
    # The fall is far more than what the two bounds leave open.
    fallen = expected["plain"].gather_weights - expected["hpz"].gather_weights
    assert expected["hpz"].gather_within_node > 0 and fallen > 0.5 * expected["plain"].total
