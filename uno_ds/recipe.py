"""A run, from YAML to checked settings. Every mistake is one line that names the key, before
anything is allocated."""

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uno_ds.cost.hardware import HardwareSettings
from uno_ds.data.images import largest_cell_count
from uno_ds.data.layouts import get_layout
from uno_ds.data.stream import DataSettings
from uno_ds.data.text import Tokenizer
from uno_ds.generation.inference import SampleSettings, special_tokens
from uno_ds.kernels.backends import KernelSettings
from uno_ds.model.adapters import LoraSettings
from uno_ds.model.architecture import Architecture, packaged, read_architecture
from uno_ds.model.bagel import ModelSettings
from uno_ds.model.codec import check_codec
from uno_ds.model.flux import FLUX_FILE
from uno_ds.model.weights import (
    WEIGHTS_STEM,
    IncompleteBase,
    check_weights,
    missing_files,
)
from uno_ds.objectives.uno import ObjectiveSettings
from uno_ds.recipe_checks import (
    check_adapters,
    check_frozen_precision,
    check_losses,
    check_supervision,
    set_adapter_defaults,
)
from uno_ds.recipe_file import RECIPES as RECIPES
from uno_ds.recipe_file import merge as merge
from uno_ds.recipe_file import read_tree
from uno_ds.sequence.composition import SampleComposer, SequenceSettings, SpecialTokens
from uno_ds.sequence.packing import Collator
from uno_ds.settings import SettingsError, build, describe, override, printable, setting
from uno_ds.training.checkpoint import CheckpointSettings
from uno_ds.training.deepspeed_config import check_deepspeed
from uno_ds.training.deepspeed_file import read_deepspeed_file
from uno_ds.training.engine import EngineSettings, OptimizerSettings
from uno_ds.training.health import HealthSettings
from uno_ds.training.launch_environment import read_launch
from uno_ds.training.metrics import LoggingSettings


@dataclass(frozen=True)
class Recipe:
    name: str = setting(doc="Name of the run; its folder is OUTPUT/NAME.")
    output: str = setting("runs", doc="Folder of all runs.")
    seed: int = setting(
        0,
        doc="Seed of initial weights, data order, noise and every other random choice.",
        minimum=0,
        maximum=2**32 - 1,
    )
    steps: int = setting(
        doc="Optimizer steps of the whole run.",
        minimum=1,
        maximum=10**9,
    )
    model: ModelSettings = setting(doc="The model.")
    lora: LoraSettings = setting(factory=LoraSettings, doc="Adapters.")
    objective: ObjectiveSettings = setting(
        factory=ObjectiveSettings, doc="Losses and their weights."
    )
    sequence: SequenceSettings = setting(doc="How samples are laid out.")
    data: DataSettings = setting(doc="What is trained on.")
    optimizer: OptimizerSettings = setting(factory=OptimizerSettings, doc="AdamW and its schedule.")
    engine: EngineSettings = setting(factory=EngineSettings, doc="DeepSpeed, precision, batch.")
    kernels: KernelSettings = setting(factory=KernelSettings, doc="Backends.")
    checkpoint: CheckpointSettings = setting(
        factory=CheckpointSettings, doc="What is saved and when."
    )
    health: HealthSettings = setting(
        factory=HealthSettings, doc="What a run watches, and what it does about it."
    )
    samples: SampleSettings = setting(factory=SampleSettings, doc="Pictures at the end of a run.")
    logging: LoggingSettings = setting(factory=LoggingSettings, doc="How a run is followed.")
    hardware: HardwareSettings = setting(
        factory=HardwareSettings, doc="The machine that the run is planned for."
    )
    # Read from the base folder where `model.architecture` does not give it.
    architecture: Architecture = field(init=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.+=,@ -]{0,99}", self.name):
            raise SettingsError(
                "name",
                "must be a plain folder name (at most 100 letters, digits and any of . _ - + = , "
                "@), got "
                f"'{printable(self.name)}'.",
            )
        check_supervision(self)
        for key, path in (
            ("model.base", self.model.base),
            ("model.tokenizer", self.model.tokenizer),
        ):
            try:
                # As long as a path below it gets.
                (Path(path or "") / "model.safetensors.index.json").exists()
            except OSError as error:
                raise SettingsError(key, f"'{printable(path)}': {error.strerror}.") from None
        if (
            self.base is not None
            and self.model.architecture is None
            and any(name.endswith("config.json") for name in self.missing_files)
        ):
            raise IncompleteBase.of(self.base, self.missing_files)
        object.__setattr__(
            self, "architecture", self.model.architecture or read_architecture(self.base)
        )
        check_adapters(self)
        check_frozen_precision(self)
        geometry = self.architecture.geometry
        for key, images, stride, side in (
            ("latent_image", self.data.latent_image, geometry.latent_stride, geometry.latent_side),
            ("vit_image", self.data.vit_image, geometry.vit_stride, geometry.vit_side),
        ):
            if images.max_side > stride * side:
                raise SettingsError(
                    f"data.{key}.max_side",
                    f"is {images.max_side} pixels, but the model's position table holds {side} "
                    f"tokens of {stride} "
                    f"pixels per side = {stride * side}.",
                )
            if images.max_side < stride or images.max_pixels < stride**2:
                raise SettingsError(
                    f"data.{key}",
                    f"allows {images.max_side} pixels per side and {images.max_pixels} in all, but "
                    "one token of the model is "
                    f"{stride} x {stride} pixels.",
                )
        for key, pixels in (
            (("height", self.samples.height), ("width", self.samples.width))
            if self.samples.prompts
            else ()
        ):
            if (
                pixels % geometry.latent_stride
                or pixels > geometry.latent_stride * geometry.latent_side
            ):
                raise SettingsError(
                    f"samples.{key}",
                    f"must be a multiple of {geometry.latent_stride} pixels and at most "
                    f"{geometry.latent_stride * geometry.latent_side}, got {pixels}.",
                )

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

    @property
    def base(self) -> Path | None:
        return packaged(self.model.base) if self.model.base is not None else None

    @property
    def tokenizer_folder(self) -> Path:
        return packaged(self.model.tokenizer) if self.model.tokenizer is not None else self.base

    @property
    def missing_files(self) -> list[str]:
        """What the base folder has to hold and does not."""
        return (
            missing_files(self.base, tokenizer=self.model.tokenizer is None)
            if self.base is not None
            else []
        )

    def collator(self, tokens: SpecialTokens) -> Collator:
        """Makes batches of packed samples as this recipe's objective needs them."""
        return Collator(
            self.architecture.geometry,
            tokens,
            train_understanding=self.model.train == "all",
            stop_at_context=self.sequence.context_gradient == "stop",
        )

    def deepspeed_config(self) -> dict[str, Any]:
        """The file's content without its `"auto"` values, which ask the trainer to decide;
        `zero_optimization.stage` is set."""
        return read_deepspeed_file(self.engine.deepspeed)

    def check_world(self, world_size: int) -> None:
        """What depends on the number of ranks; nothing has been started yet."""
        packs = self.engine.packs_per_step
        if packs % world_size:
            raise SettingsError(
                "engine.packs_per_step",
                f"is {packs} and does not divide into {world_size} ranks; give a multiple of "
                f"{world_size}.",
            )
        config, bf16 = self.deepspeed_config(), self.engine.resolved_precision() == "bf16"
        if config["zero_optimization"]["stage"] == 0 and bf16:
            raise SettingsError(
                "engine.deepspeed",
                "ZeRO stage 0 has no fp32 master weights for bf16; use zero1, or "
                "engine.precision=fp32.",
            )
        decided = {
            "train_batch_size": (packs, "engine.packs_per_step"),
            "train_micro_batch_size_per_gpu": (1, "sequence.token_budget"),
            "gradient_accumulation_steps": (
                packs // world_size,
                "engine.packs_per_step and the number of ranks",
            ),
            "gradient_clipping": (self.engine.clip, "engine.clip"),
            "bf16.enabled": (bf16, "engine.precision"),
            "fp16.enabled": (False, "engine.precision"),
            "torch_autocast.enabled": (False, "engine.precision"),
            "data_types.grad_accum_dtype": ("fp32", "engine.precision"),
            "zero_force_ds_cpu_optimizer": (False, "optimizer, which is torch's AdamW,"),
            "optimizer": (None, "optimizer"),
            "scheduler": (None, "optimizer.schedule"),
        }
        for key, (value, ours) in decided.items():
            given: Any = config
            for part in key.split("."):
                given = given.get(part, value) if isinstance(given, dict) else given
            if given != value:
                raise SettingsError(
                    "engine.deepspeed",
                    f"{self.engine.deepspeed} sets {key} to {json.dumps(given)}, but {ours} of the "
                    "recipe decides it; "
                    "remove it from the file.",
                )
        check_deepspeed(self, world_size)

    @property
    def planned(self) -> bool:
        """The run is for a machine other than this one, so that a dry run need not find its base
        and data here."""
        return self.hardware.gpu is not None

    def check_base(self, absent: list[str] | None = None) -> None:
        """There is a codec, and the base folder holds every weight in the shape that the
        architecture asks for; nothing is read but headers. With `absent`, missing files are told
        there and those that exist are checked."""
        missing = self.missing_files
        if missing and absent is None:
            raise IncompleteBase.of(self.base, missing)
        if missing and self.model.base != self.model.published_shape:
            absent.append(
                f"model.base: {self.base} lacks {', '.join(missing)}, whose names and shapes were "
                "not checked."
            )
        if FLUX_FILE not in missing:
            check_codec(self.architecture, self.base)
        if self.base is None or any(name.startswith(WEIGHTS_STEM) for name in missing):
            return
        check_weights(self.base, self.architecture)

    def check_data(self, sources: Iterable[tuple[str, str]], tokenizer: Tokenizer | None) -> None:
        """What depends on the sources, (name, layout) each, and the tokenizer, if there is one
        yet."""
        if tokenizer:
            tokenizer.check_vocabulary(self.architecture.vocabulary, "model.tokenizer")
        sources = list(sources)
        check_losses(self, [layout for _, layout in sources])
        largest = self.largest_samples([layout for _, layout in sources])
        for name, layout in sources:
            if largest[layout] > self.sequence.token_budget:
                raise SettingsError(
                    "sequence.token_budget",
                    f"is {self.sequence.token_budget}, but a sample of source '{printable(name)}' "
                    "can have "
                    f"{largest[layout]} tokens; raise it, or lower sequence.max_text_tokens or the "
                    "image sizes.",
                )

    def largest_samples(self, layouts: Iterable[str]) -> dict[str, int]:
        """Most tokens of a sample of each layout, with one image per side and one turn."""
        geometry, data = self.architecture.geometry, self.data
        cells = (
            largest_cell_count(geometry.latent_stride, data.latent_image),
            largest_cell_count(geometry.vit_stride, data.vit_image),
        )
        composer = self.composer(None)
        return {layout: get_layout(layout).longest_sample(composer, *cells) for layout in layouts}

    def composer(self, tokenizer: Tokenizer | None) -> SampleComposer:
        """`tokenizer`: None if only lengths matter."""
        tokens = special_tokens(tokenizer) if tokenizer else SpecialTokens(0, 1, 2, 3)
        return SampleComposer(
            self.sequence,
            self.architecture.geometry,
            tokens,
            captions=self.objective.caption_weight > 0,
            metaqueries=self.objective.regression_weight > 0,
        )


def load_recipe(
    name_or_file: str, overrides: Iterable[str] = (), absent: list[str] | None = None
) -> Recipe:
    """Reads a recipe that ships with the project or a YAML file, applies `a.b=value` overrides in
    order and checks all of it.

    With `absent`, for a dry run, a recipe that names its GPU gets the shape of
    `model.published_shape` where the base has no configuration files here, and `absent` gets a line
    that says so."""
    tree = read_tree(name_or_file)
    for assignment in overrides:
        override(tree, assignment)
    set_adapter_defaults(tree)
    try:
        return build(Recipe, tree)
    except IncompleteBase as error:
        shape = tree["model"].get("published_shape")
        if absent is None or not shape or not (tree.get("hardware") or {}).get("gpu"):
            raise
        tree["model"]["base"] = shape
        absent.append(
            f"{error} Nothing is checked against it; the shape is that of '{shape}', which ships "
            "with uno_ds."
        )
        return build(Recipe, tree)


def world_size_of_environment() -> int:
    return read_launch(planning=True).world_size


def settings_table() -> str:
    """Markdown table of every recipe key, from the settings classes."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in describe(Recipe)]
    lines = [
        f"| `{key}` | {kind} | {default if default == 'required' else f'`{default}`'} | {note} |"
        for key, kind, default, note in rows
    ]
    return (
        "\n".join(["| key | type | default | what it does |", "|---|---|---|---|", *lines]) + "\n"
    )


def with_settings_table(text: str) -> str:
    """docs/settings.md with the table of recipe keys between its markers made anew."""
    start = text.index("\n", text.index("<!-- settings")) + 1
    return text[:start] + "\n" + settings_table() + "\n" + text[text.index("<!-- /settings -->") :]


if __name__ == "__main__":
    page = Path(__file__).parent.parent / "docs/settings.md"
    if "--write-docs" in sys.argv:
        page.write_text(with_settings_table(page.read_text()))
    else:
        print(settings_table())
