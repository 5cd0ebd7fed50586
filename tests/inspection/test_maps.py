"""Maps: one basis for all models, so that equal states have equal colours."""

import pytest
import torch

from uno_ds.inspection.maps import colours, fit_basis


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
