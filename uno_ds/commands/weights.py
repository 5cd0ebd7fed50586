"""The command line around weights: replay golden cases."""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from uno_ds.kernels.backends import ATTENTION_BACKENDS
from uno_ds.objectives.golden import compare, load_case
from uno_ds.settings import SettingsError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="weights.py", description="Checks weights and the model against the public BAGEL code.")
    commands = parser.add_subparsers(dest="command", required=True)
    verify_parser = commands.add_parser("verify", help="replay golden cases through the model and compare every quantity")
    verify_parser.add_argument("cases", nargs="+", type=Path, metavar="CASE.json")
    verify_parser.add_argument("--tolerance", type=float, default=1e-4, help="largest relative error that passes (default 1e-4)")
    verify_parser.add_argument("--backend", default="sdpa", choices=ATTENTION_BACKENDS, help="attention backend (default sdpa)")
    options = parser.parse_args(arguments)
    try:
        return verify(options.cases, options.tolerance, options.backend)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def verify(cases: Sequence[Path], tolerance: float, backend: str) -> int:
    """Prints a line per quantity; 1 if one is beyond the tolerance. The attention mask has to be equal."""
    failures = 0
    for path in cases:
        print(f"{path} (attention: {backend})")
        for comparison in compare(load_case(path, backend)):
            good = comparison.relative <= (0 if comparison.quantity == "attention mask" else tolerance)
            failures += not good
            print(f"  {'ok  ' if good else 'FAIL'}  absolute {comparison.absolute:.2e}  relative {comparison.relative:.2e}  {comparison.quantity}")
    print(f"{failures} quantities beyond the tolerance of {tolerance:g}" if failures else f"all quantities within the tolerance of {tolerance:g}")
    return 1 if failures else 0
