"""QK-norm with rotary embedding: the specification against a loop over heads, Triton by the
tolerance rule, slabs and row maps."""

import pytest
import torch
from kernel_checks import DEVICE, assert_as_exact_as_torch, machine_code
from rounding import assert_equal_up_to_rounding

from uno_ds.kernels.backends import KernelSettings
from uno_ds.kernels.qk_norm_rope import (
    qk_norm_rope,
    triton_operator,  # noqa: F401  (registers the operator)
)
from uno_ds.settings import SettingsError

pytest.importorskip("triton")
EPS = 1e-6
# (rows of each slab, query heads, key heads, head dim, with a row map)
SHAPES = [
    ((37, 5), 4, 2, 8, False),
    ((1, 0), 3, 3, 16, True),
    ((0, 67), 7, 1, 64, True),
    ((7, 2, 11), 2, 2, 128, False),
    ((13,), 0, 4, 32, False),
    ((0, 0), 4, 2, 16, False),
]


def make_inputs(
    lengths: tuple[int, ...], heads: int, key_heads: int, dim: int, mapped: bool
) -> tuple[list[list[torch.Tensor]], list]:
    """(q, k, v, q_weight, k_weight of each slab in fp64, with values that bf16 holds; [cos, sin,
    eps, place])."""
    generator = torch.Generator().manual_seed(0)

    def rows_of(count: int) -> list[torch.Tensor]:
        shapes = [(length, count, dim) for length in lengths]
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def weights() -> list[torch.Tensor]:
        return [0.5 + torch.rand(dim, generator=generator, dtype=torch.float64) for _ in lengths]

    slabs = [rows_of(heads), rows_of(key_heads), rows_of(key_heads), weights(), weights()]
    rows = sum(lengths)
    angles = 100 * torch.rand(rows, dim // 2, generator=generator, dtype=torch.float64)
    place = torch.randperm(rows, generator=generator).to(DEVICE) if mapped else None
    cos, sin = as_bf16_holds([angles.cos(), angles.sin()])
    return [as_bf16_holds(given) for given in slabs], [cos, sin, EPS, place]


def as_bf16_holds(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.bfloat16().double().to(DEVICE) for x in tensors]


def outputs_and_gradients(
    slabs: list, others: list, dtype: torch.dtype, backend: str, constant: int | None = None
) -> list[torch.Tensor]:
    """q, k, v, then the gradients of q, k, v, q_weight, k_weight of each slab. The weights of slab
    `constant` do not train."""

    def leaves(group: int, given: list[torch.Tensor]) -> list[torch.Tensor]:
        return [
            x.to(dtype, copy=True).requires_grad_(group < 3 or number != constant)
            for number, x in enumerate(given)
        ]

    slabs = [leaves(group, given) for group, given in enumerate(slabs)]
    cos, sin, eps, place = others
    out = qk_norm_rope(*slabs, cos.to(dtype), sin.to(dtype), eps, place, backend)
    generator = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).bfloat16().to(x) for x in out
    ]
    torch.autograd.backward(out, upstream)
    for group, given in enumerate(slabs):
        for number, x in enumerate(given):
            assert (x.grad is None) == (group >= 3 and number == constant)
    return [
        *(x.detach() for x in out),
        *(x.grad for given in slabs for x in given if x.grad is not None),
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_specification_is_a_rotation_by_complex_numbers_of_normalised_rows(shape):
    slabs, (cos, sin, eps, place) = make_inputs(*shape)
    out = qk_norm_rope(*slabs, cos, sin, eps, place)
    row = 0
    for q, k, v, q_weight, k_weight in zip(*slabs):
        for own in range(len(q)):
            target = row if place is None else int(place[row])
            turn = torch.complex(cos[row], sin[row])
            for rows, weight, result in ((q, q_weight, out[0]), (k, k_weight, out[1])):
                for head in range(rows.shape[1]):
                    x = rows[own, head] / (rows[own, head].pow(2).mean() + eps).sqrt() * weight
                    turned = torch.complex(*x.chunk(2)) * turn
                    torch.testing.assert_close(
                        result[target, head],
                        torch.cat([turned.real, turned.imag]),
                        rtol=1e-12,
                        atol=1e-12,
                    )
            assert torch.equal(out[2][target], v[own])
            row += 1


@pytest.mark.parametrize("shape", [((3, 2), 2, 1, 4, True), ((2,), 1, 1, 2, False)])
def test_the_specifications_gradients_equal_finite_differences(shape):
    slabs, others = make_inputs(*shape)
    flat = [x.requires_grad_() for given in slabs for x in given]
    count = len(shape[0])
    assert torch.autograd.gradcheck(
        lambda *flat: qk_norm_rope(
            *(list(flat[i * count : (i + 1) * count]) for i in range(5)), *others
        ),
        flat,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_is_as_exact_as_torch_forward_and_backward(shape, dtype):
    slabs, others = make_inputs(*shape)
    ways = ((dtype, "triton"), (dtype, "reference"), (torch.float64, "reference"))
    assert_as_exact_as_torch(
        *(outputs_and_gradients(slabs, others, *way) for way in ways), str(shape)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [((8192, 24_577), 28, 4, 128, mapped) for mapped in (False, True)]
    + [((4097, 1), 16, 16, 64, False)],
)
def test_triton_is_as_exact_as_torch_at_the_published_models_size(shape, dtype):
    slabs, others = make_inputs(*shape)
    ways = ((dtype, "triton"), (dtype, "reference"), (torch.float64, "reference"))
    assert_as_exact_as_torch(
        *(outputs_and_gradients(slabs, others, *way) for way in ways), str(shape)
    )


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_row_of_zeros_stays_0_and_its_gradient_is_finite(backend):
    slabs, others = make_inputs((4, 3), 2, 1, 16, False)
    slabs[0][0][1] = slabs[1][1][0] = 0
    results = outputs_and_gradients(slabs, others, torch.float32, backend)
    assert all(x.isfinite().all() for x in results)
    assert not results[0][1].any() and not results[1][4].any()


def test_gradients_are_bit_identical_from_run_to_run():
    slabs, others = make_inputs((67, 40), 4, 2, 16, True)
    for first, second in zip(
        *(outputs_and_gradients(slabs, others, torch.float32, "triton") for _ in range(2))
    ):
        assert torch.equal(first, second)


@pytest.mark.parametrize("constant", [0, 1])
def test_the_weights_of_a_frozen_expert_get_no_gradient_and_no_work(constant, monkeypatch):
    from uno_ds.kernels import launch

    asked = []

    def start(kernel, *arguments, start=launch.start, **constants):
        if "WANTS_WEIGHT" in constants:
            asked.append(constants["WANTS_WEIGHT"])
        start(kernel, *arguments, **constants)

    monkeypatch.setattr(launch, "start", start)
    slabs, others = make_inputs((9, 5), 4, 2, 16, False)
    ours, theirs, exact = (
        outputs_and_gradients(slabs, others, dtype, backend, constant)
        for dtype, backend in (
            (torch.float32, "triton"),
            (torch.float32, "reference"),
            (torch.float64, "reference"),
        )
    )
    assert_as_exact_as_torch(ours, theirs, exact)
    assert asked == [constant != 0, constant != 1]


def test_a_slab_that_needs_no_gradient_is_not_visited_in_backward(monkeypatch):
    from uno_ds.kernels import launch

    slabs, (cos, sin, eps, place) = make_inputs((9, 5), 4, 2, 16, False)
    slabs = [[x.float() for x in given] for given in slabs]
    for given in slabs[:3]:
        given[1].requires_grad_()
    out = qk_norm_rope(*slabs, cos.float(), sin.float(), eps, place, "triton")
    started = []
    monkeypatch.setattr(
        launch,
        "start",
        lambda *arguments, start=launch.start, **constants: (
            started.append(0),
            start(*arguments, **constants),
        ),
    )
    sum(x.sum() for x in out).backward()
    assert (
        len(started) == 1
        and slabs[0][0].grad is None
        and slabs[0][1].grad.any()
        and slabs[2][1].grad.eq(1).all()
    )


def test_strided_slabs_get_their_gradients():
    slabs, others = make_inputs((6, 4), 4, 2, 16, False)
    wide = torch.randn(6, 9, 16, device=DEVICE, requires_grad=True)
    slabs = [[x.float() for x in given] for given in slabs]
    slabs[0][0] = wide[:, 1::2]
    cos, sin, eps, place = (x.float() if isinstance(x, torch.Tensor) else x for x in others)
    gradients = []
    for backend in ("reference", "triton"):
        wide.grad = None
        qk_norm_rope(*slabs, cos, sin, eps, place, backend)[0].square().sum().backward()
        gradients.append(wide.grad)
    assert not gradients[1][:, ::2].any() and gradients[1][:, 1::2].any()
    assert_equal_up_to_rounding(gradients[1], gradients[0], 16, 16, 16)


@pytest.mark.parametrize("mapped", [True, False])
def test_the_operator_is_registered_as_torch_wants_it(mapped):
    slabs, (cos, sin, eps, place) = make_inputs((5, 3), 2, 1, 8, mapped)
    slabs = [[x.float().requires_grad_() for x in given] for given in slabs]
    place = None if place is None else place.int()
    torch.library.opcheck(
        torch.ops.uno_ds.qk_norm_rope.default, (*slabs, cos.float(), sin.float(), place, eps)
    )


def test_torch_compile_takes_it_as_one_graph():
    slabs, (cos, sin, eps, place) = make_inputs((5, 3), 2, 1, 8, True)
    q = slabs[0][0].float().requires_grad_()
    slabs = [[x.float() for x in given] for given in slabs]

    def run(q: torch.Tensor) -> torch.Tensor:
        return (
            qk_norm_rope(
                [q, slabs[0][1]], *slabs[1:], cos.float(), sin.float(), eps, place, "triton"
            )[0]
            * 2
        )

    (plain,) = torch.autograd.grad(run(q).square().sum(), q)
    (compiled,) = torch.autograd.grad(
        torch.compile(run, fullgraph=True, backend="aot_eager")(q).square().sum(), q
    )
    torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s, o: s[0].pop(), "one entry per slab; got 1, 2, 2, 2, 2"),
        (lambda s, o: s[1].__setitem__(1, s[1][1][:-1]), "do not fit in slab 1"),
        (lambda s, o: s[3].__setitem__(0, s[3][0][:-1]), "do not fit in slab 0"),
        (
            lambda s, o: o.__setitem__(0, o[0][:, :-1]),
            r"cos and sin must be \[T, D/2\] = \[8, 4\]; got \[8, 3\]",
        ),
        (lambda s, o: o.__setitem__(3, torch.zeros(8)), "int32 or int64; got .* torch.float32"),
        (
            lambda s, o: s[2].__setitem__(0, s[2][0].half()),
            "must have one dtype; got torch.float16, torch.float64",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_what_does_not_fit_is_a_sentence(backend, change, words):
    slabs, others = make_inputs((5, 3), 2, 1, 8, False)
    change(slabs, others)
    with pytest.raises(ValueError, match=words) as caught:
        qk_norm_rope(*slabs, *others, backend)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_what_triton_cannot_compute_is_a_sentence():
    for dim, dtype, words in (
        (12, torch.float32, "heads of 4, 8, .* values, got 12"),
        (8, torch.float64, "got torch.float64"),
    ):
        slabs, others = make_inputs((5, 3), 2, 1, dim, False)
        with pytest.raises(ValueError, match=words):
            qk_norm_rope(*([x.to(dtype) for x in given] for given in slabs), *others, "triton")
    with pytest.raises(
        SettingsError,
        match="kernels.norm_rope: 'triton' takes heads of .*, but the model has heads of 24; set "
        "it to reference.",
    ):
        KernelSettings(attention="sdpa", norm_rope="triton").check_heads(24, 16)
    with pytest.raises(
        ValueError, match="Unknown norm_rope backend 'auto'; allowed are reference, triton"
    ):
        qk_norm_rope(*slabs, *others, "auto")


@pytest.mark.slow
def test_on_hopper_nothing_spills_and_every_access_is_16_bytes_wide():
    report = machine_code("uno_ds.kernels.qk_norm_rope.compile_cases")
    assert len(report) == 8
    for name, code in report.items():
        assert code["feasible"] and code["stack"] == 0, f"{name}: {code}"
        counts = code["instructions"]
        assert (
            counts["LDG.128"] >= 16
            and counts["STG.128"] >= 16
            and counts["LDG.64"] == 0
            and counts["STG.128"] > 0
        ), f"{name}: {code}"
        assert counts["LDG.32"] <= 2 * ("HAS_PLACE" in name), f"{name}: {code}"
