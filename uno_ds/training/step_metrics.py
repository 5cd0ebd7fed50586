"""The metrics of one step, as in `metrics.jsonl`."""

import resource

import torch

from uno_ds.training.engine import StepResult
from uno_ds.training.metrics import Value


def step_metrics(
    result: StepResult,
    has_loss: dict[str, bool],
    *,
    lr: float,
    seconds: float,
    skipped: int,
    device: torch.device,
    mfu: float | None,
) -> dict[str, Value]:
    """Values by name, some of them tensors on the device. has_loss: whether the run computes each
    loss of the result; skipped: number of skipped steps of the run, this one included."""
    # A loss that no token of this step has is unknown, not 0; NaN is written as null.
    known = torch.where(result.counts > 0, result.losses, float("nan"))
    losses: dict[str, Value] = {}
    for number, (name, is_computed) in enumerate(has_loss.items()):
        losses[f"loss_{name}"] = known[number] if is_computed else None
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
