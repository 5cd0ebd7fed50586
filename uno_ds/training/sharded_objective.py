"""Building the objective under ZeRO and filling it: from a base folder, or from nothing.

Under ZeRO-3 every rank reads its own slice of each tensor straight into its partition, so that no
rank ever holds more of a tensor than it keeps, and nothing is sent between ranks."""

import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist

from uno_ds.model.adapters import base_name, import_peft, initialise_magnitudes, is_adapter
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import build_codec
from uno_ds.model.quantisation import quantise_frozen, quantised_weights
from uno_ds.model.weights import EXTRA_FILE, WeightsFile, bagel_name, nonfinite_error
from uno_ds.objectives.uno import UnoObjective
from uno_ds.settings import SettingsError
from uno_ds.training.collectives import gather_objects, raise_on_all_ranks
from uno_ds.training.shards import shape_of

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe


PREFIX = "model."


def build_objective(
    recipe: "Recipe",
    config: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    read_answers: bool,
) -> tuple[UnoObjective, dict[str, str]]:
    """(the objective with its weights, hashes of the frozen tensors as the base holds them).
    Metaqueries and their head come from the base too if a UNO run wrote it and they have the same
    shape. Collective."""
    shape, kernels = recipe.architecture, recipe.kernels.resolved()
    # Before Init, which would shard the codec too.
    codec = build_codec(
        shape,
        recipe.base,
        device,
        torch.bfloat16 if recipe.model.codec_precision == "bf16" else torch.float32,
    )
    sharded = config["zero_optimization"]["stage"] == 3
    if recipe.model.train == "lora":
        import_peft()
    # Without ZeRO-3 nothing is allocated before it is filled, and then on the device. Init gets its
    # precision from the configuration: DeepSpeed 0.19.8 ignores a `dtype` argument on a processor
    # without fp16 and takes bf16 without a word.
    with deepspeed.zero.Init(config_dict_or_path=config) if sharded else torch.device("meta"):
        model = Bagel(
            shape,
            kernels.attention,
            recipe.model.recompute,
            read_answers,
            kernels.norm_rope,
            kernels.pointwise,
            kernels.cross_entropy,
        )
        objective = UnoObjective(
            model, codec, recipe.objective, kernels, recipe.sequence.metaquery_grid**2
        )
        objective.choose_trainable(recipe.model.train, recipe.lora)
    if not sharded:
        objective.to(dtype)
        if recipe.model.frozen_precision != "bf16":
            model_settings = recipe.model
            quantise_frozen(model, model_settings.frozen_precision, dtype, model_settings.keep_bf16)
        objective.to_empty(device=device)
    model.reset_tables(device)
    weights, filled = _read_base(recipe.base, objective) if recipe.base else (None, set())
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if name in filled or ".lora_magnitude_vector." in name:
                continue
            with (
                deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
                if sharded
                else nullcontext()
            ):
                if not sharded or dist.get_rank() == 0:
                    initialise(name, parameter, recipe.seed)
        for name, module in quantised_weights(model) if weights is None else ():
            values = torch.empty(module.shape, dtype=torch.float32)
            initialise(PREFIX + name, values, recipe.seed)
            module.fill(values.to(device))
        if recipe.model.train == "lora" and recipe.lora.dora:
            initialise_magnitudes(model)
    for parameter in objective.parameters() if sharded else ():
        # hpZ's second copy within a machine was made of the values before; ZeRO makes it again when
        # it is None.
        parameter.ds_secondary_tensor = None
    return objective, _frozen_hashes(weights, model) if weights is not None else {}


def _read_base(base: Path, objective: UnoObjective) -> tuple[WeightsFile, set[str]]:
    """Fills what the base holds: the model, and what a UNO run added to it where its shape is the
    same. Returns the model's weights and the names that were filled. Collective; raises
    SettingsError on every rank where one cannot use its part.
    """
    nonfinite: dict[str, int] = {}
    filled = set()
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
        for name, parameter in objective.named_parameters():
            if is_adapter(name):
                continue
            if name.startswith("model."):
                _read_parameter(weights, bagel_name(name.removeprefix("model.")), parameter)
            elif extra is None or name not in extra.where:
                continue
            elif extra.shape(name) == tuple(shape_of(parameter)):
                _read_parameter(extra, name, parameter)
            else:
                if dist.get_rank() == 0:
                    print(
                        f"{name} starts anew: its shape is {list(shape_of(parameter))}, in "
                        f"{base / EXTRA_FILE} it is {list(extra.shape(name))}",
                        flush=True,
                    )
                continue
            filled.add(name)
        for name, module in quantised_weights(model):
            module.fill(weights.read(bagel_name(name)).to(module.codes.device))
        if nonfinite:
            raise nonfinite_error(base, nonfinite)
    return weights, filled


def _read_parameter(weights: WeightsFile, name: str, parameter: torch.nn.Parameter) -> None:
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(weights.read(name))
        return
    partition = parameter.ds_tensor
    if partition.dtype != parameter.dtype:
        raise SettingsError(
            "engine.deepspeed",
            "keeps frozen parameters quantised, which is not supported; remove "
            "zero_quantized_nontrainable_weights.",
        )
    start = min(parameter.partition_numel() * parameter.ds_zero_partition_rank, parameter.ds_numel)
    count = min(parameter.partition_numel(), parameter.ds_numel - start)
    partition[:count].copy_(weights.read_flat(name, start, count))
    partition[count:].zero_()


def _frozen_hashes(weights: WeightsFile, model: Bagel) -> dict[str, str]:
    """{BAGEL's name: hash of the tensor on the disk} of everything frozen; each rank hashes a part.
    Collective."""
    names = [
        bagel_name(name)
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    ]
    names += [bagel_name(name) for name, _ in quantised_weights(model)]
    own = {name: weights.digest(name) for name in names[dist.get_rank() :: dist.get_world_size()]}
    hashes = {name: digest for part in gather_objects(own) for name, digest in part.items()}
    return {name: hashes[name] for name in names}


def initialise(name: str, parameter: torch.Tensor, seed: int) -> None:
    """Fills one parameter from a generator of its own, so that the model does not depend on ranks
    or sharding.

    Norms 1, biases 0, embeddings normal with deviation 0.02 (metaqueries too), matrices normal with
    deviation 1/sqrt(inputs), halved where they write to the residual stream; llm2vae starts at 0.
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
        embedding = "embedding" in module and module != "patch_embedding" or module == "metaqueries"
        deviation = (
            0.02
            if embedding
            else parameter.shape[-1] ** -0.5
            * (0.5 if module in ("o_proj", "down_proj", "out_proj", "fc2") else 1.0)
        )
        values = torch.empty(parameter.shape, dtype=torch.float32).normal_(
            0, deviation, generator=generator
        )
        parameter.copy_(values)


def _initialise_adapter(name: str, parameter: torch.Tensor, seed: int) -> None:
    if ".lora_B." in name:
        parameter.zero_()
        return
    generator = torch.Generator().manual_seed(_stable_hash(name) ^ seed)
    largest = parameter.shape[-1] ** -0.5
    values = torch.empty(parameter.shape, dtype=torch.float32)
    parameter.copy_(values.uniform_(-largest, largest, generator=generator))


def _stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
