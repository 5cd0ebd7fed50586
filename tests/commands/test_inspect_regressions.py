"""Looking inside models with several grids of metaqueries and other targets: a map for each grid,
the target that the checkpoint was trained with, and what does not fit in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import random_base
from vision_folders import write_dinov2

from uno_ds.commands.inspect_model import main
from uno_ds.generation.inference_model import open_model
from uno_ds.inspection.subject import subject_of
from uno_ds.model.regression_metadata import extra_metadata
from uno_ds.model.tensor_file import write_tensors
from uno_ds.model.vision_folder import read_vision_folder
from uno_ds.model.weights import EXTRA_FILE
from uno_ds.objectives.uno import ObjectiveSettings
from uno_ds.settings import SettingsError, build

IMAGES, HOG, GRIDS = 20, 33, [3, 2]


def added_weights(head: int = HOG) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "metaqueries.weight": torch.randn(13, 32, generator=generator),
        "regression.weight": torch.randn(head, 32, generator=generator),
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a run with two grids and targets by program exports it."""
    folder = random_base(tmp_path_factory.mktemp("bases") / "hog")
    added = added_weights()
    layout = {name: (torch.float32, tensor.shape) for name, tensor in added.items()}
    metadata = extra_metadata({"grids": GRIDS, "target": "hog"})
    write_tensors(folder / EXTRA_FILE, layout, iter(added.values()), metadata)
    return folder


def test_the_report_has_a_map_of_each_grid(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--checkpoint", str(base), "--out", str(tmp_path / "out"), "--images", str(IMAGES)]
    flags += ["--batch", "10", "--t", "0.2,0.8", "--max-tokens", "2", "--only", "reading"]
    assert main(flags) == 0
    figures = {path.name for path in (tmp_path / "out/figures").iterdir()}
    assert {"metaqueries_hog_3.png", "metaqueries_hog_2.png"} <= figures
    assert "metaqueries_hog.png" not in figures
    results = json.loads((tmp_path / "out/results.json").read_text())
    for level in results["reading"]["hog"]["levels"]:
        assert level["metaquery_grids"] == GRIDS and len(level["cosine_of_cells"]) == 13
        assert all(-1 <= cosine <= 1 for cosine in level["cosine_of_cells"])


def subject(base: Path, identity: dict[str, Any], head: int = HOG, **settings: Any) -> Any:
    objective = build(ObjectiveSettings, settings)
    return subject_of(open_model(base), added_weights(head), objective, identity)


def test_the_target_is_the_checkpoints_whatever_the_recipe_says(base, tmp_path):
    identity = {"grids": GRIDS, "target": "hog"}
    found = subject(base, identity, regression_target="connector")
    assert found.objective.settings.regression_target == "hog" and found.metaqueries == GRIDS
    folder = write_dinov2(tmp_path / "dinov2")
    digest = read_vision_folder(folder, "").digest()
    own = {"grids": GRIDS, "target": "encoder", "encoder": digest}
    found = subject(base, own, head=8, regression_encoder=str(folder))
    assert found.objective.encoder is not None and found.collator().targets.own_encoder
    plain = subject(base, {"grids": GRIDS}, head=24, regression_target="hog")
    assert plain.objective.settings.regression_target == "vit"


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({"grids": [3, 3]}, "metaqueries.weight has shape"),
        ({"grids": "many"}, "which no run wrote"),
        ({"grids": [3, "2"]}, "which no run wrote"),
        ({"grids": GRIDS, "target": "nobody"}, "which no run wrote"),
        ({"grids": GRIDS, "target": "encoder"}, "regression_encoder: is missing"),
        ({"grids": GRIDS, "target": "encoder", "encoder": "0"}, "of another encoder than"),
    ],
)
def test_what_does_not_fit_is_one_line(base, identity, message, tmp_path):
    settings = {}
    if message.startswith("of another"):
        settings["regression_encoder"] = str(write_dinov2(tmp_path / "dinov2"))
    with pytest.raises(SettingsError) as raised:
        subject(base, identity, **settings)
    assert message in str(raised.value) and "\n" not in str(raised.value)
