"""Floating-point operations of one micro-batch by part and pass, as the modules of the model do
them; a multiply-add counts 2.

What `flops.py` says of a scenario by the conventions of a table on paper, this says of a real
batch: start and end tokens, visual encoder, autoencoder, time embedder and heads are in, the last
layer's constant rows give keys and values only. Matrix products and convolutions count, pointwise
work does not. With attention left out it equals what torch's FlopCounterMode counts, exactly;
attention is counted from the plan's visible pairs, because counters see dense shapes.

Shape suffixes: docs/notation.md."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from uno_ds.cost.flops import CONSTANT_KEY_PRODUCTS, FORWARD_PRODUCTS, LIVE_PRODUCTS, NAIVE_PRODUCTS
from uno_ds.cost.work import Work
from uno_ds.model.architecture import Architecture
from uno_ds.model.experts import TimestepEmbedder

PASSES = ("forward", "input_gradient", "weight_gradient", "recompute")
SPELLINGS = ("structured", "naive")


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
    """What of a run decides over its passes. everything: understanding trains too; read_context:
    answers are read out; target_width: of regression targets, None without a head;
    connector_targets: targets come from the connector."""

    recompute: bool = False
    everything: bool = False
    read_context: bool = False
    target_width: int | None = None
    connector_targets: bool = False
    spelling: str = "structured"


def step_flops(shape: Architecture, work: Work, plan: Plan) -> dict[str, Passes]:
    """{part: passes} of forward and backward of one micro-batch."""
    assert plan.spelling in SPELLINGS
    parts = _decoder(shape, work, plan) | {
        "language head": _linear(
            work.captions + work.answers, shape.hidden, shape.vocabulary, True, plan.everything
        )
    }
    hidden, width, frozen_vision = shape.hidden, shape.vit_hidden, not plan.everything
    parts["regression head"] = (
        _linear(work.metaqueries, hidden, plan.target_width, True, True)
        if plan.target_width
        else Passes()
    )
    parts["latent interface"] = (
        _linear(work.generation, shape.latent_values, hidden, False, True)
        + _linear(work.noised, hidden, shape.latent_values, True, True)
        + _linear(work.generation, TimestepEmbedder.SINUSOIDS, hidden, False, True)
        + _linear(work.generation, hidden, hidden, True, True)
    )
    trains = not frozen_vision
    block = 4 * width * width + 2 * width * shape.vit_mlp
    encoder = (
        _linear(work.patches, 3 * shape.vit_patch**2, width, False, trains)
        + _scaled(shape.vit_layers, _linear(work.patches, 1, block, trains, trains))
        + Passes(
            forward=shape.vit_layers * FORWARD_PRODUCTS * 2 * width * work.patch_pairs,
            input_gradient=trains * shape.vit_layers * LIVE_PRODUCTS * 2 * width * work.patch_pairs,
        )
    )
    # Targets are constants, but while the encoder trains its backward runs over the rows of all
    # images alike.
    share = work.condition_patches / work.patches if work.patches else 1.0
    conditions = Passes(*(round(share * getattr(encoder, name)) for name in PASSES))
    parts["visual encoder, conditions"] = conditions
    parts["visual encoder, targets"] = Passes(
        *(getattr(encoder, name) - getattr(conditions, name) for name in PASSES)
    )
    connector = width * hidden + hidden * hidden
    parts["connector"] = _linear(work.condition_patches, 1, connector, trains, trains)
    if plan.connector_targets:
        parts["connector"] += Passes(forward=2 * work.patches * connector)
    parts["autoencoder"] = Passes(
        forward=sum(codec_flops(shape.codec, *size) for size in work.encoded_pixels)
    )
    return parts


def total(parts: Mapping[str, Passes]) -> Passes:
    return sum(parts.values(), Passes())


def attention_flops(
    parts: Mapping[str, Passes], shape: Architecture, work: Work, plan: Plan
) -> Passes:
    """The share of attention in `parts`, that of the visual encoder included: what torch's counter
    is not asked for."""
    vision = shape.vit_layers * 2 * shape.vit_hidden * work.patch_pairs
    return parts["attention"] + Passes(
        FORWARD_PRODUCTS * vision, plan.everything * LIVE_PRODUCTS * vision
    )


def _decoder(shape: Architecture, work: Work, plan: Plan) -> dict[str, Passes]:
    hidden, layers = shape.hidden, shape.layers
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    keys, queries, output, mlp = (
        2 * hidden * key,
        hidden * query,
        query * hidden,
        3 * hidden * shape.mlp,
    )
    naive = plan.spelling == "naive"
    context = 0 if naive else work.context
    live = work.understanding + (work.context if naive else 0)
    finished = layers if plan.read_context else layers - 1

    def slabs(inside: int, of_context: int) -> Passes:
        """`inside` multiply-adds of a live row in a layer; `of_context` layers in which constant
        rows do the same."""
        return _scaled(
            layers,
            _linear(live, 1, inside, True, plan.everything)
            + _linear(work.generation, 1, inside, True, True),
        ) + Passes(forward=2 * inside * context * of_context)

    projections = slabs(keys, layers) + slabs(queries + output, finished)
    each = 2 * query
    if naive:
        pairs = work.context_pairs + work.live_pairs + work.constant_key_pairs
        attention = Passes(
            forward=layers * each * FORWARD_PRODUCTS * pairs,
            input_gradient=layers * each * NAIVE_PRODUCTS * pairs,
            recompute=plan.recompute * layers * each * FORWARD_PRODUCTS * pairs,
        )
    else:
        seen = work.live_pairs + work.constant_key_pairs
        attention = Passes(
            forward=each * FORWARD_PRODUCTS * (layers * seen + finished * work.context_pairs),
            input_gradient=each
            * layers
            * (LIVE_PRODUCTS * work.live_pairs + CONSTANT_KEY_PRODUCTS * work.constant_key_pairs),
            recompute=plan.recompute * each * layers * FORWARD_PRODUCTS * seen,
        )
    gated = slabs(mlp, finished)
    if plan.recompute:
        rows = live + work.generation
        projections += Passes(recompute=2 * layers * rows * (keys + queries + output))
        # Recomputation stops at the last tensor that backward needs: the input of the generation
        # expert's last product, but where the product is scattered after it, the indices.
        spared = 0 if naive else work.generation * hidden * shape.mlp
        gated += Passes(recompute=2 * layers * (rows * mlp - spared))
    return {"projections": projections, "attention": attention, "mlp": gated}


def _linear(
    rows: int, inputs: int, outputs: int, input_gradient: bool, weight_gradient: bool
) -> Passes:
    each = 2 * rows * inputs * outputs
    return Passes(each, each * input_gradient, each * weight_gradient)


def _scaled(factor: int, passes: Passes) -> Passes:
    return Passes(*(factor * getattr(passes, name) for name in PASSES))


@lru_cache
def codec_flops(codec: str, height: int, width: int) -> int:
    """Of encoding one image: counted by torch on tensors without memory. 0 for a codec without
    weights."""
    if codec == "pixel":
        return 0
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from uno_ds.model.flux import FLUX_CONFIG, FluxCodec, empty_autoencoder

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        FluxCodec(empty_autoencoder(FLUX_CONFIG)).autoencoder.encode(
            torch.empty(1, 3, height, width)
        )
    return counter.get_total_flops()
