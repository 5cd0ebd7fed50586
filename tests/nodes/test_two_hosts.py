"""`deepspeed --hostfile` over two hosts with an sshd each."""

import re
import signal
import time

import metric_runs
import psutil
import pytest
import torch
from cluster import STEPS, Cluster, PausedRun
from hosts import ROOT
from safetensors.torch import load_file

from uno_ds.training.watchdog import SECONDS_FOR_OTHERS, STALLED

REPEATED = tuple(field for field in metric_runs.REPEATED if field != "skipped")
# Of two looks at the clock, of processes that end, of a busy machine.
SLACK = 60.0
# pdsh returns the largest of the hosts' codes, and ssh 255 for a host that it lost.
SSH_FAILED = 255


def assert_same(cluster: Cluster, ours: str, theirs: str, ranks: int = 2) -> None:
    """Metrics of all steps, weights, optimizer and moving average, bit for bit."""
    curve = cluster.curve(ours, REPEATED)
    assert curve == cluster.curve(theirs, REPEATED) and len(curve) == STEPS
    for rank in range(ranks):
        file = f"checkpoints/step_{STEPS}/rank_{rank:05}.safetensors"
        first, second = (load_file(cluster.of(name) / file) for name in (ours, theirs))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="session")
def one_host(cluster: Cluster) -> str:
    """Two ranks on the first host."""
    hostfile = cluster.folder / "one_host"
    hostfile.write_text("host0 slots=2\n")
    arguments = ["--recipe", cluster.recipe("one_host")]
    cluster.hosts.start(
        f"{ROOT}/.venv/bin/deepspeed",
        "--hostfile",
        str(hostfile),
        "--force_multi",
        "scripts/train.py",
        *arguments,
    ).succeed()
    return "one_host"


@pytest.fixture(scope="session")
def two_hosts(cluster: Cluster) -> str:
    output = cluster.train("two_hosts").succeed()
    assert "2 rank(s), ZeRO stage 3" in output
    return "two_hosts"


def test_training_on_two_hosts_equals_one_host_bit_for_bit(
    cluster: Cluster, one_host: str, two_hosts: str
):
    assert_same(cluster, two_hosts, one_host)


def test_hosts_that_know_their_own_name_as_a_loopback_address_meet_all_the_same(
    cluster: Cluster, two_hosts: str
):
    cluster.hosts.names(own="127.0.1.1")
    try:
        output = cluster.train("loopback").succeed()
    finally:
        cluster.hosts.names()
    for rank, host in enumerate(("host0", "host1")):
        assert f"rank {rank}: {host} resolves to no address that other machines reach" in output
    assert_same(cluster, "loopback", two_hosts)


def test_a_link_that_goes_down_in_a_step_ends_the_run_in_time_and_it_goes_on_with_the_host_back(
    cluster: Cluster, two_hosts: str
):
    """ssh to the lost host ends by ServerAliveInterval, as the launch template sets it."""
    stall, alive = 10.0, 3 * 5.0
    exit_file = cluster.folder / "cut.exit"
    flags = ["--exit-file", str(exit_file)]
    ssh = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"
    health = {"stall_seconds": stall}
    run = PausedRun(cluster, "cut", [4], *flags, health=health, PDSH_SSH_ARGS_APPEND=ssh)
    run.wait_until_paused(4)
    cluster.hosts.hosts[1].cut()
    started = time.monotonic()
    run.go_on(4)
    code = run.command.wait()
    seconds = time.monotonic() - started
    print(f"ended with {code} after {seconds:.1f} s")
    # The host without a link sees the folder too, since all this is one machine.
    assert re.match(f"{STALLED} stalled: rank [01] made no progress", exit_file.read_text())
    assert code == SSH_FAILED and seconds < stall + SECONDS_FOR_OTHERS + alive + SLACK
    cluster.hosts.wait_until_nothing_runs()
    cluster.hosts.hosts[1].plug()
    output = cluster.train("cut", "--resume", "auto").succeed()
    assert "--resume: continues after step 2 " in output
    assert_same(cluster, "cut", two_hosts)


def test_the_launch_script_goes_on_with_the_hosts_that_answer(cluster: Cluster, two_hosts: str):
    cluster.hosts.hosts[1].cut()
    command = ["bash", "docs/launch/hostfile.sh", str(cluster.hosts.hostfile)]
    recipe = cluster.recipe("fewer_hosts")
    output = cluster.hosts.start(*command, "--recipe", recipe).succeed()
    assert "do not answer to ssh, or failed: host1; left: 1 host(s)" in output
    assert "1 rank(s), ZeRO stage 3" in output
    steps = [row["step"] for row in cluster.curve("fewer_hosts", ("step",))]
    assert steps == list(range(1, STEPS + 1))


def test_sigterm_to_the_launcher_ends_the_ranks_of_all_hosts_and_the_run_is_saved(
    cluster: Cluster,
):
    run = cluster.train("terminated", steps=100_000, checkpoint={"every": 0})
    run.wait_for("step 5")
    (launcher,) = psutil.Process(run.process.pid).children()
    launcher.send_signal(signal.SIGTERM)
    code = run.wait()
    cluster.hosts.wait_until_nothing_runs()
    summary = cluster.summary("terminated")
    print(f"ended with {code}; {summary['exit']}")
    assert code == 1 and summary["exit"].startswith("interrupted after step")
    assert (cluster.of("terminated") / "checkpoints" / "latest").exists()
