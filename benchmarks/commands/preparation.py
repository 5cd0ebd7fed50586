"""What preparation costs and saves: bytes and seconds of a row, a pack's data, a step, and the visual encoder's share of it.

    python -m benchmarks preparation [--recipe tiny] [--packs 40] [--json FILE]

On one thread of the CPU. Steps are forward and backward of one pack without DeepSpeed, and take turns between pixels and
prepared rows. The large image is drawn (1024 x 1024, JPEG), its latent and targets are random numbers of FLUX's and
SigLIP's sizes: only reading is measured there, no encoder.
"""

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from uno_ds.commands import prepare as preparation
from uno_ds.data.images import ImageSettings, decode, resize, to_array
from uno_ds.data.prepared import (
    DTYPES,
    FORMAT,
    MANIFEST,
    PreparedSource,
    shard_path,
    tensor_bytes,
    write_shard,
)
from uno_ds.data.sources import SourceSettings
from uno_ds.data.stream import VitImageSettings
from uno_ds.generation.inference_model import open_model
from uno_ds.objectives.uno import LOSSES, UnoObjective
from uno_ds.run import Run, prepare
from uno_ds.sequence.batch import PackedBatch
from uno_ds.settings import SettingsError, build
from uno_ds.training.report import environment

LARGE_ROWS = 40


def measure(recipe: str, packs: int, folder: Path) -> dict[str, Any]:
    """Milliseconds by quantity ([20 %, median, 80 %]), and bytes of the sources' files and of the prepared ones."""
    drawn = [
        f"data.folder={folder / 'drawn'}",
        f"output={folder / 'runs'}",
        "data.prefetch=0",
        "engine.packs_per_step=1",
    ]
    pixels, start = prepare(recipe, drawn), time.perf_counter()
    flags = [word for override in drawn for word in ("--set", override)]
    if preparation.main(["--recipe", recipe, *flags, "--out", str(folder / "prepared")]):
        raise SettingsError("--recipe", f"'{recipe}' could not be prepared.")
    seconds, folders = time.perf_counter() - start, sorted((folder / "prepared").iterdir())
    paths = [f"data.sources.{number}.path={path}" for number, path in enumerate(folders)]
    ready = prepare(recipe, [*drawn, *paths])
    objective = _objective(pixels)
    times: dict[str, list[float]] = {}
    for run, name in ((pixels, "pixels"), (ready, "prepared")):
        iterator = iter(run.stream(0, 1))
        next(iterator)
        batches = [_timed(times, f"data, {name}", next, iterator)[0] for _ in range(packs)]
        if run is pixels:
            from_pixels = batches
    for one, other in zip(from_pixels, batches, strict=True):
        _timed(times, "step, pixels", _step, objective, one)
        _timed(times, "step, prepared", _step, objective, other)
        _timed(times, "visual encoder, pixels", _encode, objective, one)
        _timed(times, "visual encoder, prepared", _encode, objective, other)
    sizes = {
        source.name: {
            "rows": len(source),
            "source_bytes": _bytes(source.paths),
            "prepared_bytes": _bytes(out.iterdir()),
        }
        for source, out in zip(pixels.sources, folders, strict=True)
    }
    return {
        "prepare_seconds": seconds,
        "tokens_of_a_pack": sum(batch.tokens for batch in batches) / packs,
        "sources": sizes,
        "milliseconds": _quantiles(times),
    }


def measure_large(folder: Path) -> dict[str, Any]:
    """Reading one 1024 x 1024 image: decoded and resized for both encoders, or as its prepared row."""
    rng, times = np.random.default_rng(0), {}
    smooth = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize(
        (1024, 1024), Image.Resampling.BICUBIC
    )
    grain = (np.asarray(smooth) + rng.normal(0, 6, (1024, 1024, 3))).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grain).save(buffer, "JPEG", quality=90)
    latent_image, vit_image, bytes_of_row = (
        ImageSettings(),
        VitImageSettings(),
        {"jpeg": len(buffer.getvalue())},
    )

    def views() -> None:
        image = decode(buffer.getvalue(), latent_image)
        for stride, settings in ((16, latent_image), (14, vit_image)):
            to_array(resize(image, stride, settings))

    for _ in range(LARGE_ROWS):
        _timed(times, "decode and resize", views)
    for dtype in DTYPES:
        out = folder / dtype
        out.mkdir()
        image = {
            "latent": tensor_bytes(torch.randn(16, 128, 128), dtype),
            "latent_shape": [16, 128, 128],
            "latent_grid": [64, 64],
            "target": tensor_bytes(torch.randn(64, 1152), dtype),
            "target_grid": [70, 70],
        }
        write_shard(
            shard_path(out, 0),
            "t2i",
            iter([{"image": image, "captions": [list(range(60))] * 2}] * LARGE_ROWS),
        )
        manifest = {
            "format": FORMAT,
            "layout": "t2i",
            "rows": LARGE_ROWS,
            "rows_per_shard": LARGE_ROWS,
            "dtype": dtype,
            "unreadable_files": {},
            "recipe": {"sequence.metaquery_grid": 8},
        }
        (out / MANIFEST).write_text(json.dumps(manifest))
        source = PreparedSource(build(SourceSettings, {"path": str(out)}))
        for index in range(LARGE_ROWS):
            _timed(times, f"prepared, {dtype}", source.read, index, rng)
        bytes_of_row[dtype] = shard_path(out, 0).stat().st_size / LARGE_ROWS
    return {"bytes_of_a_row": bytes_of_row, "milliseconds": _quantiles(times)}


def _objective(run: Run) -> UnoObjective:
    recipe, opened = run.recipe, open_model(run.recipe.base)
    objective = UnoObjective(
        opened.model,
        opened.codec,
        recipe.objective,
        recipe.kernels.resolved(),
        recipe.sequence.metaquery_grid**2,
    )
    torch.manual_seed(0)
    for name, parameter in objective.named_parameters():
        if not name.startswith("model."):
            torch.nn.init.normal_(parameter, std=0.1)
    objective.set_trainable(everything=False)
    return objective


def _step(objective: UnoObjective, batch: PackedBatch) -> None:
    total, _ = objective(
        batch, torch.tensor([batch.loss_counts[name] for name in LOSSES], dtype=torch.float64)
    )
    total.backward()
    objective.zero_grad()


@torch.no_grad()
def _encode(objective: UnoObjective, batch: PackedBatch) -> None:
    objective.model.vit(
        batch.vision.patches_PC, batch.vision.positions_P, batch.vision.plan, batch.vision.lengths
    )


def _timed(
    times: dict[str, list[float]], name: str, work: Callable[..., Any], *arguments: Any
) -> Any:
    start = time.perf_counter()
    result = work(*arguments)
    times.setdefault(name, []).append(1000 * (time.perf_counter() - start))
    return result


def _bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _quantiles(times: dict[str, list[float]]) -> dict[str, list[float]]:
    return {
        name: [round(float(value), 2) for value in np.quantile(values, (0.2, 0.5, 0.8))]
        for name, values in times.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--recipe", default="tiny", help="a recipe without question-answer sources (default tiny)"
    )
    parser.add_argument("--packs", type=int, default=40, help="packs that are timed (default 40)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            results = {
                options.recipe: measure(options.recipe, options.packs, Path(folder)),
                "1024 x 1024": measure_large(Path(folder)),
            }
        except SettingsError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    print(json.dumps(results, indent=1))
    if options.json:
        options.json.write_text(
            json.dumps(
                {
                    **environment(),
                    "settings": {"packs": options.packs, "threads": 1},
                    "results": results,
                },
                indent=1,
            )
            + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
