"""Errors of memory, devices and connections are known by their real classes and messages."""

import pytest
import torch
import torch.distributed as dist

from uno_ds.settings import SettingsError
from uno_ds.training.failures import DeviceLost, Kind, failure_of

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] "
NCCL = (
    "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3384, unhandled cuda "
    "error (run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9\nncclUnhandledCudaError: "
    "Call to CUDA function failed.\nLast error:\nCuda failure "
)
HINT = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
    "stacktrace below might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "OUT_OF_MEMORY"),
        (MemoryError(), "OUT_OF_MEMORY"),
        (RuntimeError("CUDA error: out of memory" + HINT), "OUT_OF_MEMORY"),
        (dist.DistBackendError(NCCL + "'out of memory'"), "OUT_OF_MEMORY"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered" + HINT), "DEVICE_LOST"),
        (dist.DistBackendError(NCCL + "'uncorrectable ECC error encountered'"), "DEVICE_LOST"),
        (RuntimeError("No CUDA GPUs are available"), "DEVICE_LOST"),
        (DeviceLost("torch finds no GPU on this host"), "DEVICE_LOST"),
        (
            RuntimeError("CUDA error: an illegal memory access was encountered" + HINT),
            "KERNEL_FAILED",
        ),
        (RuntimeError("CUDA error: unspecified launch failure" + HINT), "KERNEL_FAILED"),
        (
            dist.DistBackendError(
                "NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network "
                "error, NCCL version 2.28.9\nncclRemoteError: A call failed possibly due to a "
                "network error or a remote process exiting prematurely."
            ),
            "CONNECTION_LOST",
        ),
        (RuntimeError(GLOO + "Connection closed by peer [10.0.0.2]:48911"), "CONNECTION_LOST"),
        (
            RuntimeError(GLOO + "Timed out waiting 1800000ms for recv operation to complete"),
            "CONNECTION_LOST",
        ),
        (
            dist.DistNetworkError(
                "The client socket has timed out after 60000ms while trying to connect to "
                "(10.0.0.1, 29500)."
            ),
            "CONNECTION_LOST",
        ),
        (
            dist.DistStoreError("Timed out after 1801 seconds waiting for clients. 1/2 joined."),
            "CONNECTION_LOST",
        ),
    ],
)
def test_an_error_of_a_known_kind_is_recognised(error: BaseException, kind: str):
    failure = failure_of(error)
    assert failure is not None and failure.kind == Kind[kind]
    assert failure.reason and "\n" not in failure.reason


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        RuntimeError("CUDA error: device-side assert triggered" + HINT),
        KeyError("CUDA out of memory"),
        ConnectionResetError("Connection reset by peer"),
        FileNotFoundError("Timed out waiting"),
    ],
)
def test_another_error_is_not(error: BaseException):
    assert failure_of(error) is None


def test_the_reason_has_the_line_by_which_an_error_was_recognised():
    failure = failure_of(dist.DistBackendError(NCCL + "'uncorrectable ECC error encountered'"))
    assert failure is not None and failure.reason == (
        f"{NCCL.splitlines()[0]}; Cuda failure 'uncorrectable ECC error encountered'"
    )


def chained(first: Exception, second: Exception, suppress: bool = False) -> Exception:
    try:
        try:
            raise first
        except Exception:
            if suppress:
                raise second from None
            raise second  # noqa: B904  the context is what is tested
    except Exception as error:
        return error


def test_the_cause_counts_and_not_what_followed_from_it():
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    lost = RuntimeError(GLOO + "Connection closed by peer [10.0.0.2]:48911")
    found = [failure_of(chained(*pair)) for pair in ((memory, lost), (lost, memory))]
    assert [failure.kind for failure in found if failure] == [Kind.OUT_OF_MEMORY] * 2
    assert failure_of(chained(lost, SettingsError("key", "wrong."), suppress=True)) is None


def test_an_allocation_that_this_machine_refuses_is_out_of_memory():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    failure = failure_of(raised.value)
    assert failure is not None and failure.kind is Kind.OUT_OF_MEMORY
