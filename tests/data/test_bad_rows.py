"""Whole runs over data of every layout, alone and mixed, with everything wrong that rows and files
can have."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from no_launcher import environment_without_launcher
from PIL import Image
from small_runs import (
    edit_row,
    encoded,
    picture,
    random_base,
    t2i_row,
    tree,
    write_edit,
    write_photos,
    write_t2i,
    write_vlm,
)

from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import build_codec
from uno_ds.objectives.uno import LOSSES, UnoObjective
from uno_ds.recipe import load_recipe
from uno_ds.run import prepare
from uno_ds.settings import to_plain
from uno_ds.training.metrics import read_metrics
from uno_ds.training.sharded_objective import initialise

ROOT = Path(__file__).parents[2]


def start(folder: Path, recipe: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """One rank under plain python, as a user starts it."""
    path = folder / f"{recipe['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    environment = environment_without_launcher()
    environment |= {"HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), "--recipe", str(path)],
        text=True,
        capture_output=True,
        timeout=600,
        env=environment,
        cwd=folder,
    )


def summary_of(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    return json.loads((folder / "runs" / recipe["name"] / "summary.json").read_text())


def turned() -> bytes:
    upright = picture(40, 24)
    exif = upright.getexif()
    exif[0x0112] = 6
    return encoded(upright, exif=exif)


def write_damaged(folder: Path) -> list[Path]:
    """A t2i folder, an edit file and a conversation folder; rows that must be used, and rows and
    files that must not."""
    good = [t2i_row(seed=seed) for seed in range(2)]
    transparent = picture().convert("RGBA")
    transparent.putalpha(Image.fromarray(np.tile(np.arange(40, dtype=np.uint8) * 6, (30, 1))))
    usable = [
        t2i_row(encoded(picture().quantize(16), "PNG"), seed=10),
        t2i_row(encoded(transparent, "PNG"), seed=11),
        t2i_row(encoded(picture().convert("CMYK")), seed=12),
        t2i_row(turned(), seed=13),
        t2i_row(encoded(picture().convert("L")), seed=14),
        t2i_row(
            captions=json.dumps({"a": "<|im_end|> a cup <|vision_start|>", "b": "<|im_start|>"})
        ),
    ]
    unusable = [
        t2i_row(encoded(picture(300, 200))[:2000]),
        t2i_row(b""),
        t2i_row(captions='{"a": '),
        t2i_row(captions='{"a": " "}'),
        t2i_row(captions=json.dumps({"a": "word " * 6000})),
        t2i_row(encoded(picture(3, 3), "PNG")),
        t2i_row(encoded(picture(4000, 20))),
    ]
    whole = write_t2i(folder / "t2i" / "a.parquet", [*good, *usable, *unusable])
    (folder / "t2i" / "b.parquet").write_bytes(whole.read_bytes()[:-400])
    pairs = [
        edit_row(seed=1),
        edit_row([encoded(picture())]),
        {**edit_row(seed=2), "instruction_list": [[]]},
    ]
    edits = write_edit(folder / "edit" / "a.parquet", pairs)
    talks = write_vlm(
        folder / "vlm",
        ["a.jpg", "b.jpg"],
        extra=['{"image": "a.jpg", "conversa'],
        missing=["gone.jpg"],
    )
    return [whole.parent, edits.parent, talks.parent]


@pytest.fixture(scope="module")
def damaged(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, dict[str, Any], subprocess.CompletedProcess[str]]]:
    folder = tmp_path_factory.mktemp("damaged")
    recipe = tree(folder, write_damaged(folder), name="damaged", steps=3)
    # Many small packs, so that three steps see several epochs of every source.
    recipe["engine"]["packs_per_step"], recipe["sequence"]["token_budget"] = 6, 900
    yield folder, recipe, start(folder, recipe)


def test_a_run_over_damaged_data_goes_on_and_ends_well(damaged):
    folder, recipe, done = damaged
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stdout + done.stderr
    rows = read_metrics(folder / "runs" / "damaged" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["skipped"] == 0 for row in rows)
    for name in ("loss", "loss_flow", "loss_caption", "loss_regression", "loss_answer"):
        assert all(row[name] is not None and row[name] > 0 for row in rows), name


def test_the_summary_counts_every_cause_and_no_other(damaged):
    folder, recipe, _ = damaged
    counts = summary_of(folder, recipe)["skipped_samples"]
    expected = {
        "undecodable_image",
        "empty_image",
        "bad_json",
        "no_caption",
        "text_too_long",
        "image_too_small",
        "aspect_ratio",
        "missing_image",
        "missing_instruction",
        "unreadable_file",
    }
    assert (
        set(counts) == expected
        and all(count > 0 for count in counts.values())
        and counts["unreadable_file"] == 1
    )


def test_the_start_and_the_summary_name_the_unreadable_file_and_the_reason(damaged):
    folder, recipe, done = damaged
    unreadable = summary_of(folder, recipe)["unreadable_files"]
    ((file, reason),) = unreadable.items()
    assert file == str(folder / "t2i" / "b.parquet") and reason
    line = f"the file '{file}' cannot be read and is left out: {reason}."
    assert [reported for reported in done.stdout.splitlines() if reported.endswith(line)]
    assert file in (folder / "runs" / recipe["name"] / "summary.md").read_text()


def test_the_start_and_the_summary_state_as_what_a_source_is_read(damaged):
    folder, recipe, done = damaged
    reading = summary_of(folder, recipe)["sources"][f"{folder.name}/t2i"]
    assert reading["layout"] == "t2i" and reading["rows"] > 8
    assert reading["columns"] == {"image": ["image"], "captions": ["captions"]}
    assert reading["first_text"] and f"first text '{reading['first_text']}'" in done.stdout


def test_the_summary_holds_a_row_of_every_cause(damaged):
    folder, recipe, _ = damaged
    summary = summary_of(folder, recipe)
    examples = summary["skipped_examples"]
    assert set(examples) == set(summary["skipped_samples"]) - {"unreadable_file"}
    # The good and the usable rows come first in that file.
    image = examples["undecodable_image"]
    assert (image["source"], image["row"]) == (f"{folder.name}/t2i", 8)
    assert image["file"] == str(folder / "t2i" / "a.parquet") and "truncated" in image["detail"]
    text = (folder / "runs" / recipe["name"] / "summary.md").read_text()
    assert f"; one is row 8 of `{image['file']}`: `{image['detail']}`" in text


def test_frozen_weights_of_that_run_held_and_its_recipe_can_be_run_again(damaged):
    folder, recipe, _ = damaged
    checksums = summary_of(folder, recipe)["checksums"]
    assert checksums["frozen_start"] == checksums["frozen_end"]
    again, first = (
        load_recipe(str(folder / "runs" / "damaged" / "recipe.yaml")),
        load_recipe(str(folder / "damaged.yaml")),
    )
    assert to_plain(again) == to_plain(first)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        yield write_photos(folder)


@pytest.mark.parametrize("train", ["generation", "all"])
@pytest.mark.parametrize(
    "layout, losses",
    [
        ("t2i", {"flow", "caption", "regression"}),
        ("edit", {"flow", "regression"}),
        ("vlm", {"answer"}),
    ],
)
def test_each_layout_alone_has_its_losses_and_trains_what_they_reach(
    tmp_path, photos, layout, losses, train
):
    """Without DeepSpeed: edits without captions have no caption loss; conversations train nothing
    but the understanding expert."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            tree(tmp_path, [photos[layout]], model={"train": train}, data={"prefetch": 0})
        )
    )
    run = prepare(str(path))
    recipe = run.recipe
    shape, kernels = recipe.architecture, recipe.kernels.resolved()
    model = Bagel(shape, kernels.attention, read_context=run.read_answers)
    objective = UnoObjective(
        model, build_codec(shape), recipe.objective, kernels, recipe.sequence.metaqueries
    )
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            initialise(name, parameter, 0)
        # It starts at zero, which would hold the flow's gradient back from everything before it.
        model.llm2vae.weight.normal_()
    objective.set_trainable(everything=train == "all")
    (batch,) = next(iter(run.stream(0, 1)))
    counts = torch.tensor([batch.loss_counts[name] for name in LOSSES], dtype=torch.float64)
    total, parts = objective(batch, counts)
    total.backward()
    assert (
        {name for name, part in zip(LOSSES, parts) if part > 0}
        == losses
        == {name for name in objective.losses if batch.loss_counts[name]}
    )
    moved = {
        name
        for name, parameter in objective.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().sum() > 0
    }
    assert bool(moved) == (not run.idle) == (layout != "vlm" or train == "all")
    assert any("und" in name.split(".") for name in moved) == (train == "all")
    assert any("gen" in name.split(".") for name in moved) == (layout != "vlm")


@pytest.mark.slow
def test_all_layouts_of_photographs_mix_through_one_key_and_train_everything(tmp_path, photos):
    """From a base, jointly: flow, captions, regression and answers all have a loss, and no row is
    bad."""
    recipe = tree(
        tmp_path,
        [],
        name="mixed",
        model={"base": str(random_base(tmp_path / "base")), "train": "all"},
        data={
            "sources": [
                {"path": str(path), "weight": weight}
                for path, weight in zip(photos.values(), (1.0, 2.0, 1.5))
            ]
        },
    )
    del recipe["model"]["architecture"], recipe["model"]["tokenizer"]
    done = start(tmp_path, recipe)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = summary_of(tmp_path, recipe)
    assert summary["exit"] == "completed" and summary["skipped_samples"] == {}
    assert summary["parameters"]["frozen"] < summary["parameters"]["trainable"]
    assert all(
        summary["losses"]["last"][name] > 0
        for name in ("loss_flow", "loss_caption", "loss_regression", "loss_answer")
    )


def test_conversations_alone_under_a_frozen_understanding_expert_run_train_nothing_and_warn(
    tmp_path, photos
):
    recipe = tree(tmp_path, [photos["vlm"]], name="vlm", samples={"prompts": []})
    done = start(tmp_path, recipe)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len([line for line in lines if line.startswith("warning: nothing will train")]) == 1
    losses = summary_of(tmp_path, recipe)["losses"]["last"]
    assert losses["loss_answer"] > 0 and not losses["loss_flow"]
    rows = read_metrics(tmp_path / "runs" / "vlm" / "metrics.jsonl")
    assert rows and all(row["grad_norm"] == 0 for row in rows)
