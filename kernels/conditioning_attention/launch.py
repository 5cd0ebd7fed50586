"""Launch parameters of the kernels (tile sizes, warps, pipeline stages by architecture, precision
and head dim) and the types of their arguments.

The launch table is a file, written by `benchmarks/commands/launch_table.py`: nothing is tuned while
a model trains."""

import functools
import json
from pathlib import Path
from typing import Any

import torch

from uno_ds.kernels.conditioning_attention.backward import (
    attention_backward_keys,
    attention_backward_queries,
)
from uno_ds.kernels.conditioning_attention.forward import attention_forward
from uno_ds.kernels.launch import architecture

TABLE = Path(__file__).with_name("launch.json")
KERNELS = {
    "forward": attention_forward,
    "forward_ahead": attention_forward,
    "backward_keys": attention_backward_keys,
    "backward_queries": attention_backward_queries,
}
# What a kernel can do in another way.
OPTIONS = {
    "forward": "AHEAD",
    "forward_ahead": "AHEAD",
    "backward_keys": "REDUCE",
    "backward_queries": "TILE",
}
# The second choice of `forward`, with AHEAD, of the backend triton_ahead: in the table where one
# fits.
OPTIONAL = ("forward_ahead",)
PRECISIONS = {torch.bfloat16: "half", torch.float16: "half", torch.float32: "single"}


@functools.cache
def table() -> dict:
    return json.loads(TABLE.read_text())


def parameters(device: torch.device, dtype: torch.dtype, dim: int, kernel: str) -> dict[str, Any]:
    """BLOCK_M, BLOCK_N, STAGES, DESCRIPTORS, warps and what OPTIONS names of `kernel`. Raises
    ValueError for an architecture, and for one of OPTIONAL, that the table does not hold."""
    name = architecture(device)
    if name not in table():
        known = ", ".join(known for known in table() if known != "interpreter")
        raise ValueError(
            f"The launch table of the triton attention holds {known} but not {name}; add it with "
            "python -m benchmarks launch_table."
        )
    head_dim = "any" if name == "interpreter" else str(dim)
    rows = table()[name][PRECISIONS[dtype]][head_dim]
    if kernel not in rows:
        raise ValueError(
            f"The launch table of the triton attention has no {kernel} for {name}, heads of {dim} "
            f"values in {dtype}."
        )
    return with_defaults(kernel, rows[kernel])


def with_defaults(kernel: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """A row of the table with what it may leave out where it is false."""
    return {OPTIONS[kernel]: False} | chosen


def signature(kernel: str, dtype: str, dim: int, chosen: dict[str, Any]) -> dict[str, str]:
    """Triton's types of the arguments of `kernel` for elements of `dtype` ("bf16", "fp16",
    "fp32")."""
    types = {name: f"*{dtype}" for name in ("q", "k", "v", "out", "grad", "dk", "dv")}
    types |= {
        "lse": "*fp32",
        "minus_lse": "*fp32",
        "minus_delta": "*fp32",
        "dq": "*fp32",
        "tiles": "*i32",
        "ranges": "*i32",
        "of_run": "*i32",
        "scale": "fp32",
        "rows": "i32",
        "padded": "i32",
    }
    block = chosen["BLOCK_M" if kernel == "backward_keys" else "BLOCK_N"]
    blocks = f"tensordesc<{dtype}[{block}, {dim}]>" if chosen["DESCRIPTORS"] else f"*{dtype}"
    types |= {f"{name}_blocks": blocks for name in ("q", "k", "v", "grad")}
    if chosen.get("TILE"):
        tile = f"tensordesc<{dtype}[{chosen['BLOCK_M']}, {dim}]>"
        types |= {"q": tile, "grad": tile}
    reduced = f"tensordesc<fp32[{block}, {dim}]>" if chosen.get("REDUCE") else "*fp32"
    return types | {"dq_blocks": reduced}
