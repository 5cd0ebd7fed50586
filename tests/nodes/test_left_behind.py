"""Hosts leave no process, namespace, mount or device behind, whatever ends the tests."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hosts
import psutil
import pytest
from hosts import ROOT, Hosts

HERE = Path(__file__).parent
# Makes hosts with a command on each, says where, and waits.
PROGRAM = """
import sys, time
from pathlib import Path
from hosts import Hosts
made = Hosts(2, Path(sys.argv[1]))
commands = [made.start("sleep", "1000", on=number) for number in (0, 1)]
ids = [str(made.switch._id), *(str(host._id) for host in made.hosts)]
print(" ".join(ids), flush=True)
time.sleep(1000)
"""


def living(namespaces: set[str]) -> list[str]:
    """Processes in these process namespaces."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        # One may end at any moment.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if str(os.stat(entry / "ns/pid").st_ino) in namespaces:
                found.append((entry / "cmdline").read_text())
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + hosts.START_TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def outside() -> tuple[str, list[str], list[str]]:
    """Devices, mounts and named network namespaces of this machine, as seen from outside."""
    devices = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True)
    names = sorted(line.split()[1] for line in devices.stdout.splitlines())
    mounts = sorted(Path("/proc/self/mounts").read_text().splitlines())
    named = sorted(path.name for path in Path("/run/netns").glob("*"))
    return " ".join(names), mounts, named


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_the_tests_are_killed(tmp_path: Path, number: signal.Signals):
    before = outside()
    search = os.pathsep.join(str(ROOT / f"tests/{name}") for name in ("nodes", "distributed"))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "hosts")],
        env=os.environ | {"PYTHONPATH": search},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    namespaces = set(process.stdout.readline().split())
    assert len(namespaces) == 3
    # The switch's first process; that of each host, its sshd and the command.
    wait_until(lambda: len(living(namespaces)) == 1 + 2 * 3)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    process.wait()
    process.stdout.close()
    wait_until(lambda: not living(namespaces))
    wait_until(lambda: not any(child.is_running() for child in started))
    assert outside() == before


def test_nothing_is_left_when_a_host_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = []

    def fail(self: Hosts, host: hosts.Host) -> None:
        made.extend(str(namespace._id) for namespace in self._open)
        raise AssertionError("no sshd")

    before = outside()
    monkeypatch.setattr(Hosts, "_start_sshd", fail)
    with pytest.raises(AssertionError, match="no sshd"):
        Hosts(2, tmp_path / "hosts")
    assert len(made) == 3 and living(set(made)) == []
    assert outside() == before


def test_without_root_all_is_skipped_with_the_reason_in_one_line():
    command = [sys.executable, "-m", "pytest", str(HERE), "-m", "nodes", "-q"]
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", *command, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "network namespaces and sshd need root" in done.stdout
    assert " passed" not in done.stdout and " skipped" in done.stdout


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch):
    there = hosts.which
    monkeypatch.setattr(
        hosts, "which", lambda name: None if name in ("pdsh", "tc") else there(name)
    )
    assert hosts.missing() == "no tc, pdsh: apt-get install iproute2 pdsh"
