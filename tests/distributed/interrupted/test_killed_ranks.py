"""Ranks that are killed or stop for ever: started again with --resume auto, the run ends with the
numbers and weights of a run that nothing happened to, bit for bit."""

import random
import signal
import time
from collections.abc import Callable

import pytest
from runs import HANGS, STEPS, Place, go_on, slow_unless

from uno_ds.training.metrics import read_metrics
from uno_ds.training.watchdog import SECONDS_FOR_OTHERS, STALLED

STALL = 3.0


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


@pytest.mark.timed
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_stops_for_ever_is_found_by_the_others_in_the_stated_time_with_a_report(
    place: Place, whole: str, rank: int
):
    name, exit_file = f"stopped{rank}", place.folder / f"stopped{rank}.exit"
    run = place.start(
        name,
        "--exit-file",
        str(exit_file),
        fault={"kind": "stop", "rank": rank, "step": 4},
        health={"stall_seconds": STALL},
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
    assert exit_file.read_text().startswith(f"{STALLED} stalled: {report[:60]}")
    go_on(
        place,
        name,
        whole,
        f"SIGSTOP of rank {rank}: ended after {seconds:.1f} s (stated "
        f"{STALL + SECONDS_FOR_OTHERS:.0f})",
    )
