"""What the tests of every Triton kernel need: the tolerance rule, memory by tensors, machine code
of a GPU that is not there."""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from uno_ds.kernels import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def forward_and_gradients(
    function: Callable[..., torch.Tensor],
    inputs: list[torch.Tensor | None],
    wanted: list[bool],
    upstream: torch.Tensor,
) -> list[torch.Tensor]:
    """[output, gradient of each wanted input]; the inputs are copied first."""
    inputs = [
        x if x is None else x.detach().clone().requires_grad_(want)
        for x, want in zip(inputs, wanted)
    ]
    out = function(*inputs)
    out.backward(upstream.to(out))
    return [out.detach(), *(x.grad for x, want in zip(inputs, wanted) if want)]


def assert_as_exact_as_torch(
    ours: list[torch.Tensor], theirs: list[torch.Tensor], exact: list[torch.Tensor], what: str = ""
) -> None:
    """The error of each of our tensors is at most twice that of torch's in the same dtype, both
    against fp64; beyond it one unit in the last place of the largest value is granted, by which two
    right roundings may differ."""
    for number, (mine, other, true) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert mine.shape == true.shape and mine.dtype == other.dtype, (
            f"{what} tensor {number}: {mine.shape}, {mine.dtype}"
        )
        if not true.numel():
            continue
        error, allowed = ((x.double() - true).abs().max().item() for x in (mine, other))
        unit = torch.finfo(mine.dtype).eps * true.abs().max().item()
        assert error <= 2 * allowed + unit, (
            f"{what} tensor {number}: error {error:.2e}, torch's is {allowed:.2e}"
        )


class PeakBytes(TorchDispatchMode):
    """Bytes of the tensors that were made inside it and are alive, at the worst moment; `largest`
    is that of a single one. Kernels are left out: they make none, but Triton's interpreter copies
    what it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()

        def start(
            *arguments: Any, start: Callable[..., None] = launch.start, **constants: Any
        ) -> None:
            with _disable_current_modes():
                start(*arguments, **constants)

        monkeypatch.setattr(launch, "start", start)
        self.now = self.peak = self.largest = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        given = {
            tensor.untyped_storage().data_ptr()
            for tensor in args
            if isinstance(tensor, torch.Tensor)
        }
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage().data_ptr() not in given | self._known
            ):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        size, place = storage.nbytes(), storage.data_ptr()
        self._known.add(place)
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
        weakref.finalize(storage, self._remove, size, place)

    def _remove(self, size: int, place: int) -> None:
        self.now -= size
        self._known.discard(place)


COMPILE = """
import dataclasses, importlib, json, sys
from uno_ds.kernels.compiled import compile_kernel
found = {}
for name, case in importlib.import_module(sys.argv[1]).compile_cases():
    compiled = compile_kernel(capability=90, **case)
    found[name] = dataclasses.asdict(compiled) | {"feasible": compiled.feasible(90)}
print(json.dumps(found))
"""


def machine_code(module: str) -> dict[str, dict[str, Any]]:
    """What the compiler says of a module's `compile_cases` on sm_90, asked in a process that does
    not interpret kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, module],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
