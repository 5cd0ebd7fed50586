"""Starts the ranks of a benchmark as processes on this machine's CPU."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from uno_ds.settings import SettingsError

ROOT = Path(__file__).resolve().parents[2]


class RanksFailed(SettingsError):
    """A rank failed, or the ranks took too long."""


# What comes before a rank's command, and variables that it needs.
Place = tuple[list[str], dict[str, str]]


def start_ranks(
    arguments: Sequence[str],
    ranks: int,
    limit: float = float("inf"),
    place: Callable[[int], Place] = lambda rank: ([], {}),
) -> None:
    """Runs `python -m benchmarks ARGUMENTS` as every rank, with one thread each, and waits.
    `place`: where a rank runs, if not on this host.

    Raises RanksFailed if a rank fails, and if they are not done after `limit` seconds; all ranks
    have ended then.
    """
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", *arguments]
    shared = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    processes = []
    for rank in range(ranks):
        before, variables = place(rank)
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **variables}
        processes.append(
            subprocess.Popen(
                [*before, *command], cwd=ROOT, env={**shared, **own}, stdout=subprocess.DEVNULL
            )
        )
    deadline = time.monotonic() + limit
    try:
        for rank, process in enumerate(processes):
            _wait(rank, process, deadline)
    except subprocess.TimeoutExpired:
        message = f"{ranks} rank(s) took longer than {limit:.0f} s."
        raise RanksFailed("ranks", message) from None
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _wait(rank: int, process: subprocess.Popen, deadline: float) -> None:
    left = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
    code = process.wait(left)
    if code:
        raise RanksFailed("ranks", f"rank {rank} ended with code {code}.")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
