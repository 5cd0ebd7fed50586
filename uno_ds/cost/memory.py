"""Bytes that one rank needs, by what they are for.

State (weights, gradients, optimizer, average) is counted parameter by parameter as DeepSpeed shards
it and is exact. Activations and workspaces are counted from the tensors that the layers keep for
backward and are good to some 10 %.

Shape suffixes: docs/notation.md."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uno_ds.cost.adapters import values_kept_for_adapters
from uno_ds.cost.parameters import Parameter
from uno_ds.cost.scenario import Scenario
from uno_ds.kernels.backends import KERNELS, attention_memory, backend_of
from uno_ds.model.architecture import Architecture
from uno_ds.model.codec import get_codec
from uno_ds.model.precision import DTYPES
from uno_ds.sequence.segments import Kind

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe

# Of the CUDA context, NCCL's channels, cuBLAS and what the allocator cannot use: an allowance, not
# a measurement.
RESERVE = 4 * 10**9


@dataclass(frozen=True)
class Memory:
    """resident: held through the step. working: needed at the same time in forward and backward, on
    top. update: needed in the optimizer's step, on top of resident. host: in main memory."""

    resident: dict[str, int]
    working: dict[str, int]
    update: dict[str, int]
    host: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.resident.values()) + max(
            sum(self.working.values()), sum(self.update.values())
        )


@dataclass(frozen=True)
class Sharding:
    """The entries of a DeepSpeed configuration that decide memory and traffic, with DeepSpeed's
    defaults; counts are elements. state_bytes: of a master weight, gradient or moment. scatters:
    gradients are summed by reduce-scatter and not by all-reduce, which sends twice as much.
    secondary: ranks that share hpZ's second copy of the weights."""

    stage: int
    ranks: int
    value_bytes: int
    state_bytes: int
    persistence: int
    max_live: int
    max_reuse: int
    reduce_bucket: int
    prefetch: int
    sub_group: int
    secondary: int
    offload_optimizer: bool
    offload_parameters: bool
    accumulation: int
    scatters: bool

    @classmethod
    def of(cls, recipe: "Recipe", ranks: int, precision: str) -> "Sharding":
        config = recipe.deepspeed_config()
        zero = config["zero_optimization"]
        packs_per_step = recipe.engine.packs_per_step
        assert packs_per_step is not None, "set when the recipe is loaded"

        def offloaded(key: str) -> bool:
            return (zero.get(key) or {}).get("device", "none") != "none"

        return cls(
            stage=zero["stage"],
            ranks=ranks,
            value_bytes=DTYPES[precision].itemsize,
            state_bytes=2 if config.get("bf16", {}).get("bf16_master_weights_and_grads") else 4,
            persistence=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            max_live=int(zero.get("stage3_max_live_parameters", 1e9)),
            max_reuse=int(zero.get("stage3_max_reuse_distance", 1e9)),
            reduce_bucket=int(zero.get("reduce_bucket_size", 5e8)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            sub_group=int(zero.get("sub_group_size", 1e9)),
            secondary=min(int(zero.get("zero_hpz_partition_size", 1)), ranks),
            offload_optimizer=offloaded("offload_optimizer"),
            offload_parameters=offloaded("offload_param"),
            accumulation=max(1, packs_per_step // ranks),
            scatters=_scatters(zero),
        )

    def shard(self, numel: int) -> int:
        """Elements of a parameter on one rank: ZeRO-3 pads each to a multiple of the ranks."""
        return -(-numel // self.ranks)

    def persistent(self, parameter: Parameter) -> bool:
        """Whether every rank keeps this one whole between its uses."""
        return self.stage == 3 and parameter.numel <= self.persistence


def _scatters(zero: dict[str, Any]) -> bool:
    """Whether this section of a DeepSpeed configuration sums gradients by reduce-scatter. Stages 1
    and 2 send each bucket through an all-reduce, of which every rank keeps its part, unless they
    reduce it to one rank after the other."""
    if not zero["stage"] or not zero.get("reduce_scatter", True):
        return False
    return zero["stage"] == 3 or not zero.get("use_multi_rank_bucket_allreduce", True)


def memory(
    parameters: list[Parameter],
    shape: Architecture,
    sharding: Sharding,
    pack: Scenario,
    recompute: bool,
    average: bool,
    image_pixels: int,
    codec_bytes: int,
    attention: str,
    experts: str = KERNELS["experts"].reference,
    target_encoder: int = 0,
) -> Memory:
    """Bytes of one rank. `average`: a moving average is kept. `attention`: backend; raises
    ValueError for one that does not state its memory. `experts`: backend of their projections.
    `image_pixels`: of the largest image that the codec encodes; `codec_bytes`: of one of its
    values. `target_encoder`: weights of an encoder of targets that is no part of the model, which
    every rank has whole."""
    state, host, update = _state(parameters, sharding, average)
    if target_encoder:
        state["target encoder"] = target_encoder * sharding.value_bytes
    state["codec"] = get_codec(shape.codec).parameters * codec_bytes
    state["reserve"] = RESERVE
    working = _working(
        parameters, shape, sharding, pack, recompute, image_pixels, codec_bytes, attention, experts
    )
    return Memory(resident=state, working=working, update=update, host=host)


def _state(
    parameters: list[Parameter], sharding: Sharding, average: bool
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """(resident, host, update)."""
    value, each, stage = sharding.value_bytes, sharding.state_bytes, sharding.stage
    trainable = sum(p.numel for p in parameters if p.trainable)
    if stage == 3:
        owned = sum(sharding.shard(p.numel) for p in parameters if p.trainable)
        weights = value * sum(sharding.shard(p.numel) for p in parameters)
    else:
        owned = -(-trainable // sharding.ranks) if stage else trainable
        weights = sum(p.nbytes(value) for p in parameters)
    resident = {
        "weights": weights,
        "weights kept whole": value * sum(p.numel for p in parameters if sharding.persistent(p)),
    }
    if stage == 3 and sharding.secondary > 1:
        resident["weights of the node's copy"] = value * sum(
            -(-p.numel // sharding.secondary) for p in parameters
        )
    # Stages 0 and 1 hold every gradient, and under bf16 stage 1 holds them once more in fp32, where
    # they are summed.
    gradients = {
        0: value * trainable,
        1: trainable * (value + each * (value != each)),
        2: each * owned,
        3: each * owned,
    }[stage]
    optimizer = {
        "fp32 master weights" if each == 4 else "bf16 master weights": each * owned if stage else 0,
        "optimizer moments": 2 * each * owned,
    }
    update = {
        "gradients in one piece": each * min(owned, sharding.sub_group) if stage == 3 else 0,
        "temporaries of AdamW": each * min(owned, sharding.sub_group),
    }
    host: dict[str, int] = {}
    if sharding.offload_parameters:
        host["weights"] = resident["weights"]
        resident["weights"] = 0
    if sharding.offload_optimizer:
        host |= {"gradients": gradients, **optimizer}
        # The average reads the master weights on the device, 1 GB of them and one more tensor at a
        # time.
        largest = max(
            sharding.shard(p.numel) if stage == 3 else p.numel for p in parameters if p.trainable
        )
        read_at_once = min(4 * owned, (1 << 30) + 4 * largest)
        update = {"master weights for the average": read_at_once if average else 0}
    else:
        resident |= {"gradients": gradients, **optimizer}
    resident["moving average"] = 4 * owned if average else 0
    return resident, host, update


def _working(
    parameters: list[Parameter],
    shape: Architecture,
    sharding: Sharding,
    pack: Scenario,
    recompute: bool,
    image_pixels: int,
    codec_bytes: int,
    attention: str,
    experts: str,
) -> dict[str, int]:
    value, stage = sharding.value_bytes, sharding.stage
    frozen = not any(p.trainable for p in parameters if ".und." in p.name)
    understanding = pack.supervision if frozen else pack.supervision + pack.context
    context = pack.context if frozen else 0
    live = understanding + pack.generation
    for_adapters = values_kept_for_adapters(parameters)
    jointly = backend_of("experts", experts).copies_weights
    kept = (
        understanding * kept_per_row(shape, not frozen, value, attention)
        + pack.generation * kept_per_row(shape, not for_adapters, value, attention)
        + pack.generation * for_adapters * value // shape.layers
        + _kept_per_call(shape, live, context, pack.samples, value, attention)
    )
    if jointly and frozen:
        kept += kept_more_jointly(shape, understanding, value)
    constants = 2 * context * shape.key_width * value
    kept_between_layers = live * shape.hidden * value if recompute else kept
    stored = shape.layers * (constants + kept_between_layers)
    backward = live * value * (3 * shape.mlp + 4 * shape.hidden)
    patches = pack.rows(Kind.VIT) + pack.targets
    # Only one of these exists at a time: backward of a layer, the losses, the visual encoder, the
    # codec.
    passing = {
        "a layer's backward": backward + (kept if recompute else 0),
        "logits": pack.rows(Kind.CAPTION) * shape.vocabulary * logits_bytes(value),
        "visual encoder": patches * (3 * shape.vit_mlp + 8 * shape.vit_hidden) * value,
        "codec": get_codec(shape.codec).values_per_pixel * image_pixels * codec_bytes,
    }
    largest = max(passing, key=lambda name: passing[name])
    working = {"activations": stored, largest: passing[largest]}
    # Rows of the embedding are dequantised as they are looked up.
    quantised = [
        p.numel for p in parameters if p.stored is not None and "token_embedding" not in p.name
    ]
    if quantised:
        working["a dequantised weight"] = value * max(quantised)
    if jointly:
        largest_weight = shape.hidden * max(shape.mlp, shape.query_width)
        working["copy of both experts' weights"] = 2 * value * largest_weight
    if stage == 3:
        whole = sum(p.numel for p in parameters if not sharding.persistent(p))
        working["gathered weights"] = value * min(whole, sharding.max_live + sharding.prefetch)
        working["gradient buckets"] = 2 * value * sharding.reduce_bucket
    elif stage:
        trainable = sum(p.numel for p in parameters if p.trainable)
        working["gradient buckets"] = 2 * value * min(sharding.reduce_bucket, trainable)
    return working


def kept_per_row(shape: Architecture, trains: bool, value: int, attention: str) -> int:
    """Bytes that autograd keeps of one live row in one layer: norms keep their input in fp32, a
    weight that trains keeps its input, attention keeps q, k, v and its output (a backend that
    expands keys a key and value for each query head), the MLP its two branches and their
    product."""
    query, key = shape.query_width, shape.key_width
    norms = 4 * (2 * shape.hidden + query + key)
    attended_key = query if attention_memory(attention).expands_keys else key
    attended = value * (2 * query + 2 * attended_key)
    inputs = value * (4 * shape.hidden + 2 * query + key + shape.mlp) if trains else 0
    return norms + attended + 3 * shape.mlp * value + inputs


def kept_more_jointly(shape: Architecture, understanding: int, value: int) -> int:
    """Bytes that autograd keeps of one layer whose frozen expert's rows are projected together with
    those of the one that trains: the inputs of both are in one tensor."""
    return understanding * value * (2 * shape.hidden + shape.mlp)


def _kept_per_call(
    shape: Architecture, live: int, context: int, samples: int, value: int, attention: str
) -> int:
    """Bytes that autograd keeps of one layer's attention that are not per live row."""
    backend = attention_memory(attention)
    pairs = live * (live + context)
    kept = 0
    if backend.expands_keys:
        kept += 2 * context * shape.query_width * value
    if backend.keeps_masks:
        kept += pairs // samples * value
    if backend.keeps_scores:
        mask, scores = pairs, pairs * value
        kept += mask + 2 * shape.heads * scores
    return kept


def logits_bytes(value: int) -> int:
    """Bytes per logit at the height of the cross entropy: logits, fp32 copy, log softmax, and the
    gradients of the latter two."""
    return value + 4 * (value == 2) + 4 + 4 + value
