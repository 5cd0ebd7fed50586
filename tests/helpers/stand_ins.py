"""Attention backends that stand in for those of a GPU: right ones, and each kind of bad one. Also
for processes that tests start, so they are registered by a function."""

import os
import time
from types import SimpleNamespace

import torch

from uno_ds.kernels.backends import KERNELS, AttentionMemory, Backend, Kernel
from uno_ds.kernels.conditioning_attention import reference, sdpa


def right(q, k, v, plan):
    return sdpa.conditioning_attention(q, k, v, plan)


def slow(q, k, v, plan):
    time.sleep(0.05)
    return right(q, k, v, plan)


def wrong(q, k, v, plan):
    return right(q, k, v, plan) * 1.5


def wrong_backward(q, k, v, plan):
    """The forward is right."""
    return right(q, k, v.detach() + 0.5 * (v - v.detach()), plan)


def nothing_but_nan(q, k, v, plan):
    return right(q, k, v, plan) * float("nan")


def raising(q, k, v, plan):
    raise RuntimeError("no kernel image\nis available for this device")


def too_large(q, k, v, plan):
    raise torch.OutOfMemoryError("Tried to allocate 99 GiB")


def crashing(q, k, v, plan):
    os._exit(41)


def hanging(q, k, v, plan):
    time.sleep(600)


FUNCTIONS = (
    right,
    slow,
    wrong,
    wrong_backward,
    nothing_but_nan,
    raising,
    too_large,
    crashing,
    hanging,
)


def kernel(*names: str) -> Kernel:
    """Attention with these candidates, in this order."""
    backends = {"reference": Backend(lambda: reference)} | {
        function.__name__: Backend(
            lambda function=function: SimpleNamespace(conditioning_attention=function),
            memory=AttentionMemory(),
        )
        for function in FUNCTIONS
    }
    return Kernel(backends, "reference", names[:1], names)


def register(*names: str) -> None:
    KERNELS["attention"] = kernel(*names)
