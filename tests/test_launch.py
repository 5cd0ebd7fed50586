"""The launch templates start again after a fault, and only then. Launcher and scheduler are
stand-ins that write down how they were called and end with given codes."""

import os
import subprocess
from pathlib import Path

import pytest
from launcher_stand_in import LAUNCH, HostfileRun, calls, stand_in


@pytest.mark.parametrize(
    ("codes", "ended", "starts", "code"),
    [
        ([0], "", 1, 0),
        ([75, 247, 1, 0], "", 4, 0),
        ([2], "", 1, 2),
        ([3], "", 1, 3),
        ([1, 1, 1, 1, 1, 1], "", 5, 1),
        # A launcher that makes 1 of every code.
        ([1, 0], "3 stopped: step 9 skipped; this was the 10th", 1, 3),
        ([1, 0], "2 refused: steps: must be at least 1", 1, 2),
        ([1, 0], "0 interrupted after step 5 by SIGTERM", 1, 0),
        ([1, 0], "4 host a: rank 1: out of memory in step 3", 1, 4),
        ([4], "", 1, 4),
        ([76, 78, 0], "", 3, 0),
        ([1, 1, 1, 1, 1], "1 completed, but its last checkpoint could not be saved", 5, 1),
    ],
)
def test_the_hostfile_loop_starts_again_after_a_fault_and_not_after_a_mistake(
    tmp_path: Path, codes: list[int], ended: str, starts: int, code: int
):
    run = HostfileRun(tmp_path, codes, ended=ended)
    done = run.start("--recipe", "my recipe.yaml", MOST_STARTS="5")
    assert done.returncode == code and (ended.partition(" ")[2] in done.stderr)
    assert not list(tmp_path.glob("*.exit"))
    called = calls(run.deepspeed)
    assert all(call[-2] == "--exit-file" and call[-1].startswith("/") for call in called)
    arguments = ["scripts/train.py", "--recipe", "my recipe.yaml", "--resume", "auto"]
    assert [call[:-2] for call in called] == [["--hostfile", str(run.hosts), *arguments]] * starts


def test_the_hostfile_loop_leaves_out_a_machine_that_does_not_answer(tmp_path: Path):
    run = HostfileRun(tmp_path, [0], gone="two")
    done = run.start("--recipe", "tiny")
    assert (
        done.returncode == 0
        and "do not answer to ssh, or failed: two; left: 1 host(s)" in done.stderr
    )
    (call,) = calls(run.deepspeed)
    assert call[:6] == [
        *("--hostfile", str(run.hosts), "--force_multi"),
        *("--exclude", "two", "scripts/train.py"),
    ]


def test_the_hostfile_loop_waits_where_too_few_machines_answer(tmp_path: Path):
    run = HostfileRun(tmp_path, [0], gone="two")
    done = run.start("--recipe", "tiny", MIN_HOSTS="2", MOST_STARTS="2")
    assert done.returncode == 255 and "start 2 of 2 ended with code 255" in done.stderr
    assert calls(run.deepspeed) == []


def test_a_hostfile_that_is_missing_is_no_run_on_one_machine(tmp_path: Path):
    run = HostfileRun(tmp_path, [0])
    run.hosts.unlink()
    done = run.start("--recipe", "tiny")
    assert (done.returncode, done.stderr) == (2, "hosts: there is no such hostfile\n")
    assert calls(run.deepspeed) == []


@pytest.mark.parametrize(
    ("code", "ended", "restarts", "requeued"),
    [
        (0, "0 completed", 0, False),
        (0, "0 interrupted after step 5 by SIGUSR1", 0, True),
        (75, "", 3, True),
        (2, "", 0, False),
        (3, "", 0, False),
        (75, "", 20, False),
        # A launcher that makes 1 of every code.
        (1, "3 stopped: step 9 skipped; this was the 10th", 0, False),
        (1, "2 refused: steps: must be at least 1", 0, False),
        (1, "4 host node1: rank 1: out of memory in step 3", 0, False),
        (76, "", 0, True),
        (78, "", 0, True),
        # There is no spare node.
        (77, "77 host node1: rank 1: its GPU or driver failed", 0, False),
        (1, "0 interrupted after step 5 by SIGUSR1", 0, True),
        (1, "", 0, True),
    ],
)
def test_the_slurm_job_queues_itself_again_after_a_fault_or_an_interruption(
    tmp_path: Path, code: int, ended: str, restarts: int, requeued: bool
):
    srun, scontrol = (tmp_path / "bin" / name for name in ("srun", "scontrol"))
    stand_in(srun, [code], ended=ended)
    variables = "$SRUN_CPUS_PER_TASK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR"
    writing = f'echo "{variables}" > "$0.variables"; code=$('
    srun.write_text(srun.read_text().replace("code=$(", writing, 1))
    # Left by the start before.
    (tmp_path / "slurm-77.exit").write_text("3 stopped: another time\n")
    stand_in(scontrol, [0, 0], "node1")
    slurm = {
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "77",
        "SLURM_NNODES": "2",
        # As the job was submitted, with three nodes.
        "SLURM_NTASKS": "24",
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_CPUS_PER_TASK": "12",
        "SLURM_RESTART_COUNT": str(restarts),
        "PATH": f"{srun.parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), "--recipe", "my.yaml"],
        cwd=tmp_path,
        env=os.environ | slurm,
        capture_output=True,
        text=True,
        timeout=240,
    )
    expected = int(ended.split()[0]) if ended else code
    assert done.returncode == expected and (["requeue", "77"] in calls(scontrol)) == requeued
    # srun takes the cores of a task from no other variable.
    assert (srun.parent / "srun.variables").read_text() == "12 16 8 node1\n"
    assert not (tmp_path / "slurm-77.exit").exists()
    (command,) = calls(srun)
    assert command[:2] == ["--kill-on-bad-exit=1", "--ntasks=16"] and command[-6:-1] == [
        "--recipe",
        "my.yaml",
        "--resume",
        "auto",
        "--exit-file",
    ]


def test_the_slurm_task_becomes_the_rank_with_its_place(tmp_path: Path):
    python = tmp_path / ".venv" / "bin" / "python"
    stand_in(python, [0])
    python.write_text(
        python.read_text().replace("code=", 'echo "$RANK $LOCAL_RANK $$" > "$0.place"; code=')
    )
    (line,) = [
        line
        for line in (LAUNCH / "slurm.sbatch").read_text().splitlines()
        if line.startswith("srun")
    ]
    inner = line.split("'")[1]
    subprocess.run(
        ["bash", "-c", inner, "train", "--recipe", "a b"],
        cwd=tmp_path,
        env=os.environ | {"SLURM_PROCID": "9", "SLURM_LOCALID": "1"},
        check=True,
    )
    assert calls(python) == [["scripts/train.py", "--recipe", "a b"]]
    assert (python.parent / "python.place").read_text().split()[:2] == ["9", "1"]
