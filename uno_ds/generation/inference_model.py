"""A model opened for sampling: whole, frozen, on one device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from uno_ds.data.text import Tokenizer
from uno_ds.model.adapter_merging import open_merged
from uno_ds.model.architecture import Architecture, read_architecture
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import Codec, build_codec
from uno_ds.model.quantisation import check_library, quantise_frozen, quantised_weights
from uno_ds.model.weights import WeightsFile, check_base_folder


@dataclass(frozen=True, eq=False)
class OpenModel:
    """A frozen model on its device, in eval mode, with its codec and tokenizer."""

    model: Bagel
    codec: Codec
    tokenizer: Tokenizer


def open_model(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    adapters: Sequence[tuple[Path, float]] = (),
    quantise: str | None = None,
) -> OpenModel:
    """The model of a BAGEL folder with its codec and tokenizer, with `adapters` (folder, share)
    merged in, stored as `quantise` asks (see `assemble`). Raises SettingsError that names
    everything that is missing."""
    check_base_folder(folder)
    weights, shape = WeightsFile(folder), read_architecture(folder)
    merged = open_merged(weights, shape, adapters)
    return assemble(
        shape,
        merged.read,
        folder,
        folder,
        device,
        dtype,
        attention,
        quantise=quantise,
    )


def assemble(
    shape: Architecture,
    read: Callable[[str], torch.Tensor],
    base: Path | None,
    tokenizer: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    attention: str,
    codec: Codec | None = None,
    quantise: str | None = None,
) -> OpenModel:
    """The model with the tensors that `read` returns for our names. They are read one by one
    straight to the device, so that host memory holds one at a time. `base`: folder of the codec's
    weights, if it has any; not read if `codec` is given. `quantise`: one of quantisation.KINDS, in
    which all projections are stored. Raises SettingsError if the tokenizer or
    the codec does not fit."""
    opened_tokenizer = Tokenizer(tokenizer)
    opened_tokenizer.check_vocabulary(shape.vocabulary, "tokenizer")
    with torch.device("meta"):
        model = Bagel(shape, attention)
    if quantise is not None:
        model.requires_grad_(False)
        check_library(quantise, "--quantise")
        quantise_frozen(model, quantise, dtype)
    for name, module in quantised_weights(model):
        module.fill(read(name).to(device))
    for name, _ in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        tensor = read(name).to(device=device, dtype=dtype)
        parameter = nn.Parameter(tensor, requires_grad=False)
        setattr(model.get_submodule(owner), leaf, parameter)
    model.reset_tables(device)
    codec = codec or build_codec(shape, base, device)
    return OpenModel(model.eval(), codec, opened_tokenizer)
