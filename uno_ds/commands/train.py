"""The command line of training: everything that can be wrong with a run is found here, before any process group starts."""
import argparse
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from uno_ds.data.files import one_line
from uno_ds.data.samples import SampleMaker
from uno_ds.data.sources import Source, check_usable
from uno_ds.data.stream import Stream, build_stream, check_states
from uno_ds.data.text import Tokenizer
from uno_ds.generation.sampler import special_tokens
from uno_ds.recipe import Recipe, load_recipe, world_size_of_environment
from uno_ds.sequence.packing import Collator
from uno_ds.settings import SettingsError
from uno_ds.training import checkpoint


@dataclass(frozen=True, eq=False)
class Run:
    """A checked run: what `loop.train` needs and has not to look for."""

    recipe: Recipe
    tokenizer: Tokenizer
    sources: list[Source]
    make_sample: SampleMaker
    resume: checkpoint.Resume | None
    command: str

    def stream(self, rank: int, world_size: int) -> Stream:
        recipe = self.recipe
        collate = Collator(recipe.architecture.geometry, special_tokens(self.tokenizer), train_understanding=recipe.model.train == "all",
                           stop_at_context=recipe.sequence.context_gradient == "stop")
        return build_stream(self.sources, self.make_sample, collate, recipe.data, recipe.seed, recipe.engine.packs_per_step, rank, world_size)

    @property
    def supervised(self) -> bool:
        return self.recipe.objective.caption_weight > 0 or self.recipe.objective.regression_weight > 0

    @property
    def read_answers(self) -> bool:
        return self.recipe.objective.answer_weight > 0 and any(source.layout == "vlm" for source in self.sources)

    @property
    def idle(self) -> bool:
        """No sample reaches a weight that trains: answers, whose pictures come through the frozen visual encoder."""
        recipe = self.recipe
        conversations = all(source.layout == "vlm" for source in self.sources)
        return recipe.model.train == "generation" and conversations and not (self.read_answers and recipe.sequence.conversation_images != "vit")


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = _parse(arguments)
        run = prepare(options)
    except SettingsError as error:
        return _refuse(error)
    if run.idle and _speaks():
        print("warning: nothing will train: every source holds conversations, which train the understanding expert, and model.train is generation; "
              "add a t2i or edit source, or set model.train=all.", flush=True)
    if options.dry_run:
        if _speaks():
            ranks = options.world_size or world_size_of_environment()
            print(f"{run.recipe.name}: the recipe, its base and its data are in order for {ranks} rank(s); nothing was started.")
        return 0
    from uno_ds.training.loop import train
    try:
        return train(run, options.max_hours)
    except SettingsError as error:
        return _refuse(error)


def prepare(options: argparse.Namespace) -> Run:
    """Reads the recipe, the tokenizer and the sources and checks them against each other. Raises SettingsError."""
    overrides = [*(options.set or []), *([f"engine.deepspeed={options.ds_config}"] if options.ds_config else [])]
    recipe = load_recipe(options.recipe, overrides)
    world_size = options.world_size or world_size_of_environment()
    recipe.check_world(world_size)
    recipe.check_base()
    _check_folder("output", recipe.folder)
    _check_folder("data.folder", Path(recipe.data.folder))
    try:
        tokenizer = Tokenizer(recipe.tokenizer_folder)
    except (SettingsError, OSError) as error:
        raise SettingsError("model.tokenizer", error.message if isinstance(error, SettingsError) else one_line(error)) from None
    sources = _open_sources(recipe)
    recipe.check_data(sources, tokenizer)
    make_sample = SampleMaker(recipe.layout(tokenizer), tokenizer, recipe.data.latent_image, recipe.data.vit_image, recipe.sequence.token_budget)
    for number, source in enumerate(sources):
        try:
            check_usable(source, lambda example: make_sample(example, np.random.default_rng(0)))
        except SettingsError as error:
            raise error.under(f"data.sources.{number}") from None
    resume = checkpoint.find(recipe.folder / "checkpoints", options.resume)
    if resume is not None and resume.candidates:
        check_states(resume.candidates[0][1]["lanes"], len(sources), recipe.engine.packs_per_step)
    # The launchers add --local_rank; whoever repeats the command does not.
    command = [Path(sys.argv[0]).name, *(word for word in sys.argv[1:] if not word.startswith("--local_rank"))]
    return Run(recipe, tokenizer, sources, make_sample, resume, " ".join(command))


def _open_sources(recipe: Recipe) -> list[Source]:
    """The opened sources; those that have the same name by their paths are numbered."""
    data, sources, names = recipe.data, [], Counter()
    for number, settings in enumerate(data.sources):
        try:
            source = Source(settings, decoding=data.latent_image, embedded=data.scenes, root=data.folder)
        except SettingsError as error:
            raise error.under(f"data.sources.{number}") from None
        except (OSError, RuntimeError, ValueError) as error:  # a path that cannot be: too long, of an unknown ~user, "."
            raise SettingsError(f"data.sources.{number}.path", f"'{settings.path}' cannot be opened: {one_line(error)}") from None
        names[source.name] += 1
        if names[source.name] > 1:
            source.name += f" ({names[source.name]})"
        sources.append(source)
    return sources


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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError("command line", f"{message}; see --help.")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="train.py", description="Trains by a recipe. Start it with deepspeed, torchrun or plain python.")
    parser.add_argument("--recipe", required=True, metavar="NAME_OR_FILE", help="a recipe that ships with uno_ds (tiny, tiny_base, ...) or a YAML file")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE",
                        help="overrides one key of the recipe, e.g. --set objective.caption_weight=0; may be repeated")
    parser.add_argument("--ds-config", metavar="NAME_OR_FILE",
                        help="DeepSpeed configuration: a name in ds_configs/ or a JSON file (short for --set engine.deepspeed=...)")
    parser.add_argument("--resume", default="never", metavar="auto|never|DIR",
                        help="go on from the run's newest checkpoint, never, or from that checkpoint (default: never)")
    parser.add_argument("--max-hours", type=float, metavar="H",
                        help="after so long, end as by a signal: finish the step, save, exit with code 0; to go on with --resume auto")
    parser.add_argument("--dry-run", action="store_true", help="check recipe, base and data, start nothing")
    parser.add_argument("--world-size", type=int, metavar="N", help="with --dry-run: check for this many ranks")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.world_size is not None and (not options.dry_run or options.world_size < 1):
        parser.error("--world-size goes with --dry-run and is at least 1")
    if options.max_hours is not None and not 0 < options.max_hours < math.inf:
        parser.error(f"--max-hours must be above 0, got {options.max_hours}")
    return options


def _speaks() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _refuse(error: SettingsError) -> int:
    """One line from one rank: the others wait for the launcher to end them, and speak only if the first rank has no fault."""
    if not _speaks():
        time.sleep(10)
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2
