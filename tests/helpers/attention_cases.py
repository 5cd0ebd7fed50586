"""Packed batches for the tests of attention, and the rule by which a kernel's errors are judged.

The rule: against fp64, an implementation may err at most twice as much as the specification
computed in its own dtype, plus one rounding of the largest term that is summed: with a single key,
say, dP - delta is exactly 0 in one order of summation and not in another. Backward knows of
forward's weights only lse, one fp32 number: its rounding moves them by eps |lse|, which gradients
may show too."""

from collections.abc import Callable

import numpy as np
import torch

from uno_ds.kernels.conditioning_attention import reference
from uno_ds.kernels.plan import CAUSAL, FULL, NONE, AttentionPlan, build_plan

NAMES = ("o", "lse", "dq", "dk", "dv")
# Text, noised latents, a caption and metaqueries.
UNO = np.array(
    [
        [CAUSAL, NONE, NONE, NONE],
        [FULL, FULL, NONE, NONE],
        [NONE, FULL, CAUSAL, NONE],
        [NONE, FULL, NONE, FULL],
    ],
    dtype=np.int8,
)


def packed(
    lengths: list[int],
    relation: np.ndarray,
    need: list[bool] | None = None,
    samples: list[int] | None = None,
    query_rows: tuple[int, int] | None = None,
) -> AttentionPlan:
    """A plan of segments of these lengths, in one sample unless `samples` gives others."""
    segment = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.zeros(0, dtype=np.int64), *map(np.arange, lengths)])
    samples = np.zeros(len(lengths), dtype=np.int64) if samples is None else np.array(samples)
    needs = None if need is None else np.array(need)[segment]
    return build_plan(
        segment,
        position,
        np.array(relation, dtype=np.int8),
        samples,
        query_rows or (0, len(segment)),
        needs,
    )


def inputs(
    plan: AttentionPlan,
    dtype: torch.dtype,
    heads: int,
    key_heads: int,
    dim: int,
    seed: int = 0,
    size: float = 1.0,
    device: str = "cpu",
) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, normal with deviation `size`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (plan.queries, heads, dim),
        (plan.keys, key_heads, dim),
        (plan.keys, key_heads, dim),
        (plan.queries, heads, dim),
    )
    return [(torch.randn(shape, generator=generator) * size).to(device, dtype) for shape in shapes]


def everything(function: Callable, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """[o, lse, dq, dk, dv] of function(q, k, v) -> (o, lse)."""
    q, k, v, upstream = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = function(*leaves)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, upstream)]


def with_lse(function: Callable, plan: AttentionPlan) -> Callable:
    """function(q, k, v, plan) of a backend that gives no lse; the specification's takes its
    place."""
    return lambda q, k, v: (function(q, k, v, plan), reference.attention_and_lse(q, k, v, plan)[1])


def assert_as_exact_as_torch(
    function: Callable, plan: AttentionPlan, tensors: list[torch.Tensor]
) -> None:
    """The rule above for o, lse, dq, dk and dv; and what has to be 0 is exactly 0."""
    exact = everything(
        lambda *x: reference.attention_and_lse(*x, plan), [x.double() for x in tensors]
    )
    plain = everything(lambda *x: reference.attention_and_lse(*x, plan), tensors)
    got = everything(function, tensors)
    terms = _largest_terms(*tensors)
    for name, wanted, torch_s, ours in zip(NAMES, exact, plain, got):
        seen = wanted.isfinite()
        assert torch.equal(seen, ours.isfinite()), (
            f"{name} is infinite or NaN elsewhere than the specification"
        )
        wanted, torch_s, ours = (x.double()[seen] for x in (wanted, torch_s, ours))
        if wanted.numel():
            rounding = torch.finfo(torch.float32).eps * terms["lse"]
            if name != "lse":
                rounding = (
                    torch.finfo(tensors[0].dtype).eps + (rounding if name.startswith("d") else 0)
                ) * terms[name]
            allowed = 2 * (torch_s - wanted).abs().max() + rounding
            error = (ours - wanted).abs().max()
            assert error <= allowed, (
                f"{name} errs by {error:.3e}, torch by {(torch_s - wanted).abs().max():.3e}"
            )
    visible = plan.visible().to("cpu")
    need_query, need_key = plan.need_T[slice(*plan.query_rows)], plan.need_T
    out, lse, dq, dk, dv = (x.cpu() for x in got)
    blind = ~visible.any(dim=1)
    assert not out[blind].any() and (lse[:, blind] == -torch.inf).all()
    assert not dq[blind | ~need_query].any()
    unread = ~(visible & need_query[:, None]).any(dim=0)
    assert not dk[unread | ~need_key].any() and not dv[unread | ~need_key].any()


def _largest_terms(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, upstream: torch.Tensor
) -> dict[str, float]:
    """Largest addend of each result."""

    def norm(x: torch.Tensor) -> float:
        return float(x.double().norm(dim=-1).max()) if x.numel() else 0.0

    def largest(x: torch.Tensor) -> float:
        return float(x.abs().max()) if x.numel() else 0.0

    slope = q.shape[-1] ** -0.5 * norm(upstream) * norm(v)
    return {
        "o": largest(v),
        "lse": 1 + q.shape[-1] ** -0.5 * norm(q) * norm(k),
        "dq": slope * largest(k),
        "dk": slope * largest(q),
        "dv": largest(upstream),
    }


def two_samples(query_rows: tuple[int, int] | None = None, scale: float = 1) -> AttentionPlan:
    lengths = (np.array([200, 512, 77, 64, 9, 300, 30, 16]) * scale).astype(int)
    segment = np.repeat(np.arange(8), lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    order = np.argsort(
        np.where(np.isin(segment, (0, 4)), 0, np.where(np.isin(segment, (1, 5)), 2, 1)),
        kind="stable",
    )
    context = int(lengths[[0, 4]].sum())
    return build_plan(
        segment[order],
        position[order],
        np.kron(np.eye(2, dtype=np.int8), UNO),
        np.repeat([0, 1], 4),
        query_rows or (context, len(segment)),
        np.arange(len(segment)) >= context,
    )


def plain_varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, causal):
    """What a flash attention library does: independent sequences, a causal mask aligned to the last
    query and key."""
    assert longest_q == starts_q.diff().max() and longest_k == starts_k.diff().max()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out = []
    for a, b, c, d in zip(
        starts_q[:-1].tolist(), starts_q[1:].tolist(), starts_k[:-1].tolist(), starts_k[1:].tolist()
    ):
        scores = torch.einsum("qnd,knd->nqk", q[a:b], k[c:d]) * q.shape[2] ** -0.5
        if causal:
            hidden = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a)).logical_not()
            scores = scores.masked_fill(hidden, -torch.inf)
        out.append(torch.einsum("nqk,knd->qnd", scores.softmax(dim=-1), v[c:d]))
    return torch.cat(out)
