"""What a run leaves behind at its end: the exported model, pictures, curves and the summary."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from uno_ds.data.files import one_line
from uno_ds.generation.inference import generate
from uno_ds.generation.inference_model import open_model
from uno_ds.model.adapter_files import read_adapted
from uno_ds.model.adapters import adapted_modules, base_name, is_adapter
from uno_ds.model.base_folder import copy_companions, new_folder
from uno_ds.model.quantisation import quantised_weights
from uno_ds.model.weights import WeightsFile, bagel_name, model_layout, write_weights
from uno_ds.settings import SettingsError
from uno_ds.training.checked_run import CheckedRun
from uno_ds.training.collectives import raise_on_all_ranks
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine
from uno_ds.training.export import PREFIX, write_extra
from uno_ds.training.metrics import Metrics
from uno_ds.training.parameter_checksums import ParameterChecksums, parameter_checksums
from uno_ds.training.pictures import plot_curves, sample_grid
from uno_ds.training.report import environment, summarise, write_recipe, write_summary
from uno_ds.training.run_files import print_line, write_exit
from uno_ds.training.shards import gather_shard, master_shard, shape_of

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe


# The exit code of a run that ended itself: starting it again as it is would end the same way.
STOPPED = 3


def finish(
    run: CheckedRun,
    engine: Engine,
    ema: Ema | None,
    metrics: Metrics,
    first: ParameterChecksums,
    skipped_samples: dict[str, int],
    exit_reason: str,
    more: dict[str, Any],
    in_a_hurry: bool = False,
) -> int:
    """Writes everything into the run folder and prints where it is; `more` goes into the summary.
    Collective; returns the exit code.

    `in_a_hurry`: a scheduler waits for the process to end; the model and pictures are left to the
    run that goes on, and the frozen weights are not read again."""
    folder, metrics_file = run.recipe.folder, run.recipe.folder / "metrics.jsonl"
    last = first if in_a_hurry else parameter_checksums(engine)
    metrics.close()
    if first.frozen_checksum != last.frozen_checksum:
        exit_reason = f"failed: frozen weights changed ({exit_reason})"
    # What could not be written, on rank 0; and the model, on all ranks alike.
    lost: list[str] = [] if metrics.complete else ["metrics.jsonl"]
    exporting = run.recipe.checkpoint.export and not in_a_hurry
    if exporting:
        with _survived("model", lost):
            export(run, engine, ema, folder / "model")
    ended = exit_reason.startswith(("stopped", "failed"))
    code = STOPPED if ended else 0 if more["checkpoints"]["last_saved"] else 1
    if engine.rank == 0:
        with _survived("recipe.yaml", lost):
            write_recipe(run.recipe)
        if not in_a_hurry:
            with _survived("curves.png", lost):
                plot_curves(metrics_file, folder / "curves.png")
        if run.recipe.samples.prompts and exporting and "model" not in lost:
            with _survived("samples.png", lost):
                _draw_samples(run, folder, engine.device)
        if lost:
            exit_reason += f", but {', '.join(lost)} could not be written"
            code = code or 1
        with _survived("summary", lost):
            write_summary(
                folder,
                {
                    **environment(),
                    **summarise(metrics_file),
                    "command": run.command,
                    "seed": run.recipe.seed,
                    "world_size": engine.world_size,
                    "parameters": {"trainable": last.trainable, "frozen": last.frozen},
                    "checksums": {
                        "frozen_start": first.frozen_checksum,
                        "frozen_end": None if in_a_hurry else last.frozen_checksum,
                    },
                    "skipped_samples": skipped_samples,
                    **more,
                    "exit": exit_reason,
                    "exit_code": code,
                },
            )
        if "summary" in lost:
            code = code or 1
        names = [
            name for name in ("samples.png", "curves.png", "summary.md") if (folder / name).exists()
        ]
        then = "Go on with --resume auto" if in_a_hurry else f"Open {', '.join(names)} in {folder}"
        print_line(f"{run.recipe.name}: {exit_reason}. {then}")
        write_exit(run.exit_file, code, exit_reason)
    codes = [code]
    dist.broadcast_object_list(codes)
    return codes[0]


@contextmanager
def _survived(what: str, lost: list[str]) -> Iterator[None]:
    """A block whose failure to write, on a full disk for one, is a line and an entry in `lost`."""
    try:
        yield
    except (OSError, SettingsError) as error:
        lost.append(what)
        if dist.get_rank() == 0:
            reason = error if isinstance(error, SettingsError) else one_line(error)
            print_line(f"WARNING: {what} could not be written: {reason}")


def what_follows(recipe: "Recipe") -> str:
    """What a run that was not interrupted does after its last step, in words."""
    parts = ["the last checkpoint"]
    if recipe.checkpoint.export:
        parts.append("the export of the model")
        if recipe.samples.prompts:
            parts.append("pictures")
    return " and ".join([", ".join(parts[:-1]), parts[-1]][len(parts) == 1 :])


def export(run: CheckedRun, engine: Engine, ema: Ema | None, folder: Path) -> None:
    """Writes the model as a base folder, the average in place of the trained weights, tensor by
    tensor as rank 0 gathers them. Collective; raises SettingsError on every rank if rank 0 could
    not write."""
    model, named = engine.objective.model, dict(engine.named_parameters())
    adapters = {name: parameter for name, parameter in named.items() if is_adapter(name)}
    everything = {
        base_name(name): parameter for name, parameter in named.items() if name not in adapters
    }
    adapted = {PREFIX + module for module in adapted_modules(model)}
    quantised = {PREFIX + name: module for name, module in quantised_weights(model)}
    base = WeightsFile(run.recipe.base) if run.recipe.base and quantised else None
    lora = run.recipe.lora

    def frozen(name: str) -> torch.Tensor | None:
        """A quantised weight as the base has it."""
        if engine.rank:
            return None
        if base is not None:
            return base.read(bagel_name(name.removeprefix(PREFIX)))
        return quantised[name].dequantised(torch.float32)

    inside = [PREFIX + name for name in model_layout(model.shape)]
    outside = [name for name in everything if not name.startswith(PREFIX)]
    everything |= dict(engine.objective.named_buffers())
    waiting = iter([*inside, *outside])

    def gather_trained(name: str) -> torch.Tensor:
        if ema is not None:
            return ema.gather(name)
        return gather_shard(adapters[name], master_shard(adapters[name])).cpu()

    def gather(name: str) -> torch.Tensor | None:
        if ema is not None and name in ema.parameters:
            return ema.gather(name)
        weight = (
            frozen(name) if name in quantised else engine.full_parameter(everything[name], rank=0)
        )
        module = name.removesuffix(".weight")
        if module not in adapted:
            return weight
        # All ranks gather; the first one merges.
        adapter = read_adapted(module, lora, gather_trained)
        return None if weight is None else weight.float() + adapter.change(weight)

    def next_one(name: str) -> torch.Tensor:
        assert name == next(waiting)
        return gather(name)

    def like(names: list[str]) -> dict[str, torch.Tensor]:
        shapes = {
            name: quantised[name].shape if name in quantised else shape_of(everything[name])
            for name in names
        }
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    with raise_on_all_ranks():
        try:
            if engine.rank == 0:
                with new_folder(folder, replace=True) as part:
                    write_weights(
                        part,
                        {
                            name.removeprefix(PREFIX): tensor
                            for name, tensor in like(inside).items()
                        },
                        lambda name: next_one(PREFIX + name),
                    )
                    write_extra(part, like(outside), next_one)
                    copy_companions(
                        part, run.recipe.architecture, run.recipe.base, run.recipe.tokenizer_folder
                    )
        finally:
            # On the other ranks, and on rank 0 after a failure: what is left to gather needs
            # everyone.
            for name in waiting:
                gather(name)


def _draw_samples(run: CheckedRun, folder: Path, device: torch.device) -> None:
    """samples.png: the same prompts and noise through the base, where there is one, and through the
    trained model."""
    rows: list[tuple[str, Any]] = []
    models = [("base", run.recipe.base)] if run.recipe.base else []
    for label, path in [
        *models,
        (
            "trained" if not models else "after UNO" if run.supervised else "after training",
            folder / "model",
        ),
    ]:
        opened = open_model(path, device)
        rows.append(
            (label, generate(opened.model, opened.codec, run.tokenizer, run.recipe.samples))
        )
    sample_grid(rows, run.recipe.samples.prompts, folder / "samples.png")
