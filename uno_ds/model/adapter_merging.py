"""Weights of a base with adapters merged into them."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from uno_ds.json_text import shown
from uno_ds.model.adapter_files import MODEL, AdapterFolder, Read, module_of
from uno_ds.model.architecture import Architecture, read_architecture
from uno_ds.model.base_folder import (
    copy_companions,
    new_folder,
    position_tables,
    refuse_existing,
)
from uno_ds.model.regression_metadata import extra_metadata, identity_in
from uno_ds.model.tensor_file import write_tensors
from uno_ds.model.weights import (
    EXTRA_FILE,
    WeightsFile,
    bagel_name,
    check_base_folder,
    meta_tensors,
    write_weights,
)
from uno_ds.settings import SettingsError


class MergedWeights:
    """Weights of a base with adapters merged in: W + sum of share x change, and for what trained in
    full (1 - sum of shares) x T + sum of share x trained, which is the trained tensor to the bit
    where one adapter is merged with a share of 1."""

    def __init__(self, read: Read, adapters: Sequence[tuple[AdapterFolder, float]]):
        """`read` returns the base's tensor of one of the model's names."""
        self._read, self.adapters = read, adapters
        self._modules = [set(adapter.modules) for adapter, _ in adapters]

    def read(self, name: str) -> torch.Tensor:
        """The tensor of one of the model's names; as the base has it where no adapter changes
        it."""
        weight = self._read(name)
        share_of_base, terms = 1.0, []
        module = module_of(name)
        for (adapter, share), modules in zip(self.adapters, self._modules, strict=True):
            if name == f"{module}.weight" and module in modules:
                terms.append(share * adapter.adapted(module).change(weight))
            elif MODEL + name in adapter.beside:
                share_of_base -= share
                terms.append(share * adapter.read(MODEL + name).float())
        if not terms:
            return weight
        merged = share_of_base * weight.float()
        for term in terms:
            merged = merged + term
        return merged


def open_merged(
    weights: WeightsFile, shape: Architecture, adapters: Sequence[tuple[Path, float]]
) -> MergedWeights:
    """Weights of a base with adapters (folder, share) merged in. Raises SettingsError for an
    adapter that does not fit the base."""
    opened = [(AdapterFolder(folder, shape, "--adapter"), share) for folder, share in adapters]
    for adapter, _ in opened:
        adapter.check_base(weights.digest)
    return MergedWeights(lambda name: weights.read(bagel_name(name)), opened)


def added_tensors(adapter: AdapterFolder) -> dict[str, torch.Tensor]:
    """What BAGEL does not have and an adapter's run trained, metaqueries and their head; none if
    there are none."""
    return {name: adapter.read(name) for name in adapter.beside if not name.startswith(MODEL)}


def merge_adapters(
    base: Path,
    out: Path,
    adapters: Sequence[tuple[Path, float]],
    shard_bytes: float = math.inf,
) -> None:
    """Writes `base` with adapters merged in, each with its share, as the base folder `out`, in
    bf16. What BAGEL does not have (metaqueries) is that of the first adapter. Raises
    SettingsError."""
    refuse_existing(out)
    check_base_folder(base)
    shape = read_architecture(base)
    like, tables = meta_tensors(shape), position_tables(shape)
    merged = open_merged(WeightsFile(base), shape, adapters)
    added = added_tensors(merged.adapters[0][0])
    extra = {name: (torch.bfloat16, tensor.shape) for name, tensor in added.items()}
    with new_folder(out) as folder:
        write_weights(
            folder,
            like,
            lambda name: tables[name] if name in tables else merged.read(name),
            shard_bytes=shard_bytes,
        )
        if extra:
            metadata = extra_metadata(identity_in(merged.adapters[0][0].folder))
            write_tensors(folder / EXTRA_FILE, extra, iter(added.values()), metadata)
        copy_companions(folder, shape, base, base)


def read_share(text: str) -> tuple[Path, float]:
    """(folder, share) of `DIR` or `DIR:SHARE`. Raises SettingsError."""
    folder, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        share = float(number)
    except ValueError:
        share = math.nan
    if not math.isfinite(share):
        raise SettingsError("--adapter", f"expects DIR or DIR:SHARE, got '{shown(text)}'.")
    return Path(folder), share
