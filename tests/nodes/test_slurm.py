"""docs/launch/slurm.sbatch under a real Slurm: a job that reaches its time limit, is preempted or
loses a node saves, is queued again, resumes and finishes."""

import json
import time

import pytest
import slurm
from cluster import Cluster
from slurm import NODE_TIMEOUT, Slurm

from uno_ds.training.metrics import read_metrics

REASON = slurm.missing()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)
# A guard against hangs.
TIMEOUT = 400.0
# So many that the run does not end by itself.
ENDLESS = 100_000


@pytest.fixture(scope="module")
def queue(cluster: Cluster) -> Slurm:
    return Slurm(cluster.hosts)


class Job:
    """A run without an end, submitted by docs/launch/slurm.sbatch with `flags` of sbatch."""

    def __init__(self, cluster: Cluster, queue: Slurm, name: str, *flags: str):
        self.cluster, self.queue, self.name = cluster, queue, name
        self.log = cluster.folder / f"{name}.log"
        recipe = self.recipe(ENDLESS)
        script = ("docs/launch/slurm.sbatch", "--recipe", recipe)
        self.number = queue.submit(*flags, f"--output={self.log}", *script)

    def recipe(self, steps: int) -> str:
        return self.cluster.recipe(self.name, steps=steps, checkpoint={"every": 10})

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + TIMEOUT
        while text not in self.output():
            assert time.monotonic() < deadline, f"no '{text}':\n{self.output()[-6000:]}"
            time.sleep(0.2)

    def finish(self, *changes: str) -> str:
        """Gives the run an end soon after the step from which it resumes, and lets the queued job
        start, with `changes` to it; returns its log."""
        self.queue.wait_for(self.number, "Restarts", "1", TIMEOUT)
        newest = (self.cluster.of(self.name) / "checkpoints/latest").read_text().strip()
        step = int(newest.removeprefix("step_"))
        self.recipe(step + 3)
        # Slurm would wait for two minutes.
        update = ("scontrol", "update", f"JobId={self.number}", "StartTime=now", *changes)
        self.queue.run(*update)
        self.queue.wait_for(self.number, "JobState", "COMPLETED", TIMEOUT)
        output = self.output()
        assert f"--resume: continues after step {step} from" in output
        rows = read_metrics(self.cluster.of(self.name) / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, step + 4))
        summary = json.loads((self.cluster.of(self.name) / "summary.json").read_text())
        assert (summary["exit"], summary["exit_code"]) == ("completed", 0)
        return output

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def test_a_job_saves_before_its_time_limit_is_queued_again_and_finishes(
    cluster: Cluster, queue: Slurm
):
    job = Job(cluster, queue, "limit", "--nodes=2", "--time=5", "--signal=USR1@120")
    job.wait_for("step 20")
    job.wait_for("the run says: interrupted after step")
    output = job.finish()
    assert "by SIGUSR1" in output and output.count("2 rank(s)") == 2


def test_a_preempted_job_saves_makes_room_and_finishes(cluster: Cluster, queue: Slurm):
    job = Job(cluster, queue, "preempted", "--nodes=2")
    job.wait_for("step 20")
    urgent = queue.submit("--nodes=2", "--partition=urgent", "--output=/dev/null", "--wrap=sleep 1")
    queue.wait_for(urgent, "JobState", "COMPLETED", TIMEOUT)
    job.wait_for("the run says: interrupted after step")
    output = job.finish()
    assert "by SIGTERM" in output


def test_a_job_that_loses_a_node_goes_on_with_those_that_are_left(cluster: Cluster, queue: Slurm):
    job = Job(cluster, queue, "fewer", "--nodes=2")
    job.wait_for("step 12")
    assert "2 rank(s)" in job.output()
    cluster.hosts.hosts[1].cut()
    cut_at = time.monotonic()
    queue.wait_for(job.number, "Restarts", "1", NODE_TIMEOUT + TIMEOUT)
    print(f"queued again after {time.monotonic() - cut_at:.0f} s")
    output = job.finish("NumNodes=1", "NumTasks=1", "NumCPUs=2")
    assert "1 rank(s)" in output
