"""Why a backend cannot run on this machine: functions that return the reason, or None."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch


def needs_cuda(why: str) -> Callable[[], str | None]:
    return lambda: None if torch.cuda.is_available() else why


def needs_flash() -> str | None:
    if not torch.cuda.is_available():
        return "flash attention needs a CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major >= 8:
        return None
    return f"flash attention needs compute capability 8.0 or more, and this GPU has {major}.{minor}"


def needs_triton() -> str | None:
    if missing := missing_package("triton"):
        return missing
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "it needs a CUDA device, or TRITON_INTERPRET=1 to be interpreted on the CPU"


def needs_launch_table(folder: str) -> Callable[[], str | None]:
    """Of our own kernels, whose tile sizes are known for some architectures only. `folder`: of the
    kernel, with its launch.json."""

    def reason() -> str | None:
        if missing := needs_triton():
            return missing
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        table = json.loads(Path(__file__).with_name(folder).joinpath("launch.json").read_text())
        major, minor = torch.cuda.get_device_capability()
        if f"sm_{major}{minor}" in table:
            return None
        known = ", ".join(name for name in table if name.startswith("sm_"))
        return f"its launch table holds {known}, and this GPU is sm_{major}{minor}"

    return reason


def needs_liger() -> str | None:
    return missing_package("liger_kernel") or needs_triton()


def needs_liger_on_cuda() -> str | None:
    if reason := needs_liger():
        return reason
    return None if torch.cuda.is_available() else "it needs a CUDA device"


def missing_package(package: str) -> str | None:
    if importlib.util.find_spec(package) is not None:
        return None
    name = package.replace("_", "-")
    return f"the package {name} is not installed, which the extra uno_ds[cuda] brings"


def needs_grouped_mm() -> str | None:
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] in (9, 10):
        return None
    major, minor = torch.cuda.get_device_capability()
    return (
        "torch's grouped product runs on GPUs of compute capability 9.0 and 10.0, and this one has "
        f"{major}.{minor}"
    )


def needs_megablocks() -> str | None:
    for package in ("megablocks", "grouped_gemm"):
        if importlib.util.find_spec(package) is None:
            return (
                f"the package {package} is not installed; docs/fused_losses.md says which "
                "environment it needs"
            )
    return None if torch.cuda.is_available() else "it needs a CUDA device"
