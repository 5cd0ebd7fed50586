"""Checks precision, ZeRO stage and device of the weights: read from the tensors and compared with
the configuration."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist

from uno_ds.settings import SettingsError
from uno_ds.training.shards import is_zero3, is_zero12, master_shard

if TYPE_CHECKING:
    from uno_ds.training.engine import Engine

PRECISION, SHARDING, PARTITION, DEVICE = "precision", "sharding", "partition", "device"
# AdamW allocates its moments in the first step, with the same precision.
MASTERS = "precision of the master weights"
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Fact(NamedTuple):
    """A property of a tensor: as found, and as configured."""

    what: str
    found: Any
    expected: Any


class Placement(NamedTuple):
    """What was found for all parameters, such as fp32, 3, cpu."""

    precision: str
    stage: int
    device: str


def check_placement(
    engine: "Engine", dtype: torch.dtype, zero: dict[str, Any], device: torch.device
) -> Placement:
    """The placement of the parameters of a new engine and of their masters, without the codec's.

    `zero`: zero_optimization of the configuration. Raises SettingsError that names the first
    parameter which differs from the configuration: how DeepSpeed reads its settings depends on the
    processor, and it ignores some silently."""
    facts: list[tuple[str, Fact]] = []
    for name, parameter in engine.named_parameters():
        facts += [(name, fact) for fact in _facts(parameter, engine, dtype, zero, device)]
    for what in (PRECISION, SHARDING, PARTITION, DEVICE, MASTERS):
        wrong = {
            name: fact for name, fact in facts if fact.what == what and fact.found != fact.expected
        }
        if wrong:
            raise _deviation(what, wrong, engine)
    precision = next(fact.found for _, fact in facts if fact.what == PRECISION)
    devices = {str(fact.found) for _, fact in facts if fact.what == DEVICE}
    stage = max(_stage(parameter, engine) for _, parameter in engine.named_parameters())
    return Placement(precision, stage, " and ".join(sorted(devices)))


def _deviation(what: str, wrong: dict[str, Fact], engine: "Engine") -> SettingsError:
    name, fact = next(iter(wrong.items()))
    others = f", and that of {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return SettingsError(
        "engine.precision" if what == PRECISION else "engine.deepspeed",
        f"the {what} of {name} should be {fact.expected} and is {fact.found} on rank "
        f"{engine.rank}{others}: DeepSpeed {deepspeed.__version__} deviates from its "
        "configuration; install the versions of constraints.txt, or remove "
        f"what overrides it from {engine.recipe.engine.deepspeed}.",
    )


def _facts(
    parameter: torch.nn.Parameter,
    engine: "Engine",
    dtype: torch.dtype,
    zero: dict[str, Any],
    device: torch.device,
) -> Iterator[Fact]:
    kept = parameter.ds_tensor if is_zero3(parameter) else parameter.data
    yield Fact(PRECISION, _short(kept.dtype), _short(dtype))
    yield Fact(PRECISION, _short(parameter.dtype), _short(dtype))
    # Frozen weights have neither gradients nor optimizer state that stages 1 and 2 could shard.
    stage = zero["stage"] if parameter.requires_grad or zero["stage"] == 3 else 0
    yield Fact(SHARDING, f"ZeRO stage {_stage(parameter, engine)}", f"ZeRO stage {stage}")
    offloaded = (zero.get("offload_param") or {}).get("device") == "cpu"
    if is_zero3(parameter):
        ranks = dist.get_world_size(parameter.ds_process_group)
        size = -(-parameter.ds_numel // ranks)
        yield Fact(PARTITION, f"{kept.numel()} values", f"{size} values")
        offloaded = offloaded and not parameter.ds_persist
    yield Fact(DEVICE, kept.device, torch.device("cpu") if offloaded else device)
    if not parameter.requires_grad:
        return
    master = master_shard(parameter)
    if master is not None:
        yield Fact(MASTERS, _short(master.dtype), _short(torch.float32))


def _stage(parameter: torch.nn.Parameter, engine: "Engine") -> int:
    """By the attributes that ZeRO adds: it shards the weight (3), the master (1), or the master and
    its gradient (2)."""
    if is_zero3(parameter):
        return 3
    if not is_zero12(parameter):
        return 0
    return 2 if getattr(engine.engine.optimizer, "partition_gradients", False) else 1


def _short(dtype: torch.dtype) -> str:
    return NAMES.get(dtype, str(dtype).removeprefix("torch."))
