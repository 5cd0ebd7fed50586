"""The objective without DeepSpeed, with a base's weights or random ones."""

import dataclasses
import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from uno_ds.cost.memory import Sharding, memory
from uno_ds.cost.parameters import parameters_of
from uno_ds.cost.scenario import Scenario
from uno_ds.generation.inference_model import open_model
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import Codec, build_codec
from uno_ds.model.flux import FLUX_CONFIG, FluxCodec, empty_autoencoder
from uno_ds.objectives.uno import UnoObjective
from uno_ds.recipe import Recipe
from uno_ds.settings import SettingsError
from uno_ds.training import sharded_objective

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_objective(
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    random: bool,
    read_answers: bool = False,
) -> UnoObjective:
    """On `device`, frozen where the recipe freezes. `random`: the base is not read; weights come from the device's generator."""
    shape, kernels, model_of_base = recipe.architecture, recipe.kernels.resolved(), None
    backends = {
        name: backend
        for name, backend in vars(kernels).items()
        if name in inspect.signature(Bagel).parameters
    }
    if random or recipe.base is None:
        with torch.device("meta"):
            model = Bagel(
                shape, recompute=recipe.model.recompute, read_context=read_answers, **backends
            )
        codec = random_codec(recipe, device)
    else:
        opened = open_model(recipe.base, device, dtype)
        model_of_base, codec = opened.model, opened.codec
        with torch.device("meta"):
            model = Bagel(
                shape, recompute=recipe.model.recompute, read_context=read_answers, **backends
            )
    with torch.device("meta"):
        objective = UnoObjective(
            model, codec, recipe.objective, kernels, recipe.sequence.metaquery_grid**2
        )
    objective.to(dtype).to_empty(device=device)
    torch.manual_seed(recipe.seed)
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            _fill(name, parameter)
        if model_of_base is not None:
            objective.model.load_state_dict(model_of_base.state_dict())
    model.reset_tables(device)
    objective.set_trainable(everything=recipe.model.train == "all")
    return objective


def random_codec(recipe: Recipe, device: torch.device) -> Codec | None:
    """None where diffusers, which the FLUX autoencoder needs, is missing: then latents have to be given."""
    if not codec_runs(recipe):
        return None
    if recipe.architecture.codec == "pixel":
        return build_codec(recipe.architecture)
    dtype = DTYPES[recipe.model.codec_precision]
    with torch.device("meta"):
        autoencoder = empty_autoencoder(FLUX_CONFIG)
    autoencoder.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in autoencoder.named_parameters():
            _fill(name, parameter)
    return FluxCodec(autoencoder)


def codec_runs(recipe: Recipe) -> bool:
    return recipe.architecture.codec == "pixel" or importlib.util.find_spec("diffusers") is not None


@contextmanager
def random_building(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Within it the engine fills a model without a base on the device, in seconds instead of minutes, and its codec too."""
    before = sharded_objective.build_codec, sharded_objective.initialise
    sharded_objective.build_codec = lambda *_, **__: random_codec(recipe, device)
    sharded_objective.initialise = lambda name, parameter, _: _fill(name, parameter)
    try:
        yield
    finally:
        sharded_objective.build_codec, sharded_objective.initialise = before


def layers_that_fit(recipe: Recipe, scenario: Scenario, device: torch.device) -> int:
    """The most decoder layers whose whole step under ZeRO-3 on one GPU needs, by the cost model, 92 % of its memory. Raises SettingsError."""
    room = 0.92 * torch.cuda.get_device_properties(device).total_memory
    for layers in range(recipe.architecture.layers, 0, -1):
        shape = dataclasses.replace(recipe.architecture, layers=layers)
        less = dataclasses.replace(
            recipe,
            model=dataclasses.replace(
                recipe.model,
                base=None,
                published_shape=None,
                tokenizer="tiny_base",
                architecture=shape,
            ),
        )
        need = memory(
            parameters_of(less),
            shape,
            Sharding.of(less, 1, less.engine.resolved_precision()),
            scenario,
            less.model.recompute,
            average=False,
            image_pixels=less.data.latent_image.max_pixels,
            codec_bytes=2 if less.model.codec_precision == "bf16" else 4,
            attention=less.kernels.resolved().attention,
        ).peak
        if need <= room:
            return layers
    raise SettingsError(
        "--layers",
        f"not even one layer fits: the cost model says {need / 1e9:.0f} GB, and {room / 1e9:.0f} GB are free.",
    )


def random_weights(recipe: Recipe) -> str | None:
    """Why this recipe can only run with random weights here, or None."""
    missing = recipe.missing_files
    return f"the base {recipe.base} lacks {', '.join(missing)}" if missing else None


def _fill(name: str, parameter: torch.Tensor) -> Any:
    """Norms 1, biases 0, the rest normal with deviation 1/sqrt(inputs): activations of a size that training has."""
    leaf, module = name.rsplit(".", 1)[-1], name.split(".")[-2] if "." in name else ""
    if "norm" in module and leaf == "weight":
        return parameter.fill_(1.0)
    if leaf == "bias":
        return parameter.zero_()
    return parameter.normal_(
        0,
        0.02 if "embedding" in module or module == "metaqueries" else parameter[0].numel() ** -0.5,
    )
