"""Real ranks for tests: a group of processes joined by gloo that stays alive and runs one function after another.

Importing DeepSpeed costs seconds per rank, so a test session starts a group of each size once, and every case calls it.
This file is also what a rank runs.
"""

import atexit
import importlib
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

MARK = "UNO_DS_TEST_COMMAND"
# Guards against hangs, many times what a start and a call take on a slow machine.
START_TIMEOUT, CALL_TIMEOUT, STOP_TIMEOUT = 400.0, 400.0, 10.0


class RanksFailed(AssertionError):
    """A rank raised, died, or did not answer in time; the message holds the end of what every rank printed."""


class Ranks:
    """`size` ranks on this machine, started by the first call. After a failure nothing of them is left, and the next
    call starts new ones."""

    def __init__(self, size: int, folder: Path):
        self.size, self.folder = size, folder
        self._processes: list[subprocess.Popen] = []
        self._starts = self._calls = 0
        # A session that ends before its fixtures do leaves no rank behind either; a killed one closes their input.
        atexit.register(self.stop)

    def call(
        self, function: Callable[..., Any], *, timeout: float = CALL_TIMEOUT, **arguments: Any
    ) -> list[Any]:
        """What the function of a module in this folder returns on each rank: plain values and tensors.

        `arguments` are JSON-able. Raises RanksFailed, with all ranks ended, if one of them raises, dies, or has no
        answer after `timeout` seconds.
        """
        self._start()
        self._calls += 1
        answers = [self.folder / f"call{self._calls}_rank{rank}.pt" for rank in range(self.size)]
        for process, answer in zip(self._processes, answers, strict=True):
            command = {
                "module": function.__module__,
                "function": function.__name__,
                "arguments": arguments,
                "answer": str(answer),
            }
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
        self._wait_for(answers, timeout, f"{function.__module__}.{function.__name__}({arguments})")
        return [torch.load(answer, weights_only=True) for answer in answers]

    def stop(self) -> list[int]:
        """Ends every rank, by its id if it does not go by itself; returns the exit codes."""
        for process in self._processes:
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass
        deadline = time.monotonic() + STOP_TIMEOUT
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        codes = [process.returncode for process in self._processes]
        self._processes = []
        return codes

    def _start(self) -> None:
        if self._processes:
            return
        self._starts += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        port, ready = (
            free_port(),
            [self.folder / f"start{self._starts}_rank{rank}.pt" for rank in range(self.size)],
        )
        for rank in range(self.size):
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": self.size,
                "LOCAL_WORLD_SIZE": self.size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            environment = environment_of_tests() | {
                name: str(value) for name, value in place.items()
            }
            with self._log(rank).open("w") as log:
                command = [sys.executable, "-u", __file__, str(ready[rank])]
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            self._processes.append(process)
        self._wait_for(ready, START_TIMEOUT, "the start of the ranks")

    def _wait_for(self, files: list[Path], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not all(file.exists() for file in files):
            gone = [
                rank for rank, process in enumerate(self._processes) if process.poll() is not None
            ]
            late = time.monotonic() > deadline
            if gone or late:
                missing = [rank for rank, file in enumerate(files) if not file.exists()]
                reason = (
                    f"rank(s) {gone} ended"
                    if gone
                    else f"rank(s) {missing} gave no answer within {timeout:.0f} s"
                )
                self._end_now()
                codes = self.stop()
                logs = [
                    f"--- rank {rank} (exit code {code}):\n{self._log(rank).read_text()[-3000:]}"
                    for rank, code in enumerate(codes)
                ]
                raise RanksFailed("\n".join([f"{what}: {reason}.", *logs]))
            time.sleep(0.02)

    def _end_now(self) -> None:
        """Ends every rank; one that is still there writes into its log what it was waiting for."""
        for process in self._processes:
            process.send_signal(signal.SIGABRT)
        time.sleep(0.5)
        for process in self._processes:
            process.kill()

    def _log(self, rank: int) -> Path:
        return self.folder / f"start{self._starts}_rank{rank}.log"


def run_command(command: list[str], folder: Path, timeout: float) -> tuple[int, str]:
    """(exit code, what it and its children printed) of a command run in `folder`. Nothing that it started outlives it:
    what is left after it, or after `timeout` seconds, is ended by its id, and is a failure."""
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
    """Processes with this mark in their environment: torchrun's are in sessions of their own and their parent may be gone."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def environment_of_tests() -> dict[str, str]:
    """This process's environment for processes that it starts: one thread each, CPU only, no launcher's variables."""
    places = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in places}
    return inherited | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "PYTHONFAULTHANDLER": "1",
        # Threads that spin while they wait take the cores from those they wait for.
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve(ready: Path) -> None:
    """One rank: joins the others, then runs what it reads from its input, line by line, until the input is closed."""
    from uno_ds.training.process_group import start_process_group

    start_process_group()
    torch.set_num_threads(1)
    _write(None, ready)
    for line in sys.stdin:
        command = json.loads(line)
        print(f"* {command['module']}.{command['function']}({command['arguments']})", flush=True)
        try:
            function = getattr(importlib.import_module(command["module"]), command["function"])
            answer = function(**command["arguments"])
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            # The others may wait for this rank in a collective: leave without asking them.
            os._exit(1)
        _write(answer, Path(command["answer"]))
    # All answers are given. An orderly end would take seconds, and how a run ends is for the tests of whole runs.
    os._exit(0)


def _write(answer: Any, path: Path) -> None:
    beside = path.with_suffix(".part")
    torch.save(answer, beside)
    beside.rename(path)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))
    serve(Path(sys.argv[1]))
