"""The visual encoder: a SigLIP-like transformer over packed images of any size, and its connector
to the language width.

A frozen encoder on a CPU takes its images one by one and on one thread: the last bits of a matrix
product depend on the number of its rows and threads, those of an activation on the place of a value
in the tensor, and an image's features must not depend on what else is in its pack, nor on whether a
preparation or a training run computes them. Modules are still called once, with all images, because
under ZeRO-3 every rank has to make the same calls. A GPU takes the pack as it is.

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
# Patches of each image where images are taken one by one; None: all at once.
Lengths = Sequence[int] | None


class ImageLinear(nn.Linear):
    def forward(self, x_PC: torch.Tensor, lengths: Lengths) -> torch.Tensor:
        return _image_by_image(super().forward, x_PC, lengths)


class VisionLayer(nn.Module):
    def __init__(self, shape: Architecture, backend: str):
        super().__init__()
        width = shape.vit_hidden
        self.heads, self.backend = shape.vit_heads, backend
        self.layer_norm1, self.layer_norm2 = (
            nn.LayerNorm(width, eps=NORM_EPS),
            nn.LayerNorm(width, eps=NORM_EPS),
        )
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            ImageLinear(width, width) for _ in range(4)
        )
        self.fc1, self.fc2 = ImageLinear(width, shape.vit_mlp), ImageLinear(shape.vit_mlp, width)

    def forward(self, x_PW: torch.Tensor, plan: AttentionPlan, lengths: Lengths) -> torch.Tensor:
        normed = self.layer_norm1(x_PW)
        q, k, v = (
            projection(normed, lengths).unflatten(-1, (self.heads, -1))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if lengths:
            attended = torch.cat(
                [
                    _attend(*image)
                    for image in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
                ]
            )
        else:
            attended = conditioning_attention(q, k, v, plan, self.backend)
        x_PW = x_PW + self.out_proj(attended.flatten(1), lengths)
        return x_PW + self.fc2(
            _image_by_image(_gelu, self.fc1(self.layer_norm2(x_PW), lengths), lengths), lengths
        )


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
        """[P, W] features of patches [P, C]; `positions_P` count row * vit_side + column, `lengths`
        are the patches of each image."""
        with _apart(self.patch_embedding, patches_PC, lengths) as apart:
            x_PW = self.patch_embedding(patches_PC, apart) + self.position_embedding(positions_P)
            for layer in self.layers:
                x_PW = layer(x_PW, plan, apart)
            return self.post_layernorm(x_PW)


class Connector(nn.Module):
    """Two-layer MLP from the encoder's width to the language width."""

    def __init__(self, shape: Architecture):
        super().__init__()
        self.fc1, self.fc2 = (
            ImageLinear(shape.vit_hidden, shape.hidden),
            ImageLinear(shape.hidden, shape.hidden),
        )

    def forward(self, x_PW: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """[P, H] tokens of features [P, W] of images of `lengths` patches."""
        with _apart(self.fc1, x_PW, lengths) as apart:
            return self.fc2(_image_by_image(_gelu, self.fc1(x_PW, apart), apart), apart)


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
def _apart(first: nn.Linear, x: torch.Tensor, lengths: Sequence[int]) -> Iterator[Lengths]:
    """The lengths by which a frozen module on a CPU takes its images one by one; None where it
    takes them all at once."""
    if x.device.type == "cpu" and not first.weight.requires_grad:
        with one_thread():
            yield lengths
    else:
        yield None


def _image_by_image(
    function: Callable[[torch.Tensor], torch.Tensor], x_PC: torch.Tensor, lengths: Lengths
) -> torch.Tensor:
    return (
        torch.cat([function(part) for part in x_PC.split(lengths)]) if lengths else function(x_PC)
    )


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _attend(q_PND: torch.Tensor, k_PND: torch.Tensor, v_PND: torch.Tensor) -> torch.Tensor:
    """Attention within one image, where there is nothing to mask."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_PND, k_PND, v_PND))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
