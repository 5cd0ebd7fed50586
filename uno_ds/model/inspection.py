"""What a folder or file of weights holds, from its headers alone."""
import json
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from uno_ds.model.architecture import read_architecture
from uno_ds.model.bagel import Bagel
from uno_ds.model.weights import bagel_name
from uno_ds.settings import SettingsError

# Fixed tables that BAGEL stores and that we compute: they may be there or not.
FIXED = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")
_PARTS = (("moe_gen", "generation expert"), ("vit_model", "visual encoder"), ("connector", "connector"), ("vae2llm", "latent interface"),
          ("llm2vae", "latent interface"), ("time_embedder", "latent interface"), ("pos_embed", "fixed position tables"),
          ("embed_tokens", "token embedding"), ("lm_head", "language head"), ("language_model", "understanding expert"))


@dataclass(frozen=True)
class Inspection:
    """parameters: count by part; dtypes: tensors by dtype; missing, unexpected, reshaped: against the architecture, or
    None where there is no architecture to compare with."""

    files: int
    parameters: dict[str, int]
    dtypes: dict[str, int]
    missing: list[str] | None
    unexpected: list[str] | None
    reshaped: list[str] | None


def inspect(path: Path) -> Inspection:
    """Reads headers only. Raises SettingsError if there is no safetensors file or one is damaged."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    files = [file for file in files if file.name != "ae.safetensors"]
    if not files:
        raise SettingsError(str(path), "holds no safetensors file.")
    tensors = {name: entry for file in files for name, entry in _header(file)}
    parameters: Counter[str] = Counter()
    for name, (_, shape) in tensors.items():
        parameters[part_of(name)] += torch.Size(shape).numel()
    folder = path if path.is_dir() else path.parent
    missing = unexpected = reshaped = None
    if (folder / "llm_config.json").exists():
        with torch.device("meta"):
            model = Bagel(read_architecture(folder))
        expected = {bagel_name(name): list(tensor.shape) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        missing = [name for name in expected if name not in tensors and name not in FIXED]
        unexpected = [name for name in tensors if name not in expected]
        reshaped = [f"{name}: {tensors[name][1]} instead of {shape}" for name, shape in expected.items() if name in tensors and tensors[name][1] != shape]
    return Inspection(len(files), dict(parameters), dict(Counter(dtype for dtype, _ in tensors.values())), missing, unexpected, reshaped)


def part_of(name: str) -> str:
    """Part of the model that BAGEL's name belongs to."""
    return next((part for mark, part in _PARTS if mark in name), "other")


def _header(file: Path) -> Iterator[tuple[str, tuple[str, list[int]]]]:
    """(name, (dtype, shape)) of every tensor of a safetensors file: eight bytes of length, then JSON."""
    try:
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            if length > file.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
            if 8 + length + end != file.stat().st_size:
                raise ValueError(f"it has {file.stat().st_size} bytes where its header promises {8 + length + end}")
    except (OSError, ValueError, struct.error, KeyError, TypeError) as error:
        raise SettingsError(str(file), f"is not a readable safetensors file: {error}.") from None
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, (entry["dtype"], entry["shape"])
