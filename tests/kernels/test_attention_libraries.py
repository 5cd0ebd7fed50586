"""FlexAttention's block mask and the composition of flash attention calls say what the plan says.
On a GPU they run as libraries: test_attention_on_a_gpu.py."""

import numpy as np
import pytest
import torch
from attention_cases import (
    assert_as_exact_as_torch,
    everything,
    inputs,
    plain_varlen,
    two_samples,
    with_lse,
)
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from random_plans import packed_plans
from rounding import assert_equal_up_to_rounding
from torch._dynamo.testing import CompileCounterWithBackend

from uno_ds.kernels.conditioning_attention import flash, flex, reference
from uno_ds.kernels.plan import CAUSAL, FULL, NONE, build_plan


@given(plan=packed_plans(most_rows=150))
@hypothesis_settings(max_examples=60, deadline=None)
def test_the_composition_of_calls_is_exact_for_every_batch_of_packed_samples(plan):
    try:
        flash.compose(plan)
    except ValueError as error:
        assert "cannot be composed" in str(error)
        assume(False)
    assert_as_exact_as_torch(
        with_lse(lambda *x: flash.conditioning_attention(*x, varlen=plain_varlen), plan),
        plan,
        inputs(plan, torch.float32, 4, 2, 8),
    )


def test_live_rows_take_two_calls_and_context_rows_one():
    calls = [call.causal for call in flash.compose(two_samples())[0]]
    context = [call.causal for call in flash.compose(two_samples((0, 209)))[0]]
    assert calls == [False, True] and context == [True]


def test_a_plan_that_is_no_composition_is_a_sentence():
    rows = np.arange(4)
    causal_across = build_plan(
        rows // 2,
        rows % 2,
        np.array([[FULL, NONE], [CAUSAL, FULL]], dtype=np.int8),
        np.zeros(2, dtype=np.int64),
        (0, 4),
    )
    torn = build_plan(
        np.zeros(4, dtype=np.int64),
        np.array([0, 2, 1, 3]),
        np.array([[CAUSAL]], dtype=np.int8),
        np.zeros(1, dtype=np.int64),
        (0, 2),
    )
    for plan, words in (
        (causal_across, "one segment sees another causally"),
        (torn, "not consecutive positions"),
    ):
        with pytest.raises(ValueError, match=words):
            flash.compose(plan)


@given(plan=packed_plans(most_rows=150))
@hypothesis_settings(max_examples=30, deadline=None)
def test_flex_gives_the_specifications_output_on_a_cpu(plan):
    q, k, v, _ = inputs(plan, torch.float32, 2, 1, 16)
    with torch.no_grad():
        # Products of 16 values, and at most 150 keys.
        assert_equal_up_to_rounding(
            flex.conditioning_attention(q, k, v, plan),
            reference.conditioning_attention(q, k, v, plan),
            16,
            150,
        )


@given(plan=packed_plans(most_rows=700, lengths=(1, 2, 100, 128, 129, 256, 300)))
@hypothesis_settings(max_examples=30, deadline=None)
def test_flexs_blocks_are_full_where_all_is_visible_and_absent_where_nothing_is(plan):
    visible = plan.visible().numpy()
    full, partial = flex.blocks(plan)
    pad = [(0, -size % flex.BLOCK) for size in visible.shape]
    seen = (
        np.pad(visible, pad).reshape(full.shape[0], flex.BLOCK, full.shape[1], flex.BLOCK)
        if full.size
        else np.zeros((*full.shape[:1], 1, full.shape[1], 1))
    )
    some, every = seen.any(axis=(1, 3)), seen.all(axis=(1, 3))
    assert (
        not (full & ~every).any()
        and not (full & partial).any()
        and (some <= (full | partial)).all()
    )
    causal = (plan.relation_SS == CAUSAL).any()
    if not causal:
        assert (full == every).all() and ((full | partial) == some).all()
    mask = flex.block_mask(plan).to_dense()[0, 0].bool().numpy() if plan.queries else full
    assert (mask == (full | partial)).all()


def test_one_compiled_function_serves_all_shapes_of_a_kind_of_call():
    counter = CompileCounterWithBackend("eager")
    flex.forget_compiled()
    graphs = []
    for scale, heads in (*((scale, 2) for scale in (0.5, 0.3, 0.7, 0.9, 1.1)), (0.3, 1), (0.5, 1)):
        plan = two_samples(scale=scale)
        q, k, v, _ = inputs(plan, torch.float32, heads, 1, 16)
        kind = flex.CallKind(False, heads, 1, 16, ())
        by_head = (x.transpose(0, 1)[None] for x in (q, k, v))
        with torch.no_grad():
            out = flex.compiled(kind, counter)(*by_head, flex.block_mask(plan), None)
            expected = flex.conditioning_attention(q, k, v, plan)
        assert_equal_up_to_rounding(out[0].transpose(0, 1), expected, 16, 600)
        graphs.append(counter.frame_count)
    flex.forget_compiled()
    # The first shapes may compile again; later ones of the same kind do not, and another kind
    # starts with a count of its own.
    assert graphs[2] == graphs[4] <= 3 and graphs[6] - graphs[4] <= 2


def test_a_compiled_function_raises_where_it_would_run_uncompiled(monkeypatch):
    monkeypatch.setattr(flex, "RECOMPILE_LIMIT", 1)
    flex.forget_compiled()
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        kind = flex.CallKind(False, 2, 1, 16, ())
        function = flex.compiled(kind, CompileCounterWithBackend("eager"))
        plan = two_samples(scale=0.3)
        with pytest.raises(Exception, match="fullgraph"):
            for dtype in (torch.float32, torch.float64):
                tensors = [x.transpose(0, 1)[None] for x in inputs(plan, dtype, 2, 1, 16)[:3]]
                function(*tensors, flex.block_mask(plan), None)
    flex.forget_compiled()


def test_no_queries_stay_in_the_graph():
    plan = two_samples((1200, 1200))
    q, k, v, _ = inputs(plan, torch.float32, 2, 1, 16)
    for function in (
        lambda *x: flash.conditioning_attention(*x, varlen=plain_varlen),
        flex.conditioning_attention,
    ):
        got = everything(with_lse(function, plan), [q, k, v, q])
        assert got[0].shape == (0, 2, 16) and not got[3].any()
