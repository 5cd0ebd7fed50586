"""The specification of the metaquery regression equals a row-by-row loop and finite differences."""

import math

import pytest
import torch
from one_sentence import one_sentence

from uno_ds.kernels.metaquery_regression import metaquery_regression

KINDS = ("cosine", "l2", "smooth_l1")


def regression_inputs(
    rows: int, with_weight: bool, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, target = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((rows, 4), (3, 4), (rows, 3 if with_weight else 4))
    )
    return hidden, weight if with_weight else None, target


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_weight", [True, False])
def test_regression_equals_a_loop_over_rows(with_weight, kind):
    hidden, weight, target = regression_inputs(5, with_weight)
    hidden[0] = (
        -target[0] if weight is None else torch.linalg.lstsq(weight, -target[0]).solution
    )  # the largest distance
    for row, loss in enumerate(metaquery_regression(hidden, weight, target, kind)):
        p = (hidden[row] if weight is None else torch.mv(weight, hidden[row])).tolist()
        z = target[row].tolist()
        pairs = [(a / math.hypot(*p), b / math.hypot(*z)) for a, b in zip(p, z)]
        wanted = {
            "cosine": 1 - sum(a * b for a, b in pairs),
            "l2": sum((a - b) ** 2 for a, b in pairs),
            "smooth_l1": sum(
                (a - b) ** 2 / 2 if abs(a - b) < 1 else abs(a - b) - 0.5 for a, b in pairs
            ),
        }[kind]
        assert loss.item() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_weight", [True, False])
def test_regression_gradients_equal_finite_differences(with_weight, kind):
    hidden, weight, target = regression_inputs(5, with_weight)
    inputs = [hidden.requires_grad_()] + ([weight.requires_grad_()] if with_weight else [])
    torch.autograd.gradcheck(
        lambda hidden, weight=None: metaquery_regression(hidden, weight, target, kind), inputs
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("zero", ["hidden", "target"])
def test_regression_of_a_zero_row_has_a_finite_loss_and_gradient(zero, with_weight, kind):
    hidden, weight, target = regression_inputs(3, with_weight, torch.float32)
    {"hidden": hidden, "target": target}[zero][1] = 0
    inputs = [x.requires_grad_() for x in (hidden, weight) if x is not None]
    loss = metaquery_regression(hidden, weight, target, kind)
    gradients = torch.autograd.grad(loss.sum(), inputs)
    assert loss.isfinite().all() and all(grad.isfinite().all() for grad in gradients)
    assert loss[1].item() == pytest.approx({"cosine": 1, "l2": 1, "smooth_l1": 0.5}[kind], rel=1e-5)


@pytest.mark.parametrize(
    "dtype, expected",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_regression_returns_one_wide_number_per_row_and_accepts_no_rows(dtype, expected):
    for rows in (0, 4):
        for with_weight in (True, False):
            loss = metaquery_regression(*regression_inputs(rows, with_weight, dtype))
            assert loss.shape == (rows,) and loss.dtype == expected


@pytest.mark.parametrize(
    "hidden, weight, target",
    [
        ((5, 4), (3, 4), (5, 4)),
        ((5, 4), (3, 6), (5, 3)),
        ((5, 4), (3, 4), (6, 3)),
        ((5, 4), None, (5, 3)),
        ((5, 2, 4), None, (5, 2, 4)),
        ((5, 2, 4), None, (5, 4)),
        ((4,), None, (4, 4)),
    ],
)
def test_regression_refuses_shapes_that_do_not_fit(hidden, weight, target):
    with pytest.raises(ValueError) as caught:
        metaquery_regression(
            torch.zeros(hidden),
            None if weight is None else torch.zeros(weight),
            torch.zeros(target),
        )
    one_sentence(caught.value, str(list(hidden)), str(list(target)), "[M, H]")


def test_regression_refuses_an_unknown_kind_or_backend():
    hidden, weight, target = regression_inputs(2, True)
    with pytest.raises(ValueError) as caught:
        metaquery_regression(hidden, weight, target, "l1")
    one_sentence(caught.value, "'l1'", *KINDS)
    with pytest.raises(ValueError) as caught:
        metaquery_regression(hidden, weight, target, "l2", backend="auto")
    one_sentence(caught.value, "'auto'", "reference")


def test_mixed_dtypes_of_the_regression_are_a_sentence():
    with pytest.raises(ValueError, match="hidden and weight must have one dtype"):
        metaquery_regression(
            torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.float64), torch.zeros(2, 4)
        )
