"""The command line of preparation: encodes a recipe's sources once, shard by shard. Ranks share the
shards without communicating."""

import argparse
import functools
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
from uno_ds.data.layouts import get_layout
from uno_ds.data.prepared import (
    DTYPES,
    FORMAT,
    PreparedSource,
    claim,
    shard_path,
    shards,
    write_shard,
)
from uno_ds.data.source_checks import BadExample
from uno_ds.data.sources import Source
from uno_ds.data.text import Tokenizer
from uno_ds.model.codec import build_codec
from uno_ds.model.weights import WeightsFile
from uno_ds.objectives.preparation import RowEncoder, TargetEncoder, encoding_of, wants_targets
from uno_ds.objectives.regression_target import get_regression_target, open_encoder
from uno_ds.recipe import Recipe, load_recipe
from uno_ds.run_sources import open_sources, open_tokenizer
from uno_ds.settings import SettingsError
from uno_ds.training.durations import clock
from uno_ds.training.launch_environment import read_launch

ROWS_AHEAD = 32  # decoded in the background while earlier ones are encoded
SECONDS_BETWEEN_LINES = 10.0
MOST_ROWS_PER_SHARD = 10_000_000

# What Layout.parse_whole returns or, for a row that cannot be used, the BadRow it raises.
Row = Any


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    name_data_files_when_killed()
    prepare(parse(arguments))
    return 0


def prepare(options: argparse.Namespace) -> None:
    """Prepares this rank's shards of the chosen sources. Raises SettingsError before the first row
    if something is wrong."""
    recipe = load_recipe(options.recipe, options.set or [])
    recipe.check_base()
    tokenizer = open_tokenizer(recipe)
    assert tokenizer is not None, "only a plan can do without one"
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
        folders[number] = _claimed_folder(recipe, tokenizer, sources[number], number, options)
    layouts = {sources[number].layout for number in folders}
    encode = _row_encoder(recipe, tokenizer, layouts, options.dtype)
    complete = True
    for number, folder in folders.items():
        complete &= _prepare_source(sources[number], folder, encode, options)
    if complete:
        paths = " ".join(
            f"--set data.sources.{number}.path={folder}" for number, folder in folders.items()
        )
        print(f"complete; train the same recipe with {paths}", flush=True)


def _claimed_folder(
    recipe: Recipe, tokenizer: Tokenizer, source: Source, number: int, options: argparse.Namespace
) -> Path:
    """The folder of a prepared source, with its manifest. Raises SettingsError if the source is
    prepared already, or the folder is that of another preparation."""
    if isinstance(source, PreparedSource):
        raise SettingsError(
            f"data.sources.{number}.path", f"'{source.settings.path}' is prepared already."
        )
    folder = Path(options.out) / f"{number}_{source.layout}"
    encoding = encoding_of(recipe, tokenizer, source.layout)
    try:
        claim(folder, _manifest(source, encoding, options))
    except OSError as error:
        raise SettingsError("--out", f"'{folder}' cannot be written: {one_line(error)}.") from None
    return folder


def _row_encoder(
    recipe: Recipe, tokenizer: Tokenizer, layouts: Iterable[str], dtype: str
) -> RowEncoder:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", read_launch(planning=True).local_rank)
    codec = build_codec(recipe.architecture, recipe.base, device, recipe.model.codec_dtype)
    targets, encoder = None, None
    if any(wants_targets(recipe, layout) for layout in layouts):
        objective = recipe.objective
        encoder = open_encoder(objective, device, torch.float32)
        if get_regression_target(objective.regression_target).reads_vision:
            assert recipe.base is not None, "checked by encoding_of"
            targets = TargetEncoder(recipe.architecture, objective.regression_target)
            targets.load(WeightsFile(recipe.base))
    return RowEncoder(recipe, tokenizer, codec, targets, device, dtype, encoder)


def _manifest(source: Source, encoding: dict, options: argparse.Namespace) -> dict:
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
        "columns": source.settings.columns,
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
    start = time.perf_counter()
    rows_to_do = sum(len(every[number]) for number in missing)
    progress = _Progress(folder.name, rows_to_do, options.rank)
    encode_row = functools.partial(encode, source.layout)
    written = 0
    for number in missing:
        path = shard_path(folder, number)
        rows = _counted(source, every[number], causes, examples)
        write_shard(path, source.layout, map(encode_row, progress.over(rows)))
        written += path.stat().st_size
    progress.close()
    seconds = time.perf_counter() - start
    parts = [
        f"{folder.name}, rank {options.rank} of {options.world_size}: {progress.done} rows in "
        f"{len(missing)} shards"
    ]
    if len(missing) < len(own):
        parts.append(f"{len(own) - len(missing)} shards were there")
    if progress.done:
        unusable = ", ".join(f"{cause} {count}" for cause, count in causes.most_common())
        parts.append(f"unusable rows: {unusable or 'none'}")
        parts.append(f"{written:,} bytes, {written / progress.done:,.0f} a row")
        parts.append(f"{progress.done / seconds:,.1f} rows/s")
    print("; ".join(parts), flush=True)
    for cause, example in examples.items():
        print(f"  the first with {cause}: {example}", flush=True)
    return all(shard_path(folder, number).exists() for number in range(len(every)))


def _read_ahead(source: Source, indices: range) -> Iterator[Row]:
    """The rows in their order, read and decoded by a thread some rows ahead."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="rows")
    waiting: deque[Future[Row]] = deque()
    try:
        for index in indices:
            waiting.append(executor.submit(_read, source, index))
            if len(waiting) > ROWS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _read(source: Source, index: int) -> Row:
    try:
        return source.read_whole(index)
    except BadRow as error:
        return error


def _counted(
    source: Source, indices: range, causes: Counter[str], examples: dict[str, BadExample]
) -> Iterator[Row]:
    """The rows in their order. Unusable ones are counted in `causes` by their first cause;
    `examples` gets the first row of each cause."""
    layout = get_layout(source.layout)
    for index, row in zip(indices, _read_ahead(source, indices), strict=True):
        errors = [row] if isinstance(row, BadRow) else layout.unusable_images(row)
        if errors:
            first = errors[0]
            causes[first.cause] += 1
            examples.setdefault(first.cause, BadExample.of(source, index, first))
        yield row


class _Progress:
    """A bar on a terminal, lines elsewhere; only rank 0 prints."""

    def __init__(self, name: str, total: int, rank: int):
        self.name = name
        self.total = total
        self.done = 0
        self._prints = rank == 0
        self._bar = None
        if self._prints and sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=name, unit="row", dynamic_ncols=True)
        self._start = self._printed = time.perf_counter()

    def over(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            yield row
            self.done += 1
            now = time.perf_counter()
            if self._bar is not None:
                self._bar.update()
            elif self._prints and now - self._printed > SECONDS_BETWEEN_LINES:
                self._printed = now
                self._print(now)

    def _print(self, now: float) -> None:
        speed = self.done / (now - self._start)
        left = clock((self.total - self.done) / speed)
        print(
            f"{self.name}: {self.done}/{self.total} rows  {speed:,.1f} rows/s  left {left}",
            flush=True,
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, and ranks from the environment where no flag gives them. Raises SettingsError."""
    parser = Parser(
        prog="prepare_data.py",
        description="Encodes a recipe's sources once: latents, regression targets and token ids, "
        "in parquet shards that training reads in place of the sources. Resumes where an earlier "
        "call stopped.",
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
