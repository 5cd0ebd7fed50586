"""Files of tensors: those of the safetensors library, read without holding them in memory."""

from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from uno_ds.model.tensor_file import TensorFile, write_tensors


def test_reading_tensor_by_tensor_does_not_add_up_in_memory(tmp_path: Path):
    size, count, path = 8 << 20, 24, tmp_path / "large.safetensors"
    specs = {str(number): (torch.bfloat16, (size // 2,)) for number in range(count)}
    write_tensors(
        path,
        specs,
        (torch.full((size // 2,), number, dtype=torch.bfloat16) for number in range(count)),
        {},
    )
    file, before, most = TensorFile(path), psutil.Process().memory_info().rss, 0
    for number in range(count):
        assert file.read(str(number))[-1] == number
        assert file.read_flat(str(number), 1000, 3).tolist() == [number] * 3
        most = max(most, psutil.Process().memory_info().rss - before)
    assert most < 6 * size, f"{most >> 20} MB for tensors of {size >> 20} MB"


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.float8_e4m3fn,
    ],
)
def test_files_are_those_of_the_safetensors_library_both_ways(tmp_path: Path, dtype: torch.dtype):
    tensors = {
        "scalar": torch.ones(()).to(dtype),
        "empty": torch.ones(0, 3).to(dtype),
        "matrix": (torch.arange(6).view(2, 3) % 2).to(dtype),
    }
    write_tensors(
        tmp_path / "ours",
        {name: (dtype, tensor.shape) for name, tensor in tensors.items()},
        tensors.values(),
        {"format": "pt"},
    )
    save_file(tensors, tmp_path / "theirs")
    theirs, ours = load_file(tmp_path / "ours"), TensorFile(tmp_path / "theirs")
    for name, tensor in tensors.items():
        for read in (theirs[name], ours.read(name)):
            assert (
                read.shape == tensor.shape
                and read.dtype == dtype
                and torch.equal(read.double(), tensor.double())
            )
