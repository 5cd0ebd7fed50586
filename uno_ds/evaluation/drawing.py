"""Draws the images of a benchmark with the sampler of generation/."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from uno_ds.evaluation.benchmark import Benchmark
from uno_ds.evaluation.folder import Request
from uno_ds.files_on_disk import replacing
from uno_ds.generation.inference import SampleSettings, codec_size, edit, generate
from uno_ds.generation.inference_model import OpenModel
from uno_ds.generation.sampler import EditSettings, noise_of_seeds

JPEG_QUALITY = 95
Entry = TypeVar("Entry")


def draw_requests(
    opened: OpenModel,
    benchmark: Benchmark,
    requests: Sequence[Request],
    settings: SampleSettings,
    batch: int,
) -> Iterator[Request]:
    """Draws and writes every image; yields its request when the file is there. Each starts from the
    noise of its own seed, whatever it is drawn together with."""
    for part in _parts(requests, batch):
        if benchmark.is_edit:
            yield from _edit(opened, benchmark, part, settings.edit)
        else:
            yield from _generate(opened, part, settings)


def write_image(request: Request, image: Image.Image) -> None:
    """Writes the file, complete or not at all; a PNG holds its seed and prompt."""
    request.path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(request.path) as partial:
        if request.path.suffix == ".jpg":
            image.convert("RGB").save(partial, format="JPEG", quality=JPEG_QUALITY)
            return
        information = PngInfo()
        prompt = request.item.prompt.encode(errors="replace").decode()
        information.add_itxt("prompt", prompt)
        information.add_itxt("seed", str(request.seed))
        image.save(partial, format="PNG", pnginfo=information)


def _generate(
    opened: OpenModel, part: Sequence[Request], settings: SampleSettings
) -> Iterator[Request]:
    prompts = [request.item.prompt for request in part]
    size = settings.height, settings.width
    noise_BGC = _noise(opened, part, size, settings.seed)
    drawn = dataclasses.replace(settings, prompts=prompts)
    images = generate(opened.model, opened.codec, opened.tokenizer, drawn, None, noise_BGC)
    for request, image in zip(part, images, strict=True):
        write_image(request, image)
        yield request


def _edit(
    opened: OpenModel, benchmark: Benchmark, part: Sequence[Request], settings: EditSettings
) -> Iterator[Request]:
    by_size: dict[tuple[int, int], list[tuple[Request, list[Image.Image]]]] = {}
    for request in part:
        sources = benchmark.source_images(request.item)
        size = codec_size(opened.model.shape.geometry, sources[-1])
        by_size.setdefault(size, []).append((request, sources))
    for size, entries in by_size.items():
        for request, image in _edit_one_size(opened, entries, settings, size):
            write_image(request, image)
            yield request


def _edit_one_size(
    opened: OpenModel,
    entries: Sequence[tuple[Request, list[Image.Image]]],
    settings: EditSettings,
    size: tuple[int, int],
) -> Iterable[tuple[Request, Image.Image]]:
    requests = [request for request, _ in entries]
    images = edit(
        opened.model,
        opened.codec,
        opened.tokenizer,
        [sources for _, sources in entries],
        [request.item.prompt for request in requests],
        settings,
        size,
        None,
        _noise(opened, requests, size, settings.seed),
    )
    return zip(requests, images, strict=True)


def _noise(opened: OpenModel, part: Sequence[Request], size: tuple[int, int], shift: int):
    """fp32 [B, G, C]. `shift`: samples.seed, which is added to every seed."""
    stride = opened.model.shape.geometry.latent_stride
    cells = (size[0] // stride) * (size[1] // stride)
    seeds = [request.seed + shift for request in part]
    return noise_of_seeds(seeds, (cells, opened.model.shape.latent_values))


def _parts(entries: Sequence[Entry], size: int) -> Iterator[Sequence[Entry]]:
    for start in range(0, len(entries), size):
        yield entries[start : start + size]
