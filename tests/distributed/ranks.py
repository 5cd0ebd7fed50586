"""Processes for tests that need real ranks, joined by gloo. Every test that starts ranks does so
through this module.

One server process imports torch, DeepSpeed and this project once, and forks: the imports take
longer than a run of a few steps, and the tests start hundreds of ranks. The fixtures of conftest.py
hold one server for the test session.

- `Ranks` (fixture `ranks(n)`): a group of n ranks that stays alive. `group.call(function,
  **arguments)` runs a function of a module of this folder on every rank and returns what each rank
  returned. For tests of the engine, the losses and checkpoints, which need a process group but no
  command line.
- `ForkServer.start` (fixture `server`): a whole run of `scripts/train.py` on several ranks, each a
  fork, with an optional fault (faults.py). For tests of what happens to runs: faults, resuming,
  refusals.
- `run_command`: any command with its own imports, as a user types it (`deepspeed ...`,
  `torchrun ...`). It costs seconds per rank: for the few tests of the launchers and of the command
  line itself.

Common to all: `environment_of_tests` (one thread per process, CPU only, no launcher's variables),
`variables_of_rank`, `free_port`, time-outs far above what a slow machine needs, the end of every
rank's log in the message of a failure, and no process left behind: processes are ended by their
ids, and the server ends its children when its input is closed, which happens too when the test
session is killed.

This file is also what the server runs, and therefore longer than other files.
"""

import atexit
import gc
import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

# In the environment of every run, and to be found in nothing that it leaves.
SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")
SECRET = "sk-a-secret-that-nobody-writes-down"

MARK = "UNO_DS_TEST_COMMAND"
# Guards against hangs, many times what a start, a call and a run take on a slow machine.
START_TIMEOUT = CALL_TIMEOUT = RUN_TIMEOUT = 400.0
STOP_TIMEOUT = 10.0
# Between the first rank of a run that fails and the end of the others, as a launcher does.
GRACE = 1.5
POLL = 0.02


class RanksFailed(AssertionError):
    """A process raised, died, or did not answer in time. The message holds the end of what every
    rank printed."""


# What all processes have in common.


def environment_of_tests() -> dict[str, str]:
    """This process's environment for processes that it starts: one thread each, CPU only, no
    launcher's variables."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in variables_of_rank(0, 1, 0)
    }
    return inherited | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "PYTHONFAULTHANDLER": "1",
        # Threads that spin while they wait take the cores from those they wait for.
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def variables_of_rank(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables that a launcher sets for a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def logs_of(logs: list[Path], codes: list[int | None]) -> str:
    """The end of every rank's log, below its exit code."""
    return "\n".join(
        f"--- rank {rank} (exit code {code}):\n{log.read_text()[-5000:]}"
        for rank, (log, code) in enumerate(zip(logs, codes, strict=True))
    )


class ForkServer:
    """The process that forks ranks. It answers one question, a line of JSON, at a time."""

    def __init__(self, folder: Path):
        self._log = folder / "server.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-u", __file__],
                env=environment_of_tests() | dict.fromkeys(SECRETS, SECRET),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        atexit.register(self.close)
        self._read()

    def start(
        self, home: Path, ranks: int, arguments: list[str], fault: dict[str, Any] | None = None
    ) -> "ForkedRun":
        """A run of train.py in folder `home`. `fault`: what `faults.install` is given, on every
        rank."""
        return ForkedRun(self, home, ranks, arguments, fault or {})

    def fork(self, work: dict[str, Any], log: Path, variables: dict[str, str]) -> int:
        """The id of a new process that does `work` (see `_child`) and prints into `log`."""
        log.unlink(missing_ok=True)
        log.touch()
        return self._ask({"work": work, "log": str(log), "variables": variables})

    def exit_code(self, pid: int) -> int | None:
        """Of a process that `fork` started: negative for signals, None while it runs."""
        return self._ask({"poll": pid})

    def close(self) -> None:
        """Ends the server and every process that it forked."""
        if self._process.stdin.closed:
            return
        self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, question: dict[str, Any]) -> Any:
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise RanksFailed(f"the server ended:\n{self._log.read_text()[-5000:]}")
        return json.loads(line)


class ForkedRun:
    """The ranks of one run of train.py."""

    def __init__(
        self,
        server: ForkServer,
        home: Path,
        ranks: int,
        arguments: list[str],
        fault: dict[str, Any],
    ):
        self._server = server
        self.codes: list[int | None] = [None] * ranks
        self.logs = [home / f"rank{rank}.log" for rank in range(ranks)]
        self.started = time.time()
        port = free_port()
        work = {"home": str(home), "arguments": arguments, "fault": fault}
        self.pids = [
            server.fork(work, log, variables_of_rank(rank, ranks, port))
            for rank, log in enumerate(self.logs)
        ]

    def poll(self) -> list[int | None]:
        """Exit codes, negative for signals; None while a rank runs."""
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                self.codes[rank] = self._server.exit_code(pid)
        return self.codes

    def wait(self, timeout: float = RUN_TIMEOUT) -> list[int]:
        """The exit codes. As with a launcher, when a rank fails the others are ended soon after.
        Fails after `timeout` seconds; no rank is left then."""
        deadline, failed = time.time() + timeout, False
        while None in self.poll() and time.time() < deadline:
            if not failed and any(self.codes):
                failed, deadline = True, time.time() + GRACE
            time.sleep(POLL)
        late = None in self.codes and not failed
        self.signal(signal.SIGKILL)
        while None in self.poll():
            time.sleep(POLL)
        if late:
            raise RanksFailed(f"the run did not end within {timeout:.0f} s:\n{self.output()}")
        return self.codes

    def signal(self, number: int, rank: int | None = None) -> None:
        for which, pid in enumerate(self.pids):
            if self.poll()[which] is None and rank in (None, which):
                os.kill(pid, number)

    def output(self) -> str:
        return logs_of(self.logs, self.codes)


class Ranks:
    """`size` ranks on this machine that run one function after another; the first call starts them.
    After a failure none of them is left, and the next call starts new ones."""

    def __init__(self, server: ForkServer, size: int, folder: Path):
        self.size, self.folder = size, folder
        self._server = server
        self.pids: list[int] = []
        self._codes: list[int | None] = []
        self._commands: list[Any] = []
        self._logs: list[Path] = []
        self._starts = self._calls = 0

    def call(
        self, function: Callable[..., Any], *, timeout: float = CALL_TIMEOUT, **arguments: Any
    ) -> list[Any]:
        """What a function of a module in this folder returns on each rank: plain values and
        tensors.

        `arguments` are JSON-able. Raises RanksFailed, with all ranks ended, if one of them raises,
        dies, or has no answer after `timeout` seconds."""
        if not self.pids:
            self._start()
        self._calls += 1
        # pytest names a module by its path; a rank imports it from this folder.
        module = function.__module__.rpartition(".")[2]
        answers = [self.folder / f"call{self._calls}_rank{rank}.pt" for rank in range(self.size)]
        for stream, answer in zip(self._commands, answers, strict=True):
            command = {
                "module": module,
                "function": function.__name__,
                "arguments": arguments,
                "answer": str(answer),
            }
            stream.write(json.dumps(command) + "\n")
            stream.flush()
        self._wait_for(answers, timeout, f"{module}.{function.__name__}({arguments})")
        return [torch.load(answer, weights_only=True) for answer in answers]

    def stop(self) -> list[int]:
        """Ends every rank, by its id if it does not end by itself; returns the exit codes."""
        for stream in self._commands:
            stream.close()
        deadline = time.monotonic() + STOP_TIMEOUT
        while None in self._poll() and time.monotonic() < deadline:
            time.sleep(POLL)
        self._signal(signal.SIGKILL)
        while None in self._poll():
            time.sleep(POLL)
        codes = self._codes
        self.pids, self._commands, self._codes = [], [], []
        return codes

    def _start(self) -> None:
        self._starts += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        prefixes = [self.folder / f"start{self._starts}_rank{rank}" for rank in range(self.size)]
        ready = [prefix.with_suffix(".pt") for prefix in prefixes]
        self._logs = [prefix.with_suffix(".log") for prefix in prefixes]
        self._codes = [None] * self.size
        for rank, prefix in enumerate(prefixes):
            commands = prefix.with_suffix(".commands")
            os.mkfifo(commands)
            work = {"commands": str(commands), "ready": str(ready[rank])}
            variables = variables_of_rank(rank, self.size, port)
            self.pids.append(self._server.fork(work, self._logs[rank], variables))
            # With O_RDWR opening does not wait for the rank, and writing to one that ended is no
            # error: `_wait_for` reports it.
            self._commands.append(os.fdopen(os.open(commands, os.O_RDWR), "w"))
        self._wait_for(ready, START_TIMEOUT, "the start of the ranks")

    def _poll(self) -> list[int | None]:
        for rank, pid in enumerate(self.pids):
            if self._codes[rank] is None:
                self._codes[rank] = self._server.exit_code(pid)
        return self._codes

    def _signal(self, number: int) -> None:
        for pid, code in zip(self.pids, self._poll(), strict=True):
            if code is None:
                os.kill(pid, number)

    def _wait_for(self, files: list[Path], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not all(file.exists() for file in files):
            ended = [rank for rank, code in enumerate(self._poll()) if code is not None]
            if ended or time.monotonic() > deadline:
                missing = [rank for rank, file in enumerate(files) if not file.exists()]
                late = f"rank(s) {missing} gave no answer within {timeout:.0f} s"
                reason = f"rank(s) {ended} ended" if ended else late
                # A rank that is still there writes into its log what it was waiting for.
                self._signal(signal.SIGABRT)
                time.sleep(0.5)
                self._signal(signal.SIGKILL)
                logs = logs_of(self._logs, self.stop())
                raise RanksFailed(f"{what}: {reason}.\n{logs}")
            time.sleep(POLL)


def run_command(command: list[str], folder: Path, timeout: float) -> tuple[int, str]:
    """(exit code, what it and its children printed) of a command run in `folder`. Nothing that it
    started outlives it: what is left after it, or after `timeout` seconds, is ended by its id, and
    is a failure."""
    log, mark = folder / "command.log", uuid.uuid4().hex
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment_of_tests() | {MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        code: int | None = process.wait(timeout)
        reason = "left processes behind"
    except subprocess.TimeoutExpired:
        code, reason = None, f"did not end within {timeout:.0f} s"
    left = []
    while remaining := _marked(mark):
        for one in remaining:
            one.kill()
        psutil.wait_procs(remaining, STOP_TIMEOUT)
        left += remaining
    process.wait()
    text = log.read_text()
    if code is None or left:
        raise RanksFailed(f"{' '.join(command)} {reason}:\n{text[-6000:]}")
    return code, text


def _marked(mark: str) -> list[psutil.Process]:
    """Processes with this mark in their environment: torchrun's are in sessions of their own and
    their parent may be gone."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


# What the server and its children run.


def serve() -> None:
    """Forks and waits as asked on the input, until that is closed; then ends every child that is
    left."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _import_what_a_run_imports()
    torch.set_num_threads(1)
    # A collection in a child would visit, and so copy, every object of this process: 0.7 seconds of
    # each rank, since DeepSpeed collects when it starts.
    gc.collect()
    gc.freeze()
    _write_line(answers, "ready")
    running = set()
    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            running.discard(pid)
            _write_line(answers, os.waitstatus_to_exitcode(status) if pid else None)
            continue
        pid = os.fork()
        if not pid:
            answers.close()
            _child(question)
        running.add(pid)
        _write_line(answers, pid)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _import_what_a_run_imports() -> None:
    """Including what is imported only when it is used, and what matplotlib loads for its first
    figure: a fifth of a short run's processor time. F401: they are imported for the children."""
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    import faults  # noqa: F401
    import matplotlib.pyplot
    import PIL.Image
    import pyarrow.pandas_compat  # noqa: F401
    import setuptools  # noqa: F401
    import torch._dynamo
    import torch._inductor.compile_fx  # noqa: F401

    PIL.Image.init()
    figure, axes = matplotlib.pyplot.subplots()
    axes.plot([1, 2], label="label")
    axes.legend()
    figure.savefig(io.BytesIO())
    matplotlib.pyplot.close(figure)


def _write_line(stream: Any, answer: Any) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


def _child(question: dict[str, Any]) -> None:
    """One rank: of a whole run, or of a group that waits for commands."""
    log = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= question["variables"]
    work, code = question["work"], 1
    try:
        code = _serve_calls(**work) if "commands" in work else _train(**work)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # The other ranks may wait for this one in a collective: end without asking them.
        os._exit(code)


def _train(home: str, arguments: list[str], fault: dict[str, Any]) -> int:
    import faults

    os.chdir(home)
    sys.argv = ["train.py", *arguments]
    faults.install(**fault)
    return faults.main(arguments)


def _serve_calls(commands: str, ready: str) -> int:
    """Joins the other ranks, then runs what it reads from the pipe `commands`, line by line, until
    that is closed."""
    from uno_ds.training.process_group import start_process_group

    with open(commands) as stream:
        start_process_group()
        _write(None, Path(ready))
        for line in stream:
            command = json.loads(line)
            print(
                f"* {command['module']}.{command['function']}({command['arguments']})", flush=True
            )
            function = getattr(importlib.import_module(command["module"]), command["function"])
            _write(function(**command["arguments"]), Path(command["answer"]))
    return 0


def _write(answer: Any, path: Path) -> None:
    partial = path.with_suffix(".part")
    torch.save(answer, partial)
    partial.rename(path)


if __name__ == "__main__":
    tests = Path(__file__).parents[1]
    sys.path += [str(tests / "helpers"), str(tests.parent)]
    serve()
