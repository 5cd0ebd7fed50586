"""Going on from a checkpoint: which one, whether it holds what was written, and restoring it under
any ranks and ZeRO stage."""

from collections.abc import Callable
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
    place_finished_parts,
)
from uno_ds.training.collectives import raise_on_all_ranks
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine
from uno_ds.training.manifest import MANIFEST, check_of_a_run
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
        doc="Write in the background: training waits for the copy to the host's memory only, which "
        "needs room there for what the rank writes.",
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
    """What `--resume` found: checkpoints that may be gone on from, the best first, and those that
    were passed over with the reason. `folder`: the checkpoints of this run. `given`: one was named
    on the command line, and no other may take its place."""

    folder: Path
    candidates: Candidates
    passed_over: list[str]
    given: bool


class Damaged(SettingsError):
    """A checkpoint does not hold what was written."""


def find(folder: Path, resume: str) -> Resume | None:
    """What to go on from, for `--resume auto|never|DIR`; None: start anew. Looks at names,
    manifests and sizes only. Raises SettingsError if DIR is none, or if there are checkpoints and
    all of them are damaged."""
    if resume == "never":
        return None
    if resume != "auto":
        return Resume(folder, [_open_of_a_run(Path(resume))], [], given=True)
    usable, others = newest_first(folder)
    candidates, damaged = [], []
    for path in usable:
        try:
            candidates.append(_open_of_a_run(path))
        except SettingsError as error:
            damaged.append(f"{path.name}: {error}")
    if damaged and not candidates:
        raise SettingsError(
            "--resume",
            f"none of the checkpoints in {folder} can be used; {'; '.join(damaged)} --overwrite "
            "starts anew.",
        )
    complete = set(complete_checkpoints(folder))
    unfinished = [
        f"{path.name}: its save was cut off."
        for path in sorted([*folder.glob("step_*"), *folder.glob(".step_*.part")])
        if path not in complete
    ]
    best_first, doubtful = _by_doubt(candidates)
    return Resume(folder, best_first, [*unfinished, *others, *damaged, *doubtful], given=False)


def _open_of_a_run(path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint with everything that a run needs to go on, but for the values. Raises
    SettingsError."""
    folder, manifest = open_checkpoint(path, "--resume")
    try:
        check_of_a_run(manifest)
    except ValueError as error:
        raise SettingsError(
            "--resume", f"{folder / MANIFEST} {error} The checkpoint cannot be used."
        ) from None
    CheckpointTensors(folder, manifest)
    return folder, manifest


def _by_doubt(candidates: Candidates) -> tuple[Candidates, list[str]]:
    """The candidates, newest first, with those in doubt behind the others; and a line on each that
    is newer than the first. Among those in doubt the oldest is followed by the most sound steps."""
    sound = [found for found in candidates if doubt_about(found[0]) is None]
    doubtful = [found for found in candidates if doubt_about(found[0]) is not None]
    best_first = [*sound, *reversed(doubtful)]
    newer = candidates[: candidates.index(best_first[0])] if best_first else []
    lines = [
        f"{path.name}: its weights are in doubt: {doubt_about(path)}. To go on from it all the "
        f"same, say --resume {path}."
        for path, _ in newer
    ]
    return best_first, lines


def load_newest(
    resume: Resume, engine: Engine, ema: Ema | None, report: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """Restores the newest candidate that holds what was written; None if there is none at all.
    `report` receives a line for each that was passed over. Collective; raises SettingsError on
    every rank."""
    paths: list[Any] = [[path for path, _ in resume.candidates]]
    with raise_on_all_ranks():
        if engine.rank == 0 and not resume.given:
            place_finished_parts(resume.folder)
            # Looked at again: now no other process writes here.
            resume = find(resume.folder, "auto")
            paths = [[path for path, _ in resume.candidates]]
    for line in resume.passed_over:
        report(f"--resume passes over {line}")
    # All ranks go by the list of rank 0: another machine may see a shared folder a moment later.
    dist.broadcast_object_list(paths)
    for path in paths[0]:
        with raise_on_all_ranks():
            path, manifest = open_checkpoint(path, "--resume")
        try:
            load(path, manifest, engine, ema)
        except Damaged as error:
            if resume.given or path == paths[0][-1]:
                raise
            report(f"--resume passes over {path.name}: {error}")
            continue
        doubt = doubt_about(path)
        if doubt is not None:
            report(f"warning: the weights of {path.name} are in doubt: {doubt}.")
        return path, manifest
    return None


def load(path: Path, manifest: dict[str, Any], engine: Engine, ema: Ema | None) -> None:
    """Restores trained weights, optimizer and moving average, whatever ranks and stage wrote them.
    Collective; raises on every rank SettingsError if the checkpoint belongs to another model, and
    Damaged, with nothing restored, if it is damaged."""
    state = TrainedState(engine)
    _check_model(
        path,
        manifest,
        engine,
        ema,
        {name: list(shape_of(parameter)) for name, parameter in state.parameters.items()},
    )
    try:
        with raise_on_all_ranks():
            tensors = CheckpointTensors(path, manifest)
            tensors.verify(slice(engine.rank, None, engine.world_size))
    except SettingsError as error:
        raise Damaged(error.key, error.message) from None
    updates = manifest["optimizer_steps"]
    state.begin_restore(updates)
    with raise_on_all_ranks(), torch.no_grad():
        for name, piece in state.pieces.items():
            for kind in (WEIGHT, *(MOMENTS if updates else ())):
                state.write(kind, name, tensors.read_flat(kind, name, *piece))
            if ema is not None:
                ema.shards[name][: piece.count] = tensors.read_flat(AVERAGE, name, *piece)
    state.end_restore()
    if ema is not None:
        ema.updates = manifest["ema_updates"]


def _check_model(
    path: Path,
    manifest: dict[str, Any],
    engine: Engine,
    ema: Ema | None,
    shapes: dict[str, list[int]],
) -> None:
    """Raises SettingsError, alike on every rank, if the checkpoint does not belong to this run's
    model."""
    theirs = manifest["shapes"]
    for name in [*shapes, *theirs]:
        if shapes.get(name) != theirs.get(name):
            raise SettingsError(
                "--resume",
                f"{path} does not fit: {name} {_trains(theirs.get(name))} there and "
                f"{_trains(shapes.get(name))} in this run.",
            )
    if ema is not None and manifest["ema_updates"] is None:
        raise SettingsError(
            "--resume",
            f"{path} holds no moving average; set optimizer.ema=0, or start anew (--overwrite).",
        )
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
            "holds now: "
            f"{changed[0]}{more} differs; give the base that it was trained on.",
        )


def _trains(shape: list[int] | None) -> str:
    return "does not train" if shape is None else f"trains with shape {shape}"
