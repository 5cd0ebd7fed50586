"""Norms, cosines and shares are those of separate backward passes of the dense implementation in
fp64."""

import itertools

import numpy as np
import pytest
import torch
from dense import uno_loss
from tiny_objective import (
    collate,
    loss_counts,
    make_composer,
    mixed_pack,
    question_answer,
    tiny_objective,
)

from uno_ds.inspection.gradients import flattened, measure_gradients, only, part_of, products
from uno_ds.inspection.hidden_states import LayerOutputs, noised_rows
from uno_ds.sequence.segments import Kind

WEIGHTS = dict(flow_weight=0.7, caption_weight=0.4, regression_weight=0.9, answer_weight=0)
NAMES = ("flow", "caption", "regression")


@pytest.fixture(scope="module")
def dense():
    """(samples, counts, {loss: {parameter: gradient}}, {loss: [gradient [X, H] after each layer]},
    noise levels) of the dense implementation, each loss by a backward pass of its own."""
    samples = mixed_pack(1, make_composer())
    counts = loss_counts(collate(samples)) + torch.tensor([3.0, 5.0, 2.0, 7.0])
    weights, rows = {}, {}
    for number, name in enumerate(NAMES):
        objective = tiny_objective(**WEIGHTS)
        states: list[torch.Tensor] = []
        _, losses = uno_loss(objective, samples, counts, True, states)
        for state in states:
            state.retain_grad()
        (losses[number] * WEIGHTS[f"{name}_weight"]).backward()
        weights[name] = {
            key: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for key, parameter in objective.named_parameters()
            if parameter.requires_grad
        }
        noised = [
            segment.kind == Kind.NOISED and 0 < place < segment.length - 1
            for sample in samples
            for segment in sample.segments
            for place in range(segment.length)
        ]
        rows[name] = [state.grad[torch.tensor(noised)] for state in states]
    levels = torch.tensor(
        [
            segment.timestep
            for sample in samples
            for segment in sample.segments
            if segment.kind == Kind.NOISED
            for _ in range(segment.length - 2)
        ]
    )
    return samples, counts, weights, rows, levels


def check(found: dict, gradients: dict[str, torch.Tensor]) -> None:
    whole = sum(gradients.values())
    for name, gradient in gradients.items():
        assert found["norm"][name] == pytest.approx(float(gradient.norm()), rel=1e-8, abs=1e-15)
        share = float((gradient * whole).sum() / whole.square().sum())
        assert found["share"][name] == pytest.approx(share, rel=1e-7, abs=1e-12)
    for first, second in itertools.combinations(gradients, 2):
        norms = gradients[first].norm() * gradients[second].norm()
        cosine = found["cosine"][f"{first}_{second}"]
        if norms == 0:
            assert cosine is None
        else:
            expected = float((gradients[first] * gradients[second]).sum() / norms)
            assert cosine == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_weights_of_every_part_equal_separate_backward_passes(dense):
    samples, counts, gradients, _, _ = dense
    report = measure_gradients(tiny_objective(**WEIGHTS), [collate(samples)], counts)
    assert report["losses"] == list(NAMES)
    parts = {part_of(key) for key in gradients["flow"]}
    assert parts == {"input", "output", "metaqueries", "layer 1", "layer 2", "layer 3"}
    assert set(report["weights"]) == parts | {"all"}
    for part, found in report["weights"].items():
        joined = {
            name: torch.cat(
                [grad.flatten() for key, grad in own.items() if part in ("all", part_of(key))]
            )
            for name, own in gradients.items()
        }
        check(found, joined)


def test_the_latents_of_every_window_equal_separate_backward_passes(dense):
    samples, counts, _, rows, levels = dense
    middle = float(levels.unique().median())
    windows = ((0.0, middle), (middle, 1.0))
    report = measure_gradients(tiny_objective(**WEIGHTS), [collate(samples)], counts, windows)
    assert list(report["latents"]) == ["layer 1", "layer 2", "layer 3"]
    inside = [levels < middle, levels >= middle]
    assert all(chosen.any() for chosen in inside)
    for number, layer in enumerate(report["latents"].values()):
        for found, chosen in zip(layer.values(), inside, strict=True):
            check(found, {name: rows[name][number][chosen] for name in NAMES})


def test_the_parts_sum_to_the_whole_and_shares_to_1(dense):
    samples, counts, gradients, _, _ = dense
    objective = tiny_objective(**WEIGHTS)
    total, _ = objective(collate(samples), counts)
    total.backward()
    whole = {key: p.grad for key, p in objective.named_parameters() if p.grad is not None}
    for key, gradient in whole.items():
        torch.testing.assert_close(
            gradient, sum(own[key] for own in gradients.values()), rtol=1e-8, atol=1e-14
        )
    report = measure_gradients(tiny_objective(**WEIGHTS), [collate(samples)], counts)
    assert sum(report["weights"]["all"]["share"].values()) == pytest.approx(1)
    assert report["weights"]["output"]["norm"]["caption"] == 0
    assert report["weights"]["output"]["share"] == pytest.approx(
        {"flow": 1.0, "caption": 0.0, "regression": 0.0}
    )


def test_two_micro_batches_are_one_step(dense):
    samples, counts, *_ = dense
    one = measure_gradients(tiny_objective(**WEIGHTS), [collate(samples)], counts)
    halves = [collate(samples[:2]), collate(samples[2:])]
    two = measure_gradients(tiny_objective(**WEIGHTS), halves, counts)
    assert dict(flattened(two)) == pytest.approx(dict(flattened(one)), rel=1e-6, abs=1e-9)


def test_nothing_is_left_behind():
    objective = tiny_objective(**WEIGHTS)
    batch = collate(mixed_pack(2, make_composer()))
    before = {key: parameter.detach().clone() for key, parameter in objective.named_parameters()}
    scales = objective.scales
    measure_gradients(objective, [batch], loss_counts(batch))
    assert objective.scales is scales
    for key, parameter in objective.named_parameters():
        assert parameter.grad is None and not parameter._backward_hooks, key
        assert torch.equal(parameter, before[key])
    with pytest.raises(RuntimeError), only(objective, {"caption": 1.0}):
        raise RuntimeError
    assert objective.scales is scales


def test_a_loss_without_tokens_or_weight_is_left_out():
    samples = mixed_pack(2, make_composer(captions=False))
    batch = collate(samples)
    report = measure_gradients(tiny_objective(**WEIGHTS), [batch], loss_counts(batch))
    assert report["losses"] == ["flow", "regression"]
    alone = tiny_objective(**WEIGHTS | {"regression_weight": 0})
    report = measure_gradients(
        alone,
        [collate(mixed_pack(2, make_composer(metaqueries=False)))],
        torch.tensor([5.0, 0, 0, 0]),
    )
    assert report["weights"]["all"]["share"] == {"flow": 1.0}


def test_a_micro_batch_without_noised_images_adds_nothing(dense):
    samples, counts, *_ = dense
    questions = collate([question_answer(np.random.default_rng(5), make_composer())])
    assert not len(questions.latents.noised_X)
    alone = measure_gradients(tiny_objective(**WEIGHTS), [collate(samples)], counts)
    both = measure_gradients(tiny_objective(**WEIGHTS), [questions, collate(samples)], counts)
    assert dict(flattened(both)) == pytest.approx(dict(flattened(alone)), rel=1e-6, abs=1e-9)
    none = measure_gradients(tiny_objective(**WEIGHTS), [questions], counts)
    assert none["weights"]["all"]["norm"] == dict.fromkeys(NAMES, 0.0)
    assert none["weights"]["all"]["share"] == dict.fromkeys(NAMES)


def test_products_of_two_opposed_gradients_are_what_a_hand_computes():
    # g1 = (3, 0), g2 = (-1, 0): the sum is (2, 0).
    found = products(torch.tensor([[9.0, -3.0], [-3.0, 1.0]]), ["flow", "caption"])
    assert found == {
        "norm": {"flow": 3.0, "caption": 1.0},
        "cosine": {"flow_caption": -1.0},
        "share": {"flow": 1.5, "caption": -0.5},
    }


def test_recomputed_layers_give_the_same():
    batch = collate(mixed_pack(2, make_composer()))
    plain, recomputed = (
        measure_gradients(
            tiny_objective(recompute=recompute, **WEIGHTS), [batch], loss_counts(batch)
        )
        for recompute in (False, True)
    )
    assert dict(flattened(recomputed)) == pytest.approx(dict(flattened(plain)), rel=1e-9)


def test_rows_of_the_latents_are_taken_from_the_live_rows():
    objective = tiny_objective()
    batch = collate(mixed_pack(2, make_composer()))
    shapes = []
    with LayerOutputs(objective, [2], lambda n, live, b: shapes.append(noised_rows(live, b).shape)):
        objective(batch, loss_counts(batch))
    assert shapes == [(len(batch.latents.noised_X), 16)]
