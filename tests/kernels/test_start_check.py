"""What cannot run is refused before a run starts, and `auto` on a GPU without a check."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from uno_ds.kernels.selection import Demands, KernelSettings
from uno_ds.settings import SettingsError

KERNELS = Path(__file__).parents[2] / "kernels"
BAGEL = Demands("bf16", 128, (72,))
FOLDERS = {
    "attention": "conditioning_attention",
    "regression": "metaquery_regression",
    "norm_rope": "qk_norm_rope",
}


@pytest.fixture
def gpu(monkeypatch):
    """A faked GPU; call it with a compute capability."""

    def fake(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    return fake


@pytest.mark.parametrize("kernel", FOLDERS)
def test_triton_on_an_architecture_without_a_launch_table_is_refused_at_the_start(kernel, gpu):
    gpu((7, 5))
    with pytest.raises(SettingsError) as caught:
        KernelSettings(**{kernel: "triton"}).resolved(BAGEL)
    text = str(caught.value)
    assert text.startswith(f"kernels.{kernel}: 'triton' cannot run here: its launch table holds")
    assert text.endswith("and this GPU is sm_75.") and "sm_90" in text and "\n" not in text


@pytest.mark.parametrize("kernel", FOLDERS)
def test_triton_runs_on_every_architecture_of_the_table(kernel, gpu):
    table = json.loads((KERNELS / FOLDERS[kernel] / "launch.json").read_text())
    for name in table:
        if name.startswith("sm_"):
            number = name.removeprefix("sm_")
            gpu((int(number[:-1]), int(number[-1])))
            resolved = KernelSettings(**{kernel: "triton"}).resolved(BAGEL)
            assert resolved.backends[kernel] == "triton"


def test_flash_in_fp32_is_refused_at_the_start(gpu):
    gpu((9, 0))
    settings = KernelSettings(attention="flash").resolved(BAGEL)
    settings.check(BAGEL)
    with pytest.raises(SettingsError) as caught:
        settings.check(Demands("fp32", 128))
    assert str(caught.value) == (
        "kernels.attention: 'flash' computes in bf16, but the model is in fp32; set it to sdpa, or "
        "engine.precision to bf16."
    )


@pytest.mark.parametrize(
    ("demands", "attention"),
    [
        (BAGEL, "flash"),
        (Demands("fp32", 128, (72,)), "flex"),
        (Demands("bf16", 128, on_cpu=True), "sdpa"),
    ],
)
def test_auto_without_a_check_takes_the_first_of_the_order_that_can_run(demands, attention, gpu):
    gpu((9, 0))
    resolved = KernelSettings().resolved(demands)
    assert resolved.attention == attention
    resolved.check(demands)


def test_auto_never_names_our_own_kernels_without_a_check(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "triton" not in KernelSettings().resolved(BAGEL).backends.values()


@pytest.mark.parametrize(
    ("attention", "head_dim", "words"),
    [
        (
            "flash",
            20,
            "takes heads of 8 to 256 in steps of 8 values, but the model has heads of 20",
        ),
        ("flex", 8, "takes heads of 16 to 65536 values, but the model has heads of 8"),
    ],
)
def test_heads_that_a_library_refuses_are_refused_at_the_start(attention, head_dim, words, gpu):
    gpu((9, 0))
    demands = Demands("bf16", head_dim)
    with pytest.raises(SettingsError, match=words):
        KernelSettings(attention=attention).resolved(demands).check(demands)
    assert (
        KernelSettings().resolved(demands).attention
        == {"flash": "flex", "flex": "flash"}[attention]
    )


def test_flash_on_a_gpu_before_ampere_is_refused_at_the_start(gpu):
    gpu((7, 5))
    with pytest.raises(SettingsError) as caught:
        KernelSettings(attention="flash").resolved(BAGEL)
    assert str(caught.value) == (
        "kernels.attention: 'flash' cannot run here: flash attention needs compute capability 8.0 "
        "or more, and this GPU has 7.5."
    )
    assert KernelSettings().resolved(BAGEL).attention == "flex"
