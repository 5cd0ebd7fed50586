"""A small model for sampling, and its outputs without a cache."""

import dataclasses

import torch

from uno_ds.data.text import Tokenizer
from uno_ds.generation.inference import special_tokens
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import PixelCodec, latents_to_rows
from uno_ds.recipe import RECIPES, load_recipe
from uno_ds.sequence.packing import Collator
from uno_ds.sequence.segments import Kind, Sample

TOKENIZER = Tokenizer(RECIPES / "tiny_base")
TOKENS = special_tokens(TOKENIZER)
CODEC = PixelCodec(2)


def small_model() -> Bagel:
    torch.manual_seed(0)
    shape = dataclasses.replace(
        load_recipe("tiny_base").architecture,
        hidden=32,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=16,
        mlp=64,
    )
    return Bagel(shape, read_context=True).requires_grad_(False)


def whole_forward(
    model: Bagel, sample: Sample, noised_latents: torch.Tensor | None, t: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of a whole sample by the forward that trains: (understanding rows in sequence order,
    rows of the last image). Clean images keep their latents, the last image gets `noised_latents`
    at noise level t."""
    batch = Collator(model.shape.geometry, TOKENS, train_understanding=False, stop_at_context=True)(
        [sample]
    )
    rows = [
        latents_to_rows(CODEC.encode(torch.from_numpy(segment.pixels)[None]), 2)
        for segment in sample.segments
        if segment.kind == Kind.CLEAN
    ]
    times = [torch.zeros(len(part)) for part in rows]
    if noised_latents is not None:
        rows, times = [*rows, noised_latents], [*times, torch.full((len(noised_latents),), t)]
    latents_at_t = dataclasses.replace(
        batch.latents, timestep_G=torch.cat([torch.zeros(0), *times])
    )
    batch = dataclasses.replace(batch, latents=latents_at_t)
    understanding, generation, _ = model(
        batch,
        torch.cat([torch.zeros(0, model.shape.latent_values), *rows]),
        torch.zeros(0, model.shape.hidden),
    )
    order = batch.order_T[: batch.context + batch.understanding].argsort()
    return understanding[order], generation[
        len(generation) - (0 if noised_latents is None else len(noised_latents)) :
    ]
