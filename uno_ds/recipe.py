"""A recipe: all settings of a run, read from YAML and checked before anything is allocated. Every
mistake is one line that names the key."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from uno_ds.cost.hardware import HardwareSettings
from uno_ds.data.images import largest_cell_count
from uno_ds.data.layouts import get_layout
from uno_ds.data.stream import DataSettings
from uno_ds.data.text import Tokenizer
from uno_ds.generation.inference import SampleSettings, special_tokens
from uno_ds.kernels.selection import Demands, KernelSettings
from uno_ds.model.adapters import LoraSettings
from uno_ds.model.architecture import Architecture, demands_of, packaged, read_architecture
from uno_ds.model.bagel import ModelSettings
from uno_ds.model.codec import check_codec
from uno_ds.model.flux import FLUX_FILE
from uno_ds.model.weights import (
    WEIGHTS_STEM,
    IncompleteBase,
    check_weights,
    missing_files,
)
from uno_ds.objective_checks import check_regression, check_supervision
from uno_ds.objectives.regression_target import target_source
from uno_ds.objectives.uno import ObjectiveSettings
from uno_ds.recipe_checks import (
    check_adapters,
    check_experts,
    check_frozen_precision,
    check_losses,
    set_adapter_defaults,
)
from uno_ds.recipe_file import RECIPES as RECIPES
from uno_ds.recipe_file import merge as merge
from uno_ds.recipe_file import read_tree
from uno_ds.sequence.composition import SampleComposer, SequenceSettings, SpecialTokens
from uno_ds.sequence.packing import Collator
from uno_ds.sequence.schedule import SupervisionSchedule
from uno_ds.settings import SettingsError, build, override, printable, setting
from uno_ds.training.checkpoint import CheckpointSettings
from uno_ds.training.deepspeed_config import check_deepspeed
from uno_ds.training.deepspeed_file import read_deepspeed_file
from uno_ds.training.engine import EngineSettings, OptimizerSettings
from uno_ds.training.evaluation import EvaluateSettings
from uno_ds.training.health import HealthSettings
from uno_ds.training.launch_environment import read_launch
from uno_ds.training.logging_settings import LoggingSettings
from uno_ds.training.trace_settings import check_ranks


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
    sequence: SequenceSettings = setting(doc="Composition and size of samples.")
    data: DataSettings = setting(doc="Training data.")
    optimizer: OptimizerSettings = setting(factory=OptimizerSettings, doc="AdamW and its schedule.")
    engine: EngineSettings = setting(factory=EngineSettings, doc="DeepSpeed, precision, batch.")
    kernels: KernelSettings = setting(factory=KernelSettings, doc="Backends.")
    checkpoint: CheckpointSettings = setting(
        factory=CheckpointSettings, doc="Checkpoints and the export of the model."
    )
    health: HealthSettings = setting(
        factory=HealthSettings, doc="Checks during training, and what follows from them."
    )
    samples: SampleSettings = setting(factory=SampleSettings, doc="Samples at the end of a run.")
    evaluate: EvaluateSettings = setting(factory=EvaluateSettings, doc="Evaluation during a run.")
    logging: LoggingSettings = setting(factory=LoggingSettings, doc="Metrics and progress.")
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
                f"@), got '{printable(self.name)}'.",
            )
        check_supervision(self)
        check_regression(self)
        self._check_path("model.base", self.model.base)
        self._check_path("model.tokenizer", self.model.tokenizer)
        object.__setattr__(self, "architecture", self._find_architecture())
        check_adapters(self)
        check_frozen_precision(self)
        check_experts(self)
        self._check_images()
        if self.evaluate.every:
            self.evaluate.uses_average(self.optimizer.ema)
        if self.samples.prompts or self.evaluate.every and self.evaluate.benchmarks:
            self._check_samples()

    def _check_path(self, key: str, path: str | None) -> None:
        """Raises SettingsError if the operating system does not accept the path, or one below
        it."""
        longest = Path(path or "") / "model.safetensors.index.json"
        try:
            longest.exists()
        except OSError as error:
            raise SettingsError(key, f"'{printable(path)}': {error.strerror}.") from None

    def _find_architecture(self) -> Architecture:
        base = self.base
        if base is None or self.model.architecture is not None:
            assert self.model.architecture is not None, "ModelSettings requires it without a base"
            return self.model.architecture
        if any(name.endswith("config.json") for name in self.missing_files):
            raise IncompleteBase.of(base, self.missing_files)
        return read_architecture(base)

    def _check_images(self) -> None:
        """Raises SettingsError if images can be larger than the model's position tables, or smaller
        than one token."""
        geometry = self.architecture.geometry
        for key, images, stride, side in (
            ("latent_image", self.data.latent_image, geometry.latent_stride, geometry.latent_side),
            ("vit_image", self.data.vit_image, geometry.vit_stride, geometry.vit_side),
        ):
            if images.max_side > stride * side:
                raise SettingsError(
                    f"data.{key}.max_side",
                    f"is {images.max_side} pixels, but the model's position table holds {side} "
                    f"tokens of {stride} pixels per side = {stride * side}.",
                )
            if images.max_side < stride or images.max_pixels < stride**2:
                raise SettingsError(
                    f"data.{key}",
                    f"allows {images.max_side} pixels per side and {images.max_pixels} in all, but "
                    f"one token of the model is {stride} x {stride} pixels.",
                )

    def _check_samples(self) -> None:
        """Raises SettingsError if the model cannot sample images of this size."""
        stride = self.architecture.geometry.latent_stride
        most = stride * self.architecture.geometry.latent_side
        for key, pixels in (("height", self.samples.height), ("width", self.samples.width)):
            if pixels % stride or pixels > most:
                raise SettingsError(
                    f"samples.{key}",
                    f"must be a multiple of {stride} pixels and at most {most}, got {pixels}.",
                )

    @property
    def kernel_demands(self) -> Demands:
        """What the model asks of kernel backends."""
        return demands_of(self.architecture, self.engine.resolved_precision())

    @property
    def regresses(self) -> bool:
        """Whether supervised images have metaqueries."""
        return self.objective.regression_weight > 0 and self.sequence.metaqueries > 0

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

    @property
    def base(self) -> Path | None:
        return packaged(self.model.base) if self.model.base is not None else None

    @property
    def tokenizer_folder(self) -> Path:
        if self.model.tokenizer is not None:
            return packaged(self.model.tokenizer)
        assert self.base is not None, "ModelSettings requires a tokenizer without a base"
        return self.base

    @property
    def missing_files(self) -> list[str]:
        """Required files that the base folder lacks."""
        if self.base is None:
            return []
        return missing_files(self.base, tokenizer=self.model.tokenizer is None)

    def collator(self, tokens: SpecialTokens) -> Collator:
        """Makes batches of packed samples as this recipe's objective needs them."""
        return Collator(
            self.architecture.geometry,
            tokens,
            train_understanding=self.model.trains_everything,
            stop_at_context={"stop": True, "flow": False}[self.sequence.context_gradient],
            targets=target_source(self.objective),
            contrast=self.objective.flow_contrast > 0,
        )

    def deepspeed_config(self) -> dict[str, Any]:
        """The file's content without its `"auto"` values, which leave the choice to the trainer;
        `zero_optimization.stage` is set."""
        return read_deepspeed_file(self.engine.deepspeed)

    def check_world(self, world_size: int) -> None:
        """Checks what depends on the number of ranks; nothing has been started yet. Raises
        SettingsError."""
        packs = self.engine.resolved_packs_per_step()
        if packs % world_size:
            raise SettingsError(
                "engine.packs_per_step",
                f"is {packs} and does not divide into {world_size} ranks; give a multiple of "
                f"{world_size}.",
            )
        config = self.deepspeed_config()
        bf16 = self.engine.resolved_precision() == "bf16"
        if config["zero_optimization"]["stage"] == 0 and bf16:
            raise SettingsError(
                "engine.deepspeed",
                "ZeRO stage 0 has no fp32 master weights for bf16; use zero1, or "
                "engine.precision=fp32.",
            )
        self._check_decided(config, packs, world_size, bf16)
        self._check_traced_ranks(world_size)
        check_deepspeed(self, world_size)

    def _check_traced_ranks(self, world_size: int) -> None:
        trace = self.logging.trace
        if not trace.steps:
            return
        try:
            check_ranks(trace.ranks, world_size)
        except SettingsError as error:
            raise error.under("logging.trace") from None

    def _check_decided(
        self, config: dict[str, Any], packs: int, world_size: int, bf16: bool
    ) -> None:
        """Raises SettingsError if the DeepSpeed file contradicts what the recipe decides."""
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
                    "recipe decides it; remove it from the file.",
                )

    @property
    def planned(self) -> bool:
        """Whether the run is planned for another machine, so that a dry run here works without its
        base and data."""
        return self.hardware.gpu is not None

    def check_base(self, absent: list[str] | None = None) -> None:
        """Checks that there is a codec, and that the base folder holds every weight in the shape
        that the architecture requires; only headers are read. Raises SettingsError. With `absent`,
        missing files are appended there instead, and those that exist are checked."""
        base, missing = self.base, self.missing_files
        if base is not None and missing:
            if absent is None:
                raise IncompleteBase.of(base, missing)
            if self.model.base != self.model.published_shape:
                absent.append(
                    f"model.base: {base} lacks {', '.join(missing)}, whose names and shapes were "
                    "not checked."
                )
        if FLUX_FILE not in missing:
            check_codec(self.architecture, base)
        if base is None or any(name.startswith(WEIGHTS_STEM) for name in missing):
            return
        check_weights(base, self.architecture)

    def check_data(self, sources: Iterable[tuple[str, str]], tokenizer: Tokenizer | None) -> None:
        """Checks what depends on the sources, (name, layout) each, and on the tokenizer, None where
        a dry run found none. Raises SettingsError."""
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
                    f"can have {largest[layout]} tokens; raise it, or lower "
                    "sequence.max_text_tokens or the image sizes.",
                )

    def largest_samples(self, layouts: Iterable[str]) -> dict[str, int]:
        """Most tokens of a sample of each layout, with one image per side and one turn."""
        geometry = self.architecture.geometry
        latents = largest_cell_count(geometry.latent_stride, self.data.latent_image)
        patches = largest_cell_count(geometry.vit_stride, self.data.vit_image)
        composer = self.composer(None)
        return {
            layout: get_layout(layout).longest_sample(composer, latents, patches)
            for layout in layouts
        }

    def composer(self, tokenizer: Tokenizer | None) -> SampleComposer:
        """Makes samples of this recipe's sequences. `tokenizer`: None if only lengths matter."""
        tokens = special_tokens(tokenizer) if tokenizer else SpecialTokens(0, 1, 2, 3)
        return SampleComposer(
            self.sequence,
            self.architecture.geometry,
            tokens,
            captions=self.objective.caption_weight > 0,
            metaqueries=self.objective.regression_weight > 0,
            caption_weight_by_t=self.objective.caption_weight_by_t,
            regression_weight_by_t=self.objective.regression_weight_by_t,
            negative_source=self.objective.used_negative_source,
        )

    @property
    def supervision_schedule(self) -> SupervisionSchedule | None:
        """None: supervision stays as it is for the whole run."""
        if self.objective.supervise_until == 1:
            return None
        cosine = {"none": False, "cosine": True}[self.objective.supervision_decay]
        return SupervisionSchedule(self.supervised_steps, cosine)

    @property
    def supervised_steps(self) -> int:
        """The first steps, in which captions and metaqueries are laid out."""
        return round(self.objective.supervise_until * self.steps)

    def unsupervised(self) -> "Recipe":
        """With the packs of the steps after supervision ended."""
        return replace(self, objective=self.objective.unsupervised())


def load_recipe(
    name_or_file: str, overrides: Iterable[str] = (), absent: list[str] | None = None
) -> Recipe:
    """Reads a recipe that ships with the project or a YAML file, applies `a.b=value` overrides in
    order and checks the result. Raises SettingsError.

    With `absent`, for a dry run, a recipe that names its GPU uses the shape of
    `model.published_shape` where the base has no configuration files here; a line that says so is
    appended to `absent`."""
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
