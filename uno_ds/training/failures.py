"""Failures of memory, devices and connections: which kind an exception is, and its exit code."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist


class Kind(enum.IntEnum):
    """The value is the exit code."""

    OUT_OF_MEMORY = 4
    CONNECTION_LOST = 76
    DEVICE_LOST = 77
    KERNEL_FAILED = 78


# A cause comes before its consequences: several can be in one chain of exceptions.
CAUSES_FIRST = (Kind.OUT_OF_MEMORY, Kind.DEVICE_LOST, Kind.KERNEL_FAILED, Kind.CONNECTION_LOST)
WHAT = {
    Kind.OUT_OF_MEMORY: "out of memory",
    Kind.CONNECTION_LOST: "no connection to another rank",
    Kind.DEVICE_LOST: "its GPU or driver failed",
    Kind.KERNEL_FAILED: "a kernel failed on its GPU",
}
TO_DO = {
    Kind.OUT_OF_MEMORY: "Change the recipe, then continue with --resume auto",
    Kind.CONNECTION_LOST: "That rank's own log says why it ended, or its host or network is down; "
    "continue with --resume auto, without that host if it happens again",
    Kind.DEVICE_LOST: "Continue with --resume auto, without this host",
    Kind.KERNEL_FAILED: "Continue with --resume auto; on the same host again, leave that host out; "
    "on another one, CUDA_LAUNCH_BLOCKING=1 names the kernel",
}

# Parts of messages of the CUDA runtime, its libraries, NCCL and gloo.
_NO_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "Cuda failure 'out of memory'",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)
_DEVICE_LOST = (
    "uncorrectable ECC",
    "uncorrectable NVLink",
    "GPU is lost",
    "fallen off the bus",
    "no CUDA-capable device",
    "No CUDA GPUs are available",
    "all CUDA-capable devices are busy or unavailable",
    "CUDA-capable device(s) is/are busy or unavailable",
    "CUDA driver version is insufficient",
    "CUDA driver initialization failed",
    "CUDA unknown error",
    "CUDA error: unknown error",
    "CUDA error: initialization error",
    "CUDA error: system not yet initialized",
    "CUDA error: hardware stack error",
)
_KERNEL_FAILED = (
    "an illegal memory access",
    "misaligned address",
    "an illegal instruction",
    "invalid program counter",
    "unspecified launch failure",
    "the launch timed out and was terminated",
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "CUDNN_STATUS_EXECUTION_FAILED",
)
_CONNECTION_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Socket Timeout",
    "Timed out waiting",
    "Timed out after",
    "client socket has timed out",
    "NCCL error",
    "NCCL communicator was aborted",
    "remote process exited",
    "ncclRemoteError",
    "ncclSystemError",
)


_PARTS = {
    Kind.OUT_OF_MEMORY: _NO_MEMORY,
    Kind.DEVICE_LOST: _DEVICE_LOST,
    Kind.KERNEL_FAILED: _KERNEL_FAILED,
    Kind.CONNECTION_LOST: _CONNECTION_LOST,
}


class DeviceLost(RuntimeError):
    """A rank has no GPU, and others have."""


@dataclass(frozen=True)
class Failure:
    """reason: of the exception that is its cause, the first line, and the one by which it was
    recognised."""

    kind: Kind
    reason: str


def failure_of(error: BaseException) -> Failure | None:
    """None for an error of no known kind. Errors that were raised while this one's cause was
    handled count, as the loss of a connection after a rank ran out of memory."""
    found: list[Failure] = []
    for each in _chain(error):
        kind = _kind_of(each)
        if kind is not None:
            found.append(Failure(kind, _reason(each, kind)))
    return min(found, key=lambda failure: CAUSES_FIRST.index(failure.kind), default=None)


def _kind_of(error: BaseException) -> Kind | None:
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return Kind.OUT_OF_MEMORY
    if isinstance(error, DeviceLost):
        return Kind.DEVICE_LOST
    if not isinstance(error, RuntimeError):
        return None
    for kind in CAUSES_FIRST:
        if any(part in text for part in _PARTS[kind]):
            return kind
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return Kind.CONNECTION_LOST
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        left += [each.__cause__, None if each.__suppress_context__ else each.__context__]


def _has_part_of(line: str, kind: Kind) -> bool:
    return any(part in line for part in _PARTS[kind])


def _reason(error: BaseException, kind: Kind) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    known = [line for line in lines if _has_part_of(line, kind)]
    return lines[0] if not known or lines[0] in known else f"{lines[0]}; {known[0]}"
