"""Proof that frozen weights stay frozen: their checksum, at the start and at the end of a run."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from uno_ds.model.quantisation import quantised_weights
from uno_ds.training.collectives import gather_objects
from uno_ds.training.engine import Engine
from uno_ds.training.shards import shape_of


@dataclass(frozen=True)
class ParameterChecksums:
    """Numbers of trainable and frozen values, and a checksum over names and bytes of the frozen."""

    trainable: int
    frozen: int
    frozen_checksum: str


def parameter_checksums(engine: Engine) -> ParameterChecksums:
    """Counts all parameters and hashes the frozen ones, codes and scales of quantised ones too, one
    at a time, the ranks in turn. Collective; every rank gets the same answer, whatever their
    number."""
    parameters = dict(engine.named_parameters())
    quantised = dict(quantised_weights(engine.objective))
    frozen = {
        name: parameter for name, parameter in parameters.items() if not parameter.requires_grad
    }
    stored = {
        f"{name}.{part}": tensor
        for name, module in quantised.items()
        for part, tensor in (("codes", module.codes), ("scales", module.scales))
    }
    parts = gather_objects(dict(_own_digests(engine, frozen | stored)))
    digests = {name: digest for part in parts for name, digest in part.items()}
    checksum = hashlib.blake2b(digest_size=16)
    for name in (*frozen, *stored):
        checksum.update(f"{name} {digests[name]}\n".encode())
    total = sum(shape_of(parameter).numel() for parameter in parameters.values())
    held = sum(shape_of(parameter).numel() for parameter in frozen.values())
    in_codes = sum(module.shape.numel() for module in quantised.values())
    return ParameterChecksums(total - held, held + in_codes, checksum.hexdigest())


def _own_digests(engine: Engine, parameters: dict[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    """(name, hash) of this rank's share of the parameters. Collective."""
    for number, (name, parameter) in enumerate(parameters.items()):
        tensor = engine.full_parameter(parameter, rank=number % engine.world_size)
        if tensor is None:
            continue
        values = tensor.contiguous().flatten().view(torch.uint8).numpy()
        yield name, hashlib.blake2b(values, digest_size=16).hexdigest()
