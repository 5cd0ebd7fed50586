"""Guidance against its formulas."""

import torch
from rounding import rounding

from uno_ds.generation.sampler import EditSettings, guide
from uno_ds.settings import build


def test_guidance_follows_its_formulas_in_every_renormalisation():
    generator = torch.Generator().manual_seed(0)
    full, no_text, no_image = (torch.randn(2, 5, 3, generator=generator) for _ in range(3))
    velocities = {"full": full, "without_text": no_text, "without_image": no_image}

    def guided(**changes):
        return guide(
            velocities,
            build(EditSettings, {"text_guidance": 4.0, "image_guidance": 2.0, **changes}),
        )

    def up_to_rounding(got: torch.Tensor, wanted: torch.Tensor) -> bool:
        """Norms of 15 values, and differences that may cancel down from the largest value, which is
        below 100."""
        return bool((got - wanted).abs().max() <= 100 * rounding(torch.float32, 15, 2, 2, 2))

    for b in range(2):
        texted = no_text[b] + 4 * (full[b] - no_text[b])
        both = no_image[b] + 2 * (texted - no_image[b])
        assert up_to_rounding(guided(renormalise="none")[b], both)
        assert up_to_rounding(
            guided(renormalise="global")[b], both * min(1, full[b].norm() / both.norm())
        )
        floor = guided(renormalise="global", renormalise_least=0.9)[b]
        assert up_to_rounding(floor, both * min(1, max(0.9, full[b].norm() / both.norm())))
        for r in range(5):
            assert up_to_rounding(
                guided(renormalise="channel")[b, r],
                both[r] * min(1, full[b, r].norm() / both[r].norm()),
            )
            shrunk = texted[r] * min(1, full[b, r].norm() / texted[r].norm())
            assert up_to_rounding(
                guided(renormalise="text-channel")[b, r],
                no_image[b, r] + 2 * (shrunk - no_image[b, r]),
            )
