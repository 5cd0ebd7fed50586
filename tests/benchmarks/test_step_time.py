"""The modelled step against measured ones: what is compared, and what is refused."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.commands import step_time
from benchmarks.suite import namespaces
from benchmarks.suite.results import validate
from uno_ds.cost.fit import sharding_of
from uno_ds.cost.parameters import parameters_of
from uno_ds.cost.scaling import COMPUTING, NETWORK
from uno_ds.cost.traffic import traffic


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float | None]]:
    """(ranks, Mbit/s) of each measurement; a step takes 0.5 s on every rank."""
    calls: list[tuple[int, float | None]] = []

    def seconds(recipe: str, configuration: str, ranks: int, megabits: float | None) -> float:
        calls.append((ranks, megabits))
        return 0.5 * ranks

    monkeypatch.setattr(step_time, "measured_seconds", seconds)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    return calls


def test_ranks_that_share_cores_and_a_link_are_compared_with_the_model(
    measured: list[tuple[int, float | None]], tmp_path: Path, capsys: pytest.CaptureFixture
):
    path = tmp_path / "result.json"
    flags = ["--ranks", "1,2,3", "--network", "8,1e5", "--configurations", "zero2"]
    assert main(["step_time", *flags, "--json", str(path)]) == 0
    assert measured == [(1, None), (2, 8.0), (3, 8.0), (2, 1e5), (3, 1e5)]
    result = json.loads(path.read_text())
    assert not validate(result) and len(result["measurements"]) == 6
    entries = {(entry["ranks"], entry["megabits"]): entry for entry in result["measurements"]}
    alone = entries[1, 8.0]
    assert alone["modelled_seconds"] == pytest.approx(0.5) and alone["error"] == pytest.approx(0)
    # Three ranks on two cores compute at two thirds of the rate.
    fast = entries[3, 1e5]
    assert fast["modelled_seconds"] == pytest.approx(0.75, rel=0.05) and fast["bound"] == COMPUTING
    assert fast["error"] == pytest.approx(fast["modelled_seconds"] / 1.5 - 1)
    slow, slower = entries[2, 8.0], entries[3, 8.0]
    assert slow["bound"] == NETWORK and slow["modelled_without_overlap"] > slow["modelled_seconds"]
    # (R - 1) / R of the bytes: half of them on two ranks, two thirds on three.
    sending = [
        entry["modelled_without_overlap"] - computing
        for entry, computing in ((slow, 0.5), (slower, 0.75))
    ]
    assert sending[1] / sending[0] == pytest.approx(4 / 3, rel=1e-3)
    assert "network between hosts" in capsys.readouterr().out


def test_a_reduce_scatter_of_gloo_sends_what_an_all_reduce_does(
    measured: list[tuple[int, float | None]],
):
    recipe = step_time._recipe("tiny", "zero3", 2)
    sent = traffic(parameters_of(recipe), sharding_of(recipe, 2), recipe.model.recompute)
    entry = step_time.compare("tiny", "zero3", 2, 8.0, alone=0.5)
    sending = entry["modelled_without_overlap"] - 0.5
    assert sending * 1e6 * step_time.PAYLOAD == pytest.approx(sent.total + sent.reduce_gradients)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ranks", "two"), "--ranks and --network are numbers separated by commas"),
        (("--ranks", "0"), "--ranks are at least 1"),
        (("--network", "0"), "--network is above 0"),
    ],
)
def test_flags_that_no_host_has_are_refused(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture
):
    assert main(["step_time", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_root_hosts_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(namespaces.SettingsError) as raised, namespaces.Hosts(2, 100):
        raise AssertionError("entered")
    assert str(raised.value) == "--network: needs root, and ip and tc of iproute2."


class Command:
    """Stands for the end of a command of `ip` or `tc`; all are in `commands`."""

    stdout, stderr = "unobench999999999-0 (id: 1)\nother\n", "no such device"

    def __init__(self, command: list[str], fails: str):
        self.returncode = int(bool(fails) and fails in command)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[list[str]]:
    """What is run in place of `ip` and `tc`. The parameter: a word of commands that fail."""
    found: list[list[str]] = []

    def run(command: list[str], **options: object) -> Command:
        found.append([*command])
        return Command(command, request.param)

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(namespaces.shutil, "which", lambda name: name)
    monkeypatch.setattr(namespaces.subprocess, "run", run)
    return found


def removed(commands: list[list[str]]) -> list[str]:
    return [command[3] for command in commands if command[:3] == ["ip", "netns", "del"]]


def made(commands: list[list[str]]) -> set[str]:
    return {command[3] for command in commands if command[:3] == ["ip", "netns", "add"]}


@pytest.mark.parametrize("commands", ["tbf"], indirect=True)
def test_a_host_that_cannot_be_made_leaves_none_behind(commands: list[list[str]]):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(namespaces.SettingsError, match="tbf .*: no such device"):
        namespaces.Hosts(1, 100).__enter__()
    assert len(made(commands)) == 2 and made(commands) <= set(removed(commands))
    # Left by a process that was killed.
    assert removed(commands)[0] == "unobench999999999-0" and "other" not in removed(commands)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("commands", [""], indirect=True)
def test_sigterm_leaves_no_host_behind(commands: list[list[str]]):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as raised, namespaces.Hosts(2, 100):
        assert len(made(commands)) == 3 and not made(commands) & set(removed(commands))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert raised.value.code == 143 and made(commands) <= set(removed(commands))
    assert signal.getsignal(signal.SIGTERM) == before
