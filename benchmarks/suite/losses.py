"""Measures the fused losses and the small kernels around attention.

Rates count the products of the mathematics, not those that are repeated to save memory; a floor is
the same products by the vendor's library and nothing else. On a CPU the shapes are small, as a test
of the code, and times mean nothing.

Shape suffixes: docs/notation.md.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.suite.attention import DIM, HEADS, KEY_HEADS
from benchmarks.suite.calls import L2_BYTES, interval, matmul_tflops, milliseconds
from benchmarks.suite.results import ResultFile
from benchmarks.suite.scenarios import SCENARIOS, SMALL_SCENARIOS
from uno_ds.data.files import one_line
from uno_ds.kernels.backends import backend_names, backend_of, unavailable_reason
from uno_ds.kernels.cross_entropy import linear_cross_entropy
from uno_ds.kernels.expert_products import expert_product
from uno_ds.kernels.metaquery_regression import metaquery_regression
from uno_ds.kernels.qk_norm_rope import qk_norm_rope
from uno_ds.objectives.flow_matching import flow_matching_loss, noise_latents

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
# Of BAGEL-7B on a GPU.
HIDDEN = 3584 if GPU else 64
VOCABULARY = 152_064 if GPU else 500
MLP = 18_944
EPS = 1e-6


def regression(result: ResultFile, options: argparse.Namespace) -> None:
    """Cosine loss at several numbers of metaqueries and widths, with a head that is frozen and one
    that trains."""
    ceiling = matmul_tflops(DEVICE)
    result.details.update(hidden=HIDDEN, dtype=str(DTYPE))
    for count in (1024, 4096, 16384) if GPU else (96,):
        for features in (1152, 3584) if GPU else (24,):
            for trains in (False, True):
                case = {
                    "name": "metaquery_regression",
                    "rows": count,
                    "features": features,
                    "trains": trains,
                    "ceiling_tflops": ceiling,
                }
                _measure_regression(case, result, options.repeats)


def _measure_regression(case: dict[str, Any], result: ResultFile, repeats: int) -> None:
    count, features = case["rows"], case["features"]
    x, w, z = _random((count, HIDDEN), (features, HIDDEN), (count, features))
    plain_x = x.detach()
    plain_w = w.detach()
    slope = z.clone()
    products = [(plain_x, plain_w.T), (slope, plain_w), (slope.T, plain_x)]
    if not case["trains"]:
        products.pop()
    flops = len(products) * 2 * count * HIDDEN * features
    leaves = [x.requires_grad_()]
    if case["trains"]:
        leaves.append(w.requires_grad_())
    upstream = torch.full((count,), 1 / count, device=DEVICE)

    def floor() -> None:
        for left, right in products:
            left @ right

    floor_ms = milliseconds(floor, DEVICE, repeats)
    floor_rate = flops / floor_ms["50"] / 1e9
    backend = f"floor: {len(products)} products"
    _record(result, {**case, "backend": backend, "both": floor_ms, "tflops": floor_rate})
    for name, function in _variants(metaquery_regression, "regression"):
        row = {**case, "backend": name}
        row |= _both_ways(partial(function, x, w, z, "cosine"), leaves, upstream, repeats)
        if "both" in row:
            row["tflops"] = flops / row["both"]["50"] / 1e9
            row["share_of_floor"] = floor_ms["50"] / row["both"]["50"]
        _record(result, row)


def norm_rope(result: ResultFile, options: argparse.Namespace) -> None:
    """Both experts' rows of a pack of 32,768 tokens of BAGEL-7B. Bytes that have to move, against a
    measured copy."""
    lengths = (8192, 24_576) if GPU else (40, 60)
    heads, key_heads, dim = (HEADS, KEY_HEADS, DIM) if GPU else (4, 2, 16)
    tokens = sum(lengths)
    value_bytes = torch.finfo(DTYPE).bits // 8
    head_counts = (heads, key_heads, key_heads)
    slabs = []
    for count in head_counts:
        slabs.append(_random(*((length, count, dim) for length in lengths)))
    weights = [_random((dim,), (dim,)) for _ in range(2)]
    cos, sin = _random((tokens, dim // 2), (tokens, dim // 2))
    leaves = [x.requires_grad_() for x in itertools.chain(*slabs)]
    leaves += [weight[1].requires_grad_() for weight in weights]
    upstream = _random(*((tokens, count, dim) for count in head_counts))

    values = tokens * (heads + 2 * key_heads) * dim * value_bytes
    normed_values = tokens * (heads + key_heads) * dim * value_bytes
    angles = tokens * dim * value_bytes
    moved = {"forward": 2 * values + angles, "backward": 2 * values + normed_values + angles}
    result.details.update(
        tokens=tokens, heads=[heads, key_heads, dim], dtype=str(DTYPE), bytes=moved
    )
    copy_rate = _copy_rate(options.repeats)
    kernel = {"name": "qk_norm_rope"}
    _record(result, {**kernel, "backend": "copy", "gigabytes_per_second": copy_rate})
    for name, function in _variants(qk_norm_rope, "norm_rope"):
        row: dict[str, Any] = {**kernel, "backend": name}
        call = partial(function, *slabs, *weights, cos, sin, EPS, None)
        row |= _both_ways(call, leaves, upstream, options.repeats)
        if "both" in row:
            forward_ms = row["forward"]["50"]
            backward_ms = row["both"]["50"] - forward_ms
            for part, passed in (("forward", forward_ms), ("backward", backward_ms)):
                rate = moved[part] / passed / 1e6
                row[f"{part}_gigabytes_per_second"] = rate
                row[f"{part}_share_of_copy"] = rate / copy_rate
        _record(result, row)


def _copy_rate(repeats: int) -> float:
    """GB/s read and written by a large copy."""
    source = torch.empty(2**29 if GPU else 2**20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    passed = milliseconds(lambda: target.copy_(source), DEVICE, repeats)["50"]
    return 2 * source.nbytes / passed / 1e6


def cross_entropy(result: ResultFile, options: argparse.Namespace) -> None:
    """The language head over the captions of a pack (19 of 200 tokens), frozen."""
    count = 3800 if GPU else 60
    x, w = _random((count, HIDDEN), (VOCABULARY, HIDDEN))
    labels = torch.randint(VOCABULARY, (count,), device=DEVICE)
    upstream = torch.full((count,), 1 / count, device=DEVICE)
    leaves = [x.requires_grad_()]
    result.details.update(rows_with_a_label=count, vocabulary=VOCABULARY)
    for backend in backend_names("cross_entropy"):
        row: dict[str, Any] = {"name": "cross_entropy", "backend": backend}
        reason = unavailable_reason("cross_entropy", backend)
        if reason:
            row["skipped"] = reason
        else:
            call = partial(linear_cross_entropy, x, w, labels, backend)
            row |= _both_ways(call, leaves, upstream, options.repeats)
        if "both" in row:
            row["tflops"] = 4 * count * HIDDEN * VOCABULARY / row["both"]["50"] / 1e9
        _record(result, row)


def experts(result: ResultFile, options: argparse.Namespace) -> None:
    """Projections of both experts' live rows in a pack of scenario A: a product for each, or one
    for both, which copies both weights each way. So it does under ZeRO-3, where each weight is
    gathered into a tensor of its own. The copy is in the times, and is measured alone too."""
    scenario = (SCENARIOS if GPU else SMALL_SCENARIOS)["A"]
    rows = scenario.supervision, scenario.generation
    mlp, queries = (MLP, HEADS * DIM) if GPU else (96, 64)
    result.details.update(rows_of_experts=rows, hidden=HIDDEN, dtype=str(DTYPE))
    projections = {
        "q_proj": (HIDDEN, queries),
        "gate_proj": (HIDDEN, mlp),
        "down_proj": (mlp, HIDDEN),
    }
    for (projection, widths), trains in itertools.product(
        projections.items(), ("generation", "all")
    ):
        case = {"name": "experts", "projection": projection, "rows": rows, "trains": trains}
        _measure_experts(case, widths, result, options.repeats)


def _measure_experts(
    case: dict[str, Any], widths: tuple[int, int], result: ResultFile, repeats: int
) -> None:
    wide, out = widths
    understanding, generation = case["rows"]
    total = understanding + generation
    x, first, second, upstream = _random((total, wide), (out, wide), (out, wide), (total, out))
    leaves = [x.requires_grad_(), second.requires_grad_()]
    trained_rows = generation
    if case["trains"] == "all":
        leaves.append(first.requires_grad_())
        trained_rows = total
    flops = 2 * wide * out * (2 * total + trained_rows)
    copy = partial(torch.stack, [first.detach(), second.detach()])
    copied = 2 * first.nbytes
    copy_ms = milliseconds(copy, DEVICE, repeats)
    row: dict[str, Any] = {**case, "backend": "copy of both weights", "forward": copy_ms}
    _record(result, row | {"copied_bytes": copied})
    for backend in backend_names("experts"):
        row = {**case, "backend": backend}
        reason = unavailable_reason("experts", backend)
        if reason:
            row["skipped"] = reason
        else:
            call = partial(expert_product, x, understanding, (first, second), backend=backend)
            row |= _both_ways(call, leaves, upstream, repeats)
            row["copied_bytes"] = copied if backend_of("experts", backend).copies_weights else 0
        if "both" in row:
            row["tflops"] = flops / row["both"]["50"] / 1e9
        _record(result, row)


def flow_matching(result: ResultFile, options: argparse.Namespace) -> None:
    """Noise, velocity target and squared error of the latents of a pack, eager and compiled: would
    a kernel be faster?"""
    compiled = torch.compile(_flow, dynamic=True)
    for count in (4096, 24_576) if GPU else (64, 1024, 24_576):
        clean, noise, predicted = (torch.randn(count, 64, device=DEVICE) for _ in range(3))
        predicted = predicted.to(DTYPE).requires_grad_()
        noised = torch.arange(count, device=DEVICE)
        timestep = torch.rand(count, device=DEVICE)
        given = (clean, noised, timestep, noise, predicted)
        for name, function in (("eager", _flow), ("torch.compile", compiled)):
            row: dict[str, Any] = {"name": "flow_matching", "rows": count, "backend": name}
            call = partial(_flow_gradient, function, given)
            try:
                row["both"] = milliseconds(call, DEVICE, options.repeats)
            except Exception as error:  # a compiler that fails is a result too
                row["error"] = one_line(error)
            _record(result, row)


def _flow_gradient(function: Callable, given: tuple[torch.Tensor, ...]) -> None:
    torch.autograd.grad(function(*given), given[-1])


def _flow(
    clean: torch.Tensor,
    noised: torch.Tensor,
    timestep: torch.Tensor,
    noise: torch.Tensor,
    predicted: torch.Tensor,
) -> torch.Tensor:
    batch: Any = SimpleNamespace(noised_X=noised, timestep_G=timestep, noise_XC=noise)
    latents, velocity = noise_latents(clean, batch)
    return flow_matching_loss(predicted, velocity).sum() + 0 * latents.sum()


def _random(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    values = [
        torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float32)
        for shape in shapes
    ]
    return [value.to(DTYPE) for value in values]


def _variants(function: Callable, kernel: str) -> list[tuple[str, Callable]]:
    """The reference eager and compiled, then the other backends that run here."""
    plain = partial(function, backend="reference")
    variants: list[tuple[str, Callable]] = [("eager", plain)]
    variants.append(("torch.compile", torch.compile(plain)))
    for backend in backend_names(kernel):
        if backend == "reference":
            continue
        reason = unavailable_reason(kernel, backend)
        if reason:
            print(f"  {backend}: not measured, {reason}")
        else:
            variants.append((backend, partial(function, backend=backend)))
    return variants


def _both_ways(
    forward: Callable, leaves: Sequence[torch.Tensor], upstream: Any, repeats: int
) -> dict[str, Any]:
    """{forward, both: quantiles in ms, peak_bytes}, or {error}."""

    def both() -> None:
        torch.autograd.grad(forward(), leaves, upstream)

    try:
        with torch.no_grad():
            forward_ms = milliseconds(forward, DEVICE, repeats)
        if not GPU:
            both_ms = milliseconds(both, DEVICE, repeats)
            return {"forward": forward_ms, "both": both_ms, "peak_bytes": None}
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both_ms = milliseconds(both, DEVICE, repeats)
        peak = torch.cuda.max_memory_allocated() - before - L2_BYTES
        return {"forward": forward_ms, "both": both_ms, "peak_bytes": peak}
    except Exception as error:  # a competitor that fails on a case is a result too
        return {"error": one_line(error)}


def _record(result: ResultFile, row: dict[str, Any]) -> None:
    parts = []
    for name, value in row.items():
        if isinstance(value, dict):
            parts.append(f"{name} {interval(value)}")
        elif isinstance(value, float):
            parts.append(f"{name} {value:.3g}")
        elif value is not None and name != "name":
            parts.append(f"{name} {value}")
    print("  " + ", ".join(parts), flush=True)
    result.add(row)


MEASURES = {
    "metaquery_regression": regression,
    "qk_norm_rope": norm_rope,
    "cross_entropy": cross_entropy,
    "flow_matching": flow_matching,
    "experts": experts,
}
