"""Recorded sampling of the public BAGEL code, as files: requests and results.

A case is NAME.json (task, texts, runs with their settings under BAGEL's names), NAME.safetensors
(noise, sources, and the compared quantities: velocities, latents, logits, tokens) and the folder of
the model, which has no autoencoder: the codec of a replay returns the recorded latents of the
sources. docs/sampling.md lists the keys.

Shape suffixes: docs/notation.md.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from uno_ds.generation.inference import image_views
from uno_ds.generation.inference_model import OpenModel, assemble
from uno_ds.generation.sampler import SamplerSettings
from uno_ds.model.architecture import read_architecture
from uno_ds.model.weights import FIXED, WeightsFile, bagel_name, meta_tensors
from uno_ds.objectives.sampling_task import PictureTask, Task, TextTask, get_task
from uno_ds.sequence.composition import ImageViews
from uno_ds.settings import SettingsError, build

# A case that names no version has this one.
FORMAT = 1
VERSIONS = ("format", "format_version", "version")
VIEWS = ("vit", "latents", "both")
# Keys of the texts of a case, and of their token ids.
TEXTS = {
    "prompts": "prompt_ids",
    "prompt": "prompt_ids",
    "instructions": "instruction_ids",
    "instruction": "instruction_ids",
    "texts": "text_ids",
}
NOT_COUNTED = "expected to differ, not counted"


class RecordedCodec:
    """Encodes the sources of a case, which it looks up by their pixels, as their recorded latents.
    `decoded`: the latents of its last call of decode."""

    def __init__(self) -> None:
        self.known: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.decoded: torch.Tensor | None = None

    def encode(self, pixels_B3hw: torch.Tensor) -> torch.Tensor:
        return torch.stack([self._latent(pixels) for pixels in pixels_B3hw])

    def decode(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        self.decoded = latents_BChw
        return latents_BChw.new_zeros(len(latents_BChw), 3, 1, 1)

    def _latent(self, pixels: torch.Tensor) -> torch.Tensor:
        found = [latent for known, latent in self.known if torch.equal(known, pixels)]
        assert found, "only recorded sources are encoded"
        return found[0]


@dataclass(frozen=True)
class PictureRun:
    number: int
    settings: SamplerSettings
    branches: list[int]
    note: str


@dataclass(frozen=True)
class TextRun:
    number: int
    picture: int
    question: str | None
    question_ids: list[int] | None
    view: str
    max_tokens: int
    ended: bool
    margin: float
    note: str


@dataclass(frozen=True, eq=False)
class SamplingCase:
    path: Path
    task: Task
    tensors: dict[str, torch.Tensor]
    opened: OpenModel
    codec: RecordedCodec
    special_tokens: dict[str, int]
    texts: list[str]
    text_ids: list[list[int]] | None
    size: tuple[int, int] | None
    picture_runs: list[PictureRun]
    text_runs: list[TextRun]

    def tensor(self, *names: str) -> torch.Tensor:
        """The first of these that the case has."""
        found = next((self.tensors[name] for name in names if name in self.tensors), None)
        if found is None:
            raise SettingsError(str(self.path), f"lacks the tensor {' or '.join(names)}.")
        return found

    def noise_GC(self, picture: int, size: tuple[int, int]) -> torch.Tensor:
        """Initial noise of a picture of `size` (height, width)."""
        shape = self.opened.model.shape
        count = len(self.texts)
        stride = shape.geometry.latent_stride
        rows = (size[0] // stride) * (size[1] // stride)
        own = self.tensors.get(f"noise{picture}")
        noise = self.tensor("noise", f"noise{picture}") if own is None else own
        pictures = count if own is None else 1
        if noise.numel() != pictures * rows * shape.latent_values:
            raise SettingsError(
                str(self.path),
                f"noise of shape {list(noise.shape)} is not that of {pictures} x {rows} rows of "
                f"{shape.latent_values} values.",
            )
        return noise.reshape(pictures, rows, -1)[picture if own is None else 0]

    def of_run(self, number: int, picture: int, name: str) -> torch.Tensor | None:
        """A quantity of one picture in run `number`, recorded for it alone or for the batch."""
        alone = self.tensors.get(f"run{number}.picture{picture}.{name}")
        if alone is not None:
            return alone
        batch = self.tensors.get(f"run{number}.{name}")
        if batch is None or name == "t" or batch.ndim < 2 or batch.shape[0] % len(self.texts):
            return batch
        return batch.reshape(len(self.texts), -1, batch.shape[-1])[picture]

    def steps_of_run(self, number: int) -> list[tuple[int, str]]:
        """(step, name) of every velocity that run `number` recorded."""
        pattern = re.compile(rf"run{number}\.(?:picture\d+\.)?step(\d+)\.(\w+)")
        found = [pattern.fullmatch(name) for name in self.tensors]
        return sorted({(int(match[1]), match[2]) for match in found if match})

    def source(self, number: int) -> tuple[Image.Image | ImageViews, tuple[int, int]]:
        """The picture, or its views where those are recorded, and (height, width) as the codec
        reads it. Adds its latent to the codec."""
        shape = self.opened.model.shape
        geometry, down = shape.geometry, shape.codec_downsample
        source: Image.Image | ImageViews
        if f"source{number}.rgb" in self.tensors:
            source = self._rgb(f"source{number}.rgb")
        else:
            source = ImageViews(
                latent=self._pixels(f"source{number}.latent_pixels", geometry.latent_stride),
                vit=self._pixels(f"source{number}.vit_pixels", geometry.vit_stride),
            )
        pixels = image_views(geometry, source).latent
        assert isinstance(pixels, np.ndarray), "a view of pixels"
        height, width = pixels.shape[1:]
        recorded = self.tensor(f"source{number}.latent")
        wanted = [shape.latent_channels, height // down, width // down]
        if list(recorded.shape) != wanted:
            raise SettingsError(
                str(self.path),
                f"source{number}.latent must be {wanted} for pixels of {height} x {width}, "
                f"got {list(recorded.shape)}.",
            )
        self.codec.known.append((torch.from_numpy(pixels), recorded))
        return source, (height, width)

    def _rgb(self, name: str) -> Image.Image:
        rgb = self.tensor(name)
        if rgb.dtype != torch.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
            raise SettingsError(
                str(self.path),
                f"{name} must be uint8 [height, width, 3], got {rgb.dtype} {list(rgb.shape)}.",
            )
        return Image.fromarray(rgb.numpy())

    def _pixels(self, name: str, stride: int) -> np.ndarray:
        """float32 [3, height, width] in [-1, 1]."""
        pixels = self.tensor(name)
        pixels = pixels[0] if pixels.ndim == 4 else pixels
        if (
            pixels.ndim != 3
            or pixels.shape[0] != 3
            or any(side % stride for side in pixels.shape[1:])
        ):
            raise SettingsError(
                str(self.path),
                f"{name} must be [3, height, width] with sides that are multiples of {stride}, "
                f"got {list(pixels.shape)}.",
            )
        return pixels.float().numpy()


def is_sampling_case(path: Path) -> bool:
    """Whether a readable JSON file is a case of this module: it has a task."""
    try:
        description = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(description, dict) and "task" in description


def in_case(path: Path, error: SettingsError) -> SettingsError:
    """The same error under the path of its case."""
    return error if error.key == str(path) else SettingsError(str(path), str(error))


def load_sampling_case(path: Path, backend: str = "sdpa") -> SamplingCase:
    """Raises SettingsError, in one line, if a file is missing or unreadable, or has an unknown task
    or format."""
    try:
        description = json.loads(path.read_text())
        tensors = load_file(path.with_suffix(".safetensors"))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise SettingsError(str(path), f"is not a recorded case: {error}") from None
    try:
        task = get_task(description["task"])
    except ValueError as error:
        raise SettingsError(str(path), str(error)) from None
    version = next((description[key] for key in VERSIONS if key in description), FORMAT)
    if version != FORMAT:
        raise SettingsError(
            str(path), f"has format {version!r} of cases; this version reads format {FORMAT}."
        )
    try:
        texts, ids = _texts(description, task, tensors)
        size = _size(description, task)
        picture_runs: list[PictureRun] = []
        text_runs: list[TextRun] = []
        for number, run in enumerate(description["runs"]):
            match task:
                case PictureTask():
                    picture_runs.append(_picture_run(task, number, run))
                case TextTask():
                    text_runs.append(_text_run(number, run))
                case _:
                    assert_never(task)
        special = dict(description["special_tokens"])
        folder = path.parent / description["model"]
    except KeyError as error:
        raise SettingsError(str(path), f"lacks {error}.") from None
    except SettingsError as error:
        raise in_case(path, error) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise SettingsError(str(path), f"does not follow the format: {error}.") from None
    codec = RecordedCodec()
    return SamplingCase(
        path=path,
        task=task,
        tensors=tensors,
        opened=_open(path, folder, backend, codec),
        codec=codec,
        special_tokens=special,
        texts=texts,
        text_ids=ids,
        size=size,
        picture_runs=picture_runs,
        text_runs=text_runs,
    )


def _size(description: dict, task: Task) -> tuple[int, int] | None:
    """(height, width); None: each picture has the size of its source."""
    is_required = isinstance(task, PictureTask) and not task.has_sources
    if not is_required and description.get("height") is None:
        return None
    return int(description["height"]), int(description["width"])


def _texts(
    description: dict, task: Task, tensors: dict[str, torch.Tensor]
) -> tuple[list[str], list[list[int]] | None]:
    """A text for each picture, and the token ids of the texts; a text task has its questions in
    its runs."""
    if isinstance(task, TextTask):
        return [], None
    key = next((key for key in TEXTS if key in description), None)
    if key is None:
        raise SettingsError("", f"lacks its texts: one of {', '.join(TEXTS)}.")
    texts, ids = description[key], description.get(TEXTS[key])
    if isinstance(texts, str):
        texts = [texts]
        if ids is not None and not isinstance(ids[0], list):
            ids = [ids]
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise SettingsError(key, f"must be a list of texts, got {texts!r}.")
    if task.has_sources:
        sources = sum(bool(re.fullmatch(r"source\d+\.latent", name)) for name in tensors)
        if len(texts) not in (1, sources):
            raise SettingsError(key, f"has {len(texts)} text(s) for {sources} source(s).")
        # One instruction may serve every source.
        texts = texts * (sources // len(texts))
    return texts, ids


def _picture_run(task: PictureTask, number: int, run: dict[str, Any]) -> PictureRun:
    if run["num_timesteps"] < 2:
        raise SettingsError(
            f"runs.{number}.num_timesteps", f"must be at least 2, got {run['num_timesteps']}."
        )
    values = {
        # The public code counts the ends of Euler steps.
        "steps": run["num_timesteps"] - 1,
        "shift": run["timestep_shift"],
        "text_guidance": run["cfg_text_scale"],
        "guidance_interval": run["cfg_interval"],
        "renormalise": run["cfg_renorm_type"].replace("_", "-"),
        "renormalise_least": run["cfg_renorm_min"],
    }
    if task.has_sources:
        values["image_guidance"] = run["cfg_img_scale"]
    elif run["cfg_img_scale"] != 1:
        raise SettingsError(
            f"runs.{number}.cfg_img_scale",
            f"must be 1 without a source image, got {run['cfg_img_scale']}.",
        )
    settings = build(task.settings, values, f"runs.{number}")
    note = NOT_COUNTED if run.get("expected_to_differ") else ""
    return PictureRun(number, settings, list(run["branches_per_step"]), note)


def _text_run(number: int, run: dict[str, Any]) -> TextRun:
    if run["view"] not in VIEWS:
        raise SettingsError(
            f"runs.{number}.view", f"must be one of {', '.join(VIEWS)}; got {run['view']!r}."
        )
    return TextRun(
        number=number,
        picture=run["picture"],
        question=run["question"],
        question_ids=run["question_ids"],
        view=run["view"],
        max_tokens=run["max_tokens"],
        ended=bool(run["ended"]),
        margin=float(run["smallest_margin"]),
        note=NOT_COUNTED if run.get("expected_to_differ") else "",
    )


def _open(path: Path, folder: Path, backend: str, codec: RecordedCodec) -> OpenModel:
    """The model of a base folder that has no autoencoder, on the CPU in fp32."""
    try:
        shape = read_architecture(folder)
        weights = WeightsFile(folder)
        like = meta_tensors(shape)
        shapes = {
            bagel_name(name): tensor.shape for name, tensor in like.items() if name not in FIXED
        }
        weights.check(shapes)
        return assemble(
            shape,
            lambda name: weights.read(bagel_name(name)),
            base=None,
            tokenizer=folder,
            device="cpu",
            dtype=torch.float32,
            attention=backend,
            codec=codec,
        )
    except SettingsError as error:
        raise SettingsError(str(path), f"model {folder}: {error.message}") from None
