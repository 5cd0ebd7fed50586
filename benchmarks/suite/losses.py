"""What benchmarks/kernels.py measures beside attention: the fused losses and the small kernels around attention.

Rates count the products of the mathematics, not those that are repeated to save memory; a floor is the same products by the
vendor's library and nothing else. On a CPU the shapes are small, so that the plumbing is tested, and times mean nothing.

Shape suffixes: docs/notation.md.
"""

import dataclasses
import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.suite.attention import DIM, HEADS, KEY_HEADS, L2_BYTES, matmul_tflops, milliseconds
from uno_ds.kernels import launch
from uno_ds.kernels.backends import (
    backend_names,
    unavailable_reason,
)
from uno_ds.kernels.compiled import compile_kernel
from uno_ds.kernels.cross_entropy import linear_cross_entropy
from uno_ds.kernels.metaquery_regression import metaquery_regression
from uno_ds.kernels.qk_norm_rope import qk_norm_rope
from uno_ds.objectives.flow_matching import flow_matching_loss, noise_latents

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
HIDDEN, VOCABULARY = (3584, 152_064) if GPU else (64, 500)
EPS = 1e-6


def regression(repeats: int) -> dict[str, Any]:
    """Cosine loss at several numbers of metaqueries and widths, with a head that is frozen and one that trains."""
    ceiling, rows = matmul_tflops(DEVICE), []
    for count in (1024, 4096, 16384) if GPU else (96,):
        for features in (1152, 3584) if GPU else (24,):
            for trains in (False, True):
                x, w, z = _random((count, HIDDEN), (features, HIDDEN), (count, features))
                leaves = [x.requires_grad_(), *([w.requires_grad_()] if trains else [])]
                upstream = torch.full((count,), 1 / count, device=DEVICE)
                product, products = 2 * count * HIDDEN * features, 3 if trains else 2
                slope, plain, other = z.clone(), x.detach(), w.detach()

                def floor(
                    products: int = products,
                    x: torch.Tensor = plain,
                    w: torch.Tensor = other,
                    slope: torch.Tensor = slope,
                ) -> None:
                    for left, right in ((x, w.T), (slope, w), (slope.T, x))[:products]:
                        left @ right

                case = {
                    "rows": count,
                    "features": features,
                    "trains": trains,
                    "ceiling_tflops": ceiling,
                }
                floor_ms = milliseconds(floor, DEVICE, repeats)
                rows.append(
                    case
                    | {
                        "backend": f"floor: {products} products",
                        "both": floor_ms,
                        "tflops": products * product / floor_ms["50"] / 1e9,
                    }
                )
                _tell(rows[-1])
                for name, function in _variants(
                    metaquery_regression, backend_names("regression"), "regression"
                ):

                    def forward(
                        function: Callable = function,
                        x: torch.Tensor = x,
                        w: torch.Tensor = w,
                        z: torch.Tensor = z,
                    ) -> torch.Tensor:
                        return function(x, w, z, "cosine")

                    row = _both_ways(forward, leaves, upstream, repeats)
                    if "both" in row:
                        row |= {
                            "tflops": products * product / row["both"]["50"] / 1e9,
                            "share_of_floor": floor_ms["50"] / row["both"]["50"],
                        }
                    rows.append(case | {"backend": name} | row)
                    _tell(rows[-1])
    return {"kernel": "metaquery_regression", "hidden": HIDDEN, "dtype": str(DTYPE), "rows": rows}


def norm_rope(repeats: int) -> dict[str, Any]:
    """Both experts' rows of a pack of 32,768 tokens of BAGEL-7B. Bytes that have to move, against a measured copy."""
    lengths, heads, key_heads, dim = (
        ((8192, 24_576), HEADS, KEY_HEADS, DIM) if GPU else ((40, 60), 4, 2, 16)
    )
    tokens, each = sum(lengths), torch.finfo(DTYPE).bits // 8
    slabs = [
        _random(*((length, count, dim) for length in lengths))
        for count in (heads, key_heads, key_heads)
    ]
    weights = [_random((dim,), (dim,)) for _ in range(2)]
    cos, sin = _random((tokens, dim // 2), (tokens, dim // 2))
    leaves = [x.requires_grad_() for slab in slabs for x in slab] + [
        given[1].requires_grad_() for given in weights
    ]
    upstream = _random(*((tokens, count, dim) for count in (heads, key_heads, key_heads)))
    values, angles = tokens * (heads + 2 * key_heads) * dim * each, tokens * dim * each
    moved = {
        "forward": 2 * values + angles,
        "backward": 2 * values + tokens * (heads + key_heads) * dim * each + angles,
    }
    source = torch.empty(2**29 if GPU else 2**20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = (
        2 * source.nbytes / milliseconds(lambda: target.copy_(source), DEVICE, repeats)["50"] / 1e6
    )
    rows = [{"backend": "copy", "gigabytes_per_second": copy}]
    _tell(rows[-1])
    for name, function in _variants(qk_norm_rope, backend_names("norm_rope"), "norm_rope"):

        def forward(function: Callable = function) -> tuple[torch.Tensor, ...]:
            return function(*slabs, *weights, cos, sin, EPS, None)

        row = _both_ways(forward, leaves, upstream, repeats)
        if "both" in row:
            backward_ms = row["both"]["50"] - row["forward"]["50"]
            for part, passed in (("forward", row["forward"]["50"]), ("backward", backward_ms)):
                row |= {
                    f"{part}_gigabytes_per_second": moved[part] / passed / 1e6,
                    f"{part}_share_of_copy": moved[part] / passed / 1e6 / copy,
                }
        rows.append({"backend": name} | row)
        _tell(rows[-1])
    return {
        "kernel": "qk_norm_rope",
        "tokens": tokens,
        "heads": [heads, key_heads, dim],
        "dtype": str(DTYPE),
        "bytes": moved,
        "rows": rows,
    }


def cross_entropy(repeats: int) -> dict[str, Any]:
    """The language head over the captions of a pack (19 of 200 tokens), frozen."""
    count, rows = 3800 if GPU else 60, []
    x, w = _random((count, HIDDEN), (VOCABULARY, HIDDEN))
    labels = torch.randint(VOCABULARY, (count,), device=DEVICE)
    upstream = torch.full((count,), 1 / count, device=DEVICE)
    for backend in backend_names("cross_entropy"):
        row: dict[str, Any] = {"backend": backend}
        if reason := unavailable_reason("cross_entropy", backend):
            row["skipped"] = reason
        else:
            row |= _both_ways(
                lambda backend=backend: linear_cross_entropy(x, w, labels, backend),
                [x.requires_grad_()],
                upstream,
                repeats,
            )
        if "both" in row:
            row["tflops"] = 4 * count * HIDDEN * VOCABULARY / row["both"]["50"] / 1e9
        rows.append(row)
        _tell(row)
    return {
        "kernel": "cross_entropy",
        "rows_with_a_label": count,
        "vocabulary": VOCABULARY,
        "rows": rows,
    }


def flow_matching(repeats: int) -> dict[str, Any]:
    """Noise, velocity target and squared error of the latents of a pack, eager and compiled: is a kernel of its own worth it?"""
    rows = []
    for count in (4096, 24_576) if GPU else (64, 1024, 24_576):
        clean, noise, predicted = (torch.randn(count, 64, device=DEVICE) for _ in range(3))
        batch = SimpleNamespace(
            noised_X=torch.arange(count, device=DEVICE),
            timestep_G=torch.rand(count, device=DEVICE),
            noise_XC=noise,
        )
        predicted = predicted.to(DTYPE).requires_grad_()

        def both(
            function: Callable,
            clean: torch.Tensor = clean,
            batch: Any = batch,
            predicted: torch.Tensor = predicted,
        ) -> None:
            torch.autograd.grad(
                function(clean, batch.noised_X, batch.timestep_G, batch.noise_XC, predicted),
                predicted,
            )

        for name, function in (
            ("eager", _flow),
            ("torch.compile", torch.compile(_flow, dynamic=True)),
        ):
            row: dict[str, Any] = {"rows": count, "backend": name}
            try:
                row["both"] = milliseconds(
                    lambda function=function: both(function), DEVICE, repeats
                )
            except Exception as error:  # a compiler that fails is a result, not the end
                row["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            rows.append(row)
            _tell(row)
    return {"kernel": "flow_matching", "rows": rows}


def _flow(
    clean: torch.Tensor,
    noised: torch.Tensor,
    timestep: torch.Tensor,
    noise: torch.Tensor,
    predicted: torch.Tensor,
) -> torch.Tensor:
    latents, velocity = noise_latents(
        clean, SimpleNamespace(noised_X=noised, timestep_G=timestep, noise_XC=noise)
    )
    return flow_matching_loss(predicted, velocity).sum() + 0 * latents.sum()


def _random(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    return [
        torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float32).to(DTYPE)
        for shape in shapes
    ]


def _variants(
    function: Callable, backends: tuple[str, ...], kernel: str
) -> list[tuple[str, Callable]]:
    """The reference eager and compiled, then the other backends that run here."""

    def plain(*arguments: Any) -> Any:
        return function(*arguments, backend="reference")

    variants = [("eager", plain), ("torch.compile", torch.compile(plain))]
    for backend in backends:
        if backend != "reference" and (reason := unavailable_reason(kernel, backend)):
            print(f"  {backend}: not measured, {reason}")
        elif backend != "reference":
            variants.append(
                (backend, lambda *arguments, backend=backend: function(*arguments, backend=backend))
            )
    return variants


def _both_ways(
    forward: Callable, leaves: list[torch.Tensor], upstream: Any, repeats: int
) -> dict[str, Any]:
    """{forward, both: quantiles in ms, peak_bytes}."""

    def both() -> None:
        torch.autograd.grad(forward(), leaves, upstream)

    try:
        with torch.no_grad():
            result: dict[str, Any] = {"forward": milliseconds(forward, DEVICE, repeats)}
        if GPU:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        result["both"] = milliseconds(both, DEVICE, repeats)
        return result | {
            "peak_bytes": torch.cuda.max_memory_allocated() - before - L2_BYTES if GPU else None
        }
    except Exception as error:  # a competitor that fails on a case is a result, not the end
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def _tell(row: dict[str, Any]) -> None:
    told = []
    for name, value in row.items():
        if isinstance(value, dict):
            told.append(f"{name} {value['50']:.3f} ms ({value['20']:.3f} to {value['80']:.3f})")
        elif value is not None:
            told.append(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}")
    print("  " + ", ".join(told), flush=True)


MEASURES = {
    "metaquery_regression": regression,
    "qk_norm_rope": norm_rope,
    "cross_entropy": cross_entropy,
    "flow_matching": flow_matching,
}
COMPILED = ("metaquery_regression", "qk_norm_rope")


def compile_report_of(kernel: str, capability: int) -> dict[str, Any]:
    """Registers, shared memory and instructions of the kernels of `metaquery_regression` or `qk_norm_rope`; needs no GPU."""
    if launch.INTERPRETED:
        raise SystemExit("error: TRITON_INTERPRET=1 compiles nothing; unset it.")
    rows = []
    for title, case in importlib.import_module(
        f"uno_ds.kernels.{kernel}.compile_cases"
    ).compile_cases(f"sm_{capability}"):
        result = compile_kernel(capability=capability, **case)
        rows.append(
            {"kernel": title, **dataclasses.asdict(result), "feasible": result.feasible(capability)}
        )
        counts = {name: count for name, count in result.instructions.items() if count}
        print(
            f"{title:<42} {result.registers:>4} registers {result.stack:>4} stack {result.shared:>7} shared  {counts}",
            flush=True,
        )
    return {
        "kernel": f"compile report of {kernel}",
        "architecture": f"sm_{capability}",
        "rows": rows,
    }
