"""Attention: every backend that runs anywhere equals the specification, and the specification is
a row-by-row loop."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from one_sentence import one_sentence
from rounding import assert_equal_up_to_rounding

from uno_ds.kernels.backends import KernelSettings, backend_names
from uno_ds.kernels.conditioning_attention import conditioning_attention
from uno_ds.kernels.metaquery_regression import metaquery_regression
from uno_ds.kernels.plan import CAUSAL, FULL, NONE, AttentionPlan, build_plan

# Any head dim and fp64; the others have test files of their own.
PLAIN_BACKENDS = ("reference", "sdpa")


def make_plan(
    groups: list[list[int]],
    relation: np.ndarray,
    query_rows: tuple[int, int],
    order: np.ndarray | None = None,
) -> AttentionPlan:
    """`groups`: lengths of the segments of each sample; `order`: which token of the sequence each
    row is."""
    lengths = np.array([length for group in groups for length in group], dtype=np.int64)
    group_S = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    segment = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.zeros(0, dtype=np.int64), *map(np.arange, lengths)])
    order = np.arange(len(segment)) if order is None else order
    relation = np.where(group_S[:, None] == group_S, relation, NONE).astype(np.int8)
    return build_plan(segment[order], position[order], relation, group_S, query_rows)


@st.composite
def plans(draw) -> AttentionPlan:
    """Any relation within a sample, rows in any order, any range of queries."""
    groups = draw(
        st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=4), min_size=1, max_size=4)
    )
    segments, rows = sum(map(len, groups)), sum(map(sum, groups))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    relation = rng.choice([NONE, FULL, CAUSAL], size=(segments, segments))
    query_rows = (
        (0, rows) if draw(st.booleans()) else tuple(sorted(rng.integers(0, rows + 1, 2).tolist()))
    )
    return make_plan(
        groups, relation, query_rows, rng.permutation(rows) if draw(st.booleans()) else None
    )


def random_qkv(
    plan: AttentionPlan, heads: int = 2, kv_heads: int = 1, dim: int = 4, seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (plan.queries, heads, dim), (plan.keys, kv_heads, dim), (plan.keys, kv_heads, dim)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]


def visible_keys(plan: AttentionPlan, query: int) -> list[int]:
    """The keys that a query sees, from the plan's table and nothing else of it."""
    row, seen = plan.query_rows[0] + query, []
    for key in range(plan.keys):
        relation = plan.relation_SS[plan.segment_T[row], plan.segment_T[key]]
        if relation == FULL or (
            relation == CAUSAL and plan.position_T[key] <= plan.position_T[row]
        ):
            seen.append(key)
    return seen


def by_loop(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    rows = []
    for query in range(plan.queries):
        keys = visible_keys(plan, query)
        for head in range(q.shape[1]):
            key_head = head * k.shape[1] // q.shape[1]
            weights = (k[keys, key_head] @ q[query, head] / math.sqrt(q.shape[2])).exp()
            rows.append(
                weights @ v[keys, key_head] / weights.sum() if keys else 0 * v.sum(dim=(0, 1))
            )
    return torch.stack(rows).reshape(q.shape) if rows else q


def with_gradients(
    function: Callable, inputs: list[torch.Tensor], seed: int = 1
) -> list[torch.Tensor]:
    """[output, gradient of each input] for a random gradient of the output."""
    out = function(*inputs)
    upstream = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype
    )
    gradients = torch.autograd.grad(out, inputs, upstream, allow_unused=True)
    return [
        out.detach(),
        *(torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, gradients)),
    ]


@given(
    plan=plans(),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    dim=st.sampled_from([1, 2, 5]),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_every_attention_backend_equals_a_loop_over_rows_forward_and_backward(
    plan, kv_heads, group, dim
):
    inputs = random_qkv(plan, kv_heads * group, kv_heads, dim)
    wanted = with_gradients(lambda *qkv: by_loop(*qkv, plan), inputs)
    for backend in PLAIN_BACKENDS:
        results = with_gradients(
            lambda *qkv, backend=backend: conditioning_attention(*qkv, plan, backend), inputs
        )
        for got, reference in zip(results, wanted):
            torch.testing.assert_close(got, reference, rtol=1e-9, atol=1e-12)


@given(plan=plans())
@hypothesis_settings(max_examples=60, deadline=None)
def test_a_row_that_sees_nothing_and_a_key_that_nobody_sees_give_0_and_get_a_gradient_of_0(
    plan,
):
    seen = [visible_keys(plan, query) for query in range(plan.queries)]
    empty = torch.tensor([not keys for keys in seen], dtype=torch.bool)
    unseen = torch.ones(plan.keys, dtype=torch.bool)
    unseen[sorted({key for keys in seen for key in keys})] = False
    for backend in PLAIN_BACKENDS:
        out, dq, dk, dv = with_gradients(
            lambda *qkv, backend=backend: conditioning_attention(*qkv, plan, backend),
            random_qkv(plan),
        )
        assert all(x.isfinite().all() for x in (out, dq, dk, dv))
        assert (
            not out[empty].any()
            and not dq[empty].any()
            and not dk[unseen].any()
            and not dv[unseen].any()
        )


@pytest.mark.parametrize("backend", PLAIN_BACKENDS)
def test_a_blind_segment_between_seeing_ones_gives_0_without_nan(backend):
    relation = np.array([[FULL, FULL, NONE], [NONE, NONE, NONE], [NONE, FULL, CAUSAL]])
    plan = make_plan([[2, 3, 4]], relation, (0, 9))
    out, dq, dk, dv = with_gradients(
        lambda *qkv: conditioning_attention(*qkv, plan, backend), random_qkv(plan)
    )
    assert (
        not out[2:5].any()
        and not dq[2:5].any()
        and all(x.isfinite().all() for x in (out, dq, dk, dv))
    )
    assert out[[0, 1, 5, 6, 7, 8]].abs().amin() > 0 and dq[[0, 1, 5, 6, 7, 8]].abs().amin() > 0


@pytest.mark.parametrize("backend", PLAIN_BACKENDS)
@pytest.mark.parametrize("rows", [0, 3])
def test_no_queries_give_no_rows_but_keep_q_k_and_v_in_the_graph(rows, backend):
    plan = make_plan(
        [[rows]] if rows else [], np.full((1, 1) if rows else (0, 0), FULL), (rows, rows)
    )
    inputs = random_qkv(plan)
    out = conditioning_attention(*inputs, plan, backend)
    assert out.shape == (0, 2, 4)
    out.sum().backward()
    for x in inputs:
        assert x.grad is not None and not x.grad.any()


@pytest.mark.parametrize("backend", PLAIN_BACKENDS)
def test_attention_gradients_equal_finite_differences(backend):
    relation = np.array([[FULL, NONE, NONE], [FULL, CAUSAL, NONE], [NONE, NONE, NONE]])
    plan = make_plan(
        [[2, 3, 1], [2]],
        np.pad(relation, (0, 1), constant_values=FULL),
        (1, 8),
        np.array([3, 0, 7, 1, 5, 2, 6, 4]),
    )
    assert any(not visible_keys(plan, query) for query in range(plan.queries))
    torch.autograd.gradcheck(
        lambda *qkv: conditioning_attention(*qkv, plan, backend), random_qkv(plan)
    )


@pytest.mark.parametrize("backend", PLAIN_BACKENDS)
def test_attention_keeps_the_dtype_and_is_as_exact_as_it(backend):
    plan = make_plan([[5, 3], [4]], np.full((3, 3), CAUSAL), (0, 12))
    exact = random_qkv(plan)
    wanted = by_loop(*exact, plan)
    for dtype in (torch.float32, torch.bfloat16):
        out = conditioning_attention(*(x.to(dtype) for x in exact), plan, backend)
        # Products of 4 values, and at most 12 keys.
        assert out.dtype == dtype
        assert_equal_up_to_rounding(out, wanted, 4, 12)


def test_query_rows_outside_the_keys_are_an_error():
    for query_rows in ((0, 4), (2, 1), (-1, 2)):
        with pytest.raises(ValueError, match="do not lie within the 3 key rows"):
            make_plan([[3]], np.array([[FULL]]), query_rows)


@pytest.mark.parametrize(
    "shapes, words",
    [
        ([(4, 8), (4, 1, 4), (4, 1, 4)], ("[4, 8]", "[T_q, H_q, D]")),
        ([(4, 2, 4), (4, 4), (4, 4)], ("[4, 4]",)),
        ([(4, 2, 4), (4, 1, 4), (4, 2, 4)], ("[4, 1, 4]", "[4, 2, 4]")),
        ([(4, 2, 4), (4, 1, 6), (4, 1, 6)], ("[4, 2, 4]", "[4, 1, 6]")),
        ([(4, 3, 4), (4, 2, 4), (4, 2, 4)], ("3 query heads", "2 key heads")),
        ([(3, 2, 4), (4, 1, 4), (4, 1, 4)], ("4 queries", "got 3", "another batch")),
        ([(4, 2, 4), (5, 1, 4), (5, 1, 4)], ("4 keys", "5 rows", "another batch")),
    ],
)
def test_attention_refuses_shapes_that_do_not_belong_together(shapes, words):
    plan = make_plan([[4]], np.array([[FULL]]), (0, 4))
    with pytest.raises(ValueError) as caught:
        conditioning_attention(*(torch.zeros(shape) for shape in shapes), plan)
    one_sentence(caught.value, *words)


def test_attention_refuses_mixed_dtypes_and_unknown_backends():
    plan = make_plan([[4]], np.array([[FULL]]), (0, 4))
    q, k = torch.zeros(4, 2, 4), torch.zeros(4, 1, 4)
    for inputs in ((q.double(), k, k), (q, k.bfloat16(), k.bfloat16()), (q, k, k.double())):
        with pytest.raises(ValueError) as caught:
            conditioning_attention(*inputs, plan)
        one_sentence(caught.value, "dtype", "float32")
    for backend in ("auto", "flashy"):
        with pytest.raises(ValueError) as caught:
            conditioning_attention(q, k, k, plan, backend)
        one_sentence(caught.value, f"'{backend}'", *backend_names("attention"))


def test_auto_is_resolved_to_a_backend_that_runs_and_a_choice_is_kept():
    plan = make_plan([[4]], np.array([[FULL]]), (0, 4))
    resolved = KernelSettings().resolved()
    assert conditioning_attention(*random_qkv(plan), plan, resolved.attention).shape == (4, 2, 4)
    assert metaquery_regression(
        torch.ones(2, 3), None, torch.ones(2, 3), "cosine", resolved.regression
    ).shape == (2,)
    assert KernelSettings(attention="reference").resolved().attention == "reference"


def test_a_plan_that_shows_one_sample_to_another_is_refused():
    with pytest.raises(ValueError, match="samples never see each other"):
        build_plan(
            np.array([0, 1]),
            np.array([0, 0]),
            np.ones((2, 2), dtype=np.int8),
            np.array([0, 1]),
            (0, 2),
        )
