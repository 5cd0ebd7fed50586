"""One expert's share of a decoder layer, and the embeddings around it.

Legend of shape suffixes: T tokens, H hidden, N query heads, K key heads, D head dim.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from uno_ds.model.architecture import Architecture


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; statistics in fp32 at least."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Expert(nn.Module):
    """Attention projections, QK-norm and gated MLP of one expert in one layer, with its norms."""

    def __init__(self, shape: Architecture):
        super().__init__()
        hidden, dim = shape.hidden, shape.head_dim
        self.dim = dim
        self.input_norm, self.post_norm = RMSNorm(hidden, shape.norm_eps), RMSNorm(hidden, shape.norm_eps)
        self.q_norm, self.k_norm = RMSNorm(dim, shape.norm_eps), RMSNorm(dim, shape.norm_eps)
        self.q_proj = nn.Linear(hidden, shape.heads * dim)
        self.k_proj = nn.Linear(hidden, shape.kv_heads * dim)
        self.v_proj = nn.Linear(hidden, shape.kv_heads * dim)
        self.o_proj = nn.Linear(shape.heads * dim, hidden, bias=False)
        self.gate_proj = nn.Linear(hidden, shape.mlp, bias=False)
        self.up_proj = nn.Linear(hidden, shape.mlp, bias=False)
        self.down_proj = nn.Linear(shape.mlp, hidden, bias=False)

    def queries(self, normed_TH: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[T, N, D] of the normalised input, QK-normalised and rotated."""
        return rotate(self.q_norm(self.q_proj(normed_TH).unflatten(-1, (-1, self.dim))), rope)

    def keys_values(self, normed_TH: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """([T, K, D], [T, K, D]) of the normalised input."""
        k_TKD = rotate(self.k_norm(self.k_proj(normed_TH).unflatten(-1, (-1, self.dim))), rope)
        return k_TKD, self.v_proj(normed_TH).unflatten(-1, (-1, self.dim))

    def finish(self, x_TH: torch.Tensor, attended_TND: torch.Tensor) -> torch.Tensor:
        """Residual stream after output projection and MLP."""
        x_TH = x_TH + self.o_proj(attended_TND.flatten(1))
        normed = self.post_norm(x_TH)
        return x_TH + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))


class TimestepEmbedder(nn.Module):
    """Noise level t in [0, 1], 256 sinusoids (periods 2 pi to 2 pi * 10^4) and a two-layer MLP: [T] -> [T, H]."""

    SINUSOIDS = 256

    def __init__(self, hidden: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.SINUSOIDS, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t_T: torch.Tensor) -> torch.Tensor:
        half = self.SINUSOIDS // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t_T.device) / half)
        # fp32, or fp64 under an fp64 batch: t in bf16 would merge neighbouring noise levels.
        angle = t_T.to(torch.promote_types(t_T.dtype, torch.float32))[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.mlp[0].weight.dtype))


def rope_table(ids_T: torch.Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, 1, D] of rotary embedding, angles in fp32."""
    frequency = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32, device=ids_T.device) / dim)
    angle = ids_T.float()[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_TND: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding in the half-split convention: channel i is paired with channel i + D/2."""
    cos, sin = rope
    first, second = x_TND.chunk(2, dim=-1)
    return x_TND * cos + torch.cat([-second, first], dim=-1) * sin


def sincos_table(hidden: int, side: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine table [side * side, hidden], rows first: the first half encodes the column, the second the row."""
    frequency = 10000.0 ** -(torch.arange(hidden // 4, dtype=torch.float64) / (hidden // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=-1)
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, dim=0)], dim=-1).float()
