"""Measures the segment-masked attention: every backend on packs of the scenarios, and the time to
build a plan.

The packs hold samples of prompt, latents, caption and metaqueries (F: with the visual encoder's
image to be edited) at the head counts of BAGEL-7B. Start- and end-of-image tokens are laid out as
they are in training."""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.suite.calls import L2_BYTES, interval, matmul_tflops, milliseconds
from benchmarks.suite.results import ResultFile
from benchmarks.suite.scenarios import HUNDRED_SEGMENTS, SCENARIOS, SMALL_SCENARIOS
from uno_ds.cost.scenario_plan import live_plan, plan_arguments, segment_table
from uno_ds.data.files import one_line
from uno_ds.kernels.backends import unavailable_reason
from uno_ds.kernels.conditioning_attention import conditioning_attention, flex
from uno_ds.kernels.launch import INTERPRETED
from uno_ds.kernels.plan import AttentionPlan, build_plan

HEADS, KEY_HEADS, DIM = 28, 4, 128
SMALL_HEADS = (2, 1, 16)
PARTS = ("forward", "backward", "both")
OURS = ("triton", "triton_ahead")


def measure_backends(result: ResultFile, options: argparse.Namespace) -> None:
    """Forward, backward and both of every backend on the live rows of every scenario."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    table = SCENARIOS if on_gpu else SMALL_SCENARIOS
    heads = (HEADS, KEY_HEADS, DIM) if on_gpu else SMALL_HEADS
    dtype = torch.bfloat16 if on_gpu else torch.float32
    ceiling = matmul_tflops(device)
    skipped = {}
    for backend in options.backends:
        reason = _skip_reason(backend, on_gpu)
        if reason:
            skipped[backend] = reason
            print(f"{backend}: not measured, {reason}")
    result.details.update(
        heads=heads, dtype=str(dtype), matmul_tflops=ceiling, skipped=skipped, losses=[]
    )
    for name in options.scenarios:
        plan = live_plan(table[name]).to(device)
        forward_flops, backward_flops = plan.flops(heads[0], heads[2])
        print(
            f"{name}: {plan.queries} queries, {plan.keys} keys, {plan.visible_pairs} visible "
            f"pairs, backward products {dict(plan.pairs)}, {forward_flops:.4g} FLOP forward, "
            f"{backward_flops:.4g} backward",
            flush=True,
        )
        for backend in options.backends:
            if backend in skipped:
                continue
            row: dict[str, Any] = {
                "name": "conditioning_attention",
                "scenario": name,
                "backend": backend,
                "visible_pairs": plan.visible_pairs,
                "pairs": dict(plan.pairs),
                "flops": {"forward": forward_flops, "backward": backward_flops},
            }
            result.add(row)
            try:
                for found in measure(backend, plan, dtype, device, heads, options.repeats):
                    row.update(found)
                    result.save()
            except Exception as error:  # a competitor that fails on a case is a result too
                row["error"] = one_line(error)
                result.save()
            print(_line(row, ceiling), flush=True)
            if on_gpu:
                torch.cuda.empty_cache()
    # Times under the interpreter compare with nothing.
    if not INTERPRETED:
        losses = list(_losses(result.measurements))
        result.details["losses"] = losses
        print("\n".join(losses))


def _skip_reason(backend: str, on_gpu: bool) -> str | None:
    reason = unavailable_reason("attention", backend)
    if reason is None and on_gpu and backend == "reference":
        reason = "its memory grows with the square of the tokens"
    return reason


def _line(row: dict[str, Any], ceiling: float) -> str:
    if "error" in row:
        return f"  {row['backend']:<12} failed: {row['error']}"
    parts = []
    for part in PARTS:
        tflops = row[part]["tflops"]
        time = interval(row[part]["ms"])
        parts.append(f"{part} {time}, {tflops:6.1f} TFLOP/s, {tflops / ceiling:4.0%}")
    if row["peak_bytes"] is not None:
        parts.append(f"peak {row['peak_bytes'] / 2**20:.0f} MiB")
    return f"  {row['backend']:<12} {' | '.join(parts)}"


def _losses(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line for every case and part in which another backend is faster than ours, the faster one
    of them."""
    measured = [row for row in rows if "error" not in row and "both" in row]
    our_rows = [row for row in measured if row["backend"] in OURS]
    our_rows.sort(key=lambda row: row["both"]["ms"]["50"], reverse=True)
    fastest = {row["scenario"]: row for row in our_rows}
    for other in measured:
        ours = fastest.get(other["scenario"])
        if ours is None or other["backend"] in OURS:
            continue
        for part in PARTS:
            ratio = ours[part]["ms"]["50"] / other[part]["ms"]["50"]
            if ratio > 1:
                yield (
                    f"LOSES: scenario {ours['scenario']}, {part}: {ours['backend']} takes "
                    f"{ratio:.2f} times the time of {other['backend']}"
                )


def measure(
    backend: str,
    plan: AttentionPlan,
    dtype: torch.dtype,
    device: str,
    heads: tuple[int, int, int],
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """Parts of {forward, backward, both: {ms, tflops}, peak_bytes} of one backend on one plan, each
    as soon as it is measured. Useful FLOP count visible, needed products only."""
    q, k, v, upstream = tensors(plan, dtype, device, heads)
    forward_flops, backward_flops = plan.flops(heads[0], heads[2])
    on_gpu = device == "cuda"
    attend = partial(conditioning_attention, q, k, v, plan, backend=backend)
    if backend == "flex" and on_gpu:
        # Options and scenarios are more kinds of calls than a run has.
        flex.forget_compiled()
        options = tuned_flex_options(q, k, v, plan, upstream)
        yield {"options": options}
        attend = partial(flex.conditioning_attention, q, k, v, plan, options=options)

    def both() -> None:
        torch.autograd.grad(attend(), (q, k, v), upstream)

    with torch.no_grad():
        yield {"forward": _rate(forward_flops, milliseconds(attend, device, repeats))}
    # Within a call, so that the output is freed before memory is measured.
    backward_ms = _backward_milliseconds(attend(), (q, k, v), upstream, device, repeats)
    yield {"backward": _rate(backward_flops, backward_ms)}
    peak_bytes = None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    both_ms = milliseconds(both, device, repeats)
    if on_gpu:
        peak_bytes = torch.cuda.max_memory_allocated() - before - L2_BYTES
    yield {"both": _rate(forward_flops + backward_flops, both_ms), "peak_bytes": peak_bytes}


def _backward_milliseconds(
    out: torch.Tensor,
    inputs: tuple[torch.Tensor, ...],
    upstream: torch.Tensor,
    device: str,
    repeats: int,
) -> dict[str, float]:
    backward = partial(torch.autograd.grad, out, inputs, upstream, retain_graph=True)
    return milliseconds(backward, device, repeats)


def _rate(flops: float, ms: dict[str, float]) -> dict[str, Any]:
    return {"ms": ms, "tflops": flops / ms["50"] / 1e9}


def tuned_flex_options(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, upstream: torch.Tensor
) -> dict[str, int] | None:
    """The kernel_options with which FlexAttention is fastest forward and backward on this plan."""

    def both(options: dict[str, int] | None) -> None:
        out = flex.conditioning_attention(q, k, v, plan, options)
        torch.autograd.grad(out, (q, k, v), upstream)

    times = {}
    for number, options in enumerate(flex.OPTIONS):
        try:
            times[number] = milliseconds(partial(both, options), "cuda", repeats=5)["50"]
        except Exception as error:  # options that need more than the chip has are left out
            print(f"  flex {options}: {one_line(error)}")
    if not times:
        return None
    return flex.OPTIONS[min(times, key=lambda number: times[number])]


def measure_plan_building(result: ResultFile, options: argparse.Namespace) -> None:
    """Time to build the plans of packs of about 32,768 tokens on one core, also of a pack with 100
    segments."""
    for name, scenario in {**SCENARIOS, "100 segments": HUNDRED_SEGMENTS}.items():
        arguments = plan_arguments(segment_table(scenario))
        context = arguments.pop("context")
        tokens = len(arguments["segment_T"])
        segments = len(arguments["group_S"])
        row = {"name": "plan", "scenario": name, "tokens": tokens, "segments": segments}
        lines = []
        for part, query_rows in (("context", (0, context)), ("live", (context, tokens))):
            build = partial(build_plan, **arguments, query_rows=query_rows)
            ms = milliseconds(build, "cpu", options.repeats)
            size = build().tables.numel() * 4
            row[part] = {"ms": ms, "bytes": size}
            lines.append(f"{part} plan {interval(ms, 2)}, {size / 1024:.0f} KiB to copy")
        print(f"{name}: {tokens} tokens, {segments} segments: {', '.join(lines)}")
        result.add(row)


def tensors(
    plan: AttentionPlan, dtype: torch.dtype, device: str, heads: tuple[int, int, int]
) -> list[torch.Tensor]:
    """q, k, v that need a gradient, and a gradient of the output."""
    query_heads, key_heads, dim = heads
    torch.manual_seed(0)
    query_shape = (plan.queries, query_heads, dim)
    key_shape = (plan.keys, key_heads, dim)
    shapes = (query_shape, key_shape, key_shape, query_shape)
    q, k, v, upstream = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), upstream]
