"""The command line of training: everything that can be wrong with a run is found here, before any process group starts."""

import argparse
import dataclasses
import faulthandler
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from uno_ds.data.files import one_line
from uno_ds.data.listing import find
from uno_ds.data.prepared import PreparedSource, is_prepared
from uno_ds.data.samples import SampleMaker
from uno_ds.data.sources import (
    EMBEDDED,
    Source,
    check_readable,
    check_usable,
    file_notes,
    file_warnings,
)
from uno_ds.data.stream import Stream, build_stream, check_states
from uno_ds.data.text import Tokenizer
from uno_ds.generation.inference import special_tokens
from uno_ds.objectives.preparation import encoding_of
from uno_ds.recipe import Recipe, load_recipe, world_size_of_environment
from uno_ds.sequence.packing import Collator
from uno_ds.settings import SettingsError, printable
from uno_ds.training import checkpoint

IDLE = (
    "nothing will train: every source holds conversations, which train the understanding expert, and model.train is generation; add a t2i or "
    "edit source, or set model.train=all."
)
EXIT_CODES = """exit codes: 0 trained to the end or interrupted and saved, or, with --dry-run, in order; 1 failed, or, with --dry-run, does
not fit the GPU that the recipe names; 2 a mistake in the recipe, a flag, the base or the data; 3 the run ended itself; 75 a rank made no
progress. A dry run of a recipe that names
its GPU (hardware.gpu) takes a base or data that are absent here for absent, warns and goes on; whatever is there is checked."""


@dataclass(frozen=True, eq=False)
class Run:
    """A checked run: what `loop.train` needs and has not to look for. layouts: (name, layout) of every source of the recipe,
    those that a dry run did not find included; tokenizer: None where a dry run did not find one."""

    recipe: Recipe
    world_size: int
    tokenizer: Tokenizer | None
    sources: list[Source]
    layouts: list[tuple[str, str]]
    make_sample: SampleMaker
    resume: checkpoint.Resume | None
    command: str

    def stream(self, rank: int, world_size: int) -> Stream:
        recipe = self.recipe
        collate = Collator(
            recipe.architecture.geometry,
            special_tokens(self.tokenizer),
            train_understanding=recipe.model.train == "all",
            stop_at_context=recipe.sequence.context_gradient == "stop",
        )
        return build_stream(
            self.sources,
            self.make_sample,
            collate,
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
            layout == "vlm" for _, layout in self.layouts
        )

    @property
    def idle(self) -> bool:
        """No sample reaches a weight that trains: answers, whose pictures come through the frozen visual encoder."""
        recipe = self.recipe
        conversations = all(layout == "vlm" for _, layout in self.layouts)
        return (
            recipe.model.train == "generation"
            and conversations
            and not (self.read_answers and recipe.sequence.conversation_images != "vit")
        )


def main(arguments: Sequence[str] | None = None) -> int:
    name_data_files_when_killed()
    try:
        options = parse(arguments)
        if options.dry_run:
            from uno_ds.commands.dry_run import dry_run

            return dry_run(options, speaks=_speaks())
        run = prepare(options)
        if run.idle:
            _warn(IDLE)
        for warning in run.tokenizer.warnings():
            _warn(warning)
        if _speaks():
            print_files(run.sources)
        from uno_ds.training.loop import train

        # Not of a dry run, which may check the recipe of another machine, with backends that this one has not.
        shape = run.recipe.architecture
        run.recipe.kernels.resolved().check_heads(
            shape.head_dim, shape.vit_hidden // shape.vit_heads
        )
        return train(run, options.max_hours)
    except SettingsError as error:
        return _refuse(error)


def load(options: argparse.Namespace, absent: list[str] | None = None) -> tuple[Recipe, int]:
    """The recipe for its number of ranks, and that number: --world-size, else the launcher's, else, for a dry run (`absent`),
    that of the recipe."""
    overrides = [
        *(options.set or []),
        *([f"engine.deepspeed={options.ds_config}"] if options.ds_config else []),
    ]
    recipe = load_recipe(options.recipe, overrides, absent)
    planned = (
        recipe.hardware.gpus if absent is not None and "WORLD_SIZE" not in os.environ else None
    )
    world_size = options.world_size or planned or world_size_of_environment()
    if recipe.engine.packs_per_step is None:
        recipe = dataclasses.replace(
            recipe, engine=dataclasses.replace(recipe.engine, packs_per_step=world_size)
        )
    recipe.check_world(world_size)
    return recipe, world_size


def prepare(options: argparse.Namespace, absent: list[str] | None = None) -> Run:
    """Reads the recipe, the tokenizer and the sources and checks them against each other. Raises SettingsError.

    With `absent`, for the dry run of a recipe that is planned for another machine, a base, tokenizer or source that is
    not here is told there instead, and left out.
    """
    recipe, world_size = load(options, absent)
    away = absent if recipe.planned else None
    recipe.check_base(away)
    _check_folder("output", recipe.folder)
    _check_folder("data.folder", Path(recipe.data.folder))
    tokenizer = open_tokenizer(recipe, away)
    sources = open_sources(recipe, tokenizer, away)
    # A source that is not here and does not say its layout is planned as the usual one.
    layouts = [
        (sources[number].name, sources[number].layout)
        if number in sources
        else (settings.path, settings.layout.replace("auto", "t2i"))
        for number, settings in enumerate(recipe.data.sources)
    ]
    recipe.check_data(layouts, tokenizer)
    make_sample = SampleMaker(
        recipe.layout(tokenizer),
        tokenizer,
        recipe.data.latent_image,
        recipe.data.vit_image,
        recipe.sequence.token_budget,
    )
    tell = _warn if absent is None else absent.append
    for number, source in sources.items() if tokenizer else ():
        try:
            check_usable(
                source,
                lambda example: make_sample(example, np.random.default_rng(0)),
                lambda line: print(line, file=sys.stderr, flush=True) if _speaks() else None,
            )
        except SettingsError as error:
            raise error.under(f"data.sources.{number}") from None
        if source.left_out_keys:
            keys = printable(", ".join(source.left_out_keys))
            tell(
                f"data.sources.{number}.caption_keys: source '{source.name}' has texts under {keys}, "
                "which are taken for metadata and left out; name the keys of captions there to choose."
            )
    resume = checkpoint.find(recipe.folder / "checkpoints", options.resume)
    if resume is not None and resume.candidates:
        check_states(resume.candidates[0][1]["lanes"], len(sources), recipe.engine.packs_per_step)
    # The launchers add --local_rank; whoever repeats the command does not.
    command = [
        Path(sys.argv[0]).name,
        *(word for word in sys.argv[1:] if not word.startswith("--local_rank")),
    ]
    return Run(
        recipe,
        world_size,
        tokenizer,
        list(sources.values()),
        layouts,
        make_sample,
        resume,
        " ".join(command),
    )


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
    """The opened sources by their number; those that have the same name by their paths are numbered. Raises SettingsError, also
    for one that was prepared otherwise than the recipe asks for."""
    data, sources, names = recipe.data, {}, Counter()
    for number, settings in enumerate(data.sources):
        try:
            if absent is not None and settings.path not in EMBEDDED and not find(settings.path):
                absent.append(
                    f"data.sources.{number}.path: '{settings.path}' holds no data here, so none was checked."
                )
                continue
            if is_prepared(settings.path):
                source: Source = PreparedSource(settings)
                if tokenizer is not None and not recipe.missing_files:
                    source.check(encoding_of(recipe, tokenizer, source.layout))
            else:
                source = Source(
                    settings, decoding=data.latent_image, embedded=data.scenes, root=data.folder
                )
                check_readable(source, data.max_unreadable_fraction)
        except SettingsError as error:
            raise error.under(f"data.sources.{number}") from None
        except (
            OSError,
            RuntimeError,
            ValueError,
        ) as error:  # a path that cannot be: too long, of an unknown ~user, "."
            raise SettingsError(
                f"data.sources.{number}.path",
                f"'{settings.path}' cannot be opened: {one_line(error)}",
            ) from None
        names[source.name] += 1
        if names[source.name] > 1:
            source.name += f" ({names[source.name]})"
        sources[number] = source
    return sources


def name_data_files_when_killed() -> None:
    """Lets a process that a library's fault kills say which data file it was reading."""
    if not faulthandler.is_enabled():
        faulthandler.enable()


def print_files(sources: Iterable[Source]) -> None:
    """What was chosen and left out of the files of the sources, and which cannot be read."""
    for source in sources:
        lines = file_notes(source) + [f"warning: {line}" for line in file_warnings(source)]
        for line in lines:
            print(line, flush=True)


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


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError("command line", f"{message}; see --help.")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="train.py",
        description="Trains by a recipe. Start it with deepspeed, torchrun or plain python.",
        epilog=EXIT_CODES,
    )
    parser.add_argument(
        "--recipe",
        required=True,
        metavar="NAME_OR_FILE",
        help="a recipe that ships with uno_ds (tiny, tiny_base, ...) or a YAML file",
    )
    parser.add_argument(
        "--set",
        action="append",
        metavar="KEY=VALUE",
        help="overrides one key of the recipe, e.g. --set objective.caption_weight=0; may be repeated",
    )
    parser.add_argument(
        "--ds-config",
        metavar="NAME_OR_FILE",
        help="DeepSpeed configuration: a name in ds_configs/ or a JSON file (short for --set engine.deepspeed=...)",
    )
    parser.add_argument(
        "--resume",
        default="never",
        metavar="auto|never|DIR",
        help="go on from the run's newest checkpoint, never, or from that checkpoint (default: never)",
    )
    parser.add_argument(
        "--max-hours",
        type=float,
        metavar="H",
        help="after so long, end as by a signal: finish the step, save, exit with code 0; to go on with --resume auto",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check recipe, base and data, say what a rank needs, start nothing",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="with --dry-run: for this many ranks (default: those of the launcher or the recipe)",
    )
    parser.add_argument(
        "--json", action="store_true", help="with --dry-run: print one JSON object and nothing else"
    )
    parser.add_argument(
        "--execute",
        action="store_true",
        help="with --dry-run: also run one ZeRO step of a narrow model of the same structure as rank 0 of N",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.world_size is not None and (not options.dry_run or options.world_size < 1):
        parser.error("--world-size goes with --dry-run and is at least 1")
    if (options.json or options.execute) and not options.dry_run:
        parser.error("--json and --execute go with --dry-run")
    if options.max_hours is not None and not 0 < options.max_hours < math.inf:
        parser.error(f"--max-hours must be above 0, got {options.max_hours}")
    return options


def _warn(line: str) -> None:
    if _speaks():
        print(f"warning: {line}", flush=True)


def _speaks() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _refuse(error: SettingsError) -> int:
    """One line from one rank: the others wait for the launcher to end them, and speak only if the first rank has no fault."""
    if not _speaks():
        time.sleep(10)
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2
