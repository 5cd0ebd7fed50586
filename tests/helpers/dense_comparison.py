"""Loss and every gradient of an objective against dense.py."""

import functools

import torch
from dense import uno_loss
from tiny_objective import collate, loss_counts, make_composer, mixed_pack, tiny_objective

from uno_ds.objectives.uno import UnoObjective

WEIGHTS = dict(flow_weight=0.7, caption_weight=0.4, regression_weight=0.9, answer_weight=0.3)


def gradients(objective: UnoObjective, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    objective.zero_grad(set_to_none=True)
    loss.backward()
    return {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in objective.named_parameters()
    }


@functools.cache
def expected(seed: int, grid: int, stop: bool, everything: bool, **settings) -> tuple:
    """(total, losses, gradients) of the dense implementation; counts are those of a step of which
    this pack is a part."""
    objective = tiny_objective(grid=grid, everything=everything, **WEIGHTS, **settings)
    samples = mixed_pack(seed, make_composer(grid))
    counts = loss_counts(collate(samples)) + torch.tensor([3.0, 5.0, 2.0, 7.0])
    total, losses = uno_loss(objective, samples, counts, stop)
    return samples, counts, total.detach(), losses.detach(), gradients(objective, total)


def check_against_dense(
    seed: int,
    stop: bool,
    everything: bool = False,
    grid: int = 2,
    backend: str = "sdpa",
    recompute: bool = False,
    tolerance: float = 1e-9,
    **settings,
) -> None:
    """`tolerance`: relative to the largest value."""
    samples, counts, total, losses, wanted = expected(seed, grid, stop, everything, **settings)
    objective = tiny_objective(
        grid=grid,
        backend=backend,
        recompute=recompute,
        everything=everything,
        **WEIGHTS,
        **settings,
    )
    batch = collate(samples, stop, everything, settings=objective.settings)
    ours, our_losses = objective(batch, counts)
    assert (losses > 0).all(), "the pack does not exercise every loss"
    torch.testing.assert_close(our_losses, losses, rtol=tolerance, atol=0)
    torch.testing.assert_close(ours.detach(), total, rtol=tolerance, atol=0)
    got = gradients(objective, ours)
    assert got.keys() == wanted.keys()
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            assert got[name] is None, f"{name} is frozen and has a gradient"
            continue
        assert got[name] is not None, f"{name} trains and has no gradient"
        reference = torch.zeros_like(parameter) if wanted[name] is None else wanted[name]
        error, size = (got[name] - reference).abs().max(), reference.abs().max()
        # The floor is for gradients that are 0 but for rounding, such as those of the visual
        # encoder's key biases.
        assert error <= tolerance * size + 1e-15, (
            f"{name}: error {error:.1e}, largest gradient {size:.1e}"
        )
