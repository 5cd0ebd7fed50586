"""What comparisons with dense.py share."""

import torch

from uno_ds.objectives.uno import UnoObjective

WEIGHTS = dict(flow_weight=0.7, caption_weight=0.4, regression_weight=0.9, answer_weight=0.3)


def gradients(objective: UnoObjective, total: torch.Tensor) -> dict[str, torch.Tensor]:
    named = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad
        for (name, p), grad in zip(named, found, strict=True)
    }


def assert_equal_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The floor is for gradients that are 0 but for rounding."""
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        error = (ours[name] - wanted).abs().max()
        assert error <= 1e-9 * wanted.abs().max() + 1e-15, name
