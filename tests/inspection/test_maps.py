"""Maps: one basis for all models, so that equal states have equal colours."""

from pathlib import Path

import numpy as np
import pytest
import torch

from uno_ds.inspection.maps import colours, fit_basis
from uno_ds.inspection.plan import Plan
from uno_ds.inspection.report import Report
from uno_ds.inspection.store import Store


def tokens(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_three_directions_are_found_and_explain_everything():
    axes = torch.linalg.qr(tokens(8, 8, 0).double()).Q[:3]
    pieces = [
        tokens(20, 3, seed).double() * torch.tensor([3.0, 2.0, 1.0]) @ axes for seed in (1, 2)
    ]
    basis = fit_basis(lambda: pieces)
    assert basis.explained == pytest.approx(1)
    # The directions span the same space.
    assert torch.linalg.matrix_rank(torch.cat([basis.axes_3H, axes]), atol=1e-6) == 3


def test_equal_states_have_equal_colours_whatever_shift_a_piece_has():
    states = tokens(12, 6, 3)
    pieces = [states, states + 100, tokens(12, 6, 4)]
    basis = fit_basis(lambda: pieces)
    first, shifted = (colours(piece, basis, (3, 4)) for piece in pieces[:2])
    assert first.shape == (3, 4, 3)
    assert 0 <= first.min() and first.max() <= 1
    torch.testing.assert_close(first, shifted, rtol=0, atol=1e-4)


def test_the_basis_belongs_to_all_pieces_together():
    left, right = tokens(30, 5, 5) * 3, tokens(30, 5, 6)
    together, alone = fit_basis(lambda: [left, right]), fit_basis(lambda: [right])
    assert not torch.allclose(together.axes_3H, alone.axes_3H)
    again = fit_basis(lambda: [left, right])
    assert torch.equal(together.axes_3H, again.axes_3H)


def test_a_constant_image_has_one_colour():
    basis = fit_basis(lambda: [torch.ones(6, 4)])
    assert colours(torch.ones(6, 4), basis, (2, 3)).unique().numel() <= 1


def test_the_report_fits_one_basis_to_all_models_and_noise_levels(tmp_path: Path):
    """The states of each model and level vary along an axis of their own, so that three components
    explain three quarters of all four, but all of fewer."""
    plan = Plan(("a", "b"), ("maps",), (0.1, 0.9), (2,), 1, 1, 4, 1, 1, (), {})
    store = Store(tmp_path / "work", {})
    line = np.linspace(-1, 1, 6, dtype=np.float32)
    for place, (key, level) in enumerate((key, t) for key in plan.keys for t in plan.levels):
        tokens_1TH = np.zeros((1, 6, 4), np.float32)
        tokens_1TH[0, :, place] = line
        noised = np.zeros((4, 4, 3), np.uint8)
        arrays = {"tokens_0": tokens_1TH, "noised_0": noised}
        store.write(plan.states(key, level)[0], arrays, {"grids": [[2, 3]]})
    report = Report(tmp_path, plan, store, {}, [], ["a cup"])
    (section,) = report.sections()
    assert report.results["maps"]["explained"] == {"layer 2": pytest.approx(3 / 4)}
    assert (tmp_path / section.figures[0][0]).is_file()
