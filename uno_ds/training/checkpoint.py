"""Resuming from a checkpoint: choosing it, verifying it, and restoring it under any number of ranks
and any ZeRO stage."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from uno_ds.settings import SettingsError, setting
from uno_ds.training.checkpoint_file import (
    AVERAGE,
    MOMENTS,
    WEIGHT,
    CheckpointTensors,
    complete_checkpoints,
    doubt_about,
    newest_first,
    open_checkpoint,
    rank_file,
    rename_complete_partials,
)
from uno_ds.training.collectives import gather_objects, raise_on_all_ranks
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine
from uno_ds.training.manifest import MANIFEST, check_of_a_run
from uno_ds.training.regression_identity import check_identity
from uno_ds.training.shards import TrainedState, shape_of


@dataclass(frozen=True)
class CheckpointSettings:
    every: int = setting(
        0,
        doc="Steps between checkpoints; 0: only at the end.",
        minimum=0,
        maximum=10**9,
    )
    asynchronous: bool = setting(
        False,
        doc="Write in the background: training waits only for the copy to host memory, which needs "
        "room for the pieces that the rank writes.",
    )
    keep_last: int = setting(
        2,
        doc="Newest checkpoints that are kept; older ones are removed.",
        minimum=1,
        maximum=10**9,
    )
    keep_every: int = setting(
        0,
        doc="Checkpoints of steps that are multiples of this are kept for ever; 0: none.",
        minimum=0,
        maximum=10**9,
    )
    export: bool = setting(
        True,
        doc="At the end, write the model (its moving average, where there is one) as a base "
        "folder, RUN/model.",
    )


Candidates = list[tuple[Path, dict[str, Any]]]


@dataclass(frozen=True)
class Resume:
    """What `--resume` found: checkpoints that the run may continue from, the best first, and a line
    with the reason for each that is skipped. `folder`: the checkpoints of this run. `given`: the
    command line names one checkpoint, and no other may be used."""

    folder: Path
    candidates: Candidates
    skipped: list[str]
    given: bool


class Damaged(SettingsError):
    """A file of a checkpoint differs from what was written."""


def find(folder: Path, resume: str) -> Resume | None:
    """The checkpoints for `--resume auto|never|DIR`; None: start at step 1. Reads names, manifests
    and sizes only. Raises SettingsError if DIR is not a checkpoint, or if there are checkpoints and
    all of them are damaged."""
    if resume == "never":
        return None
    if resume == "auto":
        return _find_newest(folder)
    return Resume(folder, [_open_for_resume(Path(resume))], [], given=True)


def _find_newest(folder: Path) -> Resume:
    usable, others = newest_first(folder)
    candidates: Candidates = []
    damaged: list[str] = []
    for path in usable:
        try:
            candidates.append(_open_for_resume(path))
        except SettingsError as error:
            damaged.append(f"{path.name}: {error}")
    if damaged and not candidates:
        raise SettingsError(
            "--resume",
            f"none of the checkpoints in {folder} can be used; {'; '.join(damaged)} --overwrite "
            "starts at step 1.",
        )
    complete = set(complete_checkpoints(folder))
    unfinished = [
        f"{path.name}: its save was interrupted."
        for path in sorted([*folder.glob("step_*"), *folder.glob(".step_*.part")])
        if path not in complete
    ]
    best_first, doubtful = _by_doubt(candidates)
    return Resume(folder, best_first, [*unfinished, *others, *damaged, *doubtful], given=False)


def _open_for_resume(path: Path) -> tuple[Path, dict[str, Any]]:
    """(folder, manifest) of a checkpoint that has everything a run needs to continue; its tensors
    are not read. Raises SettingsError."""
    folder, manifest = open_checkpoint(path, "--resume")
    try:
        check_of_a_run(manifest)
    except ValueError as error:
        raise SettingsError(
            "--resume", f"{folder / MANIFEST} {error} The checkpoint cannot be used."
        ) from None
    CheckpointTensors(folder, manifest, of_this_machine=True)
    return folder, manifest


def _by_doubt(candidates: Candidates) -> tuple[Candidates, list[str]]:
    """(the candidates, newest first, with those in doubt after the others; a line for each that is
    newer than the first). Those in doubt are sorted oldest first: the most sound steps followed the
    oldest."""
    without_doubt = [found for found in candidates if doubt_about(found[0]) is None]
    doubtful = [found for found in candidates if doubt_about(found[0]) is not None]
    best_first = [*without_doubt, *reversed(doubtful)]
    newer = candidates[: candidates.index(best_first[0])] if best_first else []
    lines = [
        f"{path.name}: its weights are in doubt: {doubt_about(path)}. To continue from it anyway, "
        f"give --resume {path}."
        for path, _ in newer
    ]
    return best_first, lines


def load_newest(
    resume: Resume, engine: Engine, ema: Ema | None, report: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """Restores the best candidate that is not damaged; None if there is no candidate. `report`
    receives a line for each that is skipped. Collective; raises SettingsError on every rank."""
    with raise_on_all_ranks():
        if engine.rank == 0 and not resume.given:
            rename_complete_partials(resume.folder)
            # Again, now that the run's lock keeps other processes from writing here.
            resume = _find_newest(resume.folder)
    for line in resume.skipped:
        report(f"--resume skips {line}")
    # All ranks use the list of rank 0: on another machine, changes of a shared folder may be
    # visible a moment later.
    broadcast: list[Any] = [[path for path, _ in resume.candidates]]
    dist.broadcast_object_list(broadcast)
    paths: list[Path] = broadcast[0]
    for path in paths:
        try:
            path, manifest = _open_on_all_machines(path)
            load(path, manifest, engine, ema)
        except Damaged as error:
            if resume.given or path == paths[-1]:
                raise
            report(f"--resume skips {path.name}: {error}")
            continue
        doubt = doubt_about(path)
        if doubt is not None:
            report(f"warning: the weights of {path.name} are in doubt: {doubt}.")
        return path, manifest
    return None


def _open_on_all_machines(path: Path) -> tuple[Path, dict[str, Any]]:
    """(folder, manifest). Collective; raises Damaged on every rank if it is not one and the same
    checkpoint for all: machines may each have a disk of their own under this path."""
    try:
        with raise_on_all_ranks(), _naming_the_machine():
            folder, manifest = open_checkpoint(path, "--resume")
    except SettingsError as error:
        raise Damaged(error.key, error.message) from None
    if len(set(gather_objects(manifest["hash"]))) > 1:
        raise Damaged(
            "--resume",
            f"{folder} is not the same checkpoint on all machines, each of which has its own disk "
            "there; copy one to all with scripts/weights.py collect, or remove the others.",
        )
    return folder, manifest


@contextmanager
def _naming_the_machine() -> Iterator[None]:
    """Names this machine in an error, unless it is that of rank 0, which has the folder."""
    try:
        yield
    except SettingsError as error:
        if dist.get_rank() == 0:
            raise
        where = f"on {socket.gethostname()}, the machine of rank {dist.get_rank()}"
        raise SettingsError(error.key, f"{where}: {error.message}") from None


def load(path: Path, manifest: dict[str, Any], engine: Engine, ema: Ema | None) -> None:
    """Restores trained weights, optimizer and moving average, whatever ranks and stage wrote them.
    Collective; raises on every rank SettingsError if the checkpoint belongs to another model, and
    Damaged, with nothing restored, if it is damaged."""
    state = TrainedState(engine)
    shapes = {name: list(shape_of(parameter)) for name, parameter in state.parameters.items()}
    _check_model(path, manifest, engine, ema, shapes)
    try:
        with raise_on_all_ranks():
            tensors = CheckpointTensors(path, manifest, of_this_machine=True)
            tensors.verify(_share_to_verify(tensors, engine))
    except SettingsError as error:
        raise Damaged(error.key, error.message) from None
    updates = manifest["optimizer_steps"]
    kinds = (WEIGHT, *MOMENTS) if updates else (WEIGHT,)
    state.begin_restore(updates)
    with raise_on_all_ranks(), torch.no_grad():
        for name, piece in state.pieces.items():
            for kind in kinds:
                state.write(kind, name, tensors.read_flat(kind, name, *piece))
            if ema is not None:
                ema.shards[name][: piece.size] = tensors.read_flat(AVERAGE, name, *piece)
    state.end_restore()
    if ema is not None:
        ema.updates = manifest["ema_updates"]


def _share_to_verify(tensors: CheckpointTensors, engine: Engine) -> slice:
    """Of its files: an equal share of all, or the rank's own where machines do not share them."""
    if not tensors.elsewhere:
        return slice(engine.rank, None, engine.world_size)
    own, files = rank_file(engine.rank), tensors.files
    place = files.index(own) if own in files else len(files)
    return slice(place, place + 1)


def _check_model(
    path: Path,
    manifest: dict[str, Any],
    engine: Engine,
    ema: Ema | None,
    shapes: dict[str, list[int]],
) -> None:
    """Raises SettingsError, the same on every rank, if the checkpoint does not belong to this run's
    model."""
    saved_shapes = manifest["shapes"]
    for name in [*shapes, *saved_shapes]:
        if shapes.get(name) != saved_shapes.get(name):
            raise SettingsError(
                "--resume",
                f"{path} does not fit: {name} {_trains(saved_shapes.get(name))} there and "
                f"{_trains(shapes.get(name))} in this run.",
            )
    if ema is not None and manifest["ema_updates"] is None:
        raise SettingsError(
            "--resume",
            f"{path} holds no moving average; set optimizer.ema=0, or start at step 1 "
            "(--overwrite).",
        )
    check_identity(str(path), manifest.get("regression", {}), engine.regression)
    changed = [
        name
        for name in {**manifest["frozen"], **engine.frozen_hashes}
        if manifest["frozen"].get(name) != engine.frozen_hashes.get(name)
    ]
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise SettingsError(
            "--resume",
            f"{path} was trained on other frozen weights than model.base = {engine.recipe.base} "
            f"holds now: {changed[0]}{more} differs; give the base that it was trained on.",
        )


def _trains(shape: list[int] | None) -> str:
    return "does not train" if shape is None else f"trains with shape {shape}"
