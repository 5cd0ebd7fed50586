"""One thread: the models of the tests are so small that several threads on few cores cost ten times their work."""

import os

import pytest
import torch

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
