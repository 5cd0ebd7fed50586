"""Attention compiled for the GPU that is there: by the Triton kernels and by libraries.

It needs torch, numpy and pytest alone: a machine that is rented for minutes may have no more."""

import numpy as np
import pytest
import torch
from attention_cases import (
    UNO,
    assert_as_exact_as_torch,
    everything,
    inputs,
    packed,
    two_samples,
    with_lse,
)

from uno_ds.kernels.conditioning_attention import conditioning_attention, launch
from uno_ds.kernels.conditioning_attention.triton_operator import attention_and_lse
from uno_ds.kernels.plan import CAUSAL, FULL, NONE, AttentionPlan

pytestmark = pytest.mark.gpu


def run(plan: AttentionPlan, deterministic: bool = False, ahead: bool = False):
    plan = plan.to("cuda")
    return lambda q, k, v: attention_and_lse(q, k, v, plan, deterministic, ahead)


@pytest.mark.parametrize(("deterministic", "ahead"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_segments_are_as_exact_as_torch(dtype, deterministic, ahead):
    plan = packed(
        [200, 4098, 200, 256, 77, 1025, 211, 64],
        np.kron(np.eye(2, dtype=np.int8), UNO),
        [False, True, True, True] * 2,
        [0] * 4 + [1] * 4,
    )
    tensors = inputs(plan, dtype, 7, 1, 128, device="cuda")
    assert_as_exact_as_torch(run(plan, deterministic, ahead), plan.to("cuda"), tensors)


def test_lengths_do_not_recompile_a_kernel():
    kernel = launch.KERNELS["forward"]

    def compute(*lengths: int) -> int:
        """How many kernels there are after it."""
        plan = packed(list(lengths), [[CAUSAL, NONE], [FULL, FULL]])
        everything(run(plan), inputs(plan, torch.bfloat16, 2, 1, 64, device="cuda"))
        return sum(len(cache[0]) for cache in kernel.device_caches.values())

    before = compute(200, 300)
    assert [compute(1, 16), compute(17, 333), compute(64, 128)] == [before] * 3


@pytest.mark.parametrize("backend", ["flex", "flash"])
def test_a_library_is_as_exact_as_torch(backend):
    plan = two_samples().to("cuda")
    function = with_lse(lambda *x: conditioning_attention(*x, backend=backend), plan)
    assert_as_exact_as_torch(function, plan, inputs(plan, torch.bfloat16, 4, 2, 128, device="cuda"))
