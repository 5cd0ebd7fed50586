"""Several grids of metaqueries at once: layout, positions, targets, loss and gradient; and what a
folder says of its grids."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from dense_comparison import check_against_dense
from tiny_objective import (
    collate,
    make_composer,
    mixed_pack,
    random_views,
    text_to_image,
    tiny_objective,
    tiny_shape,
)

from uno_ds.cost.parameters import parameters_of
from uno_ds.cost.scenario import fullest_packs
from uno_ds.model.regression_metadata import extra_metadata, identity_in
from uno_ds.model.tensor_file import write_tensors
from uno_ds.model.weights import EXTRA_FILE
from uno_ds.recipe import load_recipe
from uno_ds.recipe_checks import warnings_of_recipe
from uno_ds.sequence.composition import SequenceSettings
from uno_ds.sequence.segments import Kind, Segment
from uno_ds.sequence.target_builder import target_cells
from uno_ds.settings import SettingsError, describe

GRIDS = (3, 2)


def metaqueries(sample) -> Segment:
    return next(segment for segment in sample.segments if segment.kind == Kind.METAQUERY)


@pytest.mark.parametrize("kind", ["cosine", "contrastive"])
@pytest.mark.parametrize("target", ["vit", "connector", "hog"])
def test_loss_and_gradient_equal_the_dense_implementation(target, kind):
    tolerance = 16 * 2**-24 if target == "hog" else 1e-9
    check_against_dense(
        2,
        stop=True,
        grid=GRIDS,
        tolerance=tolerance,
        regression_target=target,
        regression_loss=kind,
    )


@pytest.mark.parametrize("everything", [False, True], ids=["generation", "all"])
def test_normalised_targets_of_several_grids_equal_the_dense_implementation(everything):
    check_against_dense(
        3,
        stop=False,
        everything=everything,
        grid=(4, 3, 1),
        regression_target_norm="spatial",
        regression_mean_share=0.5,
    )


def test_one_segment_holds_the_cells_of_all_grids_one_grid_after_the_other():
    samples = [
        text_to_image(np.random.default_rng(0), make_composer(grid)) for grid in (GRIDS, 3, 2)
    ]
    both, fine, coarse = (metaqueries(sample) for sample in samples)
    assert both.sides == GRIDS and both.length == 13
    assert [sample.length for sample in samples][0] == samples[1].length + 4
    batches = [collate([sample]) for sample in samples]
    together = batches[0].metaqueries
    alone = [batch.metaqueries for batch in batches[1:]]
    assert together.index_M.tolist() == list(range(13))
    assert torch.equal(together.positions_M, torch.cat([part.positions_M for part in alone]))
    for part in (0, 1):
        cells = target_cells(both)[part]
        of_fine, of_coarse = target_cells(fine)[part], target_cells(coarse)[part]
        np.testing.assert_array_equal(cells[:9, : of_fine.shape[1]], of_fine)
        np.testing.assert_array_equal(cells[9:, : of_coarse.shape[1]], of_coarse)
    # The image is encoded once.
    assert batches[0].vision.lengths == batches[1].vision.lengths


def test_a_list_of_one_grid_is_that_grid():
    for grid, wanted in (([2], 2), ([4], 4)):
        numbers = [
            load_recipe("tiny", [f"sequence.metaquery_grid={value}"]) for value in (grid, wanted)
        ]
        one, other = numbers
        assert one.sequence.metaquery_grids == other.sequence.metaquery_grids == (wanted,)
        assert parameters_of(one) == parameters_of(other)
    objectives = [tiny_objective(grid=grid) for grid in ((2,), 2)]
    losses = []
    for objective, grid in zip(objectives, ((2,), 2), strict=True):
        batch = collate(mixed_pack(0, make_composer(grid)))
        losses.append(objective(batch, torch.ones(4))[1])
    assert torch.equal(*losses)


def test_each_grid_has_its_own_embeddings_and_the_cost_model_counts_all():
    recipe, usual = (
        load_recipe("tiny", [f"sequence.metaquery_grid={value}"]) for value in ("[4, 2]", "4")
    )
    shapes = {parameter.name: parameter.shape for parameter in parameters_of(recipe)}
    assert shapes["metaqueries.weight"][0] == 20
    packs = [fullest_packs(each, ["t2i"])["t2i"] for each in (recipe, usual)]
    assert [pack.metaqueries for pack in packs] == [20, 16]
    longest = [each.largest_samples(["t2i"])["t2i"] for each in (recipe, usual)]
    assert longest[0] == longest[1] + 4


def test_every_metaquery_gets_a_gradient():
    objective = tiny_objective(grid=GRIDS, flow_weight=0, caption_weight=0, answer_weight=0)
    batch = collate(mixed_pack(0, make_composer(GRIDS)))
    objective(batch, torch.ones(4))[0].backward()
    assert (objective.metaqueries.weight.grad.abs().amax(dim=1) > 1e-9).all()
    assert objective.metaqueries.weight.shape[0] == 13


@pytest.mark.parametrize("value", ["[]", "[4, 0]", "[4, 4]", "[2, 4]", "[300]", "[4, x]", "[[4]]"])
def test_a_list_that_is_no_list_of_grids_is_one_line(value):
    with pytest.raises(SettingsError) as raised:
        load_recipe("tiny", [f"sequence.metaquery_grid={value}"])
    said = str(raised.value)
    assert said.startswith("sequence.metaquery_grid") and "\n" not in said


def test_the_grid_of_one_cell_is_named_where_nothing_is_left_of_it():
    overrides = ["sequence.metaquery_grid=[4, 1]", "objective.regression_target_norm=spatial"]
    with pytest.raises(SettingsError, match="one cell of a sequence.metaquery_grid of 1"):
        load_recipe("tiny", overrides)
    load_recipe("tiny", [*overrides, "objective.regression_mean_share=0.9"])


def test_the_table_of_settings_names_both_forms():
    allowed = {key: kind for key, kind, _, _ in describe(SequenceSettings)}["metaquery_grid"]
    assert allowed == "list of int | int, 0 to 256"


def test_a_folder_says_its_grids_in_the_files_metadata(tmp_path):
    assert identity_in(tmp_path) == {}
    spec = {"metaqueries.weight": (torch.float32, (1, 1))}

    def write(metadata: dict[str, str]) -> None:
        write_tensors(tmp_path / EXTRA_FILE, spec, [torch.zeros(1, 1)], metadata)

    write(extra_metadata({}))
    plain = (tmp_path / EXTRA_FILE).read_bytes()
    write({"format": "pt"})
    assert (tmp_path / EXTRA_FILE).read_bytes() == plain and identity_in(tmp_path) == {}
    write(extra_metadata({"grids": [4, 2]}))
    assert identity_in(tmp_path) == {"grids": [4, 2]}
    for text in ("[", "3", json.dumps([1])):
        write({"format": "pt", "regression": text})
        with pytest.raises(SettingsError, match="its metadata regression holds no object"):
            identity_in(tmp_path)


def test_views_and_prepared_targets_are_of_all_grids():
    composer = make_composer(GRIDS)
    views = random_views(np.random.default_rng(0))
    builder = composer.builder()
    builder.generated(views, None, np.random.default_rng(0))
    segment = builder.segments[-1]
    assert segment.length == composer.queries == 13
    values = np.zeros((13, tiny_shape().vit_hidden), dtype=np.float32)
    prepared = dataclasses.replace(segment, pixels=None, target=values)
    batch = collate(
        [dataclasses.replace(builder.sample("x"), segments=[*builder.segments[:-1], prepared])]
    )
    assert len(batch.targets.prepared_EW) == len(batch.targets.source_M) == 13


def test_contrasted_cells_that_are_smaller_than_a_patch_are_said_to_be_alike():
    finer, contrasted = "sequence.metaquery_grid=[4, 2]", "objective.regression_loss=contrastive"
    (line,) = warnings_of_recipe(load_recipe("tiny", [finer, contrasted]))
    assert line == (
        "objective.regression_loss is contrastive, but sequence.metaquery_grid has 4 cells a side, "
        "and an image of data.vit_image at most 3 patches a side: cells with the same target are "
        "each other's negatives."
    )
    for given in ([finer], ["sequence.metaquery_grid=[3, 2]", contrasted]):
        assert not warnings_of_recipe(load_recipe("tiny", given))
