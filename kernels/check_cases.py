"""How each kernel is checked on small inputs, and timed at the shapes of a model's fullest pack."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch

from uno_ds.kernels.conditioning_attention import conditioning_attention
from uno_ds.kernels.cross_entropy import linear_cross_entropy
from uno_ds.kernels.expert_products import expert_product
from uno_ds.kernels.metaquery_regression.api import metaquery_contrast, metaquery_regression
from uno_ds.kernels.plan import CAUSAL, FULL, NONE, AttentionPlan, build_plan
from uno_ds.kernels.pointwise import rms_norm, swiglu
from uno_ds.kernels.qk_norm_rope import qk_norm_rope
from uno_ds.kernels.self_check import DTYPES, Case, Check, Shapes, Timing

EPS = 1e-6


def case_of(kernel: str, shapes: Shapes, pack: AttentionPlan, device: torch.device) -> Case:
    """`pack`: the live rows of the fullest pack, on the host. Raises KeyError for a kernel without
    a case."""
    return _CASES[kernel](shapes, pack, device)


def small_plan(device: torch.device) -> AttentionPlan:
    """Two samples of prompt, noised image, caption and metaqueries; prompts are constants."""
    lengths = np.array([70, 300, 45, 64, 9, 150, 30, 16])
    relation = np.array(
        [[CAUSAL, NONE, NONE, NONE], [FULL, FULL, NONE, NONE]]
        + [[NONE, FULL, CAUSAL, NONE], [NONE, FULL, NONE, FULL]],
        dtype=np.int8,
    )
    segment = np.repeat(np.arange(8), lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    slab = np.select([segment % 4 == 0, segment % 4 == 1], [0, 2], 1)
    order = np.argsort(slab, kind="stable")
    context = int((slab == 0).sum())
    return build_plan(
        segment[order],
        position[order],
        np.kron(np.eye(2, dtype=np.int8), relation),
        np.repeat([0, 1], 4),
        (context, len(segment)),
        np.arange(len(segment)) >= context,
    ).to(device)


class _Draw:
    """Random values on a device, the same at every call."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=self.generator) * scale
        # Rounded to the run's dtype, so that fp64 and it start from the same numbers.
        return values.to(self.device, self.dtype)


def _gradients(
    leaves: list[torch.Tensor], out: list[torch.Tensor], upstream: list[torch.Tensor]
) -> list[torch.Tensor]:
    total = torch.stack([(x * y.to(x)).sum() for x, y in zip(out, upstream, strict=True)]).sum()
    return [*(x.detach() for x in out), *torch.autograd.grad(total, leaves)]


def _fresh(dtype: torch.dtype, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x in tensors]


def _big(shape: tuple[int, ...], shapes: Shapes, device: torch.device) -> torch.Tensor:
    """Random values drawn on the device, for timing."""
    return torch.randn(shape, device=device, dtype=torch.float32).to(DTYPES[shapes.precision])


def _timing(
    leaves: list[torch.Tensor], call: Callable[[], Any], flops: int | None = None
) -> Timing:
    """Of a call that returns a tensor or several."""
    for leaf in leaves:
        leaf.requires_grad_()
    out = call()
    tensors = list(out) if isinstance(out, tuple) else [out]
    upstream = [torch.randn_like(x) for x in tensors]
    del out, tensors

    def both() -> None:
        result = call()
        torch.autograd.grad(
            list(result) if isinstance(result, tuple) else [result], leaves, upstream
        )

    return Timing(call, both, flops)


def _attention(shapes: Shapes, pack: AttentionPlan, device: torch.device) -> Case:
    plan = small_plan(device)
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    checks = []
    language = shapes.heads, shapes.key_heads, shapes.head_dim
    encoder = shapes.encoder_heads, shapes.encoder_heads, shapes.encoder_head_dim
    for heads, key_heads, dim in (language, encoder):
        draw = _Draw(device, DTYPES[shapes.precision])
        q, k, v = (
            draw(rows, count, dim)
            for rows, count in (
                (plan.queries, heads),
                (plan.keys, key_heads),
                (plan.keys, key_heads),
            )
        )
        upstream = draw(plan.queries, heads, dim)

        def outputs(
            dtype: torch.dtype,
            backend: str,
            given: tuple[torch.Tensor, ...] = (q, k, v),
            upstream: torch.Tensor = upstream,
        ) -> list[torch.Tensor]:
            leaves = _fresh(dtype, *given)
            out = conditioning_attention(leaves[0], leaves[1], leaves[2], plan, backend)
            return _gradients(leaves, [out], [upstream])

        checks.append(Check(names, outputs))

    def timing(backend: str) -> Timing:
        full = pack.to(device)
        q = _big((full.queries, shapes.heads, shapes.head_dim), shapes, device)
        k, v = (
            _big((full.keys, shapes.key_heads, shapes.head_dim), shapes, device) for _ in range(2)
        )
        call = partial(conditioning_attention, q, k, v, full, backend)
        return _timing([q, k, v], call, sum(full.flops(shapes.heads, shapes.head_dim)))

    return Case("attention", tuple(checks), timing)


def _regression(shapes: Shapes, pack: AttentionPlan, device: torch.device) -> Case:
    width = shapes.features or shapes.hidden
    draw = _Draw(device, DTYPES[shapes.precision])
    hidden, target = draw(96, shapes.hidden), draw(96, width)
    head = [draw(width, shapes.hidden, scale=shapes.hidden**-0.5)] if shapes.features else []

    def loss_of(
        hidden: torch.Tensor, weight: torch.Tensor | None, target: torch.Tensor, backend: str
    ) -> torch.Tensor:
        if shapes.temperature is not None:
            return metaquery_contrast(hidden, weight, target, 0, shapes.temperature, backend)
        return metaquery_regression(hidden, weight, target, shapes.distance, backend)

    def outputs(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        leaves = _fresh(dtype, hidden, *head)
        weight = leaves[1] if head else None
        wide = target.double() if dtype == torch.float64 else target
        loss = loss_of(leaves[0], weight, wide, backend)
        return _gradients(leaves, [loss], [torch.ones_like(loss)])

    def timing(backend: str) -> Timing:
        rows = max(1, shapes.metaqueries)
        leaves = [_big((rows, shapes.hidden), shapes, device)]
        leaves += [_big((width, shapes.hidden), shapes, device)] if head else []
        weight = leaves[1] if head else None
        targets = _big((rows, width), shapes, device)
        return _timing(leaves, partial(loss_of, leaves[0], weight, targets, backend))

    names = ("loss", "gradient of hidden", "gradient of the head")
    return Case("regression", (Check(names, outputs),), timing)


def _norm_rope(shapes: Shapes, pack: AttentionPlan, device: torch.device) -> Case:
    counts = shapes.heads, shapes.key_heads, shapes.key_heads
    dim = shapes.head_dim

    def call(
        backend: str,
        rows: tuple[int, int],
        slabs: list[torch.Tensor],
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        q, k, v, q_weight, k_weight = (slabs[number : number + 2] for number in range(0, 10, 2))
        return qk_norm_rope(q, k, v, q_weight, k_weight, cos, sin, EPS, backend=backend)

    def drawn(draw: Callable[..., torch.Tensor], rows: tuple[int, int]) -> list[torch.Tensor]:
        slabs = [draw(length, count, dim) for count, length in product(counts, rows)]
        return slabs + [1 + 0.1 * draw(dim) for _ in range(4)]

    small = (40, 57)
    draw = _Draw(device, DTYPES[shapes.precision])
    given, angle = drawn(draw, small), draw(sum(small), dim // 2)
    upstream = [draw(sum(small), count, dim) for count in counts]

    def outputs(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        leaves = _fresh(dtype, *given)
        cos, sin = (x.to(DTYPES[shapes.precision]).to(dtype) for x in (angle.cos(), angle.sin()))
        return _gradients(leaves, list(call(backend, small, leaves, cos, sin)), upstream)

    def timing(backend: str) -> Timing:
        rows = max(1, shapes.understanding), max(1, shapes.generation)
        leaves = drawn(lambda *shape: _big(shape, shapes, device), rows)
        cos, sin = (_big((sum(rows), dim // 2), shapes, device) for _ in range(2))
        return _timing(leaves, partial(call, backend, rows, leaves, cos, sin))

    names = ("q", "k", "v", *("gradient of a slab",) * 6, *("gradient of a norm weight",) * 4)
    return Case("norm_rope", (Check(names, outputs),), timing)


def _cross_entropy(shapes: Shapes, pack: AttentionPlan, device: torch.device) -> Case:
    draw = _Draw(device, DTYPES[shapes.precision])
    vocabulary = min(shapes.vocabulary, 1000)
    hidden = draw(70, shapes.hidden)
    weight = draw(vocabulary, shapes.hidden, scale=shapes.hidden**-0.5)
    labels = torch.arange(70, device=device) * 13 % vocabulary

    def outputs(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        # The head is frozen, as in UNO.
        leaves = _fresh(dtype, hidden)
        loss = linear_cross_entropy(leaves[0], weight.to(dtype), labels, backend)
        return _gradients(leaves, [loss], [torch.ones_like(loss)])

    def timing(backend: str) -> Timing:
        rows = max(1, shapes.captions)
        x = _big((rows, shapes.hidden), shapes, device)
        head = _big((shapes.vocabulary, shapes.hidden), shapes, device) * shapes.hidden**-0.5
        wanted = torch.randint(shapes.vocabulary, (rows,), device=device)
        return _timing([x], partial(linear_cross_entropy, x, head, wanted, backend))

    return Case("cross_entropy", (Check(("loss", "gradient of hidden"), outputs),), timing)


def _pointwise(shapes: Shapes, pack: AttentionPlan, device: torch.device) -> Case:
    def call(
        backend: str, x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Copies, since a backend may write into both in backward.
        gated = swiglu(gate.clone(), up.clone(), backend)
        return rms_norm(x, weight, EPS, backend), gated

    def drawn(draw: Callable[..., torch.Tensor], rows: int) -> list[torch.Tensor]:
        x, weight = draw(rows, shapes.hidden), 1 + 0.1 * draw(shapes.hidden)
        return [x, weight, draw(rows, shapes.mlp), draw(rows, shapes.mlp)]

    draw = _Draw(device, DTYPES[shapes.precision])
    given = drawn(draw, 33)
    upstream = [draw(33, shapes.hidden), draw(33, shapes.mlp)]

    def outputs(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        leaves = _fresh(dtype, *given)
        return _gradients(leaves, list(call(backend, *leaves)), upstream)

    def timing(backend: str) -> Timing:
        leaves = drawn(lambda *shape: _big(shape, shapes, device), max(1, shapes.generation))
        return _timing(leaves, partial(call, backend, *leaves))

    names = ("norm", "gated product", *(f"gradient of {x}" for x in ("x", "weight", "gate", "up")))
    return Case("pointwise", (Check(names, outputs),), timing)


def _experts(shapes: Shapes, pack: AttentionPlan, device: torch.device) -> Case:
    """The projection to the MLP; both experts train."""

    def call(
        backend: str,
        understanding: int,
        x: torch.Tensor,
        weights: list[torch.Tensor],
        biases: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        first_bias, second_bias = biases or (None, None)
        pair = weights[0], weights[1]
        return expert_product(x, understanding, pair, (first_bias, second_bias), backend)

    draw = _Draw(device, DTYPES[shapes.precision])
    scale = shapes.hidden**-0.5
    out = shapes.heads * shapes.head_dim
    given = [draw(97, shapes.hidden), *(draw(out, shapes.hidden, scale=scale) for _ in range(2))]
    given += [draw(out) for _ in range(2)]
    upstream = draw(97, out)

    def outputs(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        leaves = _fresh(dtype, *given)
        product = call(backend, 40, leaves[0], leaves[1:3], leaves[3:])
        return _gradients(leaves, [product], [upstream])

    def timing(backend: str) -> Timing:
        rows = max(1, shapes.understanding), max(1, shapes.generation)
        x = _big((sum(rows), shapes.hidden), shapes, device)
        weights = [_big((shapes.mlp, shapes.hidden), shapes, device) for _ in range(2)]
        flops = 6 * sum(rows) * shapes.hidden * shapes.mlp
        return _timing([x, *weights], partial(call, backend, rows[0], x, weights), flops)

    both = ("gradient of a weight",) * 2 + ("gradient of a bias",) * 2
    names = ("product", "gradient of x", *both)
    return Case("experts", (Check(names, outputs),), timing)


_CASES: dict[str, Callable[[Shapes, AttentionPlan, torch.device], Case]] = {
    "attention": _attention,
    "regression": _regression,
    "norm_rope": _norm_rope,
    "cross_entropy": _cross_entropy,
    "pointwise": _pointwise,
    "experts": _experts,
}
