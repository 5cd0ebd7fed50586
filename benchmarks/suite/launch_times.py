"""Times single Triton attention kernels, to choose their launch parameters."""

from typing import Any

import torch

from benchmarks.suite.attention import HEADS, KEY_HEADS, live_plan, tensors
from benchmarks.suite.calls import milliseconds
from benchmarks.suite.scenarios import SCENARIOS
from uno_ds.data.files import one_line
from uno_ds.kernels.conditioning_attention import launch
from uno_ds.kernels.plan import AttentionPlan


def fastest_parameters(
    kernel: str, precision: str, dim: int, candidates: list[dict[str, Any]]
) -> dict[str, Any]:
    """The candidate with the least time over scenarios A and D on this GPU; the other kernels keep
    their present parameters."""
    dtype = {"half": torch.bfloat16, "single": torch.float32}[precision]
    architecture = launch.architecture(torch.device("cuda"))
    of_precision = launch.table().setdefault(architecture, {}).setdefault(precision, {})
    parameters = of_precision.setdefault(str(dim), {})
    present = dict(parameters)
    plans = [live_plan(SCENARIOS[name]).to("cuda") for name in ("A", "D")]
    times = []
    for candidate in candidates:
        parameters[kernel] = candidate
        name = f"{kernel} {precision} D {dim} {candidate}"
        try:
            times.append(sum(kernel_time(kernel, plan, dtype, dim) for plan in plans))
        except Exception as error:  # a candidate that fails to launch is left out
            print(f"  {name}: {one_line(error)}")
            times.append(float("inf"))
        print(f"  {name}: {times[-1]:.3f} ms", flush=True)
    parameters.clear()
    parameters.update(present)
    parameters[kernel] = candidates[times.index(min(times))]
    return parameters[kernel]


def kernel_time(kernel: str, plan: AttentionPlan, dtype: torch.dtype, dim: int) -> float:
    """Milliseconds of one kernel alone, on made-up intermediate results. Raises ValueError for an
    unknown kernel."""
    from uno_ds.kernels.conditioning_attention import triton_operator

    q, k, v, upstream = tensors(plan, dtype, "cuda", (HEADS, KEY_HEADS, dim))
    query_heads = q.shape[1]
    key_heads = k.shape[1]
    operator = triton_operator.Launch(q, k, plan.tables, plan.places, q.shape[2] ** -0.5)
    out = torch.zeros_like(q)
    lse = torch.zeros(query_heads, len(q), device=q.device)
    delta = torch.zeros_like(lse)
    # Weights of exp(s - lse) for an lse that is large: finite, and as costly as any.
    large_lse = lse + 100.0
    dq = torch.zeros_like(q, dtype=torch.float32)
    dk = torch.zeros_like(k)
    dv = torch.zeros_like(v)
    call: tuple[Any, ...]
    constants: dict[str, bool] = {}
    if kernel == "forward":
        call = ("query_tiles", "keys", query_heads, (q, k, v, out, lse), (k, v))
    elif kernel == "backward_keys":
        given = (q, k, v, upstream, large_lse, delta, dq, dk, dv)
        call = ("live_key_tiles", "queries", key_heads, given, (q, upstream), dq)
        constants = {"WITH_QUERIES": True}
    elif kernel == "backward_queries":
        read = (q, k, v, upstream, large_lse, delta, dq)
        call = ("mixed_query_tiles", "constant_keys", query_heads, read, (k, v))
    else:
        raise ValueError(f"There is no attention kernel '{kernel}'.")
    with torch.no_grad():
        return milliseconds(lambda: operator(kernel, *call, **constants), "cuda")["50"]
