"""Every backend of every kernel once at BAGEL-7B's shapes: is it right here, and how fast?

    python -m benchmarks smoke [--seconds 40] [--json FILE]

Each backend is compared with fp64 on a small packed batch and timed on a pack of scenario A, by the
check that `auto` uses, in processes of their own. It needs no recipe, so neither a base, data nor
DeepSpeed. --rehearse runs small shapes on a CPU."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.suite.command_line import Parser
from benchmarks.suite.results import ResultFile
from benchmarks.suite.scenarios import SCENARIOS, SMALL_SCENARIOS
from uno_ds.cost.scenario import Scenario
from uno_ds.kernels import self_check
from uno_ds.kernels.backends import KERNELS
from uno_ds.kernels.self_check import Finding, Shapes
from uno_ds.sequence.segments import Kind
from uno_ds.training import kernel_choice


def shapes(scenario: Scenario, small: bool) -> Shapes:
    """Of BAGEL-7B, or small ones, with a pack of the scenario."""
    if small:
        model: dict[str, Any] = dict(
            precision="fp32",
            heads=2,
            key_heads=1,
            head_dim=16,
            encoder_heads=1,
            encoder_head_dim=16,
            hidden=32,
            mlp=64,
            vocabulary=128,
            features=24,
        )
    else:
        model = dict(
            precision="bf16",
            heads=28,
            key_heads=4,
            head_dim=128,
            encoder_heads=16,
            encoder_head_dim=72,
            hidden=3584,
            mlp=18944,
            vocabulary=152064,
            features=1152,
        )
    return Shapes(
        **model,
        distance="cosine",
        understanding=scenario.supervision,
        generation=scenario.generation,
        captions=scenario.rows(Kind.CAPTION),
        metaqueries=scenario.rows(Kind.METAQUERY),
    )


def time_once() -> None:
    """Times of interpreted kernels mean nothing, and take long."""
    self_check.WARMUP, self_check.REPEATS = 0, 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    on_gpu = torch.cuda.is_available() and not options.rehearse
    scenario = (SCENARIOS if on_gpu else SMALL_SCENARIOS)["A"]
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    result = ResultFile(options.json, "smoke", details={"meaningless_times": not on_gpu})

    def report(kernel: str, finding: Finding) -> None:
        row = {"name": kernel, **kernel_choice.finite(finding.plain())}
        print(f"  {kernel}: {kernel_choice.text_of(finding)}", flush=True)
        result.add(row)

    given = (list(KERNELS), shapes(scenario, not on_gpu), scenario, device, options.seconds)
    kernel_choice.check(*given, setup=None if on_gpu else time_once, report=report)
    result.finish()
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="smoke", description="Checks and times every backend of every kernel.")
    parser.add_argument(
        "--seconds", type=float, default=40.0, help="of the whole check (default 40)"
    )
    parser.add_argument("--rehearse", action="store_true", help="small shapes on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")
    return parser.parse_args(arguments)
