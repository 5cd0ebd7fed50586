"""Low-rank adapters (LoRA) on the generation expert's projections, by the library peft.

An adapted projection W x + b becomes W x + b + s B A x with s = alpha / rank (alpha / sqrt(rank)
with rslora). W and b are frozen, A [rank, in] and B [out, rank] train; B starts at 0, so that a
model with new adapters computes what its base computes. peft replaces the module `q_proj` by one
that holds the old one as `q_proj.base_layer`: `base_name` gives the name without it."""

import importlib.util
import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import torch
from torch import nn

from uno_ds.model.architecture import Architecture
from uno_ds.model.bagel import Bagel
from uno_ds.model.weights import bagel_name
from uno_ds.settings import SettingsError, printable, setting

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS = {"attention+mlp": (*ATTENTION, *MLP), "attention": ATTENTION}
# What may train in full beside adapters, by the first part of a parameter's name.
BESIDE = {
    "interface": ("model.vae2llm.", "model.llm2vae.", "model.time_embedder."),
    "metaqueries": ("metaqueries.", "regression."),
}
# peft's name of an adapter that was given none.
ADAPTER = "default"
_ADAPTER_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")


@dataclass(frozen=True)
class LoraSettings:
    """Read where `model.train` is lora."""

    rank: int = setting(64, doc="Rank of every adapter.", minimum=1, maximum=4096)
    alpha: float = setting(
        128.0,
        doc="An adapter's output is scaled by alpha / rank (by alpha / sqrt(rank) with rslora).",
        above=0,
        maximum=1e6,
    )
    dropout: float = setting(
        0.0, doc="Share of an adapter's inputs that are dropped in training.", minimum=0, below=1
    )
    targets: str | list[str] = setting(
        "attention+mlp",
        doc="Projections of the generation expert that get an adapter. attention: q, k, v, o; "
        "attention+mlp: gate, up and down too; or a list of regular expressions that are searched "
        "for in BAGEL's module names, such as language_model.model.layers.0.self_attn."
        "q_proj_moe_gen.",
    )
    dora: bool = setting(
        False,
        doc="DoRA: the norm of each output's weights trains too.",
    )
    rslora: bool = setting(False, doc="Scale by alpha / sqrt(rank).")
    also_train: list[str] = setting(
        factory=lambda: list(BESIDE),
        choices=tuple(BESIDE),
        doc="What trains in full beside the adapters. interface: vae2llm, llm2vae and the time "
        "embedder; metaqueries: with the regression head.",
    )

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            if self.targets not in TARGETS:
                raise SettingsError(
                    "targets",
                    f"must be {', '.join(TARGETS)} or a list of regular expressions; got "
                    f"'{printable(self.targets, 78)}'.",
                )
            return
        if not self.targets:
            raise SettingsError("targets", "is empty, so that no module would get an adapter.")
        for pattern in self.targets:
            try:
                re.compile(pattern)
            except re.error as error:
                raise SettingsError(
                    "targets", f"'{printable(pattern, 78)}' is no regular expression: {error}."
                ) from None

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def trains(self, name: str) -> bool:
        """Whether the objective's parameter `name` trains."""
        beside = tuple(chain.from_iterable(BESIDE[group] for group in self.also_train))
        return is_adapter(name) or name.startswith(beside)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return any(part in _ADAPTER_PARTS for part in name.split("."))


def base_name(name: str) -> str:
    """A parameter's or module's name as in a model without adapters."""
    return name.replace(".base_layer", "")


def generation_projections(layers: int) -> list[str]:
    """Names of the modules that may get an adapter."""
    modules = product(range(layers), (*ATTENTION, *MLP))
    return [f"layers.{number}.gen.{projection}" for number, projection in modules]


def target_modules(settings: LoraSettings, shape: Architecture) -> list[str]:
    """Names of the modules that get an adapter. Raises SettingsError for a regular expression that
    matches none of them."""
    allowed = generation_projections(shape.layers)
    if isinstance(settings.targets, str):
        projections = TARGETS[settings.targets]
        return [name for name in allowed if name.rpartition(".")[2] in projections]
    chosen: set[str] = set()
    for pattern in settings.targets:
        matching = {name for name in allowed if re.search(pattern, _module_name(name))}
        if not matching:
            raise SettingsError("lora.targets", _unmatched(pattern, shape, allowed))
        chosen |= matching
    return [name for name in allowed if name in chosen]


def _module_name(name: str) -> str:
    """BAGEL's name of a module."""
    return bagel_name(f"{name}.weight").removesuffix(".weight")


def _unmatched(pattern: str, shape: Architecture, allowed: list[str]) -> str:
    with torch.device("meta"):
        named = [name for name, _ in Bagel(shape).named_parameters()]
    modules = [
        bagel_name(name).removesuffix(".weight") for name in named if name.endswith(".weight")
    ]
    frozen = next((name for name in modules if re.search(pattern, name)), None)
    shown = f"'{printable(pattern, 78)}'"
    example = _module_name(allowed[0])
    if frozen is None:
        return f"{shown} matches no module; those that may get an adapter are named as {example}."
    return (
        f"{shown} names only modules that get no adapter, such as {frozen}: adapters go on "
        f"projections of the generation expert, such as {example}."
    )


def check_package() -> None:
    """Raises SettingsError without peft."""
    if importlib.util.find_spec("peft") is None:
        raise SettingsError(
            "model.train",
            "lora needs the package peft, which is not installed: pip install 'uno_ds[lora]'.",
        )


def add_adapters(model: Bagel, settings: LoraSettings) -> None:
    """Puts an adapter on each target, in place; A, B and magnitudes are not initialised. Raises
    SettingsError if the library adapted other modules than those that the targets name."""
    peft = import_peft()
    targets = target_modules(settings, model.shape)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=targets,
        use_dora=settings.dora,
        use_rslora=settings.rslora,
        init_lora_weights=False,
        bias="none",
    )
    with warnings.catch_warnings(), _magnitudes_left_empty():
        # peft looks for a configuration of transformers in the model.
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(config, model, ADAPTER)
    found = adapted_modules(model)
    if found != targets:
        raise SettingsError(
            "lora.targets",
            f"names {len(targets)} modules, and peft {peft.__version__} adapted {len(found)}; "
            "install the version of constraints.txt.",
        )


@contextmanager
def _magnitudes_left_empty() -> Iterator[None]:
    """Within it peft does not compute the norms of base weights when it adds DoRA: they are not
    read yet, and under deepspeed.zero.Init they have no elements. `initialise_magnitudes` does."""
    from peft.tuners.lora import dora

    layer_class: Any = dora.DoraLinearLayer

    def empty(layer: Any, *, base_layer: nn.Linear, **_: Any) -> None:
        layer.weight = nn.Parameter(torch.empty(base_layer.out_features))

    original = layer_class.update_layer
    layer_class.update_layer = empty
    try:
        yield
    finally:
        layer_class.update_layer = original


def import_peft() -> Any:
    """The library. It imports parts of torch that cannot be imported under deepspeed.zero.Init, so
    that it has to be called before. Raises SettingsError without the library."""
    check_package()
    # bitsandbytes, which peft imports where it is installed, warns of kernels that it could
    # download.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import peft

    return peft


def adapted_modules(model: nn.Module) -> list[str]:
    """Names of the modules that have an adapter, found in the model's parameters."""
    suffix = f".lora_A.{ADAPTER}.weight"
    return [
        name.removesuffix(suffix) for name, _ in model.named_parameters() if name.endswith(suffix)
    ]


def initialise_magnitudes(
    model: nn.Module,
    whole: Callable[[nn.Parameter], AbstractContextManager] = lambda weight: nullcontext(),
) -> None:
    """DoRA starts from the norms of the base weights, computed as its forward computes them.
    `whole`: within it a weight has all of its elements."""
    for name in adapted_modules(model):
        module = model.get_submodule(name)
        weight = module.get_parameter("base_layer.weight")
        magnitude = module.get_parameter(f"lora_magnitude_vector.{ADAPTER}.weight")
        with whole(weight):
            magnitude.copy_(torch.linalg.norm(weight, dim=1))


def count_adapters(model: nn.Module, settings: LoraSettings) -> dict[str, Any]:
    """What a run states of its adapters: {modules, by_projection, rank, alpha, scaling}."""
    modules = adapted_modules(model)
    return {
        "modules": len(modules),
        "by_projection": dict(Counter(name.rpartition(".")[2] for name in modules)),
        "rank": settings.rank,
        "alpha": settings.alpha,
        "scaling": settings.scaling,
    }
