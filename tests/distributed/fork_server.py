"""Ranks of whole runs that start in a moment: one process imports everything once and forks a child for every rank.

The imports of torch and DeepSpeed take longer than a run of a few steps, and a table of faults restarts hundreds of times.
This file is also what the server runs; `faults` is installed in the child, so that the program itself knows of none.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ranks import environment_of_tests, free_port

# In the environment of every run, and to be found in nothing that it leaves.
SECRETS, SECRET = (
    ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"),
    "sk-a-secret-that-nobody-writes-down",
)
# Between the first rank that ends badly and the end of the others.
GRACE = 1.5


def place_of(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables that a launcher sets for a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class ForkServer:
    """Starts runs of `scripts/train.py`'s command line on several ranks, each a fork of one process that waits for it."""

    def __init__(self, folder: Path):
        self._folder = folder
        environment = environment_of_tests() | dict.fromkeys(SECRETS, SECRET)
        self._process = subprocess.Popen(
            [sys.executable, "-u", __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "server.log").open("w"),
            text=True,
        )
        assert self._ask() == "ready", (folder / "server.log").read_text()

    def start(
        self, home: Path, ranks: int, arguments: list[str], fault: dict[str, Any] | None = None
    ) -> "ForkedRun":
        """`fault`: what `faults.install` is given, on every rank."""
        return ForkedRun(self, home, ranks, arguments, fault or {})

    def ask(self, question: dict[str, Any]) -> Any:
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._ask()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)

    def _ask(self) -> Any:
        line = self._process.stdout.readline()
        return json.loads(line) if line else None


class ForkedRun:
    def __init__(
        self,
        server: ForkServer,
        home: Path,
        ranks: int,
        arguments: list[str],
        fault: dict[str, Any],
    ):
        self._server, self.codes = server, [None] * ranks
        self.logs = [home / f"rank{rank}.log" for rank in range(ranks)]
        for log in self.logs:
            log.unlink(missing_ok=True)
        port, self.started = free_port(), time.time()
        self.pids = [
            server.ask(
                {
                    "home": str(home),
                    "log": str(log),
                    "arguments": arguments,
                    "fault": fault,
                    "place": place_of(rank, ranks, port),
                }
            )
            for rank, log in enumerate(self.logs)
        ]
        for log in self.logs:
            log.touch()

    def poll(self) -> list[int | None]:
        """Exit codes, negative for signals; None: still there."""
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                self.codes[rank] = self._server.ask({"poll": pid})
        return self.codes

    def wait(self, timeout: float = 400.0) -> list[int]:
        """As a launcher waits: when a rank ends badly, the others are ended soon after. Fails after `timeout` seconds, with
        nothing left."""
        deadline, failed = time.time() + timeout, False
        while None in self.poll() and time.time() < deadline:
            if not failed and any(self.codes):
                failed, deadline = True, time.time() + GRACE
            time.sleep(0.02)
        late = None in self.codes and not failed
        self.signal(signal.SIGKILL)
        while None in self.poll():
            time.sleep(0.02)
        assert not late, f"no end after {timeout:.0f} s:\n{self.output()}"
        return self.codes

    def signal(self, number: int, rank: int | None = None) -> None:
        for which, pid in enumerate(self.pids):
            if self.poll()[which] is None and rank in (None, which):
                os.kill(pid, number)

    def output(self, rank: int | None = None) -> str:
        chosen = range(len(self.logs)) if rank is None else [rank]
        return "\n".join(
            f"--- rank {number}: {self.codes[number]}\n{self.logs[number].read_text()[-5000:]}"
            for number in chosen
        )


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # All that a run would import on its way.
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    import faults
    import matplotlib.pyplot  # noqa: F401
    import torch
    import torch._dynamo
    import torch._inductor.compile_fx  # noqa: F401

    torch.set_num_threads(1)
    _say(answers, "ready")
    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            _say(answers, os.waitstatus_to_exitcode(status) if pid else None)
            continue
        pid = os.fork()
        if not pid:
            _child(question, faults)
        _say(answers, pid)


def _say(stream: Any, answer: Any) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


def _child(question: dict[str, Any], faults: Any) -> None:
    log = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= question["place"]
    os.chdir(question["home"])
    code = 1
    try:
        sys.argv = ["train.py", *question["arguments"]]
        faults.install(**question["fault"])
        code = faults.main(question["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
