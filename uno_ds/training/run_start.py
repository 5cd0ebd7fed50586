"""Starts a run on its ranks: locks its folder, resumes from a checkpoint, prints the first line."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from uno_ds.data.lane_states import check_states
from uno_ds.data.stream import Stream
from uno_ds.kernels.backends import description
from uno_ds.model.adapters import count_adapters
from uno_ds.model.quantisation import quantised_weights
from uno_ds.settings import SettingsError
from uno_ds.training import checkpoint, run_folder
from uno_ds.training.balance import LossBalance
from uno_ds.training.checked_run import CheckedRun
from uno_ds.training.checkpoint_file import Lineage
from uno_ds.training.collectives import raise_on_all_ranks
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine
from uno_ds.training.folder_view import view_folder
from uno_ds.training.health import Health
from uno_ds.training.parameter_checksums import ParameterChecksums
from uno_ds.training.report import write_recipe

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe


@contextmanager
def locked_folder(run: CheckedRun) -> Iterator[str]:
    """Holds the lock of the run's folder, which contains nothing that the run would overwrite;
    yields the run id of this start. Collective; raises SettingsError on every rank."""
    folder, run_id = run.recipe.folder, run_folder.new_run_id()
    wait_seconds = run_folder.WAIT_SECONDS if run.resume_flag == "auto" else 0.0
    lock = run_folder.RunLock(folder, run_id, wait_seconds=wait_seconds, report=_print_now)
    is_first = dist.get_rank() == 0
    try:
        with raise_on_all_ranks():
            if is_first:
                lock.acquire()
                # Again: another run may have written here since the command line was checked.
                run_folder.check_folder(folder, run.resume_flag, run.overwrite)
                aside = run_folder.replace_run(folder, run_id) if run.overwrite else None
                if aside is not None:
                    _print_now(f"--overwrite: what {folder} held is now in {aside}")
        if run.overwrite:
            _replace_elsewhere(folder, run_id)
        yield run_id
    finally:
        if is_first:
            lock.release()


def resume(
    run: CheckedRun,
    engine: Engine,
    ema: Ema | None,
    stream: Stream,
    health: Health,
    balance: LossBalance,
    checksums: ParameterChecksums,
    run_id: str,
) -> tuple[int, Lineage]:
    """Restores the run from the checkpoint of `--resume`, if there is one. Returns (last completed
    step, lineage of this start). Collective; raises SettingsError."""
    if run.resume is None:
        return 0, Lineage(run_id)
    report = _print_now if engine.rank == 0 else _print_nothing
    found = checkpoint.load_newest(run.resume, engine, ema, report)
    if found is None:
        report("--resume auto: there is no checkpoint yet; the run starts at step 1.")
        return 0, Lineage(run_id)
    path, manifest = found
    _check_frozen(run.recipe, path, manifest, checksums)
    packs_per_step = run.recipe.engine.resolved_packs_per_step()
    check_states(manifest["lanes"], run.sources, packs_per_step)
    stream.restore(manifest["lanes"], manifest["step"])
    health.restore(manifest)
    balance.restore(manifest)
    for source in run.sources:
        rows_before = manifest["rows"].get(source.name)
        if rows_before != len(source):
            report(
                f"warning: source '{source.name}' has {len(source):,} rows, and had {rows_before} "
                f"when {path.name} was written: the order of its rows has changed."
            )
    view = view_folder(run.recipe.folder)
    with raise_on_all_ranks():
        if view.leads:
            moved = run_folder.continue_from(path, run.resume.folder, run_id)
            if moved:
                report(moved)
    step = manifest["step"]
    report(f"--resume: continues after step {step} from {path}")
    return step, Lineage.of(manifest).continued(step, run_id)


def _replace_elsewhere(folder: Path, run_id: str) -> None:
    """As `replace_run` on the machines that have a folder of their own. Collective."""
    view = view_folder(folder)
    with raise_on_all_ranks():
        if view.leads and view.rank != 0:
            run_folder.replace_run(folder, run_id)


def open_folder(
    run: CheckedRun, engine: Engine, checksums: ParameterChecksums, more: Sequence[str] = ()
) -> None:
    """Writes the recipe into the run's folder and prints the run's first line, and `more`.
    Collective."""
    with raise_on_all_ranks():
        if engine.rank == 0:
            write_recipe(run.recipe)
    if engine.rank == 0:
        announce(run.recipe, engine, checksums)
        for line in more:
            _print_now(line)
    dist.barrier()


def announce(recipe: "Recipe", engine: Engine, checksums: ParameterChecksums) -> None:
    """Prints the first line of a run. Precision, stage and device are those of the weights as
    found, not as configured."""
    names = engine.kernels.backends.items()
    kernels = ", ".join(f"{kernel} {description(kernel, name)}" for kernel, name in names)
    found = engine.placement
    _print_now(
        f"{recipe.name}: {checksums.trainable:,} parameters train, {checksums.frozen:,} are "
        f"frozen; {engine.world_size} rank(s), ZeRO stage {found.stage}, {found.precision} on "
        f"{found.device}; {kernels}"
    )
    stored = [module.shape.numel() for _, module in quantised_weights(engine.objective)]
    if stored:
        _print_now(
            f"{recipe.name}: {sum(stored):,} of the frozen weights in {len(stored)} tensors are "
            f"stored as {recipe.model.frozen_precision}"
        )
    if recipe.model.train == "lora":
        counts = count_adapters(engine.objective.model, recipe.lora)
        each = ", ".join(f"{count} {name}" for name, count in counts["by_projection"].items())
        _print_now(
            f"{recipe.name}: adapters of rank {recipe.lora.rank} on {counts['modules']} modules "
            f"({each}), scaled by {recipe.lora.scaling:g}"
        )


def _check_frozen(
    recipe: "Recipe", path: Path, manifest: dict[str, Any], checksums: ParameterChecksums
) -> None:
    # With a base, `load` compares the hashes of its frozen tensors, which do not depend on the
    # precision of the run.
    if recipe.base is None and manifest["frozen_checksum"] != checksums.frozen_checksum:
        raise SettingsError(
            "--resume",
            f"{path} belongs to other frozen weights than this run draws with seed = "
            f"{recipe.seed}.",
        )


def _print_now(line: str) -> None:
    print(line, flush=True)


def _print_nothing(line: str) -> None:
    pass
