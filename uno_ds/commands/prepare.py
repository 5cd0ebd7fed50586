"""The command line of preparation: encodes a recipe's sources once, shard by shard, spread over ranks that need not talk."""

import argparse
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from uno_ds.commands.flags import Parser, check_ranks
from uno_ds.commands.runner import (
    name_data_files_when_killed,
    one_line_errors,
    print_files,
)
from uno_ds.data.files import one_line
from uno_ds.data.images import BadRow
from uno_ds.data.prepared import (
    DTYPES,
    FORMAT,
    PreparedSource,
    claim,
    shard_path,
    shards,
    write_shard,
)
from uno_ds.data.rows import Conversation, EditSequence, TextToImage
from uno_ds.data.sources import BadExample, Source
from uno_ds.model.codec import build_codec
from uno_ds.model.weights import WeightsFile
from uno_ds.objectives.preparation import RowEncoder, TargetEncoder, encoding_of, wants_targets
from uno_ds.recipe import Recipe, load_recipe
from uno_ds.run import open_sources, open_tokenizer
from uno_ds.settings import SettingsError
from uno_ds.training.launch_environment import read_launch
from uno_ds.training.metrics import clock

ROWS_AHEAD = 32  # decoded in the background while earlier ones are encoded
SECONDS_BETWEEN_LINES = 10.0
MOST_ROWS_PER_SHARD = 10_000_000

Raw = TextToImage | EditSequence | Conversation | BadRow


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    name_data_files_when_killed()
    options = _parse(arguments)
    prepare(options)
    return 0


def prepare(options: argparse.Namespace) -> None:
    """Prepares this rank's shards of the chosen sources. Raises SettingsError before the first row if something is wrong."""
    recipe = load_recipe(options.recipe, options.set or [])
    recipe.check_base()
    tokenizer = open_tokenizer(recipe)
    sources = list(open_sources(recipe, tokenizer).values())
    chosen = sorted(set(options.source)) if options.source else range(len(sources))
    if options.rank == 0:
        print_files(sources)
    folders = {}
    for number in chosen:
        if not 0 <= number < len(sources):
            raise SettingsError(
                "--source",
                f"{number} is not the number of a source; the recipe has 0 to {len(sources) - 1}.",
            )
        source, folder = sources[number], Path(options.out) / f"{number}_{sources[number].layout}"
        if isinstance(source, PreparedSource):
            raise SettingsError(
                f"data.sources.{number}.path", f"'{source.settings.path}' is prepared already."
            )
        try:
            claim(
                folder,
                _manifest(recipe, source, encoding_of(recipe, tokenizer, source.layout), options),
            )
        except OSError as error:
            raise SettingsError(
                "--out", f"'{folder}' cannot be written: {one_line(error)}."
            ) from None
        folders[number] = folder
    device = (
        torch.device("cuda", read_launch(planning=True).local_rank)
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    codec_dtype = torch.bfloat16 if recipe.model.codec_precision == "bf16" else torch.float32
    codec, targets = build_codec(recipe.architecture, recipe.base, device, codec_dtype), None
    if any(wants_targets(recipe, sources[number].layout) for number in chosen):
        targets = TargetEncoder(recipe.architecture, recipe.objective.regression_target).load(
            WeightsFile(recipe.base)
        )
    encode = RowEncoder(recipe, tokenizer, codec, targets, device, options.dtype)
    complete = True
    for number, folder in folders.items():
        complete &= _prepare_source(sources[number], folder, encode, options)
    if complete:
        paths = " ".join(
            f"--set data.sources.{number}.path={folder}" for number, folder in folders.items()
        )
        print(f"complete; train the same recipe with {paths}", flush=True)


def _manifest(recipe: Recipe, source: Source, encoding: dict, options: argparse.Namespace) -> dict:
    return {
        "format": FORMAT,
        "source": source.settings.path,
        "files": source.digest(),
        "unreadable_files": source.unreadable_files,
        "layout": source.layout,
        "rows": len(source),
        "rows_per_shard": options.rows_per_shard,
        "dtype": options.dtype,
        "caption_keys": source.settings.caption_keys,
        "recipe": encoding,
    }


def _prepare_source(
    source: Source, folder: Path, encode: RowEncoder, options: argparse.Namespace
) -> bool:
    """Writes this rank's missing shards; whether the shards of all ranks are there now."""
    every = shards({"rows": len(source), "rows_per_shard": options.rows_per_shard})
    own = range(options.rank, len(every), options.world_size)
    missing = [number for number in own if not shard_path(folder, number).exists()]
    causes: Counter[str] = Counter()
    examples: dict[str, BadExample] = {}
    start, progress = (
        time.perf_counter(),
        _Progress(folder.name, sum(len(every[number]) for number in missing), options.rank),
    )
    written = 0
    for number in missing:
        path = shard_path(folder, number)
        raw = _counted(source, every[number], causes, examples)
        write_shard(path, source.layout, map(encode, progress.over(raw)))
        written += path.stat().st_size
    progress.close()
    rows, seconds = progress.done, time.perf_counter() - start
    parts = [
        f"{folder.name}, rank {options.rank} of {options.world_size}: {rows} rows in {len(missing)} shards"
    ]
    if len(missing) < len(own):
        parts.append(f"{len(own) - len(missing)} shards were there")
    if rows:
        unusable = ", ".join(f"{cause} {count}" for cause, count in causes.most_common())
        parts += [
            f"unusable rows: {unusable or 'none'}",
            f"{written:,} bytes, {written / rows:,.0f} a row",
            f"{rows / seconds:,.1f} rows/s",
        ]
    print("; ".join(parts), flush=True)
    for cause, example in examples.items():
        print(f"  the first with {cause}: {example}", flush=True)
    return all(shard_path(folder, number).exists() for number in range(len(every)))


def _ahead(source: Source, indices: range) -> Iterator[Raw]:
    """The rows in their order, read and decoded by a thread some rows ahead."""
    executor, waiting = ThreadPoolExecutor(1, thread_name_prefix="rows"), deque[Future[Raw]]()
    try:
        for index in indices:
            waiting.append(executor.submit(_read, source, index))
            if len(waiting) > ROWS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _read(source: Source, index: int) -> Raw:
    try:
        # Nothing is drawn of the layouts that are read as an example: they have nothing to choose from.
        return (
            source.read_edits(index)
            if source.layout == "edit"
            else source.read(index, np.random.default_rng(0))
        )
    except BadRow as error:
        return error


def _counted(
    source: Source, indices: range, causes: Counter[str], examples: dict[str, BadExample]
) -> Iterator[Raw]:
    """The rows in their order; unusable ones are counted by their first cause, of which `examples` gets the first row."""
    for index, row in zip(indices, _ahead(source, indices), strict=True):
        images = row.images if isinstance(row, EditSequence) else ()
        found = [error for error in (row, *images) if isinstance(error, BadRow)]
        if found:
            causes[found[0].cause] += 1
            examples.setdefault(found[0].cause, BadExample.of(source, index, found[0]))
        yield row


class _Progress:
    """A bar on a terminal, lines elsewhere; rank 0 speaks."""

    def __init__(self, name: str, total: int, rank: int):
        self.name, self.total, self.done, self.speaks = name, total, 0, rank == 0
        self._bar = (
            tqdm(total=total, desc=name, unit="row", dynamic_ncols=True)
            if self.speaks and sys.stderr.isatty()
            else None
        )
        self._start = self._spoken = time.perf_counter()

    def over(self, rows: Iterable[Raw]) -> Iterator[Raw]:
        for row in rows:
            yield row
            self.done += 1
            now = time.perf_counter()
            if self._bar is not None:
                self._bar.update()
            elif self.speaks and now - self._spoken > SECONDS_BETWEEN_LINES:
                self._spoken, speed = now, self.done / (now - self._start)
                print(
                    f"{self.name}: {self.done}/{self.total} rows  {speed:,.1f} rows/s  left {clock((self.total - self.done) / speed)}",
                    flush=True,
                )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="prepare_data.py",
        description="Encodes a recipe's sources once: latents, regression targets and token ids, in parquet "
        "shards from which training reads in the sources' place. Goes on where an earlier call stopped.",
    )
    parser.add_argument(
        "--recipe", required=True, metavar="NAME_OR_FILE", help="the recipe that will be trained"
    )
    parser.add_argument(
        "--set",
        action="append",
        metavar="KEY=VALUE",
        help="overrides one key of the recipe; may be repeated",
    )
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="source N goes to FOLDER/N_LAYOUT"
    )
    parser.add_argument(
        "--source",
        type=int,
        action="append",
        metavar="N",
        help="only this source of the recipe, counted from 0; may be repeated",
    )
    parser.add_argument(
        "--rows-per-shard",
        type=int,
        default=1000,
        metavar="N",
        help="rows of one file, the unit of resuming and sharing (default 1000)",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=DTYPES,
        help="of latents and targets; float32 (default) gives the losses of training from "
        "pixels, bfloat16 halves the bytes",
    )
    parser.add_argument(
        "--rank",
        type=int,
        default=None,
        metavar="K",
        help="prepare shards K, K + world size, ... (default: RANK of a launcher, or 0)",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        default=None,
        metavar="N",
        help="number of ranks (default: WORLD_SIZE of a launcher, or 1)",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("rank", "world_size"):
        if getattr(options, name) is None:
            setattr(options, name, _of_environment(name))
    if not 0 <= options.rank < options.world_size:
        parser.error(
            f"--rank must be 0 to {options.world_size - 1}, below --world-size; got {options.rank}"
        )
    check_ranks(parser, options.world_size)
    if not 1 <= options.rows_per_shard <= MOST_ROWS_PER_SHARD:
        parser.error(
            f"--rows-per-shard must be 1 to {MOST_ROWS_PER_SHARD:,}; got {options.rows_per_shard}"
        )
    return options


def _of_environment(name: str) -> int:
    """rank or world_size, by the variable of that name or by what else the launcher has set."""
    variable = name.upper()
    given = os.environ.get(variable)
    if given is None:
        return getattr(read_launch(planning=True), name)
    if not (given.isascii() and given.isdigit()):
        raise SettingsError(variable, f"the environment variable must be a number, got '{given}'.")
    return int(given)
