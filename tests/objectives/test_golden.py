"""Our model, sequence and losses reproduce tensors of the public BAGEL code (fp32, 1e-4 relative),
and say so if not."""

import json
from pathlib import Path

import pytest
import torch

from uno_ds.commands.weights import main
from uno_ds.model.architecture import Architecture
from uno_ds.model.bagel import Bagel
from uno_ds.model.weights import bagel_name
from uno_ds.objectives import golden
from uno_ds.objectives.golden import compare, load_case
from uno_ds.settings import build

FOLDER = Path(__file__).parents[1] / "goldens"
CASES = [FOLDER / "flow_and_vlm.json", FOLDER / "caption_on_noised_latents.json"]


# Interpreted kernels take long: one case of them is enough unless `slow` is asked for.
BACKENDS = [
    pytest.param(path, backend, id=f"{path.stem}-{backend}")
    for path in CASES
    for backend in ("reference", "sdpa")
]
BACKENDS += [
    pytest.param(CASES[0], "triton", id=f"{CASES[0].stem}-triton"),
    pytest.param(CASES[1], "triton", id=f"{CASES[1].stem}-triton", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("path", "backend"), BACKENDS)
def test_mask_forward_and_every_gradient_equal_the_public_codes(path, backend):
    comparisons = list(compare(load_case(path, backend)))
    assert [c for c in comparisons if c.relative > 1e-4] == []
    quantities = {c.quantity for c in comparisons}
    assert {
        "attention mask",
        "last_hidden_state",
        "mse_per_token",
        "ce_per_token",
        "loss",
    } <= quantities
    assert len([name for name in quantities if name.startswith("gradient of")]) > 30


def test_verify_prints_every_quantity_and_exits_with_0(capsys):
    assert main(["verify", *map(str, CASES)]) == 0
    output = capsys.readouterr().out
    assert (
        output.count("attention mask") == 2
        and "gradient of vae2llm.weight" in output
        and "FAIL" not in output
    )


@pytest.mark.parametrize("damage", ["weight", "mask", "gradient"])
def test_verify_exits_with_1_and_names_the_quantity_that_differs(damage, capsys, monkeypatch):
    tensors = golden.load_file(CASES[1].with_suffix(".safetensors"))
    if damage == "weight":
        tensors["weights.language_model.model.layers.1.mlp_moe_gen.up_proj.weight"][0, 0] += 0.5
    elif damage == "mask":
        tensors["attention_allowed.sample0"][20, 2] ^= True
    else:
        tensors["grads.vae2llm.bias"] *= 1.001
    monkeypatch.setattr(golden, "load_file", lambda _path: tensors)
    assert main(["verify", str(CASES[1])]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    expected = {
        "weight": "last_hidden_state",
        "mask": "attention mask",
        "gradient": "gradient of vae2llm.bias",
    }[damage]
    assert any(expected in line for line in failed)
    assert damage == "weight" or len(failed) == 1


def test_a_file_that_is_no_case_is_one_line(tmp_path, capsys):
    (tmp_path / "broken.json").write_text("{}")
    assert main(["verify", str(tmp_path / "broken.json")]) == 2
    error = capsys.readouterr().err.strip()
    assert "broken.json" in error and "\n" not in error


def test_the_fixed_position_tables_are_computed_as_the_public_code_computes_them():
    model = load_case(CASES[0]).objective.model
    from_file = model.latent_positions.clone(), model.vit_positions.clone()
    model.reset_tables()
    # Sines of another library may round to the neighbouring number.
    for table, stored in zip((model.latent_positions, model.vit_positions), from_file, strict=True):
        assert (table - stored).abs().max() <= torch.finfo(torch.float32).eps


def test_bagel_7b_has_exactly_the_published_names_and_shapes():
    shape = build(
        Architecture,
        dict(
            hidden=3584,
            layers=28,
            heads=28,
            kv_heads=4,
            mlp=18944,
            vocabulary=152064,
            vit_hidden=1152,
            vit_layers=26,
            vit_heads=16,
            vit_mlp=4304,
        ),
    )
    with torch.device("meta"):
        model = Bagel(shape)
    ours = {
        bagel_name(name): list(tensor.shape)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    assert ours == json.loads((FOLDER / "bagel_7b_mot_shapes.json").read_text())
