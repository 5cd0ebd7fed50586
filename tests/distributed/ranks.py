"""Real ranks for tests: a group of processes joined by gloo that stays alive and runs one function after another.

Importing DeepSpeed costs seconds per rank, so a test session starts a group of each size once, and every case calls it.
This file is also what a rank runs.
"""
import atexit
import importlib
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

START_TIMEOUT, CALL_TIMEOUT, STOP_TIMEOUT = 180.0, 120.0, 10.0


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

    def call(self, function: Callable[..., Any], *, timeout: float = CALL_TIMEOUT, **arguments: Any) -> list[Any]:
        """What the function of a module in this folder returns on each rank: plain values and tensors.

        `arguments` are JSON-able. Raises RanksFailed, with all ranks ended, if one of them raises, dies, or has no
        answer after `timeout` seconds.
        """
        self._start()
        self._calls += 1
        answers = [self.folder / f"call{self._calls}_rank{rank}.pt" for rank in range(self.size)]
        for process, answer in zip(self._processes, answers, strict=True):
            command = {"module": function.__module__, "function": function.__name__, "arguments": arguments, "answer": str(answer)}
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
        port, ready = free_port(), [self.folder / f"start{self._starts}_rank{rank}.pt" for rank in range(self.size)]
        for rank in range(self.size):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.size, "LOCAL_WORLD_SIZE": self.size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = environment_of_tests() | {name: str(value) for name, value in place.items()}
            with self._log(rank).open("w") as log:
                self._processes.append(subprocess.Popen([sys.executable, "-u", __file__, str(ready[rank])], env=environment, stdin=subprocess.PIPE,
                                                        stdout=log, stderr=subprocess.STDOUT, text=True))
        self._wait_for(ready, START_TIMEOUT, "the start of the ranks")

    def _wait_for(self, files: list[Path], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not all(file.exists() for file in files):
            gone = [rank for rank, process in enumerate(self._processes) if process.poll() is not None]
            late = time.monotonic() > deadline
            if gone or late:
                missing = [rank for rank, file in enumerate(files) if not file.exists()]
                reason = f"rank(s) {gone} ended" if gone else f"rank(s) {missing} gave no answer within {timeout:.0f} s"
                for process in self._processes:
                    process.kill()
                codes = self.stop()
                logs = "\n".join(f"--- rank {rank} (exit code {codes[rank]}):\n{self._log(rank).read_text()[-3000:]}" for rank in range(self.size))
                raise RanksFailed(f"{what}: {reason}.\n{logs}")
            time.sleep(0.02)

    def _log(self, rank: int) -> Path:
        return self.folder / f"start{self._starts}_rank{rank}.log"


def environment_of_tests() -> dict[str, str]:
    """This process's environment for processes that it starts: one thread each, CPU only, no launcher's variables."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    return inherited | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PYTHONFAULTHANDLER": "1"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve(ready: Path) -> None:
    """One rank: joins the others, then runs what it reads from its input, line by line, until the input is closed."""
    import torch.distributed as dist

    from uno_ds.training.engine import start_process_group
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
    dist.barrier()
    dist.destroy_process_group()


def _write(answer: Any, path: Path) -> None:
    beside = path.with_suffix(".part")
    torch.save(answer, beside)
    beside.rename(path)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
