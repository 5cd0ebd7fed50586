"""Frozen weights in 8 and 4 bits: as the library stores them, within the error of their codes, and
transparent to the gradient."""

import importlib.util

import bitsandbytes.functional
import pytest
import torch
import torch.nn.functional as F
from tiny_objective import collate, loss_counts, make_composer, mixed_pack, tiny_objective
from torch import nn

from uno_ds.model.bagel import Bagel
from uno_ds.model.quantisation import (
    BLOCK,
    KINDS,
    QuantisedLinear,
    check_library,
    dequantise_nf4,
    quantise_frozen,
    quantise_int8,
    quantise_nf4,
    quantised_weights,
)
from uno_ds.objectives.uno import UnoObjective
from uno_ds.settings import SettingsError

# Half of the widest gap between two of NormalFloat4's values, in units of a block's largest value.
WIDEST_NF4 = float((bitsandbytes.functional.get_4bit_type("nf4", device="cpu").diff()).max()) / 2


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def quantised(kind: str, weight: torch.Tensor, bias: torch.Tensor | None = None) -> QuantisedLinear:
    model = nn.ModuleDict({"connector": nn.Linear(weight.shape[1], weight.shape[0])})
    model.requires_grad_(False)
    parent = nn.Module()
    parent.connector = nn.Module()
    parent.connector.fc1 = model["connector"]
    quantise_frozen(parent, kind, weight.dtype)
    layer = parent.connector.fc1
    assert isinstance(layer, QuantisedLinear)
    layer.fill(weight)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(64, 128), (7, 10), (33, 70), (1, 1), (8, 96), (3, 4304), (600, 1000)], ids=str
)
def test_nf4_is_stored_as_bitsandbytes_stores_it(shape: tuple[int, int], dtype: torch.dtype):
    weight = values(*shape, dtype=dtype)
    if len(weight) > 1:
        weight[0] = 0
    codes, scales = quantise_nf4(weight)
    theirs, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(scales, state.absmax)
    # An odd number of values leaves half a byte, whose content nothing reads.
    pairs = weight.numel() // 2
    assert torch.equal(codes[:pairs], theirs.view(-1)[:pairs])
    # By the definition: bitsandbytes' own dequantisation is wrong where a row ends within a block.
    levels = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    values_of_codes = levels[torch.stack([codes >> 4, codes & 15], dim=1).flatten().long()]
    count = weight.numel()
    expected = values_of_codes[:count] * scales.repeat_interleave(BLOCK)[:count]
    restored = dequantise_nf4(codes, scales, weight.shape, dtype)
    assert torch.equal(restored, expected.view(weight.shape).to(dtype))


def test_a_value_is_off_by_at_most_half_a_step_of_its_code():
    weight = values(48, 160)
    codes, scales = quantise_int8(weight)
    restored = codes * (scales / 127)[:, None]
    half_steps = weight.abs().amax(dim=1, keepdim=True) / 127 / 2
    assert ((restored - weight).abs() <= half_steps * (1 + 1e-5)).all()
    codes, scales = quantise_nf4(weight)
    restored = dequantise_nf4(codes, scales, weight.shape, torch.float32)
    largest = weight.view(-1, BLOCK).abs().amax(dim=1, keepdim=True)
    errors = (restored - weight).view(-1, BLOCK).abs()
    assert (errors <= WIDEST_NF4 * largest * (1 + 1e-5)).all()
    assert errors.max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_and_its_input_gradient_are_those_of_the_dequantised_weight(kind: str):
    weight, bias, x = values(48, 64), values(48), values(5, 64)
    layer = quantised(kind, weight, bias)
    dense = layer.dequantised(torch.float32)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    product, expected = layer(ours), F.linear(theirs, dense, bias)
    assert torch.equal(product, expected)
    seed = values(5, 48)
    product.backward(seed)
    expected.backward(seed)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    assert layer(x[:0]).shape == (0, 48)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_weights_size_is_kept_between_forward_and_backward(kind: str):
    layer, x = quantised(kind, values(256, 256)), values(2, 256).requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        layer(x).sum().backward()
    assert not kept and x.grad is not None
    assert layer.nbytes <= layer.shape.numel() * {"int8": 1, "nf4": 0.5}[kind] + 4 * 1024


def quantised_objective(kind: str) -> tuple[UnoObjective, UnoObjective]:
    """(with quantised frozen weights, the same model with plain weights of the dequantised
    values)."""
    pair = [tiny_objective(dtype=torch.float32) for _ in range(2)]
    ours, plain = pair
    before = dict(ours.model.state_dict())
    quantise_frozen(ours.model, kind, torch.float32)
    for name, module in quantised_weights(ours.model):
        module.fill(before[name])
        with torch.no_grad():
            plain.model.get_parameter(name).copy_(module.dequantised(torch.float32))
    return ours, plain


@pytest.mark.parametrize("stop", [True, False], ids=["stop", "flow"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_of_uno_are_those_of_the_dequantised_weights(kind: str, stop: bool):
    ours, plain = quantised_objective(kind)
    batch = collate(mixed_pack(0, make_composer()), stop, dtype=torch.float32)
    counts = loss_counts(batch)
    results = []
    for objective in (ours, plain):
        total, losses = objective(batch, counts)
        total.backward()
        results.append((total, losses))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    expected = dict(plain.named_parameters())
    compared = 0
    for name, parameter in ours.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        theirs = expected[name].grad
        error = (parameter.grad - theirs).abs().max()
        assert error <= 1e-4 * theirs.abs().max() + 1e-7, name
        compared += 1
    assert compared > 40


def test_what_stays_as_it_is():
    def names(**options: object) -> set[str]:
        with torch.device("meta"):
            model = Bagel(tiny_objective().model.shape)
        model.requires_grad_(False)
        model.layers[0].gen.q_proj.requires_grad_(True)
        quantise_frozen(model, "int8", torch.float32, **options)
        return {name for name, _ in quantised_weights(model)}

    everything = names()
    assert "token_embedding.weight" in everything and "connector.fc1.weight" in everything
    assert "vit.layers.0.fc1.weight" in everything and "layers.1.gen.up_proj.weight" in everything
    assert "layers.0.gen.q_proj.weight" not in everything, "it trains"
    kept = ("norm", "lm_head", "position", "vae2llm", "llm2vae", "time_embedder", "bias")
    for part in kept:
        assert not [name for name in everything if part in name], part
    assert "token_embedding.weight" not in names(keep=["embedding"])
    assert not [name for name in names(keep=["vision"]) if name.startswith(("vit", "connector"))]


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_gives_the_rows_of_its_dequantised_table(kind: str):
    parent = nn.Module()
    parent.token_embedding = nn.Embedding(20, 2 * BLOCK)
    parent.requires_grad_(False)
    table = values(20, 2 * BLOCK)
    quantise_frozen(parent, kind, torch.bfloat16)
    embedding = parent.token_embedding
    embedding.fill(table)
    ids = torch.tensor([3, 19, 0, 3])
    rows = embedding(ids)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, embedding.dequantised(torch.bfloat16)[ids])
    assert embedding(ids[:0]).shape == (0, 2 * BLOCK)


def test_without_the_library_nf4_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_library("int8", "model.frozen_precision")
    with pytest.raises(SettingsError) as raised:
        check_library("nf4", "model.frozen_precision")
    assert str(raised.value) == (
        "model.frozen_precision: nf4 needs the package bitsandbytes, which is not installed: "
        "pip install 'uno_ds[lora]'; int8 needs none."
    )


def test_the_gradient_that_understanding_sends_into_the_latents_keeps_its_direction_in_int8():
    """Of the losses that reach the latents through the frozen expert alone. A product is off by
    about 0.01, the direction by about its square for each of some 20 products on the way. What nf4
    keeps on a trained base is in benchmarks/results/quantisation.json."""
    weights = {"flow_weight": 0.0, "caption_weight": 1.0, "regression_weight": 1.0}
    batch = collate(mixed_pack(0, make_composer()), dtype=torch.float32)
    gradients = []
    for stored in (None, "int8"):
        objective = tiny_objective(dtype=torch.float32, answer_weight=0.0, **weights)
        before = dict(objective.model.state_dict())
        if stored is not None:
            quantise_frozen(objective.model, stored, torch.float32)
        for name, module in quantised_weights(objective.model):
            module.fill(before[name])
        latents: list[torch.Tensor] = []
        objective.model.vae2llm.register_forward_hook(
            lambda module, inputs, output, kept=latents: kept.append(output) or output.retain_grad()
        )
        total, _ = objective(batch, loss_counts(batch))
        total.backward()
        gradients.append(latents[0].grad.flatten().double())
    cosine = torch.cosine_similarity(*gradients, dim=0)
    assert 0.99 < cosine < 1, f"cosine {cosine:.5f}"
