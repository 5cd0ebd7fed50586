"""Checks of a Triton kernel's device, and its launch parameters.

Launch parameters come from a table in the kernel's folder, keyed by architecture, precision and
shape class: nothing is tuned while a model trains."""

import functools
import importlib.resources
import json
from contextlib import nullcontext
from typing import Any

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret


def check_device(kernel: str, **tensors: torch.Tensor | None) -> None:
    """Raises ValueError if the tensors do not lie together where `kernel` can run."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    devices = {tensor.device for tensor in given.values()}
    if len(devices) > 1:
        where = ", ".join(f"{name} on {tensor.device}" for name, tensor in given.items())
        raise ValueError(f"The {kernel} needs its tensors on one device; got {where}.")
    for device in devices:
        if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
            raise ValueError(
                f"The {kernel} needs a CUDA device, and a CPU can only interpret it under "
                f"TRITON_INTERPRET=1; got tensors on {device}."
            )
    if INTERPRETED and any(tensor.dtype == torch.bfloat16 for tensor in given.values()):
        raise ValueError(
            f"Triton's interpreter computes wrong values in bfloat16, so the {kernel} refuses it "
            "under TRITON_INTERPRET=1; use float32 or float16."
        )


def start(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Runs `programs` programs of a kernel on the device of its first argument, which need not be
    the current one."""
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*arguments, **constants)


@functools.cache
def table(package: str) -> dict:
    return json.loads(importlib.resources.files(package).joinpath("launch.json").read_text())


@functools.cache
def architecture(device: torch.device) -> str:
    """Name of a device in launch tables: sm_90, or interpreter under TRITON_INTERPRET=1."""
    if INTERPRETED:
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def parameters(package: str, tensor: torch.Tensor, shape: str, kernel: str) -> dict[str, int]:
    """Tile sizes, stages and warps of a kernel. Raises ValueError for an architecture that the
    table does not hold."""
    here = architecture(tensor.device)
    known = table(package)
    if here not in known:
        names = ", ".join(name for name in known if name != "interpreter")
        raise ValueError(
            f"The launch table of {package} holds {names} but not {here}; add its tile sizes to "
            "launch.json there, or choose another backend under kernels in the recipe."
        )
    precision = "single" if tensor.dtype == torch.float32 else "half"
    return dict(known[here][precision][shape][kernel])
