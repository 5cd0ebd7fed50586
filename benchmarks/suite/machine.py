"""The clocks of this machine's processor and GPUs."""

import subprocess
from pathlib import Path
from typing import Any

# Our name of a value: nvidia-smi's name.
_QUERIES = {
    "name": "name",
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def gpu_state() -> list[dict[str, Any]]:
    """Clocks, power limit and driver of every GPU, by nvidia-smi; empty without one."""
    query = f"--query-gpu={','.join(_QUERIES.values())}"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = done.stdout.strip().splitlines()
    return [dict(zip(_QUERIES, map(_number, line.split(",")), strict=False)) for line in lines]


def cpu_mhz() -> float | None:
    """Mean clock of the cores, or None where the kernel does not report it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    clocks = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return sum(clocks) / len(clocks) if clocks else None


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text.strip()
