"""Mistakes in the keys of a recipe: one line that names the key, before anything starts."""

import pytest
from refusals import overrides, said, write_recipe
from small_runs import t2i_row, write_t2i

from uno_ds.commands.train import main
from uno_ds.run import prepare


@pytest.mark.parametrize(
    "assignments",
    [
        [],
        ["model.architecture=", "model.tokenizer=", "model.base=base"],
        ["objective.regression_weight=0", "sequence.metaquery_grid=0"],
        ["engine.deepspeed=auto.json"],
        ["engine.precision=bf16", "engine.deepspeed=zero1"],
        ["sequence.metaquery_grid=9"],
        ["samples.prompts=[a cup]", "samples.height=16"],
        ["name=a cup, 2.5-b_c"],
        [
            "data.sources=[{path: photos/t2i}, {path: photos/t2i/00000.parquet}, "
            "{path: photos/edit}, {path: photos/vlm}]"
        ],
    ],
)
def test_what_is_right_is_accepted(place, capsys, assignments):
    assert main(["--recipe", write_recipe(place), "--dry-run", *overrides(*assignments)]) == 0
    said = capsys.readouterr().out
    assert "valid for 1 rank(s)" in said and "warning" not in said


@pytest.mark.parametrize(
    "assignments, key, words",
    [
        (["stepps=3"], "stepps", "did you mean 'steps'?"),
        (
            ["objective.caption_wieght=0"],
            "objective.caption_wieght",
            "did you mean 'caption_weight'?",
        ),
        (["model.architecture.depth=3"], "model.architecture.depth", "unknown key"),
        (["engine=zero3"], "engine", "must be a mapping"),
        (["steps=many"], "steps", "must be of type int"),
        (["steps=0"], "steps", "at least 1"),
        (["steps="], "steps", "must be of type int, got null"),
        (["seed=-1"], "seed", "at least 0"),
        (["seed=99999999999999999999"], "seed", "at most"),
        (["optimizer.lr=fast"], "optimizer.lr", "must be a finite number"),
        (["optimizer.betas=[0.9]"], "optimizer.betas", "two numbers below 1"),
        (["engine.precision=fp16"], "engine.precision", "must be one of auto, fp32, bf16"),
        (
            ["sequence.metaquery_grid=0"],
            "sequence.metaquery_grid",
            "objective.regression_weight is above 0",
        ),
        (["sequence.supervision_window=[0.8, 0.2]"], "sequence.supervision_window", "low <= high"),
        (
            [
                "objective.flow_weight=0",
                "objective.caption_weight=0",
                "objective.regression_weight=0",
                "objective.answer_weight=0",
            ],
            "objective.flow_weight",
            "at least one must be above 0",
        ),
        (
            ["data.sources=[{path: photos/vlm}]", "objective.answer_weight=0"],
            "objective",
            "the sources hold vlm samples, whose losses are answer, and all of their weights are 0",
        ),
        (
            ["model.architecture.kv_heads=3"],
            "model.architecture.kv_heads",
            "must divide the 4 query heads",
        ),
        (["model.architecture.heads=6"], "model.architecture.heads", "must divide hidden = 32"),
        (
            ["model.architecture.vit_heads=5"],
            "model.architecture.vit_heads",
            "must divide vit_hidden = 24",
        ),
        (
            ["model.architecture.latent_channels=11"],
            "model.architecture.latent_channels",
            "12 for the pixel codec",
        ),
        (
            ["model.architecture.codec=flux"],
            "model.architecture.codec",
            "16 channels and 8 pixels per latent side",
        ),
        (
            ["model.architecture.latent_patch=64"],
            "data.latent_image",
            "one token of the model is 128 x 128 pixels",
        ),
        (["model.architecture.vocabulary=511"], "model.tokenizer", "has 512 tokens"),
        (["model.architecture="], "model.base", "give either model.base"),
        (["model.base=base"], "model.base", "not both or none"),
        (
            ["model.base=base", "model.architecture=", "model.tokenizer=nowhere"],
            "model.tokenizer",
            "'nowhere' is not a folder",
        ),
        (
            ["model.base=nowhere", "model.architecture="],
            "model.base",
            "nowhere is not a complete base: it lacks llm_config.json",
        ),
        (["model.base=''", "model.architecture="], "model.base", "lacks llm_config.json"),
        (
            ["model.base=..", "model.architecture="],
            "model.base",
            ".. is not a complete base: it lacks llm_config.json",
        ),
        (["model.tokenizer="], "model.tokenizer", "is required"),
        (["model.tokenizer=photos"], "model.tokenizer", "there is no tokenizer"),
        (["model.tokenizer=" + 300 * "x"], "model.tokenizer", "x"),
        (
            ["sequence.token_budget=100"],
            "sequence.token_budget",
            "a sample of source 'photos/t2i' can have",
        ),
        (
            ["data.latent_image.max_side=33"],
            "data.latent_image.max_side",
            "8 tokens of 4 pixels per side = 32",
        ),
        (
            ["data.vit_image.max_side=40"],
            "data.vit_image.max_side",
            "4 tokens of 8 pixels per side = 32",
        ),
        (["data.latent_image.min_side=64"], "data.latent_image.min_side", "at most max_side"),
        (["data.sources=[]"], "data.sources", "at least one source"),
        (["data.sources=photos"], "data.sources", "must be a list"),
        (["data.sources.0=photos"], "data.sources.0", "must be a mapping"),
        (["data.sources.1.path=photos"], "data.sources.1.path", "not an index"),
        (["data.sources.0.weight=0"], "data.sources.0.weight", "at least 1e-06"),
        (
            ["data.sources.0.path=nowhere/*.parquet"],
            "data.sources.0.path",
            "there is no parquet, arrow, tar or jsonl file",
        ),
        (["data.sources.0.path=file"], "data.sources.0.path", "the suffix is none of"),
        (
            ["data.sources.0.path=scenes/t3i"],
            "data.sources.0.path",
            "the embedded sets are scenes/t2i",
        ),
        (
            ["data.sources.0.path=~nobody_of_this_name/x"],
            "data.sources.0.path",
            "~nobody_of_this_name",
        ),
        (["data.sources.0.path=" + 300 * "x"], "data.sources.0.path", "cannot be opened"),
        (
            ["data.sources.0.images=nowhere"],
            "data.sources.0.path",
            "the folder of images 'nowhere' does not exist",
        ),
        (
            ["data.sources.0.layout=edit"],
            "data.sources.0.path",
            "none of its 12 rows can be used (missing_instruction 12)",
        ),
        (
            ["sequence.max_text_tokens=1"],
            "data.sources.0.path",
            "none of its 12 rows can be used (text_too_long 12)",
        ),
        (
            ["data.sources=[{path: photos/t2i, name: a}, {path: photos/edit, name: a}]"],
            "data.sources",
            "the name 'a' is given to 2 sources",
        ),
        (
            ["data.scenes.kinds.circle=1"],
            "data.scenes.kinds.circle",
            "allowed are one, count, pair",
        ),
        (["data.folder=file/x"], "data.folder", "'file' is not a folder"),
        (["output=file/x"], "output", "'file' is not a folder"),
        (["output=" + 300 * "x"], "output", "too long"),
        (["name=a/b"], "name", "must be a plain folder name"),
        (["name=.."], "name", "must be a plain folder name"),
        (["name=''"], "name", "must be a plain folder name"),
        (['name="a\\nb"'], "name", "must be a plain folder name"),
        (["name=" + 300 * "x"], "name", "at most 100"),
        (["engine.deepspeed=zero9"], "engine.deepspeed", "give a JSON file or one of zero0, zero1"),
        (["engine.deepspeed=nowhere.json"], "engine.deepspeed", "nowhere.json does not exist"),
        (["engine.deepspeed=broken.json"], "engine.deepspeed", "not readable JSON"),
        (["engine.deepspeed=list.json"], "engine.deepspeed", "must hold an object"),
        (["engine.deepspeed=zero.json"], "engine.deepspeed", "must hold an object"),
        (["engine.deepspeed=stage.json"], "engine.deepspeed", "must be 0, 1, 2 or 3, got 4"),
        (
            ["engine.deepspeed=batch.json"],
            "engine.deepspeed",
            "train_batch_size to 7, but engine.packs_per_step",
        ),
        (["engine.deepspeed=optimizer.json"], "engine.deepspeed", "remove it from the file"),
        (
            ["engine.deepspeed=bf16.json"],
            "engine.deepspeed",
            "bf16.enabled to true, but engine.precision",
        ),
        (["engine.precision=bf16", "engine.deepspeed=zero0"], "engine.deepspeed", "ZeRO stage 0"),
        (
            ["samples.prompts=[a cup]", "samples.height=30"],
            "samples.height",
            "a multiple of 4 pixels",
        ),
        (["samples.prompts=[a cup]", "samples.width=64"], "samples.width", "at most 32, got 64"),
        (
            ["samples.prompts=[a cup]", "samples.prompts.0.x=1"],
            "samples.prompts.0.x",
            "holds the single value 'a cup'",
        ),
        (["steps"], "--set", "expects key.path=value"),
        (["steps=[1"], "steps", "not valid YAML"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line_that_names_the_key(
    place, capsys, assignments, key, words
):
    line = said(capsys, ["--recipe", write_recipe(place), *overrides(*assignments)])
    assert line.startswith(f"{key}: ") and words in line


def test_a_source_without_one_usable_row_is_an_error_that_names_it_and_counts_the_causes(
    place, capsys
):
    write_t2i(
        place.folder / "bad" / "a.parquet",
        [t2i_row(image=b""), t2i_row(captions="{"), t2i_row(image=b"")],
    )
    line = said(
        capsys,
        [
            "--recipe",
            write_recipe(place),
            *overrides("data.sources=[{path: photos/t2i}, {path: bad, name: the bad one}]"),
        ],
    )
    assert line.startswith(
        "data.sources.1.path: source 'the bad one' at 'bad': none of its 3 rows can be used "
        "(empty_image 2, bad_json 1)"
    )


def test_sources_whose_paths_end_alike_get_different_names(place):
    run = prepare(
        write_recipe(
            place,
            data={
                "sources": [
                    {"path": "photos/t2i"},
                    {"path": str(place.photos / "t2i"), "weight": 2},
                ]
            },
        )
    )
    assert [source.name for source in run.sources] == ["photos/t2i", "photos/t2i (2)"]


def test_switches_that_need_an_image_to_generate_are_named_where_there_is_none(place, capsys):
    switches = ["flow_contrast=0.05", "supervise_until=0.5", "balance=gradient_norm"]
    given = [*(f"objective.{switch}" for switch in switches), "steps=10", "model.train=all"]
    expected = (
        "warning: no source has images to generate, without which nothing comes of "
        "objective.flow_contrast, objective.supervise_until, objective.balance."
    )
    recipe = write_recipe(place)
    for sources, wanted in (
        (["data.sources=[{path: photos/vlm}]"], [expected]),
        ([], []),
    ):
        assert main(["--recipe", recipe, "--dry-run", *overrides(*sources, *given)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if line.startswith("warning: no source has")] == wanted


@pytest.mark.parametrize(
    "assignments, warns",
    [
        (["data.sources=[{path: photos/vlm}]"], True),
        (["data.sources=[{path: photos/vlm}]", "model.train=all"], False),
        ([], False),
        (["data.sources=[{path: photos/vlm}]", "sequence.conversation_images=latents"], False),
    ],
)
def test_a_run_that_can_train_nothing_says_so_in_one_line(place, capsys, assignments, warns):
    assert main(["--recipe", write_recipe(place), "--dry-run", *overrides(*assignments)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [line.startswith("warning: nothing will train") for line in lines] == (
        [True] if warns else []
    )
