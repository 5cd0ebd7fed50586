"""Checkpoints of a run: complete or absent, independent of the ranks and the ZeRO stage that go on from them.

A checkpoint is written beside by all ranks, each its own pieces, and renamed into place when all of it is on the disk;
then `latest` is. Frozen weights are not written: they are those of the base, whose hashes are.
"""
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from uno_ds.model.tensor_file import new_digest, sync_folder, write_tensors
from uno_ds.settings import SettingsError, setting, to_plain
from uno_ds.training.checkpoint_file import (
    AVERAGE,
    FORMAT,
    LATEST,
    MANIFEST,
    MOMENTS,
    WEIGHT,
    CheckpointTensors,
    complete_checkpoints,
    open_checkpoint,
    rank_file,
)
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine
from uno_ds.training.shards import TrainedState, shape_of


@dataclass(frozen=True)
class CheckpointSettings:
    every: int = setting(0, doc="Steps between checkpoints; 0: only at the end.", minimum=0)
    keep_last: int = setting(2, doc="Checkpoints that are kept; older ones are removed.", minimum=1)
    export: bool = setting(True, doc="At the end, write the model (its moving average, where there is one) as a base folder, RUN/model.")


def save(folder: Path, step: int, engine: Engine, ema: Ema | None, lanes: dict[str, Any], progress: dict[str, Any], keep_last: int) -> Path:
    """Writes checkpoint `step` below `folder`. `lanes`: stream positions of this rank's lanes. Collective; raises SettingsError
    on every rank if one could not write."""
    final, beside = folder / f"step_{step}", folder / f".step_{step}.part"
    with everywhere():
        if engine.rank == 0:
            for left in folder.glob(".step_*"):
                shutil.rmtree(left)
            beside.mkdir(parents=True)
    state, records, all_lanes = TrainedState(engine), [None] * engine.world_size, [None] * engine.world_size
    record = None
    with everywhere():
        record = _write_pieces(beside, state, engine, ema)
    dist.all_gather_object(records, record)
    dist.all_gather_object(all_lanes, lanes)
    with everywhere():
        if engine.rank == 0:
            manifest = {"format": FORMAT, "step": step, "optimizer_steps": state.updates, "world_size": engine.world_size, "stage": engine.stage,
                        "ema_updates": ema.updates if ema else None,
                        "optimizer": {key: engine.optimizer.param_groups[0][key] for key in ("lr", "betas", "eps", "weight_decay")},
                        "base": str(engine.recipe.base.resolve()) if engine.recipe.base else None, "frozen": engine.frozen_hashes,
                        "tokenizer": str(engine.recipe.tokenizer_folder.resolve()), "architecture": to_plain(engine.recipe.architecture),
                        "lanes": {number: positions for states in all_lanes for number, positions in states.items()}, **progress,
                        "shapes": {name: list(shape_of(parameter)) for name, parameter in state.parameters.items()},
                        "files": {name: {"bytes": size, "hash": digest} for name, size, digest in filter(None, records)}}
            _put_in_place(beside, final, manifest, keep_last)
    return final


def find(folder: Path, resume: str) -> tuple[Path, dict[str, Any]] | None:
    """(checkpoint, manifest) to go on from, for `--resume auto|never|DIR`; None: start anew. Starts nothing."""
    if resume == "never":
        return None
    if resume != "auto":
        return open_checkpoint(Path(resume), "--resume")
    complete = complete_checkpoints(folder)
    return open_checkpoint(complete[-1], "--resume") if complete else None


def load(path: Path, manifest: dict[str, Any], engine: Engine, ema: Ema | None) -> None:
    """Restores trained weights, optimizer and moving average, whatever ranks and stage wrote them. Collective; raises
    SettingsError on every rank if the checkpoint is damaged or belongs to another model."""
    state = TrainedState(engine)
    _check_model(path, manifest, engine, ema, {name: list(shape_of(parameter)) for name, parameter in state.parameters.items()})
    with everywhere():
        tensors = CheckpointTensors(path, manifest)
        tensors.verify(slice(engine.rank, None, engine.world_size))
    updates = manifest["optimizer_steps"]
    state.begin_restore(updates)
    with everywhere(), torch.no_grad():
        for name, piece in state.pieces.items():
            for kind in (WEIGHT, *(MOMENTS if updates else ())):
                state.write(kind, name, tensors.read_flat(kind, name, *piece))
            if ema is not None:
                ema.shards[name][:piece.count] = tensors.read_flat(AVERAGE, name, *piece)
    state.end_restore()
    if ema is not None:
        ema.updates = manifest["ema_updates"]


@contextmanager
def everywhere() -> Iterator[None]:
    """A block in which a rank may fail alone: at its end all ranks wait for each other, and where one raised SettingsError
    or OSError, all raise, instead of waiting for ever in the next collective. A rank that fails leaves out no collective of
    the block."""
    error = None
    try:
        yield
    except OSError as raised:
        error = str(raised.filename or "checkpoint"), f"cannot be read or written: {raised.strerror or raised}."
    except SettingsError as raised:
        error = raised.key, raised.message
    all_errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_errors, error)
    failed = next(filter(None, all_errors), None)
    if failed:
        raise SettingsError(*failed)


def _write_pieces(folder: Path, state: TrainedState, engine: Engine, ema: Ema | None) -> tuple[str, int, str] | None:
    """(file, bytes, hash) of this rank's file; None if it owns nothing that another does not."""
    if not state.pieces or engine.stage == 0 and engine.rank:
        return None
    readers = {WEIGHT: state.read, **({kind: state.read for kind in MOMENTS} if state.updates else {})}
    if ema is not None:
        readers[AVERAGE] = lambda kind, name: ema.shards[name][:state.pieces[name].count]
    layout = {f"{kind}/{name}": (torch.float32, (piece.count,)) for kind in readers for name, piece in state.pieces.items()}
    values = (read(kind, name) for kind, read in readers.items() for name in state.pieces)
    starts, path, digest = {name: piece.start for name, piece in state.pieces.items()}, folder / rank_file(engine.rank), new_digest()
    write_tensors(path, layout, values, {"starts": json.dumps(starts)}, digest)
    return path.name, path.stat().st_size, digest.hexdigest()


def _put_in_place(beside: Path, final: Path, manifest: dict[str, Any], keep_last: int) -> None:
    for file, record in manifest["files"].items():
        # What another machine's rank wrote has to be seen from here, or the folder is not shared.
        if not (beside / file).is_file() or (beside / file).stat().st_size != record["bytes"]:
            raise SettingsError(str(beside / file), "was written by its rank but is not seen by rank 0; all machines have to share the run's folder.")
    _write_text(beside / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    sync_folder(beside)
    if final.exists():
        _remove(final)
    beside.rename(final)
    folder = final.parent
    _write_text(folder / f".{LATEST}.part", final.name + "\n")
    (folder / f".{LATEST}.part").rename(folder / LATEST)
    sync_folder(folder)
    for old in complete_checkpoints(folder)[:-keep_last]:
        _remove(old)


def _remove(checkpoint: Path) -> None:
    """By way of another name, so that a removal that is cut off leaves nothing that looks complete."""
    leaving = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(leaving)
    shutil.rmtree(leaving)


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _check_model(path: Path, manifest: dict[str, Any], engine: Engine, ema: Ema | None, shapes: dict[str, list[int]]) -> None:
    """Raises SettingsError, alike on every rank, if the checkpoint does not belong to this run's model."""
    theirs = manifest["shapes"]
    for name in [*shapes, *theirs]:
        if shapes.get(name) != theirs.get(name):
            raise SettingsError("--resume", f"{path} does not fit: {name} {_trains(theirs.get(name))} there and {_trains(shapes.get(name))} in this run.")
    if ema is not None and manifest["ema_updates"] is None:
        raise SettingsError("--resume", f"{path} holds no moving average; set optimizer.ema=0, or start with --resume never.")
    changed = [name for name in {**manifest["frozen"], **engine.frozen_hashes} if manifest["frozen"].get(name) != engine.frozen_hashes.get(name)]
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise SettingsError("--resume", f"{path} was trained on other frozen weights than model.base = {engine.recipe.base} holds now: "
                                        f"{changed[0]}{more} differs; give the base that it was trained on.")


def _trains(shape: list[int] | None) -> str:
    return "does not train" if shape is None else f"trains with shape {shape}"
