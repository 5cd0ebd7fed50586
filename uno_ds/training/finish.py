"""What a run leaves behind at its end: the exported model, pictures, curves and the summary."""
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from uno_ds.generation.sampler import generate
from uno_ds.model.architecture import write_architecture
from uno_ds.model.codec import build_codec
from uno_ds.model.flux import FLUX_FILE
from uno_ds.model.weights import load_model, write_weights
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine
from uno_ds.training.health import Census, take_census
from uno_ds.training.metrics import Metrics
from uno_ds.training.pictures import plot_curves, sample_grid
from uno_ds.training.report import environment, summarise, write_summary

if TYPE_CHECKING:
    from uno_ds.commands.train import Run

EXTRA_WEIGHTS = "uno.safetensors"


def finish(run: "Run", engine: Engine, ema: Ema | None, metrics: Metrics, first: Census, skipped_samples: dict[str, int], exit_reason: str) -> int:
    """Writes everything into the run folder and says where it is. Collective; returns the exit code."""
    folder, metrics_file = run.recipe.folder, run.recipe.folder / "metrics.jsonl"
    last = take_census(engine)
    metrics.close()
    frozen_held = first.frozen_checksum == last.frozen_checksum
    if not frozen_held:
        exit_reason = f"failed: frozen weights changed ({exit_reason})"
    if run.recipe.checkpoint.export:
        export(run, engine, ema, folder / "model")
    if engine.rank == 0:
        plot_curves(metrics_file, folder / "curves.png")
        if run.recipe.samples.prompts and run.recipe.checkpoint.export:
            _draw_samples(run, folder, engine.device)
        write_summary(folder, {
            **environment(), **summarise(metrics_file), "command": run.command, "seed": run.recipe.seed, "world_size": engine.world_size,
            "parameters": {"trainable": last.trainable, "frozen": last.frozen},
            "checksums": {"frozen_start": first.frozen_checksum, "frozen_end": last.frozen_checksum},
            "skipped_samples": skipped_samples, "exit": exit_reason})
        names = [name for name in ("samples.png", "curves.png", "summary.md") if (folder / name).exists()]
        print(f"{run.recipe.name}: {exit_reason}. Open {', '.join(names)} in {folder}", flush=True)
    dist.barrier()
    return 0 if exit_reason == "completed" else 1


def export(run: "Run", engine: Engine, ema: Ema | None, folder: Path) -> None:
    """Writes the model as a base folder, the average in place of the trained weights. What BAGEL does not know (metaqueries
    and their head) goes into a file of its own. Collective."""
    tensors = {}
    sources = [engine.full_parameters(), *([ema.full()] if ema is not None else [])]
    for name, tensor in (item for source in sources for item in source):
        if engine.rank == 0:
            tensors[name] = tensor
    if engine.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        model = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
        write_weights(folder, model, model.__getitem__)
        extra = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items() if not name.startswith("model.")}
        (folder / EXTRA_WEIGHTS).unlink(missing_ok=True)
        if extra:
            save_file(extra, folder / EXTRA_WEIGHTS)
        write_architecture(run.recipe.architecture, folder)
        codec = [run.recipe.base / FLUX_FILE] if run.recipe.architecture.codec == "flux" else []
        for file in [*codec, *run.recipe.tokenizer_folder.glob("*token*")]:
            if file.resolve().parent != folder.resolve():
                shutil.copy(file, folder)
    dist.barrier()


def _draw_samples(run: "Run", folder: Path, device: torch.device) -> None:
    """samples.png: the same prompts and noise through the base, where there is one, and through the trained model."""
    rows: list[tuple[str, Any]] = []
    models = [("base", run.recipe.base)] if run.recipe.base else []
    for label, path in [*models, ("trained" if not models else "after UNO" if run.supervised else "after training", folder / "model")]:
        model = load_model(path, device)
        rows.append((label, generate(model, build_codec(model.shape, path, device), run.tokenizer, run.recipe.samples)))
    sample_grid(rows, run.recipe.samples.prompts, folder / "samples.png")
