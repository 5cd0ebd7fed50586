"""`train.py --dry-run`: checks a run without starting it, and estimates its parameters, memory and
traffic, for this machine or a planned one."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from uno_ds.commands.json_output import write_json
from uno_ds.commands.runner import print_files
from uno_ds.cost.fit import LARGEST_BUDGET, largest_budget, needs_of, sharding_of
from uno_ds.cost.hardware import GPUS
from uno_ds.cost.memory import Memory
from uno_ds.cost.parameters import count_by_part, parameters_of
from uno_ds.cost.scenario import Scenario, packs_of_run
from uno_ds.cost.traffic import Traffic, traffic
from uno_ds.data.source_checks import file_notes, file_warnings
from uno_ds.recipe import Recipe
from uno_ds.run import Run
from uno_ds.settings import SettingsError


@dataclass(frozen=True)
class Estimate:
    """What one rank of a run needs. `memory`: with the pack of `packs` whose peak is the largest.
    `fits`: whether the peak is within the memory of `gpu`; None without one."""

    parameters: dict[str, dict[str, int]]
    packs: dict[str, Scenario]
    largest: str  # name of that pack
    memory: Memory
    traffic: Traffic
    gpu: str | None
    fits: bool | None


def estimate(
    recipe: Recipe, ranks: int, layouts: Iterable[str], given: Scenario | None = None
) -> Estimate:
    """For the fullest packs of these layouts, or for the given one."""
    gpu = recipe.hardware.gpu
    parameters = parameters_of(recipe)
    sharding = sharding_of(recipe, ranks)
    packs = {"given": given} if given else packs_of_run(recipe, layouts)
    needs = needs_of(recipe, parameters, sharding, packs)
    largest = max(needs, key=lambda name: needs[name].peak)
    return Estimate(
        parameters=count_by_part(parameters),
        packs=packs,
        largest=largest,
        memory=needs[largest],
        traffic=traffic(parameters, sharding, recipe.model.recompute),
        gpu=gpu,
        fits=needs[largest].peak <= GPUS[gpu].memory if gpu else None,
    )


def dry_run(
    run: Run, warnings: list[str], *, execute: bool, fit: bool, as_json: bool, is_printing: bool
) -> int:
    """Estimates what a checked run needs and prints it; the exit code is 1 if it does not fit the
    GPU. `execute`: also runs a step of a narrow model. `fit`: also finds the largest token budget
    that the GPU holds. `is_printing`: the first rank of a machine prints and executes, the others
    only estimate."""
    layouts = [layout for _, layout in run.layouts]
    gpu = run.recipe.hardware.gpu
    if fit and gpu is None:
        raise SettingsError(
            "--fit", f"needs a GPU to fit: --set hardware.gpu=NAME, one of {', '.join(GPUS)}."
        )
    estimated = estimate(run.recipe, run.world_size, layouts)
    exit_code = 1 if estimated.fits is False else 0
    if not is_printing:
        return exit_code
    fitting = None
    if fit and gpu is not None:
        fitting = largest_budget(run.recipe, run.world_size, layouts, GPUS[gpu].memory)
    executed = None
    if execute:
        from uno_ds.commands.fake_ranks import run_one_step

        executed = run_one_step(run)
    if as_json:
        write_json(
            _plain(run, estimated, warnings, executed)
            | ({"largest_token_budget": fitting} if fit else {})
        )
    else:
        _print(run, estimated, warnings, executed)
        if fit and gpu is not None:
            print(_sentence_of_fit(run, gpu, fitting))
    return exit_code


def _sentence_of_fit(run: Run, gpu: str, budget: int | None) -> str:
    if budget is None:
        largest = max(run.recipe.largest_samples(layout for _, layout in run.layouts).values())
        return f"{gpu} does not hold even a pack of the largest sample, {largest:,} tokens."
    more = " or more" if budget == LARGEST_BUDGET else ""
    return (
        f"largest sequence.token_budget that fits a {gpu}, by the estimate: {budget:,}{more} "
        f"(the recipe has {run.recipe.sequence.token_budget:,})"
    )


def bytes_of(estimated: Estimate) -> dict[str, Any]:
    """The parts of the JSON output that are in bytes."""
    sizes = {
        "resident": estimated.memory.resident,
        "working": estimated.memory.working,
        "update": estimated.memory.update,
        "host": estimated.memory.host,
        "peak": estimated.memory.peak,
    }
    return {
        "bytes_per_rank": sizes,
        "bytes_sent_per_step": {**asdict(estimated.traffic), "total": estimated.traffic.total},
        "gpu": _gpu(estimated),
    }


def _gpu(estimated: Estimate) -> dict[str, Any] | None:
    name = estimated.gpu
    if name is None:
        return None
    return {"name": name, "memory": GPUS[name].memory, "fits": estimated.fits}


def _plain(
    run: Run, estimated: Estimate, warnings: list[str], executed: dict[str, Any] | None
) -> dict[str, Any]:
    all_warnings = list(warnings)
    notes: list[str] = []
    unreadable: dict[str, str] = {}
    for source in run.sources:
        all_warnings += file_warnings(source)
        notes += file_notes(source)
        unreadable |= source.unreadable_files
    return {
        "recipe": run.recipe.name,
        "world_size": run.world_size,
        "in_order": True,
        "warnings": all_warnings,
        "notes": notes,
        "unreadable_files": unreadable,
        "parameters": {**_totals(estimated), "by_part": estimated.parameters},
        "supervised_steps": run.recipe.supervised_steps,
        "packs": {layout: asdict(pack) for layout, pack in estimated.packs.items()},
        **bytes_of(estimated),
        "executed": executed,
    }


def _totals(estimated: Estimate) -> dict[str, int]:
    """Parameters of all parts."""
    totals = {"trainable": 0, "frozen": 0}
    for counts in estimated.parameters.values():
        for kind in totals:
            totals[kind] += counts[kind]
    return totals


def _print(
    run: Run, estimated: Estimate, warnings: list[str], executed: dict[str, Any] | None
) -> None:
    for warning in warnings:
        print(f"warning: {warning}")
    print_files(run.sources)
    print(_verdict(run, warnings))
    _print_parameters(estimated)
    for layout, pack in estimated.packs.items():
        print(
            f"\nfullest pack of {layout}: {pack.tokens:,} tokens in {pack.samples} sample(s); "
            f"{pack.context:,} context, {pack.supervision:,} supervision, "
            f"{pack.generation:,} latents"
        )
    print_supervised_steps(run.recipe)
    print_bytes(run.world_size, estimated)
    if executed:
        print(
            f"\none step as rank 0 of {executed['ranks']}, {executed['parameters']:,} parameters, "
            f"ZeRO stage {executed['stage']}, "
            f"{executed['precision']} on {executed['device']}: "
            f"{executed['seconds']:.1f} s; {executed['proves']}"
        )


def _verdict(run: Run, warnings: list[str]) -> str:
    recipe = run.recipe
    checked = "the recipe, its base and its data are"
    if recipe.planned and warnings:
        checked = "the recipe and what is present of its base and data are"
    unreadable = sum(len(source.unreadable_files) for source in run.sources)
    exception = f" except for {unreadable} unreadable data file(s)" if unreadable else ""
    return (
        f"{recipe.name}: {checked} valid{exception} for {run.world_size} rank(s); "
        "nothing was started."
    )


def _print_parameters(estimated: Estimate) -> None:
    print(f"\n{'parameters':<36}{'trainable':>16}{'frozen':>16}")
    for part, counts in {**estimated.parameters, "all": _totals(estimated)}.items():
        print(f"  {part:<34}{counts['trainable']:>16,}{counts['frozen']:>16,}")


def print_supervised_steps(recipe: Recipe) -> None:
    """Nothing where supervision does not end."""
    if recipe.supervised_steps < recipe.steps:
        print(
            f"\nsupervision ends after step {recipe.supervised_steps:,} of {recipe.steps:,}; later "
            "steps are those of flow matching"
        )


def print_bytes(ranks: int, estimated: Estimate) -> None:
    """Prints memory and traffic of one rank."""
    print(f"\n{f'one rank of {ranks}, in GB':<36}")
    sections = {
        "held all the time": estimated.memory.resident,
        "more in forward and backward": estimated.memory.working,
        "more in the optimizer's step": estimated.memory.update,
        "main memory": estimated.memory.host,
    }
    for title, sizes in sections.items():
        _print_sizes(title, sizes)
    print(f"  {'peak (the estimate)':<34}{_gigabytes(estimated.memory.peak)}")
    sent = estimated.traffic
    print(
        f"  {'sent in a step':<34}{_gigabytes(sent.total)}   weights "
        f"{sent.gather_weights / 1e9:.1f}, within the node {sent.gather_within_node / 1e9:.1f}, "
        f"gradients {sent.reduce_gradients / 1e9:.1f}"
    )
    if estimated.gpu:
        verdict = "fits" if estimated.fits else "DOES NOT FIT"
        print(f"\n{estimated.gpu} ({GPUS[estimated.gpu].memory / 1e9:.0f} GB): {verdict}")


def _print_sizes(title: str, sizes: dict[str, int]) -> None:
    """The sum and the parts that are not 0."""
    total = sum(sizes.values())
    if not total:
        return
    print(f"  {title:<34}{_gigabytes(total)}")
    for name, size in sizes.items():
        if size:
            print(f"    {name:<32}{_gigabytes(size)}")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:>10.2f}"
