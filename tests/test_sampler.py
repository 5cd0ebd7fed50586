"""Text to image: what the sampler does with the velocity that the model gives."""
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from uno_ds.data.text import Tokenizer
from uno_ds.generation import sampler
from uno_ds.generation.sampler import SampleSettings, generate
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import PixelCodec, latents_to_rows, rows_to_latents
from uno_ds.recipe import RECIPES, load_recipe
from uno_ds.settings import SettingsError, build

TOKENIZER = Tokenizer(RECIPES / "tiny_base")
CODEC = PixelCodec(2)


@pytest.fixture(scope="module")
def model() -> Bagel:
    torch.manual_seed(0)
    shape = dataclasses.replace(load_recipe("tiny_base").architecture, hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp=64)
    return Bagel(shape).requires_grad_(False)


def draw(model: Bagel, prompts: list[str], **changes) -> list[np.ndarray]:
    settings = build(SampleSettings, {"prompts": prompts, "height": 16, "width": 24, "steps": 4, **changes})
    return [np.asarray(image).astype(int) for image in generate(model, CODEC, TOKENIZER, settings)]


def test_a_picture_depends_on_its_prompt_and_seed_and_not_on_its_neighbours(model):
    red, blue = draw(model, ["a red circle.", "a blue square."], text_guidance=2.0)
    assert red.shape == (16, 24, 3)
    assert np.abs(draw(model, ["a red circle."], text_guidance=2.0)[0] - red).max() <= 1
    assert np.abs(draw(model, ["a green cross."], text_guidance=2.0)[0] - red).max() > 1
    assert np.abs(draw(model, ["a red circle."], text_guidance=2.0, seed=7)[0] - red).max() > 1
    assert np.abs(draw(model, ["a blue square."], text_guidance=2.0, seed=1)[0] - blue).max() <= 1


def test_euler_follows_the_straight_path_of_a_perfect_velocity_to_the_image(monkeypatch, model):
    """With v = eps - x0 the path is a line: any number of steps, any shift, ends at x0."""
    target = torch.linspace(-0.9, 0.9, 3 * 16 * 24).reshape(1, 3, 16, 24)
    clean = latents_to_rows(CODEC.encode(target), 2)

    def perfect(_model, _batch, x, t):
        return (x - torch.cat([clean, clean])) / t  # x_t = (1 - t) x0 + t eps gives eps - x0 = (x_t - x0) / t

    monkeypatch.setattr(sampler, "_velocity", perfect)
    expected = ((target[0].permute(1, 2, 0).numpy() + 1) * 127.5).round()
    for steps, shift in ((1, 1.0), (7, 3.0)):
        assert np.abs(draw(model, ["any"], steps=steps, shift=shift)[0] - expected).max() <= 1


def test_guidance_extrapolates_inside_its_interval_only_and_never_grows_the_velocity(monkeypatch, model):
    seen = []

    def constant(_model, _batch, x, t):
        seen.append(t)
        half = len(x) // 2
        return torch.cat([torch.full((half, 48), 1.0), torch.full((half, 48), 3.0)])

    monkeypatch.setattr(sampler, "_velocity", constant)
    outside = draw(model, ["any"], guidance_interval=[0.0, 0.0], text_guidance=2.0)[0]
    plain = draw(model, ["any"], text_guidance=1.0)[0]
    assert (outside == plain).all()
    # Guided: 3 + 2 (1 - 3) = -1, of the same norm as the prompted velocity 1, so the picture moves the other way.
    guided = draw(model, ["any"], guidance_interval=[0.0, 1.0], text_guidance=2.0)[0]
    assert guided.mean() > plain.mean()
    # Guided: 3 + 5 (1 - 3) = -7, renormalised to norm 1: the same picture as before.
    assert (draw(model, ["any"], guidance_interval=[0.0, 1.0], text_guidance=5.0)[0] == guided).all()
    assert max(seen) == 1.0 and min(seen) > 0


def test_sizes_that_are_no_multiple_of_a_latent_token_are_refused_by_name(model):
    with pytest.raises(SettingsError, match="samples.height: .*multiples of 4"):
        draw(model, ["any"], height=18)


def test_rows_and_latents_are_inverse_for_several_images():
    latents = torch.randn(3, 12, 4, 6)
    rows = latents_to_rows(latents, 2)
    assert rows.shape == (3 * 2 * 3, 48)
    assert torch.equal(rows_to_latents(rows, (2, 3), 2), latents)
    pixels = torch.randn(2, 3, 8, 8)
    assert torch.equal(CODEC.decode(CODEC.encode(pixels)), pixels)


def test_the_packaged_recipes_are_valid_files():
    assert {path.stem for path in Path(RECIPES).glob("*.yaml")} >= {"tiny", "tiny_base"}
