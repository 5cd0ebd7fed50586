"""A run that is asked to end does so after its step, and goes on later, also with other ranks."""

import json
import shutil
import signal
import time

import pytest
from fault_table import TABLE, Survived
from runs import EVERY, GO_ON, HANGS, STEPS, Place, curve, go_on, slow_unless
from tiny import GRADIENT_ROUNDING


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


@pytest.mark.timed
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
