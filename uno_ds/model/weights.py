"""Weights on disk: BAGEL's parameter names, reading one tensor at a time, writing one tensor at a
time."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from uno_ds.files_on_disk import read_regular
from uno_ds.json_text import read_json, shown
from uno_ds.model.architecture import (
    PUBLISHED_CODEC,
    Architecture,
    read_architecture,
    read_codec,
)
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import get_codec
from uno_ds.model.tensor_file import (
    DTYPE_NAMES,
    TensorFile,
    is_plain_float,
    nonfinite_values,
    write_tensors,
)
from uno_ds.settings import SettingsError

WEIGHTS_STEM = "ema"
WEIGHTS_FILE = f"{WEIGHTS_STEM}.safetensors"
# Metaqueries and their head, which BAGEL does not have: a file of their own in the base folder.
EXTRA_FILE = "uno.safetensors"
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_LONGEST_INDEX = 100_000_000
# Tensors that other programs store with the weights and that every program computes itself: rotary
# frequencies and position ids.
_HARMLESS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|embeddings\.position_ids)")
_MOST_LAYERS_LISTED = 100
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
# Our modules whose names are BAGEL's.
_SAME = ("vae2llm.", "llm2vae.", "time_embedder.mlp.", "connector.fc1.", "connector.fc2.")
# Modules of a layer; {} is the suffix of the expert.
_EXPERT = {
    "input_norm": "input_layernorm{}",
    "post_norm": "post_attention_layernorm{}",
    **{name: f"mlp{{}}.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
    **{f"{name}_proj": f"self_attn.{name}_proj{{}}" for name in "qkvo"},
    **{f"{name}_norm": f"self_attn.{name}_norm{{}}" for name in "qk"},
}
_VISION = {
    **{name: f"mlp.{name}" for name in ("fc1", "fc2")},
    **{name: name for name in ("layer_norm1", "layer_norm2")},
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
}


def bagel_name(name: str) -> str:
    """BAGEL's name of one of our model's parameters or buffers. Raises ValueError for a name that
    the model does not have."""
    # peft keeps an adapted projection as `base_layer` of another module.
    layer = re.fullmatch(r"layers\.(\d+)\.(und|gen)\.(\w+)(?:\.base_layer)?\.(\w+)", name)
    if layer and layer[3] in _EXPERT:
        number, expert, module, tensor = layer.groups()
        path = _EXPERT[module].format("_moe_gen" if expert == "gen" else "")
        return f"language_model.model.layers.{number}.{path}.{tensor}"
    vision = re.fullmatch(r"vit\.layers\.(\d+)\.(\w+)\.(\w+)", name)
    if vision and vision[2] in _VISION:
        number, module, tensor = vision.groups()
        return f"vit_model.vision_model.encoder.layers.{number}.{_VISION[module]}.{tensor}"
    for ours, theirs in _TOP.items():
        if name.startswith(ours) if ours.endswith(".") else name == ours:
            return theirs + name[len(ours) :]
    if name.startswith(_SAME):
        return name
    raise ValueError(f"The model has no tensor {name!r}, so BAGEL has no name for it.")


class WeightsFile:
    """The tensors of a base folder, in one file or several, read one at a time or in part: no whole
    copy is ever held in memory."""

    def __init__(
        self,
        folder: Path,
        nonfinite: dict[str, int] | None = None,
        files: Sequence[str] | None = None,
    ):
        """`nonfinite`: counts the NaN and infinite values of each tensor that is read, by name;
        without it, reading such a tensor raises SettingsError. `files`: file names of the folder to
        read instead of the model's weights."""
        self.folder, self.nonfinite = folder, nonfinite
        self.where: dict[str, TensorFile] = {}
        index = _read_index(folder) if files is None else None
        for file in weight_files(folder) if files is None else files:
            if not (folder / file).exists():
                raise SettingsError("model.base", f"{folder / file} does not exist.")
            try:
                tensors = TensorFile(folder / file)
            except SettingsError as error:
                raise SettingsError("model.base", str(error)) from None
            repeated = next((name for name in tensors.entries if name in self.where), None)
            if repeated is not None:
                raise SettingsError(
                    "model.base",
                    f"{folder}: {shown(repeated)} occurs twice, in "
                    f"{self.where[repeated].path.name} and in {file}.",
                )
            self.where |= {name: tensors for name in tensors.entries}
        for name, file in (index or {}).items():
            if name not in self.where or self.where[name].path.name != file:
                raise SettingsError(
                    "model.base",
                    f"{_index_path(folder)} lists {shown(name)} in {file}, which does not hold it.",
                )

    def shape(self, name: str) -> tuple[int, ...]:
        return self.where[name].entries[name].shape

    def read(self, name: str) -> torch.Tensor:
        return self._sound(name, self.where[name].read(name))

    def read_matrix(self, name: str) -> torch.Tensor:
        """As `read`; a patch embedding that is stored as a convolution [W, 3, p, p] as a matrix [W,
        p * p * 3]."""
        tensor = self.read(name)
        return tensor.permute(0, 2, 3, 1).flatten(1) if tensor.ndim == 4 else tensor

    def read_flat(self, name: str, start: int, count: int) -> torch.Tensor:
        """[count]: values `start` to `start + count` of the flattened tensor."""
        return self._sound(name, self.where[name].read_flat(name, start, count))

    def digest(self, name: str) -> str:
        """Hash of a tensor as stored on the disk."""
        return self.where[name].digest(name)

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raises SettingsError unless the folder holds exactly the tensors `shapes`. Reported are
        names that are missing or have another shape, tensors that are not in floating point, and
        tensors that are no part of the model (scales of quantised weights, adapters): training
        would ignore them, and the weights alone would be another model."""
        missing = [f"{shown(name)} is missing" for name in shapes if name not in self.where]
        misshapen = [
            f"{shown(name)} has shape {list(self.shape(name))} instead of {list(shape)}"
            for name, shape in shapes.items()
            if name in self.where and self.shape(name) != tuple(shape)
        ]
        quantised = [
            f"{shown(name)} is stored as {DTYPE_NAMES[self._dtype(name)]}"
            for name in shapes
            if name in self.where and not is_plain_float(self._dtype(name))
        ]
        unexpected = [shown(name) for name in self.unexpected(shapes)]
        problems = []
        if missing or misshapen:
            problems.append(_some(missing + misshapen, 5))
        if quantised:
            problems.append(
                f"{_some(quantised, 3)}: store every weight as F32, F16 or BF16, with its scales "
                "applied"
            )
        if unexpected:
            problems.append(
                f"unexpected: {_some(unexpected, 3)}: merge adapters into the weights, apply "
                "scales, and remove what else is no part of BAGEL"
            )
        if problems:
            raise SettingsError(
                "model.base",
                f"{self.folder}: the weights do not fit the architecture: {'; '.join(problems)}.",
            )

    def unexpected(self, names: Mapping[str, Any]) -> list[str]:
        """Tensors other than those of `names`, without harmless ones (see `is_harmless`)."""
        return [name for name in self.where if name not in names and not is_harmless(name)]

    def _dtype(self, name: str) -> torch.dtype:
        return self.where[name].entries[name].dtype

    def _sound(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """`values` of a tensor, once they are found to be finite and floating-point."""
        if not is_plain_float(values.dtype):
            raise SettingsError(
                "model.base",
                f"{shown(name)} is stored as {DTYPE_NAMES[values.dtype]} in {self.folder}: store "
                "every weight as F32, F16 or BF16.",
            )
        count = nonfinite_values(values)
        if not count:
            return values
        if self.nonfinite is None:
            raise nonfinite_error(self.folder, {name: count})
        self.nonfinite[name] = self.nonfinite.get(name, 0) + count
        return values


def is_harmless(name: str) -> bool:
    """Whether a tensor of BAGEL's name `name` may be stored with the parameters: nothing depends
    on it."""
    return name in map(bagel_name, FIXED) or _HARMLESS.fullmatch(name) is not None


def describe_nonfinite(counts: Mapping[str, int]) -> str:
    each = [f"{shown(name)} ({count:,})" for name, count in counts.items()]
    return f"holds NaN or infinite values in {_some(each, 5)}"


def nonfinite_error(folder: Path, counts: Mapping[str, int]) -> SettingsError:
    return SettingsError(
        "model.base", f"{folder} {describe_nonfinite(counts)}; give a base without them."
    )


def check_weights(folder: Path, architecture: Architecture, convolution: bool = False) -> None:
    """Raises SettingsError unless a folder's weights are those of the architecture; see
    WeightsFile.check. `convolution`: the patch embedding may be stored as one. Only headers are
    read."""
    weights = WeightsFile(folder)
    side = architecture.vit_patch
    check_depth(folder, architecture, len(weights.where))
    shapes = {
        bagel_name(name): tensor.shape
        for name, tensor in meta_tensors(architecture).items()
        if name not in FIXED
    }
    stored = weights.where.get(PATCH_EMBEDDING)
    if convolution and stored and len(weights.shape(PATCH_EMBEDDING)) == 4:
        shapes[PATCH_EMBEDDING] = torch.Size((architecture.vit_hidden, 3, side, side))
    weights.check(shapes)


def check_depth(folder: Path, architecture: Architecture, tensors: int) -> None:
    """Raises SettingsError if the folder has far too few `tensors` for the architecture's layers:
    to list all that are missing would take minutes."""
    if architecture.layers + architecture.vit_layers > tensors + _MOST_LAYERS_LISTED:
        raise SettingsError(
            "model.base",
            f"{folder}: the weights do not fit the architecture: {tensors} tensors cannot hold "
            f"{architecture.layers} layers and {architecture.vit_layers} of the visual encoder.",
        )


def _some(items: Sequence[str], most: int) -> str:
    more = f" (and {len(items) - most} more)" if len(items) > most else ""
    return f"{'; '.join(items[:most])}{more}"


def weight_files(folder: Path) -> list[str]:
    """File names of a base folder's weights: those of the index, or the one that has none."""
    index = _read_index(folder)
    return [WEIGHTS_FILE] if index is None else sorted(set(index.values()))


def _index_path(folder: Path) -> Path:
    return folder / f"{WEIGHTS_FILE}.index.json"


def _read_index(folder: Path) -> dict[str, str] | None:
    """{BAGEL's name: file} of weights in several files; None: there is no index."""
    path = _index_path(folder)
    if not path.exists():
        return None
    try:
        index = read_json(read_regular(path, _LONGEST_INDEX))
        where = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(where, dict) or not where:
            raise ValueError("it has no weight_map")
        if any(type(file) is not str or not _is_plain_name(file) for file in where.values()):
            raise ValueError("it names files in other folders, or names that are no files")
    except OSError as error:
        raise SettingsError("model.base", f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise SettingsError("model.base", f"{path} is not a readable index: {error}.") from None
    if (folder / WEIGHTS_FILE).exists() and WEIGHTS_FILE not in where.values():
        raise SettingsError(
            "model.base",
            f"{folder} holds {WEIGHTS_FILE} and an index of other files ({path.name}); remove "
            "one of them.",
        )
    return where


def _is_plain_name(file: str) -> bool:
    return Path(file).name == file and file.isprintable() and len(file) <= 255


def write_weights(
    folder: Path,
    like: Mapping[str, torch.Tensor],
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: float = math.inf,
) -> None:
    """Writes WEIGHTS_FILE with BAGEL's names, or numbered files of at most `shard_bytes` each and
    an index, which the public BAGEL code does not read: it opens WEIGHTS_FILE.

    `like`: our names and shapes (tensors without data suffice). `read` returns the tensor of a
    name; it is called once for each, in their order, and one tensor is held at a time."""
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
    weight_map: dict[str, str] = {}
    for file, shard in zip(_file_names(len(shards)), shards, strict=True):
        specs = {bagel_name(name): entry for name, entry in shard.items()}
        write_tensors(folder / file, specs, (read(name) for name in shard), {"format": "pt"})
        weight_map |= {name: file for name in specs}
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        _index_path(folder).write_text(json.dumps(index, indent=1) + "\n")


def _file_names(shards: int) -> list[str]:
    if shards == 1:
        return [WEIGHTS_FILE]
    numbers = range(1, shards + 1)
    return [f"{WEIGHTS_STEM}-{number:05}-of-{shards:05}.safetensors" for number in numbers]


def meta_tensors(shape: Architecture) -> dict[str, torch.Tensor]:
    """Our names of all tensors of BAGEL's weights, as tensors without data: parameters, then the
    fixed position tables."""
    with torch.device("meta"):
        model = Bagel(shape)
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def missing_files(folder: Path, tokenizer: bool = True) -> list[str]:
    """The files that a base folder needs and lacks. `tokenizer`: it needs one of its own."""

    def exists(name: str) -> bool:
        try:
            return (folder / name).exists()
        except OSError:  # a path that is too long
            return False

    required = ("llm_config.json", "vit_config.json", *weight_files(folder))
    missing = [name for name in required if not exists(name)]
    if tokenizer and not any(all(map(exists, files)) for files in TOKENIZERS):
        missing.append("a tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    codec = read_codec(folder) if exists("config.json") else PUBLISHED_CODEC
    codec_file = get_codec(codec).weights_file
    if codec_file is not None and not exists(codec_file):
        missing.append(codec_file)
    return missing


class IncompleteBase(SettingsError):
    """A base folder lacks files; `of` names all of them."""

    @classmethod
    def of(cls, folder: Path, missing: list[str]) -> "IncompleteBase":
        return cls("model.base", f"{folder} is not a complete base: it lacks {', '.join(missing)}.")


def check_base_folder(folder: Path, tokenizer: bool = True, convolution: bool = False) -> None:
    """Raises SettingsError, in one line, if the folder is not a complete base: it names every
    missing file, or else tensors that are missing or do not fit. `convolution`: the patch embedding
    may be stored as one. Only headers are read."""
    if not folder.is_dir():
        raise SettingsError("model.base", f"'{folder}' is not a folder.")
    missing = missing_files(folder, tokenizer)
    if missing:
        raise IncompleteBase.of(folder, missing)
    check_weights(folder, read_architecture(folder), convolution)


def read_added(folder: Path) -> dict[str, torch.Tensor]:
    """What UNO added to the model of a folder, metaqueries and their head; none if there are
    none."""
    if not (folder / EXTRA_FILE).exists():
        return {}
    weights = WeightsFile(folder, files=[EXTRA_FILE])
    return {name: weights.read(name) for name in weights.where}
