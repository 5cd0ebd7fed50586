"""Images per second that are read, decoded and resized for both encoders, with several threads or
processes.

    python -m benchmarks reading [--workers 1,2,4] [--images 48] [--rounds 3] [--json FILE]

JPEGs of two sizes are written as parquet and made into samples with the image sizes of
bagel_7b_uno, as a rank's workers make them. Threads and processes alternate from round to round.
A thread is what `data.workers` counts; processes are measured for comparison."""

import argparse
import io
import itertools
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.suite.command_line import Parser
from benchmarks.suite.results import ResultFile
from uno_ds.data.samples import SampleMaker
from uno_ds.data.sources import Source, SourceSettings
from uno_ds.data.stream import chosen_workers
from uno_ds.data.text import Tokenizer
from uno_ds.recipe import load_recipe, packaged
from uno_ds.settings import SettingsError, build

SIZES = ((1024, 1024), (3000, 2250))
RECIPE = "bagel_7b_uno"
# Images of a pack of 32k tokens, and the seconds of its step on an H100 that reading must not
# exceed.
PACK_IMAGES, STEP_SECONDS = 6, 3.3
KINDS = ("threads", "processes")
MOST_WORKERS = 64


def write_images(folder: Path, size: tuple[int, int], count: int) -> int:
    """Writes `count` JPEGs of smooth random colours with some noise; returns the bytes of one."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    rows = [{"image": buffer.getvalue(), "caption": f"picture {n}"} for n in range(count)]
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=4)
    return len(buffer.getvalue())


@cache
def _opened(folder: Path) -> tuple[Source, SampleMaker]:
    """Once in each process."""
    recipe = load_recipe(RECIPE, absent=[])
    settings = build(SourceSettings, {"path": str(folder / "data")})
    source = Source(settings, decoding=recipe.data.latent_image, cache=folder / "cache")
    tokenizer = Tokenizer(packaged("tiny_base"))
    sizes = recipe.data.latent_image, recipe.data.vit_image
    budget = recipe.sequence.token_budget
    return source, SampleMaker(recipe.composer(tokenizer), tokenizer, *sizes, budget)


def make_sample(folder: Path, index: int) -> int:
    """What a worker does for one row; the tokens of its sample."""
    source, make = _opened(folder)
    rng = np.random.default_rng(index)
    return make(source.read(index % len(source), rng), rng).length


def processor_seconds() -> float:
    """Of this process and its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def timed(kind: str, workers: int, folder: Path, images: int) -> dict[str, Any]:
    """Wall and processor seconds of `images` images, the start of the workers left out of the
    first."""
    before = processor_seconds()
    with _pool(kind, workers) as pool:
        # Every worker has opened the source before the clock starts.
        list(pool.map(partial(make_sample, folder), range(2 * workers)))
        begun = time.perf_counter()
        lengths = list(pool.map(partial(make_sample, folder), range(images)))
        seconds = time.perf_counter() - begun
    assert all(lengths)
    return {
        "seconds": seconds,
        "images_per_second": images / seconds,
        "processor_seconds": processor_seconds() - before,
        "load": os.getloadavg()[0],
    }


def _pool(kind: str, workers: int) -> Executor:
    if kind == "threads":
        return ThreadPoolExecutor(workers)
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))


def measure(result: ResultFile, options: argparse.Namespace, folder: Path) -> None:
    for size in SIZES:
        place = folder / f"{size[0]}"
        encoded = write_images(place / "data", size, 16)
        _opened(place)
        entries = [
            {
                "name": f"{width}x{height}, {workers} {kind}",
                "size": [width, height],
                "encoded_bytes": encoded,
                "kind": kind,
                "workers": workers,
                "images": options.images,
                "rounds": [],
            }
            for (width, height), kind, workers in itertools.product([size], KINDS, options.workers)
        ]
        for entry in entries:
            result.add(entry)
        for _ in range(options.rounds):
            for entry in entries:
                found = timed(entry["kind"], entry["workers"], place, options.images)
                entry["rounds"].append(found)
                result.save()
        for entry in entries:
            rates = [found["images_per_second"] for found in entry["rounds"]]
            entry["images_per_second"] = float(np.median(rates))
            entry["pack_seconds"] = PACK_IMAGES / entry["images_per_second"]
            print(
                f"{entry['name']:<28} {entry['images_per_second']:6.1f} images/s "
                f"({min(rates):.1f} to {max(rates):.1f}); {PACK_IMAGES} images of a pack in "
                f"{entry['pack_seconds']:.2f} s",
                flush=True,
            )
    result.save()


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    details = {
        "step_seconds": STEP_SECONDS,
        "pack_images": PACK_IMAGES,
        "cores": len(os.sched_getaffinity(0)),
        "workers_of_one_rank_here": chosen_workers(None, 1),
    }
    result = ResultFile(options.json, "reading", details=details)
    with tempfile.TemporaryDirectory() as folder:
        measure(result, options, Path(folder))
    result.finish()
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="reading", description="Measures how fast images are read.")
    parser.add_argument(
        "--workers", default="1,2,4", metavar="N,N", help="numbers of workers (default 1,2,4)"
    )
    parser.add_argument(
        "--images", type=int, default=48, help="images of a round (default 48, at least 1)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")
    options = parser.parse_args(arguments)
    if options.images < 1 or options.rounds < 1:
        parser.error("--images and --rounds must be at least 1")
    counts = options.workers.split(",")
    if not all(count.isdecimal() and 0 < int(count) <= MOST_WORKERS for count in counts):
        raise SettingsError(
            "--workers", f"expects numbers from 1 to {MOST_WORKERS} separated by commas."
        )
    options.workers = list(map(int, counts))
    return options
