"""Weights of understanding losses by step and by noise level: gradients in fp64 against the dense
implementation, and nothing but the weights changes."""

import numpy as np
import pytest
import torch
from dense import by_t, uno_loss
from dense_checks import WEIGHTS, assert_equal_gradients, gradients
from tiny_objective import (
    collate,
    loss_counts,
    make_composer,
    mixed_pack,
    text_to_image,
    tiny_objective,
)

from uno_ds.sequence.segments import SUPERVISION_KINDS, Kind

BY_T = {
    "caption_weight_by_t": [[0.1, 2.5], [0.5, 0.25], [0.9, 1.0]],
    "regression_weight_by_t": [[0.0, 0.5], [1.0, 3.0]],
}


@pytest.mark.parametrize("by_level", [True, False])
@pytest.mark.parametrize("supervision", [1.0, 0.3])
def test_total_and_gradient_equal_the_dense_implementation(by_level, supervision):
    given = BY_T if by_level else {}
    samples = mixed_pack(5, make_composer(composition=given))
    batch = collate(samples, supervision=supervision)
    counts = loss_counts(batch) + torch.tensor([3.0, 5.0, 2.0, 7.0])
    objective = tiny_objective(**WEIGHTS, **given)
    total, losses = objective(batch, counts)
    dense_total, dense_losses = uno_loss(
        objective, samples, counts, stop=True, supervision=supervision
    )
    torch.testing.assert_close(total, dense_total, rtol=1e-9, atol=0)
    # The reported losses are without the weights.
    torch.testing.assert_close(losses, dense_losses.detach(), rtol=1e-9, atol=0)
    assert_equal_gradients(gradients(objective, total), gradients(objective, dense_total))
    plain_total, plain_losses = objective(collate(mixed_pack(5, make_composer())), counts)
    assert torch.equal(plain_losses, losses)
    weighted = by_level or supervision != 1
    assert (abs(float((total - plain_total).detach())) > 1e-3) == weighted


def test_where_the_weight_is_zero_nothing_is_laid_out_and_the_noise_is_the_same():
    step = [[0.4, 1.0], [0.400001, 0.0]]
    composer = make_composer(composition={"caption_weight_by_t": step})
    kept = 0
    for seed in range(30):
        ours = text_to_image(np.random.default_rng(seed), composer)
        plain = text_to_image(np.random.default_rng(seed), make_composer())
        noised = next(segment for segment in ours.segments if segment.kind == Kind.NOISED)
        expected = next(segment for segment in plain.segments if segment.kind == Kind.NOISED)
        assert np.array_equal(noised.noise, expected.noise)
        has_caption = any(segment.kind == Kind.CAPTION for segment in ours.segments)
        assert has_caption == (by_t(step, noised.timestep) > 0)
        assert any(segment.kind == Kind.METAQUERY for segment in ours.segments)
        kept += has_caption
    assert 0 < kept < 30


def test_neutral_weights_leave_no_trace_in_a_batch():
    batch = collate(mixed_pack(1, make_composer(composition={"caption_weight_by_t": [[0.5, 1.0]]})))
    assert batch.captions.weights_Y is None and batch.metaqueries.weights_M is None
    assert batch.answers.weights_Y is None
    half = collate(mixed_pack(1, make_composer()), supervision=0.5)
    assert (half.captions.weights_Y == 0.5).all() and (half.metaqueries.weights_M == 0.5).all()
    assert half.answers.weights_Y is None


def test_a_composer_without_supervision_makes_the_samples_of_flow_matching():
    supervised = make_composer(composition=BY_T).unsupervised()
    plain = make_composer(captions=False, metaqueries=False)
    for ours, theirs in zip(mixed_pack(3, supervised), mixed_pack(3, plain), strict=True):
        assert [s.kind for s in ours.segments] == [s.kind for s in theirs.segments]
        assert not {s.kind for s in ours.segments} & set(SUPERVISION_KINDS)
