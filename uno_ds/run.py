"""Prepares a run: reads recipe, base, tokenizer and data, and checks them against each other,
before any process group starts.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from uno_ds.data.files import one_line
from uno_ds.data.lane_states import check_states
from uno_ds.data.layouts import get_layout, planned_layout
from uno_ds.data.samples import SampleMaker
from uno_ds.data.sources import Source
from uno_ds.data.stream import Stream, build_stream
from uno_ds.data.text import Tokenizer
from uno_ds.generation.inference import special_tokens
from uno_ds.objective_checks import warnings_without_generation
from uno_ds.recipe import Recipe, load_recipe, world_size_of_environment
from uno_ds.recipe_checks import warnings_of_budget, warnings_of_recipe
from uno_ds.run_sources import (
    check_negatives,
    check_sources,
    open_held_out,
    open_sources,
    open_tokenizer,
    sample_maker,
)
from uno_ds.settings import SettingsError
from uno_ds.training import checkpoint, run_folder
from uno_ds.training.held_out import HeldOutLosses
from uno_ds.training.launch_environment import names_its_ranks

IDLE = (
    "nothing will train: every source holds conversations, which train the understanding expert, "
    "and model.train is not all; add a t2i or edit source, or set model.train=all."
)


@dataclass(frozen=True, eq=False)
class Run:
    """A checked run, everything that `loop.train` needs. layouts: (name, layout) of every source of
    the recipe, including those that a dry run did not find; tokenizer, make_sample: None where a
    dry run did not find a tokenizer; resume_flag: what was given as --resume."""

    recipe: Recipe
    world_size: int
    tokenizer: Tokenizer | None
    sources: list[Source]
    layouts: list[tuple[str, str]]
    make_sample: SampleMaker | None
    resume: checkpoint.Resume | None
    resume_flag: str
    overwrite: bool
    command: str
    exit_file: Path | None = None
    held_out_sources: list[Source] = field(default_factory=list)

    def held_out(self) -> HeldOutLosses | None:
        """The losses of held-out rows: with all conditions and all supervision at every noise
        level. None without such sources."""
        recipe = self.recipe
        if not self.held_out_sources:
            return None
        whole = dataclasses.replace(
            recipe.sequence,
            drop_text=0.0,
            drop_vit=0.0,
            drop_latent=0.0,
            supervised_fraction=1.0,
            supervision_window=[0.0, 1.0],
        )
        tokenizer = self.required_tokenizer
        objective = dataclasses.replace(
            recipe.objective, caption_weight_by_t=[], regression_weight_by_t=[]
        )
        everywhere = dataclasses.replace(recipe, sequence=whole, objective=objective)
        composer = everywhere.composer(tokenizer)
        settings = recipe.evaluate
        return HeldOutLosses(
            self.held_out_sources,
            sample_maker(recipe, composer, tokenizer),
            recipe.collator(special_tokens(tokenizer)),
            settings.rows,
            settings.times,
            settings.seed,
        )

    def stream(self, rank: int, world_size: int) -> Stream:
        """The packs of one rank. Needs a tokenizer."""
        recipe = self.recipe
        assert self.make_sample is not None, "only a dry run has none"
        return build_stream(
            self.sources,
            self.make_sample,
            recipe.collator(special_tokens(self.required_tokenizer)),
            recipe.data,
            recipe.seed,
            recipe.engine.resolved_packs_per_step(),
            rank,
            world_size,
            recipe.supervision_schedule,
            recipe.objective.used_negative_source == "pack",
        )

    @property
    def required_tokenizer(self) -> Tokenizer:
        """The tokenizer of a run that trains."""
        assert self.tokenizer is not None, "only a dry run has none"
        return self.tokenizer

    @property
    def supervised(self) -> bool:
        objective = self.recipe.objective
        return objective.caption_weight > 0 or objective.regression_weight > 0

    @property
    def read_answers(self) -> bool:
        if not self.recipe.objective.answer_weight > 0:
            return False
        return any(get_layout(layout).has_answers for _, layout in self.layouts)

    @property
    def idle(self) -> bool:
        """Whether no sample contributes to the gradient of a trained weight."""
        if self.recipe.model.trains_everything:
            return False
        answers = self.recipe.objective.answer_weight > 0
        layouts = [get_layout(layout) for _, layout in self.layouts]
        sequence = self.recipe.sequence
        return not any(layout.trains_generation(sequence, answers) for layout in layouts)

    @property
    def warnings(self) -> list[str]:
        """A line for each setting that has no effect in this run."""
        recipe = self.recipe
        warnings = [IDLE] if self.idle else []
        generates = any(get_layout(layout).generates_images for _, layout in self.layouts)
        if self.layouts and not self.idle and not generates:
            warnings += warnings_without_generation(recipe.objective)
        if self.tokenizer is not None:
            warnings += self.tokenizer.warnings()
        warnings += warnings_of_recipe(recipe)
        largest = recipe.largest_samples(layout for _, layout in self.layouts)
        rows = [(source.layout, len(source)) for source in self.sources]
        is_streamed = any(source.is_streamed for source in self.sources)
        is_complete = len(rows) == len(self.layouts) and not is_streamed
        warnings += warnings_of_budget(recipe, largest, rows if is_complete else [])
        return warnings


def load(
    name_or_file: str,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    absent: list[str] | None = None,
) -> tuple[Recipe, int]:
    """(the recipe, its number of ranks), checked against each other. The number is `world_size`,
    else the launcher's, else, for a dry run (`absent`), that of the recipe. Raises
    SettingsError."""
    recipe = load_recipe(name_or_file, list(overrides), absent)
    planned = recipe.hardware.gpus if absent is not None and not names_its_ranks() else None
    ranks = world_size or planned or world_size_of_environment()
    if recipe.engine.packs_per_step is None:
        engine = dataclasses.replace(recipe.engine, packs_per_step=ranks)
        recipe = dataclasses.replace(recipe, engine=engine)
    recipe.check_world(ranks)
    return recipe, ranks


def prepare(
    name_or_file: str,
    overrides: Sequence[str] = (),
    *,
    resume: str = "never",
    overwrite: bool = False,
    reads_only: bool = False,
    world_size: int | None = None,
    absent: list[str] | None = None,
    command: str = "",
    exit_file: Path | None = None,
) -> Run:
    """Reads a recipe with `overrides` ("KEY=VALUE"), its tokenizer and its sources, and checks them
    against each other. Raises SettingsError.

    resume: "auto", "never" or a checkpoint. overwrite: what an earlier run left in the run's folder
    may be moved aside. reads_only: the run's folder is not written, as by a benchmark of its steps,
    so it may hold a run. world_size: as in `load`. absent: for a dry run; if the recipe is planned
    for another machine, a base, tokenizer or source that is not here is skipped, and a line is
    appended to this list. Warnings are appended to it too; without it they are printed. command,
    exit_file: kept in the Run.
    """
    recipe, ranks = load(name_or_file, overrides, world_size=world_size, absent=absent)
    missing = absent if recipe.planned else None
    recipe.check_base(missing)
    _check_folder("output", recipe.folder)
    _check_folder("data.folder", Path(recipe.data.folder))
    found = None if reads_only else _check_start(recipe, resume, overwrite, absent)
    tokenizer = open_tokenizer(recipe, missing)
    sources = open_sources(recipe, tokenizer, missing)
    layouts = _layouts(recipe, sources)
    recipe.check_data(layouts, tokenizer)
    make_sample = None
    if tokenizer is not None:
        make_sample = sample_maker(recipe, recipe.composer(tokenizer), tokenizer)
        check_sources(sources, make_sample, absent)
        if recipe.objective.used_negative_source == "column" and sources:
            check_negatives(sources.values())
    if found is not None and found.candidates:
        _, manifest = found.candidates[0]
        packs_per_step = recipe.engine.resolved_packs_per_step()
        check_states(manifest["lanes"], list(sources.values()), packs_per_step)
    return Run(
        recipe=recipe,
        world_size=ranks,
        tokenizer=tokenizer,
        sources=list(sources.values()),
        layouts=layouts,
        make_sample=make_sample,
        resume=found,
        resume_flag=resume,
        overwrite=overwrite,
        command=command,
        exit_file=exit_file,
        held_out_sources=open_held_out(recipe, tokenizer, missing),
    )


def _layouts(recipe: Recipe, sources: dict[int, Source]) -> list[tuple[str, str]]:
    """(name, layout) of every source. For one that is not here, it is the layout that the recipe
    names, or the default for planning."""
    layouts = []
    for number, settings in enumerate(recipe.data.sources):
        if number in sources:
            layouts.append((sources[number].name, sources[number].layout))
        else:
            layouts.append((settings.path, planned_layout(settings.layout)))
    return layouts


def _check_start(
    recipe: Recipe, resume: str, overwrite: bool, warnings: list[str] | None
) -> checkpoint.Resume | None:
    """The checkpoints that the run may continue from, if any. Raises SettingsError if it would
    overwrite what an earlier run left; with `warnings`, for a dry run, a line is appended there
    instead."""
    folder = recipe.folder
    try:
        run_folder.check_folder(folder, resume, overwrite)
    except SettingsError as error:
        if warnings is None:
            raise
        warnings.append(str(error))
    if overwrite:
        run_folder.check_overwrite(folder, _paths_used(recipe))
    return checkpoint.find(folder / "checkpoints", resume)


def _paths_used(recipe: Recipe) -> dict[str, Path]:
    """Files and folders that the run reads, by the key that names them."""
    named: dict[str, Path | str | None] = {
        "model.base": recipe.base,
        "model.tokenizer": recipe.tokenizer_folder,
        "model.adapter": recipe.model.adapter,
        "engine.deepspeed": recipe.engine.deepspeed,
        "data.folder": recipe.data.folder,
    }
    for number, source in enumerate(recipe.data.sources):
        named[f"data.sources.{number}.path"] = source.path
    return {key: Path(path) for key, path in named.items() if path is not None}


def _check_folder(key: str, folder: Path) -> None:
    """Raises SettingsError unless the folder exists or can be made; makes nothing."""
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if existing.is_dir() and os.access(existing, os.W_OK):
            return
        reason = f"'{existing}' is not a folder that can be written to"
    except (OSError, ValueError) as error:
        reason = one_line(error)
    raise SettingsError(key, f"'{folder}' cannot be made: {reason}.")
