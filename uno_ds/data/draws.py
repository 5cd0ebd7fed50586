"""Rows that a lane draws, and the random numbers by which it does."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from uno_ds.sequence.segments import Sample


class Draw:
    """One drawn row: where it comes from, and the sample that is made of it, by a thread of `pool`
    if there is one, else when it is asked for."""

    def __init__(
        self,
        source: int,
        position: int,
        index: int,
        make: Callable[[], Sample],
        pool: ThreadPoolExecutor | None,
    ):
        self.source, self.position, self.index = source, position, index
        self._make = make
        self._future = pool.submit(make) if pool is not None else None

    def sample(self) -> Sample:
        """Raises BadRow."""
        if self._future is None:
            return self._make()
        return self._future.result()


def generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
