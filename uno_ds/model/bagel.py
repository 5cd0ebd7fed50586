"""The unified model: a mixture of two transformer experts over one packed sequence, with encoders
on both sides.

Shape suffixes: docs/notation.md."""

from dataclasses import dataclass

import torch
from torch import nn

from uno_ds.model.architecture import Architecture
from uno_ds.model.experts import LanguageHead, RMSNorm, TimestepEmbedder, rope_table, sincos_table
from uno_ds.model.layer import Layer
from uno_ds.model.vision import Connector, VisionEncoder
from uno_ds.sequence.batch import PackedBatch
from uno_ds.settings import SettingsError, setting

# K and V of rows computed earlier, a pair [rows, K, D] for every layer.
KeysValues = list[tuple[torch.Tensor, torch.Tensor]]
GENERATION_PARTS = ("vae2llm", "llm2vae", "time_embedder", "norm_gen", "gen")


@dataclass(frozen=True)
class ModelSettings:
    base: str | None = setting(
        None,
        doc="Folder of the pretrained model (BAGEL's layout), or the name of one that ships with uno_ds; "
        "null: random weights, and `architecture` says of what shape.",
    )
    published_shape: str | None = setting(
        None,
        doc="Folder of configuration files, or the name of one that ships with uno_ds, that --dry-run takes "
        "where model.base is absent and hardware.gpu is named.",
    )
    tokenizer: str | None = setting(None, doc="Folder of the tokenizer; null: the base folder.")
    architecture: Architecture | None = setting(
        None, doc="Shape of a model that is trained from scratch."
    )
    train: str = setting(
        "generation",
        choices=("generation", "all"),
        doc="generation: the generation expert and its interfaces train, understanding is frozen (UNO); all: joint "
        "pre-training, only the codec is frozen.",
    )
    codec_precision: str = setting(
        "fp32", choices=("fp32", "bf16"), doc="Weights and activations of the FLUX autoencoder."
    )
    recompute: bool = setting(
        False, doc="Activation checkpointing: backward recomputes the live rows of each layer."
    )

    def __post_init__(self) -> None:
        if (self.base is None) == (self.architecture is None):
            raise SettingsError(
                "base",
                "give either model.base (a pretrained folder) or model.architecture (to train from "
                "scratch), not both or none.",
            )
        if self.base is None and self.tokenizer is None:
            raise SettingsError(
                "tokenizer", "is required when there is no model.base to take it from."
            )


class Bagel(nn.Module):
    """BAGEL's architecture. `read_context`: outputs of constant understanding rows are wanted too,
    which costs the last layer's attention and MLP on them. The others are names of backends."""

    def __init__(
        self,
        shape: Architecture,
        attention: str = "sdpa",
        recompute: bool = False,
        read_context: bool = False,
        norm_rope: str = "reference",
        pointwise: str = "reference",
        cross_entropy: str = "chunked",
    ):
        super().__init__()
        self.shape, self.read_context = shape, read_context
        self.token_embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.vit, self.connector = VisionEncoder(shape, attention), Connector(shape)
        self.vae2llm, self.llm2vae = (
            nn.Linear(shape.latent_values, shape.hidden),
            nn.Linear(shape.hidden, shape.latent_values),
        )
        self.time_embedder = TimestepEmbedder(shape.hidden)
        self.layers = nn.ModuleList(
            Layer(shape, attention, recompute, norm_rope, pointwise) for _ in range(shape.layers)
        )
        self.norm, self.norm_gen = (
            RMSNorm(shape.hidden, shape.norm_eps, pointwise) for _ in range(2)
        )
        self.lm_head = LanguageHead(shape.hidden, shape.vocabulary, cross_entropy)
        self.register_buffer("latent_positions", torch.empty(shape.latent_side**2, shape.hidden))
        self.register_buffer("vit_positions", torch.empty(shape.vit_side**2, shape.hidden))
        if not self.latent_positions.is_meta:
            self.reset_tables()

    def reset_tables(self, device: torch.device | str = "cpu") -> None:
        """Computes the fixed position tables, in fp32. To be called again after construction under
        deepspeed.zero.Init, which makes every new tensor bf16, these too."""
        self.latent_positions = sincos_table(self.shape.hidden, self.shape.latent_side).to(device)
        self.vit_positions = sincos_table(self.shape.hidden, self.shape.vit_side).to(device)

    def forward(
        self, batch: PackedBatch, latents_GC: torch.Tensor, metaqueries_MH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(understanding_UH, generation_GH, vit_PW): outputs after the final norms, and the visual
        encoder's features.

        `latents_GC`: the latent rows as the model sees them, noised where they are noised. Without
        `read_context` the first output holds the live understanding rows only."""
        understanding_UH, generation_GH, vit_PW = self._embed(batch, latents_GC, metaqueries_MH)
        context_AH = understanding_UH[: batch.context].detach()
        live_LH = torch.cat([understanding_UH[batch.context :], generation_GH])
        rope = self._rope(batch)
        for number, layer in enumerate(self.layers, start=1):
            context_AH, live_LH = layer(
                context_AH,
                live_LH,
                rope,
                batch,
                finish_context=self.read_context or number < len(self.layers),
            )
        understanding_UH = live_LH[: batch.understanding]
        if self.read_context:
            understanding_UH = torch.cat([context_AH, understanding_UH])
        return self.norm(understanding_UH), self.norm_gen(live_LH[batch.understanding :]), vit_PW

    def extend(
        self, batch: PackedBatch, latents_GC: torch.Tensor, cache: KeysValues
    ) -> tuple[torch.Tensor, torch.Tensor, KeysValues]:
        """(understanding_UH, generation_GH, K and V of these rows) of a batch without context slab
        whose rows also read the rows computed earlier: `cache` holds their K and V, layer by layer,
        and `batch.live_plan` is over [cached; these]."""
        assert not batch.context, (
            "the rows of an extension are live; what they read is in the cache"
        )
        understanding_UH, generation_GH, _ = self._embed(
            batch, latents_GC, self.lm_head.weight.new_zeros(0, self.shape.hidden)
        )
        live_LH, rope, added = torch.cat([understanding_UH, generation_GH]), self._rope(batch), []
        for layer, (cached_k, cached_v) in zip(self.layers, cache, strict=True):
            live_LH, k, v = layer.live(live_LH, cached_k, cached_v, rope, batch)
            added.append((k, v))
        return (
            self.norm(live_LH[: batch.understanding]),
            self.norm_gen(live_LH[batch.understanding :]),
            added,
        )

    def _embed(
        self, batch: PackedBatch, latents_GC: torch.Tensor, metaqueries_MH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(understanding_UH, generation_GH, vit_PW): what the first layer reads, and the visual
        encoder's features."""
        dtype = self.lm_head.weight.dtype
        vit_PW = self.vit(
            batch.vision.patches_PC.to(dtype),
            batch.vision.positions_P,
            batch.vision.plan,
            batch.vision.lengths,
        )
        tokens_PH = self.connector(
            vit_PW[: batch.vision.context_rows], batch.vision.lengths[: batch.vision.context_images]
        )
        tokens_PH = tokens_PH + self.vit_positions[
            batch.vision.positions_P[: batch.vision.context_rows]
        ].to(dtype)
        metaqueries_MH = metaqueries_MH + self.vit_positions[batch.metaqueries.positions_M].to(
            dtype
        )
        sources = torch.cat([self.token_embedding(batch.text_ids), tokens_PH, metaqueries_MH])
        generation_GH = (
            self.vae2llm(latents_GC.to(dtype))
            + self.time_embedder(batch.latents.timestep_G)
            + self.latent_positions[batch.latents.positions_G].to(dtype)
        )
        return sources[batch.understanding_source_U], generation_GH, vit_PW

    def _rope(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return rope_table(
            batch.rope_T, self.shape.head_dim, self.shape.rope_theta, self.lm_head.weight.dtype
        )


def is_generation(name: str) -> bool:
    """Whether the parameter of this name belongs to the generation expert or to its interface to
    latents."""
    return any(part in GENERATION_PARTS for part in name.split("."))
