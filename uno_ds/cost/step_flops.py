"""Floating-point operations of one micro-batch by part and pass, as the modules of the model do
them; a multiply-add counts 2.

`flops.py` counts a scenario by the conventions of published tables; this module counts a real
batch: start and end tokens, visual encoder, autoencoder, time embedder and heads are included, and
the last layer's constant rows give keys and values only. Matrix products and convolutions count,
pointwise work does not. Without attention the result equals torch's FlopCounterMode exactly;
attention is counted from the plan's visible pairs, because counters see dense shapes.

Shape suffixes: docs/notation.md."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from uno_ds.cost.adapters import Adapters
from uno_ds.cost.flops import FORWARD_PRODUCTS, NAIVE_PRODUCTS
from uno_ds.cost.work import Work
from uno_ds.kernels.plan import CONSTANT_KEY_PRODUCTS, LIVE_PRODUCTS
from uno_ds.model.architecture import Architecture
from uno_ds.model.codec import get_codec
from uno_ds.model.experts import TimestepEmbedder
from uno_ds.model.vision_folder import vision_flops

PASSES = ("forward", "input_gradient", "weight_gradient", "recompute")


@dataclass(frozen=True)
class Passes:
    """FLOP by pass. Attention's backward is under input_gradient."""

    forward: int = 0
    input_gradient: int = 0
    weight_gradient: int = 0
    recompute: int = 0

    @property
    def model(self) -> int:
        """Without recomputation: the numerator of model FLOP utilisation."""
        return self.forward + self.input_gradient + self.weight_gradient

    @property
    def total(self) -> int:
        """With recomputation: the numerator of hardware FLOP utilisation."""
        return self.model + self.recompute

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(*(getattr(self, name) + getattr(other, name) for name in PASSES))


@dataclass(frozen=True)
class Plan:
    """The settings of a run that decide its passes. recompute: activation checkpointing;
    everything: understanding trains too; read_context: answers are read out; target_width: of
    regression targets, None without a head; connector_targets: targets come from the connector;
    naive: the decoder without slabs, with every row in the graph; contrastive: metaqueries are
    compared with the targets of the whole pack; target_encoder: folder of the encoder of targets
    that is no part of the model; adapters: they train in place of the generation expert."""

    recompute: bool = False
    everything: bool = False
    read_context: bool = False
    target_width: int | None = None
    connector_targets: bool = False
    naive: bool = False
    contrastive: bool = False
    target_encoder: Path | None = None
    adapters: Adapters | None = None


def step_flops(shape: Architecture, work: Work, plan: Plan) -> dict[str, Passes]:
    """{part: passes} of forward and backward of one micro-batch."""
    hidden, width = shape.hidden, shape.vit_hidden
    understanding_trains = plan.everything
    parts = _decoder(shape, work, plan)

    labels = work.captions + work.answers
    parts["language head"] = _linear(labels, hidden, shape.vocabulary, True, understanding_trains)

    parts["regression head"] = Passes()
    if plan.target_width:
        parts["regression head"] = _linear(work.metaqueries, hidden, plan.target_width, True, True)

    if plan.contrastive:
        product = 2 * work.metaqueries**2 * (plan.target_width or hidden)
        parts["contrastive scores"] = Passes(product, input_gradient=product, recompute=product)

    trains = plan.adapters is None or plan.adapters.interface
    latents_in = _linear(work.generation, shape.latent_values, hidden, False, trains)
    latents_out = _linear(work.noised, hidden, shape.latent_values, True, trains)
    time_in = _linear(work.generation, TimestepEmbedder.SINUSOIDS, hidden, False, trains)
    time_out = _linear(work.generation, hidden, hidden, trains, trains)
    parts["latent interface"] = latents_in + latents_out + time_in + time_out

    # Targets are constants, but while the encoder trains its backward runs over the rows of all
    # images alike.
    encoder = _visual_encoder(shape, work, understanding_trains)
    share = work.condition_patches / work.patches if work.patches else 1.0
    conditions = Passes(*(round(share * getattr(encoder, name)) for name in PASSES))
    targets = Passes(*(getattr(encoder, name) - getattr(conditions, name) for name in PASSES))
    parts["visual encoder, conditions"] = conditions
    parts["visual encoder, targets"] = targets

    connector = width * hidden + hidden * hidden
    parts["connector"] = _linear(
        work.condition_patches, 1, connector, understanding_trains, understanding_trains
    )
    if plan.connector_targets:
        parts["connector"] += Passes(forward=2 * work.patches * connector)

    if plan.target_encoder is not None:
        encoded = sum(vision_flops(plan.target_encoder, *grid) for grid in work.target_grids)
        parts["target encoder"] = Passes(forward=encoded)

    encoded = sum(codec_flops(shape.codec, *size) for size in work.encoded_pixels)
    parts["autoencoder"] = Passes(forward=encoded)
    return parts


def _visual_encoder(shape: Architecture, work: Work, trains: bool) -> Passes:
    """Over all images, conditions and targets."""
    width = shape.vit_hidden
    embedding = _linear(work.patches, 3 * shape.vit_patch**2, width, False, trains)
    block = 4 * width * width + 2 * width * shape.vit_mlp
    blocks = _scaled(shape.vit_layers, _linear(work.patches, 1, block, trains, trains))
    return embedding + blocks + _visual_attention(shape, work, trains)


def _visual_attention(shape: Architecture, work: Work, trains: bool) -> Passes:
    product = 2 * shape.vit_hidden * work.patch_pairs * shape.vit_layers
    return Passes(
        forward=FORWARD_PRODUCTS * product,
        input_gradient=LIVE_PRODUCTS * product if trains else 0,
    )


def total(parts: Mapping[str, Passes]) -> Passes:
    return sum(parts.values(), Passes())


def attention_flops(
    parts: Mapping[str, Passes], shape: Architecture, work: Work, plan: Plan
) -> Passes:
    """The share of attention in `parts`, that of the visual encoder included: what torch's counter
    does not count."""
    return parts["attention"] + _visual_attention(shape, work, plan.everything)


def _decoder(shape: Architecture, work: Work, plan: Plan) -> dict[str, Passes]:
    hidden, layers = shape.hidden, shape.layers
    naive = plan.naive
    # Multiply-adds of a row in a layer.
    keys_and_values = 2 * hidden * shape.key_width
    queries_and_output = 2 * hidden * shape.query_width
    mlp = 3 * hidden * shape.mlp
    constant_rows = 0 if naive else work.context
    understanding_rows = work.understanding + (work.context if naive else 0)
    # In the last layer constant rows give keys and values only, unless answers are read from them.
    context_layers = layers if plan.read_context else layers - 1

    def slabs(multiply_adds: int, layers_of_constants: int) -> Passes:
        """A product of `multiply_adds` a row in every layer; constant rows have it in
        `layers_of_constants` of them, forward only."""
        understanding = _linear(understanding_rows, 1, multiply_adds, True, plan.everything)
        trains = plan.adapters is None
        generation = _linear(work.generation, 1, multiply_adds, True, trains)
        constants = Passes(forward=2 * multiply_adds * constant_rows * layers_of_constants)
        return _scaled(layers, understanding + generation) + constants

    projections = slabs(keys_and_values, layers) + slabs(queries_and_output, context_layers)
    gated = slabs(mlp, context_layers)
    if plan.recompute:
        rows = understanding_rows + work.generation
        projection = rows * (keys_and_values + queries_and_output)
        projections += Passes(recompute=2 * layers * projection)
        # Recomputation stops at the last tensor that backward needs: the input of the generation
        # expert's last product, but where the product is scattered after it, the indices.
        last = layers * hidden * shape.mlp if plan.adapters is None else plan.adapters.plain_last
        spared = 0 if naive else work.generation * last
        gated += Passes(recompute=2 * (layers * rows * mlp - spared))
    attention = _attention(shape, work, plan, context_layers)
    parts = {"projections": projections, "attention": attention, "mlp": gated}
    if plan.adapters is not None:
        parts["adapters"] = _adapters(work.generation, plan.adapters, plan)
    return parts


def _adapters(rows: int, sizes: Adapters, plan: Plan) -> Passes:
    spared = 0 if plan.naive else sizes.last_products
    again = Passes(recompute=2 * rows * (sizes.products - spared) if plan.recompute else 0)
    return _linear(rows, 1, sizes.products, True, True) + again


def _attention(shape: Architecture, work: Work, plan: Plan, context_layers: int) -> Passes:
    layers = shape.layers
    product = 2 * shape.query_width
    if plan.naive:
        pairs = work.context_pairs + work.live_pairs + work.constant_key_pairs
        forward = FORWARD_PRODUCTS * layers * pairs
        backward = NAIVE_PRODUCTS * layers * pairs
        again = forward
    else:
        live_queries = work.live_pairs + work.constant_key_pairs
        again = FORWARD_PRODUCTS * layers * live_queries
        forward = again + FORWARD_PRODUCTS * context_layers * work.context_pairs
        backward = layers * (
            LIVE_PRODUCTS * work.live_pairs + CONSTANT_KEY_PRODUCTS * work.constant_key_pairs
        )
    return Passes(
        forward=product * forward,
        input_gradient=product * backward,
        recompute=product * again if plan.recompute else 0,
    )


def _linear(
    rows: int, inputs: int, outputs: int, input_gradient: bool, weight_gradient: bool
) -> Passes:
    product = 2 * rows * inputs * outputs
    return Passes(
        forward=product,
        input_gradient=product if input_gradient else 0,
        weight_gradient=product if weight_gradient else 0,
    )


def _scaled(factor: int, passes: Passes) -> Passes:
    return Passes(*(factor * getattr(passes, name) for name in PASSES))


@lru_cache
def codec_flops(codec: str, height: int, width: int) -> int:
    """Of encoding one image; 0 for a codec without weights."""
    empty_encoder = get_codec(codec).empty_encoder
    if empty_encoder is None:
        return 0
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        empty_encoder()(torch.empty(1, 3, height, width))
    return counter.get_total_flops()
