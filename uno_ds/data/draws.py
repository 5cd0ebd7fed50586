"""Rows that a lane draws, and the random numbers by which it does."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from uno_ds.sequence.segments import Sample


class Draw:
    """Where a row comes from, and the sample that is made of it, by a thread of `pool` if there is
    one, else when it is asked for. `before`, `after`: of a streamed row, the states of its source
    (`StreamedRow`)."""

    def __init__(
        self,
        source: int,
        position: int,
        index: int,
        make: Callable[[], Sample],
        pool: ThreadPoolExecutor | None,
        before: dict[str, Any] | None = None,
        after: dict[str, Any] | None = None,
    ):
        self.source, self.position, self.index = source, position, index
        self.before, self.after = before, after
        self._make = make
        self._future: Future[Sample] | None = pool.submit(make) if pool is not None else None

    def sample(self) -> Sample:
        """Raises BadRow."""
        if self._future is None:
            return self._make()
        return self._future.result()


def generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
