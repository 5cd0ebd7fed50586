"""The unified model: a mixture of two transformer experts over one packed sequence, with encoders
on both sides.

Shape suffixes: docs/notation.md."""

from dataclasses import dataclass

import torch
from torch import nn

from uno_ds.kernels.backends import KERNELS
from uno_ds.model.architecture import Architecture
from uno_ds.model.experts import LanguageHead, RMSNorm, TimestepEmbedder, rope_table, sincos_table
from uno_ds.model.layer import Layer
from uno_ds.model.precision import DTYPES
from uno_ds.model.quantisation import KEPT, KINDS
from uno_ds.model.vision import Connector, VisionEncoder
from uno_ds.ranges import Range, named_range
from uno_ds.sequence.batch import PackedBatch
from uno_ds.settings import SettingsError, setting

# K and V of rows computed earlier, a pair [rows, K, D] for every layer.
KeysValues = list[tuple[torch.Tensor, torch.Tensor]]
GENERATION_PARTS = ("vae2llm", "llm2vae", "time_embedder", "norm_gen", "gen")


@dataclass(frozen=True)
class ModelSettings:
    base: str | None = setting(
        None,
        doc="Folder of the pretrained model (BAGEL's files), or the name of one that ships with "
        "uno_ds; null: random weights of the shape `architecture`.",
    )
    published_shape: str | None = setting(
        None,
        doc="Folder of configuration files, or the name of one that ships with uno_ds, that "
        "--dry-run uses where model.base is absent and hardware.gpu is given.",
    )
    tokenizer: str | None = setting(None, doc="Folder of the tokenizer; null: the base folder.")
    architecture: Architecture | None = setting(
        None, doc="Shape of a model that is trained from scratch."
    )
    train: str = setting(
        "generation",
        choices=("generation", "lora", "all"),
        doc="generation: the generation expert and its interfaces train, understanding is frozen "
        "(UNO); lora: adapters on the generation expert train, see `lora`; all: joint "
        "pre-training, "
        "only the codec is frozen.",
    )
    adapter: str | None = setting(
        None,
        doc="Folder of an adapter (`weights.py export --adapter`) that training starts from; with "
        "train: lora.",
    )
    frozen_precision: str = setting(
        "bf16",
        choices=("bf16", *KINDS),
        doc="How frozen projections, token embedding, visual encoder and connector are stored. "
        "bf16: as engine.precision; int8, nf4: quantised, whole on each rank, so not under ZeRO-3. "
        "Norms, biases, position tables and the language head stay as they are.",
    )
    keep_bf16: list[str] = setting(
        factory=list,
        choices=tuple(KEPT),
        doc="What frozen_precision leaves as it is: embedding, vision (visual encoder and "
        "connector, which compute the targets of the regression).",
    )
    codec_precision: str = setting(
        "fp32", choices=tuple(DTYPES), doc="Weights and activations of the FLUX autoencoder."
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

    @property
    def trains_everything(self) -> bool:
        return {"generation": False, "lora": False, "all": True}[self.train]

    @property
    def codec_dtype(self) -> torch.dtype:
        return DTYPES[self.codec_precision]


class Bagel(nn.Module):
    """BAGEL's architecture. `recompute`: activation checkpointing. `read_context`: also compute the
    outputs of constant understanding rows, which costs the last layer's attention and MLP on them.
    The others are names of kernel backends."""

    def __init__(
        self,
        shape: Architecture,
        attention: str = "sdpa",
        recompute: bool = False,
        read_context: bool = False,
        norm_rope: str = "reference",
        pointwise: str = "reference",
        cross_entropy: str = "chunked",
        experts: str = KERNELS["experts"].reference,
    ):
        super().__init__()
        self.shape = shape
        self.read_context = read_context
        self.token_embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.vit = VisionEncoder(shape, attention)
        self.connector = Connector(shape)
        self.vae2llm = nn.Linear(shape.latent_values, shape.hidden)
        self.llm2vae = nn.Linear(shape.hidden, shape.latent_values)
        self.time_embedder = TimestepEmbedder(shape.hidden)
        self.layers = nn.ModuleList(
            Layer(shape, attention, recompute, norm_rope, pointwise, experts)
            for _ in range(shape.layers)
        )
        self.norm = RMSNorm(shape.hidden, shape.norm_eps, pointwise)
        self.norm_gen = RMSNorm(shape.hidden, shape.norm_eps, pointwise)
        self.lm_head = LanguageHead(shape.hidden, shape.vocabulary, cross_entropy)
        self.register_buffer("latent_positions", torch.empty(shape.latent_side**2, shape.hidden))
        self.register_buffer("vit_positions", torch.empty(shape.vit_side**2, shape.hidden))
        if not self.latent_positions.is_meta:
            self.reset_tables()

    def reset_tables(self, device: torch.device | str = "cpu") -> None:
        """Computes the fixed position tables, in fp32. Must be called again after construction
        under deepspeed.zero.Init, which casts every new tensor to bf16, these included."""
        self.latent_positions = sincos_table(self.shape.hidden, self.shape.latent_side).to(device)
        self.vit_positions = sincos_table(self.shape.hidden, self.shape.vit_side).to(device)

    def forward(
        self, batch: PackedBatch, latents_GC: torch.Tensor, metaqueries_MH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(understanding_UH, generation_GH, vit_PW): outputs after the final norms, and the visual
        encoder's features.

        `latents_GC`: the rows of the generation slab, already noised where their segment is.
        `metaqueries_MH`: their embeddings. Without `read_context` the first output holds the live
        understanding rows only."""
        understanding_UH, generation_GH, vit_PW = self._embed(batch, latents_GC, metaqueries_MH)
        context_AH = understanding_UH[: batch.context].detach()
        live_LH = torch.cat([understanding_UH[batch.context :], generation_GH])
        rope = self._rope(batch)
        for number, layer in enumerate(self.layers, start=1):
            with named_range(Range.FORWARD, "layer", number):
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
        whose rows also read rows computed earlier. `cache`: K and V of the earlier rows, layer by
        layer. `batch.live_plan` has these rows as queries and [earlier; these] as keys."""
        assert not batch.context, "all rows of an extension are live; their context is the cache"
        no_metaqueries = self.lm_head.weight.new_zeros(0, self.shape.hidden)
        understanding_UH, generation_GH, _ = self._embed(batch, latents_GC, no_metaqueries)
        live_LH = torch.cat([understanding_UH, generation_GH])
        rope = self._rope(batch)
        added: KeysValues = []
        for layer, (cached_k, cached_v) in zip(self.layers, cache, strict=True):
            assert isinstance(layer, Layer)
            live_LH, k, v = layer.live(live_LH, cached_k, cached_v, rope, batch)
            added.append((k, v))
        understanding_UH = self.norm(live_LH[: batch.understanding])
        generation_GH = self.norm_gen(live_LH[batch.understanding :])
        return understanding_UH, generation_GH, added

    def _embed(
        self, batch: PackedBatch, latents_GC: torch.Tensor, metaqueries_MH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(understanding_UH, generation_GH, vit_PW): the input of the first layer, and the visual
        encoder's features."""
        dtype = self.lm_head.weight.dtype
        vision = batch.vision
        with named_range(Range.ENCODERS, "visual encoder"):
            vit_PW = self.vit(
                vision.patches_PC.to(dtype), vision.positions_P, vision.plan, vision.lengths
            )
        condition_PW = vit_PW[: vision.context_rows]
        with named_range(Range.ENCODERS, "connector"):
            condition_PH = self.connector(condition_PW, vision.lengths[: vision.context_images])
        condition_positions_P = vision.positions_P[: vision.context_rows]
        condition_PH = condition_PH + self.vit_positions[condition_positions_P].to(dtype)
        query_positions_MH = self.vit_positions[batch.metaqueries.positions_M].to(dtype)
        metaqueries_MH = metaqueries_MH + query_positions_MH
        sources = torch.cat([self.token_embedding(batch.text_ids), condition_PH, metaqueries_MH])
        generation_GH = (
            self.vae2llm(latents_GC.to(dtype))
            + self.time_embedder(batch.latents.timestep_G)
            + self.latent_positions[batch.latents.positions_G].to(dtype)
        )
        return sources[batch.understanding_source_U], generation_GH, vit_PW

    def _rope(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = self.lm_head.weight.dtype
        return rope_table(batch.rope_T, self.shape.head_width, self.shape.rope_theta, dtype)


def is_generation(name: str) -> bool:
    """Whether the parameter of this name belongs to the generation expert or to its interface to
    latents."""
    return any(part in GENERATION_PARTS for part in name.split("."))
