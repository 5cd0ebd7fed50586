"""A backend that was asked for runs, or one sentence says why it cannot."""

import pytest
import torch
from one_sentence import one_sentence

from uno_ds.kernels.backends import KernelSettings, unavailable_reason
from uno_ds.model.architecture import Architecture
from uno_ds.model.bagel import Bagel
from uno_ds.settings import SettingsError, build


def test_a_backend_that_was_asked_for_and_cannot_run_is_one_sentence_that_names_the_key(
    monkeypatch,
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend, word in (
        ("triton", "CUDA device, or TRITON_INTERPRET=1"),
        ("flex", "no backward on a CPU"),
        ("flash", "CUDA device"),
    ):
        with pytest.raises(SettingsError) as caught:
            KernelSettings(attention=backend).resolved()
        one_sentence(caught.value, "kernels.attention", f"'{backend}'", word)
    assert KernelSettings().resolved().attention == "sdpa"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert (
        KernelSettings(attention="triton").resolved().attention == "triton"
        and unavailable_reason("attention", "sdpa") is None
    )


def test_heads_that_the_triton_attention_cannot_compute_are_named_before_a_run_starts():
    plain = {"norm_rope": "reference"}
    KernelSettings(attention="sdpa", **plain).check_heads(96, 5)
    KernelSettings(attention="triton", **plain).check_heads(128, 72)
    with pytest.raises(SettingsError) as caught:
        KernelSettings(attention="triton", **plain).check_heads(128, 96)
    one_sentence(caught.value, "kernels.attention", "16, 32, 64, 72, 128", "96", "sdpa")


def test_the_visual_encoder_runs_the_backend_that_was_asked_for_too():
    shape = build(
        Architecture,
        dict(
            hidden=16,
            layers=1,
            heads=2,
            kv_heads=1,
            mlp=16,
            vocabulary=8,
            vit_hidden=8,
            vit_layers=2,
            vit_heads=2,
            vit_mlp=8,
            vit_side=2,
            latent_side=2,
        ),
    )
    model = Bagel(shape, attention="reference")
    assert {layer.backend for layer in [*model.layers, *model.vit.layers]} == {"reference"}
