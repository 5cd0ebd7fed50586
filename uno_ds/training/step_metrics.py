"""What `metrics.jsonl` holds of a step."""

import resource
from typing import Any

import torch

from uno_ds.objectives.uno import LOSSES
from uno_ds.training.engine import StepResult


def step_metrics(
    result: StepResult,
    has_loss: dict[str, bool],
    *,
    lr: float,
    seconds: float,
    skipped: int,
    device: torch.device,
    mfu: Any,
) -> dict[str, Any]:
    """Values by name, tensors of the device among them. has_loss: whether the run computes each
    loss of LOSSES; skipped: skipped steps of the run, this one included."""
    # A loss without a token in this step is not 0 but unknown; NaN is written as null.
    known = torch.where(result.counts > 0, result.losses, float("nan"))
    losses = {
        f"loss_{name}": known[number] if has_loss[name] else None
        for number, name in enumerate(LOSSES)
    }
    return {
        "loss": result.loss,
        **losses,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "tokens": result.tokens,
        "step_seconds": seconds,
        "memory_bytes": peak_memory(device),
        "skipped": skipped,
        "mfu": mfu,
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the resident set's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
