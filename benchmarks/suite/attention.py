"""What benchmarks/kernels.py measures of the segment-masked attention: scenarios, backends, and how time is taken.

Scenarios A to F pack samples of prompt, latents, caption and metaqueries (F: with the visual encoder's image to be edited) into
about 32,768 tokens at the head counts of BAGEL-7B. Unlike in the FLOP table of the docs, start- and end-of-image tokens
are laid out, as they are in training.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from uno_ds.kernels.conditioning_attention import conditioning_attention, flex, launch
from uno_ds.kernels.plan import AttentionPlan, build_plan
from uno_ds.sequence.segments import LATENT_KINDS, Kind, SegmentTable, parts_needing_gradient

HEADS, KEY_HEADS, DIM = 28, 4, 128
# prompt, latents, caption, metaqueries, visual-encoder tokens; samples
SCENARIOS = {
    "A": (200, 4096, 200, 256, 0, 6),
    "B": (200, 4096, 200, 1024, 0, 5),
    "C": (200, 1024, 200, 64, 0, 22),
    "D": (200, 1024, 200, 256, 0, 19),
    "E": (300, 1024, 300, 1024, 0, 12),
    "F": (100, 4096, 200, 256, 4096, 3),
}
# For a CPU: the same shapes, so small that the plumbing can be tested.
SMALL = {"A": (7, 64, 7, 9, 0, 2), "F": (5, 32, 6, 8, 32, 1)}
L2_BYTES = 256 * 1024**2


def segment_table(
    prompt: int, latents: int, caption: int, metaqueries: int, vit: int, samples: int
) -> SegmentTable:
    """Samples of [image to edit], prompt, noised image, caption, metaqueries."""
    kinds = [*([Kind.VIT] if vit else []), Kind.TEXT, Kind.NOISED, Kind.CAPTION, Kind.METAQUERY]
    lengths = [*([vit + 2] if vit else []), prompt, latents + 2, caption, metaqueries]
    noised, each = kinds.index(Kind.NOISED), len(kinds)
    reads = np.isin(kinds, (Kind.CAPTION, Kind.METAQUERY))
    supervises = np.concatenate(
        [np.where(reads, first + noised, -1) for first in range(0, each * samples, each)]
    )
    return SegmentTable(
        np.tile(kinds, samples),
        np.tile(lengths, samples),
        np.repeat(np.arange(samples), each),
        supervises,
    )


def plan_arguments(table: SegmentTable) -> dict[str, Any]:
    """Arguments of build_plan for the rows in slab order, and `context`, the number of constant rows."""
    relation = table.relation()
    need, _ = parts_needing_gradient(
        table, relation, train_understanding=False, stop_at_context=True
    )
    segment = np.repeat(np.arange(len(table.length_S)), table.length_S)
    position = np.arange(len(segment)) - np.repeat(
        np.cumsum(table.length_S) - table.length_S, table.length_S
    )
    generation = (
        np.isin(table.kind_S, LATENT_KINDS)[segment]
        & (position > 0)
        & (position < table.length_S[segment] - 1)
    )
    slab = np.where(generation, 2, need[segment])
    order = np.argsort(slab, kind="stable")
    return dict(
        segment_T=segment[order],
        position_T=position[order],
        relation_SS=relation,
        group_S=table.sample_S,
        need_T=slab[order] > 0,
        context=int((slab == 0).sum()),
    )


def live_plan(scenario: tuple[int, ...]) -> AttentionPlan:
    """The plan of the live rows: what training spends nearly all of its attention on."""
    arguments = plan_arguments(segment_table(*scenario))
    context = arguments.pop("context")
    return build_plan(**arguments, query_rows=(context, len(arguments["segment_T"])))


def tensors(
    plan: AttentionPlan, dtype: torch.dtype, device: str, heads: tuple[int, int, int]
) -> list[torch.Tensor]:
    """q, k, v that need a gradient, and a gradient of the output."""
    number, keys, dim = heads
    torch.manual_seed(0)
    shapes = (
        (plan.queries, number, dim),
        (plan.keys, keys, dim),
        (plan.keys, keys, dim),
        (plan.queries, number, dim),
    )
    *leaves, upstream = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    return [*(x.requires_grad_() for x in leaves), upstream]


def milliseconds(function: Callable[[], Any], device: str, repeats: int = 20) -> dict[str, float]:
    """20, 50 and 80 % quantiles of the time of one call, the cache flushed before each."""
    cache = torch.empty(L2_BYTES if device == "cuda" else 1, dtype=torch.int8, device=device)
    times, warmup = [], 3 if device == "cuda" else 1
    for number in range(warmup + repeats):
        cache.zero_()
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            passed = begin.elapsed_time(end)
        else:
            clock = time.perf_counter()
            function()
            passed = (time.perf_counter() - clock) * 1000
        if number >= warmup:
            times.append(passed)
    cuts = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return {"20": cuts[1], "50": cuts[4], "80": cuts[7]}


def measure(
    backend: str,
    plan: AttentionPlan,
    dtype: torch.dtype,
    device: str,
    heads: tuple[int, int, int],
    repeats: int,
) -> dict[str, Any]:
    """{forward, backward, both: {ms, tflops}, peak_bytes} of one backend on one plan. Useful FLOP count only visible, needed products."""
    q, k, v, upstream = tensors(plan, dtype, device, heads)
    forward_flops, backward_flops = plan.flops(heads[0], heads[2])
    function, chosen = conditioning_attention, {"backend": backend}
    if backend == "flex" and device == "cuda":
        function, chosen = (
            flex.conditioning_attention,
            {"options": tuned_flex_options(q, k, v, plan, upstream)},
        )

    def forward() -> torch.Tensor:
        return function(q, k, v, plan, **chosen)

    def both() -> None:
        torch.autograd.grad(forward(), (q, k, v), upstream)

    with torch.no_grad():
        results = {"forward": (forward_flops, milliseconds(forward, device, repeats))}

    def backward(out: torch.Tensor) -> dict[str, float]:
        return milliseconds(
            lambda: torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True),
            device,
            repeats,
        )

    results["backward"] = (backward_flops, backward(forward()))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    results["both"] = (forward_flops + backward_flops, milliseconds(both, device, repeats))
    rows: dict[str, Any] = {
        part: {"ms": ms, "tflops": flops / ms["50"] / 1e9} for part, (flops, ms) in results.items()
    }
    return (
        rows
        | chosen
        | {
            "peak_bytes": torch.cuda.max_memory_allocated() - before - L2_BYTES
            if device == "cuda"
            else None
        }
    )


def tuned_flex_options(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, upstream: torch.Tensor
) -> dict[str, int] | None:
    """The kernel_options with which FlexAttention is fastest forward and backward on this plan."""
    times = {}
    for number, options in enumerate(flex.OPTIONS):

        def both(options: dict[str, int] | None = options) -> None:
            torch.autograd.grad(
                flex.conditioning_attention(q, k, v, plan, options), (q, k, v), upstream
            )

        try:
            times[number] = milliseconds(both, "cuda", repeats=5)["50"]
        except Exception as error:  # options that want more than the chip has are out, and are told
            print(
                f"  flex {options}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
    return flex.OPTIONS[min(times, key=times.get)] if times else None


def matmul_tflops(device: str) -> float:
    """The measured rate of a large bf16 matrix product on random data: what shares are taken of."""
    size = 8192 if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b, device)["50"] / 1e9


def fastest_parameters(
    kernel: str, precision: str, dim: int, candidates: list[dict[str, Any]]
) -> dict[str, Any]:
    """The candidate with the least time over scenarios A and D on this GPU, the other kernels at their present parameters."""
    dtype, architecture = (
        torch.bfloat16 if precision == "half" else torch.float32,
        launch.architecture(torch.device("cuda")),
    )
    rows = (
        launch.table()
        .setdefault(architecture, {})
        .setdefault(precision, {})
        .setdefault(str(dim), {})
    )
    present, times = dict(rows), []
    plans = [live_plan(SCENARIOS[name]).to("cuda") for name in ("A", "D")]
    for candidate in candidates:
        rows[kernel] = candidate
        times.append(0.0)
        for plan in plans:
            q, k, v, upstream = tensors(plan, dtype, "cuda", (HEADS, KEY_HEADS, dim))
            try:
                times[-1] += kernel_time(kernel, plan, q, k, v, upstream)
            except Exception as error:  # a candidate that fails to launch is out, and is told
                print(f"  {kernel} {candidate}: {type(error).__name__}: {error}")
                times[-1] = float("inf")
                break
        print(f"  {kernel} {precision} D {dim} {candidate}: {times[-1]:.3f} ms", flush=True)
    rows.clear()
    rows.update(present)
    rows[kernel] = candidates[times.index(min(times))]
    return rows[kernel]


def kernel_time(
    kernel: str,
    plan: AttentionPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    upstream: torch.Tensor,
) -> float:
    """Milliseconds of one kernel alone, on made-up intermediate results."""
    from uno_ds.kernels.conditioning_attention import triton_operator

    operator = triton_operator.Launch(q, k, plan.tables, plan.places, q.shape[2] ** -0.5)
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[1], len(q), device=q.device)
    if kernel == "forward":
        call = ("query_tiles", "keys", q.shape[1], (q, k, v, out, lse), (k, v))
    else:
        dq, dk, dv = (
            torch.zeros_like(q, dtype=torch.float32),
            torch.zeros_like(k),
            torch.zeros_like(v),
        )
        # Weights of exp(s - lse) for an lse that is large: finite, and as costly as any.
        delta, lse = torch.zeros_like(lse), lse + 100.0
        if kernel == "backward_keys":
            call = (
                "live_key_tiles",
                "queries",
                k.shape[1],
                (q, k, v, upstream, lse, delta, dq, dk, dv),
                (q, upstream),
                dq,
            )
        else:
            call = (
                "mixed_query_tiles",
                "constant_keys",
                q.shape[1],
                (q, k, v, upstream, lse, delta, dq),
                (k, v),
            )
    constants = {"WITH_QUERIES": True} if kernel == "backward_keys" else {}
    with torch.no_grad():
        return milliseconds(lambda: operator(kernel, *call, **constants), "cuda")["50"]
