"""What fits: the memory of a rank with the fullest packs of a recipe, the largest token budget for
a memory of a given size, and what a run that ran out of memory can change."""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from uno_ds.cost.memory import Memory, Sharding, memory
from uno_ds.cost.parameters import Parameter, parameters_of, target_encoder_parameters
from uno_ds.cost.scenario import Scenario, packs_of_run
from uno_ds.settings import SettingsError

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe

BUDGET_STEP, LARGEST_BUDGET = 128, 1 << 20
# A configuration that ships, whose master weights and moments are in main memory.
OFFLOADED = "zero3_offload"


def sharding_of(recipe: "Recipe", ranks: int) -> Sharding:
    precision = recipe.engine.resolved_precision()
    if recipe.hardware.gpu and recipe.engine.precision == "auto":
        precision = "bf16"
    return Sharding.of(recipe, ranks, precision)


def needs_of(
    recipe: "Recipe", parameters: list[Parameter], sharding: Sharding, packs: dict[str, Scenario]
) -> dict[str, Memory]:
    """{pack: memory of one rank}."""
    kernels = recipe.kernels.resolved()
    needs: dict[str, Memory] = {}
    for name, pack in packs.items():
        needs[name] = memory(
            parameters,
            recipe.architecture,
            sharding,
            pack,
            recipe.model.recompute,
            average=recipe.optimizer.ema > 0,
            image_pixels=recipe.data.latent_image.max_pixels,
            codec_bytes=recipe.model.codec_dtype.itemsize,
            attention=kernels.attention,
            experts=kernels.experts,
            target_encoder=target_encoder_parameters(recipe),
        )
    return needs


def largest_budget(recipe: "Recipe", ranks: int, layouts: Iterable[str], room: int) -> int | None:
    """The largest sequence.token_budget, in steps of BUDGET_STEP, whose fullest pack needs at most
    `room` bytes on a rank; None if not even the largest sample fits."""
    layouts = list(layouts)
    parameters, sharding = parameters_of(recipe), sharding_of(recipe, ranks)

    def fits(budget: int) -> bool:
        sequence = dataclasses.replace(recipe.sequence, token_budget=budget)
        resized = dataclasses.replace(recipe, sequence=sequence)
        needs = needs_of(recipe, parameters, sharding, packs_of_run(resized, layouts))
        return max(need.peak for need in needs.values()) <= room

    # In steps: `low` fits, `high` does not.
    low = -(-max(recipe.largest_samples(layouts).values()) // BUDGET_STEP)
    if not fits(low * BUDGET_STEP):
        return None
    high = LARGEST_BUDGET // BUDGET_STEP + 1
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle * BUDGET_STEP):
            low = middle
        else:
            high = middle
    return low * BUDGET_STEP


@dataclass(frozen=True)
class Change:
    """A key of the recipe with another value, and the bytes of a rank at the peak with it."""

    assignment: str
    peak: int


def largest_need(recipe: "Recipe", ranks: int, layouts: Iterable[str]) -> Memory:
    """Of one rank with the fullest pack of these layouts."""
    packs = packs_of_run(recipe, layouts)
    needs = needs_of(recipe, parameters_of(recipe), sharding_of(recipe, ranks), packs)
    return max(needs.values(), key=lambda need: need.peak)


def changes_that_save(
    recipe: "Recipe", ranks: int, layouts: Iterable[str], capacity: int, *, on_gpu: bool
) -> list[Change]:
    """Single changes of a recipe that ran out of memory, after which a rank needs less: a smaller
    token budget, activation checkpointing, and on a GPU the optimizer in main memory. The budget is
    the largest that needs neither more than `capacity` bytes nor more than three quarters of what
    forward and backward need now, since the estimate may be too low."""
    layouts = list(layouts)
    need = largest_need(recipe, ranks, layouts)
    now = need.peak
    room = min(capacity, now - sum(need.working.values()) // 4)
    found = []
    for assignment, changed in _changes(recipe, ranks, layouts, room, on_gpu):
        peak = largest_need(changed, ranks, layouts).peak
        if peak < now:
            found.append(Change(assignment, peak))
    return found


def _changes(
    recipe: "Recipe", ranks: int, layouts: list[str], room: int, on_gpu: bool
) -> Iterator[tuple[str, "Recipe"]]:
    budget = largest_budget(recipe, ranks, layouts, room)
    if budget is not None and budget < recipe.sequence.token_budget:
        sequence = dataclasses.replace(recipe.sequence, token_budget=budget)
        resized = dataclasses.replace(recipe, sequence=sequence)
        yield f"sequence.token_budget={budget}", resized
    if not recipe.model.recompute:
        model = dataclasses.replace(recipe.model, recompute=True)
        yield "model.recompute=true", dataclasses.replace(recipe, model=model)
    if on_gpu and not sharding_of(recipe, ranks).offload_optimizer:
        engine = dataclasses.replace(recipe.engine, deepspeed=OFFLOADED)
        try:
            offloaded = dataclasses.replace(recipe, engine=engine)
            offloaded.check_world(ranks)
        except SettingsError:
            return  # quantised weights, for example, need another stage
        yield f"engine.deepspeed={OFFLOADED}", offloaded
