"""What a rank's memory held when it ran out."""

import gc
import json
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch

from uno_ds.files_on_disk import replace_text

# Kinds of tensors that a snapshot of main memory lists.
MOST_TENSORS = 200


def record_allocations(device: torch.device, number: int) -> None:
    """From now on the allocator of a GPU keeps the stacks of so many allocations; 0: of none."""
    if device.type == "cuda" and number:
        torch.cuda.memory._record_memory_history(max_entries=number, stacks="python")


def write_snapshot(device: torch.device, folder: Path, rank: int) -> Path:
    """Writes FOLDER/memory_rankR.pickle on a GPU, in the format that torch's memory viewer opens;
    on a CPU memory_rankR.json with the process's memory and its tensors. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    if device.type == "cuda":
        path = folder / f"memory_rank{rank}.pickle"
        torch.cuda.memory._dump_snapshot(str(path))
        return path
    path = folder / f"memory_rank{rank}.json"
    replace_text(path, json.dumps(_main_memory(), indent=1) + "\n")
    return path


def _main_memory() -> dict[str, Any]:
    machine, process = psutil.virtual_memory(), psutil.Process().memory_info()
    counts: Counter[tuple[str, tuple[int, ...]]] = Counter()
    sizes: Counter[tuple[str, tuple[int, ...]]] = Counter()
    seen = set()
    for tensor in gc.get_objects():
        # Others, such as those of a counter of FLOP, have no memory of their own.
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type != "cpu":
            continue
        storage = tensor.untyped_storage()
        if not storage.nbytes() or storage.data_ptr() in seen:
            continue
        seen.add(storage.data_ptr())
        kind = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        counts[kind] += 1
        sizes[kind] += storage.nbytes()
    return {
        "machine_bytes": machine.total,
        "available_bytes": machine.available,
        "process_bytes": process.rss,
        "tensor_bytes": sizes.total(),
        "tensors": [
            {"dtype": dtype, "shape": list(shape), "count": counts[dtype, shape], "bytes": size}
            for (dtype, shape), size in sizes.most_common(MOST_TENSORS)
        ],
    }


def memory_of(device: torch.device) -> int:
    """Bytes of the device's whole memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
