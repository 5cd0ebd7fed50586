"""Finds settings that are valid one by one but leave something without effect together.

Contradictions are errors. What may be intended, as in a short trial of a long recipe, is a
warning."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from uno_ds.data.layouts import get_layout
from uno_ds.settings import SettingsError

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe


def check_supervision(recipe: "Recipe") -> None:
    """Raises SettingsError if the caption or the regression loss has a weight above 0 and no sample
    can ever have its tokens."""
    objective, sequence = recipe.objective, recipe.sequence
    if objective.regression_weight and not sequence.metaquery_grid:
        raise SettingsError(
            "sequence.metaquery_grid",
            "is 0, but objective.regression_weight is above 0; give a grid of at least 1 or "
            "set the weight to 0.",
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
    warnings = []
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
