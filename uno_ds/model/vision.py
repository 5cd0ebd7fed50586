"""The visual encoder: a SigLIP-like transformer over packed images of any size, and its connector to the language width.

Legend of shape suffixes: P patches of all images, C values of a patch, W width, N heads, D head dim.
"""
import torch
import torch.nn.functional as F
from torch import nn

from uno_ds.kernels.conditioning_attention import conditioning_attention
from uno_ds.kernels.plan import AttentionPlan
from uno_ds.model.architecture import Architecture

NORM_EPS = 1e-6


class VisionLayer(nn.Module):
    def __init__(self, shape: Architecture, backend: str):
        super().__init__()
        width = shape.vit_hidden
        self.heads, self.backend = shape.vit_heads, backend
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps=NORM_EPS), nn.LayerNorm(width, eps=NORM_EPS)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, shape.vit_mlp), nn.Linear(shape.vit_mlp, width)

    def forward(self, x_PW: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        normed = self.layer_norm1(x_PW)
        q, k, v = (projection(normed).unflatten(-1, (self.heads, -1)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        x_PW = x_PW + self.out_proj(conditioning_attention(q, k, v, plan, self.backend).flatten(1))
        return x_PW + self.fc2(F.gelu(self.fc1(self.layer_norm2(x_PW)), approximate="tanh"))


class VisionEncoder(nn.Module):
    """Patches to features: linear patch embedding, learned position table, attention within each image, final norm."""

    def __init__(self, shape: Architecture, backend: str = "sdpa"):
        super().__init__()
        self.patch_embedding = nn.Linear(3 * shape.vit_patch**2, shape.vit_hidden)
        self.position_embedding = nn.Embedding(shape.vit_side**2, shape.vit_hidden)
        self.layers = nn.ModuleList(VisionLayer(shape, backend) for _ in range(shape.vit_layers))
        self.post_layernorm = nn.LayerNorm(shape.vit_hidden, eps=NORM_EPS)

    def forward(self, patches_PC: torch.Tensor, positions_P: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """[P, W] features of patches [P, C]; `positions_P` count row * vit_side + column."""
        x_PW = self.patch_embedding(patches_PC) + self.position_embedding(positions_P)
        for layer in self.layers:
            x_PW = layer(x_PW, plan)
        return self.post_layernorm(x_PW)


class Connector(nn.Module):
    """Two-layer MLP from the encoder's width to the language width."""

    def __init__(self, shape: Architecture):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(shape.vit_hidden, shape.hidden), nn.Linear(shape.hidden, shape.hidden)

    def forward(self, x_PW: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x_PW), approximate="tanh"))
