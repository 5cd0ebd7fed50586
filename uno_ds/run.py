"""A run before it starts: recipe, base, tokenizer and data, read and checked against each other.

Everything that can be wrong with a run is found here, before any process group starts.
"""

import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uno_ds.data.files import one_line
from uno_ds.data.layouts import get_layout, planned_layout
from uno_ds.data.listing import find
from uno_ds.data.prepared import PreparedSource, is_prepared
from uno_ds.data.samples import SampleMaker
from uno_ds.data.sources import EMBEDDED, Source, SourceSettings, check_readable, check_usable
from uno_ds.data.stream import Stream, build_stream, check_states
from uno_ds.data.text import Tokenizer
from uno_ds.generation.inference import special_tokens
from uno_ds.objectives.preparation import encoding_of
from uno_ds.recipe import Recipe, load_recipe, world_size_of_environment
from uno_ds.recipe_checks import warnings_of_budget, warnings_of_recipe
from uno_ds.settings import SettingsError, printable
from uno_ds.training import checkpoint, run_folder
from uno_ds.training.launch_environment import is_first_here, names_its_ranks

IDLE = (
    "nothing will train: every source holds conversations, which train the understanding expert, "
    "and model.train is not all; add a t2i or edit source, or set model.train=all."
)


@dataclass(frozen=True, eq=False)
class Run:
    """A checked run: what `loop.train` needs and has not to look for. layouts: (name, layout) of
    every source of the recipe, those that a dry run did not find included; tokenizer: None where a
    dry run did not find one; resume_flag: what was given as --resume."""

    recipe: Recipe
    world_size: int
    tokenizer: Tokenizer | None
    sources: list[Source]
    layouts: list[tuple[str, str]]
    make_sample: SampleMaker
    resume: checkpoint.Resume | None
    resume_flag: str
    overwrite: bool
    command: str
    exit_file: Path | None = None

    def stream(self, rank: int, world_size: int) -> Stream:
        recipe = self.recipe
        return build_stream(
            self.sources,
            self.make_sample,
            recipe.collator(special_tokens(self.tokenizer)),
            recipe.data,
            recipe.seed,
            recipe.engine.packs_per_step,
            rank,
            world_size,
        )

    @property
    def supervised(self) -> bool:
        return (
            self.recipe.objective.caption_weight > 0 or self.recipe.objective.regression_weight > 0
        )

    @property
    def read_answers(self) -> bool:
        return self.recipe.objective.answer_weight > 0 and any(
            get_layout(layout).has_answers for _, layout in self.layouts
        )

    @property
    def idle(self) -> bool:
        """No sample reaches a weight that trains."""
        if self.recipe.model.train == "all":
            return False
        answers = self.recipe.objective.answer_weight > 0
        layouts = [get_layout(layout) for _, layout in self.layouts]
        sequence = self.recipe.sequence
        return not any(layout.trains_generation(sequence, answers) for layout in layouts)

    @property
    def warnings(self) -> list[str]:
        """What would have no effect, a line each."""
        recipe = self.recipe
        largest = recipe.largest_samples(layout for _, layout in self.layouts)
        rows = [(source.layout, len(source)) for source in self.sources]
        return [
            *([IDLE] if self.idle else []),
            *(self.tokenizer.warnings() if self.tokenizer else []),
            *warnings_of_recipe(recipe),
            *warnings_of_budget(recipe, largest, rows if len(rows) == len(self.layouts) else []),
        ]


def load(
    name_or_file: str,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    absent: list[str] | None = None,
) -> tuple[Recipe, int]:
    """The recipe for its number of ranks, and that number: `world_size`, else the launcher's, else,
    for a dry run (`absent`), that of the recipe. Raises SettingsError."""
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
    so it may hold a run. world_size: default as in `load`. absent: for the dry run of a recipe that
    is planned for another machine; a base, tokenizer or source that is not here is left out, with a
    line in this list, which receives warnings too; otherwise they are printed. command, exit_file:
    the start's own, kept in the Run.
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
    make_sample = SampleMaker(
        recipe.composer(tokenizer),
        tokenizer,
        recipe.data.latent_image,
        recipe.data.vit_image,
        recipe.sequence.token_budget,
    )
    if tokenizer is not None:
        for number, source in sources.items():
            _check_rows(number, source, make_sample)
            warning = _left_out_texts(number, source)
            if warning and absent is not None:
                absent.append(warning)
            elif warning:
                warn(warning)
    if found is not None and found.candidates:
        _, manifest = found.candidates[0]
        check_states(manifest["lanes"], len(sources), recipe.engine.packs_per_step)
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
    )


def warn(line: str) -> None:
    """Prints a warning, on the first rank of the machine."""
    if is_first_here():
        print(f"warning: {line}", flush=True)


def _layouts(recipe: Recipe, sources: dict[int, Source]) -> list[tuple[str, str]]:
    """(name, layout) of every source. One that is not here, and whose layout the recipe does not
    name, is planned as the usual one."""
    layouts = []
    for number, settings in enumerate(recipe.data.sources):
        if number in sources:
            layouts.append((sources[number].name, sources[number].layout))
        else:
            layouts.append((settings.path, planned_layout(settings.layout)))
    return layouts


def _check_rows(number: int, source: Source, make_sample: SampleMaker) -> None:
    """Raises SettingsError if no row of the source can be used."""

    def report(line: str) -> None:
        if is_first_here():
            print(line, file=sys.stderr, flush=True)

    try:
        check_usable(source, lambda example: make_sample(example, np.random.default_rng(0)), report)
    except SettingsError as error:
        raise error.under(f"data.sources.{number}") from None


def _left_out_texts(number: int, source: Source) -> str | None:
    """A warning about texts that are taken for metadata, if there are any."""
    if not source.left_out_keys:
        return None
    keys = printable(", ".join(source.left_out_keys))
    return (
        f"data.sources.{number}.caption_keys: source '{source.name}' has texts under {keys}, which "
        "are taken for metadata and left out; name the keys of captions there to choose."
    )


def _check_start(
    recipe: Recipe, resume: str, overwrite: bool, warnings: list[str] | None
) -> checkpoint.Resume | None:
    """The checkpoints that the run may continue from, if any. Raises SettingsError if it would
    overwrite what an earlier run left; a dry run, whose start has not come yet, gets a line in
    `warnings` instead."""
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


def open_tokenizer(recipe: Recipe, absent: list[str] | None = None) -> Tokenizer | None:
    folder = recipe.tokenizer_folder
    if (
        absent is not None
        and not list(folder.glob("*token*"))
        and not (folder / "vocab.json").exists()
    ):
        if recipe.model.base != recipe.model.published_shape:
            absent.append(f"model.tokenizer: there is none in {folder}.")
        return None
    try:
        return Tokenizer(folder)
    except (SettingsError, OSError) as error:
        raise SettingsError(
            "model.tokenizer",
            error.message if isinstance(error, SettingsError) else one_line(error),
        ) from None


def open_sources(
    recipe: Recipe, tokenizer: Tokenizer | None, absent: list[str] | None = None
) -> dict[int, Source]:
    """The opened sources by their number; those that have the same name by their paths are
    numbered. Raises SettingsError, also for one that was prepared otherwise than the recipe asks
    for. absent: as in `prepare`."""
    sources: dict[int, Source] = {}
    names: Counter[str] = Counter()
    for number, settings in enumerate(recipe.data.sources):
        try:
            if absent is not None and settings.path not in EMBEDDED and not find(settings.path):
                absent.append(
                    f"data.sources.{number}.path: '{settings.path}' holds no data here, so none "
                    "was checked."
                )
                continue
            source = _open_source(recipe, settings, tokenizer)
        except SettingsError as error:
            raise error.under(f"data.sources.{number}") from None
        # A path that cannot exist: too long, of an unknown ~user, ".".
        except (OSError, RuntimeError, ValueError) as error:
            raise SettingsError(
                f"data.sources.{number}.path",
                f"'{settings.path}' cannot be opened: {one_line(error)}",
            ) from None
        names[source.name] += 1
        if names[source.name] > 1:
            source.name += f" ({names[source.name]})"
        sources[number] = source
    return sources


def _open_source(recipe: Recipe, settings: SourceSettings, tokenizer: Tokenizer | None) -> Source:
    data = recipe.data
    if is_prepared(settings.path):
        prepared = PreparedSource(settings)
        if tokenizer is not None and not recipe.missing_files:
            prepared.check(encoding_of(recipe, tokenizer, prepared.layout))
        return prepared
    source = Source(settings, decoding=data.latent_image, embedded=data.scenes, root=data.folder)
    check_readable(source, data.max_unreadable_fraction)
    return source


def _check_folder(key: str, folder: Path) -> None:
    """The folder exists or can be made; nothing is made."""
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if there.is_dir() and os.access(there, os.W_OK):
            return
        reason = f"'{there}' is not a folder that can be written to"
    except (OSError, ValueError) as error:
        reason = one_line(error)
    raise SettingsError(key, f"'{folder}' cannot be made: {reason}.")
