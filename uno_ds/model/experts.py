"""One expert's share of a decoder layer, and the embeddings around it.

Shape suffixes: docs/notation.md.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from uno_ds.kernels.backends import KERNELS, backend_of
from uno_ds.kernels.cross_entropy import linear_cross_entropy
from uno_ds.kernels.expert_products import expert_product
from uno_ds.kernels.pointwise import rms_norm, swiglu
from uno_ds.model.architecture import Architecture


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; statistics in fp32 at least."""

    def __init__(self, width: int, eps: float, backend: str = "reference"):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, self.backend)


class HeadNorm(nn.Module):
    """The weight of one expert's QK-norm. The kernel that applies it computes both experts and the
    rotary embedding in one pass, so forward returns a copy: ZeRO-3 releases the weight itself when
    the forward of its module ends."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self) -> torch.Tensor:
        return self.weight.clone()


class LanguageHead(nn.Linear):
    """Logits, or where labels are given the cross entropy of each row, which fused backends compute
    without storing all logits."""

    def __init__(self, hidden: int, vocabulary: int, backend: str):
        super().__init__(hidden, vocabulary, bias=False)
        self.backend = backend

    def forward(
        self, hidden_TH: torch.Tensor, labels_T: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [T, V], or with labels the cross entropy [T] in nats, in fp32 at least."""
        if labels_T is None:
            return super().forward(hidden_TH)
        return linear_cross_entropy(hidden_TH, self.weight, labels_T, self.backend)


class PairedLinear(nn.Linear):
    """A projection of one expert that a backend computes together with the other expert's.

    ZeRO-3 holds a weight inside the forward of its module only, so the first expert's forward calls
    the second's, in which both weights are there, in forward and in backward."""

    def __init__(self, width: int, out: int, bias: bool = True, *, backend: str):
        super().__init__(width, out, bias)
        self.backend = backend

    def forward(
        self,
        x_Ti: torch.Tensor,
        understanding: int | None = None,
        second: "PairedLinear | None" = None,
        first: "PairedLinear | None" = None,
    ) -> torch.Tensor:
        """Rows of this expert; or with `second` those of both, of which the first `understanding`
        are this one's. `first`: given by the other expert's forward."""
        if second is not None:
            out: torch.Tensor = second(x_Ti, understanding, None, self)
            return out
        if first is None:
            return super().forward(x_Ti)
        assert understanding is not None, "the first expert passes it on"
        weights = first.weight, self.weight
        return expert_product(x_Ti, understanding, weights, (first.bias, self.bias), self.backend)


class Expert(nn.Module):
    """Attention projections, QK-norm and gated MLP of one expert in one layer, with its norms.
    `experts`: backend of the projections."""

    def __init__(
        self,
        shape: Architecture,
        pointwise: str = "reference",
        experts: str = KERNELS["experts"].reference,
    ):
        super().__init__()
        linear: Callable[..., nn.Linear] = nn.Linear
        if backend_of("experts", experts).copies_weights:
            linear = partial(PairedLinear, backend=experts)
        hidden = shape.hidden
        self.dim = shape.head_width
        self.pointwise = pointwise
        self.input_norm = RMSNorm(hidden, shape.norm_eps, pointwise)
        self.post_norm = RMSNorm(hidden, shape.norm_eps, pointwise)
        self.q_norm = HeadNorm(self.dim)
        self.k_norm = HeadNorm(self.dim)
        self.q_proj = linear(hidden, shape.query_width)
        self.k_proj = linear(hidden, shape.key_width)
        self.v_proj = linear(hidden, shape.key_width)
        self.o_proj = linear(shape.query_width, hidden, bias=False)
        self.gate_proj = linear(hidden, shape.mlp, bias=False)
        self.up_proj = linear(hidden, shape.mlp, bias=False)
        self.down_proj = linear(shape.mlp, hidden, bias=False)

    def project(self, x_TH: torch.Tensor, queries: bool = True) -> tuple[torch.Tensor, ...]:
        """q [T, N, D] ([T, 0, D] without `queries`), k and v [T, K, D] of the residual stream,
        neither QK-normalised nor rotated, and the QK-norm weights [D] of q and of k."""
        normed_TH = self.input_norm(x_TH)
        k = self.k_proj(normed_TH).unflatten(-1, (-1, self.dim))
        v = self.v_proj(normed_TH).unflatten(-1, (-1, self.dim))
        q = self.q_proj(normed_TH).unflatten(-1, (-1, self.dim)) if queries else k[:, :0]
        return q, k, v, self.q_norm(), self.k_norm()

    def finish(self, x_TH: torch.Tensor, attended_TND: torch.Tensor) -> torch.Tensor:
        """Residual stream after output projection and MLP."""
        x_TH = x_TH + self.o_proj(attended_TND.flatten(1))
        normed_TH = self.post_norm(x_TH)
        gated = swiglu(self.gate_proj(normed_TH), self.up_proj(normed_TH), self.pointwise)
        return x_TH + self.down_proj(gated)


class TimestepEmbedder(nn.Module):
    """Noise level t in [0, 1], 256 sinusoids (periods 2 pi to 2 pi * 10^4) and a two-layer MLP: [T]
    -> [T, H]."""

    SINUSOIDS = 256

    def __init__(self, hidden: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.SINUSOIDS, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
        )

    def forward(self, t_T: torch.Tensor) -> torch.Tensor:
        half = self.SINUSOIDS // 2
        index = torch.arange(half, dtype=torch.float32, device=t_T.device)
        frequency = torch.exp(-math.log(10000) * index / half)
        # fp32, or fp64 under an fp64 batch: t in bf16 would merge neighbouring noise levels.
        angle = t_T.to(torch.promote_types(t_T.dtype, torch.float32))[:, None] * frequency
        sinusoids = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.mlp(sinusoids.to(self.mlp.get_parameter("0.weight").dtype))


def rope_table(
    ids_T: torch.Tensor, dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, D / 2] of rotary embedding, angles in fp32."""
    channels = torch.arange(0, dim, 2, dtype=torch.float32, device=ids_T.device)
    frequency = theta ** -(channels / dim)
    angle = ids_T.float()[:, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def sincos_table(hidden: int, side: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine table [side * side, hidden], rows first: the first half encodes the
    column, the second the row."""
    quarter = hidden // 4
    frequency = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=-1)
    columns = line.repeat(side, 1)
    rows = line.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=-1).float()
