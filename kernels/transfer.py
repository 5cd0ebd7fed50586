"""Nested values with tensors in them: a function is applied to every tensor, to pin it or to copy
it to a device."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

OnTensor = Callable[[torch.Tensor], torch.Tensor]


def map_tensors(value: Any, function: OnTensor) -> Any:
    """The value with every tensor replaced by `function` of it: tuples and dataclasses are rebuilt,
    an object with a method `map_tensors` decides itself, everything else stays as it is."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if hasattr(value, "map_tensors") and not isinstance(value, type):
        return value.map_tensors(function)
    if isinstance(value, tuple):
        return tuple(map_tensors(item, function) for item in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {
        field.name: map_tensors(getattr(value, field.name), function)
        for field in dataclasses.fields(value)
    }
    kind: Any = type(value)
    return kind(**fields)


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in page-locked host memory, from which copies to a GPU are asynchronous. One on a
    device, and one without values, is returned as it is."""
    if tensor.device.type != "cpu" or not tensor.numel() or tensor.is_pinned():
        return tensor
    return tensor.pin_memory()


def with_index(device: torch.device | str) -> torch.device:
    """The device with its number: `cuda` is the current one."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; the copy from the host to a GPU is asynchronous."""
    if tensor.device == device:
        return tensor
    source = pinned(tensor) if device.type == "cuda" else tensor
    return source.to(device, non_blocking=True)
