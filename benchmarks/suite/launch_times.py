"""Times single Triton attention kernels, to choose their launch parameters."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.suite.attention import HEADS, KEY_HEADS, tensors
from benchmarks.suite.calls import milliseconds
from uno_ds.data.files import one_line
from uno_ds.kernels.conditioning_attention import launch
from uno_ds.kernels.plan import AttentionPlan

Save = Callable[[dict[str, Any]], None]


def fastest_parameters(
    kernel: str,
    precision: str,
    dim: int,
    candidates: list[dict[str, Any]],
    plans: list[AttentionPlan],
    heads: tuple[int, int],
    repeats: int,
    save: Save,
) -> dict[str, Any]:
    """The candidate with the least time over the plans on this device; the other kernels keep their
    present parameters. `save` gets a row for each candidate as soon as it is timed."""
    dtype = {"half": torch.bfloat16, "single": torch.float32}[precision]
    device = plans[0].tables.device
    if device.type == "cpu":
        dtype = torch.float32
    of_architecture = launch.table().setdefault(launch.architecture(device), {})
    of_precision = of_architecture.setdefault(precision, {})
    of_dim = "any" if device.type == "cpu" else str(dim)
    parameters = of_precision.setdefault(of_dim, {})
    present = dict(parameters)
    times = []
    for candidate in candidates:
        parameters[kernel] = candidate
        row: dict[str, Any] = {"name": kernel, "precision": precision, "dim": dim}
        row["parameters"] = candidate
        try:
            row["ms"] = sum(kernel_time(kernel, plan, dtype, dim, heads, repeats) for plan in plans)
        except Exception as error:  # a candidate that fails to launch is left out
            row["error"] = one_line(error)
        times.append(row.get("ms", float("inf")))
        save(row)
        print(f"  {kernel} {precision} D {dim} {candidate}: {times[-1]:.3f} ms", flush=True)
    parameters.clear()
    parameters.update(present)
    parameters[kernel] = candidates[times.index(min(times))]
    return parameters[kernel]


def kernel_time(
    kernel: str,
    plan: AttentionPlan,
    dtype: torch.dtype,
    dim: int,
    heads: tuple[int, int] = (HEADS, KEY_HEADS),
    repeats: int = 20,
) -> float:
    """Milliseconds of one kernel alone; backward reads the lse and delta of a real forward. Raises
    ValueError for an unknown kernel."""
    from uno_ds.kernels.conditioning_attention import triton_operator

    device = plan.tables.device.type
    q, k, v, upstream = tensors(plan, dtype, device, (*heads, dim))
    query_heads, key_heads = heads
    operator = triton_operator.Launch(q, k, plan.tables, plan.places, q.shape[2] ** -0.5)
    out = torch.zeros_like(q)
    lse = torch.zeros(query_heads, len(q), device=q.device)
    forward = ("forward", "query_tiles", "keys", query_heads, (q, k, v, out, lse), (k, v))
    call: tuple[Any, ...] = forward
    options: dict[str, Any] = {}
    with torch.no_grad():
        if kernel in ("forward", "forward_ahead"):
            call = (kernel, *forward[1:])
        else:
            operator(*forward)
            statistics = triton_operator.starting_values(out, upstream, lse, q.shape[2] ** -0.5)
            dq = torch.zeros_like(q, dtype=torch.float32)
            given = (q, k, v, upstream, *statistics, dq)
        if kernel == "backward_keys":
            of_keys = (*given, torch.zeros_like(k), torch.zeros_like(v))
            call = (kernel, "live_key_tiles", "queries", key_heads, of_keys, (q, upstream), dq)
            options = {"WITH_QUERIES": True}
        elif kernel == "backward_queries":
            tiles = ("mixed_query_tiles", "constant_keys")
            call = (kernel, *tiles, query_heads, given, (k, v))
            options = {"own": (q, upstream)}
        elif kernel not in launch.KERNELS:
            raise ValueError(f"There is no attention kernel '{kernel}'.")
        return milliseconds(lambda: operator(*call, **options), device, repeats)["50"]
