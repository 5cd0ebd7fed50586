"""Samples from a composer with chosen settings."""

import math
from collections.abc import Callable

import numpy as np

from uno_ds.data.layouts.edit import edit_sample
from uno_ds.data.layouts.text_to_image import text_to_image_sample
from uno_ds.sequence.composition import (
    Geometry,
    ImageViews,
    SampleComposer,
    SequenceSettings,
    SpecialTokens,
)
from uno_ds.sequence.segments import Kind, Sample, Segment
from uno_ds.settings import build

GEOMETRY = Geometry(latent_stride=4, latent_values=12, latent_side=8, vit_stride=3, vit_side=9)
SPECIAL = SpecialTokens(bos=1, eos=2, start_of_image=3, end_of_image=4)
DRAWS = 4000
PROMPT, CAPTION, INSTRUCTION = [10, 11, 12], [20, 21], [30, 31, 32, 33]


def make_composer(captions: bool = True, metaqueries: bool = True, **sequence) -> SampleComposer:
    settings = build(
        SequenceSettings,
        dict(token_budget=1000, metaquery_grid=2, drop_text=0.0, drop_vit=0.0, drop_latent=0.0)
        | sequence,
    )
    return SampleComposer(settings, GEOMETRY, SPECIAL, captions, metaqueries)


def image(
    latent: tuple[int, int] = (2, 1), vit: tuple[int, int] = (2, 3), shade: float = 0.0
) -> ImageViews:
    """Both views, their grids given in tokens."""
    shapes = (3, latent[0] * 4, latent[1] * 4), (3, vit[0] * 3, vit[1] * 3)
    return ImageViews(*(np.full(shape, shade, dtype=np.float32) for shape in shapes))


def t2i(composer: SampleComposer, rng: np.random.Generator) -> Sample:
    return text_to_image_sample(composer, "key", PROMPT, CAPTION, image(), rng)


def edit(composer: SampleComposer, rng: np.random.Generator) -> Sample:
    return edit_sample(
        composer, "key", image(shade=0.1), INSTRUCTION, CAPTION, image(shade=0.2), rng
    )


def draws(
    make: Callable, composer: SampleComposer, count: int = DRAWS, seed: int = 0
) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [make(composer, rng) for _ in range(count)]


def kinds(sample: Sample) -> list[Kind]:
    return [segment.kind for segment in sample.segments]


def the(sample: Sample, kind: Kind) -> Segment:
    found = [segment for segment in sample.segments if segment.kind == kind]
    assert len(found) == 1
    return found[0]


def check_rate(hits: int, rate: float, count: int = DRAWS) -> None:
    assert abs(hits - rate * count) <= 4 * math.sqrt(rate * (1 - rate) * count), (
        f"{hits} of {count}, expected a share of {rate}"
    )


RANDOM = dict(
    drop_text=0.4,
    drop_vit=0.4,
    drop_latent=0.4,
    supervised_fraction=0.5,
    supervision_window=[0.1, 0.8],
)
