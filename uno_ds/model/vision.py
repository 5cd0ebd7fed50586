"""The visual encoder: a SigLIP-like transformer over packed images of any size, and its connector
to the language width.

A frozen encoder on a CPU computes its images one by one and on one thread: the last bits of a
matrix product depend on the number of its rows and threads, those of an activation on the place of
a value in the tensor. An image's features must not depend on the other images of its pack, nor on
whether a preparation or a training run computes them. Modules are still called once, with all
images, because under ZeRO-3 every rank has to make the same calls. A GPU computes all images of a
pack at once.

Shape suffixes: docs/notation.md."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from uno_ds.kernels.conditioning_attention import conditioning_attention
from uno_ds.kernels.plan import AttentionPlan
from uno_ds.model.architecture import Architecture

NORM_EPS = 1e-6
# Patches of each image where images are computed one by one; None: all at once.
Lengths = Sequence[int] | None


class ImageLinear(nn.Linear):
    def forward(self, x_PC: torch.Tensor, lengths: Lengths = None) -> torch.Tensor:
        return _image_by_image(super().forward, x_PC, lengths)


class VisionLayer(nn.Module):
    def __init__(self, shape: Architecture, backend: str):
        super().__init__()
        width = shape.vit_hidden
        self.heads = shape.vit_heads
        self.backend = backend
        self.layer_norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.layer_norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.q_proj = ImageLinear(width, width)
        self.k_proj = ImageLinear(width, width)
        self.v_proj = ImageLinear(width, width)
        self.out_proj = ImageLinear(width, width)
        self.fc1 = ImageLinear(width, shape.vit_mlp)
        self.fc2 = ImageLinear(shape.vit_mlp, width)

    def forward(self, x_PW: torch.Tensor, plan: AttentionPlan, lengths: Lengths) -> torch.Tensor:
        normed_PW = self.layer_norm1(x_PW)
        q = self.q_proj(normed_PW, lengths).unflatten(-1, (self.heads, -1))
        k = self.k_proj(normed_PW, lengths).unflatten(-1, (self.heads, -1))
        v = self.v_proj(normed_PW, lengths).unflatten(-1, (self.heads, -1))
        if lengths:
            images = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
            attended = torch.cat([_attend(*image) for image in images])
        else:
            attended = conditioning_attention(q, k, v, plan, self.backend)
        x_PW = x_PW + self.out_proj(attended.flatten(1), lengths)
        inner = self.fc1(self.layer_norm2(x_PW), lengths)
        return x_PW + self.fc2(_image_by_image(_gelu, inner, lengths), lengths)


class VisionEncoder(nn.Module):
    """Patches to features: linear patch embedding, learned position table, attention within each
    image, final norm."""

    def __init__(self, shape: Architecture, backend: str = "sdpa"):
        super().__init__()
        self.patch_embedding = ImageLinear(3 * shape.vit_patch**2, shape.vit_hidden)
        self.position_embedding = nn.Embedding(shape.vit_side**2, shape.vit_hidden)
        self.layers = nn.ModuleList(VisionLayer(shape, backend) for _ in range(shape.vit_layers))
        self.post_layernorm = nn.LayerNorm(shape.vit_hidden, eps=NORM_EPS)

    def forward(
        self,
        patches_PC: torch.Tensor,
        positions_P: torch.Tensor,
        plan: AttentionPlan,
        lengths: Sequence[int],
    ) -> torch.Tensor:
        """[P, W] features of patches [P, C]. `positions_P`: row * vit_side + column of each patch.
        `lengths`: patches of each image."""
        with _separate_lengths(self.patch_embedding, patches_PC, lengths) as separate:
            x_PW = self.patch_embedding(patches_PC, separate)
            x_PW = x_PW + self.position_embedding(positions_P)
            for layer in self.layers:
                x_PW = layer(x_PW, plan, separate)
            return self.post_layernorm(x_PW)


class Connector(nn.Module):
    """Two-layer MLP from the encoder's width to the language width."""

    def __init__(self, shape: Architecture):
        super().__init__()
        self.fc1 = ImageLinear(shape.vit_hidden, shape.hidden)
        self.fc2 = ImageLinear(shape.hidden, shape.hidden)

    def forward(self, x_PW: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """[P, H] tokens of features [P, W] of images of `lengths` patches."""
        with _separate_lengths(self.fc1, x_PW, lengths) as separate:
            inner = self.fc1(x_PW, separate)
            return self.fc2(_image_by_image(_gelu, inner, separate), separate)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's operators run on one thread; costs a fraction of a microsecond."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _separate_lengths(
    first: nn.Linear, x: torch.Tensor, lengths: Sequence[int]
) -> Iterator[Lengths]:
    """The lengths by which a frozen module on a CPU computes its images one by one; None where it
    computes them all at once."""
    if x.device.type == "cpu" and not first.get_parameter("bias").requires_grad:
        with one_thread():
            yield lengths
    else:
        yield None


def _image_by_image(
    function: Callable[[torch.Tensor], torch.Tensor], x_PC: torch.Tensor, lengths: Lengths
) -> torch.Tensor:
    if not lengths:
        return function(x_PC)
    return torch.cat([function(image) for image in x_PC.split(lengths)])


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _attend(q_PND: torch.Tensor, k_PND: torch.Tensor, v_PND: torch.Tensor) -> torch.Tensor:
    """Attention within one image, which needs no mask."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_PND, k_PND, v_PND))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
