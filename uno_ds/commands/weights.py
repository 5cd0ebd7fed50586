"""The command line around weights: say what a checkpoint is, replay golden cases."""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from uno_ds.kernels.backends import ATTENTION_BACKENDS, KernelSettings
from uno_ds.model.inspection import inspect
from uno_ds.objectives.golden import compare, load_case
from uno_ds.settings import SettingsError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="weights.py", description="Looks into weights and checks the model against the public BAGEL code.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect_parser = commands.add_parser("inspect", help="parameters by part, dtypes, missing and unexpected names; reads headers only")
    inspect_parser.add_argument("path", type=Path, metavar="DIR_OR_FILE")
    verify_parser = commands.add_parser("verify", help="replay golden cases through the model and compare every quantity")
    verify_parser.add_argument("cases", nargs="+", type=Path, metavar="CASE.json")
    verify_parser.add_argument("--tolerance", type=float, default=1e-4, help="largest relative error that passes (default 1e-4)")
    verify_parser.add_argument("--backend", default="sdpa", choices=ATTENTION_BACKENDS, help="attention backend (default sdpa)")
    options = parser.parse_args(arguments)
    try:
        return describe(options.path) if options.command == "inspect" else verify(options.cases, options.tolerance, options.backend)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def describe(path: Path) -> int:
    """Prints what the folder or file holds; 1 if it does not fit the architecture beside it."""
    found = inspect(path)
    print(f"{path}: {sum(found.parameters.values()):,} values in {sum(found.dtypes.values())} tensors, {found.files} file(s), "
          + ", ".join(f"{count} x {dtype}" for dtype, count in sorted(found.dtypes.items())))
    for part, count in sorted(found.parameters.items(), key=lambda item: -item[1]):
        print(f"  {count:>16,}  {part}")
    if found.missing is None:
        print("no llm_config.json beside it, so names and shapes are not compared with an architecture")
        return 0
    for title, names in (("missing", found.missing), ("unexpected", found.unexpected), ("of another shape", found.reshaped)):
        print(f"{title}: {len(names)}")
        for name in names:
            print(f"  {name}")
    return 1 if found.missing or found.reshaped else 0


def verify(cases: Sequence[Path], tolerance: float, backend: str) -> int:
    """Prints a line per quantity; 1 if one is beyond the tolerance. The attention mask has to be equal."""
    failures = 0
    KernelSettings(attention=backend).resolved()
    for path in cases:
        print(f"{path} (attention: {backend})")
        for comparison in compare(load_case(path, backend)):
            good = comparison.relative <= (0 if comparison.quantity == "attention mask" else tolerance)
            failures += not good
            print(f"  {'ok  ' if good else 'FAIL'}  absolute {comparison.absolute:.2e}  relative {comparison.relative:.2e}  {comparison.quantity}")
    print(f"{failures} quantities beyond the tolerance of {tolerance:g}" if failures else f"all quantities within the tolerance of {tolerance:g}")
    return 1 if failures else 0
