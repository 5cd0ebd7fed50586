"""Each flash attention library is called as its signature wants it. The functions here have the
signatures of the libraries' releases and compute the same with plain torch. They were read in the
repository Dao-AILab/flash-attention (2.8; hopper/ of 3.0.0) and in the wheel flash-attn-4
4.0.0b36."""

import inspect
import sys
from types import ModuleType

import pytest
import torch
from attention_cases import inputs, plain_varlen, two_samples

from uno_ds.kernels.backends import description
from uno_ds.kernels.conditioning_attention import flash, reference


def computed(q, k, v, starts_q, starts_k, causal):
    longest_q, longest_k = int(starts_q.diff().max()), int(starts_k.diff().max())
    return plain_varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, causal)


def flash_attn_2_8(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    return computed(q, k, v, cu_seqlens_q, cu_seqlens_k, causal)


def flash_attn_3(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    return computed(q, k, v, cu_seqlens_q, cu_seqlens_k, causal)


def flash_attn_3_with_lse(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    **other,
):
    return computed(q, k, v, cu_seqlens_q, cu_seqlens_k, causal), torch.zeros(1)


def flash_attn_4(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    block_sparse_tensors=None,
    aux_tensors=None,
    aux_scalars=None,
    return_lse=False,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
):
    assert qv is None and type(max_seqlen_q) is type(max_seqlen_k) is int
    return computed(q, k, v, cu_seqlens_q, cu_seqlens_k, causal), None


def flash_attn_4_before_qv(
    q,
    k,
    v,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
):
    return computed(q, k, v, cu_seqlens_q, cu_seqlens_k, causal), torch.zeros(1)


def flash_attn_4_without_lengths(
    q,
    k,
    v,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    softcap=0.0,
):
    return computed(q, k, v, cu_seqlens_q, cu_seqlens_k, causal), torch.zeros(1)


def torch_2_11(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
):
    assert query.shape[1] == key.shape[1], "this release repeats no heads"
    return computed(query, key, value, cu_seq_q, cu_seq_k, window_size == (-1, 0))


def torch_2_12(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    num_splits=None,
):
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return computed(query, key, value, cu_seq_q, cu_seq_k, window_size == (-1, 0))


def assert_it_computes_attention(varlen) -> None:
    plan = two_samples(scale=0.3)
    q, k, v, _ = inputs(plan, torch.float64, 4, 2, 8)
    found = flash.conditioning_attention(q, k, v, plan, varlen)
    torch.testing.assert_close(found, reference.conditioning_attention(q, k, v, plan))


@pytest.mark.parametrize(
    ("adapter", "function"),
    [
        (flash._flash_attn_2, flash_attn_2_8),
        (flash._flash_attn_3, flash_attn_3),
        (flash._flash_attn_3, flash_attn_3_with_lse),
        (flash._flash_attn_4, flash_attn_4),
        (flash._flash_attn_4, flash_attn_4_before_qv),
        (flash._flash_attn_4, flash_attn_4_without_lengths),
    ],
)
def test_each_flash_attn_is_called_as_it_wants_it(adapter, function):
    assert_it_computes_attention(adapter(function))


@pytest.mark.parametrize("function", [torch_2_11, torch_2_12])
def test_torchs_varlen_attention_is_called_as_it_wants_it(function, monkeypatch):
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", function)
    assert_it_computes_attention(flash._torch_varlen)


def test_the_installed_torch_has_the_parameters_that_are_used():
    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    assert len(names[:7]) == 7 and names[6].startswith("max") and "window_size" in names


@pytest.fixture
def installed(monkeypatch):
    """Call it with the modules that are installed, and the function that each has; None: it cannot
    be imported."""

    def install(**modules):
        flash.library.cache_clear()
        names = {name.replace("__", "."): function for name, function in modules.items()}
        monkeypatch.setattr(flash, "_is_installed", lambda module: module in names)
        for name, function in names.items():
            module = ModuleType(name)
            if function is not None:
                module.flash_attn_varlen_func = function
            monkeypatch.setitem(sys.modules, name, module)

    yield install
    flash.library.cache_clear()


def test_the_choice_is_the_first_that_is_installed_and_is_logged(installed):
    installed()
    assert description("attention", "flash") == "flash (torch varlen_attn)"
    installed(flash_attn=flash_attn_2_8)
    assert description("attention", "flash") == "flash (flash-attn 2)"
    installed(flash_attn=flash_attn_2_8, flash_attn__cute=flash_attn_4)
    assert flash.library().name == "flash-attn 4"
    installed(flash_attn_interface=flash_attn_3, flash_attn=flash_attn_2_8)
    assert flash.library().name == "flash-attn 3"
    assert description("attention", "sdpa") == "sdpa"


def test_flash_attn_4_alone_is_not_flash_attn_2(tmp_path, monkeypatch):
    """Both are in a folder flash_attn, and 4 has no module in it."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert flash._is_installed("flash_attn.cute") and not flash._is_installed("flash_attn")
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)


def test_a_library_that_cannot_be_imported_is_passed_over_and_named(installed):
    installed(flash_attn_interface=None, flash_attn=flash_attn_2_8)
    name = flash.library().name
    assert name.startswith("flash-attn 2; flash-attn 3 cannot be imported: ") and "\n" not in name


@pytest.mark.parametrize(
    "error", ["ImportError('undefined symbol: _ZN3c104cuda')", "RuntimeError('no driver')"]
)
def test_a_flash_attn_2_for_another_torch_is_passed_over(error, tmp_path, monkeypatch):
    """Its package is imported already by the search for flash-attn 4, which would lie within."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text(f"raise {error}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    flash.library.cache_clear()
    try:
        name = flash.library().name
    finally:
        flash.library.cache_clear()
    assert name.startswith("torch varlen_attn; flash-attn 2 cannot be imported: "), name
