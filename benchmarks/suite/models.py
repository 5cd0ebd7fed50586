"""The objective without DeepSpeed, with a base's weights or random ones."""

import dataclasses
import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from uno_ds.cost.memory import Sharding, memory
from uno_ds.cost.parameters import parameters_of, target_encoder_parameters
from uno_ds.cost.scenario import Scenario
from uno_ds.generation.inference_model import open_model
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import Codec, build_codec
from uno_ds.model.flux import FLUX_CONFIG, FluxCodec, empty_autoencoder
from uno_ds.objectives.regression_target import open_encoder
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
    """On `device`, frozen where the recipe freezes. `random`: the base is not read; weights come
    from the device's generator."""
    kernels = recipe.kernels.resolved(recipe.kernel_demands)
    base_weights = None
    codec: Codec
    if random or recipe.base is None:
        codec = random_codec(recipe, device)
    else:
        opened = open_model(recipe.base, device, dtype)
        base_weights = opened.model.state_dict()
        codec = opened.codec
    encoder = open_encoder(recipe.objective, device, dtype)
    accepted = inspect.signature(Bagel).parameters
    backends = {name: value for name, value in kernels.backends.items() if name in accepted}
    with torch.device("meta"):
        model = Bagel(
            recipe.architecture,
            recompute=recipe.model.recompute,
            read_context=read_answers,
            **backends,
        )
        metaqueries = recipe.sequence.metaqueries
        objective = UnoObjective(model, codec, recipe.objective, kernels, metaqueries, encoder)
    objective.to(dtype).to_empty(device=device)
    torch.manual_seed(recipe.seed)
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            _fill(name, parameter)
        if base_weights is not None:
            objective.model.load_state_dict(base_weights)
    model.reset_tables(device)
    objective.choose_trainable(recipe.model.train, recipe.lora)
    return objective


def with_adapters(recipe: Recipe) -> Recipe:
    """The recipe with model.train = lora."""
    model = dataclasses.replace(recipe.model, train="lora")
    return dataclasses.replace(recipe, model=model)


class NoCodec:
    """Where the codec cannot run: latents have to be given."""

    def encode(self, pixels_B3hw: torch.Tensor) -> torch.Tensor:
        raise AssertionError("pixels need a codec")

    def decode(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        raise AssertionError("pixels need a codec")


def random_codec(recipe: Recipe, device: torch.device) -> Codec:
    """A NoCodec if diffusers, which the FLUX autoencoder needs, is missing."""
    if not codec_runs(recipe):
        return NoCodec()
    if recipe.architecture.codec == "pixel":
        return build_codec(recipe.architecture)
    assert recipe.architecture.codec == "flux", "the other codec with weights"
    with torch.device("meta"):
        autoencoder = empty_autoencoder(FLUX_CONFIG)
    autoencoder.to(recipe.model.codec_dtype).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in autoencoder.named_parameters():
            _fill(name, parameter)
    return FluxCodec(autoencoder)


def codec_runs(recipe: Recipe) -> bool:
    return recipe.architecture.codec == "pixel" or importlib.util.find_spec("diffusers") is not None


@contextmanager
def random_building(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Within it the engine fills a model without a base, and its codec, on the device: in seconds
    instead of minutes."""
    before = sharded_objective.build_codec, sharded_objective.initialise
    sharded_objective.build_codec = lambda *_, **__: random_codec(recipe, device)
    sharded_objective.initialise = lambda name, parameter, seed: _fill(name, parameter)
    try:
        yield
    finally:
        sharded_objective.build_codec, sharded_objective.initialise = before


def with_layers(recipe: Recipe, layers: int) -> Recipe:
    """The recipe for a model of its architecture with so many decoder layers, without a base."""
    model = dataclasses.replace(
        recipe.model,
        base=None,
        published_shape=None,
        tokenizer="tiny_base",
        architecture=dataclasses.replace(recipe.architecture, layers=layers),
    )
    return dataclasses.replace(recipe, model=model)


def layers_that_fit(recipe: Recipe, scenario: Scenario, device: torch.device) -> int:
    """The most decoder layers whose whole step under ZeRO-3 on one GPU needs, by the cost model, 92
    % of its memory. Raises SettingsError."""
    kernels = recipe.kernels.resolved(recipe.kernel_demands)
    room = 0.92 * torch.cuda.get_device_properties(device).total_memory
    for layers in range(recipe.architecture.layers, 0, -1):
        smaller = with_layers(recipe, layers)
        need = memory(
            parameters_of(smaller),
            smaller.architecture,
            Sharding.of(smaller, 1, smaller.engine.resolved_precision()),
            scenario,
            smaller.model.recompute,
            average=False,
            image_pixels=smaller.data.latent_image.max_pixels,
            codec_bytes=smaller.model.codec_dtype.itemsize,
            attention=kernels.attention,
            experts=kernels.experts,
            target_encoder=target_encoder_parameters(smaller),
        ).peak
        if need <= room:
            return layers
    message = (
        f"not even one layer fits: by the cost model it needs {need / 1e9:.0f} GB, and "
        f"{room / 1e9:.0f} GB are free."
    )
    raise SettingsError("--layers", message)


def random_weights(recipe: Recipe) -> str | None:
    """Why this recipe can only run with random weights here, or None."""
    missing = recipe.missing_files
    return f"the base {recipe.base} lacks {', '.join(missing)}" if missing else None


def _fill(name: str, parameter: torch.Tensor) -> None:
    """Norms 1, biases 0, the rest normal with deviation 1/sqrt(inputs): activations as large as in
    training."""
    *above, leaf = name.split(".")
    module = above[-1] if above else ""
    if "norm" in module and leaf == "weight":
        parameter.fill_(1.0)
    elif leaf == "bias":
        parameter.zero_()
    elif "embedding" in module or module == "metaqueries":
        parameter.normal_(0, 0.02)
    else:
        parameter.normal_(0, parameter[0].numel() ** -0.5)
