"""The FLUX autoencoder: diffusers' AutoencoderKL with the weights of ae.safetensors, whose names
are those of the FLUX code.

Shape suffixes: docs/notation.md.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from uno_ds.model.tensor_file import (
    DTYPE_NAMES,
    TensorFile,
    is_plain_float,
    nonfinite_values,
)
from uno_ds.settings import SettingsError

# diffusers' AutoencoderKL, an nn.Module whose base classes a type checker cannot resolve.
Autoencoder = Any

FLUX_FILE = "ae.safetensors"
FLUX_CONFIG = Path(__file__).parent / "flux_autoencoder"
_NAMES = (
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.down_blocks\.(\d+)\.resnets\.(\d+)", r".down.\1.block.\2"),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0", r".down.\1.downsample"),
    (r"\.up_blocks\.(\d+)\.resnets\.(\d+)", r".up.\1.block.\2"),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0", r".up.\1.upsample"),
    (r"\.mid_block\.resnets\.(\d+)", r".mid.block_\1"),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.mid_block\.attentions\.0\.group_norm", ".mid.attn_1.norm"),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
)


class _RowsLinear(nn.Linear):
    """A linear layer over rows. In a process with ZeRO-3, DeepSpeed replaces torch's linear by its
    own, which rounds inputs of three dimensions differently; latents must not depend on that, or
    prepared ones would differ from those of training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.flatten(0, -2), self.weight, self.bias).unflatten(0, x.shape[:-1])


class FluxCodec:
    """Latents z = scale * (mean - shift) of the posterior's MEAN. The public BAGEL code draws from
    the posterior instead; the mean makes latents a function of the image, so that runs repeat and
    latents can be prepared ahead.

    Images are processed one by one: a latent does not depend on its neighbours in the batch, and
    memory is that of one image."""

    def __init__(self, autoencoder: Autoencoder):
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.scale = autoencoder.config.scaling_factor
        self.shift = autoencoder.config.shift_factor

    @torch.no_grad()
    def encode(self, pixels_B3hw: torch.Tensor) -> torch.Tensor:
        weight = self.autoencoder.encoder.conv_in.weight
        means = []
        for image in pixels_B3hw:
            posterior = self.autoencoder.encode(image[None].to(weight.device, weight.dtype))
            means.append(posterior.latent_dist.mean.to(pixels_B3hw))
        return self.scale * (torch.cat(means) - self.shift)

    @torch.no_grad()
    def decode(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        weight = self.autoencoder.encoder.conv_in.weight
        scaled_BChw = (latents_BChw / self.scale + self.shift).to(weight.device, weight.dtype)
        images = [self.autoencoder.decode(latent[None]).sample for latent in scaled_BChw]
        return torch.cat(images).to(latents_BChw)


def check_flux_weights(folder: Path, config: Path = FLUX_CONFIG) -> None:
    """Raises SettingsError unless FLUX_FILE of the folder holds every tensor in its shape. Reads
    the header only."""
    with torch.device("meta"):
        _checked(empty_autoencoder(config), folder / FLUX_FILE)


def load_flux(
    folder: Path, device: torch.device | str, dtype: torch.dtype, config: Path = FLUX_CONFIG
) -> FluxCodec:
    """Reads FLUX_FILE tensor by tensor. Raises SettingsError if the file is missing, does not fit
    `config`, or holds NaN.
    """
    with torch.device("meta"):
        autoencoder = empty_autoencoder(config)
    weights = _checked(autoencoder, folder / FLUX_FILE)
    for name, parameter in list(autoencoder.named_parameters()):
        stored = weights.read(flux_name(name))
        if nonfinite_values(stored):
            raise SettingsError(
                "model.base", f"{weights.path} holds NaN or infinite values in {flux_name(name)}."
            )
        tensor = stored.reshape(parameter.shape).to(device, dtype)
        owner, _, leaf = name.rpartition(".")
        setattr(autoencoder.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    return FluxCodec(autoencoder)


def flux_name(name: str) -> str:
    """The FLUX code's name of a parameter of diffusers' autoencoder; FLUX numbers up blocks in
    reverse, and mid blocks from 1."""
    for pattern, ours in _NAMES:
        name = re.sub(pattern, ours, name)
    name = re.sub(r"\.up\.(\d)", lambda found: f".up.{3 - int(found[1])}", name)
    return re.sub(r"\.block_(\d)", lambda found: f".block_{int(found[1]) + 1}", name)


def empty_autoencoder(config: Path) -> Autoencoder:
    from diffusers import AutoencoderKL  # seconds to import, and only BAGEL's own codec needs it

    autoencoder = AutoencoderKL.from_config(json.loads((config / "config.json").read_text()))
    for parent in list(autoencoder.modules()):
        for name, module in parent.named_children():
            if isinstance(module, nn.Linear):
                has_bias = module.bias is not None
                rows_linear = _RowsLinear(module.in_features, module.out_features, has_bias)
                setattr(parent, name, rows_linear)
    return autoencoder


def _checked(autoencoder: Autoencoder, path: Path) -> TensorFile:
    if not path.exists():
        raise SettingsError("model.base", f"{path} does not exist.")
    try:
        weights = TensorFile(path)
    except SettingsError as error:
        raise SettingsError("model.base", str(error)) from None
    wrong = []
    for ours, parameter in autoencoder.named_parameters():
        name = flux_name(ours)
        entry = weights.entries.get(name)
        if entry is None:
            wrong.append(f"{name} is missing")
        # The attention's matrices are stored as 1 x 1 convolutions.
        elif [*entry.shape, 1, 1][:4] != [*parameter.shape, 1, 1][:4]:
            wrong.append(f"{name} has shape {list(entry.shape)} instead of {list(parameter.shape)}")
        elif not is_plain_float(entry.dtype):
            wrong.append(f"{name} is stored as {DTYPE_NAMES[entry.dtype]}")
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise SettingsError(
            "model.base", f"{path} is not the FLUX autoencoder: {'; '.join(wrong[:3])}{more}."
        )
    return weights
