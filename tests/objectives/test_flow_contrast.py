"""Contrastive flow matching: loss and gradient in fp64 against the dense implementation, its
minimum, and packs without the term."""

import numpy as np
import pytest
import torch
from dense import uno_loss
from dense_checks import WEIGHTS, assert_equal_gradients, gradients
from tiny_objective import (
    collate,
    loss_counts,
    make_composer,
    mixed_pack,
    question_answer,
    text_to_image,
    tiny_objective,
)

from uno_ds.objectives.flow_matching import flow_contrast_loss, flow_matching_loss


@pytest.mark.parametrize("seed", [1, 6])
@pytest.mark.parametrize("recompute", [False, True])
def test_total_and_gradient_equal_the_dense_implementation(seed, recompute):
    samples = mixed_pack(seed, make_composer())
    batch = collate(samples, contrast=True)
    assert len(batch.latents.partner_X) == len(batch.latents.noised_X)
    counts = loss_counts(batch, "contrast") + torch.tensor([3.0, 5.0, 2.0, 7.0, 11.0])
    objective = tiny_objective(flow_contrast=0.3, recompute=recompute, **WEIGHTS)
    assert objective.losses[-1] == "contrast"
    total, losses = objective(batch, counts)
    dense_total, dense_losses = uno_loss(objective, samples, counts, stop=True)
    torch.testing.assert_close(total, dense_total, rtol=1e-9, atol=0)
    torch.testing.assert_close(losses, dense_losses.detach(), rtol=1e-9, atol=0)
    assert_equal_gradients(gradients(objective, total), gradients(objective, dense_total))
    # It enters with a minus.
    plain, plain_losses = tiny_objective(**WEIGHTS)(batch, counts[:4])
    torch.testing.assert_close(
        total, plain - 0.3 * WEIGHTS["flow_weight"] * losses[-1], rtol=1e-12, atol=0
    )
    assert torch.equal(losses[:-1], plain_losses)


def test_a_pack_with_one_image_or_none_has_no_term():
    rng = np.random.default_rng(0)
    for samples in (
        [text_to_image(rng, make_composer()), question_answer(rng, make_composer())],
        [question_answer(rng, make_composer())],
        [],
    ):
        batch = collate(samples, contrast=True)
        assert not len(batch.latents.partner_X)
        assert batch.loss_counts["contrast"] == batch.loss_counts["flow"]
        ours, losses = tiny_objective(flow_contrast=0.3, **WEIGHTS)(batch, torch.ones(5))
        plain, _ = tiny_objective(**WEIGHTS)(batch, torch.ones(4))
        assert torch.equal(ours, plain) and losses[-1] == 0


def test_the_minimum_over_the_velocity_is_an_affine_map_of_that_of_flow_matching():
    """(v - lambda times the partner's target) / (1 - lambda), as docs/method.md says."""
    share = 0.25
    rows = collate(
        [text_to_image(np.random.default_rng(n), make_composer()) for n in (0, 1)], contrast=True
    ).latents
    target_XC = torch.randn(len(rows.noised_X), 5, dtype=torch.float64)
    best_XC = (target_XC - share * target_XC[rows.partner_X]) / (1 - share)
    best_XC.requires_grad_()
    loss = flow_matching_loss(best_XC, target_XC).sum()
    loss = loss - share * flow_contrast_loss(best_XC, target_XC, rows).sum()
    (slope,) = torch.autograd.grad(loss, best_XC)
    assert slope.abs().max() < 1e-14


def test_the_total_has_a_minimum_where_few_rows_have_a_partner():
    """A pack with two images beside packs with one, as one step: with a velocity that is far from
    everything the total of each pack is above 0, and grows as its square."""
    plain = make_composer(captions=False, metaqueries=False)
    samples = [text_to_image(np.random.default_rng(n), plain) for n in range(12)]
    packs = [samples[:2], *([sample] for sample in samples[2:])]
    batches = [collate(pack, contrast=True) for pack in packs]
    objective = tiny_objective(flow_contrast=0.3, caption_weight=0, regression_weight=0)
    counts = sum(loss_counts(batch, "contrast") for batch in batches)
    partners = sum(len(batch.latents.partner_X) for batch in batches)
    # Divided by the rows with a partner, the contrast would outweigh the flow loss.
    assert 0 < partners < 0.3 * counts[0]
    totals = []
    for size in (1e3, 2e3):
        with torch.no_grad():
            objective.model.llm2vae.bias.fill_(size)
        totals.append(torch.stack([objective(batch, counts)[0].detach() for batch in batches]))
    assert (totals[0] > 0).all()
    torch.testing.assert_close(totals[1], 4 * totals[0], rtol=0.02, atol=0)
