"""docs/launch/slurm.sbatch under a real Slurm with a stand-in for training, which does as a run
does when it gets a signal, and says where it was started."""

import shutil
import time
from pathlib import Path

import pytest
import slurm
from cluster import Cluster
from hosts import ROOT
from slurm import NODE_TIMEOUT, Slurm

REASON = slurm.missing()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)
# A guard against hangs.
TIMEOUT = 120.0
# In place of .venv/bin/python: trains for ever in the first start of a job, and briefly later.
STAND_IN = """#!/usr/bin/env bash
say() { echo "rank $RANK of $WORLD_SIZE at $MASTER_ADDR: $*"; }
end() { say "got SIG$1"; echo "0 interrupted after step 5 by SIG$1" >"${!#}"; exit 0; }
trap 'end TERM "$@"' TERM
trap 'end USR1 "$@"' USR1
say "start ${SLURM_RESTART_COUNT:-0}"
if [[ ${SLURM_RESTART_COUNT:-0} == 0 ]]; then
  for ((i = 0; i < 6000; i++)); do sleep 0.1; done
fi
echo "0 completed" >"${!#}"
"""


@pytest.fixture(scope="module")
def queue(cluster: Cluster) -> Slurm:
    return Slurm(cluster.hosts)


class Job:
    """The template submitted from a checkout of its own, on both nodes."""

    def __init__(self, queue: Slurm, folder: Path, *flags: str):
        self.queue, self.log = queue, folder / "job.log"
        python = folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(STAND_IN)
        python.chmod(0o755)
        script = shutil.copy(ROOT / "docs/launch/slurm.sbatch", folder)
        where = (f"--chdir={folder}", f"--output={self.log}")
        self.number = queue.submit("--nodes=2", *flags, *where, str(script), "--recipe", "x")
        for rank in (0, 1):
            self.wait_for(f"rank {rank} of 2 at host0: start 0")

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + TIMEOUT
        while text not in self.output():
            assert time.monotonic() < deadline, (
                f"no '{text}':\n{self.output()}\n{self.queue.logs()}"
            )
            time.sleep(0.1)

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def finish(self, *changes: str) -> str:
        """Lets the queued job start now, with `changes` to it, and not after Slurm's two minutes;
        returns its log."""
        self.queue.wait_for(self.number, "Restarts", "1", TIMEOUT)
        update = ("scontrol", "update", f"JobId={self.number}", "StartTime=now", *changes)
        self.queue.run(*update)
        self.queue.wait_for(self.number, "JobState", "COMPLETED", TIMEOUT)
        assert not list(self.log.parent.glob("*.exit"))
        return self.output()


def test_a_signal_before_the_time_limit_queues_the_job_again(queue: Slurm, tmp_path: Path):
    job = Job(queue, tmp_path)
    # As Slurm sends the signal of --signal, to the tasks of the job.
    queue.run("scancel", "--signal=USR1", job.number)
    job.wait_for("the run says: interrupted after step 5 by SIGUSR1")
    output = job.finish()
    assert "rank 1 of 2 at host0: start 1" in output and "the run says: completed" in output


def test_a_preempted_job_makes_room_and_is_queued_again(queue: Slurm, tmp_path: Path):
    job = Job(queue, tmp_path)
    urgent = queue.submit(
        "--nodes=2", "--partition=urgent", f"--output={tmp_path}/urgent.log", "--wrap=true"
    )
    queue.wait_for(urgent, "JobState", "COMPLETED", TIMEOUT)
    output = job.finish()
    assert "rank 0 of 2 at host0: got SIGTERM" in output
    assert "rank 1 of 2 at host0: start 1" in output and "the run says: completed" in output


def test_a_job_that_loses_a_node_goes_on_with_the_one_that_is_left(
    cluster: Cluster, queue: Slurm, tmp_path: Path
):
    job = Job(queue, tmp_path)
    cluster.hosts.hosts[1].cut()
    started = time.monotonic()
    queue.wait_for(job.number, "Restarts", "1", NODE_TIMEOUT + TIMEOUT)
    print(f"queued again {time.monotonic() - started:.0f} s after the link went down")
    output = job.finish("NumNodes=1", "NumTasks=1", "NumCPUs=2")
    assert "rank 0 of 1 at host0: start 1" in output and "rank 1 of 1" not in output
