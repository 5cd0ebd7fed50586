"""The triton attention: interpreted on a CPU (fp32, fp16), native on a GPU (bf16 as well; long
segments: test_attention_on_a_gpu.py)."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from attention_cases import (
    UNO,
    assert_as_exact_as_torch,
    everything,
    inputs,
    packed,
    with_lse,
)
from hypothesis import Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from random_plans import packed_plans

from uno_ds.kernels.backends import HEAD_DIMS
from uno_ds.kernels.conditioning_attention import conditioning_attention, launch, reference
from uno_ds.kernels.conditioning_attention.triton_operator import attention_and_lse
from uno_ds.kernels.plan import CAUSAL, FULL, NONE, AttentionPlan, build_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())


def run(plan: AttentionPlan, deterministic: bool = False, ahead: bool = False):
    plan = plan.to(DEVICE)
    return lambda q, k, v: attention_and_lse(q, k, v, plan, deterministic, ahead)


ANY_BATCH = {
    "plan": packed_plans(most_rows=110),
    "dtype": st.sampled_from(DTYPES),
    "key_heads": st.sampled_from([1, 2]),
    "group": st.sampled_from([1, 2]),
    "dim": st.sampled_from([16, 32]),
    "deterministic": st.booleans(),
    "size": st.sampled_from([0.3, 1.0, 4.0]),
}
PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)


def assert_a_batch_is_as_exact_as_torch(
    plan, dtype, key_heads, group, dim, deterministic, size
) -> None:
    assert_as_exact_as_torch(
        run(plan, deterministic),
        plan.to(DEVICE),
        inputs(plan, dtype, key_heads * group, key_heads, dim, size=size, device=DEVICE),
    )


# An example takes seconds where kernels are interpreted.
@given(**ANY_BATCH)
@hypothesis_settings(max_examples=6, deadline=None, phases=PHASES)
def test_any_batch_is_as_exact_as_torch_forward_and_backward(**batch):
    assert_a_batch_is_as_exact_as_torch(**batch)


@pytest.mark.slow
@given(**ANY_BATCH)
@hypothesis_settings(max_examples=40, deadline=None, phases=PHASES)
def test_many_batches_are_as_exact_as_torch_forward_and_backward(**batch):
    assert_a_batch_is_as_exact_as_torch(**batch)


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_a_uno_sample_is_as_exact_as_torch_for_every_head_dim(dim):
    plan = packed([13, 129, 31, 16], UNO, [False, True, True, True])
    assert_as_exact_as_torch(
        run(plan), plan.to(DEVICE), inputs(plan, torch.float32, 2, 1, dim, device=DEVICE)
    )


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129])
@pytest.mark.parametrize("relation", [FULL, CAUSAL])
def test_one_segment_around_the_size_of_a_tile_is_as_exact_as_torch(relation, length):
    plan = packed([length], [[relation]])
    assert_as_exact_as_torch(
        run(plan), plan.to(DEVICE), inputs(plan, torch.float32, 1, 1, 16, device=DEVICE)
    )


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_that_see_nothing_of_their_first_block_or_of_any_are_as_exact_as_torch(deterministic):
    """Positions are out of order, so the first range of an early query holds only later keys; the
    second segment's first five queries see nothing at all."""
    segment, position = (
        np.repeat([0, 1], [40, 20]),
        np.concatenate([np.roll(np.arange(40), 20), np.arange(20)]),
    )
    relation = np.array([[CAUSAL, NONE], [NONE, NONE]], dtype=np.int8)
    out_of_order = build_plan(segment, position, relation, np.zeros(2, dtype=np.int64), (0, 60))
    late = build_plan(
        segment,
        np.concatenate([np.arange(40) + 5, np.arange(20)]),
        np.array([[FULL, NONE], [CAUSAL, NONE]], dtype=np.int8),
        np.zeros(2, dtype=np.int64),
        (0, 60),
        segment == 1,
    )
    for plan in (out_of_order, late):
        assert_as_exact_as_torch(
            run(plan, deterministic),
            plan.to(DEVICE),
            inputs(plan, torch.float32, 2, 1, 16, device=DEVICE),
        )


def test_the_padding_of_a_tile_stays_out_however_negative_the_scores_are():
    """With scores of -100 and less, exp(0 - lse) of a padded row overflows."""
    plan = packed([20, 40], [[FULL, NONE], [FULL, FULL]], [False, True])
    q, k, v, upstream = inputs(plan, torch.float32, 2, 1, 16, device=DEVICE)
    tensors = [q.abs() + 5, -k.abs() - 5, v, upstream]
    assert reference.attention_and_lse(*tensors[:3], plan.to(DEVICE))[1].max() < -90
    assert_as_exact_as_torch(run(plan), plan.to(DEVICE), tensors)


def test_tensor_descriptors_compute_what_pointers_do(monkeypatch):
    """By descriptors, blocks at the end of a range bring rows of other samples along."""
    plan = packed([33, 20, 40, 19], UNO, [False, True, True, True])
    tensors = inputs(plan, torch.float32, 2, 1, 16, device=DEVICE)
    wanted = everything(run(plan, True), tensors)
    table = launch.parameters
    monkeypatch.setattr(
        "uno_ds.kernels.conditioning_attention.triton_operator.parameters",
        lambda *arguments: (
            table(*arguments) | {"DESCRIPTORS": not table(*arguments)["DESCRIPTORS"]}
        ),
    )
    for got, reference_value in zip(everything(run(plan, True), tensors), wanted):
        assert torch.equal(got, reference_value)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_tile_by_descriptors_computes_what_one_by_pointers_does(deterministic, monkeypatch):
    """The last rows of a tile are those of the next segment, or behind the last row."""
    plan = packed([33, 20, 40, 19], UNO, [False, True, True, True])
    tensors = inputs(plan, torch.float32, 2, 1, 16, device=DEVICE)
    wanted = everything(run(plan, deterministic), tensors)
    table, tiles = launch.parameters, []

    def with_tile(*arguments):
        chosen = table(*arguments)
        if arguments[3] == "backward_queries":
            tiles.append(chosen["BLOCK_M"])
            return chosen | {"TILE": True}
        return chosen

    monkeypatch.setattr(
        "uno_ds.kernels.conditioning_attention.triton_operator.parameters", with_tile
    )
    for got, reference_value in zip(everything(run(plan, deterministic), tensors), wanted):
        assert torch.equal(got, reference_value)
    assert tiles and all(length % tiles[0] for length in (33, 20, 40, 19))


@pytest.mark.parametrize("descriptors", [False, True])
def test_scores_that_are_issued_ahead_are_the_same_scores(descriptors, monkeypatch):
    """Also where the last range is the plan's last, behind which there is nothing to load."""
    table = launch.parameters
    asked: list[str] = []

    def of_equal_tiles(*arguments):
        *case, kernel = arguments
        asked.append(kernel)
        ahead = kernel == "forward_ahead"
        return table(*case, "forward") | {"AHEAD": ahead, "DESCRIPTORS": descriptors}

    monkeypatch.setattr(
        "uno_ds.kernels.conditioning_attention.triton_operator.parameters", of_equal_tiles
    )
    for lengths, needs in (
        ([33, 20, 40, 19], [False, True, True, True]),
        ([1, 1, 1, 1], [True] * 4),
        ([70, 16, 5, 3], [True, True, True, False]),
    ):
        plan = packed(lengths, UNO, needs)
        tensors = inputs(plan, torch.float32, 2, 1, 16, device=DEVICE)
        with torch.no_grad():
            plain, ahead = (run(plan, ahead=way)(*tensors[:3]) for way in (False, True))
        assert torch.equal(plain[0], ahead[0]) and torch.equal(plain[1], ahead[1])
    assert asked == ["forward", "forward_ahead"] * 3


def test_the_backend_triton_ahead_is_as_exact_as_torch_and_launches_the_second_forward_kernel(
    monkeypatch,
):
    table, asked = launch.parameters, []

    def noted(*arguments):
        asked.append(arguments[3])
        return table(*arguments)

    monkeypatch.setattr("uno_ds.kernels.conditioning_attention.triton_operator.parameters", noted)
    plan = packed([33, 20, 40, 19], UNO, [False, True, True, True]).to(DEVICE)
    # In half precision, in which every architecture of the table has the kernel.
    tensors = inputs(plan, torch.float16, 2, 1, 16, device=DEVICE)
    function = with_lse(lambda *x: conditioning_attention(*x, backend="triton_ahead"), plan)
    assert_as_exact_as_torch(function, plan, tensors)
    assert asked == ["forward_ahead", "backward_queries", "backward_keys"]
    for dim in HEAD_DIMS:
        assert table(torch.device(DEVICE), torch.float16, dim, "forward_ahead")["AHEAD"]


def test_a_gpu_without_the_second_forward_kernel_is_told_so(monkeypatch):
    table = copy.deepcopy(launch.table())
    here = launch.architecture(torch.device(DEVICE))
    for kernels in table[here]["single"].values():
        kernels.pop("forward_ahead", None)
    monkeypatch.setattr(launch, "table", lambda: table)
    with pytest.raises(ValueError, match=f"no forward_ahead for {here}, heads of 16 values in"):
        launch.parameters(torch.device(DEVICE), torch.float32, 16, "forward_ahead")


def test_a_query_without_need_passes_nothing_on_even_if_its_gradient_is_infinite():
    plan = packed([20, 30], [[FULL, FULL], [FULL, FULL]], [False, True])
    q, k, v, upstream = inputs(plan, torch.float32, 2, 1, 16, device=DEVICE)
    upstream[:20] = torch.inf
    for function in (run(plan), lambda *x: reference.attention_and_lse(*x, plan.to(DEVICE))):
        _, _, dq, dk, dv = everything(function, [q, k, v, upstream])
        assert not dq[:20].any() and dq[20:].isfinite().all()
        assert (
            not dk[:20].any() and not dv[:20].any() and dk.isfinite().all() and dv.isfinite().all()
        )


def test_deterministic_gradients_are_bit_identical_and_the_switch_of_torch_asks_for_them():
    plan = packed([13, 60, 31, 16], UNO, [False, True, True, True])
    tensors = inputs(plan, torch.float16, 2, 1, 16, device=DEVICE)
    first, second = (everything(run(plan, True), tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    torch.use_deterministic_algorithms(True)
    try:
        switched = everything(run(plan, None), tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, switched))


def test_heads_of_72_values_are_padded_and_scaled_by_their_own_width():
    plan = packed([5, 30], [[FULL, NONE], [NONE, FULL]], samples=[0, 1])
    assert_as_exact_as_torch(
        run(plan), plan.to(DEVICE), inputs(plan, torch.float32, 2, 2, 72, device=DEVICE)
    )


def test_no_rows_and_no_queries_give_empty_tensors_that_stay_in_the_graph():
    for plan in (packed([], np.zeros((0, 0))), packed([7], [[FULL]], query_rows=(7, 7))):
        q, k, v, _ = inputs(plan, torch.float32, 2, 1, 16, device=DEVICE)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = conditioning_attention(*leaves, plan.to(DEVICE), "triton")
        out.sum().backward()
        assert out.shape == (0, 2, 16) and all(
            x.grad is not None and not x.grad.any() for x in leaves
        )


def operands(plan: AttentionPlan, dtype: torch.dtype = torch.float32) -> tuple:
    q, k, v, _ = inputs(plan, dtype, 2, 1, 16, device=DEVICE)
    plan = plan.to(DEVICE)
    return *(x.requires_grad_() for x in (q, k, v)), plan.tables, plan.places, 0.25, False, False


def test_the_operator_is_what_torch_library_wants_of_one():
    plan = packed([5, 20], [[CAUSAL, NONE], [FULL, FULL]], [False, True])
    torch.library.opcheck(torch.ops.uno_ds.conditioning_attention, operands(plan))
    q, k, v, tables, places, scale, deterministic, _ = operands(plan)
    out, lse = attention_and_lse(q, k, v, plan.to(DEVICE))
    arguments = (torch.ones_like(out), q, k, v, out, lse, tables, places, scale, deterministic)
    torch.library.opcheck(
        torch.ops.uno_ds.conditioning_attention_backward,
        tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments),
    )


def test_the_reference_with_constant_rows_equals_finite_differences():
    """Constants are detached in the function itself: what is checked is the gradient with respect
    to the rest."""
    plan = packed([3, 4], [[CAUSAL, NONE], [FULL, FULL]], [False, True])
    q, k, v, _ = (x.double() for x in inputs(plan, torch.float32, 2, 1, 4))
    live = [x[3:].clone().requires_grad_() for x in (q, k, v)]

    def function(*parts: torch.Tensor) -> torch.Tensor:
        return reference.conditioning_attention(
            *(torch.cat([x[:3], part]) for x, part in zip((q, k, v), parts)), plan
        )[3:]

    torch.autograd.gradcheck(function, live)


def test_the_model_runs_a_compiled_layer_without_a_graph_break():
    from uno_ds.model.architecture import Architecture
    from uno_ds.model.experts import rope_table
    from uno_ds.model.layer import Layer
    from uno_ds.settings import build

    shape = build(
        Architecture,
        dict(
            hidden=32,
            layers=1,
            heads=2,
            kv_heads=1,
            mlp=32,
            vocabulary=8,
            vit_hidden=8,
            vit_layers=1,
            vit_heads=2,
            vit_mlp=8,
            vit_side=2,
            latent_side=2,
        ),
    )
    torch.manual_seed(0)
    layer = Layer(shape, "triton", recompute=False).to(DEVICE)

    @dataclasses.dataclass
    class Batch:
        context: int
        understanding: int
        context_plan: AttentionPlan
        live_plan: AttentionPlan

    relation = [[CAUSAL, NONE], [FULL, FULL]]
    batch = Batch(
        5,
        0,
        packed([5, 20], relation, [False, True], query_rows=(0, 5)).to(DEVICE),
        packed([5, 20], relation, [False, True], query_rows=(5, 25)).to(DEVICE),
    )
    context, live = (
        torch.randn(5, 32, device=DEVICE),
        torch.randn(20, 32, device=DEVICE, requires_grad=True),
    )
    rope = rope_table(torch.arange(25, device=DEVICE), shape.head_dim, 1e4, torch.float32)
    plain = layer(context, live, rope, batch, True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(
        context, live, rope, batch, True
    )
    wanted, got = (torch.autograd.grad(out.square().sum(), live)[0] for _, out in (plain, compiled))
    torch.testing.assert_close(got, wanted)
    for one, other in zip(compiled, plain):
        torch.testing.assert_close(one, other)
