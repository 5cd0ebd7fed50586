"""Weights on disk: BAGEL's parameter names, reading one tensor at a time, writing a base folder."""
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from uno_ds.model.architecture import read_architecture
from uno_ds.model.bagel import Bagel
from uno_ds.settings import SettingsError

WEIGHTS_FILE = "ema.safetensors"
_TOP = {
    "token_embedding.": "language_model.model.embed_tokens.",
    "norm_gen.": "language_model.model.norm_moe_gen.",
    "norm.": "language_model.model.norm.",
    "lm_head.": "language_model.lm_head.",
    "vit.patch_embedding.": "vit_model.vision_model.embeddings.patch_embedding.",
    "vit.position_embedding.": "vit_model.vision_model.embeddings.position_embedding.",
    "vit.post_layernorm.": "vit_model.vision_model.post_layernorm.",
    "latent_positions": "latent_pos_embed.pos_embed",
    "vit_positions": "vit_pos_embed.pos_embed",
}
_EXPERT = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}


def bagel_name(name: str) -> str:
    """BAGEL's name of one of our model's parameters or buffers."""
    layer = re.fullmatch(r"layers\.(\d+)\.(und|gen)\.(\w+)\.(\w+)", name)
    if layer:
        number, expert, module, tensor = layer.groups()
        suffix = "_moe_gen" if expert == "gen" else ""
        if module in _EXPERT:
            path = _EXPERT[module] + suffix
        elif module in ("gate_proj", "up_proj", "down_proj"):
            path = f"mlp{suffix}.{module}"
        else:
            path = f"self_attn.{module}{suffix}"
        return f"language_model.model.layers.{number}.{path}.{tensor}"
    vision = re.fullmatch(r"vit\.layers\.(\d+)\.(\w+)\.(\w+)", name)
    if vision:
        number, module, tensor = vision.groups()
        folder = "mlp." if module.startswith("fc") else "" if module.startswith("layer_norm") else "self_attn."
        return f"vit_model.vision_model.encoder.layers.{number}.{folder}{module}.{tensor}"
    return next((theirs + name[len(ours):] for ours, theirs in _TOP.items() if name.startswith(ours)), name)


class WeightsFile:
    """The tensors of a base folder, read one at a time so that no whole copy is ever held in memory."""

    def __init__(self, folder: Path):
        index = folder / f"{WEIGHTS_FILE}.index.json"
        files = _shards(index) if index.exists() else [WEIGHTS_FILE]
        self.where: dict[str, Path] = {}
        self._open: dict[Path, safe_open] = {}
        for file in files:
            path = folder / file
            if not path.exists():
                raise SettingsError("model.base", f"{path} does not exist.")
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise SettingsError("model.base", f"{path} is not a readable safetensors file: {error}") from None
            self.where |= {name: path for name in self._open[path].keys()}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open[self.where[name]].get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        return self._open[self.where[name]].get_tensor(name)

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises SettingsError that lists every name of `shapes` which is missing or has another shape here."""
        wrong = [f"{name} is missing" for name in shapes if name not in self.where]
        wrong += [f"{name} has shape {list(self.shape(name))} instead of {list(shape)}"
                  for name, shape in shapes.items() if name in self.where and self.shape(name) != tuple(shape)]
        if wrong:
            more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
            raise SettingsError("model.base", f"the weights do not fit the architecture: {'; '.join(wrong[:5])}{more}.")


def _shards(index: Path) -> list[str]:
    """File names in the index of a sharded checkpoint."""
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if not files or any(Path(file).name != file for file in files):
            raise ValueError("it names no files, or files in other folders")
        return files
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError("model.base", f"{index} is not a readable index: {error}.") from None


def write_weights(folder: Path, names: Iterable[str], read: Callable[[str], torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes WEIGHTS_FILE with BAGEL's names. `read` gives the tensor of each of our names."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {bagel_name(name): read(name).detach().to("cpu", dtype).contiguous() for name in names}
    part = folder / f".{WEIGHTS_FILE}.part"
    save_file(tensors, part)
    part.rename(folder / WEIGHTS_FILE)


def load_model(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Bagel:
    """The model of a base folder, whole and frozen, for sampling."""
    weights = WeightsFile(folder)
    with torch.device("meta"):
        model = Bagel(read_architecture(folder))
    weights.check({bagel_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()})
    model = model.to_empty(device="cpu").requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.data = weights.read(bagel_name(name)).to(device=device, dtype=dtype)
    model.reset_tables(device)
    return model.eval()
