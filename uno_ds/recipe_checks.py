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
from uno_ds.objective_checks import warnings_of_objective
from uno_ds.settings import SettingsError

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe

ADAPTER_LR = 1e-4
ADAPTER_KEY = "model.adapter"


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
    warnings = warnings_of_objective(recipe)
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
