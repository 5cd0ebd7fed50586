"""Checkpoints as ranks write them, made without a run."""

import json
from pathlib import Path

import torch
from small_runs import ARCHITECTURE

from uno_ds.model.architecture import Architecture, read_architecture
from uno_ds.model.bagel import is_generation
from uno_ds.model.tensor_file import new_digest, write_tensors
from uno_ds.model.weights import WeightsFile, bagel_name, meta_tensors
from uno_ds.settings import build, to_plain
from uno_ds.training.manifest import digest_of_manifest

KINDS = ("weight", "exp_avg", "exp_avg_sq", "average")


def trained_tensors() -> dict[str, dict[str, torch.Tensor]]:
    """{kind: {name: values}} as a run of the small architecture would train them, with metaqueries
    and their head."""
    shapes = {
        f"model.{name}": tensor.shape
        for name, tensor in meta_tensors(build(Architecture, ARCHITECTURE)).items()
        if is_generation(name)
    }
    shapes |= {"metaqueries.weight": torch.Size([4, 32]), "regression.weight": torch.Size([24, 32])}
    generator = torch.Generator().manual_seed(1)
    return {
        kind: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for kind in KINDS
    }


def write_checkpoint(
    folder: Path,
    base: Path,
    trained: dict[str, dict[str, torch.Tensor]],
    step: int = 7,
    pieces: int = 3,
) -> Path:
    """As ranks write it that own pieces of uneven size, some of them nothing of a tensor."""
    path = folder / "checkpoints" / f"step_{step}"
    path.mkdir(parents=True)
    names, files = list(trained["weight"]), {}
    for rank in range(pieces):
        owned = {}
        for number, name in enumerate(names):
            size = trained["weight"][name].numel()
            cuts = [0, size * (number % 4) // 4, size * (3 + number % 2) // 4, size]
            if cuts[rank] < cuts[rank + 1]:
                owned[name] = slice(cuts[rank], cuts[rank + 1])
        values = {
            f"{kind}/{name}": trained[kind][name].flatten()[part]
            for kind in KINDS
            for name, part in owned.items()
        }
        digest, file = new_digest(), path / f"rank_{rank:05}.safetensors"
        starts = {"starts": json.dumps({name: part.start for name, part in owned.items()})}
        write_tensors(
            file,
            {key: (tensor.dtype, tensor.shape) for key, tensor in values.items()},
            values.values(),
            starts,
            digest,
        )
        files[file.name] = {"bytes": file.stat().st_size, "hash": digest.hexdigest()}
    weights, frozen = (
        WeightsFile(base),
        [name for name in meta_tensors(read_architecture(base)) if f"model.{name}" not in names],
    )
    manifest = {
        "format": 1,
        "step": step,
        "optimizer_steps": step,
        "world_size": pieces,
        "stage": 3,
        "ema_updates": step,
        "lanes": {},
        "base": str(base),
        "tokenizer": str(base),
        "architecture": to_plain(read_architecture(base)),
        "files": files,
        "frozen": {
            bagel_name(name): weights.digest(bagel_name(name))
            for name in frozen
            if bagel_name(name) in weights.where
        },
        "shapes": {name: list(tensor.shape) for name, tensor in trained["weight"].items()},
    }
    (path / "manifest.json").write_text(
        json.dumps(manifest | {"hash": digest_of_manifest(manifest)})
    )
    (folder / "checkpoints" / "latest").write_text(path.name + "\n")
    return path
