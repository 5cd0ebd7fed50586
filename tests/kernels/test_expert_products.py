"""Both experts' projections as one product: as exact as a product for each, with gradients where an
expert trains and no work where it does not."""

import sys
from types import ModuleType

import pytest
import torch
from kernel_checks import assert_as_exact_as_torch
from one_sentence import one_sentence
from torch.utils._python_dispatch import TorchDispatchMode

from uno_ds.kernels.backends import KERNELS, unavailable_reason
from uno_ds.kernels.expert_products import expert_product, joint
from uno_ds.kernels.selection import Demands, KernelSettings
from uno_ds.recipe import load_recipe
from uno_ds.settings import SettingsError

WIDE, OUT = 16, 24
# (rows of the first expert, rows of the second)
ROWS = [(7, 5), (0, 9), (9, 0), (0, 0), (1, 64)]
# What trains: x, the first weight, the second weight.
FROZEN_FIRST, BOTH, NO_WEIGHT = (True, False, True), (True, True, True), (True, False, False)


def gmm(a, b, batch_sizes, trans_b=False):
    """With the signature and the demands of grouped_gemm 0.3, in plain torch."""
    assert a.dtype == b.dtype == torch.bfloat16 and a.is_contiguous() and b.is_contiguous()
    assert batch_sizes.device.type == "cpu" and batch_sizes.dtype == torch.int64
    assert batch_sizes.count_nonzero(), "no rows"
    parts = a.split(batch_sizes.tolist())
    weights = b.transpose(1, 2) if trans_b else b
    return torch.cat([rows @ weight for rows, weight in zip(parts, weights, strict=True)])


@pytest.fixture
def with_megablocks(monkeypatch):
    package, util, ops = (ModuleType(name) for name in ("megablocks", "util", "ops"))
    ops.gmm, util.ops, package.grouped_gemm_util = gmm, ops, util
    monkeypatch.setitem(sys.modules, "megablocks", package)
    monkeypatch.setitem(sys.modules, "megablocks.grouped_gemm_util", util)


def drawn(rows: tuple[int, int], dtype: torch.dtype, bias: bool) -> list[torch.Tensor | None]:
    """x, both weights, both biases, and the gradient of the product."""
    generator = torch.Generator().manual_seed(sum(rows))
    shapes = [(sum(rows), WIDE), (OUT, WIDE), (OUT, WIDE), (OUT,), (OUT,), (sum(rows), OUT)]
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [*values[:3], *(values[3:5] if bias else (None, None)), values[5]]


def computed(backend, dtype, rows, trains, bias, given=None) -> list[torch.Tensor]:
    """The product and the gradient of all that trains."""
    *leaves, upstream = given or drawn(rows, torch.float32 if dtype is None else dtype, bias)
    wanted = [*trains, trains[1] and bias, trains[2] and bias]
    leaves = [
        None if leaf is None else leaf.detach().clone().requires_grad_(want)
        for leaf, want in zip(leaves, wanted, strict=True)
    ]
    x, first, second, *biases = leaves
    out = expert_product(x, rows[0], (first, second), tuple(biases), backend)
    out.backward(upstream)
    for leaf, want in zip(leaves, wanted, strict=True):
        assert leaf is None or (leaf.grad is not None) == want
    return [
        out.detach(),
        *(leaf.grad for leaf in leaves if leaf is not None and leaf.requires_grad),
    ]


def assert_equals_separate(backend, dtype, rows, trains, bias):
    given = drawn(rows, dtype, bias)
    wide = [None if value is None else value.double() for value in given]
    ours, theirs, exact = (
        computed(name, None, rows, trains, bias, values)
        for name, values in ((backend, given), ("separate", given), ("separate", wide))
    )
    assert len(ours) == 1 + sum(trains) + (sum(trains[1:]) if bias else 0)
    assert_as_exact_as_torch(ours, theirs, exact, f"{backend} {dtype} {rows}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("trains", [FROZEN_FIRST, BOTH, NO_WEIGHT])
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_equals_a_product_for_each(dtype, rows, trains, bias):
    assert_equals_separate("grouped", dtype, rows, trains, bias)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("trains", [FROZEN_FIRST, BOTH])
def test_megablocks_is_called_as_it_wants_it(rows, trains, with_megablocks):
    assert_equals_separate("megablocks", torch.bfloat16, rows, trains, bias=True)


def test_the_joint_product_has_right_gradients_in_fp64():
    """The libraries have no fp64: a product in its place."""

    def in_place(rows, weights, understanding, transposed):
        parts = rows[:understanding], rows[understanding:]
        weights = weights.transpose(1, 2) if transposed else weights
        return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])

    leaves = [
        None if value is None else value.double().requires_grad_()
        for value in drawn((3, 2), torch.float32, True)[:5]
    ]

    def product(x, first, second, first_bias, second_bias):
        return joint.joint_product(in_place, x, 3, (first, second), (first_bias, second_bias))

    assert torch.autograd.gradcheck(product, leaves)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if "mm" in name:
            self.found.append(name)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    ("trains", "backward"),
    [
        (FROZEN_FIRST, ["_grouped_mm", "mm"]),
        (BOTH, ["_grouped_mm", "mm", "mm"]),
        (NO_WEIGHT, ["_grouped_mm"]),
        ((False, False, True), ["mm"]),
    ],
)
def test_one_product_forward_and_none_for_a_gradient_that_is_not_needed(trains, backward):
    *leaves, upstream = drawn((4, 3), torch.float32, False)
    x, first, second = (leaf.requires_grad_(want) for leaf, want in zip(leaves, trains))
    with Products() as forward:
        out = expert_product(x, 4, (first, second), backend="grouped")
    with Products() as counted:
        out.backward(upstream)
    assert forward.found == ["_grouped_mm"] and counted.found == backward


def test_neither_the_copy_of_the_weights_nor_an_input_without_use_is_kept_for_backward():
    *leaves, _ = drawn((4, 3), torch.float32, False)
    x, first, second = (leaf.requires_grad_(want) for leaf, want in zip(leaves, NO_WEIGHT))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda tensor: tensor
    ):
        expert_product(x, 4, (first, second), backend="grouped")
    assert set(kept) == {first.data_ptr(), second.data_ptr()}


def test_arguments_that_do_not_fit_together_are_named():
    x, weight, bias = torch.ones(4, WIDE), torch.ones(OUT, WIDE), torch.ones(OUT)
    with pytest.raises(ValueError, match="Unknown experts backend 'nobody'; allowed are separate"):
        expert_product(x, 2, (weight, weight), backend="nobody")
    with pytest.raises(ValueError, match=r"got weights \[24, 16\] and \[24, 8\]"):
        expert_product(x, 2, (weight, weight[:, :8]))
    with pytest.raises(ValueError, match="Both experts have a bias"):
        expert_product(x, 2, (weight, weight), (bias, None))
    with pytest.raises(ValueError, match="0 to 4 in number; got 5"):
        expert_product(x, 5, (weight, weight))


def test_auto_is_separate_and_no_check_changes_that(monkeypatch):
    assert KernelSettings().resolved().experts == "separate"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert KernelSettings().resolved().experts == "separate"
    assert not KERNELS["experts"].chosen_by_check


def test_a_gpu_without_the_grouped_product_and_a_missing_package_are_one_sentence(monkeypatch):
    with pytest.raises(SettingsError) as caught:
        KernelSettings(experts="megablocks").resolved()
    one_sentence(caught.value, "kernels.experts", "'megablocks' cannot run here", "fused_losses.md")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    with pytest.raises(SettingsError) as caught:
        KernelSettings(experts="grouped").resolved()
    one_sentence(caught.value, "kernels.experts", "compute capability 9.0 and 10.0", "8.6")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert unavailable_reason("experts", "grouped") is None
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    assert "has no grouped_mm" in unavailable_reason("experts", "grouped")


def test_widths_that_the_grouped_product_cannot_take_are_refused():
    settings = KernelSettings(experts="grouped")
    settings.check(Demands("bf16", widths=(64, 8)))
    settings.check(Demands("fp32", widths=(64, 4)))
    with pytest.raises(SettingsError) as caught:
        settings.check(Demands("bf16", widths=(64, 12)))
    one_sentence(caught.value, "kernels.experts", "'grouped'", "multiple of 8 values", "has 12")


@pytest.mark.parametrize("backend", ["grouped", "megablocks"])
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.train=lora", "lora.also_train=[metaqueries]"], ("model.train is lora",)),
        (
            ["model.frozen_precision=int8", "engine.deepspeed=zero2"],
            ("model.frozen_precision is int8",),
        ),
    ],
)
def test_adapters_and_quantised_weights_are_refused(backend, overrides, words):
    with pytest.raises(SettingsError) as caught:
        load_recipe("tiny", [*overrides, f"kernels.experts={backend}"])
    one_sentence(caught.value, "kernels.experts", f"'{backend}'", *words, "separate")
