"""The command line of training."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from uno_ds.commands.flags import Parser, check_ranks
from uno_ds.commands.runner import (
    REFUSED,
    name_data_files_when_killed,
    print_error,
    print_files,
)
from uno_ds.run import prepare
from uno_ds.run_sources import warn
from uno_ds.settings import SettingsError
from uno_ds.training.launch_environment import is_first_here, read_launch
from uno_ds.training.run_files import write_exit

MOST_HOURS = 100_000
EXIT_CODES = (
    "exit codes: 0 completed, or interrupted and saved, or, with --dry-run, no mistake found; "
    "1 failed, or, with --dry-run, does not fit the GPU that the recipe names; 2 a mistake in the "
    "recipe, a flag, the base or the data; 3 the run stopped itself; 4 out of memory; 75 a rank "
    "made no progress; 76 no connection to another rank; 77 a GPU or driver failed; 78 a kernel "
    "failed. "
    "torchrun replaces every code but 0 by 1; --exit-file has the original. A dry run of a recipe "
    "that names its GPU (hardware.gpu) warns about a base or data that are missing on this machine "
    "and continues; whatever exists is checked."
)


def main(arguments: Sequence[str] | None = None) -> int:
    name_data_files_when_killed()
    exit_file = None
    try:
        options = parse(arguments)
        exit_file = options.exit_file
        if options.dry_run:
            return _dry_run(options)
        return _train(options)
    except SettingsError as error:
        return _refuse(error, exit_file or _exit_file_of(arguments))


def overrides_of(options: argparse.Namespace) -> list[str]:
    """--set and --ds-config as overrides of the recipe."""
    overrides = list(options.set or [])
    if options.ds_config:
        overrides.append(f"engine.deepspeed={options.ds_config}")
    return overrides


def _dry_run(options: argparse.Namespace) -> int:
    from uno_ds.commands.dry_run import dry_run

    warnings: list[str] = []
    run = prepare(
        options.recipe,
        overrides_of(options),
        resume=options.resume,
        overwrite=options.overwrite,
        world_size=options.world_size,
        absent=warnings,
    )
    return dry_run(
        run,
        warnings + run.warnings,
        execute=options.execute,
        fit=options.fit,
        as_json=options.json,
        is_printing=is_first_here(),
    )


def _train(options: argparse.Namespace) -> int:
    read_launch()
    run = prepare(
        options.recipe,
        overrides_of(options),
        resume=options.resume,
        overwrite=options.overwrite,
        command=_command(),
        exit_file=options.exit_file,
    )
    for warning in run.warnings:
        warn(warning)
    if is_first_here():
        print_files(run.sources)
    from uno_ds.training.loop import train

    # Not in a dry run, which may check a recipe for another machine with other backends.
    demands = run.recipe.kernel_demands
    run.recipe.kernels.resolved(demands).check(demands)
    return train(run, options.max_hours)


def _command() -> str:
    """The command that started this process, without the --local_rank that launchers add."""
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    return " ".join([Path(sys.argv[0]).name, *words])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="train.py",
        description="Trains a model as a recipe says. Start with deepspeed, torchrun or python.",
        epilog=EXIT_CODES,
    )
    _add_flags_of_run(parser)
    _add_flags_of_dry_run(parser)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.world_size is not None and not options.dry_run:
        parser.error("--world-size goes with --dry-run")
    check_ranks(parser, options.world_size)
    if (options.json or options.execute or options.fit) and not options.dry_run:
        parser.error("--json, --execute and --fit go with --dry-run")
    if options.max_hours is not None and not 0 < options.max_hours <= MOST_HOURS:
        parser.error(
            f"--max-hours must be above 0 and at most {MOST_HOURS}, got {options.max_hours}"
        )
    return options


def _add_flags_of_run(parser: Parser) -> None:
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
        help="overrides one key of the recipe, e.g. --set objective.caption_weight=0; may be "
        "repeated",
    )
    parser.add_argument(
        "--ds-config",
        metavar="NAME_OR_FILE",
        help="DeepSpeed configuration: a name in ds_configs/ or a JSON file (short for --set "
        "engine.deepspeed=...)",
    )
    parser.add_argument(
        "--resume",
        default="never",
        metavar="auto|never|DIR",
        help="continue from the run's newest checkpoint (auto), from this checkpoint (DIR), or "
        "start at step 1 (default: never, an error if the run's folder holds checkpoints)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start at step 1 in a folder that holds a run; its content is moved into a subfolder, "
        "replaced_...",
    )
    parser.add_argument(
        "--max-hours",
        type=float,
        metavar="H",
        help="stop after this time as after a signal: finish the step, save, exit with code 0; "
        "continue with --resume auto",
    )
    parser.add_argument(
        "--exit-file",
        type=Path,
        metavar="FILE",
        help="write the exit code and the reason to this file, in one line; not written if the "
        "process is killed",
    )


def _add_flags_of_dry_run(parser: Parser) -> None:
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check recipe, base and data, print what a rank needs, start nothing",
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
        "--fit",
        action="store_true",
        help="with --dry-run: also print the largest sequence.token_budget that fits hardware.gpu, "
        "by the estimate",
    )
    parser.add_argument(
        "--execute",
        action="store_true",
        help="with --dry-run: also run one ZeRO step of a narrow model of the same structure as "
        "rank 0 of N",
    )


def _exit_file_of(arguments: Sequence[str] | None) -> Path | None:
    """The --exit-file of a command line that cannot be parsed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    named = [after for before, after in zip(words, words[1:]) if before == "--exit-file"]
    return Path(named[-1]) if named else None


def _refuse(error: SettingsError, exit_file: Path | None) -> int:
    """Prints the error once per machine: the other ranks wait for the launcher to end them, and
    print only if the first rank has not failed."""
    if not is_first_here():
        time.sleep(10)
    print_error(error)
    write_exit(exit_file, REFUSED, f"refused: {error}")
    return REFUSED
