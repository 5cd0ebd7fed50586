"""What this rank asks of the others: the last collective that DeepSpeed started, and the time spent waiting in collectives."""

import time
from types import TracebackType
from typing import Any

import deepspeed.comm.comm
import torch

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
    """While entered, notes each collective that goes through DeepSpeed: name, sizes, number and time, without holding its tensors.

    `blocked`: seconds for which the host has waited. On a CPU that is all waiting for other ranks; on a GPU the waiting is
    done by the device, and nothing is counted.
    """

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
    """The handle of a collective that goes on in the background; the time in its `wait` counts."""

    def __init__(self, handle: Any, collectives: Collectives):
        self._handle, self._collectives = handle, collectives

    def wait(self, *arguments: Any) -> Any:
        return self._collectives.wait(self._handle.wait, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)
