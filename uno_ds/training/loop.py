"""The training loop: load, step, average, log, save."""
import json
import resource
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import yaml

from uno_ds.cost.utilisation import Utilisation
from uno_ds.data.stream import Stream, skipped_samples
from uno_ds.objectives.uno import LOSSES
from uno_ds.settings import SettingsError, to_plain
from uno_ds.training import checkpoint
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine, StepResult, start_process_group
from uno_ds.training.finish import finish
from uno_ds.training.health import Census, NonFiniteGuard, TrainingStopped, take_census
from uno_ds.training.metrics import Metrics

if TYPE_CHECKING:
    from uno_ds.commands.train import Run


def train(run: "Run") -> int:
    """Trains to the recipe's last step and writes the run folder; returns the exit code."""
    device = start_process_group()
    try:
        return _train(run, device)
    finally:
        # Without it a process now and then aborts on its way out although all went well.
        dist.destroy_process_group()


def _train(run: "Run", device: torch.device) -> int:
    recipe = run.recipe
    engine = Engine(recipe, device, run.read_answers)
    ema = Ema(engine, recipe.optimizer.ema) if recipe.optimizer.ema else None
    stream, guard = run.stream(engine.rank, engine.world_size), NonFiniteGuard(recipe.engine.max_skipped_steps)
    first = take_census(engine)
    start = _resume(run, engine, ema, stream, guard, first)
    _open_folder(run, engine, first)
    metrics = Metrics(recipe.folder, recipe.logging, engine.rank, recipe.steps, start_step=start, config=to_plain(recipe))

    utilisation = Utilisation(recipe, device, run.read_answers)
    exit_reason, step, clock = "completed", start, time.perf_counter()
    batches_of_steps = iter(stream)
    try:
        for step in range(start + 1, recipe.steps + 1):
            batches = next(batches_of_steps)
            lr = recipe.optimizer.lr_at(step, recipe.steps)
            result = engine.train_step(batches, lr)
            skipped = guard.observe(step, result, [key for batch in batches for key in batch.keys])
            if skipped:
                metrics.note(skipped)
            elif ema is not None:
                ema.update()
            now = time.perf_counter()
            metrics.record(step, _values(run, result, lr, now - clock, device, guard.skipped) | {"mfu": utilisation(batches, now - clock)})
            clock = now
            if recipe.checkpoint.every and step % recipe.checkpoint.every == 0 and step < recipe.steps:
                metrics.flush()
                _save(run, engine, ema, stream, step, guard, first)
    except TrainingStopped as stopped:
        exit_reason = f"stopped: {stopped}"
        metrics.note(str(stopped))
    stream.close()
    metrics.flush()
    if step > start:
        _save(run, engine, ema, stream, step, guard, first)
    return finish(run, engine, ema, metrics, first, _skipped_samples(run, stream, engine), exit_reason)


def _resume(run: "Run", engine: Engine, ema: Ema | None, stream: Stream, guard: NonFiniteGuard, census: Census) -> int:
    """Restores everything from the checkpoint of `--resume`, if there is one; returns the last step done."""
    if run.resume is None:
        return 0
    path, manifest = run.resume
    # With a base, the hashes of its frozen tensors are compared instead, which do not depend on the precision of a run.
    if run.recipe.base is None and manifest["frozen_checksum"] != census.frozen_checksum:
        raise SettingsError("--resume", f"{path} belongs to other frozen weights than this run draws with seed = {run.recipe.seed}.")
    checkpoint.load(path, manifest, engine, ema)
    stream.restore(manifest["lanes"])
    guard.skipped = manifest["skipped_steps"]
    return manifest["step"]


def _open_folder(run: "Run", engine: Engine, census: Census) -> None:
    if engine.rank == 0:
        folder = run.recipe.folder
        folder.mkdir(parents=True, exist_ok=True)
        plain = to_plain(run.recipe)
        plain.pop("architecture")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
        kernels = run.recipe.kernels.resolved()
        print(f"{run.recipe.name}: {census.trainable:,} parameters train, {census.frozen:,} are frozen; {engine.world_size} rank(s), "
              f"ZeRO stage {engine.stage}, {run.recipe.engine.resolved_precision()}; attention {kernels.attention}, regression {kernels.regression}",
              flush=True)
    dist.barrier()


def _values(run: "Run", result: StepResult, lr: float, seconds: float, device: torch.device, skipped: int) -> dict[str, Any]:
    objective, answers = run.recipe.objective, run.read_answers
    present = {**objective.weights, "answer": answers}
    # A loss without a token in this step is not 0 but unknown; NaN is written as null.
    known = torch.where(result.counts > 0, result.losses, float("nan"))
    losses = {f"loss_{name}": known[number] if present[name] else None for number, name in enumerate(LOSSES)}
    return {"loss": result.loss, **losses, "grad_norm": result.grad_norm, "lr": lr, "tokens": result.tokens, "step_seconds": seconds,
            "memory_bytes": peak_memory(device), "skipped": skipped}


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the resident set's on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _save(run: "Run", engine: Engine, ema: Ema | None, stream: Stream, step: int, guard: NonFiniteGuard, census: Census) -> None:
    progress = {"skipped_steps": guard.skipped, "frozen_checksum": census.frozen_checksum}
    checkpoint.save(run.recipe.folder / "checkpoints", step, engine, ema, stream.state, progress, run.recipe.checkpoint.keep_last)


def _skipped_samples(run: "Run", stream: Stream, engine: Engine) -> dict[str, int]:
    """Bad rows by cause over all ranks, and unreadable files."""
    states: list[Any] = [None] * engine.world_size
    dist.all_gather_object(states, stream.state)
    total = skipped_samples({number: state for part in states for number, state in part.items()})
    files = sum(len(source.unreadable_files) for source in run.sources)
    return {**json.loads(json.dumps(total)), **({"unreadable_file": files} if files else {})}
