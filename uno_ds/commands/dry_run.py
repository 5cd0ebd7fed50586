"""`train.py --dry-run`: what a run is made of and what it needs, without starting it, for this machine or a planned one."""

import argparse
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from uno_ds.commands.json_output import write_json
from uno_ds.commands.train import Run, prepare, print_files
from uno_ds.cost.hardware import GPUS
from uno_ds.cost.memory import Memory, Sharding, memory
from uno_ds.cost.parameters import count_by_part, parameters_of
from uno_ds.cost.scenario import Scenario, fullest_packs
from uno_ds.cost.traffic import Traffic, traffic
from uno_ds.data.sources import file_notes, file_warnings
from uno_ds.recipe import Recipe


@dataclass(frozen=True)
class Estimate:
    """What one rank of a run needs. `memory` is that of the pack in `packs` that needs most, `neediest`."""

    parameters: dict[str, dict[str, int]]
    packs: dict[str, Scenario]
    neediest: str
    memory: Memory
    traffic: Traffic
    gpu: str | None
    fits: bool | None


def estimate(
    recipe: Recipe, ranks: int, layouts: Iterable[str], given: Scenario | None = None
) -> Estimate:
    """For the fullest packs of these layouts, or for the given one."""
    gpu = recipe.hardware.gpu
    precision = (
        "bf16" if recipe.engine.precision == "auto" and gpu else recipe.engine.resolved_precision()
    )
    parameters, sharding = parameters_of(recipe), Sharding.of(recipe, ranks, precision)
    packs = {"given": given} if given else fullest_packs(recipe, layouts)
    needs = {
        name: memory(
            parameters,
            recipe.architecture,
            sharding,
            pack,
            recipe.model.recompute,
            average=recipe.optimizer.ema > 0,
            image_pixels=recipe.data.latent_image.max_pixels,
            codec_bytes=2 if recipe.model.codec_precision == "bf16" else 4,
            attention=recipe.kernels.resolved().attention,
        )
        for name, pack in packs.items()
    }
    neediest = max(needs, key=lambda name: needs[name].peak)
    return Estimate(
        count_by_part(parameters),
        packs,
        neediest,
        needs[neediest],
        traffic(parameters, sharding, recipe.model.recompute),
        gpu,
        needs[neediest].peak <= GPUS[gpu].memory if gpu else None,
    )


def dry_run(options: argparse.Namespace, speaks: bool) -> int:
    """Checks and estimates; returns the exit code. Raises SettingsError for a mistake."""
    warnings: list[str] = []
    run = prepare(options, warnings)
    warnings += run.warnings
    told = estimate(run.recipe, run.world_size, [layout for _, layout in run.layouts])
    executed = None
    if options.execute and speaks:
        from uno_ds.commands.fake_ranks import run_one_step

        executed = run_one_step(run)
    if speaks:
        if options.json:
            write_json(_plain(run, told, warnings, executed))
        else:
            _print(run, told, warnings, executed)
    return 1 if told.fits is False else 0


def bytes_of(told: Estimate) -> dict[str, Any]:
    """The parts of the JSON answer that tell bytes."""
    needs = {
        "resident": told.memory.resident,
        "working": told.memory.working,
        "update": told.memory.update,
        "host": told.memory.host,
        "peak": told.memory.peak,
    }
    return {
        "bytes_per_rank": needs,
        "bytes_sent_per_step": {**asdict(told.traffic), "total": told.traffic.total},
        "gpu": {"name": told.gpu, "memory": GPUS[told.gpu].memory, "fits": told.fits}
        if told.gpu
        else None,
    }


def _plain(
    run: Run, told: Estimate, warnings: list[str], executed: dict[str, Any] | None
) -> dict[str, Any]:
    totals = {
        kind: sum(part[kind] for part in told.parameters.values())
        for kind in ("trainable", "frozen")
    }
    return {
        "recipe": run.recipe.name,
        "world_size": run.world_size,
        "in_order": True,
        "warnings": [
            *warnings,
            *(line for source in run.sources for line in file_warnings(source)),
        ],
        "notes": [line for source in run.sources for line in file_notes(source)],
        "unreadable_files": {
            file: reason
            for source in run.sources
            for file, reason in source.unreadable_files.items()
        },
        "parameters": {**totals, "by_part": told.parameters},
        "packs": {layout: asdict(pack) for layout, pack in told.packs.items()},
        **bytes_of(told),
        "executed": executed,
    }


def _print(run: Run, told: Estimate, warnings: list[str], executed: dict[str, Any] | None) -> None:
    recipe = run.recipe
    for warning in warnings:
        print(f"warning: {warning}")
    print_files(run.sources)
    checked = (
        "the recipe and what there is of base and data are"
        if recipe.planned and warnings
        else "the recipe, its base and its data are"
    )
    unreadable = sum(len(source.unreadable_files) for source in run.sources)
    but = f" but for {unreadable} unreadable data file(s)" if unreadable else ""
    print(
        f"{recipe.name}: {checked} in order{but} for {run.world_size} rank(s); nothing was started."
    )
    print(f"\n{'parameters':<36}{'trainable':>16}{'frozen':>16}")
    for part, counts in told.parameters.items():
        print(f"  {part:<34}{counts['trainable']:>16,}{counts['frozen']:>16,}")
    print(
        f"  {'all':<34}"
        + "".join(
            f"{sum(part[kind] for part in told.parameters.values()):>16,}"
            for kind in ("trainable", "frozen")
        )
    )
    for layout, pack in told.packs.items():
        print(
            f"\nfullest pack of {layout}: {pack.tokens:,} tokens in {pack.samples} sample(s); {pack.context:,} context, {pack.supervision:,} supervision, "
            f"{pack.generation:,} latents"
        )
    print_bytes(run.world_size, told)
    if executed:
        print(
            f"\none step as rank 0 of {executed['ranks']}, {executed['parameters']:,} parameters, ZeRO stage {executed['stage']}, "
            f"{executed['precision']} on {executed['device']}: "
            f"{executed['seconds']:.1f} s; {executed['proves']}"
        )


def print_bytes(ranks: int, told: Estimate) -> None:
    print(f"\n{'one rank of ' + str(ranks) + ', in GB':<36}")
    for title, sizes in (
        ("held all the time", told.memory.resident),
        ("more in forward and backward", told.memory.working),
        ("more in the optimizer's step", told.memory.update),
        ("main memory", told.memory.host),
    ):
        if sum(sizes.values()):
            print(f"  {title:<34}{_gigabytes(sum(sizes.values()))}")
            for name, size in sizes.items():
                if size:
                    print(f"    {name:<32}{_gigabytes(size)}")
    print(f"  {'peak (the estimate)':<34}{_gigabytes(told.memory.peak)}")
    sent = told.traffic
    print(
        f"  {'sent in a step':<34}{_gigabytes(sent.total)}   weights {sent.gather_weights / 1e9:.1f}, within the node {sent.gather_within_node / 1e9:.1f}, "
        f"gradients {sent.reduce_gradients / 1e9:.1f}"
    )
    if told.gpu:
        print(
            f"\n{told.gpu} ({GPUS[told.gpu].memory / 1e9:.0f} GB): {'fits' if told.fits else 'DOES NOT FIT'}"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:>10.2f}"
