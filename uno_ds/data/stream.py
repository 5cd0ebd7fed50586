"""The stream of packed batches: mixed, shuffled, endless, resumable, and the same for every number
of ranks.

A step consists of `packs_per_step` packs over all ranks. Each of them is filled by a lane of its
own, which draws sources, rows and noise from random numbers keyed by (seed, lane, draw) and does
not depend on ranks. A rank runs an equal share of the lanes, so that one rank with four lanes and
four ranks with one lane each train on the same packs in the same step."""

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from uno_ds.data.images import ImageSettings
from uno_ds.data.lane import Lane
from uno_ds.data.samples import SampleMaker
from uno_ds.data.scenes import ScenesSettings
from uno_ds.data.source_checks import BadExample
from uno_ds.data.sources import Source, SourceSettings
from uno_ds.sequence.batch import PackedBatch
from uno_ds.sequence.packing import Collator
from uno_ds.sequence.schedule import SupervisionSchedule
from uno_ds.settings import SettingsError, printable, setting

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
    """`data.workers`, or where it is null a thread for each core of this rank, at most
    MOST_WORKERS."""
    return min(MOST_WORKERS, cores_of_rank(ranks_of_machine)) if given is None else given


def cores_of_rank(ranks_of_machine: int) -> int:
    """This rank's share of the machine's cores, or fewer, if a scheduler bound it to fewer."""
    cores = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return min(allowed, max(1, cores // ranks_of_machine))


def skipped_samples(states: dict[str, dict]) -> Counter[str]:
    """Bad rows by cause, over the lanes of the given states."""
    return sum((Counter(state["skipped"]) for state in states.values()), Counter())
