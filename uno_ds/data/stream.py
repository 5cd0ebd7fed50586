"""The stream of packed batches: mixed, shuffled, endless, resumable, and the same for every number
of ranks.

A step consists of `packs_per_step` packs over all ranks. Each of them is filled by a lane of its
own, which draws sources, rows and noise from random numbers keyed by (seed, lane, draw) and does
not depend on ranks. A rank runs an equal share of the lanes, so that one rank with four lanes and
four ranks with one lane each train on the same packs in the same step."""

import functools
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from uno_ds.data.draws import Draw, generator
from uno_ds.data.examples import Example
from uno_ds.data.images import BadRow, ImageSettings
from uno_ds.data.samples import SampleMaker
from uno_ds.data.scenes import ScenesSettings
from uno_ds.data.source_checks import BadExample
from uno_ds.data.sources import Source, SourceSettings
from uno_ds.data.streamed import StreamedSource
from uno_ds.sequence.batch import PackedBatch
from uno_ds.sequence.packing import Collator, Packer
from uno_ds.sequence.schedule import SupervisionSchedule
from uno_ds.sequence.segments import Sample
from uno_ds.settings import SettingsError, printable, setting

# After so many unusable rows in a row a pack is closed as it is, so that the other ranks do not
# wait for this one: the share of unusable rows over all ranks then ends the run on all of them
# (health.max_bad_fraction).
BAD_ROWS_IN_A_ROW = 1000
# Threads that are chosen where none are given: one reads the images of a pack in part of a step.
MOST_WORKERS = 4


@dataclass(frozen=True)
class VitImageSettings(ImageSettings):
    """The defaults fit the position table of BAGEL's visual encoder: 70 patches of 14 pixels per
    side."""

    max_side: int = setting(
        980,
        minimum=1,
        doc="Largest longer side in pixels after resizing.",
        maximum=65_536,
    )
    max_pixels: int = setting(
        980 * 980,
        minimum=1,
        doc="Largest number of pixels after resizing.",
        maximum=10**9,
    )


@dataclass(frozen=True)
class DataSettings:
    sources: list[SourceSettings] = setting(
        doc="What to train on: a list of sources, mixed by their weights."
    )
    scenes: ScenesSettings = setting(
        factory=ScenesSettings, doc="The embedded data set, drawn when a source uses it."
    )
    max_unreadable_fraction: float = setting(
        0.5,
        doc="Share of a source's files that may be unreadable; above it the run does not start.",
        minimum=0,
        maximum=1,
    )
    folder: str = setting("runs/data", doc="Folder in which the embedded data set is kept.")
    latent_image: ImageSettings = setting(
        factory=ImageSettings, doc="Sizes of images for the codec."
    )
    vit_image: VitImageSettings = setting(
        factory=VitImageSettings, doc="Sizes of images for the visual encoder."
    )
    max_samples_per_pack: int | None = setting(
        None,
        doc="Closes a pack after this many samples even if tokens are left; null: only "
        "the budget closes it.",
        minimum=1,
        maximum=10**6,
    )
    prefetch: int = setting(
        2,
        doc="Steps whose batches are prepared ahead in the background; 0: none.",
        minimum=0,
        maximum=1000,
    )
    workers: int | None = setting(
        None,
        doc="Threads of a rank that read and decode rows, where batches are prepared ahead; null: "
        "the machine's cores by its ranks, at most 4. The samples do not depend on it.",
        minimum=1,
        maximum=256,
    )

    def __post_init__(self) -> None:
        if not self.sources:
            raise SettingsError("sources", "must name at least one source.")
        names = Counter(source.name for source in self.sources if source.name)
        for name, count in names.items():
            if count > 1:
                raise SettingsError(
                    "sources",
                    f"the name '{printable(name)}' is given to {count} sources; names must differ.",
                )


class Lane:
    """One endless sequence of packs. `state` is small and JSON-able.

    `pool`: makes samples of the next `ahead` draws; they are taken in their order, so that packs do
    not depend on it."""

    def __init__(
        self,
        number: int,
        lanes: int,
        sources: list[Source],
        make_sample: SampleMaker,
        seed: int,
        token_budget: int,
        max_samples: int | None,
        negatives: bool = False,
    ):
        self.number = number
        self.lanes = lanes
        self.sources = sources
        self.make_sample = make_sample
        self.seed = seed
        self.token_budget = token_budget
        self.max_samples, self.negatives = max_samples, negatives
        weights = np.array([source.settings.weight for source in sources], dtype=np.float64)
        weights /= weights.max()
        self.probabilities = weights / weights.sum()
        self.draws = 0
        self.positions = [0] * len(sources)
        self.waiting: tuple[int, int] | None = None
        self.skipped: Counter[str] = Counter()
        # The first row of each cause since the start of the process.
        self.examples: dict[str, BadExample] = {}
        self.pool: ThreadPoolExecutor | None = None
        self.ahead = 0
        self._planned: deque[Draw] = deque()
        # `waiting` and its sample, if that was made in this process.
        self._kept: tuple[Draw, Sample] | None = None
        self._streamed = {
            place: source.lane_rows(number, lanes, seed)
            for place, source in enumerate(sources)
            if isinstance(source, StreamedSource)
        }
        # Of each streamed source the state from which its next row here is the first that is in no
        # pack.
        self._streams = {place: rows.state for place, rows in self._streamed.items()}
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def next_pack(self) -> list[Sample]:
        """Not full, or even empty, after BAD_ROWS_IN_A_ROW unusable rows."""
        packer = Packer(self.token_budget, self.negatives)
        bad_in_a_row = 0
        while bad_in_a_row < BAD_ROWS_IN_A_ROW:
            if self.max_samples is not None and len(packer.samples) >= self.max_samples:
                break
            draw = self._next_draw()
            sample = self._kept[1] if self._kept else self._sample(draw)
            self.waiting = self._kept = None
            self._note(draw, draw.after)
            if sample is None:
                bad_in_a_row += 1
                continue
            bad_in_a_row = 0
            if not packer.offer(sample):
                self.waiting, self._kept = (draw.source, draw.position), (draw, sample)
                self._note(draw, draw.before)
                break
        return packer.samples

    def end_supervision(self) -> None:
        """From the next pack on, samples are those of plain flow matching, also those that were
        made ahead or wait for room."""
        self.make_sample = self.make_sample.unsupervised()
        self._planned.clear()
        self._kept = None
        for place, rows in self._streamed.items():
            rows.restore(self._streams[place])

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "draws": self.draws,
            "positions": list(self.positions),
            "waiting": list(self.waiting) if self.waiting else None,
            "skipped": dict(self.skipped),
        }
        if self._streamed:
            state["streams"] = {str(place): rows for place, rows in self._streams.items()}
        return state

    def restore(self, state: dict[str, Any]) -> None:
        self.draws, self.positions = state["draws"], list(state["positions"])
        self.waiting = tuple(state["waiting"]) if state["waiting"] else None
        self.skipped = Counter(state["skipped"])
        self._planned.clear()
        self._kept = None
        for place, rows in self._streamed.items():
            rows.restore(state["streams"][str(place)])
            self._streams[place] = rows.state

    def _note(self, draw: Draw, state: dict[str, Any] | None) -> None:
        if state is not None:
            self._streams[draw.source] = state

    def _next_draw(self) -> Draw:
        if self._kept:
            return self._kept[0]
        if self.waiting:  # of a lane that was restored
            return self._drawn(*self.waiting, self.pool)
        while len(self._planned) <= self.ahead:
            self._plan()
        draw = self._planned.popleft()
        self.draws += 1
        self.positions[draw.source] += 1
        return draw

    def _plan(self) -> None:
        """Appends the draw after the planned ones. No other lane has its position."""
        rng = generator(self.seed, 0, self.number, self.draws + len(self._planned))
        source = int(rng.choice(len(self.sources), p=self.probabilities))
        planned = sum(draw.source == source for draw in self._planned)
        position = (self.positions[source] + planned) * self.lanes + self.number
        self._planned.append(self._drawn(source, position, self.pool))

    def _drawn(self, number: int, position: int, pool: ThreadPoolExecutor | None) -> Draw:
        """`position`: in the source's endless sequence of epochs."""
        index, read, states = self._next_row(number, position)

        def make() -> Sample:
            rng = generator(self.seed, 1, number, position)
            return self.make_sample(read(rng), rng)

        return Draw(number, position, index, make, pool, *states)

    def _next_row(
        self, number: int, position: int
    ) -> tuple[int, Callable[[np.random.Generator], Example], tuple[dict[str, Any], ...]]:
        """(its number, what reads it, the states of a streamed source before and after it)."""
        source = self.sources[number]
        if isinstance(source, StreamedSource):
            row = self._streamed[number].next()
            read = functools.partial(source.read_row, position, row.columns)
            return position, read, (row.before, row.after)
        epoch, place = divmod(position, len(source))
        index = int(self._order(number, epoch)[place])
        return index, functools.partial(source.read, index), ()

    def _sample(self, draw: Draw) -> Sample | None:
        try:
            return draw.sample()
        except BadRow as error:
            self.skipped[error.cause] += 1
            if error.cause not in self.examples:
                source = self.sources[draw.source]
                self.examples[error.cause] = BadExample.of(source, draw.index, error)
            return None

    def _order(self, source: int, epoch: int) -> np.ndarray:
        """The shuffled rows of one epoch, the same for all lanes."""
        if (source, epoch) not in self._orders:
            rng = generator(self.seed, 2, source, epoch)
            past = [key for key in self._orders if key[0] == source and key[1] < epoch - 1]
            for key in past:
                del self._orders[key]
            self._orders[source, epoch] = rng.permutation(len(self.sources[source]))
        return self._orders[source, epoch]


class Stream:
    """Batches of the lanes of one rank, step by step, prepared ahead in a thread.

    Iterating gives lists of PackedBatch, one for each of the rank's lanes. `state` is the position
    after the last list that was returned, however many are prepared; `waited` sums the seconds for
    which the caller waited. `schedule`: None if supervision stays as it is for the whole run."""

    def __init__(
        self,
        lanes: list[Lane],
        collate: Collator,
        prefetch: int,
        workers: int = 1,
        schedule: SupervisionSchedule | None = None,
    ):
        self.schedule = schedule
        # The step whose batches were made last. A step takes one list, also if it is skipped.
        self._step = 0
        self._is_supervised = True
        self.lanes = lanes
        self.workers = workers
        self.collate = collate
        self.prefetch = prefetch
        # The last thing done to a batch, in the thread.
        self.finish: Callable[[PackedBatch], PackedBatch] | None = None
        self.state = self._lane_states()
        self.waited = 0.0
        self._executor: ThreadPoolExecutor | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[Future] = deque()

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        while True:
            if self.prefetch and self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="batches")
                self._start_workers()
                for _ in range(self.prefetch):
                    self._ahead.append(self._executor.submit(self._prepare))
            begun = time.perf_counter()
            if self._executor is None:
                batches, self.state = self._prepare()
            else:
                batches, self.state = self._ahead.popleft().result()
                self._ahead.append(self._executor.submit(self._prepare))
            self.waited += time.perf_counter() - begun
            yield batches

    @property
    def rows(self) -> tuple[int, int]:
        """Rows that the lanes of this rank have drawn, and the unusable ones among them."""
        drawn = sum(state["draws"] for state in self.state.values())
        return drawn, skipped_samples(self.state).total()

    def skipped_examples(self) -> dict[int, dict[str, BadExample]]:
        """{lane: {cause: its first unusable row}} of the causes that `state` counts. Only after
        `close`."""
        examples: dict[int, dict[str, BadExample]] = {}
        for lane in self.lanes:
            counted = self.state[str(lane.number)]["skipped"]
            examples[lane.number] = {
                cause: example for cause, example in lane.examples.items() if cause in counted
            }
        return examples

    def restore(self, states: dict[str, dict], step: int = 0) -> None:
        """Resumes from the states of all lanes after this step. Only before iteration."""
        self._step = step
        for lane in self.lanes:
            lane.restore(states[str(lane.number)])
        self.state = self._lane_states()

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor, self._ahead = None, deque()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
            for lane in self.lanes:
                lane.pool, lane.ahead = None, 0

    def _start_workers(self) -> None:
        """One worker is the thread that prepares batches."""
        if self.workers == 1:
            return
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="rows")
        for lane in self.lanes:
            lane.pool, lane.ahead = self._pool, self.workers

    def _prepare(self) -> tuple[list[PackedBatch], dict[str, dict]]:
        self._step += 1
        weight = 1.0 if self.schedule is None else self.schedule.weight(self._step)
        if not weight and self._is_supervised:
            self._is_supervised = False
            for lane in self.lanes:
                lane.end_supervision()
        packs = [lane.next_pack() for lane in self.lanes]
        if weight in (0, 1):
            batches = [self.collate(pack) for pack in packs]
        else:
            batches = [self.collate(pack, supervision=weight) for pack in packs]
        if self.finish is not None:
            batches = [self.finish(batch) for batch in batches]
        return batches, self._lane_states()

    def _lane_states(self) -> dict[str, dict]:
        return {str(lane.number): lane.state() for lane in self.lanes}


def build_stream(
    sources: list[Source],
    make_sample: SampleMaker,
    collate: Collator,
    settings: DataSettings,
    seed: int,
    packs_per_step: int,
    rank: int,
    world_size: int,
    schedule: SupervisionSchedule | None = None,
    negatives: bool = False,
) -> Stream:
    """`negatives`: captions get a negative from the other samples of their pack."""
    lanes = [
        Lane(
            number,
            packs_per_step,
            sources,
            make_sample,
            seed,
            make_sample.token_budget,
            settings.max_samples_per_pack,
            negatives,
        )
        for number in range(rank, packs_per_step, world_size)
    ]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    workers = chosen_workers(settings.workers, local)
    return Stream(lanes, collate, settings.prefetch, workers, schedule)


def chosen_workers(given: int | None, ranks_of_machine: int) -> int:
    """`data.workers`, or where it is null a thread for each core that the machine has for this
    rank, at most MOST_WORKERS."""
    if given is not None:
        return given
    cores = len(os.sched_getaffinity(0))
    return max(1, min(MOST_WORKERS, cores // ranks_of_machine))


def skipped_samples(states: dict[str, dict]) -> Counter[str]:
    """Bad rows by cause, over the lanes of the given states."""
    return sum((Counter(state["skipped"]) for state in states.values()), Counter())
