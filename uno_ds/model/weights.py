"""Weights on disk: BAGEL's parameter names, reading one tensor at a time, writing one tensor at a time."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from uno_ds.model.architecture import Architecture, read_architecture, read_codec
from uno_ds.model.bagel import Bagel
from uno_ds.model.flux import FLUX_FILE
from uno_ds.model.tensor_file import TensorFile, write_tensors
from uno_ds.settings import SettingsError

WEIGHTS_STEM = "ema"
WEIGHTS_FILE = f"{WEIGHTS_STEM}.safetensors"
# What BAGEL does not have (metaqueries and their head) lies beside its weights, never among them.
EXTRA_FILE = "uno.safetensors"
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
SHARD_BYTES = 5_000_000_000
# Position tables, which BAGEL stores and we compute: a folder may lack them.
FIXED = ("latent_positions", "vit_positions")
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
PATCH_EMBEDDING = _TOP["vit.patch_embedding."] + "weight"
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
        folder = (
            "mlp."
            if module.startswith("fc")
            else ""
            if module.startswith("layer_norm")
            else "self_attn."
        )
        return f"vit_model.vision_model.encoder.layers.{number}.{folder}{module}.{tensor}"
    return next(
        (theirs + name[len(ours) :] for ours, theirs in _TOP.items() if name.startswith(ours)), name
    )


class WeightsFile:
    """The tensors of a base folder, in one file or several, read one at a time or in part: no whole copy is ever held in
    memory."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.where: dict[str, TensorFile] = {}
        for file in weight_files(folder):
            if not (folder / file).exists():
                raise SettingsError("model.base", f"{folder / file} does not exist.")
            try:
                tensors = TensorFile(folder / file)
            except SettingsError as error:
                raise SettingsError("model.base", str(error)) from None
            self.where |= {name: tensors for name in tensors.entries}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.where[name].entries[name].shape

    def read(self, name: str) -> torch.Tensor:
        return self.where[name].read(name)

    def read_matrix(self, name: str) -> torch.Tensor:
        """As `read`; a patch embedding that is stored as a convolution [W, 3, p, p] as a matrix [W, p * p * 3]."""
        tensor = self.read(name)
        return tensor.permute(0, 2, 3, 1).flatten(1) if tensor.ndim == 4 else tensor

    def read_flat(self, name: str, start: int, count: int) -> torch.Tensor:
        """[count]: values `start` to `start + count` of the flattened tensor."""
        return self.where[name].read_flat(name, start, count)

    def digest(self, name: str) -> str:
        """Hash of a tensor as it is on the disk."""
        return self.where[name].digest(name)

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raises SettingsError that lists every name of `shapes` which is missing or has another shape here."""
        wrong = [f"{name} is missing" for name in shapes if name not in self.where]
        wrong += [
            f"{name} has shape {list(self.shape(name))} instead of {list(shape)}"
            for name, shape in shapes.items()
            if name in self.where and self.shape(name) != tuple(shape)
        ]
        if wrong:
            more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
            raise SettingsError(
                "model.base",
                f"the weights do not fit the architecture: {'; '.join(wrong[:5])}{more}.",
            )


def weight_files(folder: Path) -> list[str]:
    """File names of a base folder's weights: those of the index, or the one that has none."""
    index = folder / f"{WEIGHTS_FILE}.index.json"
    if not index.exists():
        return [WEIGHTS_FILE]
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if not files or any(Path(file).name != file for file in files):
            raise ValueError("it names no files, or files in other folders")
        return files
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError("model.base", f"{index} is not a readable index: {error}.") from None


def write_weights(
    folder: Path,
    like: Mapping[str, torch.Tensor],
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes WEIGHTS_FILE with BAGEL's names, or numbered files of at most `shard_bytes` each and an index.

    `like`: our names and shapes (tensors without data will do). `read` gives the tensor of a name; it is called once for
    each, in their order, and no more than one tensor is held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, tuple[torch.dtype, torch.Size]]] = [{}]
    sizes = [0]
    for name, tensor in like.items():
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and sizes[-1] + size > shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = dtype, tensor.shape
        sizes[-1] += size
    files = (
        [WEIGHTS_FILE]
        if len(shards) == 1
        else [
            f"{WEIGHTS_STEM}-{number:05}-of-{len(shards):05}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
    )
    for file, shard in zip(files, shards, strict=True):
        layout = {bagel_name(name): entry for name, entry in shard.items()}
        write_tensors(folder / file, layout, (read(name) for name in shard), {"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(sizes)},
            "weight_map": {
                bagel_name(name): file
                for file, shard in zip(files, shards, strict=True)
                for name in shard
            },
        }
        (folder / f"{WEIGHTS_FILE}.index.json").write_text(json.dumps(index, indent=1) + "\n")


def model_layout(shape: Architecture) -> dict[str, torch.Tensor]:
    """Our names of everything that BAGEL's weights hold, as tensors without data: parameters, then the fixed position tables."""
    with torch.device("meta"):
        model = Bagel(shape)
    return {
        name: tensor.detach()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


def missing_files(folder: Path, tokenizer: bool = True) -> list[str]:
    """Everything that a base folder has to hold and does not. `tokenizer`: the folder's own is needed."""

    def there(name: str) -> bool:
        try:
            return (folder / name).is_file()
        except OSError:  # a path that cannot be: too long
            return False

    missing = [
        name
        for name in ("llm_config.json", "vit_config.json", *weight_files(folder))
        if not there(name)
    ]
    if tokenizer and not any(all(map(there, files)) for files in TOKENIZERS):
        missing.append("a tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    if not there(FLUX_FILE) and not (there("config.json") and read_codec(folder) == "pixel"):
        missing.append(FLUX_FILE)
    return missing


class IncompleteBase(SettingsError):
    """A base folder lacks files; `of` names all of them."""

    @classmethod
    def of(cls, folder: Path, missing: list[str]) -> "IncompleteBase":
        return cls("model.base", f"{folder} is no whole base: it lacks {', '.join(missing)}.")


def check_base_folder(folder: Path, tokenizer: bool = True, convolution: bool = False) -> None:
    """Raises SettingsError, in one line, if the folder is no whole base: it names every missing file, or else every tensor
    that is missing or of another shape. `convolution`: the patch embedding may be one. Only headers are read."""
    if not folder.is_dir():
        raise SettingsError("model.base", f"'{folder}' is not a folder.")
    missing = missing_files(folder, tokenizer)
    if missing:
        raise IncompleteBase.of(folder, missing)
    architecture = read_architecture(folder)
    shapes = {
        bagel_name(name): tensor.shape
        for name, tensor in model_layout(architecture).items()
        if name not in FIXED
    }
    weights, side = WeightsFile(folder), architecture.vit_patch
    if (
        convolution
        and weights.where.get(PATCH_EMBEDDING)
        and len(weights.shape(PATCH_EMBEDDING)) == 4
    ):
        shapes[PATCH_EMBEDDING] = torch.Size((architecture.vit_hidden, 3, side, side))
    weights.check(shapes)
