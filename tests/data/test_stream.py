"""The stream: the same packs for every number of ranks, nothing cut, repeated or lost, and exact
after a restart."""

import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import yaml
from equal_batches import alike, same, take
from small_runs import edit_row, encoded, picture, t2i_row, tree, write_edit, write_t2i

from uno_ds.data.images import BadRow
from uno_ds.data.sources import SourceSettings
from uno_ds.data.stream import DataSettings, Lane, Stream, build_stream, skipped_samples
from uno_ds.run import Run, prepare
from uno_ds.sequence.segments import Kind, Sample, Segment
from uno_ds.settings import build

ROWS, LANES = 23, 4  # neither divides the other


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Run]]:
    """make(changes of the recipe): a checked run over a t2i source of 23 rows and an edit source of
    9."""
    folder = tmp_path_factory.mktemp("stream")
    sizes = [(40, 30), (30, 40), (64, 20), (24, 24)]
    t2i = [
        {**t2i_row(seed=seed), "image": encoded(picture(*sizes[seed % 4], seed=seed))}
        for seed in range(ROWS)
    ]
    paths = [
        write_t2i(folder / "t2i/a.parquet", t2i),
        write_edit(folder / "edit/a.parquet", [edit_row(seed=seed) for seed in range(9)]),
    ]

    def made(**changes: Any) -> Run:
        path = folder / "recipe.yaml"
        path.write_text(
            yaml.safe_dump(tree(folder, paths, **{"engine": {"packs_per_step": LANES}, **changes}))
        )
        return prepare(str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        yield made


@pytest.fixture(scope="module")
def run(make: Callable[..., Run]) -> Run:
    return make()


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_has_the_same_packs_for_any_number_of_ranks(run, ranks):
    alone = take(run.stream(0, 1), 4)
    shared = [take(run.stream(rank, ranks), 4) for rank in range(ranks)]
    for step, packs in enumerate(alone):
        together = [shared[lane % ranks][step][lane // ranks] for lane in range(LANES)]
        assert [pack.keys for pack in together] == [pack.keys for pack in packs]
        assert all(map(same, together, packs))
    assert len({pack.keys for packs in alone for pack in packs}) == 4 * LANES


def test_packs_hold_whole_samples_in_the_order_drawn_and_never_exceed_the_budget(run):
    """The samples of all packs are those that were made, one after the other; a pack ends only
    where the next did not fit."""
    made: list[Sample] = []

    def recorded(example: Any, rng: np.random.Generator) -> Sample:
        made.append(run.make_sample(example, rng))
        return made[-1]

    recorded.token_budget = budget = run.make_sample.token_budget
    settings = build(DataSettings, {"sources": [{"path": "x"}], "prefetch": 0})
    stream = build_stream(run.sources, recorded, run.stream(0, 1).collate, settings, 0, 1, 0, 1)
    lane = stream.lanes[0]
    packs = [lane.next_pack() for _ in range(12)]
    packed = [sample for pack in packs for sample in pack]
    # Each is made once: the one that did not fit is the first of the next pack.
    assert all(one is other for one, other in zip(packed, made[:-1], strict=True))
    assert len(packed) > 24
    for pack, following in itertools.pairwise(packs):
        batch = stream.collate(pack)
        assert (
            batch.tokens
            == sum(len(segment.rope_ids) for sample in pack for segment in sample.segments)
            <= budget
        )
        assert batch.tokens + following[0].length > budget
        assert batch.keys == tuple(sample.key for sample in pack)


def test_a_pack_of_at_most_n_samples_is_closed_early(make):
    limited = take(make(data={"max_samples_per_pack": 2, "prefetch": 0}).stream(0, 1), 3)
    assert {len(pack.keys) for packs in limited for pack in packs} == {2}
    assert min(len(pack.keys) for packs in take(make().stream(0, 1), 3) for pack in packs) > 2


@pytest.mark.parametrize("steps", [1, 5])
def test_a_stream_goes_on_exactly_where_its_state_was_taken(run, steps):
    whole = take(run.stream(0, 1), steps + 3)
    for rank in range(2):
        first, second = run.stream(rank, 2), run.stream(rank, 2)
        take(first, steps)
        second.restore({**json.loads(json.dumps(first.state)), "7": {}})
        assert second.state == first.state
        assert alike(take(second, 3), [packs[rank::2] for packs in whole[steps:]])


def test_batches_prepared_ahead_change_neither_batches_nor_states(make):
    run = make(data={"prefetch": 3})
    ahead, plain = (
        iter(stream := run.stream(0, 1)),
        iter(other := make(data={"prefetch": 0}).stream(0, 1)),
    )
    assert stream.state == other.state
    for _ in range(5):
        assert same(next(ahead), next(plain))
        assert stream.state == other.state
    assert any(lane.state() != other.state[str(lane.number)] for lane in stream.lanes), (
        "nothing was prepared ahead"
    )
    stream.close()


def test_another_seed_gives_another_order_and_the_same_seed_the_same(make):
    runs = [take(make(seed=seed).stream(0, 1), 2) for seed in (0, 0, 1)]
    assert alike(runs[0], runs[1])
    assert [pack.keys for packs in runs[0] for pack in packs] != [
        pack.keys for packs in runs[2] for pack in packs
    ]


class Rows:
    """A source without files: row n is the number n, or a bad row."""

    def __init__(
        self, rows: int, weight: float = 1.0, name: str = "rows", bad: dict[int, str] | None = None
    ):
        self.settings, self.name, self.rows, self.bad = (
            build(SourceSettings, {"path": name, "weight": weight}),
            name,
            rows,
            bad or {},
        )

    def __len__(self) -> int:
        return self.rows

    def read(self, index: int, rng: np.random.Generator) -> int:
        if index in self.bad:
            raise BadRow(self.bad[index], f"row {index}")
        return index

    def locate(self, index: int) -> tuple[str, int]:
        return f"{self.name}.parquet", index


def sample_of(name: Any, rng: np.random.Generator) -> Sample:
    return Sample(str(name), [Segment(Kind.TEXT, np.arange(3), token_ids=np.arange(3))])


def lanes_of(
    sources: list[Any], lanes: int = LANES, make_sample: Callable = sample_of, seed: int = 0
) -> list[Lane]:
    return [Lane(number, lanes, sources, make_sample, seed, 100, 1) for number in range(lanes)]


@pytest.mark.parametrize("rows, lanes", [(ROWS, LANES), (3, 5), (8, 4), (1, 2), (20, 1)])
def test_an_epoch_over_all_lanes_has_every_row_once_and_the_next_has_another_order(rows, lanes):
    turns = itertools.cycle(lanes_of([Rows(rows)], lanes))
    drawn = [int(next(turns).next_pack()[0].key) for _ in range(4 * rows)]
    epochs = [drawn[start : start + rows] for start in range(0, 4 * rows, rows)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert rows < 8 or len(set(map(tuple, epochs))) == 4


def test_sources_are_drawn_by_their_weights():
    """Within 4 standard deviations of the binomial, for each source and each lane."""
    weights, draws = (5.0, 2.0, 0.5), 1500
    sources = [Rows(11, weight) for weight in weights]
    for lane in lanes_of(sources, 2):
        for _ in range(draws):
            lane.next_pack()
        for count, weight in zip(lane.positions, weights, strict=True):
            share = weight / sum(weights)
            assert abs(count - draws * share) < 4 * (draws * share * (1 - share)) ** 0.5


def test_lanes_and_rows_have_random_numbers_of_their_own():
    """Same row, other epoch: other noise. Same epoch, other lanes: other order of sources."""
    drawn: dict[str, list[float]] = {}

    def noted(name: Any, rng: np.random.Generator) -> Sample:
        drawn.setdefault(str(name), []).append(rng.random())
        return sample_of(name, rng)

    turns = itertools.cycle(lanes_of([Rows(5)], 2, noted))
    for _ in range(20):
        next(turns).next_pack()
    numbers = [number for several in drawn.values() for number in several]
    assert len(numbers) == len(set(numbers)) == 20
    orders = []
    for lane in lanes_of([Rows(50, name="a"), Rows(50, name="b")], 2):
        orders.append([tuple(lane.positions) for _ in range(30) if lane.next_pack()])
    assert orders[0] != orders[1]


def test_bad_rows_are_passed_over_and_counted_by_cause_over_all_lanes():
    """Every draw is a sample or is counted, also across a restart."""
    bad = {0: "empty_image", 5: "bad_json", 6: "bad_json", 22: "too_long"}
    source = Rows(ROWS, bad=bad)
    lanes = lanes_of([source])
    seen: Counter[str] = Counter()
    for number in range(3 * ROWS):
        lane = lanes[number % LANES]
        before = lane.state()
        (sample,) = lane.next_pack()
        seen[sample.key] += 1
        assert lane.positions[0] - before["positions"][0] == 1 + sum(lane.skipped.values()) - sum(
            before["skipped"].values()
        )
        if number == ROWS:
            lanes, old = lanes_of([source]), lanes
            for lane, state in zip(lanes, [lane.state() for lane in old]):
                lane.restore(json.loads(json.dumps(state)))
    counted = skipped_samples({str(lane.number): lane.state() for lane in lanes})
    draws = sum(lane.draws for lane in lanes)
    assert draws == sum(counted.values()) + sum(seen.values()) and not {
        str(row) for row in bad
    } & set(seen)
    assert (
        set(counted) == {"empty_image", "bad_json", "too_long"}
        and counted["bad_json"] > counted["empty_image"] > 1
    )


def test_a_source_that_turns_all_bad_gives_counted_empty_packs_and_the_other_ranks_need_not_wait(
    monkeypatch,
):
    monkeypatch.setattr("uno_ds.data.lane.BAD_ROWS_IN_A_ROW", 40)
    (lane,) = lanes_of([Rows(5, name="rotten", bad=dict.fromkeys(range(5), "bad_json"))], 1)
    stream = Stream([lane], len, 0)
    assert (
        next(iter(stream)) == [0] and stream.rows == (40, 40) and lane.skipped == {"bad_json": 40}
    )


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_while_a_batch_is_prepared_reaches_the_caller(prefetch):
    """At the batch it belongs to: those before it are handed out."""

    def breaks(name: Any, rng: np.random.Generator) -> Sample:
        made.append(name)
        if len(made) > 3:
            raise MemoryError("no room")
        return sample_of(name, rng)

    made: list[Any] = []
    stream = Stream(lanes_of([Rows(9)], 1, breaks), len, prefetch)
    batches = iter(stream)
    assert [next(batches) for _ in range(3)] == [[1]] * 3
    state = stream.state
    with pytest.raises(MemoryError, match="no room"):
        next(batches)
    assert stream.state == state
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_the_recipe_decides_the_streams_settings(make):
    stream = make(data={"prefetch": 1}, seed=5, sequence={"token_budget": 700}).stream(1, 2)
    assert (stream.prefetch, [lane.number for lane in stream.lanes]) == (1, [1, 3])
    assert {(lane.seed, lane.token_budget, lane.lanes) for lane in stream.lanes} == {
        (5, 700, LANES)
    }
