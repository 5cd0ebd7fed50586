"""The contrastive metaquery loss: its specification, and the Triton kernels, exact by the tolerance
rule, without a matrix of all rows and candidates."""

import math

import pytest
import torch
from kernel_checks import (
    DEVICE,
    PeakBytes,
    assert_as_exact_as_torch,
    forward_and_gradients,
    machine_code,
)
from one_sentence import one_sentence
from torch.utils.flop_counter import FlopCounterMode

from uno_ds.kernels.metaquery_regression import (
    contrast_operator,
    contrast_reference,
    metaquery_contrast,
)

TEMPERATURE = 0.2


def make_inputs(
    rows: int, candidates: int, hidden: int, width: int, head: bool = True
) -> list[torch.Tensor | None]:
    """fp64 values that every dtype holds exactly: hidden, weight, candidates. From three rows on,
    row 0 has no direction, nor has candidate 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, hidden if head else width, generator=generator, dtype=torch.float64)
    z = torch.randn(candidates, width, generator=generator, dtype=torch.float64)
    w = torch.randn(width, hidden, generator=generator, dtype=torch.float64) / hidden**0.5
    if rows >= 3:
        x[0], z[1] = 0, 0
    return [
        value if value is None else value.to(torch.bfloat16).double().to(DEVICE)
        for value in (x, w if head else None, z)
    ]


def contrast(inputs, backend: str, first: int = 0, temperature: float = TEMPERATURE):
    return metaquery_contrast(*inputs, first, temperature, backend)


def three_ways(
    inputs: list[torch.Tensor | None], first: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], ...]:
    """(triton in dtype, torch in dtype, torch in fp64): loss and gradients of hidden and head."""
    generator = torch.Generator().manual_seed(1)
    upstream = torch.rand(len(inputs[0]), generator=generator, dtype=torch.float64).to(DEVICE)
    wanted = [True, inputs[1] is not None, False]

    def way(backend: str, to: torch.dtype) -> list[torch.Tensor]:
        return forward_and_gradients(
            lambda *given: contrast(given, backend, first),
            [value if value is None else value.to(to) for value in inputs],
            wanted,
            upstream,
        )

    return way("triton", dtype), way("reference", dtype), way("reference", torch.float64)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize(("rows", "candidates", "first"), [(5, 5, 0), (3, 9, 4), (1, 1, 0)])
def test_the_specification_equals_a_loop_over_rows(rows, candidates, first, head):
    hidden, weight, targets = make_inputs(rows, candidates, 6, 4, head)
    for row, loss in enumerate(contrast((hidden, weight, targets), "reference", first)):
        p = hidden[row] if weight is None else weight @ hidden[row]
        size = p.norm().item() or 1.0
        scores = [(p @ z).item() / size / (z.norm().item() or 1.0) / TEMPERATURE for z in targets]
        wanted = math.log(sum(map(math.exp, scores))) - scores[first + row]
        assert loss.item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("head", [True, False])
def test_gradients_of_the_specification_equal_finite_differences(head):
    hidden, weight, targets = make_inputs(2, 5, 4, 3, head)
    leaves = [x.requires_grad_() for x in (hidden, weight) if x is not None]

    def loss(hidden: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        return metaquery_contrast(hidden, weight, targets, 2, TEMPERATURE, "reference")

    torch.autograd.gradcheck(loss, leaves)


def test_candidates_get_no_gradient_and_a_perfect_prediction_is_the_best():
    targets = torch.eye(4, requires_grad=True)
    hidden = torch.eye(4, requires_grad=True)
    loss = metaquery_contrast(hidden, None, targets, 0, TEMPERATURE)
    loss.sum().backward()
    assert targets.grad is None and hidden.grad is not None
    wrong = metaquery_contrast(torch.eye(4).roll(1, 0), None, targets, 0, TEMPERATURE)
    assert loss.max() < math.log(4) < wrong.min()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "rows, candidates, first, hidden, width, head",
    [
        (1, 1, 0, 64, 64, True),
        (67, 67, 0, 40, 131, True),
        (67, 200, 61, 40, 64, True),
        (131, 600, 469, 24, 33, True),
        (67, 70, 3, 0, 131, False),
    ],
)
def test_loss_and_gradients_are_as_exact_as_torchs(
    rows, candidates, first, hidden, width, head, dtype
):
    inputs = make_inputs(rows, candidates, hidden, width, head)
    assert_as_exact_as_torch(*three_ways(inputs, first, dtype), f"{rows} of {candidates}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "rows, candidates, first, head",
    [(1, 64, 63, True), (1536, 1536, 0, True), (4099, 16384, 7000, True), (1024, 1024, 0, False)],
)
def test_loss_and_gradients_are_as_exact_as_torchs_at_the_published_models_size(
    rows, candidates, first, head, dtype
):
    inputs = make_inputs(rows, candidates, 3584, 1152, head)
    assert_as_exact_as_torch(*three_ways(inputs, first, dtype), f"{rows} of {candidates}")


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("candidates", [0, 7])
def test_no_rows_give_no_loss_and_a_gradient_of_0_for_the_head(backend, candidates):
    inputs = [value.float() for value in make_inputs(0, candidates, 16, 8)]
    loss, dx, dw = forward_and_gradients(
        lambda *given: contrast(given, backend), inputs, [True, True, False], torch.zeros(0)
    )
    assert loss.shape == (0,) and dx.shape == (0, 16) and dw.shape == (8, 16) and not dw.any()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_row_without_direction_loses_as_by_chance_and_gets_a_gradient_of_0(backend):
    inputs = [value.float() for value in make_inputs(5, 5, 16, 16)]
    loss, dx, _ = forward_and_gradients(
        lambda *given: contrast(given, backend), inputs, [True, True, False], torch.ones(5)
    )
    assert loss[0].item() == pytest.approx(math.log(5), rel=1e-6)
    assert loss.isfinite().all() and not dx[0].any() and dx[1:].abs().sum(dim=1).amin() > 0


def test_a_low_temperature_stays_finite():
    for backend in ("reference", "triton"):
        inputs = [value.float() for value in make_inputs(5, 5, 16, 16)]
        loss, dx, dw = forward_and_gradients(
            lambda *given, backend=backend: contrast(given, backend, temperature=1e-3),
            inputs,
            [True, True, False],
            torch.ones(5),
        )
        assert loss.isfinite().all() and dx.isfinite().all() and dw.isfinite().all()
        assert loss.max() > 100


def test_loss_and_gradients_are_bit_identical_from_run_to_run():
    inputs = make_inputs(67, 600, 16, 40)
    first, second = (three_ways(inputs, 500, torch.float32)[0] for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second))


def test_parts_of_rows_give_what_all_rows_at_once_give(monkeypatch):
    inputs = make_inputs(90, 200, 16, 24)
    whole = three_ways(inputs, 100, torch.float32)
    monkeypatch.setattr(contrast_operator, "WORKSPACE_BYTES", 40 * 200 * 4)
    monkeypatch.setattr(contrast_reference, "SCORE_BYTES", 7 * 200 * 4)
    parts = three_ways(inputs, 100, torch.float32)
    assert_as_exact_as_torch(parts[0], *whole[1:])
    for mine, other in zip(parts[2], whole[2], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


def test_no_matrix_of_rows_and_candidates_is_made(monkeypatch):
    rows, limit = 512, 64 * 512 * 4
    monkeypatch.setattr(contrast_operator, "WORKSPACE_BYTES", limit)
    monkeypatch.setattr(contrast_reference, "SCORE_BYTES", limit)
    inputs = [value.float() for value in make_inputs(rows, rows, 16, 16)]
    inputs[0].requires_grad_()
    with PeakBytes(monkeypatch) as plain:
        contrast(inputs, "reference").sum().backward()
    prediction, _, candidates = inputs
    with PeakBytes(monkeypatch) as fused, torch.no_grad():
        loss, lse = contrast_operator.forward(prediction, candidates, 0, TEMPERATURE)
        contrast_operator.backward(
            torch.ones_like(loss), prediction, candidates, lse, 0, TEMPERATURE
        )
    for memory in (plain, fused):
        assert memory.largest == limit and memory.peak < rows * rows * 4


def test_the_operator_is_registered_as_torch_wants_it():
    prediction, _, candidates = (
        value if value is None else value.float() for value in make_inputs(5, 9, 0, 16, False)
    )
    prediction.requires_grad_()
    given = (prediction, candidates, 4, TEMPERATURE)
    torch.library.opcheck(torch.ops.uno_ds.metaquery_contrast.default, given)


def test_torch_compile_takes_it_as_one_graph():
    inputs = [value.float() for value in make_inputs(5, 9, 16, 8)]

    def loss(*given: torch.Tensor) -> torch.Tensor:
        return 2 * contrast(given, "triton", 3)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ways = [
        forward_and_gradients(way, inputs, [True, True, False], torch.ones(5))
        for way in (compiled, loss)
    ]
    for ours, theirs in zip(*ways, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_flops_are_counted_as_the_products_that_run():
    inputs = [value.float() for value in make_inputs(6, 10, 16, 8)]
    for backend in ("reference", "triton"):
        with FlopCounterMode(display=False) as counter:
            forward_and_gradients(
                lambda *given, backend=backend: contrast(given, backend),
                inputs,
                [True, True, False],
                torch.ones(6),
            )
        # The head forward and twice backward; the scores, the scores again, and their gradient.
        assert counter.get_total_flops() == 3 * 2 * 6 * 16 * 8 + 3 * 2 * 6 * 10 * 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(candidates=(5, 9)), "do not fit: got"),
        (dict(candidates=(2, 8)), "own candidates are 0 to 4, but there are 2"),
        (dict(first=3), "own candidates are 3 to 7, but there are 7"),
        (dict(first=-1), "own candidates are -1 to 3"),
        (dict(temperature=0.0), "temperature must be above 0, got 0.0"),
        (dict(dtype=torch.float64), "must have one dtype"),
        (dict(backend="nobody"), "Unknown regression backend 'nobody'"),
    ],
)
def test_what_does_not_fit_is_a_sentence(change, words):
    hidden, weight = torch.ones(5, 16), torch.ones(8, 16, dtype=change.pop("dtype", torch.float32))
    candidates = torch.ones(change.pop("candidates", (7, 8)))
    given = {"first": 0, "temperature": TEMPERATURE} | change
    with pytest.raises(ValueError, match=words) as raised:
        metaquery_contrast(hidden, weight, candidates, **given)
    one_sentence(raised.value)


@pytest.mark.slow
def test_on_hopper_nothing_spills_and_the_matrix_units_do_the_products():
    report = machine_code("uno_ds.kernels.metaquery_regression.compile_cases")
    scores = {name: code for name, code in report.items() if name.startswith("contrast")}
    assert len(scores) == 2 * 3 + 1
    for name, code in scores.items():
        assert code["feasible"] and code["stack"] == 0, f"{name}: {code}"
        if name.endswith("scores"):
            assert code["instructions"]["LDGSTS.128"] > 0, f"{name}: not copied ahead"
            assert "fp32" in name or code["instructions"]["HGMMA"] > 0, f"{name}: no matrix units"
