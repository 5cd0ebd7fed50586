"""How often a model draws what a prompt of the embedded scenes asks for, scored by a program.

    python -m benchmarks scenes MODEL [MODEL ...] [--prompts 200] [--guidance 4] [--json FILE]

Every model gets the same prompts and the same noise. An image is `all` right if count, colours,
shapes and position or relation are; the interval is one standard error of that share.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.suite.command_line import Parser
from benchmarks.suite.results import ResultFile
from uno_ds.data.scene_drawing import KINDS
from uno_ds.data.scene_score import score
from uno_ds.data.scenes import ScenesSettings, prompts
from uno_ds.generation.inference import SampleSettings, generate
from uno_ds.generation.inference_model import open_model
from uno_ds.model.architecture import packaged
from uno_ds.settings import build

ASPECTS = ("count", "colours", "shapes", "relation", "all")


def measure(
    folder: Path, count: int, guidance: float, steps: int, batch: int = 50
) -> dict[str, Any]:
    """Share of images that are right in each aspect, and right in all aspects by kind of scene."""
    opened = open_model(folder)
    wanted = prompts(ScenesSettings(), count)
    scores: list[dict[str, bool]] = []
    for start in range(0, count, batch):
        part = wanted[start : start + batch]
        settings = build(
            SampleSettings,
            {
                "prompts": [prompt for prompt, _ in part],
                "text_guidance": guidance,
                "steps": steps,
                "seed": start,
            },
        )
        images = generate(opened.model, opened.codec, opened.tokenizer, settings)
        scores += [score(image, scene) for image, (_, scene) in zip(images, part, strict=True)]
    shares = {}
    for aspect in ASPECTS:
        shares[aspect] = sum(row[aspect] for row in scores) / count
    by_kind: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for row, (_, scene) in zip(scores, wanted, strict=True):
        by_kind[scene["kind"]].append(row["all"])
    return {
        "right": shares,
        "standard_error": (shares["all"] * (1 - shares["all"]) / count) ** 0.5,
        "all_by_kind": {kind: sum(rows) / len(rows) for kind, rows in by_kind.items() if rows},
    }


def print_measurement(entry: dict[str, Any]) -> None:
    print(
        f"{entry['name']}: {_percentages(entry['right'])} "
        f"(+- {100 * entry['standard_error']:.1f})   "
        f"all aspects right, by kind: {_percentages(entry['all_by_kind'])}",
        flush=True,
    )


def _percentages(shares: dict[str, float]) -> str:
    return "  ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    settings = {
        "prompts": options.prompts,
        "guidance": options.guidance,
        "steps": options.steps,
        "threads": torch.get_num_threads(),
    }
    result = ResultFile(options.json, "scenes", details={"settings": settings})
    for name in options.models:
        folder = packaged(name)
        found = measure(folder, options.prompts, options.guidance, options.steps)
        entry = {"name": name, **found}
        print_measurement(entry)
        result.add(entry)
    result.finish()
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="scenes", description="How often a model draws what a prompt asks for.")
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="base folders, such as tiny_base or runs/tiny/model",
    )
    parser.add_argument("--prompts", type=int, default=200, help="number of prompts (default 200)")
    parser.add_argument("--guidance", type=float, default=4.0, help="text guidance (default 4)")
    parser.add_argument("--steps", type=int, default=50, help="Euler steps (default 50)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args(arguments)
    if options.prompts < 1:
        parser.error(f"--prompts must be at least 1, got {options.prompts}")
    return options
