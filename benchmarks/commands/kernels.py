"""Measures the kernels.

    python benchmarks/kernels.py --kernel conditioning_attention [--scenarios A,D] [--backends triton,flex] [--json FILE]
    python benchmarks/kernels.py --kernel plan [--json FILE]
    python benchmarks/kernels.py --kernel {metaquery_regression,qk_norm_rope,cross_entropy,flow_matching} [--json FILE]
    python benchmarks/kernels.py --compile-report [--dtype bf16] [--json FILE]

conditioning_attention: forward, backward and both on packs of 32,768 tokens (benchmarks/README.md), every backend that runs here,
in bf16 on a GPU; useful TFLOP/s count the visible pairs and the products that somebody needs. On a CPU it runs small
shapes, so that the plumbing is tested, and its times mean nothing. plan: time to build the plan of a pack on the host.
The others: see benchmarks/suite/losses.py.
--compile-report: registers, shared memory and instructions of every kernel of the launch table for Hopper; needs no GPU. With
--kernel metaquery_regression or qk_norm_rope of the kernels there.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.commands.launch_table import compiled, variants
from benchmarks.suite.attention import (
    DIM,
    HEADS,
    KEY_HEADS,
    SCENARIOS,
    SMALL,
    live_plan,
    matmul_tflops,
    measure,
    milliseconds,
    plan_arguments,
    segment_table,
)
from benchmarks.suite.losses import COMPILED, MEASURES, compile_report_of
from uno_ds.kernels.backends import backend_names, unavailable_reason
from uno_ds.kernels.conditioning_attention.launch import table
from uno_ds.kernels.launch import INTERPRETED
from uno_ds.kernels.plan import build_plan
from uno_ds.training.report import environment

# Dense: its memory grows with the square of the tokens.
NOT_MEASURED_ON_A_GPU = ("reference",)
BASELINE, OURS = "flex", "triton"


def attention(
    scenarios: list[str] | None, backends: list[str] | None, repeats: int
) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = SCENARIOS if device == "cuda" else SMALL
    heads, dtype = (
        ((HEADS, KEY_HEADS, DIM), torch.bfloat16)
        if device == "cuda"
        else ((2, 1, 16), torch.float32)
    )
    ceiling, rows, skipped = matmul_tflops(device), [], {}
    for backend in backends or backend_names("attention"):
        reason = unavailable_reason("attention", backend) or (
            "its memory grows with the square of the tokens"
            if device == "cuda" and backend in NOT_MEASURED_ON_A_GPU
            else None
        )
        if reason:
            skipped[backend] = reason
            print(f"{backend}: not measured, {reason}")
    for name in scenarios or shapes:
        plan = live_plan(shapes[name]).to(device)
        forward, backward = plan.flops(heads[0], heads[2])
        print(
            f"{name}: {plan.queries} queries, {plan.keys} keys, {plan.visible_pairs} visible pairs, "
            f"backward products {dict(plan.pairs)}, {forward:.4g} FLOP forward, {backward:.4g} backward",
            flush=True,
        )
        for backend in (b for b in backends or backend_names("attention") if b not in skipped):
            try:
                row = measure(backend, plan, dtype, device, heads, repeats)
            except Exception as error:  # a competitor that fails on a case is a result, not the end
                row = {
                    "error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                }
            rows.append(
                {
                    "scenario": name,
                    "backend": backend,
                    "visible_pairs": plan.visible_pairs,
                    "pairs": dict(plan.pairs),
                    "flops": {"forward": forward, "backward": backward},
                    **row,
                }
            )
            print(_line(rows[-1], ceiling), flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()
    # Times of an interpreter compare with nothing.
    losses = [] if INTERPRETED else list(_losses(rows))
    print("\n".join(losses))
    return {
        "kernel": "conditioning_attention",
        "heads": heads,
        "dtype": str(dtype),
        "matmul_tflops": ceiling,
        "skipped": skipped,
        "rows": rows,
        "losses": losses,
    }


def _line(row: dict[str, Any], ceiling: float) -> str:
    if "error" in row:
        return f"  {row['backend']:<10} failed: {row['error']}"
    parts = [
        f"{part} {row[part]['ms']['50']:9.3f} ms ({row[part]['ms']['20']:.3f} to {row[part]['ms']['80']:.3f}), {row[part]['tflops']:6.1f} TFLOP/s, "
        f"{row[part]['tflops'] / ceiling:4.0%}"
        for part in ("forward", "backward", "both")
    ]
    memory = "" if row["peak_bytes"] is None else f" | peak {row['peak_bytes'] / 2**20:.0f} MiB"
    return f"  {row['backend']:<10} {' | '.join(parts)}{memory}"


def _losses(rows: list[dict[str, Any]]) -> Any:
    """A line for every case and part in which another backend is faster than ours."""
    measured = [row for row in rows if "error" not in row]
    for ours in (row for row in measured if row["backend"] == OURS):
        for other in (
            row
            for row in measured
            if row["scenario"] == ours["scenario"] and row["backend"] != OURS
        ):
            for part in ("forward", "backward", "both"):
                ratio = ours[part]["ms"]["50"] / other[part]["ms"]["50"]
                if ratio > 1:
                    yield f"LOSES: scenario {ours['scenario']}, {part}: {OURS} takes {ratio:.2f} times the time of {other['backend']}"


def plan_building(repeats: int) -> dict[str, Any]:
    """Time to build the plans of packs of about 32,768 tokens on one core, also of a pack with 100 segments."""
    rows = []
    for name, scenario in {**SCENARIOS, "100 segments": (200, 1024, 40, 64, 0, 25)}.items():
        arguments = plan_arguments(segment_table(*scenario))
        context, tokens = arguments.pop("context"), len(arguments["segment_T"])
        row = {"scenario": name, "tokens": tokens, "segments": len(arguments["group_S"])}
        for part, query_rows in (("context", (0, context)), ("live", (context, tokens))):

            def build(
                query_rows: tuple[int, int] = query_rows, arguments: dict[str, Any] = arguments
            ) -> Any:
                return build_plan(**arguments, query_rows=query_rows)

            row[part] = {
                "ms": milliseconds(build, "cpu", repeats),
                "bytes": build().tables.numel() * 4,
            }
        rows.append(row)
        told = [
            f"{part} plan {row[part]['ms']['50']:.2f} ms ({row[part]['ms']['20']:.2f} to {row[part]['ms']['80']:.2f}), "
            f"{row[part]['bytes'] / 1024:.0f} KiB to copy"
            for part in ("context", "live")
        ]
        print(f"{name}: {tokens} tokens, {row['segments']} segments: {', '.join(told)}")
    return {"kernel": "plan", "rows": rows}


def compile_report(capability: int, dtypes: list[str]) -> dict[str, Any]:
    if INTERPRETED:
        raise SystemExit("error: TRITON_INTERPRET=1 compiles nothing; unset it.")
    rows = []
    print(f"{'kernel':<36} {'D':>4} {'registers':>9} {'stack':>5} {'shared':>7}  instructions")
    for dtype in dtypes:
        for dim, kernels in table()[f"sm_{capability}"][
            "single" if dtype == "fp32" else "half"
        ].items():
            for kernel, chosen in kernels.items():
                for variant, result in zip(
                    variants(kernel), compiled(kernel, dtype, int(dim), chosen, capability)
                ):
                    title = f"{kernel}{' without dq' if variant.get('WITH_QUERIES') is False else ''}, {dtype}"
                    counts = {name: count for name, count in result.instructions.items() if count}
                    rows.append(
                        {
                            "kernel": kernel,
                            "variant": variant,
                            "dtype": dtype,
                            "dim": int(dim),
                            "parameters": chosen,
                            **dataclasses.asdict(result),
                            "feasible": result.feasible(capability),
                        }
                    )
                    print(
                        f"{title:<36} {dim:>4} {result.registers:>9} {result.stack:>5} {result.shared:>7}  {counts}",
                        flush=True,
                    )
    return {"kernel": "compile report", "architecture": f"sm_{capability}", "rows": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kernels.py", description="Measures the kernels.")
    parser.add_argument(
        "--kernel",
        choices=("conditioning_attention", "plan", *MEASURES),
        default="conditioning_attention",
        help="what to measure",
    )
    parser.add_argument(
        "--compile-report",
        action="store_true",
        help="compile the launch table and print what the kernels need",
    )
    parser.add_argument(
        "--capability", type=int, default=90, help="of --compile-report (default 90)"
    )
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        help="of --compile-report (default: bf16 and fp32)",
    )
    parser.add_argument(
        "--scenarios", help="letters of the scenarios, separated by commas (default: all)"
    )
    parser.add_argument(
        "--backends", help="attention backends, separated by commas (default: all that run here)"
    )
    parser.add_argument("--repeats", type=int, default=20, help="timed calls (default 20)")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the numbers with hardware, versions and commit",
    )
    options = parser.parse_args(arguments)
    names = SCENARIOS if torch.cuda.is_available() else SMALL
    for flag, chosen, allowed in (
        ("--scenarios", options.scenarios, names),
        ("--backends", options.backends, backend_names("attention")),
    ):
        if unknown := sorted(set(chosen.split(",") if chosen else []) - set(allowed)):
            parser.error(
                f"{flag}: {', '.join(unknown)} is unknown here; allowed are {', '.join(allowed)}"
            )
    if options.compile_report and options.kernel in COMPILED:
        result = compile_report_of(options.kernel, options.capability)
    elif options.compile_report:
        result = compile_report(
            options.capability, [options.dtype] if options.dtype else ["bf16", "fp32"]
        )
    elif options.kernel == "plan":
        result = plan_building(options.repeats)
    elif options.kernel in MEASURES:
        result = MEASURES[options.kernel](options.repeats)
    else:
        result = attention(
            *(
                chosen.split(",") if chosen else None
                for chosen in (options.scenarios, options.backends)
            ),
            options.repeats,
        )
    if options.json:
        options.json.write_text(
            json.dumps({**environment(), "command": " ".join(sys.argv), **result}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
