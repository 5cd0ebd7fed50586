"""An adapter folder with random values."""

from pathlib import Path

import torch

from uno_ds.model.adapter_files import adapter_parts, base_hash, write_adapter
from uno_ds.model.adapters import LoraSettings, generation_projections
from uno_ds.model.architecture import read_architecture
from uno_ds.model.weights import WeightsFile, meta_tensors

RANK, ALPHA = 4, 6.0


def adapter_tensors(base: Path, side: int, rank: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a run trains that adapts every projection of `base`, by the objective's names, with
    `side` x `side` metaqueries, their head and a bias beside it."""
    shape = read_architecture(base)
    like = meta_tensors(shape)
    shapes = {
        "model.vae2llm.bias": list(like["vae2llm.bias"].shape),
        "metaqueries.weight": [side**2, shape.hidden],
        "regression.weight": [24, shape.hidden],
    }
    for module in generation_projections(shape.layers):
        out, inner = like[f"{module}.weight"].shape
        a, b = adapter_parts(module, dora=False)
        shapes |= {f"model.{a}": [rank, inner], f"model.{b}": [out, rank]}
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(size, generator=generator) for name, size in shapes.items()}


def random_adapter(folder: Path, base: Path, side: int, seed: int = 0) -> Path:
    """A folder of `adapter_tensors`."""
    folder.mkdir(exist_ok=True)
    tensors = adapter_tensors(base, side, RANK, seed)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    modules = generation_projections(read_architecture(base).layers)
    settings = LoraSettings(rank=RANK, alpha=ALPHA)
    hash_of_base = base_hash(modules, WeightsFile(base).digest)
    write_adapter(folder, settings, shapes, tensors.__getitem__, str(base), hash_of_base)
    return folder
