"""`trace_summary.py`: where the time of traced steps goes."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from uno_ds.commands.flags import Parser
from uno_ds.commands.json_output import write_json
from uno_ds.commands.runner import one_line_errors
from uno_ds.settings import SettingsError, printable
from uno_ds.training.trace_picture import draw_trace
from uno_ds.training.trace_reading import RangeTime, Trace

MOST_ROWS = 10_000
LONGEST_NAME = 60


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    trace = Trace(options.trace)
    rows = trace.time_by_range()
    summary = _summary(trace, rows, options.top)
    if options.json:
        write_json(summary)
    else:
        _print(summary, rows, trace.on_gpu)
    png = options.png or _beside(options.trace)
    try:
        draw_trace(trace, rows, png)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError("--png", f"{png} cannot be written: {reason}.") from None
    if not options.json:
        print(f"\npicture: {png}")
    return 0


def _summary(trace: Trace, rows: list[RangeTime], top: int) -> dict[str, Any]:
    gaps = trace.gaps()
    kernels = trace.kernels()
    return {
        "trace": str(trace.path),
        "rank": trace.rank,
        "device": "gpu" if trace.on_gpu else "cpu",
        "steps": [{"name": step.name, "seconds": step.end - step.start} for step in trace.steps],
        "seconds": trace.seconds,
        "ranges": [asdict(row) for row in rows],
        "communication": asdict(trace.communication()),
        "gaps": {
            "seconds": sum(gap.seconds for gap in gaps),
            "count": len(gaps),
            "longest": [asdict(gap) for gap in gaps[:top]],
        },
        "kernels": {
            "seconds": sum(kernel.seconds for kernel in kernels),
            "longest": [asdict(kernel) for kernel in kernels[:top]],
        },
    }


def _print(summary: dict[str, Any], rows: list[RangeTime], on_gpu: bool) -> None:
    steps, whole = summary["steps"], summary["seconds"]
    seconds = [step["seconds"] for step in steps]
    print(
        f"{summary['trace']}: {len(steps)} step(s) of rank {summary['rank']} on a "
        f"{summary['device'].upper()}, {min(seconds):.4g} to {max(seconds):.4g} s"
    )
    device = f"{'device s':>12}" if on_gpu else ""
    print(f"\n{'range, all steps':<36}{'calls':>8}{'host s':>12}{'own s':>12}{'own':>8}{device}")
    for row in _with_layers_together(rows):
        on_device = f"{row.device:>12.4f}" if on_gpu else ""
        print(
            f"{row.name:<36}{row.calls:>8,}{row.host:>12.4f}{row.own:>12.4f}"
            f"{row.own / whole:>8.1%}{on_device}"
        )
    sent = summary["communication"]
    print(
        f"\ncommunication: {sent['total']:.4f} s ({sent['total'] / whole:.1%} of the steps), "
        f"{sent['hidden']:.4f} s hidden by computing, {sent['exposed']:.4f} s exposed, waiting for "
        "other ranks included"
    )
    gaps = summary["gaps"]
    print(
        f"gaps: in {gaps['seconds']:.4f} s ({gaps['seconds'] / whole:.1%}) neither computing nor "
        f"communication runs; the longest of {gaps['count']:,}:"
    )
    for gap in gaps["longest"]:
        print(f"  {gap['seconds'] * 1e3:>10.3f} ms at {gap['start']:.4f} s, {gap['during']}")
    kernels = summary["kernels"]
    what = "kernels" if on_gpu else "operators, without those that they call"
    print(f"\n{what} that take longest{'calls':>8}")
    for kernel in kernels["longest"]:
        share = kernel["seconds"] / kernels["seconds"] if kernels["seconds"] else 0.0
        print(
            f"  {kernel['seconds']:>10.4f} s {share:>6.1%} {kernel['calls']:>8,}  "
            f"{printable(kernel['name'], LONGEST_NAME)}"
        )


def _with_layers_together(rows: list[RangeTime]) -> list[RangeTime]:
    """The ranges of a model's layers as one row."""
    found: dict[str, RangeTime] = {}
    for row in rows:
        name, _, number = row.name.rpartition(" ")
        key = f"{name}s" if number.isdigit() else row.name
        before = found.get(key, RangeTime(key, 0, 0.0, 0.0, 0.0))
        found[key] = RangeTime(
            key,
            before.calls + row.calls,
            before.host + row.host,
            before.own + row.own,
            before.device + row.device,
        )
    return list(found.values())


def _beside(trace: Path) -> Path:
    name = trace.name.removesuffix(".gz").removesuffix(".json")
    return trace.with_name(f"{name}.png")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="trace_summary.py",
        description="Where the time of traced steps goes: by range, communication that computing "
        "hides and that it does not, gaps, and the kernels that take longest.",
    )
    parser.add_argument(
        "trace",
        type=Path,
        metavar="TRACE",
        help="a file of RUN/traces (logging.trace of a recipe, or a file `trace` in a running "
        "job's folder)",
    )
    parser.add_argument(
        "--top", type=int, default=10, metavar="N", help="gaps and kernels to list (default 10)"
    )
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help="the picture (default: beside the trace)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    options = parser.parse_args(arguments)
    if not 1 <= options.top <= MOST_ROWS:
        parser.error(f"--top must be 1 to {MOST_ROWS:,}, got {options.top}")
    return options
