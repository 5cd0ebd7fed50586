"""Codecs: from pixels to latents and back, and from latents to the rows of the packed sequence.

Shape suffixes: docs/notation.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from uno_ds.model.architecture import Architecture
from uno_ds.model.flux import (
    FLUX_CONFIG,
    FLUX_FILE,
    check_flux_weights,
    empty_autoencoder,
    load_flux,
)
from uno_ds.sequence.batch import PackedBatch
from uno_ds.settings import SettingsError


class Codec(Protocol):
    def encode(self, pixels_B3hw: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] in [-1, 1] to latents [B, C, H / downsample, W / downsample]."""

    def decode(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        """The inverse: latents to pixels in about [-1, 1]."""


class PixelCodec:
    """Invertible and without weights: blocks of `downsample` x `downsample` pixels become
    channels."""

    def __init__(self, downsample: int):
        self.downsample = downsample

    def encode(self, pixels_B3hw: torch.Tensor) -> torch.Tensor:
        return F.pixel_unshuffle(pixels_B3hw, self.downsample)

    def decode(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(latents_BChw, self.downsample)


def build_codec(
    shape: Architecture,
    base: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Codec:
    """The codec of the shape, frozen. `base`, `device` and `dtype` are for one with weights.
    Raises SettingsError if its weights are missing or do not fit."""
    check_codec(shape, base)
    return get_codec(shape.codec).build(shape, base, device, dtype)


def check_codec(shape: Architecture, base: Path | None) -> None:
    """Raises SettingsError unless `build_codec` can be called; reads no weights."""
    get_codec(shape.codec).check(shape, base)


@dataclass(frozen=True)
class CodecKind:
    """What is specific to a codec. `check` and `build`: as `check_codec` and `build_codec`;
    `weights_file`: in a base folder, None for a codec without weights; `parameters`: of its
    weights; `values_per_pixel`: most values that it holds at a time, for each pixel of an image;
    `empty_encoder()`: its encoder without weights, in which torch counts operations."""

    build: Callable[[Architecture, Path | None, torch.device | str, torch.dtype], Codec]
    check: Callable[[Architecture, Path | None], None]
    weights_file: str | None
    parameters: int
    values_per_pixel: int
    empty_encoder: Callable[[], Callable[[torch.Tensor], Any]] | None


def get_codec(name: str) -> CodecKind:
    """Raises ValueError for a name that is not in the registry."""
    if name not in CODECS:
        raise ValueError(f"Unknown codec {name!r}; allowed are {', '.join(CODECS)}.")
    return CODECS[name]


def _build_pixel(
    shape: Architecture, base: Path | None, device: torch.device | str, dtype: torch.dtype
) -> Codec:
    return PixelCodec(shape.codec_downsample)


def _check_pixel(shape: Architecture, base: Path | None) -> None:
    """An Architecture checks the sizes of pixel latents itself, and there are no weights."""


def _build_flux(
    shape: Architecture, base: Path | None, device: torch.device | str, dtype: torch.dtype
) -> Codec:
    assert base is not None, "checked"
    return load_flux(base, device, dtype)


def _check_flux(shape: Architecture, base: Path | None) -> None:
    if (shape.codec_downsample, shape.latent_channels) != (8, 16):
        raise SettingsError(
            "model.architecture.codec",
            "the FLUX autoencoder has 16 channels and 8 pixels per latent side, but the shape has "
            f"{shape.latent_channels} and {shape.codec_downsample}.",
        )
    if base is None:
        raise SettingsError(
            "model.architecture.codec",
            "'flux' reads its weights from model.base, which is not given; without it only 'pixel' "
            "is allowed.",
        )
    check_flux_weights(base)


# By their names in recipes.
CODECS = {
    "flux": CodecKind(
        _build_flux,
        _check_flux,
        FLUX_FILE,
        parameters=83_819_683,
        # At full resolution there are up to 5 tensors of 128 channels.
        values_per_pixel=5 * 128,
        empty_encoder=lambda: empty_autoencoder(FLUX_CONFIG).encode,
    ),
    "pixel": CodecKind(
        _build_pixel,
        _check_pixel,
        weights_file=None,
        parameters=0,
        values_per_pixel=0,
        empty_encoder=None,
    ),
}


def latent_rows(batch: PackedBatch, codec: Codec | None, shape: Architecture) -> torch.Tensor:
    """[G, C]: clean latents of all images of the batch, in the order of the generation slab.
    `codec` encodes those that are pixels; None: all are latents already."""
    # Keeps dtype and device where there is no image.
    rows = [batch.latents.noise_XC.new_zeros(0, shape.latent_values)]
    for images, encoded in zip(batch.latents.images, batch.latents.encoded, strict=True):
        if encoded:
            latents = images
        else:
            assert codec is not None, "pixels need a codec"
            latents = codec.encode(images)
        rows.append(latents_to_rows(latents, shape.latent_patch))
    return torch.cat(rows)[batch.latents.source_G]


def latents_to_rows(latents_BChw: torch.Tensor, patch: int) -> torch.Tensor:
    """[B, C, h, w] to [B * h/patch * w/patch, patch * patch * C], each row flattened as (row,
    column, channel)."""
    batch, channels, height, width = latents_BChw.shape
    grid = latents_BChw.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(-1, patch * patch * channels)


def rows_to_latents(rows: torch.Tensor, grid: tuple[int, int], patch: int) -> torch.Tensor:
    """The inverse for images of one size: [B * rows * columns, patch * patch * C] to [B, C, rows *
    patch, columns * patch]."""
    height, width = grid
    blocks = rows.reshape(-1, height, width, patch, patch, rows.shape[-1] // patch**2)
    return blocks.permute(0, 5, 1, 3, 2, 4).flatten(2, 3).flatten(3, 4)
