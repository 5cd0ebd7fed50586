"""What the Triton attention kernels cannot read or compute is one sentence."""

import numpy as np
import pytest
import torch
from attention_cases import UNO, inputs, packed

from uno_ds.kernels.conditioning_attention import conditioning_attention, launch
from uno_ds.kernels.plan import FULL, AttentionPlan, build_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())


def good() -> tuple[list[torch.Tensor], AttentionPlan]:
    plan = packed([4], [[FULL]])
    return inputs(plan, torch.float32, 2, 1, 16, device=DEVICE)[:3], plan.to(DEVICE)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x: x.double(), ("float64", "bfloat16")),
        (lambda x: x.repeat(1, 1, 6), ("96", "16, 32, 64, 72, 128")),
        (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), ("contiguous", "strides")),
        (lambda x: x.to("meta"), ("one device", "meta")),
    ],
)
def test_what_the_kernels_cannot_read_is_a_sentence(change, words):
    tensors, plan = good()
    with pytest.raises(ValueError) as caught:
        conditioning_attention(*map(change, tensors), plan, "triton")
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and all(word in text for word in words), text


def test_rows_beyond_32_bits_and_the_interpreters_bf16_are_a_sentence():
    tensors, plan = good()
    with pytest.raises(ValueError, match="32 bits"):
        wide = torch.empty(4, 2**20, 16, device=DEVICE)
        conditioning_attention(wide, wide, wide, plan, "triton")
    with pytest.raises(ValueError, match="at most 536870912 rows"):
        huge = np.broadcast_to(np.int64(0), (2**29 + 1,))
        build_plan(
            huge,
            huge,
            np.ones((1, 1), dtype=np.int8),
            np.zeros(1, dtype=np.int64),
            (0, 1),
            huge == 0,
        )
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="wrong values in bfloat16"):
            conditioning_attention(*(x.bfloat16() for x in tensors), plan, "triton")


def test_an_architecture_that_the_table_lacks_is_named(monkeypatch):
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_35")
    tensors, plan = good()
    with pytest.raises(
        ValueError,
        match="holds .*sm_90.* but not sm_35; add it with python -m benchmarks launch_table",
    ):
        conditioning_attention(*tensors, plan, "triton")


def test_a_plan_of_another_batch_with_as_many_rows_is_still_a_plan_of_ranges_within_them():
    """Rows of a plan never lie outside of its own batch, whatever the tensors hold."""
    plan = packed([13, 60, 31, 16], UNO)
    assert (
        plan.table("keys")[:, :2].max() <= plan.keys
        and plan.table("queries")[:, :2].max() <= plan.queries
    )
    with pytest.raises(ValueError, match="another batch"):
        conditioning_attention(
            *inputs(packed([121], [[FULL]]), torch.float32, 2, 1, 16, device=DEVICE)[:3],
            plan.to(DEVICE),
            "triton",
        )
