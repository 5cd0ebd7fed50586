"""A kernel backend or a kind of regression loss that is in its table but that no branch knows
raises, in every place that reads it."""

import pytest
import torch

from uno_ds.cost.memory import kept_per_row
from uno_ds.kernels import backends, selection
from uno_ds.kernels.backends import (
    AttentionMemory,
    Backend,
    unavailable_reason,
)
from uno_ds.kernels.conditioning_attention import conditioning_attention
from uno_ds.kernels.cross_entropy import linear_cross_entropy
from uno_ds.kernels.expert_products import expert_product
from uno_ds.kernels.metaquery_regression import kinds, metaquery_regression, reference
from uno_ds.kernels.metaquery_regression.kinds import RegressionKind
from uno_ds.kernels.plan import FULL, build_plan
from uno_ds.kernels.pointwise import rms_norm, swiglu
from uno_ds.kernels.qk_norm_rope import qk_norm_rope
from uno_ds.kernels.selection import Demands, KernelSettings
from uno_ds.recipe import load_recipe
from uno_ds.settings import SettingsError


def one_segment_plan(rows: int):
    import numpy as np

    zeros = np.zeros(rows, dtype=np.int64)
    relation = np.full((1, 1), FULL, dtype=np.int8)
    return build_plan(zeros, zeros, relation, np.zeros(1, dtype=np.int64), (0, rows))


def call(kernel: str, backend: str) -> None:
    x = torch.ones(4, 2, 8)
    rows = torch.ones(4, 8)
    if kernel == "attention":
        conditioning_attention(x, x, x, one_segment_plan(4), backend)
    elif kernel == "regression":
        metaquery_regression(rows, None, rows, "cosine", backend)
    elif kernel == "norm_rope":
        angles, weight = torch.ones(4, 4), torch.ones(8)
        qk_norm_rope([x], [x], [x], [weight], [weight], angles, angles, 1e-6, backend=backend)
    elif kernel == "cross_entropy":
        linear_cross_entropy(rows, torch.ones(5, 8), torch.zeros(4, dtype=torch.int64), backend)
    elif kernel == "pointwise":
        rms_norm(rows, torch.ones(8), 1e-6, backend)
        swiglu(rows, rows, backend)
    elif kernel == "experts":
        expert_product(rows, 2, (torch.ones(4, 8), torch.ones(4, 8)), backend=backend)
    else:
        raise AssertionError(f"this test does not call the kernel {kernel}")


@pytest.mark.parametrize("kernel", backends.KERNELS)
def test_the_reference_of_every_kernel_runs_by_name_and_an_unknown_name_raises(kernel):
    call(kernel, backends.KERNELS[kernel].reference)
    with pytest.raises(ValueError, match="Unknown .* 'nobody'; allowed are "):
        call(kernel, "nobody")
    with pytest.raises(ValueError, match="Unknown"):
        unavailable_reason(kernel, "nobody")


@pytest.mark.parametrize("kernel", backends.KERNELS)
def test_a_backend_without_an_implementation_raises_and_never_runs_another_one(kernel, monkeypatch):
    def load():
        raise ModuleNotFoundError("not written yet")

    added = {**backends.KERNELS[kernel].backends, "dummy": Backend(load)}
    monkeypatch.setattr(backends, "KERNELS", {kernel: backends.Kernel(added, "reference")})
    with pytest.raises(ModuleNotFoundError, match="not written yet"):
        call(kernel, "dummy")


def test_a_backend_that_is_unavailable_gives_its_own_reason(monkeypatch):
    attention = backends.KERNELS["attention"]
    dummy = Backend(backends._conditioning_attention_reference, lambda: "it needs a wand")
    added = backends.Kernel({**attention.backends, "dummy": dummy}, "sdpa", ("dummy",))
    monkeypatch.setitem(backends.KERNELS, "attention", added)
    with pytest.raises(SettingsError, match=r"kernels.attention.*'dummy' .* it needs a wand\."):
        selection._resolved("attention", "dummy")
    assert selection._resolved("attention", "auto") == "sdpa"


def test_heads_that_a_backend_cannot_compute_are_refused_for_any_backend_that_says_so(monkeypatch):
    picky = Backend(backends._conditioning_attention_reference, head_dims=(16,))
    added = backends.Kernel({"picky": picky}, "picky")
    monkeypatch.setitem(backends.KERNELS, "attention", added)
    settings = KernelSettings(attention="picky", norm_rope="reference")
    settings.check(Demands("fp32", 16, (16,)))
    with pytest.raises(SettingsError, match="'picky' takes heads of 16 values, .* heads of 72"):
        settings.check(Demands("fp32", 16, (72,)))


def test_the_memory_estimate_counts_what_a_backend_states_and_refuses_one_that_states_nothing(
    monkeypatch,
):
    shape = load_recipe("tiny").architecture
    flash = kept_per_row(shape, True, 2, "flash")
    with pytest.raises(ValueError, match="Unknown attention backend 'dummy'"):
        kept_per_row(shape, True, 2, "dummy")
    load = backends._conditioning_attention_reference
    silent = {**backends.KERNELS["attention"].backends, "dummy": Backend(load)}
    monkeypatch.setitem(backends.KERNELS, "attention", backends.Kernel(silent, "sdpa"))
    with pytest.raises(ValueError, match="'dummy' does not state what autograd keeps"):
        kept_per_row(shape, True, 2, "dummy")
    stated = Backend(load, memory=AttentionMemory(expands_keys=True))
    monkeypatch.setitem(backends.KERNELS["attention"].backends, "dummy", stated)
    expanded = 2 * 2 * (shape.query_width - shape.key_width)
    assert kept_per_row(shape, True, 2, "dummy") == flash + expanded
    assert expanded > 0


class MoreKinds:
    """A regression kind that is only in the list."""

    setting, value = "dummy", 7

    def __int__(self) -> int:
        return 7


def test_a_regression_kind_that_no_branch_knows_raises_in_every_backend(monkeypatch):
    rows = torch.randn(3, 16)
    with pytest.raises(ValueError, match="Unknown regression loss 'dummy'; allowed are cosine"):
        metaquery_regression(rows, None, rows, "dummy")
    dummy = MoreKinds()
    with pytest.raises(KeyError):
        reference.metaquery_regression(rows, None, rows, dummy)
    assert set(reference.DISTANCES) == set(RegressionKind)

    from uno_ds.kernels.metaquery_regression import triton_operator

    leaf = rows.clone().requires_grad_()
    with pytest.raises(Exception, match="no branch here"):
        triton_operator.metaquery_regression(leaf, None, rows, dummy)
    statistics = torch.ones(3, 3)
    with pytest.raises(Exception, match="no branch here"):
        triton_operator.backward(torch.ones(3), rows, None, rows, statistics, 7, True, False)
    assert kinds.kind_names() == ("cosine", "l2", "smooth_l1")
