"""What this rank asks of the others: the last collective that DeepSpeed started, and the time spent
waiting in collectives."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import deepspeed.comm.comm
import torch
import torch.distributed as dist

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
    """While entered, notes each collective that goes through DeepSpeed: name, sizes, number and
    time, without holding its tensors.

    `blocked`: seconds for which the host has waited. On a CPU that is all waiting for other ranks;
    on a GPU the waiting is done by the device, and nothing is counted."""

    def __init__(self, device: torch.device):
        self.started, self.blocked = time.monotonic(), 0.0
        self._count, self._name, self._sizes = 0, "none yet", []
        self._on_host = device.type == "cpu"
        self._before: dict[str, Any] = {}

    def __enter__(self) -> "Collectives":
        backend = deepspeed.comm.comm.cdb
        self._before = {name: getattr(backend, name) for name in NAMES if hasattr(backend, name)}
        for name, function in self._before.items():
            setattr(backend, name, self._noting(name, function))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, function in self._before.items():
            setattr(deepspeed.comm.comm.cdb, name, function)

    def wait(self, function: Any, *arguments: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            self.blocked += time.perf_counter() - begun

    def _noting(self, name: str, function: Any) -> Any:
        def noted(*arguments: Any, **options: Any) -> Any:
            self.started, self._count, self._name = time.monotonic(), self._count + 1, name
            self._sizes = [
                value.numel()
                for value in (*arguments, *options.values())
                if isinstance(value, torch.Tensor)
            ]
            if not self._on_host:
                return function(*arguments, **options)
            handle = self.wait(function, *arguments, **options)
            return _Handle(handle, self) if hasattr(handle, "wait") else handle

        return noted

    def __str__(self) -> str:
        sizes = ", ".join(f"{size:,}" for size in self._sizes)
        return (
            f"{self._name} of {sizes} values, the {self._count:,}th"
            if sizes
            else f"{self._name}, the {self._count:,}th"
        )


class _Handle:
    """The handle of a collective that continues in the background; the time in its `wait`
    counts."""

    def __init__(self, handle: Any, collectives: Collectives):
        self._handle, self._collectives = handle, collectives

    def wait(self, *arguments: Any) -> Any:
        return self._collectives.wait(self._handle.wait, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """A block in which one rank may fail alone: at its end all ranks wait for each other, and where
    one raised SettingsError or OSError, all raise the first such error as a SettingsError, instead
    of waiting without end in the next collective. The block itself holds no collective that a
    failing rank would leave out."""
    error = None
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


def gather_objects(own: Any) -> list[Any]:
    """The value of each rank, in their order. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, own)
    return values
