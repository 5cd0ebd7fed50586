"""Clocks for parts of a step, and the memory that a step needs."""

import gc
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Phases:
    """Seconds by phase of one step. Where one phase starts within another, its time is not the
    other's. The device is waited for at every boundary, so a step that is split is slower than one
    that is not: splits are measured apart from steps."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self.device = device
        self.clock = clock
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []

    def start(self, name: str) -> None:
        self._leave()
        self._open.append(name)
        self._since = self.clock()

    def stop(self) -> None:
        self._leave()
        self._open.pop()
        self._since = self.clock()

    def _leave(self) -> None:
        if self._open:
            synchronise(self.device)
            self.seconds[self._open[-1]] += self.clock() - self._since

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            self.start(name)
            try:
                return function(*arguments, **options)
            finally:
                self.stop()

        return timed

    @contextmanager
    def of(self, owner: Any, **names: str) -> Iterator[None]:
        """Within it, owner.ATTRIBUTE is timed as the phase that ATTRIBUTE=PHASE says."""
        before = {attribute: vars(owner).get(attribute) for attribute in names}
        for attribute, phase in names.items():
            object.__setattr__(owner, attribute, self.around(phase, getattr(owner, attribute)))
        try:
            yield
        finally:
            for attribute, value in before.items():
                if value is None:
                    object.__delattr__(owner, attribute)
                else:
                    object.__setattr__(owner, attribute, value)


@contextmanager
def waiting_in_collectives() -> Iterator[list[float]]:
    """[seconds] that this rank waits for the others; only on a CPU, where waiting blocks the
    program."""
    waited = [0.0]
    original = dist.Work.wait

    def wait(work: Any, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(work, *arguments, **options)
        finally:
            waited[0] += time.perf_counter() - start

    with mock.patch.object(dist.Work, "wait", wait):
        yield waited


class LiveTensors(TorchDispatchMode):
    """Bytes of all tensors: `held` before it, `live` now and `peak` at most, each storage once. For
    a CPU, whose allocator has no statistics; slows the step down to the speed of Python."""

    def __init__(self) -> None:
        super().__init__()
        self._known: set[int] = set()
        self.live = self.peak = 0
        for thing in gc.get_objects():
            # Some lazy modules raise when they are asked for their class.
            if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
                self._see(thing.untyped_storage())
        self.held = self.live

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None
    ) -> Any:
        out = function(*arguments, **(options or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """The most that this process holds while `step` runs: the allocator's peak on a GPU, bytes of
    tensors on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device)
    with LiveTensors() as tensors:
        step()
    return tensors.peak
