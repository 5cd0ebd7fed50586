"""The masks of sdpa: what the plan says, built from its ranges, and none where everything is
visible."""

import time

import numpy as np
import torch
from attention_cases import assert_as_exact_as_torch, inputs
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from random_plans import packed_plans

from uno_ds.kernels.conditioning_attention import reference, sdpa
from uno_ds.kernels.plan import CAUSAL, FULL, AttentionPlan, build_plan


def images(lengths: list[int]) -> AttentionPlan:
    """Each sees itself and nothing else, as in the visual encoder."""
    count = len(lengths)
    segment = np.repeat(np.arange(count), lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    relation = np.where(np.eye(count), FULL, 0).astype(np.int8)
    return build_plan(segment, position, relation, np.arange(count), (0, len(segment)))


def by_shape(q, k, v, plan):
    """As on a GPU."""
    plan.cache.pop("sdpa", None)
    sdpa.prepare(plan, on_gpu=True)
    return sdpa.conditioning_attention(q, k, v, plan), reference.attention_and_lse(q, k, v, plan)[1]


@given(plan=packed_plans(most_rows=150))
@hypothesis_settings(max_examples=60, deadline=None)
def test_calls_by_shape_are_exact_for_every_batch_of_packed_samples(plan):
    assert_as_exact_as_torch(
        lambda *x: by_shape(*x, plan), plan, inputs(plan, torch.float32, 4, 2, 8)
    )


@given(plan=packed_plans(most_rows=150))
@hypothesis_settings(max_examples=60, deadline=None)
def test_the_mask_of_one_call_is_the_plans(plan):
    if not plan.queries:
        return
    (call,), restore_Q = sdpa.calls_of(plan, by_shape=False)
    visible = plan.visible()
    sees = visible.any(dim=1)
    flat_QT = call.visible_BQT.flatten(0, 2)[restore_Q]
    sample_Q = restore_Q // call.query_BQ.shape[1]
    # From the keys of each sample to all rows; the padding repeats row 0, which nothing may see
    # through it.
    dense = torch.zeros_like(visible)
    dense.scatter_reduce_(1, call.key_BT[sample_Q], flat_QT, "amax")
    assert torch.equal(dense[sees], visible[sees])
    assert torch.equal(call.empty_BQ1.flatten()[restore_Q], ~sees)
    assert (flat_QT[sees].sum(dim=1) == visible[sees].sum(dim=1)).all()


def test_images_of_one_size_are_one_call_without_a_mask():
    calls, _ = sdpa.calls_of(images([64, 81, 64, 64]), by_shape=True)
    assert [(len(call.query_BQ), call.visible_BQT is None) for call in calls] == [
        (3, True),
        (1, True),
    ]


def test_samples_that_do_not_see_everything_share_one_masked_call():
    relation = np.array([[CAUSAL, 0], [0, FULL]], dtype=np.int8)
    plan = build_plan(
        np.repeat([0, 1], [5, 7]),
        np.concatenate([np.arange(5), np.arange(7)]),
        relation,
        np.arange(2),
        (0, 12),
    )
    whole, masked = sdpa.calls_of(plan, by_shape=True)[0]
    assert whole.visible_BQT is None and whole.query_BQ.shape == (1, 7)
    assert torch.equal(masked.visible_BQT[0, 0], torch.ones(5, 5).tril().bool())


def test_a_mask_costs_about_as_much_as_filling_its_bytes():
    plan = images([2048, 1500, 2048])
    began = time.process_time()
    sdpa.calls_of(plan, by_shape=False)
    passed = time.process_time() - began
    size = 3 * 2048 * 2048
    began = time.process_time()
    # As many comparisons of gathered int8 values as a mask over segments needs.
    rows = np.zeros(2048, dtype=np.int64)
    table = np.ones((3, 3), dtype=np.int8)
    for _ in range(3):
        gathered = table[rows[:, None], rows[None, :]]
    slow = time.process_time() - began
    assert gathered.size * 3 == size and passed < slow
