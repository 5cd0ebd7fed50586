"""A run, from YAML to checked settings. Every mistake is one line that names the key, before anything is allocated."""
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from uno_ds.data.images import largest_cell_count
from uno_ds.data.sources import Source
from uno_ds.data.stream import DataSettings
from uno_ds.data.text import Tokenizer
from uno_ds.generation.sampler import SampleSettings, special_tokens
from uno_ds.kernels.backends import KernelSettings
from uno_ds.model.architecture import Architecture, read_architecture
from uno_ds.model.bagel import Bagel, ModelSettings
from uno_ds.model.weights import WeightsFile, bagel_name
from uno_ds.objectives.uno import ObjectiveSettings
from uno_ds.sequence.tasks import Layout, SequenceSettings
from uno_ds.settings import SettingsError, build, describe, override, setting
from uno_ds.training.checkpoint import CheckpointSettings
from uno_ds.training.engine import EngineSettings, OptimizerSettings
from uno_ds.training.metrics import LoggingSettings

RECIPES = Path(__file__).parent / "recipes"
DS_CONFIGS = Path(__file__).parent.parent / "ds_configs"


@dataclass(frozen=True)
class Recipe:
    name: str = setting(doc="Name of the run; its folder is OUTPUT/NAME.")
    output: str = setting("runs", doc="Folder of all runs.")
    seed: int = setting(0, doc="Seed of initial weights, data order, noise and every other random choice.", minimum=0)
    steps: int = setting(doc="Optimizer steps of the whole run.", minimum=1)
    model: ModelSettings = setting(doc="The model.")
    objective: ObjectiveSettings = setting(factory=ObjectiveSettings, doc="Losses and their weights.")
    sequence: SequenceSettings = setting(doc="How samples are laid out.")
    data: DataSettings = setting(doc="What is trained on.")
    optimizer: OptimizerSettings = setting(factory=OptimizerSettings, doc="AdamW and its schedule.")
    engine: EngineSettings = setting(factory=EngineSettings, doc="DeepSpeed, precision, batch.")
    kernels: KernelSettings = setting(factory=KernelSettings, doc="Backends.")
    checkpoint: CheckpointSettings = setting(factory=CheckpointSettings, doc="What is saved and when.")
    samples: SampleSettings = setting(factory=SampleSettings, doc="Pictures at the end of a run.")
    logging: LoggingSettings = setting(factory=LoggingSettings, doc="How a run is followed.")
    # Read from the base folder where `model.architecture` does not give it.
    architecture: Architecture = field(init=False)

    def __post_init__(self) -> None:
        if not self.name or self.name.startswith(".") or Path(self.name).name != self.name:
            raise SettingsError("name", f"must be a plain folder name, got '{self.name}'.")
        if self.objective.regression_weight and not self.sequence.metaquery_grid:
            raise SettingsError("sequence.metaquery_grid", "is 0, but objective.regression_weight is above 0; give a grid of at least 1 or set the weight to 0.")
        object.__setattr__(self, "architecture", self.model.architecture or read_architecture(self.base))
        for key, images, stride, side in (("latent_image", self.data.latent_image, self.architecture.geometry.latent_stride, self.architecture.latent_side),
                                          ("vit_image", self.data.vit_image, self.architecture.vit_patch, self.architecture.vit_side)):
            if images.max_side > stride * side:
                raise SettingsError(f"data.{key}.max_side", f"is {images.max_side} pixels, but the model's position table holds {side} tokens of {stride} pixels per side = {stride * side}.")

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

    @property
    def base(self) -> Path | None:
        return packaged(self.model.base) if self.model.base else None

    @property
    def tokenizer_folder(self) -> Path:
        return packaged(self.model.tokenizer) if self.model.tokenizer else self.base

    def deepspeed_config(self) -> dict[str, Any]:
        path = Path(self.engine.deepspeed)
        if not path.suffix:
            path = DS_CONFIGS / f"{self.engine.deepspeed}.json"
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            known = ", ".join(sorted(file.stem for file in DS_CONFIGS.glob("*.json")))
            raise SettingsError("engine.deepspeed", f"{path} does not exist; give a JSON file or one of {known}.") from None
        except (OSError, ValueError) as error:
            raise SettingsError("engine.deepspeed", f"{path} is not readable JSON: {error}") from None

    def check_world(self, world_size: int) -> None:
        """What depends on the number of ranks; nothing has been started yet."""
        packs = self.engine.packs_per_step
        if packs % world_size:
            raise SettingsError("engine.packs_per_step", f"is {packs} and does not divide into {world_size} ranks; give a multiple of {world_size}.")
        stage = self.deepspeed_config().get("zero_optimization", {}).get("stage", 0)
        if stage == 0 and self.engine.resolved_precision() == "bf16":
            raise SettingsError("engine.deepspeed", "ZeRO stage 0 has no fp32 master weights for bf16; use zero1, or engine.precision=fp32.")

    def check_base(self) -> None:
        """The base folder holds every weight in the shape that the architecture asks for; nothing is read but headers."""
        if self.base is None:
            return
        with torch.device("meta"):
            model = Bagel(self.architecture)
        WeightsFile(self.base).check({bagel_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()})

    def check_data(self, sources: Iterable[Source], tokenizer: Tokenizer) -> None:
        """What depends on the opened sources and the tokenizer."""
        if len(tokenizer) > self.architecture.vocabulary:
            raise SettingsError("model.tokenizer", f"has {len(tokenizer)} tokens, but the model's vocabulary has {self.architecture.vocabulary} rows.")
        layout = self.layout(tokenizer)
        geometry, data = self.architecture.geometry, self.data
        cells = largest_cell_count(geometry.latent_stride, data.latent_image), largest_cell_count(geometry.vit_stride, data.vit_image)
        for source in sources:
            largest = layout.largest_sample(source.layout, *cells)
            if largest > self.sequence.token_budget:
                raise SettingsError("sequence.token_budget", f"is {self.sequence.token_budget}, but a sample of source '{source.name}' can have {largest} tokens; "
                                    "raise it, or lower sequence.max_text_tokens or the image sizes.")

    def layout(self, tokenizer: Tokenizer) -> Layout:
        return Layout(self.sequence, self.architecture.geometry, special_tokens(tokenizer), captions=self.objective.caption_weight > 0,
                      metaqueries=self.objective.regression_weight > 0)


def packaged(name: str) -> Path:
    """A folder that ships with the project under this name, or else the path."""
    return RECIPES / name if (RECIPES / name).is_dir() and Path(name).name == name else Path(name)


def load_recipe(name_or_file: str, overrides: Iterable[str] = ()) -> Recipe:
    """Reads a recipe that ships with the project or a YAML file, applies `a.b=value` overrides in order and checks all of it."""
    tree = read_tree(name_or_file)
    for assignment in overrides:
        override(tree, assignment)
    return build(Recipe, tree)


def read_tree(name_or_file: str) -> dict[str, Any]:
    """The plain values of a recipe; `extends: NAME_OR_FILE` at its top is merged below it."""
    path = RECIPES / f"{name_or_file}.yaml"
    if not path.exists() or Path(name_or_file).suffix:
        path = Path(name_or_file)
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise SettingsError("--recipe", f"'{name_or_file}' is neither a file nor one of {known}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError("--recipe", f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise SettingsError("--recipe", f"{path} must hold a mapping of keys to values.")
    if "extends" in tree:
        tree = merge(read_tree(str(tree.pop("extends"))), tree)
    return tree


def merge(below: dict, above: dict) -> dict:
    """`above` over `below`, key by key; lists and scalars replace."""
    merged = dict(below)
    for key, value in above.items():
        merged[key] = merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged


def world_size_of_environment() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def settings_table() -> str:
    """Markdown table of every recipe key, from the settings classes."""
    rows = [f"| `{key}` | {kind} | {default.replace('|', chr(92) + '|')} | {doc.replace('|', chr(92) + '|')} |" for key, kind, default, doc in describe(Recipe)]
    return "\n".join(["| key | type | default | what it does |", "|---|---|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    target = Path(__file__).parent.parent / "docs" / "recipe.md"
    text = "# Recipe keys\n\nGenerated from the settings classes by `make docs`; do not edit.\n\n" + settings_table()
    if "--write-docs" in sys.argv:
        target.write_text(text)
    else:
        print(text)
