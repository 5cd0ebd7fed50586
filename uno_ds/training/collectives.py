"""Observes DeepSpeed's collectives: the last one that started, and the time spent waiting in them;
and collectives over Python objects and errors."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import deepspeed.comm.comm
import torch
import torch.distributed as dist

from uno_ds.ranges import Range, named_range
from uno_ds.settings import SettingsError

NAMES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "all_gather_object",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "all_to_all",
    "barrier",
)


class Collectives:
    """While entered, records each collective that DeepSpeed starts: name, sizes, number and time;
    its tensors are not kept.

    `blocked`: seconds for which the host has waited. On a CPU that is all waiting for other ranks;
    on a GPU the device waits, and nothing is counted."""

    def __init__(self, device: torch.device):
        self.started, self.blocked = time.monotonic(), 0.0
        self._count, self._name = 0, "none yet"
        self._sizes: list[int] = []
        self._on_host = device.type == "cpu"
        self._original: dict[str, Any] = {}

    def __enter__(self) -> "Collectives":
        backend = deepspeed.comm.comm.cdb
        self._original = {name: getattr(backend, name) for name in NAMES if hasattr(backend, name)}
        for name, function in self._original.items():
            setattr(backend, name, self._recording(name, function))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, function in self._original.items():
            setattr(deepspeed.comm.comm.cdb, name, function)

    def wait(self, function: Any, *arguments: Any, **options: Any) -> Any:
        """Calls the function and counts its time as blocked."""
        started = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            self.blocked += time.perf_counter() - started

    def _recording(self, name: str, function: Any) -> Any:
        def recording(*arguments: Any, **options: Any) -> Any:
            values = (*arguments, *options.values())
            self.started = time.monotonic()
            self._name = name
            self._sizes = [value.numel() for value in values if isinstance(value, torch.Tensor)]
            self._count += 1
            with named_range(Range.COMMUNICATION, name):
                if not self._on_host:
                    return function(*arguments, **options)
                handle = self.wait(function, *arguments, **options)
            return _Handle(handle, self) if hasattr(handle, "wait") else handle

        return recording

    def __str__(self) -> str:
        sizes = ", ".join(f"{size:,}" for size in self._sizes)
        of_sizes = f" of {sizes} values" if sizes else ""
        return f"{self._name}{of_sizes}, the {self._count:,}th"


class _Handle:
    """The handle of an asynchronous collective; the time in its `wait` counts as blocked."""

    def __init__(self, handle: Any, collectives: Collectives):
        self._handle, self._collectives = handle, collectives

    def wait(self, *arguments: Any) -> Any:
        with named_range(Range.COMMUNICATION, "wait"):
            return self._collectives.wait(self._handle.wait, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """For a block that may fail on one rank alone: at its end all ranks wait for each other, and if
    any raised SettingsError or OSError, all raise the first such error as a SettingsError, instead
    of hanging in the next collective. The block itself must not contain collectives that a failing
    rank would skip."""
    error: tuple[str, str] | None = None
    try:
        yield
    except OSError as raised:
        name = str(raised.filename or "checkpoint")
        error = name, f"cannot be read or written: {raised.strerror or raised}."
    except SettingsError as raised:
        error = raised.key, raised.message
    failed = [found for found in gather_objects(error) if found is not None]
    if failed:
        raise SettingsError(*failed[0])


def gather_rows(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(the rows of all ranks, in the order of the ranks; number of the first of this rank's), of
    tensors [n, W] whose n differs. Collective; the host waits for the counts."""
    ranks = dist.get_world_size()
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(ranks)]
    deepspeed.comm.all_gather(counts, count)
    sizes = torch.cat(counts).tolist()
    if not any(sizes):
        return rows, 0
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(ranks)]
    deepspeed.comm.all_gather(gathered, padded)
    every = [part[:size] for part, size in zip(gathered, sizes, strict=True)]
    return torch.cat(every), sum(sizes[: dist.get_rank()])


def gather_objects(own: Any) -> list[Any]:
    """The values of all ranks, in the order of the ranks. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, own)
    return values
