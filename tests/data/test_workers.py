"""data.workers: threads that read and decode rows change the time, and nothing of the packs."""

import itertools
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from uno_ds.data.images import BadRow
from uno_ds.data.stream import (
    DataSettings,
    Lane,
    Stream,
    build_stream,
    chosen_workers,
    cores_of_rank,
)
from uno_ds.sequence.segments import Kind, Sample, Segment
from uno_ds.settings import build


class Rows:
    """A source of numbered rows, of which each seventh is bad."""

    name = "rows"

    class settings:
        weight = 1.0

    def __init__(self, count: int = 50):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def locate(self, index: int) -> tuple[str, int]:
        return "file", index

    def read(self, index: int, rng: np.random.Generator) -> int:
        if index % 7 == 3:
            raise BadRow("seventh" if index % 2 else "even_seventh", f"row {index}")
        return index


def make_sample(example: int, rng: np.random.Generator) -> Sample:
    """Of a length that depends on the row and on the random numbers of its draw."""
    length = 5 + example % 11 + int(rng.integers(7))
    return Sample(f"{example}", [Segment(Kind.TEXT, np.arange(length))])


def lanes(make: Callable = make_sample, count: int = 2) -> list[Lane]:
    sources: list[Any] = [Rows(), Rows(31)]
    make_any: Any = make
    return [Lane(number, count, sources, make_any, 0, 60, None) for number in range(count)]


def shown(samples: list[Sample]) -> list[tuple[str, int]]:
    return [(sample.key, sample.length) for sample in samples]


def run(workers: int, steps: int, states: dict | None = None, prefetch: int = 2) -> tuple:
    collate: Any = shown
    stream = Stream(lanes(), collate, prefetch, workers)
    if states is not None:
        stream.restore(states)
    packs = list(itertools.islice(iter(stream), steps))
    state = stream.state
    stream.close()
    return packs, state, stream.skipped_examples()


@pytest.mark.parametrize("workers", [2, 4])
def test_packs_states_and_bad_rows_are_those_of_one_thread(workers):
    packs, state, examples = run(1, 30)
    assert run(workers, 30) == (packs, state, examples)
    assert run(workers, 30, prefetch=0)[:2] == (packs, state)
    skipped = [lane["skipped"] for lane in state.values()]
    assert all(set(found) == {"seventh", "even_seventh"} for found in skipped)
    assert len({key for step in packs for pack in step for key, _ in pack}) > 40


@pytest.mark.parametrize("workers", [1, 3])
def test_a_restart_at_any_step_goes_on_with_the_same_packs(workers):
    packs, state, _ = run(1, 12)
    for step in range(1, 6):
        first, middle, _ = run(workers, step)
        rest, end, _ = run(workers, 12 - step, middle)
        assert first + rest == packs and end == state


def test_rows_are_made_by_several_threads_at_once_and_none_is_left():
    together = threading.Barrier(3, timeout=60)
    names = set()

    def make(example: int, rng: np.random.Generator) -> Sample:
        together.wait()
        names.add(threading.current_thread().name)
        return make_sample(example, rng)

    before = threading.active_count()
    collate: Any = shown
    stream = Stream(lanes(make, 1), collate, 1, 3)
    next(iter(stream))
    together.abort()
    stream.close()
    assert len(names) == 3 and all(name.startswith("rows") for name in names)
    assert threading.active_count() == before


def test_an_error_in_a_thread_reaches_the_caller():
    def make(example: int, rng: np.random.Generator) -> Sample:
        raise RuntimeError(f"broken {example}")

    collate: Any = shown
    stream = Stream(lanes(make), collate, 1, 3)
    with pytest.raises(RuntimeError, match="broken"):
        next(iter(stream))
    stream.close()


@pytest.fixture
def machine(monkeypatch) -> Callable[[int, int], None]:
    """machine(cores, allowed): so many, of which this process may use so many."""

    def has(cores: int, allowed: int) -> None:
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        bound = set(range(allowed))
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: bound, raising=False)

    return has


@pytest.mark.parametrize(
    ("cores", "allowed", "ranks", "expected"),
    [
        (96, 96, 8, 12),
        # As srun binds a task to its own cores.
        (96, 12, 8, 12),
        (96, 1, 8, 1),
        (2, 2, 4, 1),
        (8, 4, 1, 4),
    ],
)
def test_a_rank_has_its_share_of_the_cores_and_no_more_than_it_is_bound_to(
    machine, cores, allowed, ranks, expected
):
    machine(cores, allowed)
    assert cores_of_rank(ranks) == expected


@pytest.mark.parametrize(
    ("cores", "allowed", "ranks", "expected"),
    [(2, 2, 1, 2), (2, 2, 2, 1), (1, 1, 4, 1), (16, 16, 1, 4), (192, 192, 8, 4), (96, 12, 8, 4)],
)
def test_without_a_number_there_are_as_many_threads_as_cores_for_a_rank_and_at_most_four(
    machine, cores, allowed, ranks, expected
):
    machine(cores, allowed)
    assert chosen_workers(None, ranks) == expected
    assert chosen_workers(7, ranks) == 7


def test_a_stream_has_the_threads_for_the_ranks_of_its_machine(machine, monkeypatch):
    machine(6, 6)
    settings = build(DataSettings, {"sources": [{"path": "x"}]})
    sources: Any = [Rows()]
    make: Any = type("Make", (), {"token_budget": 60, "__call__": lambda self, *a: make_sample(*a)})
    arguments = (sources, make(), shown, settings, 0, 4, 0)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert build_stream(*arguments, 4).workers == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert build_stream(*arguments, 4).workers == 3
