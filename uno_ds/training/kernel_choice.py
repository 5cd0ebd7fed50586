"""What `auto` means on a GPU: at the first start rank 0 checks and times every backend, and tells
the other ranks; later starts read the result from a file."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from uno_ds.cost.memory import Sharding, memory
from uno_ds.cost.parameters import parameters_of, target_encoder_parameters
from uno_ds.cost.scenario import Scenario, fullest_packs
from uno_ds.data.files import one_line
from uno_ds.kernels.backends import KERNELS
from uno_ds.kernels.selection import KernelSettings
from uno_ds.kernels.self_check import (
    Finding,
    Findings,
    Shapes,
    candidates,
    fastest,
    nothing_right,
    unfinished,
    with_tried_again,
)
from uno_ds.objectives.regression_target import head_width
from uno_ds.objectives.visual_regression import CONTRASTIVE
from uno_ds.sequence.segments import Kind
from uno_ds.training.check_processes import LIMIT_SECONDS, check
from uno_ds.training.choice_cache import ChoiceCache
from uno_ds.training.gpu_machine import gpu_machine

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe

FIXED = "fixed order"


@dataclass(frozen=True)
class KernelChoice:
    """settings: resolved. source: where the findings come from. lines: for the run's first
    lines."""

    settings: KernelSettings
    source: str
    findings: Findings = field(default_factory=dict)

    @property
    def lines(self) -> list[str]:
        lines = [] if self.findings or self.source == FIXED else [f"kernels: {self.source}"]
        for kernel, findings in self.findings.items():
            name = self.settings.backends[kernel]
            rows = "; ".join(text_of(finding) for finding in findings)
            lines.append(f"kernels.{kernel}: auto is {name} ({self.source}): {rows}")
        return lines

    def plain(self) -> dict[str, Any]:
        """For the summary."""
        findings = {
            kernel: [finding.plain() for finding in found]
            for kernel, found in self.findings.items()
        }
        return {"backends": self.settings.backends, "source": self.source, "findings": findings}


def text_of(finding: Finding) -> str:
    if finding.reason is not None:
        return f"{finding.backend} {finding.reason}"
    return f"{finding.backend} {finding.forward_ms:.2f} + {finding.backward_ms:.2f} ms"


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """A finding as JSON can hold it, which has no NaN."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def choose_kernels(
    recipe: "Recipe", layouts: Sequence[str], device: torch.device, limit: float = LIMIT_SECONDS
) -> KernelChoice:
    """The recipe's backends with every `auto` replaced, the same on all ranks. Collective on a GPU;
    on a CPU nothing is checked. `layouts`: of the sources."""
    settings = recipe.kernels.resolved(recipe.kernel_demands)
    machine = gpu_machine(device)
    automatic = [
        kernel
        for kernel, name in recipe.kernels.backends.items()
        if name == "auto" and KERNELS[kernel].chosen_by_check
    ]
    if machine is None or not recipe.kernels.self_check or not automatic:
        return KernelChoice(settings, FIXED)
    choice: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            choice = [_choose(recipe, layouts, automatic, machine, device, limit)]
        except Exception as error:  # the other ranks wait, and the fixed order is no failure
            choice = [(f"fixed order, since the check failed: {one_line(error)}", {})]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(choice, src=0)
    source, findings = choice[0]
    chosen = {kernel: fastest(kernel, found) for kernel, found in findings.items()}
    names = {kernel: name for kernel, name in chosen.items() if name is not None}
    return KernelChoice(settings.with_backends(names), source, findings)


def _choose(
    recipe: "Recipe",
    layouts: Sequence[str],
    kernels: list[str],
    machine: dict[str, str],
    device: torch.device,
    limit: float,
) -> tuple[str, Findings]:
    """(source, findings) on rank 0."""
    shapes, pack = shapes_of(recipe, layouts)
    cache = ChoiceCache(recipe.kernels.cache)
    key = {"machine": machine, "shapes": asdict(shapes), "pack": asdict(pack), "kernels": kernels}
    known = _findings_of(cache.read(key), kernels)
    again = unfinished(known or {})
    too_large = {}
    if "attention" in kernels:
        too_large = too_large_for(recipe, pack, int(machine["memory"]))
    if known is not None and not again:
        return f"checked before, {cache.file}", _that_fit(known, too_large)
    began = time.monotonic()
    if known is None:
        findings = check(kernels, shapes, pack, device, limit)
    else:
        found = check(list(again), shapes, pack, device, limit, names=again)
        findings = with_tried_again(known, found)
    seconds = time.monotonic() - began
    source = f"checked now in {seconds:.0f} s"
    if known is not None:
        names = "; ".join(f"{kernel} {', '.join(tried)}" for kernel, tried in again.items())
        source = f"checked before, {cache.file}; {names} tried again in {seconds:.0f} s"
    plain = {kernel: [finding.plain() for finding in found] for kernel, found in findings.items()}
    if failed := [kernel for kernel, found in findings.items() if nothing_right(found)]:
        # More likely the machine's state than all of them, another program on the GPU perhaps.
        source += f", not kept: no backend of {', '.join(failed)} was found right"
    elif problem := cache.write(key, plain):
        source += f", not kept: {problem}"
    return source, _that_fit(findings, too_large)


def _that_fit(findings: Findings, too_large: dict[str, str]) -> Findings:
    """The findings, with those of attention marked that are too large. They are kept without the
    mark: it depends on the number of ranks and on all that the recipe stores."""
    if not too_large:
        return findings
    return findings | {"attention": without_too_large(findings["attention"], too_large)}


def _findings_of(plain: dict[str, Any] | None, kernels: list[str]) -> Findings | None:
    """None for what this version would not have written."""
    if plain is None or list(plain) != kernels:
        return None
    try:
        findings = {
            kernel: [Finding(**finding) for finding in found] for kernel, found in plain.items()
        }
    except TypeError:
        return None
    for kernel, found in findings.items():
        if [each.backend for each in found] != list(candidates(kernel)):
            return None
    return findings


def too_large_for(recipe: "Recipe", pack: Scenario, memory_bytes: int) -> dict[str, str]:
    """{attention backend: why a whole step with it does not fit, by the cost model}."""
    found = {}
    parameters = parameters_of(recipe)
    sharding = Sharding.of(recipe, dist.get_world_size(), recipe.engine.resolved_precision())
    for name in candidates("attention"):
        need = memory(
            parameters,
            recipe.architecture,
            sharding,
            pack,
            recipe.model.recompute,
            average=recipe.optimizer.ema > 0,
            image_pixels=recipe.data.latent_image.max_pixels,
            codec_bytes=2 if recipe.model.codec_precision == "bf16" else 4,
            attention=name,
            experts=recipe.kernels.resolved(recipe.kernel_demands).experts,
            target_encoder=target_encoder_parameters(recipe),
        ).peak
        if need > memory_bytes:
            found[name] = (
                f"does not fit: by the cost model a step needs {need / 1e9:.0f} GB, and the device "
                f"has {memory_bytes / 1e9:.0f} GB"
            )
    return found


def without_too_large(findings: list[Finding], too_large: dict[str, str]) -> list[Finding]:
    """The findings with these reasons, unless none of the right ones would be left: the cost model
    may be too careful."""
    marked = [
        replace(finding, reason=too_large[finding.backend])
        if finding.reason is None and finding.backend in too_large
        else finding
        for finding in findings
    ]
    is_any_left = any(finding.reason is None for finding in marked)
    return marked if is_any_left else findings


def shapes_of(recipe: "Recipe", layouts: Sequence[str]) -> tuple[Shapes, Scenario]:
    """Of the model, and of the pack with most tokens."""
    packs = fullest_packs(recipe, layouts)
    pack = max(packs.values(), key=lambda pack: pack.tokens)
    shape, objective = recipe.architecture, recipe.objective
    contrastive = objective.regression_loss == CONTRASTIVE
    shapes = Shapes(
        precision=recipe.engine.resolved_precision(),
        heads=shape.heads,
        key_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        encoder_heads=shape.vit_heads,
        encoder_head_dim=shape.vit_hidden // shape.vit_heads,
        hidden=shape.hidden,
        mlp=shape.mlp,
        vocabulary=shape.vocabulary,
        features=head_width(objective, shape),
        distance=objective.regression_loss,
        temperature=objective.regression_temperature if contrastive else None,
        understanding=pack.supervision,
        generation=pack.generation,
        captions=pack.rows(Kind.CAPTION),
        metaqueries=pack.rows(Kind.METAQUERY),
    )
    return shapes, pack
