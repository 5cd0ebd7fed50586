"""Hosts made of network namespaces, joined by links of a given rate. Needs Linux, root, and
iproute2."""

import os
import shutil
import signal
import subprocess
from types import FrameType, TracebackType
from typing import Any

from uno_ds.settings import SettingsError

PREFIX = "unobench"
NETWORK = "10.87.0."
DEVICE = "eth0"


class Hosts:
    """So many hosts, each in a namespace with an address and a link on which it sends at most
    `megabits` a second. They are removed at the end of the block, to which SIGTERM leads too, and
    those of an earlier process that was killed at its start."""

    def __init__(self, count: int, megabits: float):
        self.count, self.megabits = count, megabits
        self._handler_before: Any = signal.SIG_DFL
        self._names = [f"{PREFIX}{os.getpid()}-{place}" for place in ("switch", *range(count))]

    def __enter__(self) -> "Hosts":
        if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
            raise SettingsError("--network", "needs root, and ip and tc of iproute2.")
        _remove_left_over()
        self._handler_before = signal.signal(signal.SIGTERM, _exit)
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def place(self, host: int) -> tuple[list[str], dict[str, str]]:
        """(what comes before a command that runs on the host, variables that it needs)."""
        name = self._names[host + 1]
        variables = {"MASTER_ADDR": f"{NETWORK}1", "GLOO_SOCKET_IFNAME": DEVICE}
        return ["ip", "netns", "exec", name], variables

    def _make(self) -> None:
        switch, *hosts = self._names
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for number, host in enumerate(hosts):
            port = f"port{number}"
            _run("ip", "netns", "add", host)
            link = ("ip", "-n", host, "link")
            _run(*link, "add", DEVICE, "type", "veth", "peer", "name", port, "netns", switch)
            address = f"{NETWORK}{number + 1}/24"
            _run("ip", "-n", host, "addr", "add", address, "dev", DEVICE)
            _run(*link, "set", DEVICE, "up")
            _run(*link, "set", "lo", "up")
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            limit = ("rate", f"{self.megabits:g}mbit", "burst", "256kb", "latency", "400ms")
            _run("tc", "-n", host, "qdisc", "add", "dev", DEVICE, "root", "tbf", *limit)

    def _remove(self) -> None:
        for name in self._names:
            # Links go with their namespace.
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        signal.signal(signal.SIGTERM, self._handler_before)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _remove_left_over() -> None:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for line in listed.splitlines():
        name = line.split()[0]
        process = name.removeprefix(PREFIX).partition("-")[0]
        if name.startswith(PREFIX) and not os.path.exists(f"/proc/{process}"):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SettingsError("--network", f"{' '.join(command)}: {done.stderr.strip()}.")
