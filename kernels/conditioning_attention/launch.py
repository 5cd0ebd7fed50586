"""The launch table: tile sizes, warps and pipeline stages of each kernel by architecture, precision and head dim.

The table is a file, written by `benchmarks/launch_table.py` and read here: nothing is tuned while a model trains.
"""
import functools
import json
from pathlib import Path

import torch
import triton

TABLE = Path(__file__).with_name("launch.json")
HEAD_DIMS = (16, 32, 64, 128)
INTERPRETED = triton.knobs.runtime.interpret


@functools.cache
def table() -> dict:
    return json.loads(TABLE.read_text())


@functools.cache
def parameters(device: torch.device, dtype: torch.dtype, dim: int, kernel: str) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, STAGES and warps of `kernel`. Raises ValueError for an architecture that the table does not hold."""
    architecture = "interpreter" if INTERPRETED else "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    if architecture not in table():
        known = ", ".join(name for name in table() if name != "interpreter")
        raise ValueError(f"The launch table of the triton attention holds {known} but not {architecture}; add it with benchmarks/launch_table.py.")
    of_dtype = table()[architecture]["single" if dtype == torch.float32 else "half"]
    return of_dtype["any" if "any" in of_dtype else str(dim)][kernel]
