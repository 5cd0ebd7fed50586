"""Hosts made of Linux namespaces on one machine: each has its own network, processes, mounts, name
and sshd, and a cable to a common switch. Needs root.

The first process of every namespace waits for the end of its input, a pipe of this process. When
that is closed, which also happens when this process is killed, it ends; the kernel then ends all
processes of the namespace and removes its mounts, devices and addresses. Nothing has a name outside
of the namespaces, so there is nothing else to remove.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import psutil
from ranks import environment_of_tests

ROOT = Path(__file__).resolve().parent.parent.parent
# Of the block for documentation (RFC 5737), so of no real network.
ADDRESS = "192.0.2.{}"
# Reaps what is orphaned in its namespace and ends at the end of its input.
KEEPER = (
    "import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
    "print('ready', flush=True); sys.stdin.read()"
)
NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid")
# Each names the Debian package that has it.
PROGRAMS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
    "pdsh": "pdsh",
    "hostname": "hostname",
    "pkill": "procps",
    "taskset": "util-linux",
}
SERVICES = ("sshd: /usr/sbin/sshd", "munged ", "slurmctld ", ": slurmscriptd", "slurmd ")
# Guards against hangs, many times what a start and a run of a few steps take.
START_TIMEOUT, RUN_TIMEOUT = 60.0, 500.0


def missing() -> str:
    """Why hosts cannot be made here, in one line; empty if they can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces and sshd need root"
    absent = [name for name in PROGRAMS if which(name) is None]
    if absent:
        packages = sorted({PROGRAMS[name] for name in absent})
        return f"no {', '.join(absent)}: apt-get install {' '.join(packages)}"
    made = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "ip", "link", "add", "type", "veth"],
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT,
    )
    return made.stderr.strip().replace("\n", "; ")


def which(name: str) -> str | None:
    """Also in the folders of root's programs, which a user's PATH may lack."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Namespace:
    """Namespaces of their own, held by one process."""

    def __init__(self, name: str):
        self.name = name
        command = ["unshare", *NAMESPACES, "--fork", "--kill-child=SIGKILL", "--mount-proc"]
        self._process = subprocess.Popen(
            [*command, "--propagation", "private", sys.executable, "-I", "-S", "-c", KEEPER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", f"{name}: no namespaces"
        (self.pid,) = (child.pid for child in psutil.Process(self._process.pid).children())
        self._id = os.stat(f"/proc/{self.pid}/ns/pid").st_ino

    def command(self, *command: str, only_network: bool = False) -> list[str]:
        """What runs `command` in here; `only_network`: with the mounts and processes outside."""
        kinds = ("--net",) if only_network else (*NAMESPACES, f"--wdns={ROOT}")
        return ["nsenter", "--target", str(self.pid), *kinds, *command]

    def run(self, *command: str, only_network: bool = False) -> str:
        """What it printed. Raises if it fails."""
        done = subprocess.run(
            self.command(*command, only_network=only_network),
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{self.name}: {' '.join(command)}: {done.stderr}"
        return done.stdout

    def processes(self) -> list[str]:
        """Command lines of the living processes in here, without the one that holds it."""
        found = []
        for process in psutil.process_iter():
            try:
                inside = os.stat(f"/proc/{process.pid}/ns/pid").st_ino == self._id
                if inside and process.pid != self.pid and process.status() != "zombie":
                    found.append(" ".join(process.cmdline()))
            except (OSError, psutil.Error):
                continue
        return found

    def close(self) -> None:
        """Returns when all its processes have ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(START_TIMEOUT)
        self._process.stdout.close()


class Host(Namespace):
    """A machine of the network, with an sshd."""

    def __init__(self, number: int, folder: Path):
        super().__init__(f"host{number}")
        self.address = ADDRESS.format(number + 1)
        self.folder = folder / self.name
        self.folder.mkdir()
        cores = sorted(os.sched_getaffinity(0))
        self.core = str(cores[number % len(cores)])

    def mount(self, source: Path, target: Path) -> None:
        """Replaces a folder or file, for this host only."""
        self.run("mount", "--bind", str(source), str(target))

    def cut(self) -> None:
        """Takes its link down, as an unplugged cable does."""
        self.run("ip", "link", "set", "eth0", "down")

    def plug(self) -> None:
        self.run("ip", "link", "set", "eth0", "up")

    def bytes_sent(self) -> int:
        """By its interface since the start, with the headers of all layers."""
        (device,) = json.loads(self.run("ip", "-j", "-s", "link", "show", "eth0"))
        return int(device["stats64"]["tx"]["bytes"])


class Hosts:
    """`count` hosts on one switch, which reach each other by ssh without a password."""

    def __init__(self, count: int, folder: Path):
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        self._open: list[Namespace] = []
        try:
            self.switch = Namespace("switch")
            self._open.append(self.switch)
            self.switch.run("ip", "link", "add", "switch", "type", "bridge", only_network=True)
            self.switch.run("ip", "link", "set", "switch", "up", only_network=True)
            self.hosts: list[Host] = []
            for number in range(count):
                host = Host(number, folder)
                self._open.append(host)
                self.hosts.append(host)
            self._write_ssh()
            for host in self.hosts:
                self._connect(host)
                self._start_sshd(host)
        except BaseException:
            self.close()
            raise
        self.hostfile = folder / "hostfile"
        self.write_hostfile(1)
        self.deepspeed_environment()

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        while self._open:
            self._open.pop().close()

    def write_hostfile(self, slots: int) -> None:
        lines = [f"{host.name} slots={slots}\n" for host in self.hosts]
        self.hostfile.write_text("".join(lines))

    def deepspeed_environment(self, **variables: str) -> None:
        """What DeepSpeed exports to all hosts, besides what it always does."""
        given = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **variables}
        lines = [f"{name}={value}\n" for name, value in given.items()]
        (self.home / ".deepspeed_env").write_text("".join(lines))

    def names(self, own: str = "{address}") -> None:
        """Writes /etc/hosts of every host. own: the address that it gives its own name."""
        for host in self.hosts:
            lines = ["127.0.0.1 localhost\n"]
            for other in self.hosts:
                address = own.format(address=host.address) if other is host else other.address
                lines.append(f"{address} {other.name}\n")
            (host.folder / "hosts").write_text("".join(lines))

    def start(self, *command: str, on: int = 0, log: str = "command.log", **more: str) -> "Command":
        """Starts a command in the root of the checkout; `more`: environment variables."""
        return Command(self.hosts[on], command, self.folder / log, self._environment() | more)

    def train(
        self,
        *arguments: str,
        script: str = "scripts/train.py",
        hostfile: Path | None = None,
        **more: str,
    ) -> "Command":
        """`deepspeed --hostfile` as a user types it on the first host."""
        hosts = str(hostfile or self.hostfile)
        command = [str(ROOT / ".venv/bin/deepspeed"), "--hostfile", hosts, script]
        return self.start(*command, *arguments, log="train.log", **more)

    @contextmanager
    def limited(self, bits_per_second: int, burst: int) -> Iterator[None]:
        """What every host sends is limited to this rate, after `burst` bytes at once."""
        limit = ("rate", f"{bits_per_second}bit", "burst", str(burst), "latency", "200ms")
        for host in self.hosts:
            host.run("tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *limit)
        try:
            yield
        finally:
            for host in self.hosts:
                host.run("tc", "qdisc", "del", "dev", "eth0", "root")

    @contextmanager
    def far_apart(self, seconds: float, lost: float) -> Iterator[str]:
        """Every frame between the two hosts takes so long, and this share of them is lost; yields
        what does it: netem, or a process where the kernel has no netem."""
        netem = ("netem", "delay", f"{round(seconds * 1e6)}us", "loss", f"{lost:%}")
        try:
            for host in self.hosts:
                host.run("tc", "qdisc", "add", "dev", "eth0", "root", *netem)
        except AssertionError:
            with self._delay_line(seconds, lost):
                yield "a delay line"
            return
        try:
            yield "netem"
        finally:
            for host in self.hosts:
                host.run("tc", "qdisc", "del", "dev", "eth0", "root")

    @contextmanager
    def _delay_line(self, seconds: float, lost: float) -> Iterator[None]:
        """The hosts' addresses move to the devices of delay_line.py."""
        first, second = self.hosts
        program = [sys.executable, "-I", "-S", str(Path(__file__).with_name("delay_line.py"))]
        line = subprocess.Popen(
            # In the processes of the switch, so that it ends with them.
            ["nsenter", "--target", str(self.switch.pid), "--pid", *program]
            + [str(first.pid), str(second.pid), str(seconds), str(lost)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert line.stdin is not None and line.stdout is not None
        assert line.stdout.readline() == "ready\n"
        for host in self.hosts:
            host.run("ip", "address", "flush", "dev", "eth0")
            host.run("ip", "link", "set", "wan0", "mtu", "9000", "up")
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "wan0")
        try:
            yield
        finally:
            line.stdin.close()
            line.wait(START_TIMEOUT)
            line.stdout.close()
            for host in self.hosts:
                host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")

    def left(self) -> list[str]:
        """Processes on the hosts besides the services."""
        lines = [line for host in self.hosts for line in host.processes()]
        return [line for line in lines if not line.startswith(SERVICES)]

    def wait_until_nothing_runs(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while left := self.left():
            assert time.monotonic() < deadline, left
            time.sleep(0.1)

    def _environment(self) -> dict[str, str]:
        inherited = environment_of_tests()
        path = f"{inherited['PATH']}:/usr/sbin:/sbin"
        return inherited | {"HOME": str(self.home), "PATH": path}

    def _write_ssh(self) -> None:
        """/etc/ssh and /etc/hosts of the hosts. A folder takes the place of ~/.ssh where there is
        one: it could contain other settings."""
        ssh = self.folder / "ssh"
        ssh.mkdir()
        key = ssh / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        (ssh / "ssh_config").write_text(
            f"IdentityFile {key}\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
            "BatchMode yes\nLogLevel ERROR\n"
        )
        (ssh / "sshd_config").write_text(
            f"HostKey {key}\nAuthorizedKeysFile {key}.pub\nStrictModes no\nUsePAM no\n"
            "PasswordAuthentication no\nPermitRootLogin prohibit-password\nPidFile none\n"
            "UseDNS no\nPrintMotd no\nPrintLastLog no\nSubsystem sftp internal-sftp\n"
            "ClientAliveInterval 5\nClientAliveCountMax 3\n"
        )
        self.names()

    def _connect(self, host: Host) -> None:
        port = f"to_{host.name}"
        cable = ("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0")
        self.switch.run(*cable, "netns", str(host.pid), only_network=True)
        self.switch.run("ip", "link", "set", port, "master", "switch", "up", only_network=True)
        host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            host.run("ip", "link", "set", device, "up")
        host.run("hostname", host.name)

    def _start_sshd(self, host: Host) -> None:
        for folder in ("/run", "/dev/shm"):
            host.run("mount", "-t", "tmpfs", "none", folder)
        host.run("mkdir", "/run/sshd")
        host.mount(self.folder / "ssh", Path("/etc/ssh"))
        host.mount(host.folder / "hosts", Path("/etc/hosts"))
        if Path("/root/.ssh").is_dir():
            host.run("mount", "-t", "tmpfs", "none", "/root/.ssh")
        log = host.folder / "sshd.log"
        # One core for each host, and so one thread for each rank, on one host as on two.
        host.run("taskset", "--cpu-list", host.core, "/usr/sbin/sshd", "-E", str(log))
        deadline = time.monotonic() + START_TIMEOUT
        while "Server listening" not in (log.read_text() if log.exists() else ""):
            assert time.monotonic() < deadline, f"{host.name}: no sshd"
            time.sleep(0.05)


class Command:
    """A command that runs on a host."""

    def __init__(self, host: Host, command: Sequence[str], log: Path, environment: dict[str, str]):
        self.log, self.started = log, time.monotonic()
        self._command = " ".join(command)
        with log.open("w") as output:
            self.process = subprocess.Popen(
                host.command(*command),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, timeout: float = RUN_TIMEOUT) -> None:
        """Until it has printed `text`."""
        while text not in self.output():
            ended = self.process.poll()
            assert ended is None, f"{self._command}: ended with {ended}:\n{self.output()[-6000:]}"
            assert time.monotonic() < self.started + timeout, f"no '{text}':\n{self.output()}"
            time.sleep(0.05)

    def wait(self, timeout: float = RUN_TIMEOUT) -> int:
        """The exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self._command} did not end within {timeout:.0f} s:\n{self.output()[-6000:]}"
            ) from None

    def succeed(self, timeout: float = RUN_TIMEOUT) -> str:
        """What it printed. Raises if its exit code is not 0."""
        code = self.wait(timeout)
        assert code == 0, f"{self._command} ended with {code}:\n{self.output()[-8000:]}"
        return self.output()
