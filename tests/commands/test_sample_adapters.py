"""Sampling with adapters merged in, and with weights stored in few bits."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import metadata
from PIL import Image
from random_adapter import random_adapter
from small_runs import random_base

from uno_ds.commands.sample import main
from uno_ds.generation import inference_model
from uno_ds.generation.inference_model import assemble, open_model
from uno_ds.model.architecture import read_architecture
from uno_ds.model.quantisation import KINDS, quantised_weights
from uno_ds.model.weights import WeightsFile, bagel_name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 64 wide, so that nf4 takes the embedding too.
    return random_base(tmp_path_factory.mktemp("base"), hidden=64)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return random_adapter(base.parent / "style", base, side=2)


def drawn(base: Path, out: Path, *flags: object) -> Path:
    """The picture of one prompt."""
    words = ["generate", "--checkpoint", base, "--prompt", "a red circle.", "--out", out]
    words += ["--height", 16, "--width", 16, "--steps", 2, "--seed", 5, *flags]
    assert main([str(word) for word in words]) == 0
    return out / "0000.png"


def values(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_a_picture_says_which_adapters_and_bits_made_it(base: Path, adapter: Path, tmp_path: Path):
    """Its metadata are enough to draw it again."""
    plain = drawn(base, tmp_path / "plain")
    assert not {"adapter", "quantise", "no_ema"} & metadata(plain).keys()
    flags = ("--adapter", f"{adapter}:0.5", "--adapter", f"{adapter}:0.5", "--quantise", "int8")
    styled = drawn(base, tmp_path / "styled", *flags)
    facts = metadata(styled)
    assert facts["adapter"] == [f"{adapter}:0.5"] * 2 and facts["quantise"] == "int8"
    again = ["--quantise", facts["quantise"]]
    again += [word for folder in facts["adapter"] for word in ("--adapter", folder)]
    assert (values(drawn(base, tmp_path / "again", *again)) == values(styled)).all()
    whole = drawn(base, tmp_path / "whole", "--adapter", adapter)
    # Two halves are the adapter; it changes the picture more than 8 bits do.
    moved = np.abs(values(whole) - values(plain)).mean()
    assert 0 < np.abs(values(styled) - values(whole)).mean() < moved / 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_holds_codes_and_computes_with_their_values(base: Path, kind: str):
    plain, quantised = open_model(base).model, open_model(base, quantise=kind).model
    modules = dict(quantised_weights(quantised))
    assert {"token_embedding.weight", "layers.1.gen.up_proj.weight"} <= modules.keys()
    held = dict(quantised.named_parameters())
    assert not modules.keys() & held.keys() and "lm_head.weight" in held
    x = torch.randn(3, 64)
    for name in ("layers.0.und.q_proj", "layers.1.gen.up_proj"):
        ours = quantised.get_submodule(name)(x)
        theirs = plain.get_submodule(name)(x)
        assert 0 < float((ours - theirs).norm() / theirs.norm()) < {"int8": 0.02, "nf4": 0.15}[kind]


def test_a_base_is_quantised_tensor_by_tensor(base: Path, monkeypatch: pytest.MonkeyPatch):
    """No tensor that was quantised is held when the next one is read."""
    weights, held, most = WeightsFile(base), weakref.WeakSet(), 0
    to_quantise: set[str] = set()
    names = inference_model.quantised_weights

    def recorded(model):
        for name, module in names(model):
            to_quantise.add(name)
            yield name, module

    def read(name: str) -> torch.Tensor:
        nonlocal most
        most = max(most, len(held))
        tensor = weights.read(bagel_name(name))
        if name in to_quantise:
            held.add(tensor)
        return tensor

    monkeypatch.setattr(inference_model, "quantised_weights", recorded)
    shape = read_architecture(base)
    assemble(shape, read, base, base, "cpu", torch.float32, "sdpa", quantise="nf4")
    assert len(to_quantise) > 20 and most <= 1
