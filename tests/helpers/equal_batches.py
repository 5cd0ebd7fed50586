"""Batches of streams, and whether they are equal bit for bit."""

import dataclasses
import itertools
from typing import Any

import torch

from uno_ds.data.stream import Stream
from uno_ds.sequence.batch import PackedBatch


def take(stream: Stream, steps: int) -> list[list[PackedBatch]]:
    taken = list(itertools.islice(iter(stream), steps))
    stream.close()
    return taken


def same(first: Any, second: Any) -> bool:
    """Bit for bit, through tensors, tuples and plans."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if dataclasses.is_dataclass(first):
        return all(
            same(getattr(first, field.name), getattr(second, field.name))
            for field in dataclasses.fields(first)
        )
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def alike(first: list[list[PackedBatch]], second: list[list[PackedBatch]]) -> bool:
    return len(first) == len(second) and all(same(one, other) for one, other in zip(first, second))
