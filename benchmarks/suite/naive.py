"""The baseline: the decoder as code without slabs computes it, with the weights and the losses of
the given model.

The whole packed sequence is one tensor in sequence order and all of it is in the graph, frozen
experts and conditions too. Every projection, norm and MLP gathers each expert's rows by index and
scatters them back, layer by layer. Attention is one call over the pack: FlexAttention with a block
mask on a GPU, torch's scaled_dot_product_attention with a dense mask on a CPU, where FlexAttention
has no backward. It needs whole weights and does not run under ZeRO-3.

Shape suffixes: docs/notation.md.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from uno_ds.kernels.plan import CAUSAL, FULL
from uno_ds.model.bagel import Bagel
from uno_ds.model.experts import Expert, RMSNorm
from uno_ds.model.layer import Layer
from uno_ds.sequence.batch import PackedBatch

BLOCK = 128


@dataclass(frozen=True, eq=False)
class Sequence:
    """Where each row of a batch lies in the sequence: indices of the rows of each expert, rotary
    angles, and the mask."""

    rows_of_expert: tuple[torch.Tensor, torch.Tensor]
    cos_T1D: torch.Tensor
    sin_T1D: torch.Tensor
    mask: object
    length: int

    @classmethod
    def of(cls, batch: PackedBatch, model: Bagel, dtype: torch.dtype) -> "Sequence":
        order = batch.order_T
        device = order.device
        shape = model.shape
        understanding = batch.context + batch.understanding
        ids = torch.empty_like(batch.rope_T).index_copy(0, order, batch.rope_T)
        width = shape.head_width
        channels = torch.arange(0, width, 2, dtype=torch.float32, device=device)
        frequency = shape.rope_theta ** -(channels / width)
        angle = (ids.float()[:, None] * frequency).repeat(1, 2)[:, None]
        return cls(
            (order[:understanding], order[understanding:]),
            angle.cos().to(dtype),
            angle.sin().to(dtype),
            _mask(batch),
            len(order),
        )


@contextmanager
def naive_decoder(model: Bagel) -> Iterator[None]:
    """Within it, calling `model` runs the naive decoder."""
    # An attribute of the instance hides the method of its class.
    object.__setattr__(model, "forward", partial(forward, model))
    try:
        yield
    finally:
        object.__delattr__(model, "forward")


def forward(
    model: Bagel, batch: PackedBatch, latents_GC: torch.Tensor, metaqueries_MH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What Bagel.forward returns."""
    understanding_UH, generation_GH, vit_PW = model._embed(batch, latents_GC, metaqueries_MH)
    sequence = Sequence.of(batch, model, generation_GH.dtype)
    both = torch.cat([understanding_UH, generation_GH])
    x_TH = torch.zeros_like(both).index_copy(0, batch.order_T, both)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        if layer.recompute and torch.is_grad_enabled():
            x_TH = checkpoint(_layer, layer, x_TH, sequence, use_reentrant=False)
        else:
            x_TH = _layer(layer, x_TH, sequence)
    first = 0 if model.read_context else batch.context
    understanding_rows, generation_rows = sequence.rows_of_expert
    return (
        model.norm(x_TH[understanding_rows[first:]]),
        model.norm_gen(x_TH[generation_rows]),
        vit_PW,
    )


def _layer(layer: Layer, x_TH: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    experts = (layer.und, layer.gen)
    normed = _each(sequence, x_TH, [expert.input_norm for expert in experts])
    heads = (-1, layer.und.dim)
    q = _each(sequence, normed, [expert.q_proj for expert in experts]).unflatten(-1, heads)
    k = _each(sequence, normed, [expert.k_proj for expert in experts]).unflatten(-1, heads)
    v = _each(sequence, normed, [expert.v_proj for expert in experts]).unflatten(-1, heads)
    q_norms = [partial(_head_norm, expert, "q_norm") for expert in experts]
    k_norms = [partial(_head_norm, expert, "k_norm") for expert in experts]
    q = _rotate(_each(sequence, q, q_norms), sequence)
    k = _rotate(_each(sequence, k, k_norms), sequence)
    attended = attend(q, k, v, sequence).flatten(1)
    x_TH = x_TH + _each(sequence, attended, [expert.o_proj for expert in experts])
    normed = _each(sequence, x_TH, [expert.post_norm for expert in experts])
    return x_TH + _each(sequence, normed, [partial(_mlp, expert) for expert in experts])


def _each(
    sequence: Sequence,
    x_T: torch.Tensor,
    functions: Iterable[Callable[[torch.Tensor], torch.Tensor]],
) -> torch.Tensor:
    """Every row through the function of its expert: gathered, computed, scattered."""
    parts = [
        function(x_T[rows])
        for function, rows in zip(functions, sequence.rows_of_expert, strict=True)
    ]
    out = x_T.new_zeros(sequence.length, *parts[0].shape[1:])
    for rows, part in zip(sequence.rows_of_expert, parts, strict=True):
        out = out.index_put((rows,), part)
    return out


def _mlp(expert: Expert, x: torch.Tensor) -> torch.Tensor:
    return expert.down_proj(F.silu(expert.gate_proj(x)) * expert.up_proj(x))


def _head_norm(expert: Expert, name: str, x: torch.Tensor) -> torch.Tensor:
    norm = getattr(expert, name)
    if isinstance(norm, RMSNorm):
        return norm(x)
    # A module that returns its weight, for kernels that fuse the norm and the rotation.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    normed = wide * torch.rsqrt(mean_square + expert.input_norm.eps)
    return norm() * normed.to(x.dtype)


def _rotate(x_TND: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    first, second = x_TND.chunk(2, dim=-1)
    return x_TND * sequence.cos_T1D + torch.cat([-second, first], dim=-1) * sequence.sin_T1D


def attend(
    q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, sequence: Sequence
) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_TND, k_TKD, v_TKD))
    if isinstance(sequence.mask, torch.Tensor):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=sequence.mask, enable_gqa=True)
        return out[0].transpose(0, 1)
    # One compiled kernel for packs of all lengths: they are padded to whole blocks.
    padding = (0, 0, 0, -sequence.length % BLOCK)
    out = _flex()(
        *(F.pad(x, padding) for x in (q, k, v)), block_mask=sequence.mask, enable_gqa=True
    )
    return out[0, :, : sequence.length].transpose(0, 1)


def _mask(batch: PackedBatch) -> object:
    """The visibility in sequence order: a dense mask on a CPU; on a GPU a BlockMask, built for
    every batch."""
    plan, device, order = batch.live_plan, batch.order_T.device, batch.order_T
    relation_SS = plan.relation_SS.to(device)
    segment_T, position_T = (
        torch.empty_like(order).index_copy(0, order, x.to(device).long())
        for x in (plan.segment_T, plan.position_T)
    )
    if device.type != "cuda":
        relation_TT = relation_SS[segment_T][:, segment_T]
        return (relation_TT == FULL) | (
            (relation_TT == CAUSAL) & (position_T[:, None] >= position_T)
        )
    return block_mask(relation_SS, segment_T, position_T, compiled=True)


def block_mask(
    relation_SS: torch.Tensor, segment_T: torch.Tensor, position_T: torch.Tensor, compiled: bool
) -> object:
    """A BlockMask of FlexAttention over the sequence, padded to whole blocks. Rows of the padding
    attend to themselves, so that no row of the softmax is empty."""
    from torch.nn.attention.flex_attention import create_block_mask

    length = len(segment_T)
    padded = length + -length % BLOCK
    segment_T = F.pad(segment_T, (0, padded - length))
    position_T = F.pad(position_T, (0, padded - length))

    def visible(
        _batch: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        relation = relation_SS[segment_T[query], segment_T[key]]
        inside = (query < length) & (key < length)
        shown = (relation == FULL) | ((relation == CAUSAL) & (position_T[query] >= position_T[key]))
        return (inside & shown) | (query == key)

    return create_block_mask(
        visible,
        None,
        None,
        padded,
        padded,
        device=segment_T.device,
        BLOCK_SIZE=BLOCK,
        _compile=compiled,
    )


@lru_cache
def _flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
