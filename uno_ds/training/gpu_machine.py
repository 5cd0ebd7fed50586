"""What a choice of backends depends on: the GPU, its driver, and the versions of all that computes
on it."""

import functools
import hashlib
import importlib.metadata
import re
import subprocess
from pathlib import Path

import torch

import uno_ds
from uno_ds import kernels

DRIVER_FILE = Path("/proc/driver/nvidia/version")


def gpu_machine(device: torch.device) -> dict[str, str] | None:
    """None on a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": str(properties.total_memory),
        "driver": driver_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "flash_attn": _version("flash_attn"),
        "flash_attn_3": _version("flash_attn_3"),
        "flash_attn_4": _version("flash_attn_4"),
        "liger_kernel": _version("liger_kernel"),
        "uno_ds": uno_ds.__version__,
        "sources": sources_digest(),
    }


def driver_version() -> str:
    """Of the NVIDIA driver, "unknown" where it cannot be read."""
    try:
        found = re.search(r"Kernel Module(?: for \S+)?\s+([\d.]+)", DRIVER_FILE.read_text())
        if found:
            return found[1]
    except OSError:
        pass
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    lines = done.stdout.split()
    return lines[0] if lines else "unknown"


@functools.cache
def sources_digest() -> str:
    """Of the kernels' own files: what was found about other ones does not count."""
    folder = Path(next(iter(kernels.__path__)))
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("launch.json")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
