"""Builds the objective under ZeRO and loads its weights from a base folder, or initialises them.

Under ZeRO-3 every rank reads its own slice of each tensor straight into its partition: no rank
holds more of a tensor than its partition, and nothing is sent between ranks."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist

from uno_ds.kernels.selection import KernelSettings
from uno_ds.model.adapters import base_name, import_peft, initialise_magnitudes, is_adapter
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import build_codec
from uno_ds.model.quantisation import quantise_frozen, quantised_weights
from uno_ds.model.regression_metadata import identity_in
from uno_ds.model.weights import EXTRA_FILE, WeightsFile, bagel_name, nonfinite_error
from uno_ds.objectives.regression_target import open_encoder
from uno_ds.objectives.uno import UnoObjective
from uno_ds.settings import SettingsError
from uno_ds.training.collectives import gather_objects, gather_rows, raise_on_all_ranks
from uno_ds.training.gathered_dora import gather_for_dora
from uno_ds.training.regression_identity import foreign_weights, regression_identity
from uno_ds.training.shards import is_zero3, piece_of, shape_of

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe


PREFIX = "model."


def build_objective(
    recipe: "Recipe",
    kernels: KernelSettings,
    config: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    read_answers: bool,
) -> tuple[UnoObjective, dict[str, str]]:
    """(the objective with its weights, hashes of the frozen tensors as the base holds them).
    `kernels`: resolved. Metaqueries and their head come from the base too if a UNO run wrote it and
    they have the same shape. Collective."""
    shape = recipe.architecture
    codec_dtype = recipe.model.codec_dtype
    # Before zero.Init, which would partition them too.
    codec = build_codec(shape, recipe.base, device, codec_dtype)
    with raise_on_all_ranks():
        encoder = open_encoder(recipe.objective, device, dtype)
    sharded = config["zero_optimization"]["stage"] == 3
    if recipe.model.train == "lora":
        import_peft()
    # Without ZeRO-3 the weights are allocated on the device just before they are loaded. zero.Init
    # takes its precision from the configuration: on a processor without fp16, DeepSpeed 0.19.8
    # silently uses bf16 whatever its `dtype` argument is.
    with deepspeed.zero.Init(config_dict_or_path=config) if sharded else torch.device("meta"):
        model = Bagel(
            shape,
            kernels.attention,
            recipe.model.recompute,
            read_answers,
            kernels.norm_rope,
            kernels.pointwise,
            kernels.cross_entropy,
            kernels.experts,
        )
        objective = UnoObjective(
            model,
            codec,
            recipe.objective,
            kernels,
            recipe.sequence.metaqueries,
            encoder,
        )
        objective.choose_trainable(recipe.model.train, recipe.lora)
    if recipe.objective.gathers_negatives and objective.regression is not None:
        objective.regression.gather = gather_rows
    if not sharded:
        objective.to(dtype)
        if recipe.model.frozen_precision != "bf16":
            model_settings = recipe.model
            quantise_frozen(model, model_settings.frozen_precision, dtype, model_settings.keep_bf16)
        objective.to_empty(device=device)
    model.reset_tables(device)
    loaded: set[str] = set()
    frozen_hashes: dict[str, str] = {}
    if recipe.base is not None:
        weights, loaded = _read_base(recipe.base, objective, regression_identity(recipe))
        frozen_hashes = _frozen_hashes(weights, model)
    _initialise_others(objective, loaded, recipe.seed)
    if recipe.model.train == "lora" and recipe.lora.dora:
        with torch.no_grad():
            initialise_magnitudes(model, deepspeed.zero.GatheredParameters)
        if sharded:
            gather_for_dora(model)
    return objective, frozen_hashes


def _read_base(
    base: Path, objective: UnoObjective, identity: dict[str, Any]
) -> tuple[WeightsFile, set[str]]:
    """Loads the model from the base, and the weights that a UNO run added to it where their shape
    is the same and they were trained by the regression `identity`. Returns (the model's weights on
    the disk, names that were loaded). Collective; raises SettingsError on every rank where one
    cannot use its part."""
    nonfinite: dict[str, int] = {}
    loaded = set()
    with raise_on_all_ranks(), torch.no_grad():
        weights = WeightsFile(base, nonfinite)
        model = objective.model
        weights.check(
            {
                bagel_name(name): shape_of(parameter)
                for name, parameter in model.named_parameters()
                if not is_adapter(name)
            }
            | {bagel_name(name): module.shape for name, module in quantised_weights(model)}
        )
        has_extra = (base / EXTRA_FILE).exists()
        extra = WeightsFile(base, nonfinite, [EXTRA_FILE]) if has_extra else None
        foreign = foreign_weights(identity_in(base), identity) if has_extra else {}
        for name, parameter in objective.named_parameters():
            if is_adapter(name):
                continue
            if name.startswith("model."):
                _read_parameter(weights, bagel_name(name.removeprefix("model.")), parameter)
            elif extra is None or name not in extra.where:
                continue
            elif name in foreign:
                if dist.get_rank() == 0:
                    why = f"{base / EXTRA_FILE} holds that of {foreign[name]}"
                    print(f"{name} is initialised at random: {why}", flush=True)
                continue
            elif extra.shape(name) == tuple(shape_of(parameter)):
                _read_parameter(extra, name, parameter)
            else:
                if dist.get_rank() == 0:
                    print(
                        f"{name} is initialised at random: its shape is "
                        f"{list(shape_of(parameter))}, but in {base / EXTRA_FILE} it is "
                        f"{list(extra.shape(name))}",
                        flush=True,
                    )
                continue
            loaded.add(name)
        for name, module in quantised_weights(model):
            module.fill(weights.read(bagel_name(name)).to(module.codes.device))
            loaded.add(PREFIX + name)
        if nonfinite:
            raise nonfinite_error(base, nonfinite)
    return weights, loaded


def _initialise_others(objective: UnoObjective, loaded: set[str], seed: int) -> None:
    """Initialises the parameters that were not loaded. Collective."""
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if name in loaded or ".lora_magnitude_vector." in name:
                continue
            if not is_zero3(parameter):
                initialise(name, parameter, seed)
                continue
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if dist.get_rank() == 0:
                    initialise(name, parameter, seed)
        for name, module in quantised_weights(objective):
            if name not in loaded:
                values = torch.empty(module.shape, dtype=torch.float32)
                initialise(name, values, seed)
                module.fill(values.to(module.codes.device))
    for parameter in objective.parameters():
        if is_zero3(parameter):
            # hpZ's second copy within a machine holds the values from before; ZeRO makes a new one
            # where it is None.
            parameter.ds_secondary_tensor = None


def _read_parameter(weights: WeightsFile, name: str, parameter: torch.nn.Parameter) -> None:
    if not is_zero3(parameter):
        parameter.copy_(weights.read(name))
        return
    partition = parameter.ds_tensor
    if partition.dtype != parameter.dtype:
        raise SettingsError(
            "engine.deepspeed",
            "keeps frozen parameters quantised, which is not supported; remove "
            "zero_quantized_nontrainable_weights.",
        )
    start, size = piece_of(parameter)
    partition[:size].copy_(weights.read_flat(name, start, size))
    partition[size:].zero_()


def _frozen_hashes(weights: WeightsFile, model: Bagel) -> dict[str, str]:
    """{BAGEL's name: hash of the tensor on the disk} of the frozen parameters; each rank hashes a
    part of them. Collective."""
    names = [
        bagel_name(name)
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    ]
    names += [bagel_name(name) for name, _ in quantised_weights(model)]
    own = {name: weights.digest(name) for name in names[dist.get_rank() :: dist.get_world_size()]}
    hashes: dict[str, str] = {}
    for part in gather_objects(own):
        hashes |= part
    return {name: hashes[name] for name in names}


def initialise(name: str, parameter: torch.Tensor, seed: int) -> None:
    """Initialises one parameter from its own random generator, so that the values do not depend on
    ranks or sharding.

    Norms are 1, biases 0, embeddings and metaqueries normal with standard deviation 0.02, matrices
    normal with standard deviation 1/sqrt(inputs), half of it where they write to the residual
    stream; llm2vae is 0.
    Of an adapter A is uniform within 1/sqrt(inputs), as in peft, and B 0.
    """
    if is_adapter(name):
        _initialise_adapter(name, parameter, seed)
        return
    name = base_name(name)
    leaf, module = name.rsplit(".", 1)[-1], name.split(".")[-2]
    if "norm" in module and leaf == "weight":
        parameter.fill_(1.0)
    elif leaf == "bias" or module == "llm2vae":
        parameter.zero_()
    else:
        generator = torch.Generator().manual_seed(_stable_hash(name) ^ seed)
        values = torch.empty(parameter.shape, dtype=torch.float32)
        values.normal_(0, _deviation(module, inputs=parameter.shape[-1]), generator=generator)
        parameter.copy_(values)


def _initialise_adapter(name: str, parameter: torch.Tensor, seed: int) -> None:
    if ".lora_B." in name:
        parameter.zero_()
        return
    generator = torch.Generator().manual_seed(_stable_hash(name) ^ seed)
    largest = parameter.shape[-1] ** -0.5
    values = torch.empty(parameter.shape, dtype=torch.float32)
    parameter.copy_(values.uniform_(-largest, largest, generator=generator))


def _deviation(module: str, inputs: int) -> float:
    """Standard deviation of the initial weights of an embedding or a matrix."""
    if module == "metaqueries" or "embedding" in module and module != "patch_embedding":
        return 0.02
    writes_to_residual = module in ("o_proj", "down_proj", "out_proj", "fc2")
    return inputs**-0.5 * (0.5 if writes_to_residual else 1.0)


def _stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
