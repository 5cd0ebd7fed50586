"""What `auto` means on a GPU: at the first start rank 0 checks and times every backend, and tells
the other ranks; later starts read the result from a file.

The check runs in a process of its own, so that a backend that hangs, or leaves the device unusable,
costs its own row only."""

import fcntl
import math
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from uno_ds.cost.memory import Sharding, memory
from uno_ds.cost.parameters import parameters_of, target_encoder_parameters
from uno_ds.cost.scenario import Scenario, fullest_packs
from uno_ds.cost.scenario_plan import live_plan
from uno_ds.data.files import one_line
from uno_ds.kernels.backends import KERNELS
from uno_ds.kernels.check_cases import case_of
from uno_ds.kernels.selection import KernelSettings
from uno_ds.kernels.self_check import (
    Finding,
    Findings,
    Shapes,
    candidates,
    examine,
    fastest,
    nothing_right,
    unfinished,
    with_tried_again,
)
from uno_ds.objectives.regression_target import head_width
from uno_ds.objectives.visual_regression import CONTRASTIVE
from uno_ds.sequence.segments import Kind
from uno_ds.training.choice_cache import ChoiceCache
from uno_ds.training.gpu_machine import gpu_machine

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe

# Of the whole check, once for a machine and model.
LIMIT_SECONDS = 30.0
FIXED = "fixed order"
TIME_IS_OVER = "was stopped: the time of the check was over"


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
        return {
            kernel: [Finding(**finding) for finding in found] for kernel, found in plain.items()
        }
    except TypeError:
        return None


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


def check(
    kernels: Sequence[str],
    shapes: Shapes,
    pack: Scenario,
    device: torch.device,
    limit: float = LIMIT_SECONDS,
    setup: Callable[[], None] | None = None,
    report: Callable[[str, Finding], None] | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
) -> Findings:
    """Findings of every candidate, or of `names` of each kernel, within `limit` seconds. `setup` is
    called first in the process that checks, `report` with each finding as soon as it is there. A
    candidate that ends this process, or that is running when the time is over, gets that as its
    reason."""
    deadline = time.monotonic() + limit
    names = names or {kernel: candidates(kernel) for kernel in kernels}
    groups: dict[str, list[tuple[str, str]]] = {}
    for kernel in kernels:
        for name in names[kernel]:
            groups.setdefault(_group(kernel, name), []).append((kernel, name))
    findings = _Reported(report)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(groups) or 1) as threads:
        clock = str(Path(folder, "clock"))
        given = (shapes, pack, device, deadline, setup, clock, findings)
        list(threads.map(lambda pairs: _check_group(pairs, *given), groups.values()))
    for kernel in kernels:
        for name in names[kernel]:
            if (kernel, name) not in findings:
                reason = f"was not checked: the {limit:.0f} s of the check were over"
                findings[kernel, name] = Finding(name, reason, cut_off=1)
    return {kernel: [findings[kernel, name] for name in names[kernel]] for kernel in kernels}


class _Reported(dict[tuple[str, str], Finding]):
    """Findings by kernel and backend; each is reported when it is added, one at a time."""

    def __init__(self, report: Callable[[str, Finding], None] | None):
        super().__init__()
        self._report, self._lock = report, threading.Lock()

    def __setitem__(self, pair: tuple[str, str], finding: Finding) -> None:
        with self._lock:
            super().__setitem__(pair, finding)
            if self._report is not None:
                self._report(pair[0], finding)


def _group(kernel: str, name: str) -> str:
    """Candidates of one group are checked one after the other, groups at the same time: they
    compile for seconds, each on one core."""
    if name in ("flex", "triton") and kernel == "attention":
        return f"{kernel} {name}"
    return "compiled" if name in ("triton", "liger") else "ready"


def _check_group(
    pairs: list[tuple[str, str]],
    shapes: Shapes,
    pack: Scenario,
    device: torch.device,
    deadline: float,
    setup: Callable[[], None] | None,
    clock: str,
    findings: dict[tuple[str, str], Finding],
) -> None:
    """Adds findings, but none of those that the time did not reach."""
    waiting = pairs
    while waiting and time.monotonic() < deadline:
        given = (shapes, pack, device, deadline, setup, clock)
        reason = _check_in_process(waiting, *given, findings)
        waiting = [pair for pair in pairs if pair not in findings]
        if reason is not None and waiting:
            kernel, name = waiting.pop(0)
            findings[kernel, name] = Finding(name, reason, cut_off=int(reason == TIME_IS_OVER))


def _check_in_process(
    pairs: list[tuple[str, str]],
    shapes: Shapes,
    pack: Scenario,
    device: torch.device,
    deadline: float,
    setup: Callable[[], None] | None,
    clock: str,
    findings: dict[tuple[str, str], Finding],
) -> str | None:
    """Adds what the process finds; the reason why the first pair without a finding has none, or
    None if all have one."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_examine_all, args=(sender, pairs, shapes, pack, device, setup, clock), daemon=True
    )
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            kernel, finding = receiver.recv()
            findings[kernel, finding.backend] = finding
            if all(pair in findings for pair in pairs):
                return None
        return TIME_IS_OVER
    except EOFError:
        process.join(5)
        return f"ended the process of the check (exit code {process.exitcode})"
    finally:
        if process.is_alive():
            process.kill()
        process.join(5)
        receiver.close()


@contextmanager
def _alone(clock: str) -> Iterator[None]:
    """Only one process times at a time. A lock of a file, which a process that dies gives back."""
    with open(clock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _examine_all(
    sender: Any,
    pairs: list[tuple[str, str]],
    shapes: Shapes,
    pack: Scenario,
    device: torch.device,
    setup: Callable[[], None] | None,
    clock: str,
) -> None:
    if setup is not None:
        setup()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # Groups share the cores.
        torch.set_num_threads(1)
    plan = live_plan(pack)
    for kernel, name in pairs:
        try:
            case = case_of(kernel, shapes, plan, device)
        except Exception as error:
            finding = Finding(name, f"cannot be checked: {one_line(error)}")
        else:
            finding = examine(case, name, shapes, device, partial(_alone, clock))
        sender.send((kernel, finding))
    sender.close()
    # Without the interpreter's shutdown, which waits for threads of compilers.
    os._exit(0)
