"""How often a model draws what a prompt of the embedded scenes asks for, judged by program.

    python -m benchmarks scenes MODEL [MODEL ...] [--prompts 200] [--guidance 4] [--json FILE]

Every model gets the same prompts and the same noise. A picture is `all` right if count, colours, shapes and place or
relation are; the interval is one standard error of that share.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from uno_ds.data.scene_drawing import KINDS
from uno_ds.data.scene_score import score
from uno_ds.data.scenes import ScenesSettings, prompts
from uno_ds.generation.inference import SampleSettings, generate
from uno_ds.generation.inference_model import open_model
from uno_ds.model.architecture import packaged
from uno_ds.settings import SettingsError, build
from uno_ds.training.report import environment

ASPECTS = ("count", "colours", "shapes", "relation", "all")


def measure(
    folder: Path, count: int, guidance: float, steps: int, batch: int = 50
) -> dict[str, Any]:
    """Share of pictures that are right in each aspect, and wholly right by kind of scene."""
    opened = open_model(folder)
    wanted = prompts(ScenesSettings(), count)
    right: list[dict[str, bool]] = []
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
        pictures = generate(opened.model, opened.codec, opened.tokenizer, settings)
        right += [score(picture, scene) for picture, (_, scene) in zip(pictures, part, strict=True)]
    shares = {aspect: sum(bool(row[aspect]) for row in right) / count for aspect in ASPECTS}
    kinds = {
        kind: [
            row["all"]
            for row, (_, scene) in zip(right, wanted, strict=True)
            if scene["kind"] == kind
        ]
        for kind in KINDS
    }
    return {
        "right": shares,
        "standard_error": (shares["all"] * (1 - shares["all"]) / count) ** 0.5,
        "all_by_kind": {kind: sum(rows) / len(rows) for kind, rows in kinds.items() if rows},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    results = {}
    for name in options.models:
        try:
            results[name] = measure(
                packaged(name), options.prompts, options.guidance, options.steps
            )
        except SettingsError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        shares = "  ".join(
            f"{aspect} {100 * share:.0f} %" for aspect, share in results[name]["right"].items()
        )
        kinds = "  ".join(
            f"{kind} {100 * share:.0f} %" for kind, share in results[name]["all_by_kind"].items()
        )
        print(
            f"{name}: {shares} (+- {100 * results[name]['standard_error']:.1f})   wholly right by kind: {kinds}",
            flush=True,
        )
    if options.json:
        settings = {
            "prompts": options.prompts,
            "guidance": options.guidance,
            "steps": options.steps,
            "threads": torch.get_num_threads(),
        }
        options.json.write_text(
            json.dumps({**environment(), "settings": settings, "results": results}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
