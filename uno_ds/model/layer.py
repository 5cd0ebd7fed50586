"""A decoder layer of the mixture of transformers over three slabs.

Legend of shape suffixes: C context rows, L live rows (understanding, then generation), T = C + L, H hidden.
"""
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from uno_ds.kernels.conditioning_attention import conditioning_attention
from uno_ds.model.architecture import Architecture
from uno_ds.model.experts import Expert
from uno_ds.sequence.packing import PackedBatch


class Layer(nn.Module):
    """Both experts of one layer behind one forward, so that ZeRO-3 gathers the understanding weights once for both uses.

    Context rows run without gradient; live rows attend to them as constants. With `recompute`, backward recomputes
    the live rows only. Every projection is called in every forward, on zero rows if need be, on every rank.
    """

    def __init__(self, shape: Architecture, backend: str, recompute: bool):
        super().__init__()
        self.und, self.gen = Expert(shape), Expert(shape)
        self.backend, self.recompute = backend, recompute
        # Replaced for a step by who wants to see what the live rows attend with.
        self.attend = conditioning_attention

    def forward(self, context_CH: torch.Tensor, live_LH: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], batch: PackedBatch,
                finish_context: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Next residual streams of context and live rows. Without `finish_context` (last layer, context output unread)
        only K and V of the context are computed and its stream is returned as it came."""
        context_rope, live_rope = [tuple(part[rows] for part in rope) for rows in (slice(batch.context), slice(batch.context, None))]
        with torch.no_grad():
            normed_CH = self.und.input_norm(context_CH)
            context_k, context_v = self.und.keys_values(normed_CH, context_rope)
            context_q = self.und.queries(normed_CH, context_rope) if finish_context else None
        arguments = (live_LH, context_k, context_v, live_rope, batch)
        if self.recompute and torch.is_grad_enabled():
            live_LH, live_k, live_v = checkpoint(self._live, *arguments, use_reentrant=False)
        else:
            live_LH, live_k, live_v = self._live(*arguments)
        if finish_context:
            with torch.no_grad():
                k, v = torch.cat([context_k, live_k]), torch.cat([context_v, live_v])
                context_CH = self.und.finish(context_CH, conditioning_attention(context_q, k, v, batch.context_plan, self.backend))
        return context_CH, live_LH

    def _live(self, live_LH: torch.Tensor, context_k: torch.Tensor, context_v: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor],
              batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(next stream of the live rows, their K and V as constants for context rows that see clean latents)."""
        slabs = ((self.und, slice(batch.understanding)), (self.gen, slice(batch.understanding, None)))
        q, k, v = [], [context_k], [context_v]
        for expert, rows in slabs:
            normed, slab_rope = expert.input_norm(live_LH[rows]), tuple(part[rows] for part in rope)
            q.append(expert.queries(normed, slab_rope))
            slab_k, slab_v = expert.keys_values(normed, slab_rope)
            k.append(slab_k)
            v.append(slab_v)
        attended = self.attend(torch.cat(q), torch.cat(k), torch.cat(v), batch.live_plan, self.backend)
        live_LH = torch.cat([expert.finish(live_LH[rows], attended[rows]) for expert, rows in slabs])
        return live_LH, torch.cat(k[1:]).detach(), torch.cat(v[1:]).detach()
