"""The command line of data: what a source is read as, and its rows as parquet in a documented
layout."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uno_ds.commands.data_page import page
from uno_ds.commands.flags import Parser
from uno_ds.commands.json_output import write_json
from uno_ds.commands.runner import name_data_files_when_killed, one_line_errors
from uno_ds.data.convert import convert
from uno_ds.data.layouts import AUTO, LAYOUTS
from uno_ds.data.source_checks import file_notes, file_warnings
from uno_ds.data.sources import Source, SourceSettings
from uno_ds.data.survey import ShownSample, Survey, histogram, survey
from uno_ds.files_on_disk import replace_text
from uno_ds.run_sources import open_recipe_source, sample_maker
from uno_ds.settings import build, override, printable, to_plain

MOST_SHOWN, MOST_ROWS = 200, 1_000_000
LONGEST_TEXT, LONGEST_COLUMNS = 100, 300
BAR = 40
MARKS = {"no": ".", "all": "#", "causal": "/"}


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    name_data_files_when_killed()
    options = _parse(arguments)
    command = _look if options.command == "look" else _convert
    return command(options)


def _look(options: argparse.Namespace) -> int:
    """Exit code 1 if no row can be used."""
    recipe, tokenizer, source = _opened(options)
    make_sample = sample_maker(recipe, recipe.composer(tokenizer), tokenizer)
    found = survey(source, make_sample, options.rows, options.n, recipe.seed)
    if options.html is not None:
        replace_text(options.html, page(source, found, options.recipe))
    if options.json:
        write_json(_plain(source, found, options.recipe))
    else:
        _print(source, found, options.recipe)
        if options.html is not None:
            print(f"\nthe same with pictures: {options.html}")
    return 0 if found.usable else 1


def _convert(options: argparse.Namespace) -> int:
    """Exit code 1 if no row can be used."""
    _, _, source = _opened(options)
    for line in [*file_notes(source), *file_warnings(source)]:
        print(line, flush=True)
    done = convert(source, options.out, options.rows_per_file)
    print(f"{done.written:,} rows of layout {source.layout} in {done.files} files at {options.out}")
    for cause, count in done.causes.most_common():
        print(f"  left out: {cause} {count:,}; the first is {done.first_of_cause[cause]}")
    return 0 if done.written else 1


def _opened(options: argparse.Namespace) -> tuple[Any, Any, Source]:
    plain: dict[str, Any] = {"path": options.path, "layout": options.layout}
    for assignment in options.source or []:
        override(plain, assignment)
    settings = build(SourceSettings, plain)
    return open_recipe_source(options.recipe, options.set or [], settings)


def _plain(source: Source, found: Survey, recipe: str) -> dict[str, Any]:
    return {
        "source": source.name,
        "path": source.settings.path,
        "recipe": recipe,
        **to_plain(source.reading),
        "notes": list(source.notes),
        "unreadable_files": dict(source.unreadable_files),
        "rows_tried": found.tried,
        "rows_usable": found.usable,
        "skipped": dict(found.causes.most_common()),
        "skipped_examples": {
            cause: to_plain(example) for cause, example in found.first_of_cause.items()
        },
        "left_out_keys": source.left_out_keys,
        "token_budget": found.token_budget,
        "tokens_by_kind": dict(found.tokens),
        "lengths": histogram(found.lengths),
        "widths": histogram([size[0] for size in found.sizes]),
        "heights": histogram([size[1] for size in found.sizes]),
        "pack_fill": found.fill,
        "samples_per_pack": found.samples_per_pack,
        "samples": [_plain_sample(sample) for sample in found.shown],
    }


def _plain_sample(sample: ShownSample) -> dict[str, Any]:
    return {
        "row": sample.row,
        "tokens": sample.tokens,
        "images": [picture.size for picture in sample.pictures],
        "segments": [to_plain(segment) for segment in sample.segments],
        "sees": sample.sees,
    }


def _print(source: Source, found: Survey, recipe: str) -> None:
    for line in [*file_notes(source), *file_warnings(source)]:
        print(line)
    if source.left_out_keys:
        keys = printable(", ".join(source.left_out_keys))
        print(f"texts under these keys are taken for metadata and left out: {keys}")
    print(f"{found.tried:,} of {found.rows:,} rows tried, {found.usable:,} can be used")
    for cause, count in found.causes.most_common():
        print(f"  {cause} {count:,}: the first is {found.first_of_cause[cause]}")
    if not found.usable:
        columns = printable(", ".join(source.columns(0)), LONGEST_COLUMNS)
        print(f"its columns are {columns or 'none that can be read'}")
        if needed := source.lacking(0):
            print(f"{source.layout} needs {needed}, which the key columns maps to other names")
        return
    budget = f"{found.token_budget:,}"
    print(f"\nby the recipe {recipe}, whose token budget is {budget}:")
    kinds = ", ".join(f"{kind} {tokens:,}" for kind, tokens in found.tokens.most_common())
    print(f"tokens by kind of segment: {kinds}")
    mean = 100 * sum(found.fill) / len(found.fill)
    samples = sum(found.samples_per_pack) / len(found.samples_per_pack)
    print(f"packs are {mean:.1f} % full on average, with {samples:.1f} samples")
    _print_histogram("tokens of a sample", found.lengths)
    _print_histogram("width of images", [size[0] for size in found.sizes])
    _print_histogram("height of images", [size[1] for size in found.sizes])
    for sample in found.shown:
        _print_sample(sample)
    if found.shown:
        _print_mask(max(found.shown, key=lambda sample: len(sample.segments)))


def _print_histogram(title: str, values: Sequence[float]) -> None:
    counted = histogram(values)
    most = max((count for _, _, count in counted), default=1)
    if counted:
        print(f"\n{title}")
    for low, high, count in counted:
        bar = "#" * (BAR * count // most)
        print(f"{low:9,.0f} to {high:9,.0f} {count:7,} {bar}")


def _print_sample(sample: ShownSample) -> None:
    sizes = ", ".join(f"{picture.width}x{picture.height}" for picture in sample.pictures)
    print(f"\nrow {sample.row}: {sample.tokens:,} tokens; images {sizes or 'none'}")
    for segment in sample.segments:
        shown = f"{segment.grid[0]}x{segment.grid[1]} patches"
        if segment.text is not None:
            shown = f"'{printable(segment.text, LONGEST_TEXT)}'"
        loss = "loss" if segment.is_trained else ""
        print(f"  {segment.kind:<10}{segment.tokens:>7,}  {loss:<5}{shown}")


def _print_mask(sample: ShownSample) -> None:
    print(f"\nattention in row {sample.row}, queries by keys: # full, / causal, . none")
    for place, (segment, sees) in enumerate(zip(sample.segments, sample.sees, strict=True)):
        print(f"  {place:>3} {segment.kind:<10} {''.join(MARKS[how] for how in sees)}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="data.py", description="Looks into data and converts it.")
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser(
        "look",
        help="what a source is read as: columns, unusable rows, sizes, lengths, packs, samples",
    )
    conversion = commands.add_parser(
        "convert", help="write the usable rows of a source as parquet in a documented layout"
    )
    for command in (look, conversion):
        command.add_argument("path", metavar="PATH", help="as data.sources[].path of a recipe")
        command.add_argument(
            "--layout", default=AUTO, choices=(AUTO, *LAYOUTS), help="default: by the columns"
        )
        command.add_argument(
            "--source",
            action="append",
            metavar="KEY=VALUE",
            help="another key of the source, e.g. --source 'columns={image: jpg}'; may be repeated",
        )
        command.add_argument(
            "--recipe",
            default="tiny",
            metavar="NAME_OR_FILE",
            help="whose tokenizer, sizes of images and token budget count (default: tiny)",
        )
        command.add_argument(
            "--set", action="append", metavar="KEY=VALUE", help="overrides a key of the recipe"
        )
    look.add_argument(
        "--n", type=int, default=8, metavar="N", help="samples that are shown (default 8)"
    )
    look.add_argument(
        "--rows",
        type=int,
        default=200,
        metavar="N",
        help="rows that are read, evenly spread over the source (default 200)",
    )
    look.add_argument("--json", action="store_true", help="print JSON")
    look.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures")
    conversion.add_argument("out", type=Path, metavar="OUT", help="new or empty folder")
    conversion.add_argument(
        "--rows-per-file", type=int, default=1000, metavar="N", help="default 1000"
    )
    options = parser.parse_args(arguments)
    if options.command == "look":
        _check_range(parser, "--n", options.n, MOST_SHOWN, least=0)
        _check_range(parser, "--rows", options.rows, MOST_ROWS)
    else:
        _check_range(parser, "--rows-per-file", options.rows_per_file, MOST_ROWS)
    return options


def _check_range(parser: Parser, flag: str, value: int, most: int, least: int = 1) -> None:
    if not least <= value <= most:
        parser.error(f"{flag} must be {least} to {most:,}; got {value}")
