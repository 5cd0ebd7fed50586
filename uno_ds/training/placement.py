"""Precision, ZeRO stage and device of the weights, read from the tensors and compared with what was
asked for."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist

from uno_ds.settings import SettingsError
from uno_ds.training.deepspeed_config import has_bf16_states
from uno_ds.training.shards import master_shard

if TYPE_CHECKING:
    from uno_ds.training.engine import Engine

PRECISION, SHARDING, PARTITION, DEVICE = "precision", "sharding", "partition", "device"
# AdamW makes its moments in the first step, alike.
MASTERS = "precision of the master weights"
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Fact(NamedTuple):
    """A property of a tensor: as found, and as asked for."""

    what: str
    found: Any
    asked: Any


class Placement(NamedTuple):
    """What was found in all parameters, such as fp32, 3, cpu."""

    precision: str
    stage: int
    device: str


def check_placement(
    engine: "Engine", dtype: torch.dtype, zero: dict[str, Any], device: torch.device
) -> Placement:
    """What the parameters of a new engine and their masters are. The codec is none of them.

    `zero`: zero_optimization of the configuration. Raises SettingsError with the first parameter
    that is otherwise than asked: what DeepSpeed makes of its settings depends on the processor, and
    it passes over some without a word."""
    facts = {
        name: list(_facts(parameter, engine, dtype, zero, device))
        for name, parameter in engine.named_parameters()
    }
    for what in (PRECISION, SHARDING, PARTITION, DEVICE, MASTERS):
        wrong = {
            name: fact
            for name, of_one in facts.items()
            for fact in of_one
            if fact.what == what and fact.found != fact.asked
        }
        if wrong:
            name, fact = next(iter(wrong.items()))
            others = f", and that of {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise SettingsError(
                "engine.precision" if what == PRECISION else "engine.deepspeed",
                f"the {what} of {name} should be {fact.asked} and is {fact.found} on rank "
                f"{engine.rank}{others}: DeepSpeed {deepspeed.__version__} deviates from its "
                "configuration; install the versions of constraints.txt, or remove "
                f"what overrides it from {engine.recipe.engine.deepspeed}.",
            )
    everything = [fact for of_one in facts.values() for fact in of_one]
    precision = next(fact.found for fact in everything if fact.what == PRECISION)
    devices = {str(fact.found) for fact in everything if fact.what == DEVICE}
    stage = max(_stage(parameter, engine) for _, parameter in engine.named_parameters())
    return Placement(precision, stage, " and ".join(sorted(devices)))


def _facts(
    parameter: torch.nn.Parameter,
    engine: "Engine",
    dtype: torch.dtype,
    zero: dict[str, Any],
    device: torch.device,
) -> Iterator[Fact]:
    partitioned = hasattr(parameter, "ds_id")
    kept = parameter.ds_tensor if partitioned else parameter.data
    yield Fact(PRECISION, _short(kept.dtype), _short(dtype))
    yield Fact(PRECISION, _short(parameter.dtype), _short(dtype))
    # Frozen weights have neither gradients nor optimizer state that stages 1 and 2 could shard.
    asked = zero["stage"] if parameter.requires_grad or zero["stage"] == 3 else 0
    yield Fact(SHARDING, f"ZeRO stage {_stage(parameter, engine)}", f"ZeRO stage {asked}")
    offloaded = (zero.get("offload_param") or {}).get("device") == "cpu"
    if partitioned:
        ranks = dist.get_world_size(parameter.ds_process_group)
        yield Fact(PARTITION, f"{kept.numel()} values", f"{-(-parameter.ds_numel // ranks)} values")
        offloaded = offloaded and not parameter.ds_persist
    yield Fact(DEVICE, kept.device, torch.device("cpu") if offloaded else device)
    if not parameter.requires_grad:
        return
    master = master_shard(parameter)
    if master is not None:
        states = has_bf16_states(engine.recipe.deepspeed_config())
        asked_of_masters = torch.bfloat16 if states else torch.float32
        yield Fact(MASTERS, _short(master.dtype), _short(asked_of_masters))


def _stage(parameter: torch.nn.Parameter, engine: "Engine") -> int:
    """By the marks that ZeRO leaves: pieces of the weight (3), of the master (1), and of its
    gradient too (2)."""
    if hasattr(parameter, "ds_id"):
        return 3
    if not hasattr(parameter, "_hp_mapping"):
        return 0
    return 2 if getattr(engine.engine.optimizer, "partition_gradients", False) else 1


def _short(dtype: torch.dtype) -> str:
    return NAMES.get(dtype, str(dtype).removeprefix("torch."))
