"""Losses of held-out rows do not depend on how the rows are packed."""

from types import SimpleNamespace

import pytest
import torch
from tiny_objective import collate, make_composer, mixed_pack, tiny_objective

from uno_ds.training import held_out
from uno_ds.training.held_out import HeldOutLosses, packed

CONTRASTIVE = {"regression_loss": "contrastive"}


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({}, set()),
        (CONTRASTIVE, {"regression"}),
        ({"flow_contrast": 0.2}, {"contrast"}),
        (CONTRASTIVE | {"flow_contrast": 0.2}, {"regression", "contrast"}),
    ],
)
def test_a_loss_is_the_same_whatever_the_token_budget_or_is_left_out(
    monkeypatch, settings, left_out
):
    monkeypatch.setattr(held_out, "gather_objects", lambda value: [value])
    monkeypatch.setattr(held_out.deepspeed.comm, "all_reduce", lambda tensor: None)
    objective = tiny_objective(**settings)
    engine = SimpleNamespace(objective=objective, device=torch.device("cpu"))
    samples = [sample for seed in range(4) for sample in mixed_pack(seed, make_composer())]
    found, packs = [], []
    for token_budget in (60, 4096):
        packs.append(len(packed(samples, token_budget)))
        losses = HeldOutLosses(
            [],
            SimpleNamespace(token_budget=token_budget),
            lambda pack: collate(pack, contrast=bool(settings.get("flow_contrast"))),
            rows=4,
            times=[],
            seed=0,
        )
        found.append(losses._means(engine, samples))
    assert packs[0] > packs[1] == 1
    expected = {"flow", "caption", "regression"} - left_out
    assert found[0].keys() - {"answer"} == found[1].keys() - {"answer"} == expected
    for name in expected:
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-9)
