"""A model opened for sampling: whole, frozen, on one device."""
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from uno_ds.data.text import Tokenizer
from uno_ds.model.architecture import read_architecture
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import Codec, build_codec
from uno_ds.model.weights import WeightsFile, bagel_name


@dataclass(frozen=True, eq=False)
class OpenModel:
    model: Bagel
    codec: Codec
    tokenizer: Tokenizer


def open_model(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> OpenModel:
    """The model of a BAGEL folder with its codec and tokenizer. Weights are read one by one straight to the device, so that
    host memory holds one tensor at a time. Raises SettingsError for what is missing."""
    weights, tokenizer = WeightsFile(folder), Tokenizer(folder)
    with torch.device("meta"):
        model = Bagel(read_architecture(folder), attention)
    weights.check({bagel_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()})
    for name, _ in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        tensor = weights.read(bagel_name(name)).to(device=device, dtype=dtype)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    model.reset_tables(device)
    return OpenModel(model.eval(), build_codec(model.shape), tokenizer)
