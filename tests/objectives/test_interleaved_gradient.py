"""Losses and every gradient of interleaved samples equal the dense fp64 implementation."""

import numpy as np
import pytest
import torch
from dense import uno_loss
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_objective import (
    collate,
    loss_counts,
    make_composer,
    random_ids,
    random_views,
    tiny_objective,
)

from uno_ds.data.layouts.interleaved import ImagePiece, TextPiece, interleaved_sample
from uno_ds.sequence.composition import ImageViews, SampleComposer
from uno_ds.sequence.segments import Sample

WEIGHTS = dict(flow_weight=0.7, caption_weight=0.4, regression_weight=0.9, answer_weight=0.3)
KINDS = ("text", "answer", "image", "vit", "latents", "target", "target without caption")
# Every kind of part, with a generated image that is seen by texts and by another generated image.
EVERYTHING = [
    *("image", "vit", "text", "answer", "target", "latents", "text", "target without caption"),
    *("text", "answer"),
]


def piece(kind: str, rng: np.random.Generator) -> TextPiece | ImagePiece:
    if kind in ("text", "answer"):
        return TextPiece(random_ids(rng), kind == "answer")
    views = random_views(rng)
    if kind.startswith("target"):
        return ImagePiece(views, views, random_ids(rng) if kind == "target" else None)
    latent = None if kind == "vit" else views.latent
    return ImagePiece(ImageViews(latent, None if kind == "latents" else views.vit))


def sample(kinds: list[str], seed: int, composer: SampleComposer) -> Sample:
    rng = np.random.default_rng(seed)
    return interleaved_sample(composer, "key", [piece(kind, rng) for kind in kinds], rng)


def check(samples: list[Sample], stop: bool, everything: bool) -> torch.Tensor:
    """Returns the losses."""
    grads = []
    counts = loss_counts(collate(samples)) + torch.tensor([3.0, 5.0, 2.0, 7.0])
    for compute in ("dense", "ours"):
        objective = tiny_objective(everything=everything, **WEIGHTS)
        if compute == "dense":
            total, wanted_losses = uno_loss(objective, samples, counts, stop)
        else:
            total, losses = objective(collate(samples, stop, everything), counts)
            torch.testing.assert_close(losses, wanted_losses, rtol=1e-9, atol=0)
        if total.requires_grad:
            total.backward()
        grads.append({name: value.grad for name, value in objective.named_parameters()})
    wanted, got = grads
    for name, reference in wanted.items():
        if got[name] is None:
            assert reference is None or not reference.any(), f"{name} has no gradient"
            continue
        reference = torch.zeros_like(got[name]) if reference is None else reference
        error, size = (got[name] - reference).abs().max(), reference.abs().max()
        assert error <= 1e-9 * size + 1e-15, f"{name}: {error:.1e} of {size:.1e}"
    return losses


@pytest.mark.parametrize("everything", [False, True], ids=["generation", "all"])
@pytest.mark.parametrize("stop", [True, False], ids=["stop", "flow"])
def test_every_kind_of_part_in_one_sample(stop, everything):
    composer = make_composer()
    samples = [sample(EVERYTHING, 1, composer), sample(["text", "target"], 2, composer)]
    assert (check(samples, stop, everything) > 0).all()


@hypothesis_settings(max_examples=12, deadline=None)
@given(
    interleavings=st.lists(
        st.lists(st.sampled_from(KINDS), min_size=1, max_size=5), min_size=1, max_size=2
    ),
    stop=st.booleans(),
    everything=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_interleavings(interleavings, stop, everything, seed):
    composer = make_composer(drop_text=0.3, drop_vit=0.3, drop_latent=0.3)
    samples = [sample(kinds, seed + place, composer) for place, kinds in enumerate(interleavings)]
    check(
        [made for made in samples if made.segments] or [sample(["text"], 0, composer)],
        stop,
        everything,
    )
