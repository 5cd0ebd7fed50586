"""Cost and savings of preparing data: bytes and seconds of a row, and seconds of the data of a
pack, of a step, and of the visual encoder in a step.

    python -m benchmarks preparation [--recipe tiny] [--packs 40] [--json FILE]

On one thread of the CPU. Steps are forward and backward of one pack without DeepSpeed, alternating
between pixels and prepared rows. The large image is synthetic (1024 x 1024, JPEG), its latent and
targets are random numbers of FLUX's and SigLIP's sizes: only reading is measured there, no encoder.
"""

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.suite.command_line import Parser
from benchmarks.suite.results import ResultFile
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
from uno_ds.objectives.regression_target import open_encoder
from uno_ds.objectives.uno import UnoObjective
from uno_ds.recipe import load_recipe
from uno_ds.run import Run, prepare
from uno_ds.sequence.batch import PackedBatch
from uno_ds.settings import SettingsError, build

LARGE_ROWS = 40
OVERRIDES = ["data.prefetch=0", "engine.packs_per_step=1"]


def measure(
    run: Run, recipe: str, overrides: list[str], packs: int, folder: Path
) -> dict[str, Any]:
    """Milliseconds by quantity ([20 %, median, 80 %]), and bytes of the sources' files and of the
    prepared ones."""
    began = time.perf_counter()
    flags = ["--recipe", recipe]
    for override in overrides:
        flags += ["--set", override]
    options = preparation.parse([*flags, "--out", str(folder / "prepared")])
    preparation.prepare(options)
    prepare_seconds = time.perf_counter() - began
    folders = sorted((folder / "prepared").iterdir())
    paths = [f"data.sources.{number}.path={path}" for number, path in enumerate(folders)]
    prepared_run = prepare(recipe, [*overrides, *paths])

    objective = _objective(run)
    times: dict[str, list[float]] = {}
    from_pixels = _timed_packs(times, "data, pixels", run, packs)
    from_prepared = _timed_packs(times, "data, prepared", prepared_run, packs)
    for pixels, prepared in zip(from_pixels, from_prepared, strict=True):
        _timed(times, "step, pixels", _step, objective, pixels)
        _timed(times, "step, prepared", _step, objective, prepared)
        _timed(times, "visual encoder, pixels", _encode, objective, pixels)
        _timed(times, "visual encoder, prepared", _encode, objective, prepared)

    sizes = {}
    for source, out in zip(run.sources, folders, strict=True):
        sizes[source.name] = {
            "rows": len(source),
            "source_bytes": _bytes(source.paths),
            "prepared_bytes": _bytes(out.iterdir()),
        }
    return {
        "prepare_seconds": prepare_seconds,
        "tokens_of_a_pack": sum(batch.tokens for batch in from_prepared) / packs,
        "sources": sizes,
        "milliseconds": _quantiles(times),
    }


def _timed_packs(
    times: dict[str, list[float]], name: str, run: Run, packs: int
) -> list[PackedBatch]:
    iterator = iter(run.stream(0, 1))
    next(iterator)
    return [_timed(times, name, next, iterator)[0] for _ in range(packs)]


def measure_large(folder: Path) -> dict[str, Any]:
    """Reading one 1024 x 1024 image: decoded and resized for both encoders, or as its prepared
    row."""
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {}
    jpeg = _large_jpeg(rng)
    bytes_of_row: dict[str, float] = {"jpeg": len(jpeg)}
    latent_image = ImageSettings()
    vit_image = VitImageSettings()

    def decode_and_resize() -> None:
        image = decode(jpeg, latent_image)
        to_array(resize(image, 16, latent_image))
        to_array(resize(image, 14, vit_image))

    for _ in range(LARGE_ROWS):
        _timed(times, "decode and resize", decode_and_resize)
    for dtype in DTYPES:
        out = folder / dtype
        source = _write_large_rows(out, dtype)
        for index in range(LARGE_ROWS):
            _timed(times, f"prepared, {dtype}", source.read, index, rng)
        bytes_of_row[dtype] = shard_path(out, 0).stat().st_size / LARGE_ROWS
    return {"bytes_of_a_row": bytes_of_row, "milliseconds": _quantiles(times)}


def _large_jpeg(rng: np.random.Generator) -> bytes:
    """Smooth colours with grain: neither as easy to compress as flat ones nor as hard as noise."""
    colours = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    smooth = np.asarray(colours.resize((1024, 1024), Image.Resampling.BICUBIC))
    grain = rng.normal(0, 6, (1024, 1024, 3))
    pixels = (smooth + grain).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _write_large_rows(out: Path, dtype: str) -> PreparedSource:
    out.mkdir()
    image = {
        "latent": tensor_bytes(torch.randn(16, 128, 128), dtype),
        "latent_shape": [16, 128, 128],
        "latent_grid": [64, 64],
        "target": tensor_bytes(torch.randn(64, 1152), dtype),
        "target_grid": [70, 70],
    }
    row = {"image": image, "captions": [list(range(60))] * 2}
    write_shard(shard_path(out, 0), "t2i", iter([row] * LARGE_ROWS))
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
    return PreparedSource(build(SourceSettings, {"path": str(out)}))


def _objective(run: Run) -> UnoObjective:
    recipe = run.recipe
    if recipe.base is None:
        raise SettingsError("--recipe", f"'{recipe.name}' has no base, whose encoders are timed.")
    opened = open_model(recipe.base)
    objective = UnoObjective(
        opened.model,
        opened.codec,
        recipe.objective,
        recipe.kernels.resolved(),
        recipe.sequence.metaqueries,
        open_encoder(recipe.objective, torch.device("cpu"), torch.float32),
    )
    torch.manual_seed(0)
    for name, parameter in objective.named_parameters():
        if not name.startswith("model."):
            torch.nn.init.normal_(parameter, std=0.1)
    objective.set_trainable(everything=False)
    return objective


def _step(objective: UnoObjective, batch: PackedBatch) -> None:
    counts = [batch.loss_counts[name] for name in objective.losses]
    total, _ = objective(batch, torch.tensor(counts, dtype=torch.float64))
    total.backward()
    objective.zero_grad()


@torch.no_grad()
def _encode(objective: UnoObjective, batch: PackedBatch) -> None:
    vision = batch.vision
    objective.model.vit(vision.patches_PC, vision.positions_P, vision.plan, vision.lengths)


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
    """20 % quantile, median and 80 % quantile."""
    quantiles = {}
    for name, values in times.items():
        quantiles[name] = np.quantile(values, (0.2, 0.5, 0.8)).round(2).tolist()
    return quantiles


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = [f"data.folder={folder / 'drawn'}", f"output={folder / 'runs'}", *OVERRIDES]
        recipe = load_recipe(options.recipe, OVERRIDES, absent=[])
        settings = {"packs": options.packs, "threads": 1}
        result = ResultFile(options.json, "preparation", recipe, {"settings": settings})
        run = prepare(options.recipe, overrides)
        result.add(
            {
                "name": options.recipe,
                **measure(run, options.recipe, overrides, options.packs, folder),
            }
        )
        result.add({"name": "1024 x 1024", **measure_large(folder)})
    print(json.dumps(result.measurements, indent=1))
    result.finish()
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="preparation", description="Measures what preparing data saves.")
    parser.add_argument(
        "--recipe", default="tiny", help="a recipe without question-answer sources (default tiny)"
    )
    parser.add_argument("--packs", type=int, default=40, help="packs that are timed (default 40)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args(arguments)
    if options.packs < 1:
        parser.error(f"--packs must be at least 1, got {options.packs}")
    return options
