"""Which checkpoint is the newest, what a start may not overwrite, and which lock is stale: by what
the files say, never by times that a copy changes."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from small_runs import tree

from uno_ds.commands.train import main
from uno_ds.settings import SettingsError
from uno_ds.training import run_folder
from uno_ds.training.checkpoint_file import (
    Lineage,
    complete_checkpoints,
    newest_first,
    open_checkpoint,
)
from uno_ds.training.manifest import digest_of_manifest
from uno_ds.training.run_folder import RunLock

A, B = Lineage("a"), Lineage("b")


def write(folder: Path, step: int, lineage: Lineage | None = None, name: str = "") -> Path:
    """A checkpoint without tensors; lineage None: as versions without run ids wrote it."""
    path = folder / (name or f"step_{step}")
    path.mkdir(parents=True)
    manifest = {"format": 1, "step": step, "optimizer_steps": step, "world_size": 1, "stage": 3}
    manifest |= {"ema_updates": None, "base": None, "tokenizer": "tiny_base"}
    manifest |= {name: {} for name in ("architecture", "frozen", "files", "shapes", "lanes")}
    if lineage is not None:
        manifest["run"] = lineage.plain()
    text = json.dumps({**manifest, "hash": digest_of_manifest(manifest)})
    (path / "manifest.json").write_text(text)
    return path


def steps_of(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


@pytest.mark.parametrize(
    "latest, lineages, usable, passed_over",
    [
        (8, {4: A, 6: A, 8: A}, [8, 6, 4], []),
        (8, {4: None, 6: None, 8: None}, [8, 6, 4], []),
        # The save of step 8 was cut off before `latest` was changed; so was one of a start that
        # went on after step 6.
        (6, {4: A, 6: A, 8: A}, [8, 6, 4], []),
        (6, {4: A, 6: A, 8: A.continued(6, "b")}, [8, 6, 4], []),
        (6, {4: None, 6: None, 8: Lineage("").continued(6, "b")}, [8, 6, 4], []),
        # The run went back to step 4, and another training has gone beyond it.
        (6, {4: A, 6: A.continued(4, "b"), 8: A}, [6, 4], [8]),
        (10, {4: A, 8: A, 10: A.continued(4, "b")}, [10, 4], [8]),
        (2, {2: B, 4: A, 6: A}, [2], [6, 4]),
        (2, {2: B, 4: None, 6: None}, [2], [6, 4]),
        (2, {2: None, 4: None, 6: None}, [2], [6, 4]),
        (None, {4: A, 6: A}, [6, 4], []),
        (8, {4: A, 6: A}, [6, 4], []),
    ],
)
def test_the_newest_checkpoint_is_found_by_latest_and_the_manifests_and_not_by_times_of_files(
    tmp_path: Path,
    latest: int | None,
    lineages: dict[int, Lineage | None],
    usable: list[int],
    passed_over: list[int],
):
    for step, lineage in lineages.items():
        manifest = write(tmp_path, step, lineage) / "manifest.json"
        os.utime(manifest, (1e9 - step, 1e9 - step))
    if latest is not None:
        (tmp_path / "latest").write_text(f"step_{latest}\n")
    found, others = newest_first(tmp_path)
    assert steps_of(found) == [f"step_{step}" for step in usable]
    assert [line.split(":")[0] for line in others] == [f"step_{step}" for step in passed_over]
    assert all(f"latest names step_{latest}" in line for line in others)
    assert steps_of(complete_checkpoints(tmp_path)) == [f"step_{step}" for step in sorted(lineages)]


def test_a_run_is_opened_at_its_newest_checkpoint_whatever_the_times_of_files_are(tmp_path: Path):
    for step in (8, 6, 4):
        write(tmp_path / "checkpoints", step, A)
    (tmp_path / "checkpoints" / "latest").write_text("step_8\n")
    assert open_checkpoint(tmp_path, "run")[1]["step"] == 8


def test_going_back_moves_what_is_newer_aside_with_the_metrics_and_deletes_nothing(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    for step in (2, 4, 6):
        write(folder, step, A)
    (folder / "step_8").mkdir()
    (folder / "latest").write_text("step_6\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 6}\n')
    line = run_folder.continue_from(folder / "step_4", folder, "now")
    aside = folder / "set_aside_now"
    assert line == (
        f"--resume: step_6, step_8 moved to {aside}; remove it when it is no longer needed"
    )
    assert sorted(steps_of(aside.iterdir())) == ["metrics.jsonl", "step_6", "step_8"]
    assert steps_of(newest_first(folder)[0]) == ["step_4", "step_2"]
    assert (folder / "latest").read_text() == "step_4\n"
    assert run_folder.continue_from(folder / "step_4", folder, "later") is None
    # Back again to what was set aside: step 6, then written anew, makes room for it.
    again = Lineage("a").continued(4, "b")
    write(folder, 6, again)
    run_folder.continue_from(aside / "step_6", folder, "back")
    assert steps_of((folder / "set_aside_back").glob("step_*")) == ["step_6"]
    assert steps_of(complete_checkpoints(folder)) == ["step_2", "step_4"]


@pytest.mark.parametrize("resume", ["never", "elsewhere/step_1"])
@pytest.mark.parametrize("left", ["checkpoints/step_3", "checkpoints/.step_3.part", "model"])
def test_a_folder_that_holds_a_run_is_refused_without_resume_and_overwrite(
    tmp_path: Path, resume: str, left: str
):
    run_folder.check_folder(tmp_path, resume, overwrite=False)
    write(tmp_path, 3, A, name=left)
    with pytest.raises(SettingsError) as raised:
        run_folder.check_folder(tmp_path, resume, overwrite=False)
    text = str(raised.value)
    assert "--resume auto" in text and "--overwrite" in text and str(tmp_path) in text
    for flags in (("auto", False), (resume, True)):
        run_folder.check_folder(tmp_path, *flags)
    if left != "model":
        run_folder.check_folder(tmp_path, str(tmp_path / left), overwrite=False)


@pytest.mark.parametrize("resume", ["auto", "inside"])
def test_overwrite_and_a_resume_from_what_it_would_move_are_refused(tmp_path: Path, resume: str):
    inside = str(write(tmp_path / "checkpoints", 3, A))
    with pytest.raises(SettingsError, match="--overwrite: .* give one of the two"):
        run_folder.check_folder(tmp_path, inside if resume == "inside" else resume, overwrite=True)


def test_overwrite_refuses_to_move_what_the_run_reads(tmp_path: Path):
    base = tmp_path / "run" / "model"
    base.mkdir(parents=True)
    with pytest.raises(SettingsError, match="--overwrite: would move .*, which model.base names"):
        run_folder.check_overwrite(tmp_path / "run", {"model.base": base})
    moved = tmp_path / "run" / "replaced_before" / "model"
    run_folder.check_overwrite(tmp_path / "run", {"model.base": moved, "data.folder": tmp_path})


def test_replacing_a_run_keeps_all_of_it_and_an_earlier_replaced_one(tmp_path: Path):
    write(tmp_path / "checkpoints", 3, A)
    (tmp_path / "notes.txt").write_text("mine")
    first = run_folder.replace_run(tmp_path, "one")
    (tmp_path / "metrics.jsonl").write_text("")
    second = run_folder.replace_run(tmp_path, "two")
    assert (first / "notes.txt").read_text() == "mine"
    assert (first / "checkpoints/step_3/manifest.json").exists()
    assert steps_of(second.iterdir()) == ["metrics.jsonl"]
    assert run_folder.replace_run(tmp_path, "three") is None


def test_a_second_run_is_kept_out_until_the_first_has_released_the_folder(tmp_path: Path):
    first = RunLock(tmp_path, "one")
    first.acquire()
    with pytest.raises(SettingsError) as raised:
        RunLock(tmp_path, "two").acquire()
    assert str(raised.value).startswith(
        f"{tmp_path / 'run.lock'}: another run, process {os.getpid()}"
    )
    first.release()
    second = RunLock(tmp_path, "two")
    second.acquire()
    first.release()
    assert json.loads((tmp_path / "run.lock").read_text())["run"] == "two"
    second.release()
    assert not list(tmp_path.iterdir())


def test_a_run_that_goes_on_waits_for_ranks_that_are_still_ending(tmp_path: Path):
    first = RunLock(tmp_path, "one")
    first.acquire()
    timer = threading.Timer(0.5, first.release)
    timer.start()
    said: list[str] = []
    second = RunLock(tmp_path, "two", wait_seconds=60, report=said.append)
    second.acquire()
    second.release()
    assert len(said) == 1 and said[0].startswith("waiting up to 60 s for process")


@pytest.mark.parametrize("change", ["gone", "another process of that id"])
def test_a_lock_of_a_dead_process_of_this_machine_is_taken_over_at_once(
    tmp_path: Path, change: str
):
    owner = RunLock(tmp_path, "one")
    owner.acquire()
    content = json.loads(owner.path.read_text())
    if change == "gone":
        child = subprocess.Popen([sys.executable, "-c", ""])
        child.wait()
        content["process"] = child.pid
    else:
        content["process_start"] = "1"
    owner.path.write_text(json.dumps(content))
    said: list[str] = []
    second = RunLock(tmp_path, "two", report=said.append)
    second.acquire()
    second.release()
    assert len(said) == 1 and said[0].endswith("is dead")


def test_a_lock_of_another_machine_is_stale_when_nobody_touches_it_and_holds_while_one_does(
    tmp_path: Path,
):
    lock = tmp_path / "run.lock"
    lock.write_text(json.dumps({"host": "far", "process": 7, "machine": "far", "run": "one"}))
    stop = threading.Event()

    def touch() -> None:
        times = 1
        while not stop.wait(0.05):
            times += 1
            os.utime(lock, (times, times))

    holder = threading.Thread(target=touch)
    holder.start()
    try:
        with pytest.raises(SettingsError, match="another run, process 7 on far, writes this"):
            RunLock(tmp_path, "two", stale_seconds=30).acquire()
    finally:
        stop.set()
        holder.join()
    said: list[str] = []
    begun = time.monotonic()
    second = RunLock(tmp_path, "two", stale_seconds=0.5, report=said.append)
    second.acquire()
    assert time.monotonic() - begun >= 0.5 and said[-1].endswith("process 7 on far, is dead")
    second.release()


def test_of_many_that_find_a_stale_lock_at_once_one_gets_it(tmp_path: Path):
    (tmp_path / "run.lock").write_text(
        json.dumps({"host": "h", "process": -1, "machine": run_folder._machine(), "run": "x"})
    )
    got: list[RunLock] = []

    def start(number: int) -> None:
        lock = RunLock(tmp_path, f"run{number}", report=lambda line: None)
        try:
            lock.acquire()
            got.append(lock)
        except SettingsError:
            pass

    threads = [threading.Thread(target=start, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].release()


def test_a_run_whose_lock_was_taken_while_it_stood_still_ends(tmp_path: Path):
    code = (
        "import sys, time; from pathlib import Path; from uno_ds.training.run_folder import "
        "RunLock\n"
        f"RunLock(Path({str(tmp_path)!r}), 'one', heartbeat_seconds=0.05).acquire()\n"
        "print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while child.stdout.readline() != "held\n":
        pass
    other = tmp_path / "other"
    other.write_text(json.dumps({"host": "far", "process": 7}))
    other.replace(tmp_path / "run.lock")
    output, error = child.communicate(timeout=60)
    assert (
        child.returncode == 1 and "taken by process 7 on far while this run was suspended" in error
    )


def test_the_command_refuses_a_folder_with_a_run_before_anything_starts_and_a_dry_run_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree(tmp_path, ["scenes/t2i"])))
    write(tmp_path / "runs" / "small" / "checkpoints", 3, A)
    assert main(["--recipe", str(recipe)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: output: ") and said.err.count("\n") == 1
    assert "--resume auto" in said.err and "--overwrite" in said.err and not said.out
    assert main(["--recipe", str(recipe), "--dry-run"]) == 0
    assert "warning: output: " in capsys.readouterr().out
    used = ["--set", f"model.tokenizer={tmp_path / 'runs/small'}", "--overwrite"]
    assert main(["--recipe", str(recipe), *used]) == 2
    assert "which model.tokenizer names" in capsys.readouterr().err
