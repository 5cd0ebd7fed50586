"""Negative captions: loss and gradient in fp64 against the dense implementation, values by hand,
and where the gradient goes."""

import math

import numpy as np
import pytest
import torch
from dense import uno_loss
from dense_checks import WEIGHTS, assert_equal_gradients, gradients
from tiny_objective import (
    collate,
    edit,
    loss_counts,
    make_composer,
    question_answer,
    random_ids,
    random_views,
    text_to_image,
    tiny_objective,
)

from uno_ds.data.layouts.text_to_image import text_to_image_sample
from uno_ds.objectives.negatives import negative_loss
from uno_ds.sequence.batch import PackedBatch
from uno_ds.sequence.packing import Packer
from uno_ds.sequence.segments import Sample

BY_T = [[0.2, 2.0], [0.8, 0.5]]


def pack(seed: int, source: str, by_t: list[list[float]]) -> list[Sample]:
    """Samples with a negative, with a caption only, without either, and of another layout."""
    rng = np.random.default_rng(seed)
    composition = {"negative_source": source, "caption_weight_by_t": by_t}
    composer = make_composer(composition=composition)
    samples = [
        question_answer(rng, composer),
        *(text_to_image_with_negative(rng, composer) for _ in range(2)),
        text_to_image(rng, composer),
        edit(rng, composer),
        text_to_image(rng, composer, caption=False),
        text_to_image_with_negative(rng, composer),
    ]
    packer = Packer(10_000, negatives=source == "pack")
    assert all(map(packer.offer, samples))
    return packer.samples


def text_to_image_with_negative(rng: np.random.Generator, composer) -> Sample:
    prompt, caption, wrong = random_ids(rng), random_ids(rng), [random_ids(rng), random_ids(rng)]
    return text_to_image_sample(composer, "t2i", prompt, caption, random_views(rng), rng, wrong)


def batch_of(samples: list[Sample], supervision: float = 1.0) -> PackedBatch:
    batch = collate(samples, supervision=supervision)
    assert batch.loss_counts["negative"] == sum(s.negative for x in samples for s in x.segments) > 1
    return batch


@pytest.mark.parametrize("source", ["column", "pack"])
@pytest.mark.parametrize("form, margin", [("softplus", 0.5), ("hinge", 0.5)])
@pytest.mark.parametrize("by_t, supervision", [([], 1.0), (BY_T, 0.7)])
def test_total_and_gradient_equal_the_dense_implementation(source, form, margin, by_t, supervision):
    samples = pack(2, source, by_t)
    batch = batch_of(samples, supervision)
    counts = loss_counts(batch, "negative") + torch.tensor([3.0, 5.0, 2.0, 7.0, 11.0])
    settings = dict(
        negative_weight=0.6,
        negative_form=form,
        negative_margin=margin,
        caption_weight_by_t=by_t,
        **WEIGHTS,
    )
    objective = tiny_objective(**settings)
    assert objective.losses[-1] == "negative"
    total, losses = objective(batch, counts)
    dense_total, dense_losses = uno_loss(
        objective, samples, counts, stop=True, supervision=supervision
    )
    torch.testing.assert_close(total, dense_total, rtol=1e-9, atol=0)
    torch.testing.assert_close(losses, dense_losses.detach(), rtol=1e-9, atol=0)
    assert losses[-1] > 0
    assert_equal_gradients(gradients(objective, total), gradients(objective, dense_total))


def test_a_pack_without_negatives_has_no_term_and_every_weight_a_gradient():
    settings = dict(negative_weight=0.6, **WEIGHTS)
    rng = np.random.default_rng(0)
    for samples in (
        [text_to_image(rng, make_composer())],
        [],
        [question_answer(rng, make_composer())],
    ):
        batch = collate(samples)
        ours, losses = tiny_objective(**settings)(batch, torch.ones(5))
        plain, _ = tiny_objective(**WEIGHTS)(batch, torch.ones(4))
        assert torch.equal(ours, plain) and losses[-1] == 0
        objective = tiny_objective(**settings)
        total, _ = objective(batch, torch.ones(5))
        total.backward()
        for name, parameter in objective.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name


def test_the_gradient_reaches_the_generation_expert_and_no_frozen_weight():
    objective = tiny_objective(
        flow_weight=0, caption_weight=1e-9, regression_weight=0, answer_weight=0, negative_weight=1
    )
    composition = {"negative_source": "column"}
    composer = make_composer(metaqueries=False, composition=composition)
    batch = collate([text_to_image_with_negative(np.random.default_rng(5), composer)])
    total, _ = objective(batch, loss_counts(batch, "negative"))
    total.backward()
    grads = dict(objective.named_parameters())
    assert grads["model.vae2llm.weight"].grad.abs().max() > 1e-6
    assert grads["model.layers.0.gen.v_proj.weight"].grad.abs().max() > 1e-6
    assert not grads["model.llm2vae.weight"].grad.any()
    assert grads["model.lm_head.weight"].grad is None
    assert grads["model.layers.0.und.v_proj.weight"].grad is None


def test_values_by_hand():
    """Caption of 2 tokens with a mean of 1.5 nats, negatives of 1 and 3 tokens with 1.2 and 3."""
    rng = np.random.default_rng(0)
    composer = make_composer(composition={"negative_source": "column"})

    def sample(caption: list[int], wrong: list[int]) -> Sample:
        views = random_views(rng)
        return text_to_image_sample(composer, "t2i", [5], caption, views, rng, [wrong])

    # A text of n ids has n + 1 tokens that are predicted.
    negatives = collate([sample([6], []), sample([6], [7, 8])]).negatives
    entropy_Y = torch.tensor([1.0, 2.0, 0.5, 2.5, 1.2, 2.0, 3.0, 4.0], dtype=torch.float64)
    hinge = negative_loss(entropy_Y, negatives, 0.5, "hinge")
    assert hinge.tolist() == pytest.approx([0.5 + 1.5 - 1.2, 0.0])
    soft = negative_loss(entropy_Y, negatives, 0.5, "softplus")
    expected = [math.log(1 + math.exp(0.8)), math.log(1 + math.exp(0.5 + 1.5 - 3))]
    assert soft.tolist() == pytest.approx(expected)
