"""Which other noised image of a pack each noised image is contrasted with."""

from collections.abc import Sequence

import numpy as np


def partners(samples: Sequence[int]) -> list[int] | None:
    """For each noised image, given the sample of each in the order of the pack, the next one of
    another sample, the first following the last. None where one sample has all of them.

    Rows are drawn in a random order, so that the next sample of a pack is a random one."""
    if len(set(samples)) < 2:
        return None
    count = len(samples)
    return [_next_of_another(samples, image, count) for image in range(count)]


def partner_rows(grids: Sequence[tuple[int, int]], samples: Sequence[int]) -> np.ndarray:
    """int64 [X]: for each row of each noised image, `grids` being their rows and columns of
    latents, the row of its partner whose cell is the nearest; the same cell where both have one
    size. [0] where there are no partners."""
    chosen = partners(samples)
    if chosen is None:
        return np.zeros(0, dtype=np.int64)
    sizes = np.array([rows * columns for rows, columns in grids])
    first_row = np.cumsum(sizes) - sizes
    rows: list[np.ndarray] = []
    for image, partner in enumerate(chosen):
        down, across = map(_nearest, grids[image], grids[partner])
        cells = down[:, None] * grids[partner][1] + across
        rows.append(first_row[partner] + cells.reshape(-1))
    return np.concatenate(rows).astype(np.int64)


def _next_of_another(samples: Sequence[int], image: int, count: int) -> int:
    places = [(image + step) % count for step in range(1, count)]
    return next(place for place in places if samples[place] != samples[image])


def _nearest(size: int, other: int) -> np.ndarray:
    """For each of `size` cells along an axis the one of `other` cells that holds its middle."""
    return ((2 * np.arange(size) + 1) * other) // (2 * size)
