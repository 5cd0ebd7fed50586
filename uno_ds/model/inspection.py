"""Contents of a folder or file of weights, from its headers alone."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from uno_ds.model.architecture import read_architecture
from uno_ds.model.flux import FLUX_FILE
from uno_ds.model.tensor_file import DTYPE_NAMES, Entry, TensorFile, is_plain_float
from uno_ds.model.weights import (
    EXTRA_FILE,
    bagel_name,
    check_depth,
    is_harmless,
    meta_tensors,
)
from uno_ds.settings import SettingsError

_PARTS = (
    ("moe_gen", "generation expert"),
    ("vit_model", "visual encoder"),
    ("connector", "connector"),
    ("vae2llm", "latent interface"),
    ("llm2vae", "latent interface"),
    ("time_embedder", "latent interface"),
    ("pos_embed", "fixed position tables"),
    ("embed_tokens", "token embedding"),
    ("lm_head", "language head"),
    ("language_model", "understanding expert"),
)


@dataclass(frozen=True)
class Inspection:
    """parameters: count by part; dtypes: tensors by dtype; missing, unexpected, reshaped,
    quantised: against the architecture, or None where there is no architecture to compare with.
    """

    files: int
    parameters: dict[str, int]
    dtypes: dict[str, int]
    missing: list[str] | None
    unexpected: list[str] | None
    reshaped: list[str] | None
    quantised: list[str] | None


def inspect(path: Path) -> Inspection:
    """Reads headers only. Raises SettingsError if there is no safetensors file or one is
    damaged."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if path.is_dir():
        # The autoencoder and the tensors that UNO adds are no part of the model.
        files = [file for file in files if file.name not in (FLUX_FILE, EXTRA_FILE)]
    if not files:
        raise SettingsError(str(path), "holds no safetensors file.")
    tensors: dict[str, Entry] = {}
    for file in files:
        tensors |= TensorFile(file).entries
    parameters: Counter[str] = Counter()
    for name, entry in tensors.items():
        parameters[part_of(name)] += math.prod(entry.shape)
    folder = path if path.is_dir() else path.parent
    missing = unexpected = reshaped = quantised = None
    if (folder / "llm_config.json").exists():
        architecture = read_architecture(folder)
        check_depth(folder, architecture, len(tensors))
        expected = {
            bagel_name(name): tuple(tensor.shape)
            for name, tensor in meta_tensors(architecture).items()
        }
        missing = [name for name in expected if name not in tensors and not is_harmless(name)]
        unexpected = [name for name in tensors if name not in expected and not is_harmless(name)]
        reshaped = [
            f"{name}: {list(tensors[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ]
        quantised = [
            f"{name}: {DTYPE_NAMES[tensors[name].dtype]}"
            for name in expected
            if name in tensors and not is_plain_float(tensors[name].dtype)
        ]
    dtypes = Counter(DTYPE_NAMES[entry.dtype] for entry in tensors.values())
    return Inspection(
        files=len(files),
        parameters=dict(parameters),
        dtypes=dict(dtypes),
        missing=missing,
        unexpected=unexpected,
        reshaped=reshaped,
        quantised=quantised,
    )


def part_of(name: str) -> str:
    """Part of the model that BAGEL's name belongs to."""
    for mark, part in _PARTS:
        if mark in name:
            return part
    return "other"
