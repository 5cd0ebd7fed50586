"""Exports a checkpoint as a base folder that BAGEL's tools read, one tensor at a time; needs no
DeepSpeed and no ranks."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from uno_ds.model.adapter_files import (
    AdapterFolder,
    adapter_parts,
    base_hash,
    read_adapted,
    write_adapter,
    write_packed_adapter,
)
from uno_ds.model.adapters import LoraSettings, generation_projections
from uno_ds.model.architecture import Architecture
from uno_ds.model.base_folder import copy_companions, new_folder, position_tables, refuse_existing
from uno_ds.model.regression_metadata import extra_metadata
from uno_ds.model.tensor_file import nonfinite_values, write_tensors
from uno_ds.model.weights import (
    EXTRA_FILE,
    WeightsFile,
    bagel_name,
    describe_nonfinite,
    meta_tensors,
    write_weights,
)
from uno_ds.settings import SettingsError, build
from uno_ds.training.checkpoint_file import (
    AVERAGE,
    WEIGHT,
    CheckpointTensors,
    doubt_about,
    open_checkpoint,
)
from uno_ds.training.manifest import MANIFEST

PREFIX = "model."


class TrainedModel:
    """The model of a checkpoint: trained tensors, or their moving average, and the frozen tensors
    of its base.

    `average` None: the average where there is one. `base`: the present path of the base, if it was
    moved. Raises SettingsError if the checkpoint is damaged or the base has changed."""

    def __init__(self, checkpoint: Path, average: bool | None, base: Path | None = None):
        self.folder, self.manifest = open_checkpoint(checkpoint, str(checkpoint))
        self.tensors = CheckpointTensors(self.folder, self.manifest)
        self.tensors.verify_once()
        doubt = doubt_about(self.folder)
        if doubt is not None:
            print(f"warning: the weights of {self.folder} are in doubt: {doubt}.", file=sys.stderr)
        if average and not self.tensors.holds(AVERAGE):
            raise SettingsError(
                "--ema",
                f"{self.folder} holds no moving average; it was trained with optimizer.ema = 0.",
            )
        if average is None:
            average = self.tensors.holds(AVERAGE)
        self.kind = AVERAGE if average else WEIGHT
        self.shape = architecture_of(self.folder, self.manifest)
        recorded_base = Path(self.manifest["base"]) if self.manifest["base"] else None
        self.base = base or recorded_base
        recorded = Path(self.manifest["tokenizer"])
        self.tokenizer = recorded if recorded.is_dir() or self.base is None else self.base
        # {our name: tensor without data} of the whole model.
        self.like, self._tables = meta_tensors(self.shape), position_tables(self.shape)
        self.lora = _lora_of(self.folder, self.manifest)
        self.adapted = [
            name
            for name in generation_projections(self.shape.layers)
            if PREFIX + adapter_parts(name, dora=False)[0] in self.tensors.shapes
        ]
        frozen = [
            bagel_name(name)
            for name in self.like
            if PREFIX + name not in self.tensors.shapes and name not in self._tables
        ]
        self._weights: WeightsFile | None = None
        if frozen:
            self._weights = _check_frozen(self.folder, self.manifest, self.base, frozen)
        self._check_shapes()

    def _check_shapes(self) -> None:
        for name, tensor in self.like.items():
            expected = list(tensor.shape)
            if self.tensors.shapes.get(PREFIX + name, expected) != expected:
                raise SettingsError(
                    str(self.folder / MANIFEST),
                    f"gives {PREFIX}{name} a shape that its architecture does not have; the "
                    "checkpoint cannot be used.",
                )

    def read(self, name: str) -> torch.Tensor:
        """The tensor with this name in our model. Raises SettingsError if it holds NaN or infinite
        values.
        """
        if name in self._tables:
            return self._tables[name]
        if PREFIX + name in self.tensors.shapes:
            return self.read_trained(PREFIX + name)
        assert self._weights is not None, "every other tensor is frozen"
        weight = self._weights.read(bagel_name(name))
        module = name.removesuffix(".weight")
        if module not in self.adapted:
            return weight
        adapter = read_adapted(module, self.lora, lambda part: self.read_trained(PREFIX + part))
        return weight.float() + adapter.change(weight)

    def read_trained(self, name: str) -> torch.Tensor:
        """A trained tensor, by the objective's name. Raises SettingsError if it holds NaN or
        infinite values."""
        values = self.tensors.read(self.kind, name)
        count = nonfinite_values(values)
        if count:
            raise SettingsError(str(self.folder), f"{describe_nonfinite({name: count})}.")
        return values

    def read_added(self) -> dict[str, torch.Tensor]:
        """Metaqueries and their head, if the run had them."""
        names = [name for name in self.tensors.shapes if not name.startswith(PREFIX)]
        return {name: self.tensors.read(self.kind, name) for name in names}


def _lora_of(folder: Path, manifest: dict[str, Any]) -> LoraSettings:
    """The settings of a checkpoint's adapters. Checkpoints of earlier versions have none."""
    return build(LoraSettings, manifest.get("lora") or {}, f"{folder / MANIFEST}, lora")


def architecture_of(folder: Path, manifest: dict[str, Any]) -> Architecture:
    """The architecture of a checkpoint's model. Raises SettingsError."""
    return build(Architecture, manifest["architecture"], f"{folder / MANIFEST}, architecture")


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    average: bool,
    base: Path | None = None,
    shard_bytes: float = math.inf,
) -> dict[str, Any]:
    """Writes a checkpoint's model as the base folder `out`, in bf16 with BAGEL's names; see
    TrainedModel. Returns the manifest.

    Raises SettingsError, before anything is written, if the checkpoint is damaged or the base has
    changed."""
    refuse_existing(out)
    trained = TrainedModel(checkpoint, average, base)
    extra = {
        name: torch.empty(sizes, device="meta")
        for name, sizes in trained.tensors.shapes.items()
        if not name.startswith(PREFIX)
    }
    with new_folder(out) as part:
        write_weights(part, trained.like, trained.read, shard_bytes=shard_bytes)
        identity = trained.manifest.get("regression", {})
        write_extra(part, extra, lambda name: trained.tensors.read(trained.kind, name), identity)
        copy_companions(part, trained.shape, trained.base, trained.tokenizer)
    return trained.manifest


def export_adapter(
    checkpoint: Path, out: Path, average: bool, base: Path | None = None, packed: bool = False
) -> dict[str, Any]:
    """Writes a checkpoint's adapters as the folder `out` that peft and serving engines read, in
    fp32; `packed`: as `write_packed_adapter` does. Returns the manifest. Raises SettingsError as
    `export_checkpoint` does, and for a checkpoint without adapters."""
    refuse_existing(out)
    trained = TrainedModel(checkpoint, average, base)
    if not trained.adapted:
        raise SettingsError(
            "--adapter",
            f"{trained.folder} holds no adapters; its run did not have model.train = lora. Leave "
            "--adapter out to write the whole model.",
        )
    with new_folder(out) as part:
        write_adapter(
            part,
            trained.lora,
            trained.tensors.shapes,
            trained.read_trained,
            str(trained.base),
            base_hash(trained.adapted, trained.manifest["frozen"].__getitem__),
            trained.manifest.get("regression", {}),
        )
        if packed:
            write_packed_adapter(AdapterFolder(part, trained.shape, "--packed"), part)
    return trained.manifest


def write_extra(
    folder: Path,
    like: dict[str, torch.Tensor],
    read: Callable[[str], torch.Tensor],
    identity: dict[str, Any],
) -> None:
    """Writes metaqueries and their head, which BAGEL does not have, to a separate file; does
    nothing if there are none. like: names and shapes, as tensors without data; identity: of
    regression_identity."""
    if like:
        specs = {name: (torch.bfloat16, tensor.shape) for name, tensor in like.items()}
        values = (read(name) for name in like)
        write_tensors(folder / EXTRA_FILE, specs, values, extra_metadata(identity))


def _check_frozen(
    checkpoint: Path, manifest: dict[str, Any], base: Path | None, names: list[str]
) -> WeightsFile:
    """The base's weights. Raises SettingsError if the checkpoint was trained on others. names:
    BAGEL's names of the frozen tensors."""
    if base is None:
        raise SettingsError(
            str(checkpoint),
            "has frozen weights that were initialised at random and are not in any file, so they "
            "cannot be exported.",
        )
    if not base.is_dir():
        raise SettingsError(
            str(base),
            f"does not exist, but holds the frozen weights of {checkpoint}; name the folder with "
            "--base if it was moved.",
        )
    weights = WeightsFile(base)
    changed = [
        name
        for name in names
        if name not in weights.where or weights.digest(name) != manifest["frozen"].get(name)
    ]
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise SettingsError(
            str(base), f"is not what {checkpoint} was trained on: {changed[0]}{more} differs."
        )
    return weights
