"""Whole runs on two ranks that are started more than once in one folder: nothing of the run before
is overwritten or deleted, and what is gone on from is what it wrote last."""

import json
import os
import shutil
import socket
import time
from pathlib import Path

import pytest
import ranks
from folders import contents
from ranks import ForkServer, free_port
from runs import EVERY, GO_ON, STEPS, Place, assert_same, curve


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Place:
    return Place(tmp_path_factory.mktemp("twice"), server)


@pytest.fixture(scope="module")
def whole(place: Place) -> str:
    place.run("whole", checkpoint={"keep_every": EVERY})
    return "whole"


def copied(place: Place, whole: str, name: str) -> Path:
    """A copy of the run whose files have the times of a copy that began with the newest
    checkpoint."""
    folder = shutil.copytree(place.of(whole), place.of(name))
    for manifest in folder.glob("checkpoints/step_*/manifest.json"):
        step = json.loads(manifest.read_text())["step"]
        os.utime(manifest, (1e9 - step, 1e9 - step))
    return folder


def the_error(output: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in output
    return line


def test_a_second_start_without_resume_is_refused_and_changes_nothing(place: Place, whole: str):
    before = contents(place.of(whole))
    run = place.start(whole)
    assert run.wait()[0] == 2, run.output()
    line = the_error(run.logs[0].read_text())
    assert f"holds checkpoints up to step {STEPS} of an earlier run" in line
    assert "--resume auto" in line and "--overwrite" in line
    assert contents(place.of(whole)) == before


def test_overwrite_moves_the_run_aside_whole_and_a_start_before_its_first_save_goes_on_from_nothing(
    place: Place, whole: str
):
    folder = copied(place, whole, "anew")
    before = contents(folder)
    run = place.start("anew", "--overwrite", fault={"kind": "forward", "rank": 0, "step": 2})
    run.wait()
    (aside,) = folder.glob("replaced_*")
    assert contents(aside) == before and not list(folder.glob("checkpoints/step_*"))
    assert f"--overwrite: what {folder} held is now in {aside}" in run.logs[0].read_text()
    output = place.run("anew", *GO_ON).logs[0].read_text()
    assert "the run starts at step 1" in output and "removed the lock of" in output
    assert_same(place, "anew", whole)
    assert contents(aside) == before and not (folder / "run.lock").exists()


def test_a_copied_run_goes_on_from_what_latest_names_and_deletes_nothing(place: Place, whole: str):
    folder = copied(place, whole, "copied")
    before = contents(folder / "checkpoints")
    output = place.run("copied", *GO_ON).logs[0].read_text()
    assert f"continues after step {STEPS} from" in output and "--resume skips" not in output
    assert contents(folder / "checkpoints") == before


def test_going_back_to_an_older_checkpoint_moves_the_newer_ones_aside_and_gives_the_same_numbers(
    place: Place, whole: str
):
    folder = copied(place, whole, "back")
    newer = contents(folder / "checkpoints" / f"step_{STEPS}")
    metrics = (folder / "metrics.jsonl").read_bytes()
    first = json.loads((folder / f"checkpoints/step_{EVERY}/manifest.json").read_text())
    run = place.run("back", "--resume", str(folder / "checkpoints" / f"step_{EVERY}"))
    output = run.logs[0].read_text()
    (aside,) = (folder / "checkpoints").glob("set_aside_*")
    assert f"step_{EVERY + EVERY}, step_{STEPS} moved to" in output
    assert contents(aside / f"step_{STEPS}") == newer
    assert (aside / "metrics.jsonl").read_bytes() == metrics
    assert_same(place, "back", whole)
    manifest = json.loads((folder / f"checkpoints/step_{STEPS}/manifest.json").read_text())
    assert manifest["run"]["before"] == [[first["run"]["id"], EVERY]]
    assert manifest["run"]["id"] != first["run"]["id"]


@pytest.mark.timed
def test_two_runs_at_once_in_one_folder_one_is_refused_by_all_its_ranks_and_the_other_goes_on(
    place: Place, whole: str
):
    first = place.start("busy", fault={"kind": "slow", "seconds": 0.5})
    while place.steps("busy") != [1]:
        time.sleep(0.02)
        assert None in first.poll(), first.output()
    home = place.folder / "home_second"
    home.mkdir()
    shutil.copy(place.folder / "home_busy" / "recipe.yaml", home)
    second = place.server.start(home, 2, ["--recipe", "recipe.yaml"])
    codes = second.wait()
    assert codes[0] == 2 and codes[1] != 0, second.output()
    line = the_error(second.logs[0].read_text())
    assert "run.lock: another run, process" in line and str(first.pids[0]) in line
    assert first.wait() == [0, 0], first.output()
    assert_same(place, "busy", whole)


def test_a_port_in_use_is_one_line(place: Place, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(ranks, "free_port", lambda: port)
        run = place.start("port", ranks=1)
        assert run.wait()[0] == 2, run.output()
    line = the_error(run.logs[0].read_text())
    assert line.startswith(f"error: MASTER_PORT: port {port} of this machine is in use")


@pytest.mark.parametrize("stage", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_a_tutorials_offload_file_trains_to_the_numbers_of_a_run_without_offload(
    place: Place, whole: str, stage: int
):
    offload = {"device": "cpu", "pin_memory": False}
    zero = {"stage": stage, "offload_optimizer": offload, "reduce_bucket_size": "auto"}
    if stage == 3:
        zero["offload_param"] = offload
    file = place.folder / f"offload{stage}.json"
    content = {"zero_optimization": zero, "train_batch_size": "auto", "fp16": {"enabled": "auto"}}
    file.write_text("\ufeff" + json.dumps(content), "utf-8")
    name = f"offload{stage}"
    place.run(name, engine={"deepspeed": str(file)}, steps=2)
    ours, theirs = curve(place, name), curve(place, whole)[:2]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=2e-5)


def test_tasks_of_srun_are_ranks_of_one_run_and_a_rank_without_its_local_rank_is_refused(
    place: Place, whole: str, monkeypatch: pytest.MonkeyPatch
):
    def places(**given: str) -> None:
        """What the server gives the next ranks in place of torch's variables."""
        monkeypatch.setattr(ranks, "variables_of_rank", lambda rank, size, port: given | task(rank))

    def task(rank: int) -> dict[str, str]:
        return {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}

    places(SLURM_STEP_ID="0", SLURM_JOB_ID=str(os.getpid()), SLURM_NTASKS="2", SLURM_NNODES="1")
    run = place.run("srun")
    assert "started by srun: rank 0 of 2, which meet at 127.0.0.1:" in run.logs[0].read_text()
    assert place.summary("srun")["world_size"] == 2
    assert_same(place, "srun", whole)
    places(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    run = place.start("srun", *GO_ON)
    assert run.wait()[0] == 2, run.output()
    assert the_error(run.logs[0].read_text()).startswith("error: LOCAL_RANK: is not set, but RANK")
