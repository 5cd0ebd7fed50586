"""A lane: one endless, resumable sequence of packs, the same whichever rank runs it."""

import functools
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from uno_ds.data.draws import Draw, generator
from uno_ds.data.examples import Example
from uno_ds.data.images import BadRow
from uno_ds.data.samples import SampleMaker
from uno_ds.data.source_checks import BadExample
from uno_ds.data.sources import Source
from uno_ds.data.streamed import StreamedSource
from uno_ds.sequence.packing import Packer
from uno_ds.sequence.segments import Sample

# After so many unusable rows in a row a pack is closed as it is, so that the other ranks do not
# wait for this one: the share of unusable rows over all ranks then ends the run on all of them
# (health.max_bad_fraction).
BAD_ROWS_IN_A_ROW = 1000


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
