"""Checks fused kernels during training: at intervals, the attention of one layer and the regression
loss of a batch are compared with the reference, gradients included."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from uno_ds.kernels.comparison import Outputs, compare
from uno_ds.kernels.conditioning_attention import conditioning_attention
from uno_ds.kernels.metaquery_regression.api import metaquery_contrast, metaquery_regression
from uno_ds.kernels.plan import AttentionPlan
from uno_ds.training.collectives import gather_objects
from uno_ds.training.engine import Engine
from uno_ds.training.health import HealthSettings, TrainingStopped

# Number of neighbouring queries that are compared: the reference is dense over all keys.
QUERIES = 64


class KernelCheck:
    """Runs every `kernel_check_every` steps, each time with another layer and other queries.
    Tensors are compared with the reference in fp64; the allowed error is `kernel_check_tolerance`
    times that of the reference in the run's dtype."""

    def __init__(self, settings: HealthSettings, engine: Engine):
        self.settings, self.engine, self._checks = settings, engine, 0
        self._stops = {"warn": False, "stop": True}[settings.kernel_check_action]
        # Arguments of the first call of each kind, and the methods that were replaced to record
        # them.
        self._arguments: dict[str, tuple[Any, ...]] = {}
        self._replaced: list[tuple[torch.nn.Module, str, Callable]] = []

    def before_step(self, step: int) -> None:
        if not self.settings.kernel_check_every or step % self.settings.kernel_check_every:
            return
        objective = self.engine.objective
        layers = objective.model.layers
        self._record(layers[self._checks % len(layers)], "attend", "attention")
        if objective.regression is not None and objective.regression.backend != "reference":
            self._record(objective.regression, "compute", objective.regression.checked_as)
        self._checks += 1

    def after_step(self, step: int) -> list[str]:
        """Lines to log. Collective in a step that is checked; with `kernel_check_action` stop,
        raises TrainingStopped on all ranks if one has found a difference."""
        if not self._replaced:
            return []
        for module, name, function in self._replaced:
            setattr(module, name, function)
        self._replaced.clear()
        found: list[str] = []
        for kind, arguments in self._arguments.items():
            tolerance = self.settings.kernel_check_tolerance
            found += COMPARE[kind](*arguments, tolerance, self._checks)
        self._arguments.clear()
        lines: list[str] = []
        for rank, found_by_rank in enumerate(gather_objects(found)):
            lines += [f"kernel check of step {step}, rank {rank}: {line}" for line in found_by_rank]
        if lines and self._stops:
            raise TrainingStopped(
                f"{'; '.join(lines)} (health.kernel_check_action = stop). Choose another backend "
                "in kernels."
            )
        return [f"warning: {line}" for line in lines]

    def _record(self, module: torch.nn.Module, name: str, kind: str) -> None:
        """Replaces a method by one that also keeps the arguments of its first call."""
        function = getattr(module, name)

        def recording(*arguments: Any) -> Any:
            # Only the first: activation checkpointing calls it again in the backward pass.
            if kind not in self._arguments:
                self._arguments[kind] = tuple(
                    value.detach().clone() if isinstance(value, torch.Tensor) else value
                    for value in arguments
                )
            return function(*arguments)

        self._replaced.append((module, name, function))
        setattr(module, name, recording)


def compare_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: AttentionPlan,
    backend: str,
    tolerance: float,
    seed: int,
) -> list[str]:
    """A line for each tensor that differs between `backend` and the reference: the output of some
    queries, and the gradients of the queries, keys and values."""
    if not len(q):
        return []
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(max(1, len(q) - QUERIES + 1), (), generator=generator))
    rows = slice(first, min(len(q), first + QUERIES))
    start = plan.query_rows[0]
    narrow = dataclasses.replace(plan, query_rows=(start + rows.start, start + rows.stop))
    weight = torch.randn(q[rows].shape, generator=generator).to(q)

    def outputs(dtype: torch.dtype, which: str) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        if which == "reference":
            out = conditioning_attention(leaves[0][rows], leaves[1], leaves[2], narrow, which)
        else:
            out = conditioning_attention(*leaves, plan, which)[rows]
        gradients = torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)
        return [out.detach(), gradients[0][rows], *gradients[1:]]

    other = backend if backend != "reference" else "sdpa"
    return differences(
        f"attention by {other}",
        ("output", "gradient of q", "gradient of k", "gradient of v"),
        outputs,
        other,
        q.dtype,
        tolerance,
    )


def compare_regression(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    target: torch.Tensor,
    kind: str,
    backend: str,
    tolerance: float,
    seed: int,
) -> list[str]:
    """A line for each tensor that differs between `backend` and the reference."""
    if not len(hidden):
        return []

    def outputs(dtype: torch.dtype, which: str) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight) if x is not None]
        head = leaves[1] if weight is not None else None
        converted = target.to(dtype) if which == "reference" else target
        loss = metaquery_regression(leaves[0], head, converted, kind, which)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    return differences(
        f"regression by {backend}",
        ("loss", "gradient of hidden", "gradient of the head"),
        outputs,
        backend,
        hidden.dtype,
        tolerance,
    )


def compare_contrast(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    candidates: torch.Tensor,
    first: int,
    temperature: float,
    backend: str,
    tolerance: float,
    seed: int,
) -> list[str]:
    """A line for each tensor that differs between `backend` and the reference."""
    if not len(hidden):
        return []

    def outputs(dtype: torch.dtype, which: str) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight) if x is not None]
        head = leaves[1] if weight is not None else None
        converted = candidates.to(dtype)
        loss = metaquery_contrast(leaves[0], head, converted, first, temperature, which)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    return differences(
        f"contrastive regression by {backend}",
        ("loss", "gradient of hidden", "gradient of the head"),
        outputs,
        backend,
        hidden.dtype,
        tolerance,
    )


def differences(
    what: str,
    names: tuple[str, ...],
    outputs: Outputs,
    backend: str,
    dtype: torch.dtype,
    tolerance: float,
) -> list[str]:
    """A line for each tensor whose error is larger than allowed. outputs: given a dtype and a
    backend, returns the tensors named by `names`."""
    compared = compare(names, outputs, backend, dtype, tolerance)
    return [f"{what}: {found}" for found in compared if not found.is_right]


COMPARE: dict[str, Callable[..., list[str]]] = {
    "attention": compare_attention,
    "regression": compare_regression,
    "contrast": compare_contrast,
}
