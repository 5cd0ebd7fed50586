"""A layer that computes both experts' projections together is the same layer."""

import numpy as np
import pytest
import torch
from tiny_objective import collate, edit, loss_counts, make_composer, text_to_image, tiny_objective
from torch import nn

from uno_ds.cost import memory
from uno_ds.model.bagel import Bagel
from uno_ds.model.experts import PairedLinear
from uno_ds.model.layer import Layer
from uno_ds.sequence.batch import PackedBatch

# Roundings of fp32 that a product adds to the others: the two sides sum in another order.
CLOSE = dict(rtol=1e-4, atol=1e-5)


def batches() -> list[PackedBatch]:
    """Of both kinds of rows, and of images alone: no understanding row is live."""
    rng = np.random.default_rng(0)
    composer = make_composer()
    alone = make_composer(captions=False, metaqueries=False)
    return [
        collate([text_to_image(rng, composer), edit(rng, composer)]).to("cpu"),
        collate([text_to_image(rng, alone, caption=False)]).to("cpu"),
    ]


def with_experts(objective, backend: str, recompute: bool = False):
    """The objective, whose layers are replaced by layers with the same weights."""
    model = objective.model
    for number, layer in enumerate(model.layers):
        other = Layer(model.shape, layer.backend, recompute, experts=backend)
        other.to(model.lm_head.weight.dtype).load_state_dict(layer.state_dict())
        trains = dict(layer.named_parameters())
        for name, parameter in other.named_parameters():
            parameter.requires_grad_(trains[name].requires_grad)
        model.layers[number] = other
    return objective


def gradients(objective, batch) -> dict[str, torch.Tensor | None]:
    total, _ = objective(batch, loss_counts(batch))
    total.backward()
    found = {name: parameter.grad for name, parameter in objective.named_parameters()}
    return found | {"total": total.detach()}


def objective_of(backend: str, everything: bool, recompute: bool):
    objective = tiny_objective(dtype=torch.float32, everything=everything)
    return with_experts(objective, backend, recompute)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_every_gradient_equal_those_of_separate_products(everything, recompute):
    for batch in batches():
        ours, theirs = (
            gradients(objective_of(backend, everything, recompute), batch)
            for backend in ("grouped", "separate")
        )
        for name, expected in theirs.items():
            assert (ours[name] is None) == (expected is None), name
            if expected is not None:
                torch.testing.assert_close(ours[name], expected, **CLOSE, msg=name)
        frozen = [name for name, gradient in ours.items() if gradient is None]
        assert bool([name for name in frozen if ".und." in name]) != everything


def test_every_projection_is_a_pair_by_a_joint_backend_and_a_plain_linear_otherwise():
    shape = tiny_objective(layers=1).model.shape
    for backend, kind in (("grouped", PairedLinear), ("separate", nn.Linear)):
        layer = Bagel(shape, experts=backend).layers[0]
        kinds = {type(module) for module in layer.modules() if isinstance(module, nn.Linear)}
        assert kinds == {kind}
    with pytest.raises(ValueError, match="Unknown experts backend 'nobody'"):
        Bagel(shape, experts="nobody")


def kept_bytes(backend: str, batch: PackedBatch) -> int:
    """What autograd keeps of one layer, without its weights, each storage once."""
    objective = objective_of(backend, everything=False, recompute=False)
    layer = objective.model.layers[0]
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    rows = batch.understanding + len(batch.latents.positions_G)
    live_LH = torch.randn(rows, objective.model.shape.hidden, requires_grad=True)
    rope = tuple(x[batch.context :] for x in objective.model._rope(batch))
    nothing = torch.zeros(batch.context, layer.und.k_proj.out_features).unflatten(
        -1, (-1, layer.und.dim)
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer.live(live_LH, nothing, nothing, rope, batch)
    total = sum(storage.nbytes() for storage in kept.values())
    del out
    return total


def test_what_the_memory_estimate_adds_is_what_a_layer_keeps_more():
    """The understanding rows of inputs, which the frozen expert alone would not keep."""
    batch = batches()[0]
    shape = tiny_objective(layers=1).model.shape
    more = kept_bytes("grouped", batch) - kept_bytes("separate", batch)
    assert batch.understanding
    assert more == memory.kept_more_jointly(shape, batch.understanding, 4)
