"""Segment-masked attention in plain torch: the specification. Any dtype up to fp64, differentiable.

Shape suffixes: docs/notation.md.
"""

from typing import Any

import torch

from uno_ds.kernels.plan import AttentionPlan, Columns


def conditioning_attention(
    q_QND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, plan: AttentionPlan
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v over the keys that the plan shows to each query. A row that sees
    nothing gives 0."""
    return attention_and_lse(q_QND, k_TKD, v_TKD, plan)[0]


def attention_and_lse(
    q_QND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, plan: AttentionPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention and [N, Q], the natural logarithm of each row's sum of exponentials: -inf for a
    row that sees nothing."""
    groups = q_QND.shape[1] // k_TKD.shape[1]
    k_TND = constant_keys(k_TKD, plan).repeat_interleave(groups, dim=1)
    v_TND = constant_keys(v_TKD, plan).repeat_interleave(groups, dim=1)
    visible = plan.visible()
    scores = torch.einsum("qnd,tnd->nqt", q_QND, k_TND) * q_QND.shape[-1] ** -0.5
    lse = scores.detach().masked_fill(~visible, -torch.inf).logsumexp(dim=-1)
    # A row that sees nothing is uniform after the softmax; its weights are cleared below.
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(dim=-1)
    out_QND = torch.einsum("nqt,tnd->qnd", weights.masked_fill(~visible, 0.0), v_TND)
    return constant_queries(out_QND, plan), lse


def constant_keys(x_TKD: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """The same values; rows of keys without need get a gradient of exactly 0."""
    return _masked(x_TKD, plan, "key_need", plan.need_T)


def constant_queries(out_QND: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """The same values; rows of queries without need pass no gradient on."""
    return _masked(out_QND, plan, "query_need", _need_of_queries(plan))


def prepare(plan: AttentionPlan, on_gpu: bool = False) -> None:
    """Derives from a plan on the host what forward reads, so that its upload takes it along."""
    plan.derived("columns", lambda: Columns.of(plan))
    prepare_needs(plan)


def prepare_needs(plan: AttentionPlan) -> None:
    """What `constant_keys` and `constant_queries` read."""
    for name, need in (("key_need", plan.need_T), ("query_need", _need_of_queries(plan))):
        _need_mask(plan, name, need)


def _need_of_queries(plan: AttentionPlan) -> torch.Tensor:
    return plan.need_T[slice(*plan.query_rows)]


def _need_mask(plan: AttentionPlan, name: str, need: torch.Tensor) -> torch.Tensor | None:
    """bool [rows, 1, 1] on the plan's device; None where every row needs a gradient."""
    return plan.derived(name, lambda: None if need.numpy().all() else need[:, None, None])


def _masked(x: torch.Tensor, plan: AttentionPlan, name: str, need: torch.Tensor) -> torch.Tensor:
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x
    mask = _need_mask(plan, name, need)
    return x if mask is None else _GradientWhereNeeded.apply(x, mask)


class _GradientWhereNeeded(torch.autograd.Function):
    """Identity whose gradient is 0 where `need` is False, even where it would be NaN or
    infinite."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, need: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(need)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.masked_fill(~ctx.saved_tensors[0], 0.0), None
