"""The training loop: load, step, average, log, save."""

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from uno_ds.cost.utilisation import Utilisation
from uno_ds.data.stream import Stream, check_states, skipped_samples
from uno_ds.objectives.uno import LOSSES
from uno_ds.settings import SettingsError, to_plain
from uno_ds.training import checkpoint, run_folder
from uno_ds.training.checked_run import CheckedRun
from uno_ds.training.checkpoint_file import Lineage
from uno_ds.training.collectives import Collectives, raise_on_all_ranks
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine, Signals, StepResult
from uno_ds.training.finish import finish, what_follows
from uno_ds.training.health import Health, TrainingStopped
from uno_ds.training.interruption import Interruption
from uno_ds.training.kernel_check import KernelCheck
from uno_ds.training.metrics import Metrics
from uno_ds.training.parameter_checksums import ParameterChecksums, parameter_checksums
from uno_ds.training.process_group import start_process_group
from uno_ds.training.report import write_recipe
from uno_ds.training.saving import Saver
from uno_ds.training.straggler_monitor import StragglerMonitor
from uno_ds.training.watchdog import Watchdog


def train(run: CheckedRun, max_hours: float | None = None) -> int:
    """Trains to the recipe's last step, or until the run is asked to stop, and writes the run folder; returns the exit code."""
    with Interruption(max_hours) as interruption:
        device = start_process_group()
        try:
            with _own_folder(run) as run_id:
                return _train(run, device, interruption, run_id)
        finally:
            # Without it a process now and then aborts on its way out although all went well.
            dist.destroy_process_group()


@contextmanager
def _own_folder(run: CheckedRun) -> Iterator[str]:
    """The run's folder is locked for this start, whose run id is given, and holds nothing that the
    run would overwrite. Collective; raises SettingsError on every rank."""
    folder, run_id = run.recipe.folder, run_folder.new_run_id()
    goes_on = run.resume_flag == "auto"
    lock = run_folder.RunLock(
        folder,
        run_id,
        patience=run_folder.PATIENCE if goes_on else 0.0,
        tell=lambda line: print(line, flush=True),
    )
    first = dist.get_rank() == 0
    try:
        with raise_on_all_ranks():
            if first:
                lock.acquire()
                # Again, for what another run may have left since the command line was checked.
                run_folder.check_folder(folder, run.resume_flag, run.overwrite)
                aside = run_folder.replace_run(folder, run_id) if run.overwrite else None
                if aside is not None:
                    print(f"--overwrite: what {folder} held is now in {aside}", flush=True)
        yield run_id
    finally:
        if first:
            lock.release()


def _train(run: CheckedRun, device: torch.device, interruption: Interruption, run_id: str) -> int:
    recipe = run.recipe
    engine = Engine(recipe, device, run.read_answers)
    ema = Ema(engine, recipe.optimizer.ema) if recipe.optimizer.ema else None
    stream, health = (
        run.stream(engine.rank, engine.world_size),
        Health(recipe.health, recipe.engine.max_skipped_steps),
    )
    first = parameter_checksums(engine)
    start, lineage = _resume(run, engine, ema, stream, health, first, run_id)
    _open_folder(run, engine, first)
    with raise_on_all_ranks():
        metrics = Metrics(
            recipe.folder,
            recipe.logging,
            engine.rank,
            recipe.steps,
            start_step=start,
            config=to_plain(recipe),
            afterwards=what_follows(recipe),
        )
    collectives = Collectives(device)
    watchdog = Watchdog(recipe.health.stall_seconds, recipe.folder, engine.rank, collectives)
    kernel_check = KernelCheck(recipe.health, engine)
    straggler_monitor = StragglerMonitor(
        engine, collectives, stream, run.sources, recipe.logging.every
    )
    utilisation = Utilisation(recipe, device, run.read_answers)
    saver = Saver(
        recipe.folder / "checkpoints", recipe.checkpoint, engine, ema, metrics.note, watchdog.beat
    )
    saver.retention.goes_on_after(start)

    def save(wait: bool) -> bool:
        metrics.flush()
        rows = {source.name: len(source) for source in run.sources}
        return saver.save(
            step,
            stream.state,
            {
                **health.state(),
                "run": lineage.plain(),
                "frozen_checksum": first.frozen_checksum,
                "rows": rows,
            },
            wait=wait,
        )

    exit_reason, step, stop, clock = "completed", start, False, time.perf_counter()
    batches_of_steps = iter(stream)
    with collectives, watchdog:
        try:
            for step in range(start + 1, recipe.steps + 1):
                watchdog.beat(f"in step {step}")
                batches = next(batches_of_steps)
                kernel_check.before_step(step)
                lr = recipe.optimizer.lr_at(step, recipe.steps)
                result = engine.train_step(
                    batches,
                    lr,
                    Signals(interruption.wanted, saver.ready, *stream.rows),
                    health.highest_loss,
                )
                if ema is not None and not result.skipped:
                    ema.update()
                seconds = time.perf_counter() - clock
                metrics.record(
                    step,
                    _values(run, result, lr, seconds, device, health.skips.skipped + result.skipped)
                    | {"mfu": utilisation(batches, seconds)},
                )
                keys = [key for batch in batches for key in batch.keys]
                metrics.note(*straggler_monitor.after_step(step, seconds))
                saver.observe(step, result.loss, result.skipped)
                metrics.note(*health.observe(step, result, keys))
                metrics.note(*kernel_check.after_step(step))
                stop, saved = health.heard.stop > 0, health.heard.saved == engine.world_size
                if saved:
                    saver.settle()
                if stop:
                    break
                if (
                    recipe.checkpoint.every
                    and step % recipe.checkpoint.every == 0
                    and step < recipe.steps
                ):
                    save(wait=False)
                clock = time.perf_counter()
        except TrainingStopped as stopped:
            exit_reason = f"stopped: {stopped}"
            metrics.note(str(stopped))
        stream.close()
        all_saved = save(wait=True) if step > start else True
    if stop:
        exit_reason = (
            f"interrupted after step {step} by {interruption.reason or 'a signal to another rank'}"
        )
    if not all_saved:
        exit_reason += ", but its last checkpoint could not be saved"
    checkpoints = {
        "saved": saver.saved,
        "failed": saver.failed,
        "last_saved": all_saved,
        "blocked_seconds": saver.blocked_seconds,
    }
    more = {
        "run_id": run_id,
        "checkpoints": checkpoints,
        "skipped_examples": _skipped_examples(stream, engine),
        **straggler_monitor.summary(),
    }
    return finish(
        run,
        engine,
        ema,
        metrics,
        first,
        _skipped_samples(run, stream, engine),
        exit_reason,
        more,
        in_a_hurry=stop,
    )


def _resume(
    run: CheckedRun,
    engine: Engine,
    ema: Ema | None,
    stream: Stream,
    health: Health,
    checksums: ParameterChecksums,
    run_id: str,
) -> tuple[int, Lineage]:
    """Restores everything from the checkpoint of `--resume`, if there is one; returns the last step
    done, and what is written into checkpoints about this start."""
    if run.resume is None:
        return 0, Lineage(run_id)

    def tell(line: str) -> None:
        if engine.rank == 0:
            print(line, flush=True)

    found = checkpoint.load_newest(run.resume, engine, ema, tell)
    if found is None:
        tell("--resume auto: there is no checkpoint yet; the run starts at step 1.")
        return 0, Lineage(run_id)
    path, manifest = found
    # With a base, the hashes of its frozen tensors are compared instead, which do not depend on the precision of a run.
    if run.recipe.base is None and manifest["frozen_checksum"] != checksums.frozen_checksum:
        raise SettingsError(
            "--resume",
            f"{path} belongs to other frozen weights than this run draws with seed = {run.recipe.seed}.",
        )
    check_states(manifest["lanes"], len(run.sources), run.recipe.engine.packs_per_step)
    stream.restore(manifest["lanes"])
    health.restore(manifest)
    for source in run.sources:
        if (before := manifest["rows"].get(source.name)) != len(source):
            tell(
                f"warning: source '{source.name}' has {len(source):,} rows, and had {before} when {path.name} was written: its order is another one now."
            )
    with raise_on_all_ranks():
        if engine.rank == 0:
            moved = run_folder.go_on_from(path, run.resume.folder, run_id)
            if moved:
                tell(moved)
    tell(f"--resume: goes on after step {manifest['step']} from {path}")
    return manifest["step"], Lineage.of(manifest).continued(manifest["step"], run_id)


def _open_folder(run: CheckedRun, engine: Engine, checksums: ParameterChecksums) -> None:
    with raise_on_all_ranks():
        if engine.rank == 0:
            write_recipe(run.recipe)
    if engine.rank == 0:
        _announce(run, engine, checksums)
    dist.barrier()


def _announce(run: CheckedRun, engine: Engine, checksums: ParameterChecksums) -> None:
    """The first line of a run. Precision, stage and device are those found in the weights."""
    kernels = ", ".join(
        f"{kernel} {backend}" for kernel, backend in to_plain(run.recipe.kernels.resolved()).items()
    )
    found = engine.placement
    print(
        f"{run.recipe.name}: {checksums.trainable:,} parameters train, {checksums.frozen:,} are frozen; {engine.world_size} rank(s), "
        f"ZeRO stage {found.stage}, {found.precision} on {found.device}; {kernels}",
        flush=True,
    )


def _values(
    run: CheckedRun,
    result: StepResult,
    lr: float,
    seconds: float,
    device: torch.device,
    skipped: int,
) -> dict[str, Any]:
    objective, answers = run.recipe.objective, run.read_answers
    present = {**objective.weights, "answer": answers}
    # A loss without a token in this step is not 0 but unknown; NaN is written as null.
    known = torch.where(result.counts > 0, result.losses, float("nan"))
    losses = {
        f"loss_{name}": known[number] if present[name] else None
        for number, name in enumerate(LOSSES)
    }
    return {
        "loss": result.loss,
        **losses,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "tokens": result.tokens,
        "step_seconds": seconds,
        "memory_bytes": peak_memory(device),
        "skipped": skipped,
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the resident set's on a CPU."""
    return (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )


def _skipped_samples(run: CheckedRun, stream: Stream, engine: Engine) -> dict[str, int]:
    """Bad rows by cause over all ranks, and unreadable files."""
    states: list[Any] = [None] * engine.world_size
    dist.all_gather_object(states, stream.state)
    total = skipped_samples({number: state for part in states for number, state in part.items()})
    files = sum(len(source.unreadable_files) for source in run.sources)
    return {**json.loads(json.dumps(total)), **({"unreadable_file": files} if files else {})}


def _skipped_examples(stream: Stream, engine: Engine) -> dict[str, dict[str, Any]]:
    """{cause: {source, file, row, detail}} of one unusable row each, of the first lane that met one. Collective."""
    told: list[Any] = [None] * engine.world_size
    dist.all_gather_object(told, stream.skipped_examples())
    lanes = {number: examples for part in told for number, examples in part.items()}
    chosen: dict[str, dict[str, Any]] = {}
    for number in sorted(lanes):
        for cause, example in lanes[number].items():
            chosen.setdefault(cause, asdict(example))
    return chosen
