"""Finds settings that are valid one by one but leave something without effect together.

Contradictions are errors. What may be intended, as in a short trial of a long recipe, is a
warning."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uno_ds.data.layouts import get_layout
from uno_ds.kernels.backends import KERNELS, backend_of
from uno_ds.model.adapter_files import AdapterFolder
from uno_ds.model.adapters import LoraSettings, check_package, target_modules
from uno_ds.model.quantisation import check_library
from uno_ds.objectives.regression_target import (
    ENCODER_KEY,
    REGRESSION_TARGETS,
    vision_folder_of,
)
from uno_ds.objectives.uno import ObjectiveSettings
from uno_ds.objectives.visual_regression import CONTRASTIVE
from uno_ds.sequence.schedule import largest_weight
from uno_ds.settings import SettingsError

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe

ADAPTER_LR = 1e-4
ADAPTER_KEY = "model.adapter"


def check_supervision(recipe: "Recipe") -> None:
    """Raises SettingsError if the caption or the regression loss has a weight above 0 and no sample
    can ever have its tokens."""
    objective, sequence = recipe.objective, recipe.sequence
    if objective.regression_weight and not sequence.metaqueries:
        raise SettingsError(
            "sequence.metaquery_grid",
            "is 0, but objective.regression_weight is above 0; give a grid of at least 1 or "
            "set the weight to 0.",
        )
    if objective.flow_contrast and not objective.flow_weight:
        raise SettingsError(
            "objective.flow_contrast",
            f"is {objective.flow_contrast:g}, but objective.flow_weight is 0, of which it is a "
            "share; raise the weight, or set flow_contrast to 0.",
        )
    from_the_pack = {
        "flow_contrast": objective.flow_contrast > 0,
        "negative_source": objective.used_negative_source == "pack",
    }
    for key, reads_others in from_the_pack.items():
        if reads_others and recipe.data.max_samples_per_pack == 1:
            raise SettingsError(
                f"objective.{key}",
                f"is {getattr(objective, key)}, which needs other samples in a pack, but "
                "data.max_samples_per_pack is 1; raise it.",
            )
    if objective.negative_weight and not objective.caption_weight:
        raise SettingsError(
            "objective.negative_weight",
            "is above 0, but objective.caption_weight is 0: there is no caption that a negative "
            "could be compared with; raise it, or set negative_weight to 0.",
        )
    _check_schedule(recipe)
    supervised = objective.caption_weight or objective.regression_weight
    if objective.balance != "none" and not (objective.flow_weight and supervised):
        raise SettingsError(
            "objective.balance",
            f"is {objective.balance}, which needs flow matching and an understanding loss, but "
            "objective.flow_weight or both objective.caption_weight and "
            "objective.regression_weight are 0; raise them, or set balance to none.",
        )
    if not objective.caption_weight and not objective.regression_weight:
        return
    zero = "set objective.caption_weight and objective.regression_weight to 0."
    if not sequence.supervised_fraction:
        raise SettingsError(
            "sequence.supervised_fraction",
            "is 0, so that no sample gets a caption or metaqueries, but the weight of one of "
            f"them is above 0; raise it, or {zero}",
        )
    low, high = sequence.supervision_window
    if low == high:
        raise SettingsError(
            "sequence.supervision_window",
            f"[{low}, {high}] is empty, so that no sample gets a caption or metaqueries, but the "
            f"weight of one of them is above 0; widen it, or {zero}",
        )


def check_regression(recipe: "Recipe") -> None:
    """Raises SettingsError for settings of the regression that contradict each other."""
    objective, sequence = recipe.objective, recipe.sequence
    _check_target(objective)
    contrastive = objective.regression_loss == CONTRASTIVE
    if contrastive and not objective.regression_weight:
        raise SettingsError(
            "objective.regression_loss",
            "is contrastive, but objective.regression_weight is 0, so that nothing is regressed; "
            "raise the weight, or leave the loss out.",
        )
    if objective.regression_negatives != "pack" and not contrastive:
        raise SettingsError(
            "objective.regression_negatives",
            f"is {objective.regression_negatives}, but objective.regression_loss is "
            f"{objective.regression_loss}, which has no negatives; set it to contrastive.",
        )
    spatial = objective.regression_target_norm != "none"
    if spatial and not objective.regression_weight:
        raise SettingsError(
            "objective.regression_target_norm",
            f"is {objective.regression_target_norm}, but objective.regression_weight is 0, so that "
            "nothing is regressed; raise the weight, or set it to none.",
        )
    if spatial and objective.regression_mean_share == 1 and 1 in sequence.metaquery_grids:
        raise SettingsError(
            "objective.regression_mean_share",
            "is 1, but the one cell of a sequence.metaquery_grid of 1 is the image's mean, of "
            "which nothing is left; lower it, or give a finer grid.",
        )


def _check_target(objective: ObjectiveSettings) -> None:
    target = REGRESSION_TARGETS.get(objective.regression_target)
    if target is None:
        return
    name, encoder = objective.regression_target, objective.regression_encoder
    if encoder is not None and not target.own_encoder:
        raise SettingsError(
            ENCODER_KEY,
            f"is '{encoder}', but objective.regression_target is {name}, which does not read it; "
            "set regression_target=encoder, or leave it out.",
        )
    if not target.reads_vision and not objective.regression_weight:
        raise SettingsError(
            "objective.regression_target",
            f"is {name}, but objective.regression_weight is 0, so that nothing is regressed; raise "
            "the weight, or leave the target out.",
        )
    if target.own_encoder:
        vision_folder_of(objective)


def _check_schedule(recipe: "Recipe") -> None:
    """Raises SettingsError for a schedule of losses that the run does not have, or that leaves it
    without supervision, or without any loss."""
    objective = recipe.objective
    for name in ("caption", "regression"):
        key = f"{name}_weight_by_t"
        if getattr(objective, key) and not getattr(objective, f"{name}_weight"):
            raise SettingsError(
                f"objective.{key}",
                f"is set, but objective.{name}_weight is 0; raise it, or remove {key}.",
            )
        low, high = recipe.sequence.supervision_window
        if low < high and largest_weight(getattr(objective, key), low, high) == 0:
            raise SettingsError(
                f"objective.{key}",
                f"is 0 at every t of sequence.supervision_window, [{low}, {high}]; widen the "
                "window, or change the weights.",
            )
    until = objective.supervise_until
    if until == 1:
        if objective.supervision_decay != "none":
            raise SettingsError(
                "objective.supervision_decay",
                f"is {objective.supervision_decay}, but objective.supervise_until is 1, so that "
                "supervision does not end; give the share of steps at which it ends.",
            )
        return
    key = "objective.supervise_until"
    if not objective.caption_weight and not objective.regression_weight:
        raise SettingsError(
            key,
            f"is {until:g}, but objective.caption_weight and objective.regression_weight are 0: "
            "there is no supervision to end; raise one of them, or remove supervise_until.",
        )
    last = round(until * recipe.steps)
    if not last:
        raise SettingsError(
            key,
            f"is {until:g} of {recipe.steps} steps, which is no step; raise it, or set the weights "
            "of the understanding losses to 0.",
        )
    if not objective.flow_weight and last < recipe.steps:
        raise SettingsError(
            key,
            f"is {until:g}, but objective.flow_weight is 0: after step {last} nothing is left to "
            "train; raise the weight, or remove supervise_until.",
        )


def set_adapter_defaults(tree: dict[str, Any]) -> None:
    """Adds to the plain values of a recipe the learning rate of adapters, where it trains adapters
    and gives none."""
    model, optimizer = tree.get("model"), tree.setdefault("optimizer", {})
    if not isinstance(model, dict) or not isinstance(optimizer, dict):
        return
    if model.get("train") == "lora":
        optimizer.setdefault("lr", ADAPTER_LR)


def check_frozen_precision(recipe: "Recipe") -> None:
    """Raises SettingsError for quantised weights that nothing or no such run holds."""
    kind = recipe.model.frozen_precision
    if kind == "bf16":
        return
    key = "model.frozen_precision"
    if recipe.model.train == "all":
        raise SettingsError(key, f"is {kind}, but with model.train = all no weight is frozen.")
    check_library(kind, key)
    if recipe.deepspeed_config()["zero_optimization"]["stage"] == 3:
        raise SettingsError(
            key,
            f"is {kind}, but {recipe.engine.deepspeed} is ZeRO stage 3, which cannot shard "
            "quantised weights; use engine.deepspeed=zero2 or zero1.",
        )


def check_experts(recipe: "Recipe") -> None:
    """Raises SettingsError for a backend of the experts' projections that reads the weights
    themselves where adapters or quantised weights take their place."""
    name, model = recipe.kernels.experts, recipe.model
    if name == "auto" or not backend_of("experts", name).copies_weights:
        return
    wrong = None
    if model.train == "lora":
        wrong = "model.train is lora, which puts adapters around them"
    elif model.frozen_precision != "bf16":
        wrong = f"model.frozen_precision is {model.frozen_precision}, which holds codes instead"
    if wrong is not None:
        raise SettingsError(
            "kernels.experts",
            f"'{name}' multiplies with both experts' weights themselves, but {wrong}; set it to "
            f"{KERNELS['experts'].auto}.",
        )


def check_adapters(recipe: "Recipe") -> None:
    """Raises SettingsError for adapters on no module, without the library, or under a DeepSpeed
    configuration that cannot train them."""
    lora, adapter = recipe.lora, recipe.model.adapter
    if recipe.model.train != "lora":
        if adapter is not None:
            raise SettingsError(
                "model.adapter",
                f"needs model.train = lora, and it is {recipe.model.train}; merge the adapter into "
                "a base (weights.py merge), and give that as model.base.",
            )
        return
    check_package()
    target_modules(lora, recipe.architecture)
    if recipe.objective.regression_weight and "metaqueries" not in lora.also_train:
        raise SettingsError(
            "lora.also_train",
            "lacks metaqueries, but objective.regression_weight is above 0, and metaqueries that "
            "do not train are random; add metaqueries, or set the weight to 0.",
        )
    if lora.dora and recipe.model.frozen_precision != "bf16":
        raise SettingsError(
            "lora.dora",
            f"does not go with model.frozen_precision = {recipe.model.frozen_precision}: it would "
            "not start from exactly what the base computes.",
        )
    if adapter is not None:
        if recipe.base is None:
            raise SettingsError(ADAPTER_KEY, "needs the model.base that it was trained on.")
        _check_same_adapters(recipe, AdapterFolder(Path(adapter), recipe.architecture, ADAPTER_KEY))


def _check_same_adapters(recipe: "Recipe", folder: AdapterFolder) -> None:
    """Raises SettingsError for an adapter that this run would not write."""
    theirs, ours = folder.settings, recipe.lora
    for key in ("rank", "alpha", "rslora", "dora"):
        if getattr(theirs, key) != getattr(ours, key):
            raise SettingsError(
                ADAPTER_KEY,
                f"{folder.folder} has {key} {getattr(theirs, key)}, and lora.{key} is "
                f"{getattr(ours, key)}; set lora.{key}={getattr(theirs, key)}.",
            )
    modules = target_modules(ours, recipe.architecture)
    if folder.modules != modules:
        odd = sorted(set(folder.modules) ^ set(modules))[0]
        raise SettingsError(
            ADAPTER_KEY,
            f"{folder.folder} adapts {len(folder.modules)} modules, and lora.targets names "
            f"{len(modules)}; {odd} is in one of them only.",
        )


def check_losses(recipe: "Recipe", layouts: Iterable[str]) -> None:
    """Raises SettingsError if no sample of these layouts has a token of a loss whose weight is
    above 0."""
    layouts = set(layouts)
    losses: set[str] = set()
    for layout in layouts:
        losses.update(get_layout(layout).losses)
    weights = recipe.objective.weights
    if any(weights[name] for name in losses):
        return
    raise SettingsError(
        "objective",
        f"the sources hold {' and '.join(sorted(layouts))} samples, whose losses are "
        f"{', '.join(sorted(losses))}, and all of their weights are 0; raise one, or add a source "
        "of another layout.",
    )


def warnings_of_recipe(recipe: "Recipe") -> list[str]:
    """A line for each setting that has no effect in this recipe."""
    steps, health, checkpoint = recipe.steps, recipe.health, recipe.checkpoint
    warnings = _warnings_of_regression(recipe)
    warnings += _warnings_of_objective(recipe.objective)
    evaluate = recipe.evaluate
    if not evaluate.every and not evaluate.is_idle:
        warnings.append(
            "evaluate.every is 0: evaluate.benchmarks and evaluate.sources have no effect."
        )
    if evaluate.every and evaluate.is_idle and not recipe.samples.prompts:
        warnings.append(
            f"evaluate.every is {evaluate.every}, but there is nothing to evaluate: name "
            "evaluate.benchmarks, evaluate.sources or samples.prompts."
        )
    if recipe.model.train != "lora" and recipe.lora != LoraSettings():
        warnings.append(
            f"lora is set, but model.train is {recipe.model.train}: there are no adapters; set "
            "model.train=lora to train them."
        )
    if recipe.optimizer.warmup >= steps:
        warnings.append(
            f"optimizer.warmup is {recipe.optimizer.warmup}, but the run has {steps} steps: the "
            "learning rate does not stay at its peak for one of them."
        )
    if health.spike_factor and health.spike_window >= steps:
        warnings.append(
            f"health.spike_window is {health.spike_window}, but the run has {steps} steps: no loss "
            "is ever called a spike."
        )
    if health.spike_action != "warn" and not health.spike_factor:
        warnings.append(
            f"health.spike_action is {health.spike_action}, but health.spike_factor is 0: no loss "
            "is ever called a spike."
        )
    if health.kernel_check_every > steps:
        warnings.append(
            f"health.kernel_check_every is {health.kernel_check_every}, but the run has {steps} "
            "steps: the kernels are never checked."
        )
    trace = recipe.logging.trace
    if trace.steps and trace.steps[0] > steps:
        warnings.append(
            f"logging.trace.steps is {trace.steps}, but the run has {steps} steps: none is traced."
        )
    if checkpoint.keep_every and not _kept_steps(checkpoint.every, checkpoint.keep_every, steps):
        warnings.append(
            f"checkpoint.keep_every is {checkpoint.keep_every}, but no checkpoint is written at a "
            f"multiple of it (checkpoint.every is {checkpoint.every}, steps is {steps})."
        )
    return warnings


def _warnings_of_regression(recipe: "Recipe") -> list[str]:
    objective = recipe.objective
    warnings = []
    default = ObjectiveSettings.regression_temperature
    if objective.regression_loss != CONTRASTIVE and objective.regression_temperature != default:
        warnings.append(
            f"objective.regression_temperature is {objective.regression_temperature:g}, but "
            f"objective.regression_loss is {objective.regression_loss}, which has none."
        )
    if objective.regression_target_norm == "none" and objective.regression_mean_share != 1:
        warnings.append(
            f"objective.regression_mean_share is {objective.regression_mean_share:g}, but "
            "objective.regression_target_norm is none: nothing is subtracted."
        )
    return warnings


def _warnings_of_objective(objective: ObjectiveSettings) -> list[str]:
    """Of settings of a part that is off, which are not those by default."""
    plain = ObjectiveSettings()
    warnings: list[str] = []
    for switch, is_on, keys in (
        (
            "negative_weight",
            objective.negative_weight > 0,
            ("negative_source", "negative_margin", "negative_form"),
        ),
        ("balance", objective.balance != "none", ("balance_ratio", "balance_every")),
    ):
        given = [key for key in keys if getattr(objective, key) != getattr(plain, key)]
        if given and not is_on:
            warnings.append(
                f"objective.{given[0]} is {getattr(objective, given[0])}, but objective.{switch} "
                f"is {getattr(objective, switch)}: it has no effect."
            )
    return warnings


def warnings_of_budget(
    recipe: "Recipe", largest: dict[str, int], rows: Sequence[tuple[str, int]]
) -> list[str]:
    """Warnings about a token budget that no pack fills. `largest`: most tokens of a sample of each
    layout; `rows`: (layout, number of rows) of each source. None for a recipe with conversations,
    whose number of turns is not bounded."""
    budget, most = recipe.sequence.token_budget, recipe.data.max_samples_per_pack
    if not largest or not all(get_layout(layout).bounded_length for layout in largest):
        return []
    sample = max(largest.values())
    if most is not None and most * sample < budget:
        return [
            f"sequence.token_budget is {budget:,}, but data.max_samples_per_pack is {most:,} and a "
            f"sample has at most {sample:,} tokens: no pack fills it."
        ]
    tokens = sum(count * largest[layout] for layout, count in rows)
    number_of_rows = sum(count for _, count in rows)
    if rows and tokens < budget:
        return [
            f"sequence.token_budget is {budget:,}, but the {number_of_rows:,} rows of all sources "
            f"have at most {tokens:,} tokens: each pack holds some rows repeatedly."
        ]
    return []


def _kept_steps(every: int, keep_every: int, steps: int) -> int:
    """Number of checkpoints at multiples of `keep_every`, the one after the last step included."""
    at_end = int(steps % keep_every == 0)
    if not every:
        return at_end
    return at_end + (steps - 1) // math.lcm(every, keep_every)
