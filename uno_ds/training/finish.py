"""Ends a run: exports the model, draws samples and curves, and writes the summary."""

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
from uno_ds.model.weights import WeightsFile, bagel_name, meta_tensors, write_weights
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


# The exit code of a run that stopped itself: started again unchanged, it would stop again.
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
    is_interrupted: bool = False,
) -> int:
    """Writes everything into the run folder and prints where it is; `more` goes into the summary.
    Collective; returns the exit code.

    first: checksums from the start of the run. is_interrupted: a scheduler waits for the process to
    exit; the model and pictures are left to the resumed run, and the frozen weights are not read
    again."""
    recipe, folder = run.recipe, run.recipe.folder
    last = first if is_interrupted else parameter_checksums(engine)
    metrics.close()
    if first.frozen_checksum != last.frozen_checksum:
        exit_reason = f"failed: frozen weights changed ({exit_reason})"
    # Names of what could not be written, on rank 0; the model's on all ranks.
    lost: list[str] = [] if metrics.complete else ["metrics.jsonl"]
    has_export = recipe.checkpoint.export and not is_interrupted
    if has_export:
        with _failures_added_to(lost, "model"):
            export(run, engine, ema, folder / "model")
    code = 0 if more["checkpoints"]["last_saved"] else 1
    if exit_reason.startswith(("stopped", "failed")):
        code = STOPPED
    if engine.rank == 0:
        with _failures_added_to(lost, "recipe.yaml"):
            write_recipe(recipe)
        if not is_interrupted:
            with _failures_added_to(lost, "curves.png"):
                plot_curves(folder / "metrics.jsonl", folder / "curves.png")
        if recipe.samples.prompts and has_export and "model" not in lost:
            with _failures_added_to(lost, "samples.png"):
                _draw_samples(run, folder, engine.device)
        if lost:
            exit_reason += f", but {', '.join(lost)} could not be written"
            code = code or 1
        frozen_end = None if is_interrupted else last.frozen_checksum
        more = {
            "world_size": engine.world_size,
            "parameters": {"trainable": last.trainable, "frozen": last.frozen},
            "checksums": {"frozen_start": first.frozen_checksum, "frozen_end": frozen_end},
            "skipped_samples": skipped_samples,
            **more,
            "exit": exit_reason,
            "exit_code": code,
        }
        with _failures_added_to(lost, "summary"):
            write_summary(folder, _summary(run, more))
        if "summary" in lost:
            code = code or 1
        print_line(f"{recipe.name}: {exit_reason}. {_what_to_do(folder, is_interrupted)}")
        write_exit(run.exit_file, code, exit_reason)
    codes = [code]
    dist.broadcast_object_list(codes)
    return codes[0]


def _summary(run: CheckedRun, more: dict[str, Any]) -> dict[str, Any]:
    """What `write_summary` needs: environment, metrics and command of the run, and `more`."""
    return {
        **environment(),
        **summarise(run.recipe.folder / "metrics.jsonl"),
        "command": run.command,
        "seed": run.recipe.seed,
        **more,
    }


def _what_to_do(folder: Path, is_interrupted: bool) -> str:
    if is_interrupted:
        return "Continue with --resume auto"
    names = ("samples.png", "curves.png", "summary.md")
    written = [name for name in names if (folder / name).exists()]
    return f"Open {', '.join(written)} in {folder}"


@contextmanager
def _failures_added_to(lost: list[str], name: str) -> Iterator[None]:
    """If the block cannot write, for example on a full disk, prints a line and appends `name` to
    `lost`."""
    try:
        yield
    except (OSError, SettingsError) as error:
        lost.append(name)
        if dist.get_rank() == 0:
            reason = error if isinstance(error, SettingsError) else one_line(error)
            print_line(f"WARNING: {name} could not be written: {reason}")


def after_training(recipe: "Recipe") -> str:
    """Describes what a run does after its last step, if it is not interrupted."""
    if not recipe.checkpoint.export:
        return "the last checkpoint"
    if not recipe.samples.prompts:
        return "the last checkpoint and the export of the model"
    return "the last checkpoint, the export of the model and pictures"


def export(run: CheckedRun, engine: Engine, ema: Ema | None, folder: Path) -> None:
    """Writes the model as a base folder, with the moving average in place of the trained weights,
    one tensor at a time, gathered to rank 0. Collective; raises SettingsError on every rank if rank
    0 could not write."""
    model, named = engine.objective.model, dict(engine.named_parameters())
    adapters = {name: parameter for name, parameter in named.items() if is_adapter(name)}
    parameters = {
        base_name(name): parameter for name, parameter in named.items() if name not in adapters
    }
    tensors: dict[str, torch.Tensor] = {**parameters, **dict(engine.objective.named_buffers())}
    adapted = {PREFIX + module for module in adapted_modules(model)}
    quantised = {PREFIX + base_name(name): module for name, module in quantised_weights(model)}
    base = WeightsFile(run.recipe.base) if run.recipe.base and quantised else None
    model_names = [PREFIX + name for name in meta_tensors(model.shape)]
    extra_names = [name for name in parameters if not name.startswith(PREFIX)]
    not_gathered = iter([*model_names, *extra_names])

    def frozen(name: str) -> torch.Tensor | None:
        """On rank 0 a quantised weight as the base has it."""
        if engine.rank:
            return None
        if base is not None:
            return base.read(bagel_name(name.removeprefix(PREFIX)))
        return quantised[name].dequantised(torch.float32)

    def gather_adapter(part: str) -> torch.Tensor:
        name = PREFIX + part
        if ema is not None:
            return ema.gather(name)
        return gather_shard(adapters[name], master_shard(adapters[name])).cpu()

    def gather(name: str) -> torch.Tensor | None:
        """On rank 0 the tensor. Collective."""
        if ema is not None and name in ema.parameters:
            return ema.gather(name)
        if name in quantised:
            weight = frozen(name)
        else:
            weight = engine.full_parameter(tensors[name], rank=0)
        module = name.removesuffix(".weight")
        if module not in adapted:
            return weight
        # All ranks gather; the first one merges.
        adapter = read_adapted(module.removeprefix(PREFIX), run.recipe.lora, gather_adapter)
        return None if weight is None else weight.float() + adapter.change(weight)

    def read(name: str) -> torch.Tensor:
        assert name == next(not_gathered)
        tensor = gather(name)
        assert tensor is not None, "only rank 0 reads"
        return tensor

    def without_data(names: list[str]) -> dict[str, torch.Tensor]:
        shapes = {
            name: quantised[name].shape if name in quantised else shape_of(tensors[name])
            for name in names
        }
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    with raise_on_all_ranks():
        try:
            if engine.rank == 0:
                with new_folder(folder, replace=True) as part:
                    of_model = {
                        name.removeprefix(PREFIX): tensor
                        for name, tensor in without_data(model_names).items()
                    }
                    write_weights(part, of_model, lambda name: read(PREFIX + name))
                    write_extra(part, without_data(extra_names), read, engine.regression)
                    copy_companions(
                        part, run.recipe.architecture, run.recipe.base, run.recipe.tokenizer_folder
                    )
        finally:
            # On the other ranks, and on rank 0 after a failure: gathering is collective.
            for name in not_gathered:
                gather(name)


def _draw_samples(run: CheckedRun, folder: Path, device: torch.device) -> None:
    """Draws samples.png: the same prompts and noise, sampled with the base, where there is one, and
    with the trained model."""
    models: list[tuple[str, Path]] = []
    if run.recipe.base is None:
        models.append(("trained", folder / "model"))
    else:
        models.append(("base", run.recipe.base))
        label = "after UNO" if run.supervised else "after training"
        models.append((label, folder / "model"))
    rows: list[tuple[str, Any]] = []
    for label, path in models:
        opened = open_model(path, device)
        images = generate(opened.model, opened.codec, run.required_tokenizer, run.recipe.samples)
        rows.append((label, images))
    sample_grid(rows, run.recipe.samples.prompts, folder / "samples.png")
