"""Whole runs on two ranks with a fault in the middle: started again with --resume auto, they end
with the numbers and weights of a run that nothing happened to, bit for bit; or they refuse in one
line."""

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fault_table import TABLE, Survived
from ranks import SECRET, ForkServer
from runs import EVERY, GO_ON, HANGS, STEPS, Place, curve, go_on, slow_unless
from safetensors.torch import load_file
from small_runs import write_vlm
from tiny import GRADIENT_ROUNDING

from uno_ds.training.finish import STOPPED
from uno_ds.training.metrics import read_metrics
from uno_ds.training.watchdog import SECONDS_FOR_OTHERS, STALLED

STALL = 3.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Place:
    return Place(tmp_path_factory.mktemp("faults"), server)


@pytest.fixture(scope="module")
def whole(place: Place) -> str:
    """The run that nothing happens to; every rank's operations of its saves are written down."""
    place.run(
        "whole",
        fault={"kind": "save", "record": str(place.folder / "operations")},
        checkpoint={"keep_every": EVERY, "keep_last": 1},
    )
    return "whole"


@pytest.mark.parametrize(
    ("where", "rank", "background"),
    slow_unless(
        ("backward", 1, False),
        [
            (where, rank, background)
            for where in ("forward", "backward", "optimizer")
            for rank in (0, 1)
            for background in (False, True)
        ],
    ),
)
def test_a_rank_killed_in_a_step_costs_the_steps_since_the_last_checkpoint_and_no_number(
    place: Place, whole: str, where: str, rank: int, background: bool
):
    name, checkpoint = (
        f"killed_{where}{rank}{background}",
        {"checkpoint": {"asynchronous": background}},
    )
    run = place.start(name, fault={"kind": where, "rank": rank, "step": 4}, **checkpoint)
    codes = run.wait()
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] != 0, run.output()
    assert place.steps(name) == [1, 2, 3]
    go_on(
        place,
        name,
        whole,
        f"kill -9 of rank {rank} in {where}{', saves in the background' if background else ''}",
        **checkpoint,
    )


def operations(place: Place, rank: int) -> list[str]:
    return (place.folder / f"operations{rank}").read_text().splitlines()


def between_the_renames(place: Place) -> int:
    """Of the second save: its folder is in place, `latest` still names the one before."""
    return (
        next(
            number
            for number, line in enumerate(operations(place, 0))
            if line.startswith("rename") and "step_4.part" in line
        )
        + 1
    )


def points_in_a_save(count: int) -> list[Callable[[Place], tuple[int, int]]]:
    def point(number: int) -> Callable[[Place], tuple[int, int]]:
        def of(place: Place) -> tuple[int, int]:
            # Most operations write some bytes; half of the points are anything else.
            rank, chosen = number % 2, random.Random(number)
            lines = operations(place, rank)
            return rank, chosen.choice(
                [
                    at
                    for at, line in enumerate(lines)
                    if number < count // 2 or not line.startswith("_append")
                ]
            )

        of.__name__ = f"point{number}"
        return of

    def renames(place: Place) -> tuple[int, int]:
        return 0, between_the_renames(place)

    def before_the_last_folder_is_renamed(place: Place) -> tuple[int, int]:
        return 0, next(
            number
            for number, line in enumerate(operations(place, 0))
            if line.startswith("rename") and f"step_{STEPS}.part" in line
        )

    slow = [before_the_last_folder_is_renamed, *map(point, range(count))]
    return [renames, *(pytest.param(of, marks=pytest.mark.slow) for of in slow)]


@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("point", points_in_a_save(10))
def test_a_rank_killed_at_any_point_of_a_save_leaves_a_checkpoint_to_go_on_from(
    place: Place, whole: str, point: Callable, background: bool
):
    rank, operation = point(place)
    name, checkpoint = (
        f"save_{point.__name__}{background}",
        {"checkpoint": {"asynchronous": background}},
    )
    run = place.start(
        name, fault={"kind": "save", "rank": rank, "operation": operation}, **checkpoint
    )
    assert run.wait()[rank] == -signal.SIGKILL, run.output()
    if point.__name__ == "renames":
        assert (place.of(name) / "checkpoints" / "latest").read_text() == "step_2\n" and (
            place.of(name) / "checkpoints" / "step_4"
        ).exists()
    what = operations(place, rank)[operation].split("/")[0].strip()
    output = go_on(
        place,
        name,
        whole,
        f"kill -9 of rank {rank} in a save at {what} "
        f"({operation}){', in the background' if background else ''}",
        **checkpoint,
    )
    if point.__name__ == "renames":
        assert "continues after step 4" in output
    assert not list((place.of(name) / "checkpoints").glob(".step*"))
    assert (place.of(name) / "checkpoints" / "latest").read_text() == f"step_{STEPS}\n"


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_stops_for_ever_is_found_by_the_others_in_the_stated_time_with_a_report(
    place: Place, whole: str, rank: int
):
    name = f"stopped{rank}"
    run = place.start(
        name, fault={"kind": "stop", "rank": rank, "step": 4}, health={"stall_seconds": STALL}
    )
    while place.steps(name) != [1, 2, 3]:
        time.sleep(0.02)
        assert None in run.poll(), run.output()
    begun = time.time()
    while run.poll()[1 - rank] is None:
        time.sleep(0.02)
        assert time.time() < begun + HANGS, run.output()
    seconds = time.time() - begun
    run.wait()
    # The stacks of all threads are written meanwhile; a slow machine takes longer, as it does for a
    # step.
    slowest = max(row["step_seconds"] for row in read_metrics(place.of(name) / "metrics.jsonl"))
    assert run.codes[1 - rank] == STALLED
    assert seconds < STALL + SECONDS_FOR_OTHERS + max(4, 20 * slowest)
    report = (place.of(name) / f"stall_rank{1 - rank}.txt").read_text()
    assert (
        f"rank {1 - rank} made no progress for" in report
        and "in step 4; last collective of DeepSpeed: " in report
    )
    assert "train_step" in report and 'File "' in report
    assert report[:60] in run.logs[1 - rank].read_text()
    go_on(
        place,
        name,
        whole,
        f"SIGSTOP of rank {rank}: ended after {seconds:.1f} s (stated "
        f"{STALL + SECONDS_FOR_OTHERS:.0f})",
    )


@pytest.fixture
def small_disk(place: Place) -> Iterator[Callable[[str, int], None]]:
    """small_disk(name, bytes): the checkpoints of that run lie on a disk of that size."""
    mounted = []

    def mount(name: str, size: int) -> None:
        folder = place.of(name) / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        options = f"size={size}" if folder not in mounted else f"remount,size={size}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"this user may not mount a small disk: {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in set(mounted):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("noticed", "background"),
    slow_unless(
        ("while writing", False),
        [
            (noticed, background)
            for noticed in ("beforehand", "while writing")
            for background in (False, True)
        ],
    ),
)
def test_a_full_disk_costs_checkpoints_but_not_the_run(
    place: Place, whole: str, small_disk: Callable, noticed: str, background: bool
):
    name = f"full_{noticed.split()[0]}{background}"
    needed = sum(
        file.stat().st_size
        for file in (place.of(whole) / "checkpoints" / f"step_{STEPS}").iterdir()
    )
    small_disk(name, int(1.7 * needed))
    run = place.start(
        name,
        fault={"kind": "blind"} if noticed == "while writing" else None,
        checkpoint={"asynchronous": background, "keep_last": 1},
    )
    assert run.wait() == [1, 1], run.output()
    assert place.steps(name) == list(range(1, STEPS + 1))
    output = run.logs[0].read_text()
    words = (
        "No space left on device"
        if noticed == "while writing"
        else "bytes left, and the checkpoint takes"
    )
    assert (
        output.count("WARNING: the checkpoint of step") == 2 == output.count(words)
        and "The newest one is step_2." in output
    )
    summary = place.summary(name)
    assert (summary["checkpoints"]["saved"], summary["checkpoints"]["failed"]) == (
        1,
        2,
    ) and "could not be saved" in summary["exit"]
    assert sorted(path.name for path in (place.of(name) / "checkpoints").iterdir()) == [
        "latest",
        "step_2",
    ]
    small_disk(name, 10 * needed)
    go_on(
        place,
        name,
        whole,
        f"disk full, found {noticed}{', in the background' if background else ''}",
    )


def flip(file: Path, place_in_file: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(place_in_file * (len(content) - 1))] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        "flipped byte of a tensor",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in (
                "flipped byte of a header",
                "flipped byte of the manifest",
                "truncated file",
                "missing file",
                "missing manifest",
                "truncated manifest",
            )
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_older_one_is_used(
    place: Place, whole: str, damage: str
):
    name = damage.replace(" ", "_")
    shutil.copytree(place.of(whole), place.of(name))
    newest = place.of(name) / "checkpoints" / f"step_{STEPS}"
    file = newest / ("manifest.json" if "manifest" in damage else "rank_00001.safetensors")
    if damage.startswith("flipped"):
        flip(file, {"tensor": 1.0, "header": 0.001, "manifest": 0.5}[damage.split()[-1]])
    elif damage.startswith("truncated"):
        file.write_bytes(file.read_bytes()[:-20])
    else:
        file.unlink()
    output = go_on(place, name, whole, f"checkpoint with a {damage}")
    (passed_over,) = [line for line in output.splitlines() if line.startswith("--resume skips")]
    assert (
        newest.name in passed_over
        and ("interrupted" if damage == "missing manifest" else file.name) in passed_over
    )
    assert f"continues after step {STEPS - EVERY}" in output


def test_a_checkpoint_that_was_asked_for_by_name_is_not_replaced_by_an_older_one(
    place: Place, whole: str
):
    shutil.copytree(place.of(whole), place.of("named"))
    newest = place.of("named") / "checkpoints" / f"step_{STEPS}"
    flip(newest / "rank_00000.safetensors", 1.0)
    run = place.start("named", "--resume", str(newest))
    assert (
        run.wait()[0] == 2
        and "rank_00000.safetensors: does not hold what was written" in run.output()
    )


def test_a_nan_on_one_rank_skips_the_step_and_the_curve_goes_on_and_resumes(place: Place):
    run = place.run("nan", fault={"kind": "nan", "rank": 1, "step": 3})
    rows = read_metrics(place.of("nan") / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1] and rows[2]["loss"] is None
    assert all(row["loss"] for row in rows if row["step"] != 3)
    (line,) = [
        line for line in run.logs[0].read_text().splitlines() if line.startswith("step 3 skipped")
    ]
    assert "the loss is not finite; samples of rank 1: " in line and "rank 0" not in line
    TABLE.append(Survived("NaN on rank 1 in one step", True, 1))


def test_nans_in_a_row_end_the_run_cleanly_with_a_checkpoint_of_the_last_good_state(
    place: Place, whole: str
):
    run = place.start(
        "nans",
        fault={"kind": "nan", "rank": 0, "step": 3, "steps": 2},
        engine={"max_skipped_steps": 2},
    )
    assert run.wait() == [STOPPED, STOPPED], run.output()
    assert (
        "This was the 2th skipped step in a row (engine.max_skipped_steps = 2)"
        in place.summary("nans")["exit"]
    )
    good, last = (
        load_file(place.of(name) / f"checkpoints/step_{step}/rank_00000.safetensors")
        for name, step in ((whole, 2), ("nans", 4))
    )
    assert all(torch.equal(good[name], last[name]) for name in good)
    TABLE.append(Survived("NaN in two steps in a row, two being the limit: clean stop", True, 2))


@pytest.mark.parametrize(
    "action",
    ["skip", *(pytest.param(action, marks=pytest.mark.slow) for action in ("warn", "stop"))],
)
def test_a_spike_of_the_loss_is_left_out_or_ends_the_run_on_all_ranks_alike(
    place: Place, whole: str, action: str
):
    name = f"spike_{action}"
    run = place.start(
        name,
        fault={"kind": "spike", "rank": 1, "step": 4, "factor": 50.0},
        health={"spike_factor": 3, "spike_window": 2, "spike_action": action},
    )
    assert run.wait() == ([STOPPED] * 2 if action == "stop" else [0, 0]), run.output()
    rows, output = read_metrics(place.of(name) / "metrics.jsonl"), run.logs[0].read_text()
    assert (
        curve(place, name)[:3] == curve(place, whole)[:3] and rows[3]["loss"] > 3 * rows[2]["loss"]
    )
    assert "is above 3 medians of the last 2 losses" in output
    assert rows[-1]["skipped"] == (action != "warn") and rows[-1]["step"] == (
        4 if action == "stop" else STEPS
    )
    last, before, after = (
        load_file(place.of(run) / f"checkpoints/step_{step}/rank_00000.safetensors")
        for run, step in ((name, 4), (whole, 4), (whole, 6))
    )
    weight = "weight/model.vae2llm.weight"
    assert not last[weight].equal(before[weight]) and last[weight].shape == after[weight].shape
    TABLE.append(
        Survived(f"spike of the loss, spike_action = {action}", True, 0 if action == "warn" else 1)
    )


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint_and_code_0(
    place: Place, whole: str, number: signal.Signals
):
    name = number.name
    run = place.start(name, fault={"kind": "slow", "seconds": 0.2})
    while place.steps(name) != [1, 2, 3]:
        time.sleep(0.01)
        assert None in run.poll(), run.output()
    run.signal(number, rank=1)
    assert run.wait() == [0, 0], run.output()
    step = place.steps(name)[-1]
    assert (
        3 <= step < STEPS
        and (place.of(name) / "checkpoints" / "latest").read_text() == f"step_{step}\n"
    )
    assert place.summary(name)["exit"].startswith(f"interrupted after step {step} by")
    assert "Continue with --resume auto" in run.logs[0].read_text()
    assert f"continues after step {step}" in go_on(place, name, whole, f"{name} to rank 1")


def test_a_second_sigterm_ends_a_rank_at_once_even_in_a_collective(place: Place):
    run = place.start("impatient", fault={"kind": "stop", "rank": 1, "step": 3})
    while place.steps("impatient") != [1, 2]:
        time.sleep(0.02)
        assert None in run.poll(), run.output()
    time.sleep(0.5)
    run.signal(signal.SIGTERM, rank=0)
    time.sleep(2.5)
    assert run.poll()[0] is None
    run.signal(signal.SIGTERM, rank=0)
    begun = time.time()
    while run.poll()[0] is None and time.time() < begun + HANGS:
        time.sleep(0.01)
    seconds = time.time() - begun
    run.wait()
    assert run.codes[0] == 128 + signal.SIGTERM
    # Long before the other rank is given up, after `stall_seconds`.
    assert seconds < 10


def test_max_hours_ends_the_run_like_a_signal(place: Place):
    run = place.run("hours", "--max-hours", "1e-7")
    assert (
        place.steps("hours") == [1]
        and place.summary("hours")["exit"] == "interrupted after step 1 by --max-hours 1e-07"
    )
    assert "Continue with --resume auto" in run.logs[0].read_text()


@pytest.mark.parametrize(
    ("ranks", "config"), slow_unless((1, "zero2"), [(1, "zero2"), (4, "zero3")])
)
def test_another_number_of_ranks_goes_on_with_the_same_samples_and_numbers(
    place: Place, whole: str, ranks: int, config: str
):
    name = f"ranks{ranks}"
    shutil.copytree(place.of(whole), place.of(name))
    shutil.rmtree(place.of(name) / "checkpoints" / f"step_{STEPS}")
    run = place.run(name, *GO_ON, ranks=ranks, engine={"deepspeed": config})
    assert f"continues after step {STEPS - EVERY}" in run.logs[0].read_text()
    for ours, theirs in zip(curve(place, name), curve(place, whole), strict=True):
        assert ours["tokens"] == theirs["tokens"]
        for field in ("loss", "loss_flow", "grad_norm"):
            assert ours[field] == pytest.approx(theirs[field], rel=2 * GRADIENT_ROUNDING), (
                f"{field} of step {ours['step']}"
            )
    lanes = [
        json.loads((place.of(run) / f"checkpoints/step_{STEPS}/manifest.json").read_text())["lanes"]
        for run in (name, whole)
    ]
    assert lanes[0] == lanes[1]
    TABLE.append(Survived(f"2 ranks under zero3 go on as {ranks} under {config}", True, 0))


def test_a_base_that_changed_or_moved_is_refused_in_one_line(place: Place, whole: str):
    for name in ("changed", "moved"):
        shutil.copytree(place.of(whole), place.of(name))
    other = place.folder / "other_base"
    shutil.copytree(place.base, other)
    run = place.start("moved", *GO_ON, model={"base": str(place.folder / "gone")})
    assert run.wait()[0] == 2
    assert [
        line
        for line in run.logs[0].read_text().splitlines()
        if line.startswith("error: ") and str(place.folder / "gone") in line
    ]
    flip(other / "ema.safetensors", 0.9)
    run = place.start("changed", *GO_ON, model={"base": str(other)})
    assert run.wait()[0] == 2
    (error,) = [line for line in run.logs[0].read_text().splitlines() if line.startswith("error: ")]
    assert "was trained on other frozen weights" in error and str(other) in error
    TABLE.append(Survived("frozen weights changed on disk: refused", True))


def test_no_secret_of_the_environment_is_left_in_a_run(place: Place, whole: str):
    files = [
        path
        for folder in (place.of(whole), place.folder / f"home_{whole}")
        for path in folder.rglob("*")
        if path.is_file()
    ]
    assert {
        "recipe.yaml",
        "metrics.jsonl",
        "summary.json",
        "summary.md",
        "rank0.log",
        "manifest.json",
    } <= {path.name for path in files}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_a_slow_rank_is_named_and_a_run_of_equal_ranks_names_none(place: Place, whole: str):
    run = place.run(
        "slow", fault={"kind": "slow", "rank": 1, "seconds": 0.25}, logging={"every": 3}
    )
    lines = [line for line in run.logs[0].read_text().splitlines() if " is slow: busy for " in line]
    assert len(lines) == 1 and lines[0].startswith("warning: rank 1 is slow")
    ranks = place.summary("slow")["ranks"]
    # Two micro-batches a step. What the ranks do besides differs by less than all of it.
    usual, slow = ranks["busy_seconds"]
    assert ranks["slowest"] == 1 and slow - usual == pytest.approx(0.5, abs=0.2 + usual)
    assert curve(place, "slow") == curve(place, whole)


@pytest.mark.parametrize("keep", [None, 100])
def test_a_data_file_lost_in_mid_run_costs_its_rows_is_named_and_too_many_of_them_end_the_run(
    place: Place, keep: int | None
):
    """Half of the rows are gone: that is survived, unless the recipe says otherwise."""
    name = f"lost{keep}"
    paths = [
        write_vlm(
            place.folder / f"data_{name}" / str(part), [f"{part}{row}.jpg" for row in range(4)]
        )
        for part in range(2)
    ]
    data = {
        "sources": [{"path": str(place.folder / f"data_{name}")}, {"path": "scenes/t2i"}],
        "prefetch": 0,
    }
    lost = {"kind": "remove", "path": str(paths[0]), "keep": keep, "step": 2, "rank": 1}
    run = place.run(name, fault=lost, data=data)
    summary, output = place.summary(name), run.logs[0].read_text()
    assert summary["skipped_samples"]["lost_file"] > 0 and list(summary["lost_files"]) == [
        str(paths[0])
    ]
    assert output.count(f"warning: the data file {paths[0]} is lost: ") == 1
    TABLE.append(Survived(f"data file {'gone' if keep is None else 'cut'} in mid-run", True, 0))
    if keep is None:
        shutil.copy(paths[1], paths[0])
        strict = f"{name}_strict"
        run = place.start(
            strict, fault=lost, data=data, health={"max_bad_fraction": 0.05, "bad_rows_window": 10}
        )
        assert run.wait() == [STOPPED, STOPPED], run.output()
        assert (
            "rows could not be used (health.max_bad_fraction = 0.05)"
            in place.summary(strict)["exit"]
        )
        step = place.steps(strict)[-1]
        assert (
            2 <= step < STEPS
            and (place.of(strict) / "checkpoints" / "latest").read_text() == f"step_{step}\n"
        )


@pytest.mark.parametrize("action", ["stop", pytest.param("warn", marks=pytest.mark.slow)])
def test_a_kernel_that_turns_wrong_on_one_rank_is_found_by_the_check_and_a_right_one_passes(
    place: Place, whole: str, action: str
):
    health = {"kernel_check_every": 2, "kernel_check_action": action}
    if action == "stop":
        place.run("right", health=health)
        assert curve(place, "right") == curve(place, whole)
    run = place.start(
        f"wrong_{action}", fault={"kind": "kernel", "rank": 1, "step": 3}, health=health
    )
    assert run.wait() == ([STOPPED, STOPPED] if action == "stop" else [0, 0]), run.output()
    output = run.logs[0].read_text()
    assert (
        "kernel check of step 4, rank 1: attention by sdpa: the output is off by" in output
        and "kernel check of step 2" not in output
    )
    assert place.steps(f"wrong_{action}")[-1] == (4 if action == "stop" else STEPS)
    TABLE.append(
        Survived(f"attention wrong by 1 % on rank 1, kernel_check_action = {action}", True)
    )
