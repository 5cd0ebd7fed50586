"""An adapter on disk, a folder in the format of the library peft, and weights with adapters merged
into them.

    adapter_model.safetensors   A and B of each adapted module, fp32, under the names that vLLM-Omni
                                gives the modules of BAGEL
    adapter_config.json         peft's configuration; `uno_ds` in it holds a hash of the base
                                weights that were adapted
    uno.safetensors             what trained in full beside the adapters, under the objective's
                                names; programs that read peft's format only do not read it
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uno_ds.files_on_disk import read_regular
from uno_ds.json_text import read_json, shown
from uno_ds.model.adapters import ADAPTER, MLP, LoraSettings, generation_projections
from uno_ds.model.architecture import Architecture
from uno_ds.model.packed_adapters import Halves, UnpackedTensors, is_packed, pack
from uno_ds.model.regression_metadata import NO_IDENTITY, extra_metadata
from uno_ds.model.tensor_file import TensorFile, nonfinite_values, write_tensors
from uno_ds.model.weights import (
    EXTRA_FILE,
    bagel_name,
    describe_nonfinite,
    meta_tensors,
)
from uno_ds.settings import SettingsError, build

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_LONGEST_CONFIG = 10_000_000
_PREFIX = "base_model.model.bagel."
MODEL = "model."
Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Adapted:
    """Tensors of one adapted module. `magnitude` [out]: with DoRA only."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        """What it adds to the base weight [out, in], in fp32."""
        weight = weight.float()
        change = self.scaling * (self.b.float() @ self.a.float())
        if self.magnitude is None:
            return change
        moved = weight + change
        scale = self.magnitude.float() / torch.linalg.norm(moved, dim=1)
        return scale[:, None] * moved - weight


def adapter_parts(module: str, dora: bool) -> list[str]:
    """Parameter names of one adapter, within the model."""
    parts = [f"{module}.lora_{half}.{ADAPTER}.weight" for half in "AB"]
    return [*parts, f"{module}.lora_magnitude_vector.{ADAPTER}.weight"] if dora else parts


def read_adapted(module: str, settings: LoraSettings, read: Read) -> Adapted:
    """`read` returns the tensor of one of `adapter_parts`."""
    tensors = [read(name) for name in adapter_parts(module, settings.dora)]
    a, b = tensors[:2]
    return Adapted(a, b, settings.scaling, tensors[2] if settings.dora else None)


def module_of(name: str) -> str:
    """`layers.0.gen.q_proj` of `layers.0.gen.q_proj.weight`, and of any of its adapter's names."""
    return ".".join(name.split(".")[:4])


def base_hash(modules: Sequence[str], digest: Callable[[str], str]) -> str:
    """Hash of the base weights of the adapted modules. `digest`: of a tensor, by BAGEL's name."""
    result = hashlib.blake2b(digest_size=16)
    for module in modules:
        name = bagel_name(f"{module}.weight")
        result.update(f"{name} {digest(name)}\n".encode())
    return result.hexdigest()


def write_adapter(
    folder: Path,
    settings: LoraSettings,
    shapes: Mapping[str, Sequence[int]],
    read: Read,
    base: str,
    hash_of_base: str,
    identity: Mapping[str, Any] = NO_IDENTITY,
) -> None:
    """Writes a run's trained tensors as an adapter folder. `shapes`: of all that trained, by the
    objective's names; `base`: name or folder of the base; `identity`: of the regression
    (model/regression_metadata)."""
    ours = {name: list(shape) for name, shape in shapes.items()}
    adapters = {name: shape for name, shape in ours.items() if ".lora_" in name}
    beside = {name: shape for name, shape in ours.items() if name not in adapters}
    modules = list(dict.fromkeys(module_of(name.removeprefix(MODEL)) for name in adapters))
    specs = {_file_name(name): (torch.float32, shape) for name, shape in adapters.items()}
    write_tensors(folder / ADAPTER_FILE, specs, (read(name) for name in adapters), {"format": "pt"})
    if beside:
        extra = {name: (torch.float32, shape) for name, shape in beside.items()}
        values = (read(name) for name in beside)
        write_tensors(folder / EXTRA_FILE, extra, values, extra_metadata(identity))
    leaves = {bagel_name(f"{module}.weight").split(".")[-2] for module in modules}
    config = _configuration(settings.rank, settings.alpha, sorted(leaves), base)
    config |= {
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "uno_ds": {"hash_of_base": hash_of_base},
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def _configuration(rank: int, alpha: float, targets: list[str], base: str) -> dict[str, Any]:
    """peft's configuration of a plain adapter."""
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        # A whole number where it is one, which is what vLLM's reader declares.
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
    }


def _file_name(name: str) -> str:
    """Name in ADAPTER_FILE of one of the objective's adapter parameters."""
    name = name.removeprefix(MODEL)
    module = module_of(name)
    part = name.removeprefix(f"{module}.").split(".")[0]
    path = bagel_name(f"{module}.weight").removesuffix("weight")
    # peft stores a magnitude without the name of the tensor within its module.
    return f"{_PREFIX}{path}{part}" + ("" if part == "lora_magnitude_vector" else ".weight")


def write_packed_adapter(source: "AdapterFolder", out: Path) -> None:
    """Writes an adapter of the MLP projections as vLLM-Omni binds it: gate and up, which it
    computes as one gate_up_proj, as one adapter of twice the rank. Raises SettingsError for
    adapters on other projections, which vLLM-Omni 0.30 cannot hold, and for DoRA."""
    attention = [module for module in source.modules if module.rpartition(".")[2] not in MLP]
    if attention or source.settings.dora:
        what = "DoRA" if source.settings.dora else bagel_name(f"{attention[0]}.weight")
        raise SettingsError(
            "--packed",
            f"vLLM-Omni has no place for an adapter with {what}: train with "
            "lora.targets=[mlp_moe_gen], or export the merged model.",
        )
    rank = 2 * source.settings.rank
    tensors: dict[str, torch.Tensor] = {}
    by_layer: dict[str, dict[str, Halves]] = {}
    for module in source.modules:
        layer, _, projection = module.rpartition(".")
        adapted = source.adapted(module)
        by_layer.setdefault(layer, {})[projection] = adapted.a, adapted.b
    for layer, found in by_layer.items():
        path = _PREFIX + bagel_name(f"{layer}.down_proj.weight").removesuffix("down_proj.weight")
        for projection, halves in pack(found).items():
            for name, tensor in zip("AB", halves, strict=True):
                tensors[f"{path}{projection}.lora_{name}.weight"] = tensor
    specs = {name: (torch.float32, tensor.shape) for name, tensor in tensors.items()}
    write_tensors(out / ADAPTER_FILE, specs, tensors.values(), {"format": "pt"})
    leaves = sorted({".".join(name.split(".")[-4:-2]) for name in tensors})
    alpha = source.settings.scaling * rank
    config = _configuration(rank, alpha, leaves, source.base)
    before = {key: source.config.get(key) for key in ("r", "lora_alpha", "use_rslora")}
    config["uno_ds"] = {"hash_of_base": source.hash_of_base, "packed": before}
    (out / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1) + "\n")


class AdapterFolder:
    """An adapter folder that fits an architecture, packed or not: names and settings are those of
    adapters that are not. Raises SettingsError under `key`, a recipe key
    or a flag, for one that does not."""

    def __init__(self, folder: Path, shape: Architecture, key: str):
        self.folder, self.key = folder, key
        self.config = self._config()
        own = self.config.get("uno_ds")
        own = own if isinstance(own, dict) else {}
        packed = own.get("packed")
        if isinstance(packed, dict):
            self.config |= packed
        self.settings = self._settings(self.config)
        self.base = str(self.config.get("base_model_name_or_path"))
        self.hash_of_base = own.get("hash_of_base")
        file = self._open(ADAPTER_FILE)
        unpack = isinstance(packed, dict) or is_packed(file.entries)
        self._file = UnpackedTensors(file, self.settings.rank) if unpack else file
        self._extra = self._open(EXTRA_FILE) if (folder / EXTRA_FILE).exists() else None
        self.modules = self._check_tensors(shape)

    def read(self, name: str) -> torch.Tensor:
        """The tensor of one of the objective's names."""
        if self._extra is not None and name in self._extra.entries:
            values = self._extra.read(name)
        else:
            values = self._read_adapter(_file_name(name))
        count = nonfinite_values(values)
        if count:
            raise SettingsError(self.key, f"{self.folder} {describe_nonfinite({name: count})}.")
        return values

    def _read_adapter(self, name: str) -> torch.Tensor:
        try:
            return self._file.read(name)
        except SettingsError as error:
            raise SettingsError(self.key, str(error)) from None

    @property
    def beside(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what trained in full beside the adapters, by the objective's names."""
        entries = self._extra.entries if self._extra is not None else {}
        return {name: entry.shape for name, entry in entries.items()}

    def adapted(self, module: str) -> Adapted:
        return read_adapted(module, self.settings, lambda name: self.read(MODEL + name))

    def check_base(self, digest: Callable[[str], str]) -> None:
        """Raises SettingsError unless the base's weights are those that were adapted. `digest`: as
        for `base_hash`. A folder that another program wrote has no hash, and passes."""
        if self.hash_of_base is None:
            return
        if base_hash(self.modules, digest) != self.hash_of_base:
            raise SettingsError(
                self.key,
                f"{self.folder} was trained on another base: the hash of the weights that it "
                "adapts differs; give the base that it was trained on.",
            )

    def _open(self, name: str) -> TensorFile:
        try:
            return TensorFile(self.folder / name)
        except SettingsError as error:
            raise SettingsError(self.key, str(error)) from None

    def _config(self) -> dict[str, Any]:
        path = self.folder / ADAPTER_CONFIG
        try:
            config = read_json(read_regular(path, _LONGEST_CONFIG))
            if not isinstance(config, dict) or config.get("peft_type") != "LORA":
                raise ValueError("it holds no peft_type LORA")
        except OSError as error:
            raise SettingsError(self.key, f"{path} cannot be read: {error.strerror}.") from None
        except ValueError as error:
            raise SettingsError(self.key, f"{path} is no LoRA configuration: {error}.") from None
        return config

    def _settings(self, config: Mapping[str, Any]) -> LoraSettings:
        values = {"rank": config.get("r"), "alpha": config.get("lora_alpha")}
        values |= {"rslora": config.get("use_rslora", False)}
        values |= {"dora": config.get("use_dora", False)}
        try:
            return build(LoraSettings, values)
        except SettingsError as error:
            raise SettingsError(self.key, f"{self.folder / ADAPTER_CONFIG}: {error}") from None

    def _check_tensors(self, shape: Architecture) -> list[str]:
        """Names of the adapted modules, in the model's order."""
        shapes = {name: tuple(like.shape) for name, like in meta_tensors(shape).items()}
        rank, modules = self.settings.rank, []
        expected: dict[str, tuple[int, ...]] = {}
        for module in generation_projections(shape.layers):
            out, inner = shapes[f"{module}.weight"]
            sizes = [(rank, inner), (out, rank), (out,)]
            parts = [_file_name(MODEL + part) for part in adapter_parts(module, True)]
            wanted = list(zip(parts, sizes, strict=True))[: 3 if self.settings.dora else 2]
            if any(name in self._file.entries for name, _ in wanted):
                modules.append(module)
                expected |= dict(wanted)
        problems = []
        for name, entry in self._file.entries.items():
            if name not in expected:
                problems.append(f"{shown(name)} adapts no projection of the generation expert")
            elif entry.shape != expected[name]:
                problems.append(
                    f"{shown(name)} has shape {list(entry.shape)} instead of {list(expected[name])}"
                )
        for name, found in self.beside.items():
            inside = name.removeprefix(MODEL)
            if name.startswith(MODEL) and found != shapes.get(inside):
                problems.append(f"{shown(name)} in {EXTRA_FILE} fits no tensor of the model")
        problems += [
            f"{shown(name)} is missing" for name in expected if name not in self._file.entries
        ]
        if not modules and not problems:
            problems.append("it holds no tensor")
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise SettingsError(
                self.key, f"{self.folder} does not fit the model: {problems[0]}{more}."
            )
        return modules
