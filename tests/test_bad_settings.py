"""Mistakes in a recipe, a flag, a file or the environment: one line that names what is at fault, before anything starts."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_runs import random_base, t2i_row, tree, write_photos, write_t2i

from uno_ds.commands.train import main
from uno_ds.recipe import merge, read_tree
from uno_ds.run import Run, prepare
from uno_ds.settings import SettingsError
from uno_ds.training.manifest import digest_of_manifest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Folder with data, a base and DeepSpeed files; it is the working directory, and `datasets` keeps its copies in it."""
    folder = tmp_path_factory.mktemp("settings")
    write_photos(folder / "photos")
    random_base(folder / "base")
    (folder / "file").write_text("x")
    files = {
        "broken": "{",
        "list": "[]",
        "stage": '{"zero_optimization": {"stage": 4}}',
        "zero": '{"zero_optimization": 3}',
        "batch": '{"train_batch_size": 7}',
        "optimizer": '{"optimizer": {"type": "AdamW"}}',
        "bf16": '{"bf16": {"enabled": true}}',
        "auto": '{"train_batch_size": "auto", "bf16": {"enabled": "auto"}, "gradient_accumulation_steps": 1}',
    }
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        yield SimpleNamespace(folder=folder, photos=folder / "photos")


def write_recipe(place: SimpleNamespace, **changes: Any) -> str:
    path = place.folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree(place.folder, [place.photos / "t2i"], **changes)))
    return str(path)


def said(capsys: pytest.CaptureFixture, arguments: list[str]) -> str:
    """The one line on stderr of a command line that must be refused."""
    capsys.readouterr()
    assert main([*arguments, "--dry-run"]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and output.err.count("\n") == 1 and output.out == ""
    return output.err.removeprefix("error: ").strip()


def overrides(*assignments: str) -> list[str]:
    return [argument for assignment in assignments for argument in ("--set", assignment)]


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
            "data.sources=[{path: photos/t2i}, {path: photos/t2i/00000.parquet}, {path: photos/edit}, {path: photos/vlm}]"
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
            "none of its 12 rows can be used (missing_image 12)",
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


@pytest.mark.parametrize(
    "text, key, words",
    [
        ("{", "--recipe", "not readable YAML"),
        ("- name: x", "--recipe", "must hold a mapping"),
        ("", "--recipe", "must hold a mapping"),
        ("when: 2001-99-99", "--recipe", "not readable YAML"),
        ("\x00", "--recipe", "not readable YAML"),
        ("extends: nothing", "extends", "'nothing' is neither a file nor one of bagel_7b_flow"),
        ("extends: recipe.yaml", "extends", "extends itself"),
        ("extends: sub/../recipe.yaml", "extends", ""),
        ("steps: 3", "name", "is required"),
        ("1: 2", "1", "unknown key"),
    ],
)
def test_a_recipe_that_is_no_recipe_is_one_line(place, capsys, text, key, words):
    (place.folder / "recipe.yaml").write_text(text)
    line = said(capsys, ["--recipe", str(place.folder / "recipe.yaml")])
    assert line.startswith(f"{key}: ") and words in line


def test_a_recipe_may_extend_a_file_beside_it_and_one_that_ships(place):
    """Values of the extending recipe win, key by key; its lists replace."""
    (place.folder / "sub").mkdir(exist_ok=True)
    (place.folder / "sub" / "below.yaml").write_text(
        "extends: tiny\nsteps: 5\nobjective: {caption_weight: 3}"
    )
    (place.folder / "sub" / "above.yaml").write_text(
        "extends: below.yaml\nobjective: {flow_weight: 7}\ndata: {sources: [{path: x}]}"
    )
    merged, tiny = read_tree(str(place.folder / "sub" / "above.yaml")), read_tree("tiny")
    assert merged["steps"] == 5 and merged["data"] == {**tiny["data"], "sources": [{"path": "x"}]}
    assert merged["objective"] == {**tiny["objective"], "caption_weight": 3, "flow_weight": 7}


@pytest.mark.parametrize(
    "arguments, key, words",
    [
        ([], "command line", "--recipe"),
        (
            ["--recipe", "nothing"],
            "--recipe",
            "'nothing' is neither a file nor one of bagel_7b_flow, bagel_7b_uno",
        ),
        (["--recipe", ""], "--recipe", ""),
        (["--recipe", 300 * "x"], "--recipe", "x"),
        (["--recipe", "photos"], "--recipe", "not readable"),
        (["--recipe", "tiny", "--sett", "a=1"], "command line", "--sett"),
        (["--recipe", "tiny", "--world-size", "two"], "command line", "--world-size"),
        (["--recipe", "tiny", "--world-size", "0"], "command line", "--world-size"),
        (
            ["--recipe", "recipe.yaml", "--world-size", "3"],
            "engine.packs_per_step",
            "give a multiple of 3",
        ),
        (
            ["--recipe", "recipe.yaml", "--ds-config", "zero9"],
            "engine.deepspeed",
            "zero9.json does not exist",
        ),
        (
            ["--recipe", "recipe.yaml", "--resume", "photos"],
            "--resume",
            "photos is not a complete checkpoint",
        ),
        (
            ["--recipe", "recipe.yaml", "--resume", "nowhere"],
            "--resume",
            "nowhere is not a complete checkpoint",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(place, capsys, arguments, key, words):
    write_recipe(place)
    line = said(capsys, arguments)
    assert line.startswith(f"{key}: ") and words in line


LANE = {"draws": 0, "positions": [0], "waiting": None, "skipped": {}}


@pytest.mark.parametrize(
    "manifest, key",
    [
        ({"format": 9}, "--resume"),
        ({"step": None}, "--resume"),
        ({"lanes": {"0": LANE | {"positions": [0, 0]}}}, "data.sources"),
        ({"lanes": {"0": LANE, "1": LANE}}, "engine.packs_per_step"),
    ],
)
def test_a_checkpoint_of_another_run_is_one_line(place, capsys, manifest, key):
    counts = ("step", "optimizer_steps", "world_size", "stage", "ema_updates", "skipped_steps")
    given = {
        "format": 1,
        **dict.fromkeys(counts, 1),
        **dict.fromkeys(("base", "tokenizer", "frozen_checksum"), ""),
        **{key: {} for key in ("architecture", "frozen", "files", "shapes", "rows")},
        "recent_losses": [],
        "lanes": {"0": LANE},
        **manifest,
    }
    (place.folder / "old").mkdir(exist_ok=True)
    (place.folder / "old" / "manifest.json").write_text(
        json.dumps({**given, "hash": digest_of_manifest(given)})
    )
    line = said(capsys, ["--recipe", write_recipe(place), "--resume", "old"])
    assert line.startswith(f"{key}: ")


@pytest.mark.parametrize(
    "ranks, key, words",
    [
        (
            "2",
            "engine.packs_per_step",
            "is 3 and does not divide into 2 ranks; give a multiple of 2",
        ),
        ("x", "WORLD_SIZE", "got 'x'"),
        ("0", "WORLD_SIZE", "got '0'"),
    ],
)
def test_the_number_of_ranks_of_the_launcher_is_checked(
    place, capsys, monkeypatch, ranks, key, words
):
    place_of_rank = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**place_of_rank, "WORLD_SIZE": ranks}.items():
        monkeypatch.setenv(name, value)
    line = said(capsys, ["--recipe", write_recipe(place, engine={"packs_per_step": 3})])
    assert line.startswith(f"{key}: ") and words in line


def missing(folder: Path) -> None:
    tensors = load_file(folder / "ema.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != "vae2llm.weight"},
        folder / "ema.safetensors",
    )


def misshapen(folder: Path) -> None:
    tensors = load_file(folder / "ema.safetensors")
    save_file({**tensors, "llm2vae.bias": torch.zeros(7)}, folder / "ema.safetensors")


def truncated(folder: Path) -> None:
    (folder / "ema.safetensors").write_bytes((folder / "ema.safetensors").read_bytes()[:5000])


def other_heads(folder: Path) -> None:
    config = json.loads((folder / "llm_config.json").read_text())
    (folder / "llm_config.json").write_text(json.dumps({**config, "num_attention_heads": 7}))


@pytest.mark.parametrize(
    "damage, words",
    [
        (missing, "vae2llm.weight is missing"),
        (misshapen, "llm2vae.bias has shape [7] instead of [48]"),
        (truncated, "not a readable safetensors file"),
        (other_heads, "heads"),
        (lambda folder: (folder / "ema.safetensors").unlink(), "lacks ema.safetensors"),
        (
            lambda folder: (folder / "llm_config.json").write_text("{"),
            "llm_config.json is not readable JSON",
        ),
        (lambda folder: (folder / "vit_config.json").unlink(), "lacks vit_config.json"),
    ],
)
def test_a_base_that_does_not_fit_is_one_line_that_names_what_is_wrong(
    place, tmp_path, capsys, damage, words
):
    base = random_base(tmp_path / "base")
    damage(base)
    line = said(
        capsys,
        [
            "--recipe",
            write_recipe(place),
            *overrides("model.architecture=", "model.tokenizer=", f"model.base={base}"),
        ],
    )
    assert line.startswith("model.base") and words in line


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
        "data.sources.1.path: source 'the bad one' at 'bad': none of its 3 rows can be used (empty_image 2, bad_json 1)"
    )


def test_sources_whose_paths_end_alike_get_different_names(place):
    run = prepared(
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


def prepared(recipe: str) -> Run:
    return prepare(recipe)


def slots(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a tree."""
    pairs = (
        list(node.items())
        if isinstance(node, dict)
        else list(enumerate(node))
        if isinstance(node, list)
        else []
    )
    return [slot for key, value in pairs for slot in [(node, key), *slots(value)]]


# Without the separators and ~ that would lead out of the test's folder. Big numbers are not given to `rows`: they would be drawn.
words = st.text("ab.*é\n{ %0", max_size=6)
whole = st.sampled_from([-1, 0, 1, 2, 3, 7, 31, 64, 600])
names = st.sampled_from(
    [
        "1e-4",
        "nan",
        "zero0",
        "zero2",
        "all",
        "scenes/edit",
        "photos/vlm",
        "base",
        "tiny_base",
        "flux",
        "random",
    ]
)
values = st.one_of(
    st.none(),
    st.booleans(),
    whole,
    st.sampled_from([10**30, 10**400, -0.5, 0.0, 0.5, 1.0, 1e300]),
    names,
    words,
    st.lists(whole, max_size=3),
    st.lists(words, max_size=2),
    st.dictionaries(words, whole, max_size=2),
)


# A failing recipe is small as it is; shrinking it further would take minutes.
@hypothesis_settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
@given(st.data())
def test_any_recipe_is_prepared_or_refused_with_a_key(place, data):
    """One to three changes, additions or deletions anywhere in the recipes that ship."""
    recipe = data.draw(st.sampled_from(["tiny", "tiny_base"]))
    shared = {"output": "runs", "data": {"folder": "drawn", "scenes": {"rows": 24}}}
    given_base = {"model": {"base": "base"}} if recipe == "tiny" else {}
    mutated = copy.deepcopy(merge(merge(read_tree(recipe), shared), given_base))
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(slots(mutated)), label="where")
        action = data.draw(
            st.sampled_from(["change", "change", "change", "delete", "add"]), label="how"
        )
        value = data.draw(whole if key in ("rows", "max_side") else values, label="what")
        if action == "delete":
            del container[key]
        elif action == "add" and isinstance(container, dict):
            container[data.draw(words | st.integers(), label="new key")] = value
        else:
            container[key] = value
        if not mutated:
            break
    path = place.folder / "mutated.yaml"
    path.write_text(yaml.safe_dump(mutated, allow_unicode=True), encoding="utf-8")
    try:
        prepared(str(path))
    except SettingsError as error:
        assert error.key and len(str(error).splitlines()) == 1


def command(
    place: SimpleNamespace, *arguments: str, launcher: tuple[str, ...] = (sys.executable,)
) -> subprocess.CompletedProcess[str]:
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    }
    return subprocess.run(
        [*launcher, str(ROOT / "scripts" / "train.py"), *arguments],
        cwd=place.folder,
        env=environment,
        text=True,
        capture_output=True,
        timeout=600,
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["--recipe", "recipe.yaml", "--set", "sequence.metaquery_grid=0"],
            "sequence.metaquery_grid: is 0",
        ),
        (
            ["--recipe", "recipe.yaml", "--set", "data.sources.0.path=bad_only"],
            "data.sources.0.path: source 'bad_only'",
        ),
    ],
)
def test_the_command_line_refuses_with_one_line_and_exit_code_2_and_writes_nothing(
    place, arguments, words
):
    write_recipe(place)
    write_t2i(place.folder / "bad_only" / "a.parquet", [t2i_row(image=b"")] * 3)
    before = {path for path in place.folder.rglob("*") if "cache" not in path.parts}
    done = command(place, *arguments)
    assert (
        done.returncode == 2
        and done.stderr.startswith(f"error: {words}")
        and done.stderr.count("\n") == 1
    )
    assert "Traceback" not in done.stdout
    assert {path for path in place.folder.rglob("*") if "cache" not in path.parts} == before


def test_help_ends_well_and_names_every_flag(place):
    done = command(place, "--help")
    flags = (
        "--recipe",
        "--set",
        "--ds-config",
        "--resume",
        "--dry-run",
        "--world-size",
        "--json",
        "--execute",
        "exit codes:",
    )
    assert done.returncode == 0 and done.stderr == "" and all(flag in done.stdout for flag in flags)


@pytest.mark.distributed
def test_two_ranks_refuse_with_one_line_of_one_of_them(place):
    """The second rank would speak after ten seconds; the launcher has ended it long before."""
    launcher = (
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        "29641",
    )
    write_recipe(place, engine={"packs_per_step": 3})
    done = command(place, "--recipe", "recipe.yaml", launcher=launcher)
    errors = [line for line in (done.stdout + done.stderr).splitlines() if "error: " in line]
    assert (
        done.returncode == 2
        and len(errors) == 1
        and "engine.packs_per_step: is 3 and does not divide into 2 ranks" in errors[0]
    )
    assert "Traceback" not in done.stdout + done.stderr
