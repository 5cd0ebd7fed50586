"""Checkpoints of a run: complete or absent, and where a run goes on from.

    checkpoints/step_N/   deepspeed/ (trained weights and optimizer), ema_rankR.safetensors, manifest.json
    checkpoints/latest    the name of the newest complete one

A checkpoint is written beside, and renamed into place when all ranks have written; then `latest` is. Frozen weights are
not written: they are those of the base.
"""
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file

from uno_ds.settings import SettingsError, setting
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine

STATE, MANIFEST, LATEST = "deepspeed", "manifest.json", "latest"


@dataclass(frozen=True)
class CheckpointSettings:
    every: int = setting(0, doc="Steps between checkpoints; 0: only at the end.", minimum=0)
    keep_last: int = setting(2, doc="Checkpoints that are kept; older ones are removed.", minimum=1)
    export: bool = setting(True, doc="At the end, write the model (its moving average, where there is one) as a base folder, RUN/model.")


def save(folder: Path, step: int, engine: Engine, ema: Ema | None, lanes: dict[str, Any], progress: dict[str, Any], keep_last: int) -> Path:
    """Writes checkpoint `step` below `folder`. `lanes`: stream positions of this rank's lanes. Collective."""
    final, beside = folder / f"step_{step}", folder / f".step_{step}.part"
    if engine.rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    dist.barrier()
    engine.engine.save_checkpoint(str(beside), tag=STATE, save_latest=False, exclude_frozen_parameters=True)
    if ema is not None:
        save_file({name: shard.cpu() for name, shard in ema.shards.items()}, beside / f"ema_rank{engine.rank}.safetensors")
    all_lanes = [None] * engine.world_size
    dist.all_gather_object(all_lanes, lanes)
    if engine.rank == 0:
        # DeepSpeed adds scripts that rebuild a model from a checkpoint; without the frozen weights they cannot.
        for script in beside.glob("*.py"):
            script.unlink()
        manifest = {"step": step, "world_size": engine.world_size, "stage": engine.stage, "ema_updates": ema.updates if ema else None,
                    "lanes": {number: state for states in all_lanes for number, state in states.items()}, **progress}
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        if final.exists():
            shutil.rmtree(final)
        beside.rename(final)
        pointer = folder / f".{LATEST}.part"
        pointer.write_text(final.name + "\n")
        pointer.rename(folder / LATEST)
        for old in _complete(folder)[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def find(folder: Path, resume: str, world_size: int, stage: int) -> tuple[Path, dict[str, Any]] | None:
    """(checkpoint, manifest) to go on from, for `--resume auto|never|DIR`; None: start anew. Starts nothing."""
    if resume == "never":
        return None
    if resume == "auto":
        complete = _complete(folder)
        if not complete:
            return None
        path = complete[-1]
    else:
        path = Path(resume)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        written = manifest["world_size"], manifest["stage"]
        assert isinstance(manifest["step"], int) and isinstance(manifest["lanes"], dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise SettingsError("--resume", f"{path} is not a complete checkpoint: it has no readable {MANIFEST}.") from None
    if written != (world_size, stage):
        raise SettingsError("--resume", f"{path} was written by {written[0]} ranks under ZeRO stage {written[1]}, this run has {world_size} under "
                                        f"stage {stage}; start it alike, or with --resume never.")
    return path, manifest


def load(path: Path, manifest: dict[str, Any], engine: Engine, ema: Ema | None) -> None:
    """Restores trained weights, optimizer and moving average. Collective."""
    engine.engine.load_checkpoint(str(path), tag=STATE, load_module_strict=False)
    if ema is not None:
        saved = load_file(path / f"ema_rank{engine.rank}.safetensors")
        for name, shard in ema.shards.items():
            shard.copy_(saved[name])
        ema.updates = manifest["ema_updates"]


def _complete(folder: Path) -> list[Path]:
    """The complete checkpoints in the order in which they were written: a run that was started anew in the same folder
    has newer ones with smaller numbers."""
    complete = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name) and (path / MANIFEST).exists()]
    return sorted(complete, key=lambda path: (path / MANIFEST).stat().st_mtime_ns)
