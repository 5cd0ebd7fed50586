"""The tasks of recorded sampling: what a case of each holds, and the function that repeats it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image

from uno_ds.generation.inference import SampleSettings, edit, generate
from uno_ds.generation.inference_model import OpenModel
from uno_ds.generation.sampler import EditSettings, Observe, SamplerSettings
from uno_ds.sequence.composition import ImageViews


class Draw(Protocol):
    def __call__(
        self,
        opened: OpenModel,
        sources: Sequence[Image.Image | ImageViews],
        texts: list[str],
        settings: SamplerSettings,
        size: tuple[int, int] | None,
        noise_BGC: torch.Tensor,
        observe: Observe,
    ) -> object:
        """Draws one batch of pictures. `sources`: empty for a task without them; `size`: (height,
        width) that the case records."""


@dataclass(frozen=True)
class PictureTask:
    """A case has runs that draw a picture for each of its texts. `settings`: those of a run;
    `has_sources`: each picture has a source image, which gives its size where none is recorded."""

    settings: type[SamplerSettings]
    has_sources: bool
    draw: Draw


@dataclass(frozen=True)
class TextTask:
    """A case has runs that each read a picture and write a text."""


Task = PictureTask | TextTask


def _generate(
    opened: OpenModel,
    sources: Sequence[Image.Image | ImageViews],
    texts: list[str],
    settings: SamplerSettings,
    size: tuple[int, int] | None,
    noise_BGC: torch.Tensor,
    observe: Observe,
) -> None:
    assert isinstance(settings, SampleSettings) and size is not None, "as the case was read"
    sized = dataclasses.replace(settings, prompts=texts, height=size[0], width=size[1])
    generate(
        opened.model,
        opened.codec,
        opened.tokenizer,
        sized,
        noise_BGC=noise_BGC,
        observe=observe,
    )


def _edit(
    opened: OpenModel,
    sources: Sequence[Image.Image | ImageViews],
    texts: list[str],
    settings: SamplerSettings,
    size: tuple[int, int] | None,
    noise_BGC: torch.Tensor,
    observe: Observe,
) -> None:
    assert isinstance(settings, EditSettings), "as the case was read"
    edit(
        opened.model,
        opened.codec,
        opened.tokenizer,
        sources,
        texts,
        settings,
        size,
        noise_BGC=noise_BGC,
        observe=observe,
    )


TASKS: dict[str, Task] = {
    "text_to_image": PictureTask(SampleSettings, has_sources=False, draw=_generate),
    "edit": PictureTask(EditSettings, has_sources=True, draw=_edit),
    "caption": TextTask(),
}


def get_task(name: object) -> Task:
    """Raises ValueError for a name that is not in the table."""
    if not isinstance(name, str) or name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {name!r}.")
    return TASKS[name]
