"""Frozen weights stored in 8 or 4 bits. They are dequantised for each product, in forward and again
in backward, so that the gradient reaches what lies before them and no copy is kept between.

int8   one scale for each row: w = q / 127 * max |row|
nf4    the 16 values of NormalFloat4 (bitsandbytes) times a scale for each 64 values: 4.5 bits a
       weight

Quantised are the projections of frozen experts, the token embedding, the visual encoder and the
connector. Norms, biases, position tables, the language head and all that trains stay as they
are."""

import importlib.util
import logging
from collections.abc import Iterator
from functools import cache
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from uno_ds.model.vision import ImageLinear
from uno_ds.settings import SettingsError

KINDS = ("int8", "nf4")
# What `model.keep_bf16` may leave as it is.
KEPT = {"embedding": ("token_embedding",), "vision": ("vit.", "connector.")}
BLOCK = 64
# Values that are quantised at a time on a CPU.
_AT_ONCE = 1 << 18
_QUANTISED = ("token_embedding", "layers.", "vit.", "connector.")


class Quantised(nn.Module):
    """A module whose frozen `weight` [rows, columns] is stored as codes and scales."""

    kind: str
    shape: torch.Size
    codes: torch.Tensor
    scales: torch.Tensor

    def set_up(self, kind: str) -> None:
        """Replaces the parameter, which has no values yet, by codes and scales without values."""
        weight = self._parameters.pop("weight")
        assert weight is not None and not weight.requires_grad
        self.kind, self.shape = kind, weight.shape
        values = weight.numel()
        match kind:
            case "int8":
                codes = torch.empty(weight.shape, dtype=torch.int8, device="meta")
                scales = torch.empty(len(weight), dtype=torch.float32, device="meta")
            case "nf4":
                codes = torch.empty(-(-values // 2), dtype=torch.uint8, device="meta")
                scales = torch.empty(-(-values // BLOCK), dtype=torch.float32, device="meta")
            case _:
                raise ValueError(f"Unknown kind of quantisation {kind!r}.")
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def fill(self, weight: torch.Tensor) -> None:
        """Quantises the values of the weight, on their device."""
        assert weight.shape == self.shape
        self.codes, self.scales = QUANTISERS[self.kind](weight)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        if self.kind == "int8":
            return (self.codes * (self.scales / 127)[:, None]).to(dtype)
        assert self.kind == "nf4", self.kind
        return dequantise_nf4(self.codes, self.scales, self.shape, dtype)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    # For code that reads the weight itself, such as DoRA's.
    weight: Any = property(lambda self: self.dequantised(torch.float32))


class _FrozenProduct(torch.autograd.Function):
    """x W^T + b of a quantised W; keeps nothing for backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: "QuantisedLinear") -> torch.Tensor:
        ctx.module = module
        return F.linear(x, module.dequantised(x.dtype), module.bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.module.dequantised(gradient.dtype), None


class QuantisedLinear(Quantised, nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _FrozenProduct.apply(x, self)


class QuantisedImageLinear(ImageLinear, QuantisedLinear):
    pass


class QuantisedEmbedding(Quantised, nn.Embedding):
    """Rows are dequantised as they are looked up, to `dtype`."""

    dtype = torch.float32

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows, columns = self.shape
        if self.kind == "int8":
            looked_up = self.codes[ids] * (self.scales[ids] / 127)[:, None]
            return looked_up.to(self.dtype)
        assert self.kind == "nf4", self.kind
        codes = self.codes.view(rows, -1)[ids].flatten()
        scales = self.scales.view(rows, -1)[ids].flatten()
        return dequantise_nf4(codes, scales, torch.Size((len(ids), columns)), self.dtype)


_CLASSES: dict[type, type[Quantised]] = {
    nn.Linear: QuantisedLinear,
    ImageLinear: QuantisedImageLinear,
    nn.Embedding: QuantisedEmbedding,
}


def check_library(kind: str, key: str) -> None:
    """Raises SettingsError under `key` where nf4 is asked for without bitsandbytes."""
    if kind == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise SettingsError(
            key,
            "nf4 needs the package bitsandbytes, which is not installed: pip install "
            "'uno_ds[lora]'; int8 needs none.",
        )


def quantise_frozen(
    model: nn.Module, kind: str, dtype: torch.dtype, keep: tuple[str, ...] | list[str] = ()
) -> None:
    """Makes the frozen weights of a Bagel on the meta device quantised ones, to be filled. `dtype`:
    of the model; `keep`: keys of KEPT."""
    kept = tuple(chain.from_iterable(KEPT[group] for group in keep))
    for name, module in list(model.named_modules()):
        chosen = name.startswith(_QUANTISED) and not name.startswith(kept or ("\0",))
        cls = _CLASSES.get(type(module))
        if not chosen or cls is None or name.endswith("position_embedding"):
            continue
        weight = module.get_parameter("weight")
        if weight.requires_grad or ".lora_" in name:
            continue
        if cls is QuantisedEmbedding and kind == "nf4" and weight.shape[1] % BLOCK:
            continue
        module.__class__ = cls
        assert isinstance(module, Quantised)
        module.set_up(kind)
        if isinstance(module, QuantisedEmbedding):
            module.dtype = dtype


def quantised_weights(model: nn.Module) -> Iterator[tuple[str, Quantised]]:
    """(name of the weight that it replaces, module) of every quantised module."""
    for name, module in model.named_modules():
        if isinstance(module, Quantised):
            yield f"{name}.weight", module


def quantise_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8 of the weight's shape, scales fp32 [rows])."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    step = max(1, _AT_ONCE // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        values = weight[rows].float()
        largest = values.abs().amax(dim=1)
        scales[rows] = largest
        # A row of zeros has codes 0.
        codes[rows] = (values * (127 / largest.clamp(min=1e-30))[:, None]).round()
    return codes, scales


def quantise_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8, two values a byte, the first in the high half; scales fp32, one for BLOCK
    values), as bitsandbytes lays them out."""
    if weight.device.type != "cpu":
        return _library_quantised(weight)
    flat = weight.reshape(-1)
    codes = torch.empty(-(-len(flat) // 2), dtype=torch.uint8)
    scales = torch.empty(-(-len(flat) // BLOCK), dtype=torch.float32)
    for start in range(0, len(flat), _AT_ONCE):
        values = flat[start : start + _AT_ONCE].float()
        blocks = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
        largest = blocks.abs().amax(dim=1)
        scaled = blocks * (1 / largest.clamp(min=1e-30))[:, None]
        # As bitsandbytes' own quantiser for a CPU, in a third of its time.
        nearest = torch.zeros(scaled.shape, dtype=torch.uint8)
        for middle in _middles():
            nearest += scaled > middle
        pairs = nearest.view(-1, 2)
        pairs = (pairs[:, 0] << 4) | pairs[:, 1]
        scales[start // BLOCK :][: len(largest)] = largest
        codes[start // 2 :][: -(-len(values) // 2)] = pairs[: -(-len(values) // 2)]
    return codes, scales


def dequantise_nf4(
    codes: torch.Tensor, scales: torch.Tensor, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    library = _library()
    if not shape.numel() or codes.is_meta:
        return torch.empty(shape, dtype=dtype, device=codes.device)
    # As one row: on a CPU bitsandbytes 0.50 gives other values where a row ends within a block.
    row = torch.Size((1, shape.numel()))
    state = library.QuantState(
        scales, shape=row, code=None, blocksize=BLOCK, quant_type="nf4", dtype=dtype
    )
    return library.dequantize_4bit(codes.view(-1, 1), state).view(shape)


QUANTISERS = {"int8": quantise_int8, "nf4": quantise_nf4}


def _library_quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, state = _library().quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    return codes.view(-1), state.absmax


@cache
def _library() -> Any:
    # It warns of kernels that it could download.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional


@cache
def _middles() -> list[float]:
    """Where the nearest of NormalFloat4's 16 values changes."""
    levels = _library().get_4bit_type("nf4", device="cpu")
    return ((levels[1:] + levels[:-1]) / 2).tolist()
