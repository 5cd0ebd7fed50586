"""`doctor.py`: what runs here, as text, as JSON and as an exit code."""

import importlib.util
import json

import pytest
import torch

from uno_ds.commands import doctor, json_output
from uno_ds.kernels.backends import KERNELS
from uno_ds.kernels.self_check import Finding
from uno_ds.training import check_processes, gpu_machine


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_a_cpu_machine_is_told_what_will_run(no_gpu, capsys):
    assert doctor.main(["--recipe", "tiny"]) == 0
    out = capsys.readouterr().out
    assert "gpu        none: training runs on the processor" in out
    assert "attention      sdpa       yes (this recipe)" in out
    assert "attention      flash      no: flash attention needs a CUDA device" in out
    assert "tiny can run here with attention sdpa, regression reference" in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("kernels.attention=flex", "kernels.attention: 'flex' cannot run here"),
        ("kernels.norm_rope=triton", "kernels.norm_rope: 'triton' cannot run here"),
    ],
)
def test_a_recipe_that_cannot_run_here_is_exit_code_1_and_a_sentence(no_gpu, change, words, capsys):
    assert doctor.main(["--recipe", "tiny", "--set", change]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if "problem" in line]
    assert len(problems) == 1 and words in problems[0]


@pytest.mark.parametrize("arguments", [["--recipe", "nope"], ["--what"], ["--set", "steps=x"]])
def test_a_mistake_is_exit_code_2_and_one_line(no_gpu, arguments, capsys):
    assert doctor.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_missing_package_is_a_problem_that_names_it(no_gpu, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find(name)
    )
    assert doctor.main(["--recipe", "tiny"]) == 1
    assert "problem: the package pyarrow is not installed" in capsys.readouterr().out


def as_json(capsys, monkeypatch, *arguments: str) -> tuple[int, dict]:
    monkeypatch.setattr(json_output, "_saved_stdout", None)
    code = doctor.main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_json_holds_all_of_it(no_gpu, monkeypatch, capsys):
    code, found = as_json(capsys, monkeypatch, "--recipe", "tiny")
    assert code == 0 and set(found["backends"]) == set(KERNELS)
    assert found["chosen"]["attention"] == "sdpa" and found["problems"] == []
    assert found["machine"]["hardware"]["gpus"] == [] and found["machine"]["versions"]["torch"]


def test_on_a_gpu_the_check_decides_what_auto_is_and_whether_it_can_run(monkeypatch, capsys):
    """The device and what is found on it are faked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setattr(gpu_machine, "driver_version", lambda: "580.1")

    def check(kernels, shapes, pack, device):
        assert shapes.heads == 28 and shapes.precision == "bf16" and device.type == "cuda"
        found = {
            kernel: [Finding(name, None, 0.1, 0.2, 3.0, 4.0, None, 5.0) for name in ("reference",)]
            for kernel in kernels
        }
        found["attention"] = [
            Finding("flash", "is wrong: the output is off by nan", float("nan"), 0.1),
            Finding("triton", None, 0.01, 0.1, 4.0, 9.0, 350.0, 120.0),
            Finding("sdpa", None, 0.01, 0.1, 14.0, 29.0, 90.0, 900.0),
        ]
        return found

    monkeypatch.setattr(check_processes, "check", check)
    code, found = as_json(capsys, monkeypatch)
    assert code == 0 and found["chosen"]["attention"] == "triton"
    assert found["findings"]["attention"][0]["error"] is None
    # A backend that the recipe names and that is wrong here cannot run.
    assert doctor.main(["--set", "kernels.attention=flash"]) == 1
    out = capsys.readouterr().out
    assert "problem: kernels.attention: 'flash' is wrong: the output is off by nan" in out
    assert "triton     1.0e-02/1.0e-01   4.00 ms   9.00 ms    350.0      120" in out
