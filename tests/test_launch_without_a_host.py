"""The launch templates leave out a host whose GPU or driver failed, where others can replace it."""

import os
import subprocess
from pathlib import Path

import pytest
from launcher_stand_in import LAUNCH, HostfileRun, calls, stand_in

FAILED = "77 host {}: rank 9: its GPU or driver failed in step 3: CUDA error"


@pytest.mark.parametrize("failed", ["two", "two.cluster"])
def test_the_hostfile_loop_goes_on_without_the_host_that_failed(tmp_path: Path, failed: str):
    run = HostfileRun(tmp_path, [77, 0])
    # Only the first start writes how it ended.
    stand_in(run.deepspeed, [77, 0], ended=FAILED.format(failed))
    once = 'exit "$code"', 'sed -i "s/--exit-file/--never/" "$0"\nexit "$code"'
    run.deepspeed.write_text(run.deepspeed.read_text().replace(*once))
    done = run.start("--recipe", "r.yaml")
    assert done.returncode == 0, done.stderr
    first, second = calls(run.deepspeed)
    assert "--exclude" not in first and "failed: two; left: 1 host(s)" in done.stderr
    assert second[2:5] == ["--force_multi", "--exclude", "two"]


@pytest.mark.parametrize(("failed", "least"), [("two", "2"), ("elsewhere", "1")])
def test_the_hostfile_loop_ends_where_the_host_cannot_be_left_out(
    tmp_path: Path, failed: str, least: str
):
    run = HostfileRun(tmp_path, [77, 0], ended=FAILED.format(failed))
    done = run.start("--recipe", "r.yaml", MIN_HOSTS=least)
    assert done.returncode == 77 and len(calls(run.deepspeed)) == 1
    assert f"host {failed} failed, and without it there are too few of " in done.stderr


def test_the_slurm_job_goes_on_with_its_spare_node(tmp_path: Path):
    srun, scontrol = (tmp_path / "bin" / name for name in ("srun", "scontrol"))
    stand_in(srun, [77, 0], ended=FAILED.format("node1.cluster"))
    stand_in(scontrol, [0] * 5, "node1\nnode2\nnode3")
    slurm = {
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_JOB_ID": "78",
        "SLURM_NTASKS": "24",
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_CPUS_PER_TASK": "12",
        "NODES": "2",
        "PATH": f"{srun.parent}:{os.environ['PATH']}",
    }
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "--recipe", "my.yaml"]
    options = dict(cwd=tmp_path, env=os.environ | slurm, capture_output=True, text=True)
    first = subprocess.run(command, timeout=240, **options)
    assert first.returncode == 77 and ["requeue", "78"] in calls(scontrol), first.stdout
    srun.write_text(srun.read_text().replace("--exit-file", "--never"))
    second = subprocess.run(command, timeout=240, **options)
    assert second.returncode == 0, second.stdout
    assert not list(tmp_path.glob("slurm-78.*"))
    nodes = [call[1:4] for call in calls(srun)]
    assert nodes == [
        ["--ntasks=16", "--nodes=2", "--nodelist=node1,node2"],
        ["--ntasks=16", "--nodes=2", "--nodelist=node2,node3"],
    ]
