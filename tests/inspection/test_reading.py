"""What is read from noised latents: entropies and cosines of training's forward pass, and texts
that do not depend on what is read beside them."""

import numpy as np
import pytest
import torch
from small_runs import picture, random_base
from tiny_objective import collate, loss_counts, make_composer, mixed_pack, tiny_objective

from uno_ds.data.scene_drawing import make_scene
from uno_ds.data.scene_language import captions
from uno_ds.generation.inference import CaptionSettings, caption_noised
from uno_ds.generation.inference_model import open_model
from uno_ds.inspection.reading import HeadOutputs, by_sample, right_shares
from uno_ds.inspection.subject import Subject


def test_entropies_of_samples_sum_to_the_loss_and_cosines_are_those_of_the_loss():
    objective = tiny_objective(caption_weight=0.4, regression_weight=0.9, regression_loss="cosine")
    samples = mixed_pack(4, make_composer())
    batch = collate(samples)
    with HeadOutputs(Subject(objective, None, 2)) as heads, torch.no_grad():
        _, losses = objective(batch, torch.ones(4, dtype=torch.float64))
    found = heads.entropies(samples)
    assert sum(total for total, _ in found) == pytest.approx(float(losses[1]), rel=1e-5)
    assert sum(tokens for _, tokens in found) == loss_counts(batch)[1]
    assert found[-1] == (0.0, 0), "the last sample has no caption"
    assert heads.cosine_M is not None
    assert float((1 - heads.cosine_M).sum()) == pytest.approx(float(losses[2]), rel=1e-5)
    assert [len(piece) for piece in by_sample(heads.cosine_M, samples)] == [4, 4, 0, 4, 4]
    assert not objective.model.lm_head._forward_hooks


def test_captions_read_behind_a_prompt_are_the_same_alone_and_in_a_batch(tmp_path):
    opened = open_model(random_base(tmp_path / "base"))
    images = [picture(seed=seed) for seed in range(2)]
    settings = CaptionSettings(max_tokens=5)
    parts = (opened.model, opened.codec, opened.tokenizer)
    together = caption_noised(*parts, images, settings, 0.4, prompt="a cup")
    first = caption_noised(*parts, images[:1], settings, 0.4, prompt="a cup")
    assert together[:1] == first and len(together) == 2


def test_shares_are_of_the_images_that_have_a_scene():
    scene = make_scene("count", np.random.default_rng(0))
    right, wrong = captions(scene)[0], "a cup."
    shares = right_shares([right, wrong, "whatever"], [scene, scene, None])
    assert shares is not None and shares["all"] == 0.5
    assert right_shares(["a"], [None]) is None
