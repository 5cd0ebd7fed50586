"""Targets that are not of the model's visual encoder: loss and gradient, prepared and not, their
cost, and settings that contradict each other."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_comparison import check_against_dense
from tiny_objective import collate, loss_counts, make_composer, mixed_pack, tiny_objective
from vision_folders import write_dinov2

from uno_ds.cost.parameters import target_encoder_parameters
from uno_ds.cost.scenario import fullest_packs
from uno_ds.cost.step_flops import step_flops
from uno_ds.cost.utilisation import plan_of
from uno_ds.cost.work import Work, work_of
from uno_ds.objectives.regression_target import REGRESSION_TARGETS, open_encoder, target_source
from uno_ds.objectives.uno import ObjectiveSettings
from uno_ds.recipe import load_recipe
from uno_ds.sequence.segments import Kind, Sample
from uno_ds.settings import SettingsError, build


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dinov2(tmp_path_factory.mktemp("encoders") / "dinov2")


def given(target: str, encoder: Path) -> dict[str, str]:
    folder = {"regression_encoder": str(encoder)} if target == "encoder" else {}
    return {"regression_target": target} | folder


@pytest.mark.parametrize("norm", ["none", "spatial"])
@pytest.mark.parametrize("kind", ["cosine", "smooth_l1"])
@pytest.mark.parametrize("target", ["hog", "encoder"])
def test_loss_and_gradient_equal_the_dense_implementation(target, kind, norm, encoder):
    more = {"regression_mean_share": 0.8} if norm == "spatial" else {}
    # Targets by program are kept in fp32: a few roundings of a target whose mean is subtracted.
    tolerance = 16 * 2**-24 if target == "hog" else 1e-9
    check_against_dense(
        2,
        stop=True,
        grid=3,
        tolerance=tolerance,
        regression_loss=kind,
        regression_target_norm=norm,
        **given(target, encoder),
        **more,
    )


@pytest.mark.parametrize("target", ["hog", "encoder"])
def test_the_models_visual_encoder_does_not_read_the_target_image(target, encoder):
    settings = build(ObjectiveSettings, given(target, encoder))
    batch = collate(mixed_pack(0, make_composer()), settings=settings)
    assert sum(batch.vision.lengths) == batch.vision.context_rows
    assert len(batch.targets.images) == (4 if target == "encoder" else 0)
    usual = collate(mixed_pack(0, make_composer()))
    assert sum(usual.vision.lengths) > usual.vision.context_rows and not usual.targets.images


@pytest.mark.parametrize("norm", ["none", "spatial"])
@pytest.mark.parametrize("target", ["hog", "encoder"])
def test_prepared_targets_give_the_same_loss_to_the_bit(target, norm, encoder):
    """Half of the samples prepared, half not, in one pack."""
    objective = tiny_objective(
        dtype=torch.float32, regression_target_norm=norm, **given(target, encoder)
    )
    settings = objective.settings
    samples = mixed_pack(1, make_composer())
    raw = collate(samples, dtype=torch.float32, settings=settings)
    targets = targets_of(objective, raw)
    prepared, first = [], 0
    for number, sample in enumerate(samples):
        segments = []
        for segment in sample.segments:
            if segment.kind == Kind.METAQUERY:
                if number % 2:
                    values = targets[first : first + segment.length].numpy()
                    segment = dataclasses.replace(segment, pixels=None, target=values)
                first += segment.length
            segments.append(segment)
        prepared.append(Sample(sample.key, segments))
    batch = collate(prepared, dtype=torch.float32, settings=settings)
    assert len(batch.targets.prepared_EW) >= 4
    losses = [objective(x, loss_counts(x))[1] for x in (raw, batch)]
    assert torch.equal(losses[0], losses[1])


def targets_of(objective, batch) -> torch.Tensor:
    kept = []
    handle = objective.regression.register_forward_pre_hook(
        lambda _, arguments: kept.append(arguments[1])
    )
    objective(batch, loss_counts(batch))
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("target", ["hog", "encoder"])
def test_no_image_gives_a_gradient_of_0_for_the_head(target, encoder):
    objective = tiny_objective(**given(target, encoder))
    total, losses = objective(collate([], settings=objective.settings), torch.ones(4))
    total.backward()
    assert losses[2] == 0 and not objective.regression.weight.grad.any()


def recipe_of(target: str, encoder: Path):
    changes = [f"objective.{key}={value}" for key, value in given(target, encoder).items()]
    return load_recipe("tiny", changes)


def test_the_cost_model_counts_the_encoder_and_leaves_out_the_models_own(encoder):
    usual, hog, own = (recipe_of(name, encoder) for name in ("vit", "hog", "encoder"))
    packs = {
        name: fullest_packs(recipe, ["t2i"])["t2i"]
        for name, recipe in (("usual", usual), ("hog", hog), ("own", own))
    }
    assert packs["usual"].target > 0 and packs["hog"].target == packs["own"].target == 0
    assert packs["own"].own_target == packs["usual"].target and packs["hog"].own_target == 0
    shape = usual.architecture
    parts = {
        name: step_flops(shape, work_of(shape, packs[name]), plan_of(recipe, False))
        for name, recipe in (("usual", usual), ("hog", hog), ("own", own))
    }
    assert parts["usual"]["visual encoder, targets"].forward > 0
    for name in ("hog", "own"):
        assert parts[name]["visual encoder, targets"].forward == 0
    assert "target encoder" not in parts["usual"] and "target encoder" not in parts["hog"]
    assert parts["own"]["target encoder"].forward > 0
    rows = packs["hog"].samples * packs["hog"].metaqueries
    assert parts["hog"]["regression head"].forward == 2 * rows * shape.hidden * 33
    assert target_encoder_parameters(own) > 0 == target_encoder_parameters(hog)


def test_counted_operations_of_a_batch_with_an_encoder_equal_the_predicted_ones(encoder):
    from torch.utils.flop_counter import FlopCounterMode

    settings = build(ObjectiveSettings, given("encoder", encoder))
    batch = collate(mixed_pack(0, make_composer()), settings=settings)
    work = Work.of(batch)
    assert work.target_grids == batch.targets.grids and work.target_grids
    opened = open_encoder(settings, torch.device("cpu"), torch.float32)
    with FlopCounterMode(display=False) as counter:
        opened.features(batch.targets.images, batch.targets.grids)
    plan = plan_of(recipe_of("encoder", encoder), False)
    predicted = step_flops(load_recipe("tiny").architecture, work, plan)["target encoder"]
    # torch counts no attention on a CPU: two products in each of the 2 layers of width 8.
    tokens = [rows * columns + 1 for rows, columns in work.target_grids]
    attention = sum(2 * 2 * 2 * count**2 * 8 for count in tokens)
    assert predicted.forward in (counter.get_total_flops(), counter.get_total_flops() + attention)


def test_a_program_pools_the_patches_of_each_cell():
    source = target_source(build(ObjectiveSettings, {"regression_target": "hog"}))
    segment = next(
        segment
        for segment in mixed_pack(0, make_composer(grid=1))[0].segments
        if segment.kind == Kind.METAQUERY
    )
    rows = REGRESSION_TARGETS["hog"].program(segment.pixels, 3)
    np.testing.assert_allclose(source.program(segment)[0], rows.mean(axis=0), rtol=1e-5)


HOG, OWN = "objective.regression_target=hog", "objective.regression_target=encoder"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([HOG, "objective.regression_weight=0"], "objective.regression_target: is hog, but"),
        ([OWN], "objective.regression_encoder: is missing, but objective.regression_target is"),
        ([OWN, "objective.regression_encoder=/nowhere"], "'/nowhere' is no folder with a config"),
        (
            ["objective.regression_encoder=/nowhere"],
            "is '/nowhere', but objective.regression_target is vit, which does not read it",
        ),
    ],
)
def test_contradictions_are_one_line(overrides, message):
    with pytest.raises(SettingsError) as raised:
        load_recipe("tiny", overrides)
    assert message in str(raised.value) and "\n" not in str(raised.value)
