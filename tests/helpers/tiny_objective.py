"""A tiny objective with nothing at zero, and random samples of every task, for comparison with
dense.py."""

import dataclasses
from typing import Any

import numpy as np
import torch
from dense import RMS_EPS, SPECIAL, encode_pixels

from uno_ds.data.layouts.conversation import conversation_sample
from uno_ds.data.layouts.edit import edit_sample
from uno_ds.data.layouts.text_to_image import text_to_image_sample
from uno_ds.kernels.selection import KernelSettings
from uno_ds.model.architecture import Architecture
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import PixelCodec
from uno_ds.objectives.regression_target import open_encoder, target_source
from uno_ds.objectives.uno import ObjectiveSettings, UnoObjective
from uno_ds.sequence.batch import PackedBatch
from uno_ds.sequence.composition import (
    ImageViews,
    SampleComposer,
    SequenceSettings,
    grids_of,
    queries_of,
)
from uno_ds.sequence.packing import Collator
from uno_ds.sequence.segments import Kind, Sample
from uno_ds.settings import build

DEFAULTS = ObjectiveSettings()


def plain(grid: int | tuple[int, ...]) -> int | list[int]:
    """A value of sequence.metaquery_grid."""
    return grid if isinstance(grid, int) else list(grid)


def tiny_shape(layers: int = 3) -> Architecture:
    return build(
        Architecture,
        dict(
            norm_eps=RMS_EPS,
            hidden=16,
            layers=layers,
            heads=4,
            kv_heads=2,
            head_dim=6,
            mlp=20,
            vocabulary=24,
            rope_theta=100.0,
            vit_hidden=12,
            vit_layers=2,
            vit_heads=2,
            vit_mlp=18,
            vit_patch=3,
            vit_side=5,
            codec="pixel",
            codec_downsample=2,
            latent_channels=12,
            latent_patch=2,
            latent_side=4,
        ),
    )


def tiny_objective(
    layers: int = 3,
    grid: int | tuple[int, ...] = 2,
    backend: str = "sdpa",
    recompute: bool = False,
    everything: bool = False,
    dtype: torch.dtype = torch.float64,
    **given,
) -> UnoObjective:
    """Random weights, the same at every call, and none at zero: biases, norms and the velocity head
    included."""
    model = Bagel(tiny_shape(layers), attention=backend, recompute=recompute, read_context=True)
    codec = PixelCodec(model.shape.codec_downsample)
    settings = build(ObjectiveSettings, given)
    queries = queries_of(grids_of(plain(grid)))
    encoder = open_encoder(settings, torch.device("cpu"), dtype)
    objective = UnoObjective(model, codec, settings, KernelSettings().resolved(), queries, encoder)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in objective.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
        parameter.data = noise * scale + (
            1.0 if "norm" in name and name.endswith("weight") else 0.0
        )
    objective.set_trainable(everything)
    return objective.to(dtype)


def make_composer(
    grid: int | tuple[int, ...] = 2,
    captions: bool = True,
    metaqueries: bool = True,
    composition: dict[str, Any] | None = None,
    **sequence,
) -> SampleComposer:
    """Nothing is dropped unless `sequence` says so. `composition`: further arguments."""
    nothing_dropped = dict(drop_text=0.0, drop_vit=0.0, drop_latent=0.0)
    settings = build(
        SequenceSettings,
        dict(token_budget=1000, metaquery_grid=plain(grid)) | nothing_dropped | sequence,
    )
    return SampleComposer(
        settings, tiny_shape().geometry, SPECIAL, captions, metaqueries, **(composition or {})
    )


def random_views(rng: np.random.Generator) -> ImageViews:
    """An image of any size; its two views are cut at the strides of their encoders."""
    latent, vit = (
        rng.uniform(-1, 1, (3, *(stride * rng.integers(1, most, 2, endpoint=True)))).astype(
            np.float32
        )
        for stride, most in ((4, 3), (3, 4))
    )
    return ImageViews(latent, vit)


def random_ids(rng: np.random.Generator) -> list[int]:
    return rng.integers(5, 24, rng.integers(1, 5)).tolist()


def text_to_image(
    rng: np.random.Generator, composer: SampleComposer, caption: bool = True
) -> Sample:
    prompt = random_ids(rng)
    supervision = random_ids(rng) if caption else None
    return text_to_image_sample(composer, "t2i", prompt, supervision, random_views(rng), rng)


def edit(rng: np.random.Generator, composer: SampleComposer) -> Sample:
    source, instruction = random_views(rng), random_ids(rng)
    caption, target = random_ids(rng), random_views(rng)
    return edit_sample(composer, "edit", source, instruction, caption, target, rng)


def question_answer(rng: np.random.Generator, composer: SampleComposer) -> Sample:
    """Two rounds; the first image comes in both views, the second through the visual encoder."""
    first, second = random_views(rng), random_views(rng)
    turns = [
        (False, [first, random_ids(rng)]),
        (True, [random_ids(rng)]),
        (False, [random_ids(rng), ImageViews(vit=second.vit)]),
        (True, [random_ids(rng)]),
    ]
    return conversation_sample(composer, "vlm", turns)


def encoded(sample: Sample) -> Sample:
    """The same sample with its latents already encoded."""
    block = tiny_shape().codec_downsample
    segments = [
        dataclasses.replace(
            segment, pixels=None, latent=encode_pixels(segment.pixels, block).numpy()
        )
        if segment.kind in (Kind.CLEAN, Kind.NOISED)
        else segment
        for segment in sample.segments
    ]
    return Sample(sample.key, segments)


def mixed_pack(seed: int, composer: SampleComposer) -> list[Sample]:
    """Every task, a sample without a caption, and one whose latents come encoded."""
    rng = np.random.default_rng(seed)
    return [
        text_to_image(rng, composer),
        edit(rng, composer),
        question_answer(rng, composer),
        encoded(edit(rng, composer)),
        text_to_image(rng, composer, caption=False),
    ]


def collate(
    samples: list[Sample],
    stop: bool = True,
    everything: bool = False,
    dtype: torch.dtype = torch.float64,
    settings: ObjectiveSettings = DEFAULTS,
    supervision: float = 1.0,
    contrast: bool = False,
) -> PackedBatch:
    """`settings`: of the objective that reads it."""
    return Collator(
        tiny_shape().geometry,
        SPECIAL,
        train_understanding=everything,
        stop_at_context=stop,
        targets=target_source(settings),
        contrast=contrast,
    )(samples, supervision).to("cpu", dtype)


def loss_counts(batch: PackedBatch, *more: str) -> torch.Tensor:
    """[4] counts of this batch's tokens with each loss, in the order of LOSSES, and of `more`."""
    names = ("flow", "caption", "regression", "answer", *more)
    return torch.tensor([batch.loss_counts[name] for name in names], dtype=torch.float64)
