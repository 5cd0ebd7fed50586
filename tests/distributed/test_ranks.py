"""The harness itself: what a rank prints is in the message of a failure, and no process is left
behind."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed
from ranks import ForkServer, Ranks, RanksFailed, run_command


def answer(value: int) -> dict[str, Any]:
    return {"rank": torch.distributed.get_rank(), "value": value, "pid": os.getpid()}


def raise_on_rank_1() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("rank 1 found something")
    torch.distributed.barrier()


def hang_on_rank_0() -> None:
    while torch.distributed.get_rank() == 0:
        time.sleep(0.1)


@pytest.fixture
def group(tmp_path: Path, server: ForkServer) -> Ranks:
    return Ranks(server, 2, tmp_path / "group")


def running(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid)]


def test_every_call_reaches_the_same_ranks_and_stop_ends_them(group: Ranks):
    first, second = group.call(answer, value=1), group.call(answer, value=2)
    assert [(one["rank"], one["value"]) for one in first + second] == [
        *((0, 1), (1, 1)),
        *((0, 2), (1, 2)),
    ]
    pids = [one["pid"] for one in first]
    assert [one["pid"] for one in second] == pids == running(pids)
    assert group.stop() == [0, 0] and not running(pids)


# Rank 0, which waits for it, may have lost its connection by then.
RAISED = r"(?s)rank\(s\) \[(0, )?1\] ended.*rank 1 found something"


def test_a_rank_that_raises_fails_the_call_with_its_traceback_and_the_next_call_starts_anew(
    group: Ranks,
):
    group.call(answer, value=1)
    pids = list(group.pids)
    with pytest.raises(RanksFailed, match=RAISED):
        group.call(raise_on_rank_1)
    assert not running(pids)
    assert [one["value"] for one in group.call(answer, value=3)] == [3, 3]
    group.stop()


def test_a_rank_that_hangs_fails_the_call_in_time_and_shows_where_it_is(group: Ranks):
    group.call(answer, value=1)
    pids = list(group.pids)
    with pytest.raises(RanksFailed, match=r"(?s)rank\(s\) \[0\] gave no answer.*hang_on_rank_0"):
        group.call(hang_on_rank_0, timeout=1)
    assert not running(pids)


@pytest.mark.slow
def test_the_end_of_the_server_is_the_end_of_its_ranks(tmp_path: Path, server: ForkServer):
    folder = tmp_path / "server"
    folder.mkdir()
    other = ForkServer(folder)
    group = Ranks(other, 1, tmp_path / "group")
    group.call(answer, value=1)
    pids = list(group.pids)
    other.close()
    assert not running(pids)


def test_a_command_that_leaves_a_process_behind_is_a_failure_and_the_process_is_ended(
    tmp_path: Path,
):
    code = (
        "import subprocess, sys; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " start_new_session=True); print(child.pid)"
    )
    with pytest.raises(RanksFailed, match="left processes behind"):
        run_command([sys.executable, "-c", code], tmp_path, timeout=60)
    assert not running([int((tmp_path / "command.log").read_text())])
