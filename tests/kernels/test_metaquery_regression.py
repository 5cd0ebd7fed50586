"""The Triton metaquery regression: exact by the tolerance rule, never an [N, D] prediction, nothing
for a frozen head."""

import itertools

import pytest
import torch
from kernel_checks import (
    DEVICE,
    PeakBytes,
    assert_as_exact_as_torch,
    forward_and_gradients,
    machine_code,
)
from rounding import rounding
from torch.utils.flop_counter import FlopCounterMode

from uno_ds.kernels.metaquery_regression import metaquery_regression, triton_operator
from uno_ds.kernels.metaquery_regression.kinds import kind_names, kind_of

KINDS = kind_names()


def make_inputs(
    rows: int, hidden: int, features: int, head: bool = True
) -> list[torch.Tensor | None]:
    """fp64 values that every dtype holds exactly: hidden, weight, target. From three rows on, row 0
    has no hidden, row 1 no target, and row 2 is so far from a target on one axis that smooth_l1
    clips."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, hidden if head else features, generator=generator, dtype=torch.float64)
    z = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    w = (
        torch.randn(features, hidden, generator=generator, dtype=torch.float64) / hidden**0.5
        if head
        else None
    )
    if rows >= 3:
        x[0], z[1], z[2] = 0, 0, 0
        z[2, 0] = 4.0
        x[2] = -x[2] if w is None else -w[0] * 8
        if w is None:
            x[2, 0] = -40.0
    return [
        value if value is None else value.to(torch.bfloat16).double().to(DEVICE)
        for value in (x, w, z)
    ]


def three_ways(
    inputs: list[torch.Tensor | None], kind: str, dtype: torch.dtype
) -> tuple[list[torch.Tensor], ...]:
    """(triton in dtype, torch in dtype, torch in fp64): loss and gradients of hidden and head."""
    upstream = torch.rand(
        len(inputs[0]), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(DEVICE)
    wanted = [True, inputs[1] is not None, False]

    def way(backend: str, to: torch.dtype) -> list[torch.Tensor]:
        return forward_and_gradients(
            lambda x, w, z: metaquery_regression(x, w, z, kind, backend),
            [value if value is None else value.to(to) for value in inputs],
            wanted,
            upstream,
        )

    return way("triton", dtype), way("reference", dtype), way("reference", torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "rows, hidden, features, head",
    [(1, 64, 64, True), (67, 40, 131, True), (131, 136, 64, True), (67, 0, 131, False)],
)
def test_loss_and_gradients_are_as_exact_as_torchs(rows, hidden, features, head, kind, dtype):
    assert_as_exact_as_torch(
        *three_ways(make_inputs(rows, hidden, features, head), kind, dtype), f"{kind} {rows} rows"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "rows, hidden, features, head",
    [
        *((rows, 3584, 1152, True) for rows in (1, 63, 1024, 4099, 16384)),
        (4096, 1152, 64, True),
        (1024, 3584, 3584, True),
        (4096, 0, 3584, False),
    ],
)
def test_loss_and_gradients_are_as_exact_as_torchs_at_the_published_models_size(
    rows, hidden, features, head, kind, dtype
):
    assert_as_exact_as_torch(
        *three_ways(make_inputs(rows, hidden, features, head), kind, dtype), f"{kind} {rows} rows"
    )


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [True, False])
def test_a_row_without_direction_has_a_finite_loss_and_a_gradient_of_0(head, kind, backend):
    inputs = [value if value is None else value.float() for value in make_inputs(5, 16, 16, head)]
    upstream = torch.ones(5, device=DEVICE)
    loss, dx, *dw = forward_and_gradients(
        lambda *all: metaquery_regression(*all, kind, backend),
        inputs,
        [True, head, False],
        upstream,
    )
    assert loss[0].item() == pytest.approx(
        {"cosine": 1, "l2": 1, "smooth_l1": 0.5}[kind],
        abs=0.1 if kind == "smooth_l1" else rounding(torch.float32, 16),
    )
    assert (
        loss.isfinite().all() and dx.isfinite().all() and all(grad.isfinite().all() for grad in dw)
    )
    assert not dx[0].any() and dx[2:].abs().sum(dim=1).amin() > 0
    if kind == "cosine":
        assert not dx[1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_give_no_loss_and_a_gradient_of_0_for_the_head(kind):
    inputs = [value.float() for value in make_inputs(0, 16, 8)]
    loss, dx, dw = forward_and_gradients(
        lambda *all: metaquery_regression(*all, kind, "triton"),
        inputs,
        [True, True, False],
        torch.zeros(0, device=DEVICE),
    )
    assert loss.shape == (0,) and dx.shape == (0, 16) and dw.shape == (8, 16) and not dw.any()


@pytest.mark.parametrize("view", ["every other row", "transposed", "columns"])
def test_a_strided_hidden_gets_its_gradient(view):
    x, w, z = (value.float() for value in make_inputs(6, 16, 8))
    wide = torch.zeros(
        {"every other row": (12, 16), "transposed": (16, 6), "columns": (6, 40)}[view],
        device=DEVICE,
    )

    def narrow(tensor: torch.Tensor) -> torch.Tensor:
        return {"every other row": tensor[::2], "transposed": tensor.T, "columns": tensor[:, 3:19]}[
            view
        ]

    narrow(wide).copy_(x)
    wide.requires_grad_()
    assert not narrow(wide).is_contiguous()
    metaquery_regression(narrow(wide), w, z, "cosine", "triton").sum().backward()
    plain = x.clone().requires_grad_()
    metaquery_regression(plain, w, z, "cosine", "triton").sum().backward()
    assert plain.grad.any() and torch.equal(narrow(wide.grad), plain.grad)
    assert wide.grad.count_nonzero() == plain.grad.count_nonzero()


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_bit_identical_from_run_to_run(kind):
    first, second = (
        three_ways(make_inputs(131, 64, 200), kind, torch.float32)[0] for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second))


def test_what_does_not_train_is_not_computed(monkeypatch):
    products = []
    monkeypatch.setattr(triton_operator, "add_product", lambda *_: products.append("weight"))
    monkeypatch.setattr(
        torch,
        "mm",
        lambda *_, mm=torch.mm, **kwargs: (products.append("hidden"), mm(*_, **kwargs))[1],
    )
    for wanted, expected in (
        ((True, False), ["hidden"]),
        ((False, True), ["weight"]),
        ((True, True), ["hidden", "weight"]),
    ):
        products.clear()
        inputs = [value.float() for value in make_inputs(5, 16, 8)]
        gradients = forward_and_gradients(
            lambda *all: metaquery_regression(*all, "cosine", "triton"),
            inputs,
            [*wanted, False],
            torch.ones(5, device=DEVICE),
        )
        assert products == expected and len(gradients) == 1 + len(expected)


@pytest.mark.parametrize("kind", ["cosine", "smooth_l1"])
@pytest.mark.parametrize("wants_weight", [True, False])
def test_memory_beyond_the_gradients_does_not_grow_with_the_rows(wants_weight, kind, monkeypatch):
    hidden, features, part, number = 16, 128, 128, kind_of(kind)
    monkeypatch.setattr(triton_operator, "WORKSPACE_BYTES", part * features * 4 + 1000)
    for rows in (256, 640):
        x, w, z = (value.float() for value in make_inputs(rows, hidden, features))
        with PeakBytes(monkeypatch) as forward:
            loss, statistics = triton_operator.forward(x, w, z, number)
        upstream = torch.ones_like(loss)
        with PeakBytes(monkeypatch) as backward:
            triton_operator.backward(upstream, x, w, z, statistics, number, True, wants_weight)
        assert 0 < forward.peak <= rows * 4 * (1 + 3 + 3 * 2), (
            "more than three sums of each of the two tiles of features"
        )
        assert (
            part * features * 4
            <= backward.peak - x.nbytes
            <= triton_operator.WORKSPACE_BYTES + wants_weight * 3 * w.nbytes
        )


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [False, True])
def test_memory_on_the_device_beyond_the_gradients_is_bounded_at_any_number_of_rows(trained):
    for rows in (4096, 16384):
        x, w, z = (value.bfloat16() for value in make_inputs(rows, 3584, 1152))
        x.requires_grad_()
        w.requires_grad_(trained)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        metaquery_regression(x, w, z, "cosine", "triton").sum().backward()
        extra = torch.cuda.max_memory_allocated() - before - x.nbytes - trained * 3 * w.nbytes
        assert extra < triton_operator.WORKSPACE_BYTES + 200 * rows + 2**20


def test_the_workspace_holds_at_most_12_megabytes_of_any_width():
    for features, size in itertools.product((64, 1152, 3584, 40_000), (2, 4)):
        rows = triton_operator.rows_of_part(features, size)
        assert rows >= 1 and rows * features * size <= 12_000_000
        assert rows % triton_operator.PART == 0 or rows < triton_operator.PART


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_the_workspace_give_what_one_part_gives(kind, monkeypatch):
    inputs = make_inputs(300, 24, 40)
    whole = three_ways(inputs, kind, torch.float32)
    monkeypatch.setattr(triton_operator, "WORKSPACE_BYTES", 128 * 40 * 4)
    parts = three_ways(inputs, kind, torch.float32)[0]
    assert torch.equal(parts[0], whole[0][0]) and torch.equal(parts[1], whole[0][1])
    assert_as_exact_as_torch(parts, *whole[1:], kind)


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("head", [True, False])
def test_the_operator_is_registered_as_torch_wants_it(head, kind):
    x, w, z = (
        value if value is None else value.float().requires_grad_(number < 2)
        for number, value in enumerate(make_inputs(5, 16, 8, head))
    )
    torch.library.opcheck(torch.ops.uno_ds.metaquery_regression.default, (x, w, z, kind))


def test_torch_compile_takes_it_as_one_graph():
    inputs = [value.float() for value in make_inputs(5, 16, 8)]
    ones = torch.ones(5, device=DEVICE)
    plain = forward_and_gradients(
        lambda *all: 2 * metaquery_regression(*all, "l2", "triton"),
        inputs,
        [True, True, False],
        ones,
    )
    compiled = torch.compile(
        lambda *all: 2 * metaquery_regression(*all, "l2", "triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    for ours, theirs in zip(
        forward_and_gradients(compiled, inputs, [True, True, False], ones), plain
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("trained, products", [(False, 3), (True, 4)])
def test_flops_are_counted_as_the_products_that_run(trained, products):
    inputs = [value.float() for value in make_inputs(6, 16, 8)]
    with FlopCounterMode(display=False) as counter:
        forward_and_gradients(
            lambda *all: metaquery_regression(*all, "cosine", "triton"),
            inputs,
            [True, trained, False],
            torch.ones(6, device=DEVICE),
        )
    assert counter.get_total_flops() == products * 2 * 6 * 16 * 8


@pytest.mark.parametrize(
    "dtype, words",
    [
        (torch.float64, "float32, got torch.float64"),
        *([(torch.bfloat16, "wrong values in bfloat16")] if DEVICE == "cpu" else []),
    ],
)
def test_a_dtype_that_it_cannot_compute_with_is_a_sentence(dtype, words):
    with pytest.raises(ValueError, match=words) as caught:
        metaquery_regression(
            *(value.to(dtype) for value in make_inputs(2, 16, 8)), "cosine", "triton"
        )
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_tensors_on_two_devices_are_a_sentence():
    x, w, z = (value.float() for value in make_inputs(2, 16, 8))
    with pytest.raises(ValueError, match="one device; got hidden on .*, weight on meta") as caught:
        metaquery_regression(x, w.to("meta"), z, "cosine", "triton")
    assert str(caught.value).endswith(".")


@pytest.mark.slow
def test_on_hopper_nothing_spills_and_the_matrix_units_do_the_products():
    report = machine_code("uno_ds.kernels.metaquery_regression.compile_cases")
    assert len(report) >= 10
    for name, code in report.items():
        assert code["feasible"] and code["stack"] == 0 and code["shared"] <= 232_448, (
            f"{name}: {code}"
        )
        if name.endswith("product"):
            assert code["instructions"]["LDGSTS.128"] > 0, (
                f"{name}: rows and weights are not copied ahead"
            )
            assert "fp32" in name or code["instructions"]["HGMMA"] > 0, f"{name}: no matrix units"
            assert code["instructions"]["LDG.128"] >= 8, (
                f"{name}: the target is not loaded 16 bytes at a time"
            )
