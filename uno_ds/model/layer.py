"""A decoder layer of the mixture of transformers over three slabs.

Shape suffixes: docs/notation.md."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from uno_ds.kernels.backends import KERNELS, backend_of
from uno_ds.kernels.conditioning_attention import conditioning_attention
from uno_ds.kernels.plan import AttentionPlan
from uno_ds.kernels.qk_norm_rope import qk_norm_rope
from uno_ds.model.architecture import Architecture
from uno_ds.model.expert_pair import finish_both, project_both
from uno_ds.model.experts import Expert
from uno_ds.sequence.batch import PackedBatch


class Layer(nn.Module):
    """Both experts of one layer behind one forward, so that ZeRO-3 gathers the understanding
    weights once for both uses.

    Context rows run without gradient; live rows attend to them as constants. With `recompute`,
    backward recomputes the live rows only. Every projection is called in every forward, on zero
    rows if need be, on every rank."""

    def __init__(
        self,
        shape: Architecture,
        backend: str,
        recompute: bool,
        norm_rope: str = "reference",
        pointwise: str = "reference",
        experts: str = KERNELS["experts"].reference,
    ):
        super().__init__()
        self.und = Expert(shape, pointwise, experts)
        self.gen = Expert(shape, pointwise, experts)
        self.projects_jointly = backend_of("experts", experts).copies_weights
        self.backend = backend
        self.recompute = recompute
        self.norm_rope = norm_rope
        self.eps = shape.norm_eps

    def forward(
        self,
        context_AH: torch.Tensor,
        live_LH: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        batch: PackedBatch,
        finish_context: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Next residual streams of context and live rows. Without `finish_context` (last layer,
        context output unread) only K and V of the context are computed and its stream is returned
        unchanged."""
        cos, sin = rope
        context_rope = cos[: batch.context], sin[: batch.context]
        live_rope = cos[batch.context :], sin[batch.context :]
        with torch.no_grad():
            context_q, context_k, context_v = self._attention_inputs(
                [self.und.project(context_AH, queries=finish_context)], context_rope
            )
        arguments = (live_LH, context_k, context_v, live_rope, batch)
        if self.recompute and torch.is_grad_enabled():
            live_LH, live_k, live_v = checkpoint(self.live, *arguments, use_reentrant=False)
        else:
            live_LH, live_k, live_v = self.live(*arguments)
        if finish_context:
            with torch.no_grad():
                k = torch.cat([context_k, live_k])
                v = torch.cat([context_v, live_v])
                attended = conditioning_attention(context_q, k, v, batch.context_plan, self.backend)
                context_AH = self.und.finish(context_AH, attended)
        return context_AH, live_LH

    def live(
        self,
        live_LH: torch.Tensor,
        context_k: torch.Tensor,
        context_v: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        batch: PackedBatch,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(next stream of the live rows, their K and V as constants for context rows that see clean
        latents). `context_k`, `context_v`: of the context slab, or of rows in a sampling cache."""
        q, k, v = self._attention_inputs(self._project(live_LH, batch.understanding), rope)
        all_k = torch.cat([context_k, k])
        all_v = torch.cat([context_v, v])
        attended = self.attend(q, all_k, all_v, batch.live_plan, self.backend)
        next_LH = self._finish(live_LH, attended, batch.understanding)
        return next_LH, k.detach(), v.detach()

    def _project(self, live_LH: torch.Tensor, understanding: int) -> list[tuple[torch.Tensor, ...]]:
        """Each expert's projections of its live rows."""
        if self.projects_jointly:
            return project_both(self.und, self.gen, live_LH, understanding)
        und_projected = self.und.project(live_LH[:understanding])
        gen_projected = self.gen.project(live_LH[understanding:])
        return [und_projected, gen_projected]

    def _finish(
        self, live_LH: torch.Tensor, attended_LND: torch.Tensor, understanding: int
    ) -> torch.Tensor:
        if self.projects_jointly:
            return finish_both(self.und, self.gen, live_LH, attended_LND, understanding)
        und_LH = self.und.finish(live_LH[:understanding], attended_LND[:understanding])
        gen_LH = self.gen.finish(live_LH[understanding:], attended_LND[understanding:])
        return torch.cat([und_LH, gen_LH])

    @staticmethod
    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, backend: str
    ) -> torch.Tensor:
        """Attention of the live rows. The kernel check replaces it on a layer to record its
        inputs."""
        return conditioning_attention(q, k, v, plan, backend)

    def _attention_inputs(
        self, slabs: list[tuple[torch.Tensor, ...]], rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v of all slabs, in slab order, as the attention plans number the rows."""
        q, k, v, q_weight, k_weight = (list(tensors) for tensors in zip(*slabs, strict=True))
        return qk_norm_rope(q, k, v, q_weight, k_weight, *rope, self.eps, backend=self.norm_rope)
