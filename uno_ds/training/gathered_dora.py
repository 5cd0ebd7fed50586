"""DoRA under ZeRO-3.

DoRA scales an output by magnitude / norm(W + s B A), a norm without a gradient. peft computes it in
the module that owns the magnitude, where ZeRO-3 has not gathered W, A and B."""

from typing import Any

import deepspeed
import torch
from torch import nn

from uno_ds.model.adapters import ADAPTER, adapted_modules


def gather_for_dora(model: nn.Module) -> None:
    """Makes ZeRO-3 gather base weight, A and B of each adapted module for the module that computes
    the norm, too. Before the engine is initialised."""
    for name in adapted_modules(model):
        module = model.get_submodule(name)
        norm: Any = module.get_submodule(f"lora_magnitude_vector.{ADAPTER}")
        for other in ("base_layer", f"lora_A.{ADAPTER}", f"lora_B.{ADAPTER}"):
            weight = module.get_parameter(f"{other}.weight")
            deepspeed.zero.register_external_parameter(norm, weight)
        norm.get_lora_weight = _product


def _product(lora_A: nn.Linear, lora_B: nn.Linear, adapter_name: str | None = None) -> torch.Tensor:
    """B A. peft's calls the modules on an identity matrix: a second forward of both, for which
    ZeRO-3 would expect a backward."""
    with torch.no_grad():
        return lora_B.weight @ lora_A.weight
