"""An adapter folder with random values."""

from pathlib import Path

import torch

from uno_ds.model.adapter_files import adapter_parts, base_hash, write_adapter
from uno_ds.model.adapters import LoraSettings, generation_projections
from uno_ds.model.architecture import read_architecture
from uno_ds.model.weights import WeightsFile, model_layout

RANK, ALPHA = 4, 6.0


def random_adapter(folder: Path, base: Path, side: int, seed: int = 0) -> Path:
    """Adapts every projection of `base`; `side` x `side` metaqueries, their head and a bias trained
    beside it."""
    folder.mkdir()
    shape = read_architecture(base)
    layout = model_layout(shape)
    shapes = {
        "model.vae2llm.bias": list(layout["vae2llm.bias"].shape),
        "metaqueries.weight": [side**2, shape.hidden],
        "regression.weight": [24, shape.hidden],
    }
    modules = generation_projections(shape.layers)
    for module in modules:
        out, inner = layout[f"{module}.weight"].shape
        a, b = adapter_parts(module, dora=False)
        shapes |= {f"model.{a}": [RANK, inner], f"model.{b}": [out, RANK]}
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: 0.1 * torch.randn(size, generator=generator) for name, size in shapes.items()}
    settings = LoraSettings(rank=RANK, alpha=ALPHA)
    hash_of_base = base_hash(modules, WeightsFile(base).digest)
    write_adapter(folder, settings, shapes, tensors.__getitem__, str(base), hash_of_base)
    return folder
