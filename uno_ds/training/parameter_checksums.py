"""Checksums of the frozen weights: equal at the start and at the end of a run if nothing changed
them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from uno_ds.training.collectives import gather_objects
from uno_ds.training.engine import Engine
from uno_ds.training.shards import shape_of


@dataclass(frozen=True)
class ParameterChecksums:
    """Numbers of trainable and frozen values, and a checksum over names and bytes of the frozen
    ones."""

    trainable: int
    frozen: int
    frozen_checksum: str


def parameter_checksums(engine: Engine) -> ParameterChecksums:
    """Counts all parameters and hashes the frozen ones, one at a time, each on one of the ranks.
    Collective; the result is the same on every rank, whatever their number."""
    parameters = dict(engine.named_parameters())
    frozen = {
        name: parameter for name, parameter in parameters.items() if not parameter.requires_grad
    }
    digests: dict[str, str] = {}
    for part in gather_objects(dict(_own_digests(engine, frozen))):
        digests |= part
    checksum = hashlib.blake2b(digest_size=16)
    for name in frozen:
        checksum.update(f"{name} {digests[name]}\n".encode())
    total_count = sum(shape_of(parameter).numel() for parameter in parameters.values())
    frozen_count = sum(shape_of(parameter).numel() for parameter in frozen.values())
    return ParameterChecksums(total_count - frozen_count, frozen_count, checksum.hexdigest())


def _own_digests(
    engine: Engine, parameters: dict[str, torch.nn.Parameter]
) -> Iterator[tuple[str, str]]:
    """(name, hash) of this rank's share of the parameters. Collective."""
    for number, (name, parameter) in enumerate(parameters.items()):
        tensor = engine.full_parameter(parameter, rank=number % engine.world_size)
        if tensor is None:
            continue
        values = tensor.contiguous().flatten().view(torch.uint8).numpy()
        yield name, hashlib.blake2b(values.data, digest_size=16).hexdigest()
