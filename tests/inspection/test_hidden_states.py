"""Hidden states are those of training's forward pass, at the layer and noise level that were asked
for."""

import pytest
import torch
from dense import tokens_of, uno_loss
from tiny_objective import collate, loss_counts, make_composer, mixed_pack, tiny_objective

from uno_ds.inspection.hidden_states import LayerOutputs, evenly_spaced, hidden_states
from uno_ds.inspection.images import at_noise_level
from uno_ds.sequence.segments import Kind


@pytest.mark.parametrize("t", [0.1, 0.7])
def test_states_of_every_layer_equal_the_dense_implementation(t):
    objective = tiny_objective()
    samples = [at_noise_level(sample, t) for sample in mixed_pack(3, make_composer())]
    batch = collate(samples)
    ours, sums = hidden_states(objective, batch, [1, 2, 3])
    states: list[torch.Tensor] = []
    _, losses = uno_loss(objective, samples, loss_counts(batch), stop=True, states=states)
    torch.testing.assert_close(sums, losses * loss_counts(batch), rtol=1e-9, atol=0)
    noised = [token.kind == Kind.NOISED and token.generation for token in tokens_of(samples)]
    assert len(states) == 3 and sum(noised) > 10
    for layer, expected in enumerate(states, start=1):
        torch.testing.assert_close(ours[layer], expected[noised].detach(), rtol=1e-9, atol=1e-12)


def test_another_noise_level_gives_other_states_from_the_same_noise():
    samples = mixed_pack(3, make_composer())
    low, high = ([at_noise_level(sample, t) for sample in samples] for t in (0.1, 0.7))
    for first, second in zip(low, high, strict=True):
        for one, other in zip(first.segments, second.segments, strict=True):
            if one.kind == Kind.NOISED:
                assert (one.timestep, other.timestep) == (0.1, 0.7)
                assert (one.noise == other.noise).all()
    objective = tiny_objective()
    states = [hidden_states(objective, collate(level), [3])[0][3] for level in (low, high)]
    assert not torch.allclose(*states)


def test_no_hook_stays():
    objective = tiny_objective()
    with LayerOutputs(objective, [1, 3], lambda *arguments: None):
        assert any(layer._forward_hooks for layer in objective.model.layers)
    assert not any(layer._forward_hooks for layer in objective.model.layers)


def test_layers_are_evenly_spaced_and_end_with_the_last():
    assert evenly_spaced(5, 5) == [1, 2, 3, 4, 5]
    assert evenly_spaced(28, 4) == [7, 14, 21, 28]
    assert evenly_spaced(3, 8) == [1, 2, 3]
