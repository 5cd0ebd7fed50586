"""A rank whose memory, device or connection fails says so in one line and ends with the code of its
kind; an error of no known kind keeps its traceback."""

import json
import signal
import socket
from typing import Any

import pytest
from ranks import ForkedRun, ForkServer
from runs import Place

from uno_ds.training.failures import Kind

MEMORY = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.1 GiB"
ILLEGAL = "CUDA error: an illegal memory access was encountered\nFor debugging consider passing"
ECC = "CUDA error: uncorrectable ECC error encountered\nFor debugging consider passing"
LOST = "NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error"
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Place:
    return Place(tmp_path_factory.mktemp("failed"), server)


def failed(place: Place, name: str, **fault: Any) -> ForkedRun:
    """A run on which rank 1 fails in step 3."""
    run = place.start(
        name,
        *("--exit-file", str(place.folder / f"{name}.exit")),
        fault={"rank": 1, "step": 3, **fault},
        checkpoint={"every": 0},
    )
    run.wait()
    return run


def last_line(run: ForkedRun, rank: int) -> str:
    return run.logs[rank].read_text().splitlines()[-1]


def test_out_of_memory_on_one_rank_is_named_with_a_snapshot_and_what_to_change(place: Place):
    run = failed(place, "memory", kind="raise", error="OutOfMemoryError", message=MEMORY)
    assert run.codes[1] == Kind.OUT_OF_MEMORY == 4, run.output()
    line, folder = last_line(run, 1), place.of("memory")
    assert line.startswith(f"error: host {HOST}: rank 1: out of memory in step 3: {MEMORY}. ")
    assert "it needs less with --set model.recompute=true (" in line
    # Its memory is the host's already.
    assert "offload" not in line
    assert f"What memory held: {folder / 'memory_rank1.json'}." in line
    assert line.endswith(f"Exit code 4. Traceback: {folder / 'failure_rank1.txt'}.")
    assert "Traceback (most recent" not in run.logs[1].read_text()
    assert "in train_step" in (folder / "failure_rank1.txt").read_text()
    snapshot = json.loads((folder / "memory_rank1.json").read_text())
    assert 0 < snapshot["tensor_bytes"] < snapshot["process_bytes"] < snapshot["machine_bytes"]
    assert snapshot["tensors"][0]["bytes"] >= snapshot["tensors"][-1]["bytes"] > 0
    exit_line = (place.folder / "memory.exit").read_text()
    assert exit_line.startswith(f"4 host {HOST}: rank 1: out of memory")


@pytest.mark.parametrize(
    ("error", "message", "kind"),
    [
        ("AcceleratorError", ECC, Kind.DEVICE_LOST),
        pytest.param("RuntimeError", ILLEGAL, Kind.KERNEL_FAILED, marks=pytest.mark.slow),
        pytest.param("DistBackendError", LOST, Kind.CONNECTION_LOST, marks=pytest.mark.slow),
    ],
)
def test_a_failed_device_or_connection_ends_the_rank_with_its_code(
    place: Place, error: str, message: str, kind: Kind
):
    name = kind.name.lower()
    run = failed(place, name, kind="raise", error=error, message=message)
    assert run.codes[1] == kind, run.output()
    line = last_line(run, 1)
    assert line.startswith(f"error: host {HOST}: rank 1: ") and "in step 3" in line
    assert message.splitlines()[0] in line and f"Exit code {int(kind)}." in line
    assert (place.folder / f"{name}.exit").read_text().startswith(f"{int(kind)} host {HOST}: ")


def test_the_ranks_that_a_dead_one_leaves_say_so(place: Place):
    run = failed(place, "killed", kind="forward")
    assert run.codes == [Kind.CONNECTION_LOST, -signal.SIGKILL], run.output()
    line = last_line(run, 0)
    assert line.startswith(f"error: host {HOST}: rank 0: no connection to another rank in step 3:")
    assert (place.folder / "killed.exit").read_text().startswith("76 host ")


def test_an_unknown_error_keeps_its_traceback(place: Place):
    run = failed(place, "unknown", kind="raise", error="KeyError", message="a mistake of ours")
    log = run.logs[1].read_text()
    assert run.codes[1] == 1 and "Traceback (most recent call last)" in log
    assert "KeyError: 'a mistake of ours'" in log
    assert not (place.of("unknown") / "failure_rank1.txt").exists()
    # The other rank may have noticed before it was ended.
    exit_file = place.folder / "unknown.exit"
    assert not exit_file.exists() or exit_file.read_text().startswith("76 ")
