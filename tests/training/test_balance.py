"""The balance of the losses: when it measures, what it sets, and that gradients at the latents are
those of the dense implementation."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dense import tokens_of, uno_loss
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

from uno_ds.inspection.gradients import latent_norms
from uno_ds.recipe import load_recipe
from uno_ds.sequence.packing import Packer
from uno_ds.sequence.segments import Kind
from uno_ds.training import balance as balance_module
from uno_ds.training.balance import LossBalance

ON = ["steps=20", "objective.balance=gradient_norm", "objective.balance_every=5"]


def balance_of(*assignments: str) -> LossBalance:
    losses = ("flow", "caption", "regression", "answer")
    objective = SimpleNamespace(losses=losses, scales=dict.fromkeys(losses, 1.0))
    engine = SimpleNamespace(objective=objective, rank=0)
    return LossBalance(load_recipe("tiny", [*ON, *assignments]), engine)


def test_it_measures_first_every_n_steps_and_not_after_the_end_of_supervision():
    balance = balance_of()
    assert balance.due(1) and balance.due(3)
    balance.restore({"understanding_scale": 0.25})
    assert [step for step in range(1, 21) if balance.due(step)] == [1, 6, 11, 16]
    ending = balance_of("objective.supervise_until=0.5")
    ending.restore({"understanding_scale": 0.25})
    assert [step for step in range(1, 21) if ending.due(step)] == [1, 6]
    off = balance_of("objective.balance=none")
    assert not any(off.due(step) for step in range(1, 21))


def test_a_restored_scale_is_that_of_the_checkpoint_and_weighs_understanding_only():
    before, after = balance_of(), balance_of()
    before.restore({"understanding_scale": 1 / 3})
    after.restore(before.state())
    assert after.scale == 1 / 3 and after.values() == {"understanding_scale": 1 / 3}
    assert after._engine.objective.scales == {
        "flow": 1.0,
        "caption": 1 / 3,
        "regression": 1 / 3,
        "answer": 1.0,
    }


def test_without_balance_nothing_is_stored_or_restored():
    off = balance_of("objective.balance=none")
    off.restore({"understanding_scale": 0.5})
    assert off.scale is None and off.state() == {} and off.values() == {}
    old = balance_of()
    old.restore({})
    assert old.scale is None and old.due(7)


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What is measured, in place of passes: gradients of flow and of understanding."""
    measured = [2.0, 0.5]
    monkeypatch.setattr(balance_module, "placed_and_counted", lambda batches, engine: ([], None))
    monkeypatch.setattr(balance_module, "latent_norms", lambda *arguments: list(measured))
    monkeypatch.setattr(balance_module, "gather_objects", lambda own: [own, (9.0, 9.0)])
    return measured


def test_the_scale_gives_the_ratio_without_the_decay_and_by_the_first_rank(norms):
    balance = balance_of("objective.balance_ratio=0.25")
    line = balance.measure(1, [])
    assert balance.scale == 0.25 * 2.0 / 0.5
    assert line == (
        "balance before step 1: gradient at the latents: flow 2, understanding 0.5; understanding "
        "losses times 1"
    )
    decaying = balance_of(
        "objective.balance_ratio=0.25",
        "objective.supervise_until=0.5",
        "objective.supervision_decay=cosine",
    )
    decaying.measure(6, [])
    # Half of the way to the end after step 10: the batches hold a factor of a half.
    assert decaying.scale == pytest.approx(0.25 * 2.0 / (0.5 / 0.5))


@pytest.mark.parametrize("found", [[0.0, 1.0], [1.0, 0.0], [math.nan, 1.0], [1.0, math.inf]])
def test_a_norm_of_zero_or_one_that_is_not_finite_leaves_the_scale(norms, found):
    balance = balance_of()
    norms[:] = found
    assert balance.measure(1, []).endswith("the scale stays as it is") and balance.scale is None
    balance.restore({"understanding_scale": 0.5})
    balance.measure(6, [])
    assert balance.scale == 0.5


@pytest.mark.parametrize("recompute", [False, True])
def test_norms_at_the_latents_are_those_of_the_dense_implementation(recompute):
    samples = mixed_pack(4, make_composer())
    counts = loss_counts(collate(samples)) + torch.tensor([3.0, 5.0, 2.0, 7.0])
    halves = [collate(samples[:2]), collate(samples[2:])]
    objective = tiny_objective(recompute=recompute, **WEIGHTS)
    # What is measured does not depend on the scales that are in force.
    objective.scales = dict.fromkeys(objective.losses, 0.125)
    groups = [["flow"], ["caption", "regression"]]
    found = latent_norms(objective, halves, counts, groups)
    assert set(objective.scales.values()) == {0.125}
    for parameter in objective.parameters():
        assert parameter.grad is None and not parameter._backward_hooks

    tokens = tokens_of(samples)
    noised_T = torch.tensor([token.kind == Kind.NOISED and token.generation for token in tokens])
    for names, norm in zip(groups, found, strict=True):
        states: list[torch.Tensor] = []
        _, losses = uno_loss(objective, samples, counts, stop=True, states=states)
        parts = dict(zip(objective.losses, losses, strict=True))
        total = sum(WEIGHTS[f"{name}_weight"] * parts[name] for name in names)
        (gradient_TH,) = torch.autograd.grad(total, states[0])
        assert norm == pytest.approx(float(gradient_TH[noised_T].norm()), rel=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_rank_without_latents_or_supervision_measures_zero(recompute):
    """And runs the same passes as the other ranks, which would wait for it otherwise."""
    rng = np.random.default_rng(0)
    objective = tiny_objective(recompute=recompute, **WEIGHTS)
    groups = [["flow"], ["caption", "regression"]]
    plain = make_composer(captions=False, metaqueries=False)
    for samples, has_flow in (
        ([], False),
        ([question_answer(rng, plain)], False),
        ([text_to_image(rng, plain)], True),
    ):
        flow, understanding = latent_norms(objective, [collate(samples)], torch.ones(4), groups)
        assert (flow > 0) == has_flow and understanding == 0


def test_the_gradient_of_a_scaled_total_is_that_of_the_dense_implementation():
    settings = WEIGHTS | dict(flow_contrast=0.2, negative_weight=0.4, negative_source="pack")
    samples = mixed_pack(4, make_composer())
    objective = tiny_objective(**settings)
    packer = Packer(4096, negatives=True)
    assert all(map(packer.offer, samples))
    batch = collate(packer.samples, contrast=True)
    counts = loss_counts(batch, "contrast", "negative")
    assert (counts > 0).all()
    scales = {"caption": 3.0, "regression": 3.0, "negative": 3.0}
    objective.scales = {name: scales.get(name, 1.0) for name in objective.losses}
    total, _ = objective(batch, counts)
    _, losses = uno_loss(objective, packer.samples, counts, stop=True)
    weights = objective.settings.weights
    dense_total = sum(
        weights[name] * scales.get(name, 1.0) * loss
        for name, loss in zip(objective.losses, losses, strict=True)
    )
    torch.testing.assert_close(total, dense_total, rtol=1e-9, atol=0)
    assert_equal_gradients(gradients(objective, total), gradients(objective, dense_total))


def test_norms_with_contrast_and_negatives_are_those_of_the_dense_implementation():
    settings = WEIGHTS | dict(flow_contrast=0.2, negative_weight=0.4, negative_source="pack")
    packer = Packer(4096, negatives=True)
    assert all(map(packer.offer, mixed_pack(4, make_composer())))
    batch = collate(packer.samples, contrast=True)
    objective = tiny_objective(**settings)
    counts = loss_counts(batch, "contrast", "negative")
    groups = [["flow", "contrast"], ["caption", "regression", "negative"]]
    found = latent_norms(objective, [batch], counts, groups)
    tokens = tokens_of(packer.samples)
    noised_T = torch.tensor([token.kind == Kind.NOISED and token.generation for token in tokens])
    for names, norm in zip(groups, found, strict=True):
        states: list[torch.Tensor] = []
        _, losses = uno_loss(objective, packer.samples, counts, stop=True, states=states)
        parts = dict(zip(objective.losses, losses, strict=True))
        total = sum(objective.settings.weights[name] * parts[name] for name in names)
        (gradient_TH,) = torch.autograd.grad(total, states[0])
        assert norm == pytest.approx(float(gradient_TH[noised_T].norm()), rel=1e-6)
