"""From a checkpoint to a base folder that BAGEL's tools read, one tensor at a time; needs no DeepSpeed and no ranks."""
from pathlib import Path
from typing import Any

import torch

from uno_ds.model.architecture import Architecture
from uno_ds.model.base_folder import copy_companions, new_folder, position_tables, refuse_existing
from uno_ds.model.tensor_file import write_tensors
from uno_ds.model.weights import EXTRA_FILE, SHARD_BYTES, WeightsFile, bagel_name, model_layout, write_weights
from uno_ds.settings import SettingsError, build
from uno_ds.training.checkpoint_file import AVERAGE, CheckpointTensors, open_checkpoint

PREFIX = "model."


def export_checkpoint(checkpoint: Path, out: Path, average: bool, base: Path | None = None, shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """Writes `out`: trained tensors of the checkpoint (their moving average, if asked for) and frozen ones of the base that
    it was trained on, in bf16 under BAGEL's names. `base`: where that base lies now, if it was moved. Returns the manifest.

    Raises SettingsError, before anything is written, if the checkpoint is damaged or the base is not what it was.
    """
    refuse_existing(out)
    folder, manifest = open_checkpoint(checkpoint, str(checkpoint))
    tensors = CheckpointTensors(folder, manifest)
    tensors.verify()
    if average and not tensors.holds(AVERAGE):
        raise SettingsError("--ema", f"{folder} holds no moving average; it was trained with optimizer.ema = 0.")
    kind, shape = AVERAGE if average else "weight", build(Architecture, manifest["architecture"])
    base = base or (Path(manifest["base"]) if manifest["base"] else None)
    layout = model_layout(shape)
    tables = position_tables(shape)
    frozen = [name for name in layout if PREFIX + name not in tensors.shapes and name not in tables]
    weights = _check_frozen(folder, manifest, base, [bagel_name(name) for name in frozen]) if frozen else None
    unfit = next((name for name, tensor in layout.items() if tensors.shapes.get(PREFIX + name, list(tensor.shape)) != list(tensor.shape)), None)
    assert unfit is None, unfit

    def read(name: str) -> torch.Tensor:
        if name in tables:
            return tables[name]
        return tensors.read(kind, PREFIX + name) if PREFIX + name in tensors.shapes else weights.read(bagel_name(name))

    with new_folder(out) as part:
        write_weights(part, layout, read, shard_bytes=shard_bytes)
        write_extra(part, {name: torch.empty(sizes, device="meta") for name, sizes in tensors.shapes.items() if not name.startswith(PREFIX)},
                    lambda name: tensors.read(kind, name))
        recorded = Path(manifest["tokenizer"])
        copy_companions(part, shape, base, recorded if recorded.is_dir() or base is None else base)
    return manifest


def write_extra(folder: Path, like: dict[str, torch.Tensor], read: Any) -> None:
    """Metaqueries and their head, which BAGEL does not have, in a file of their own; none if there are none."""
    if like:
        layout = {name: (torch.bfloat16, tensor.shape) for name, tensor in like.items()}
        write_tensors(folder / EXTRA_FILE, layout, (read(name) for name in like), {"format": "pt"})


def _check_frozen(checkpoint: Path, manifest: dict[str, Any], base: Path | None, names: list[str]) -> WeightsFile:
    """The base's weights, if they are those that the checkpoint was trained on."""
    if base is None:
        raise SettingsError(str(checkpoint), "has frozen weights that were drawn at random and lie in no file, so there is nothing to export them from.")
    if not base.is_dir():
        raise SettingsError(str(base), f"does not exist, but holds the frozen weights of {checkpoint}; name the folder with --base if it was moved.")
    weights = WeightsFile(base)
    changed = [name for name in names if name not in weights.where or weights.digest(name) != manifest["frozen"][name]]
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise SettingsError(str(base), f"is not what {checkpoint} was trained on: {changed[0]}{more} differs.")
    return weights
