"""The modes of adapters run on the samples of the others, and do the operations that are
predicted."""

import json
from pathlib import Path

import pytest

from benchmarks.commands import overhead

SCENARIO = "prompt=12,latents=36,caption=14,metaqueries=9,samples=4"
MODES = "flow,uno,flow-lora,uno-lora"


def test_adapters_are_compared_with_the_whole_expert(tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "result.json"
    arguments = ["--recipe", "tiny", "--scenarios", SCENARIO, "--modes", MODES, "--stages", "graph"]
    arguments += ["--rounds", "2", "--splits", "1", "--warmup", "0", "--json", str(file)]
    assert overhead.main([*arguments, "--set", "lora.rank=4"]) == 0
    entry = json.loads(file.read_text())["measurements"][0]
    assert set(entry["modes"]) == set(MODES.split(","))
    for mode, numbers in entry["modes"].items():
        assert numbers["flops"]["unexplained"] == pytest.approx(0, abs=1e-9), mode
        has_adapters = "adapters" in numbers["flops"]["predicted"]
        assert has_adapters == mode.endswith("-lora")
    assert {"flow-lora / flow", "uno-lora / uno", "uno-lora / flow-lora"} <= set(entry["ratios"])
    assert entry["ratios"]["uno-lora / uno"]["predicted"] < 1
    assert "uno-lora" in capsys.readouterr().out
