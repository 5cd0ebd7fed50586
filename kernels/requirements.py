"""Why a library's grouped product cannot run on this machine."""

import importlib.util

import torch


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
