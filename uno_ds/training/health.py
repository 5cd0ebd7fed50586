"""What a run checks about itself: frozen weights stay frozen, losses stay finite."""
import hashlib
from dataclasses import dataclass

import torch
import torch.distributed as dist

from uno_ds.training.engine import Engine, StepResult
from uno_ds.training.shards import shape_of


@dataclass(frozen=True)
class Census:
    """Number of trainable and frozen parameters, and a checksum over names and bytes of each set."""

    trainable: int
    frozen: int
    trainable_checksum: str
    frozen_checksum: str


def take_census(engine: Engine) -> Census:
    """Counts and hashes every parameter, one at a time, the ranks in turn. Collective; every rank gets the same answer,
    whatever their number."""
    parameters, own = dict(engine.named_parameters()), {}
    for number, (name, parameter) in enumerate(parameters.items()):
        tensor = engine.full_parameter(parameter, rank=number % engine.world_size)
        if tensor is not None:
            own[name] = hashlib.blake2b(tensor.contiguous().flatten().view(torch.uint8).numpy(), digest_size=16).hexdigest()
    parts: list = [None] * engine.world_size
    dist.all_gather_object(parts, own)
    digests = {name: digest for part in parts for name, digest in part.items()}
    hashes, counts = {True: hashlib.blake2b(digest_size=16), False: hashlib.blake2b(digest_size=16)}, {True: 0, False: 0}
    for name, parameter in parameters.items():
        hashes[parameter.requires_grad].update(f"{name} {digests[name]}\n".encode())
        counts[parameter.requires_grad] += shape_of(parameter).numel()
    return Census(counts[True], counts[False], hashes[True].hexdigest(), hashes[False].hexdigest())


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


class NonFiniteGuard:
    """Counts skipped steps and stops the run after too many in a row."""

    def __init__(self, limit: int):
        self.limit, self.skipped, self.in_a_row = limit, 0, 0

    def observe(self, step: int, result: StepResult, keys: list[str]) -> str | None:
        """A line to log if the step was skipped, the same on every rank. Raises TrainingStopped at the limit. `keys`: this
        rank's samples. Collective only where a step was skipped, which all ranks do alike."""
        if not result.skipped:
            self.in_a_row = 0
            return None
        self.skipped += 1
        self.in_a_row += 1
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (bool(result.finite_here), keys))
        broken = {rank: names for rank, (finite, names) in enumerate(everyone) if not finite}
        named = broken or {rank: names for rank, (_, names) in enumerate(everyone)}
        line = (f"step {step} skipped: the {'loss' if broken else 'gradient'} is not finite; samples "
                + "; ".join(f"of rank {rank}: {', '.join(names)}" for rank, names in named.items()))
        if self.in_a_row >= self.limit:
            raise TrainingStopped(f"{line}. This was the {self.in_a_row}th skipped step in a row (engine.max_skipped_steps = {self.limit}): "
                                  "lower optimizer.lr or look at the samples named above.")
        return line

