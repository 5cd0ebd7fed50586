"""One thread: the models of the tests are so small that several threads on few cores cost ten times
their work."""

import os
import runpy
from pathlib import Path

import pytest

# Threads that spin while they wait take the cores from other tests. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402  the policy is set first

# UNO_DS_TEST_TURN_FP16=1 runs the tests as on a processor with the other answer about fp16, in this
# process and in all that it starts: DeepSpeed chooses by that answer, and each machine has only one
# of the two.
TURNED_FP16 = Path(__file__).parent / "turned_fp16"
_search_path = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
if os.environ.get("UNO_DS_TEST_TURN_FP16") == "1" and str(TURNED_FP16) not in _search_path:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TURNED_FP16), *_search_path])
    runpy.run_path(str(TURNED_FP16 / "sitecustomize.py"))

torch.set_num_threads(1)
# Triton decides when a kernel is defined whether it is compiled or interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(
                pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
            )
