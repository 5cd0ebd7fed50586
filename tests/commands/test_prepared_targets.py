"""Regression targets of other kinds from prepared rows: those of training from pixels to the bit,
and another target than the recipe's is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from preparation_case import Place
from vision_folders import write_dinov2

from uno_ds.data.prepared import MANIFEST
from uno_ds.model.weights import WeightsFile
from uno_ds.objectives.preparation import TargetEncoder
from uno_ds.objectives.regression_target import (
    feature_rows,
    get_regression_target,
    open_encoder,
)
from uno_ds.objectives.visual_regression import regression_targets
from uno_ds.run import Run
from uno_ds.settings import SettingsError

SPATIAL = {"objective__regression_target_norm": "spatial", "objective__regression_mean_share": 0.7}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dinov2(tmp_path_factory.mktemp("encoders") / "dinov2", patch=5)


def changes_of(target: str, encoder: Path, norm: dict) -> dict:
    folder = {"objective__regression_encoder": str(encoder)} if target == "encoder" else {}
    return {"objective__regression_target": target} | folder | norm


def prepare(place: Place, out: str, **changes) -> Path:
    """The prepared t2i source."""
    return place.prepare(out, "--source", "0", **changes)["t2i"]


def targets_of(run: Run) -> list[tuple[tuple[str, ...], torch.Tensor]]:
    """Keys and regression targets of the first packs."""
    recipe = run.recipe
    settings = recipe.objective
    own = open_encoder(settings, CPU, torch.float32)
    found, stream = [], run.stream(0, 1)
    for _, batches in zip(range(3), stream, strict=False):
        for batch in batches:
            vit_PW = torch.zeros(0, recipe.architecture.vit_hidden)
            if get_regression_target(settings.regression_target).reads_vision:
                vision = TargetEncoder(recipe.architecture, settings.regression_target)
                vit_PW = vision.load(WeightsFile(recipe.base)).vit_features(batch.vision)
            rows_PW = feature_rows(settings, own, vit_PW, None, batch.vision, batch.targets)
            found.append((batch.keys, regression_targets(rows_PW, batch.targets)))
    stream.close()
    return found


@pytest.mark.parametrize(
    ("target", "norm"),
    [("vit", SPATIAL), ("hog", {}), ("hog", SPATIAL), ("encoder", {}), ("encoder", SPATIAL)],
)
def test_targets_of_prepared_rows_are_those_of_pixels_to_the_bit(target, norm, place, encoder):
    changes = changes_of(target, encoder, norm)
    with torch.no_grad():
        pixels = targets_of(place.open({"t2i": place.paths["t2i"]}, **changes))
        folder = prepare(place, f"out_{target}_{len(norm)}", **changes)
        prepared = targets_of(place.open({"t2i": folder}, **changes))
    assert len(pixels) == len(prepared) >= 3
    for (keys, wanted), (other_keys, got) in zip(pixels, prepared, strict=True):
        assert keys == other_keys and len(wanted) >= 9 and wanted.any()
        assert torch.equal(got, wanted)


def refusal(place: Place, folder: Path, **changes) -> str:
    with pytest.raises(SettingsError) as refused:
        place.open({"t2i": folder}, **changes)
    said = str(refused.value)
    assert said.startswith("data.sources.0.") and "\n" not in said
    return said


def test_another_target_than_the_prepared_one_is_refused(place, prepared, encoder):
    folder = prepared["t2i"]
    said = refusal(place, folder, objective__regression_target="hog")
    assert 'objective.regression_target "vit", but the recipe has "hog"' in said
    said = refusal(place, folder, **SPATIAL)
    assert 'objective.regression_target_norm "none", but the recipe has "spatial"' in said
    said = refusal(place, folder, **changes_of("encoder", encoder, {}))
    assert 'but the recipe has "encoder"' in said


def test_a_folder_without_targets_is_refused_and_one_of_other_files_too(place, encoder, tmp_path):
    bare = prepare(place, "bare", objective__regression_weight=0.0)
    said = refusal(place, bare, objective__regression_target="hog")
    assert 'objective.regression_target null, but the recipe has "hog"' in said
    changes = changes_of("encoder", encoder, SPATIAL)
    folder = prepare(place, "own", **changes)
    said = refusal(place, folder, **changes | {"objective__regression_mean_share": 0.6})
    assert "objective.regression_mean_share 0.7, but the recipe has 0.6" in said
    other = write_dinov2(tmp_path / "other", patch=5, seed=1)
    said = refusal(place, folder, **changes_of("encoder", other, SPATIAL))
    assert "objective.regression_encoder (files)" in said


def test_a_folder_of_before_there_were_norms_was_prepared_without_one(place, prepared, tmp_path):
    folder = Path(shutil.copytree(prepared["t2i"], tmp_path / "old"))
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["recipe"]["objective.regression_target_norm"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    place.open({"t2i": folder})
    assert "objective.regression_target_norm" in refusal(place, folder, **SPATIAL)
