"""`train.py --dry-run`: what is absent is a warning where a recipe is planned for another machine,
what is wrong is not."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from no_launcher import environment_without_launcher, remove_launcher
from safetensors.torch import save_file
from small_runs import ARCHITECTURE, random_base, write_photos

from uno_ds.commands.estimate import main as estimate_main
from uno_ds.commands.train import main
from uno_ds.recipe import RECIPES, load_recipe
from uno_ds.settings import SettingsError

ROOT = Path(__file__).parents[2]
TURNED_FP16 = ROOT / "tests" / "turned_fp16"
FILES = ("llm_config.json", "vit_config.json", "ema.safetensors", "ae.safetensors")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and no launcher."""
    monkeypatch.chdir(tmp_path)
    remove_launcher(monkeypatch)
    return tmp_path


def answer(capsys: pytest.CaptureFixture, *arguments: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["--dry-run", "--json", *arguments]) == code
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    return json.loads(printed)


def refusal(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["--dry-run", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def published_files(folder: Path) -> Path:
    """A base folder that has BAGEL's configuration files and nothing else."""
    shutil.copytree(RECIPES / "bagel_7b", folder)
    return folder


@pytest.mark.parametrize("recipe", ["bagel_7b_uno", "bagel_7b_flow", "bagel_7b_uno_edit"])
def test_a_recipe_of_bagel_is_planned_without_its_base_and_data(capsys, recipe: str):
    reported = answer(capsys, "--recipe", recipe)
    assert reported["world_size"] == 8 and reported["gpu"] == {
        "name": "H100-80GB",
        "memory": 80 * 10**9,
        "fits": True,
    }
    base, *data = reported["warnings"]
    assert (
        base.startswith("model.base: models/BAGEL-7B-MoT is not a complete base")
        and all(name in base for name in FILES)
        and "'bagel_7b'" in base
    )
    assert all(line.startswith("data.sources.") for line in data) and len(data) == (
        2 if recipe.endswith("edit") else 1
    )
    own = reported["parameters"]["by_part"].get("metaqueries and their head", {"trainable": 0})[
        "trainable"
    ]
    assert own == (0 if recipe.endswith("flow") else 64 * 3584 + 1152 * 3584)
    assert (
        reported["parameters"]["trainable"] - own == 6_539_861_056
        and reported["parameters"]["frozen"] == 8_035_157_408
    )
    assert (
        reported["bytes_per_rank"]["peak"] > 20e9
        and reported["bytes_sent_per_step"]["total"] > 20e9
    )


def test_a_folder_with_configuration_files_only_lacks_its_weights_in_one_warning(
    capsys, elsewhere: Path
):
    base = published_files(elsewhere / "bagel")
    reported = answer(capsys, "--recipe", "bagel_7b_uno", "--set", f"model.base={base}")
    assert reported["warnings"][0] == (
        f"model.base: {base} lacks ema.safetensors, a tokenizer (tokenizer.json, or vocab.json and "
        "merges.txt), "
        "ae.safetensors, whose names and shapes were not checked."
    )
    assert (
        reported["warnings"][1].startswith(f"model.tokenizer: there is none in {base}")
        and reported["parameters"]["trainable"] == 6_544_219_200
    )


def test_what_is_there_is_checked_though_the_rest_is_absent(capsys, elsewhere: Path):
    base = published_files(elsewhere / "bagel")
    save_file({"vae2llm.weight": torch.zeros(3584, 65)}, base / "ema.safetensors")
    line = refusal(capsys, "--recipe", "bagel_7b_uno", "--set", f"model.base={base}")
    assert "the weights do not fit the architecture" in line and "(and 1216 more)" in line
    (base / "ema.safetensors").unlink()
    save_file({"encoder.conv_in.weight": torch.zeros(128, 3, 3, 3)}, base / "ae.safetensors")
    assert "is not the FLUX autoencoder" in refusal(
        capsys, "--recipe", "bagel_7b_uno", "--set", f"model.base={base}"
    )
    (base / "llm_config.json").write_text("{")
    assert "llm_config.json is not readable JSON" in refusal(
        capsys, "--recipe", "bagel_7b_uno", "--set", f"model.base={base}"
    )


def test_data_that_is_there_is_checked(capsys, elsewhere: Path):
    photos = write_photos(elsewhere / "photos")
    arguments = (
        "--recipe",
        "bagel_7b_uno",
        "--set",
        f"data.sources=[{{path: {photos['t2i']}}}, {{path: nowhere}}]",
    )
    assert [line for line in answer(capsys, *arguments)["warnings"] if "data" in line] == [
        "data.sources.1.path: 'nowhere' holds no data here, so none was checked."
    ]
    (elsewhere / "file.parquet").write_text("x")
    assert "data.sources.0.path" in refusal(
        capsys, "--recipe", "bagel_7b_uno", "--set", "data.sources.0.path=file.parquet"
    )


def test_a_kin_of_another_shape_is_planned_as_what_it_is(capsys, elsewhere: Path):
    base = random_base(elsewhere / "small")
    sizes = [
        f"data.{key}={{max_side: 32, min_side: 16, max_pixels: 1024}}"
        for key in ("latent_image", "vit_image")
    ]
    sets = [
        item
        for assignment in (f"model.base={base}", *sizes, "samples=")
        for item in ("--set", assignment)
    ]
    reported = answer(capsys, "--recipe", "bagel_7b_uno", *sets)
    assert (
        reported["parameters"]["by_part"]["language head"]["frozen"]
        == ARCHITECTURE["vocabulary"] * ARCHITECTURE["hidden"]
    )
    assert all("model" not in line for line in reported["warnings"])


def test_a_real_run_without_its_base_is_one_line_that_names_every_missing_file(capsys):
    assert main(["--recipe", "bagel_7b_uno"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and all(name in line for name in FILES)
    with pytest.raises(SettingsError, match="lacks llm_config.json, "):
        load_recipe("bagel_7b_uno")


def test_a_recipe_for_this_machine_takes_nothing_for_absent(capsys):
    lacks = (
        "models/BAGEL-7B-MoT is not a complete base: it lacks llm_config.json, vit_config.json, "
        "ema.safetensors, a tokenizer"
    )
    assert lacks in refusal(capsys, "--recipe", "bagel_7b_uno", "--set", "hardware.gpu=")
    assert "nowhere" in refusal(
        capsys, "--recipe", "tiny", "--set", "data.sources=[{path: nowhere}]"
    )


@pytest.mark.parametrize(
    ("ranks", "gpu", "config", "code"),
    [
        ("8", "H100-80GB", "zero3", 0),
        ("8", "H100-80GB", "zero1", 1),
        ("1", "H200-141GB", "zero3", 1),
        ("1", "H200-141GB", "zero3_offload", 0),
        ("1024", "A100-80GB", "zero3_multinode", 0),
        ("8", "L40S-48GB", "zero1", 1),
    ],
)
def test_what_does_not_fit_is_exit_code_1(capsys, ranks: str, gpu: str, config: str, code: int):
    reported = answer(
        capsys,
        "--recipe",
        "bagel_7b_uno",
        "--world-size",
        ranks,
        "--ds-config",
        config,
        "--set",
        f"hardware.gpu={gpu}",
        code=code,
    )
    assert reported["gpu"]["fits"] is (code == 0) and reported["world_size"] == int(ranks)
    assert (reported["bytes_per_rank"]["peak"] <= reported["gpu"]["memory"]) is (code == 0)


def test_the_text_names_parts_categories_and_the_verdict(capsys):
    assert main(["--dry-run", "--recipe", "bagel_7b_uno"]) == 0
    text = capsys.readouterr().out
    for words in (
        "warning: model.base",
        "valid for 8 rank(s); nothing was started",
        "generation expert",
        "6,525,628,928",
        "moving average",
        "sent in a step",
        "H100-80GB (80 GB): fits",
    ):
        assert words in text


@pytest.mark.parametrize(
    "arguments", [["--recipe", "tiny", "--json"], ["--recipe", "tiny", "--execute"]]
)
def test_flags_of_the_dry_run_are_refused_without_it(capsys, arguments: list[str]):
    assert main(arguments) == 2
    assert "go with --dry-run" in capsys.readouterr().err


def command(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = environment_without_launcher() | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), "--dry-run", *arguments],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
        timeout=600,
    )


def processor_seconds() -> float:
    """Of the children that have ended; unlike the wall's, a busy machine hardly moves it."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


# Also as on a processor with the other answer to whether it computes in fp16.
OTHER_PROCESSOR = {"PYTHONPATH": str(TURNED_FP16)}


@pytest.mark.parametrize(
    ("recipe", "ranks", "config", "precision", "variables"),
    [
        pytest.param("bagel_7b_uno_edit", 8, "zero3", "fp32", {}, marks=pytest.mark.slow),
        pytest.param(
            "bagel_7b_uno_edit", 8, "zero3", "fp32", OTHER_PROCESSOR, marks=pytest.mark.slow
        ),
        pytest.param("bagel_7b_uno", 1024, "zero3_multinode", "bf16", {}, marks=pytest.mark.slow),
    ],
)
def test_one_step_runs_as_rank_0_of_many_in_little_time_and_memory(
    elsewhere: Path, recipe: str, ranks: int, config: str, precision: str, variables: dict[str, str]
):
    """Also: one JSON object on standard output whatever libraries print, in at most ten times the
    processor time that the imports of `--help` cost here (seen: three times), and under 4 GB."""
    before = processor_seconds()
    assert command(elsewhere, "--help").returncode == 0
    imports = processor_seconds() - before
    done = command(
        elsewhere,
        "--recipe",
        recipe,
        "--world-size",
        str(ranks),
        "--ds-config",
        config,
        "--set",
        f"engine.precision={precision}",
        "--json",
        "--execute",
        **variables,
    )
    seconds = processor_seconds() - before - imports
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert done.returncode == 0, done.stderr
    ran = json.loads(done.stdout)["executed"]
    assert (ran["ranks"], ran["stage"], ran["step_applied"]) == (ranks, 3, True)
    assert (ran["precision"], ran["device"]) == (precision, "cpu")
    assert (
        ran["modules_called"] == ran["modules"] > 60
        and ran["trained_weights_moved"] == ran["trained_weights"] > 30
    )
    assert seconds < 10 * imports and largest < 4 * 10**9
    assert list(elsewhere.iterdir()) == []


def test_estimate_answers_for_a_scenario_without_opening_anything(capsys, elsewhere: Path):
    arguments = [
        "--recipe",
        "bagel_7b_uno",
        "--world-size",
        "8",
        "--scenario",
        "prompt=200,latents=4096,caption=200,metaqueries=256,samples=6",
        "--json",
    ]
    assert estimate_main(arguments) == 0
    reported = json.loads(capsys.readouterr().out)
    assert set(reported["flops"]) == {
        "flow_naive",
        "flow_structured",
        "uno_naive",
        "uno_structured",
    }
    assert (
        reported["flops"]["uno_structured"] == pytest.approx(1.215e15, rel=0.01)
        and reported["scenario"]["vit"] == 0
    )
    assert (
        reported["bytes_per_rank"]["peak"] > 20e9
        and reported["bytes_sent_per_step"]["total"] > 20e9
        and reported["world_size"] == 8
    )
    assert list(elsewhere.iterdir()) == []


def test_estimate_answers_for_recipes_and_refuses_in_one_line(capsys, elsewhere: Path):
    for recipe in ("tiny", "tiny_base", "bagel_7b_uno_edit"):
        assert estimate_main(["--recipe", recipe]) == 0
        assert "PFLOP of a pack" in capsys.readouterr().out
    for arguments in (
        ["--recipe", "nothing"],
        ["--recipe", "tiny", "--scenario", "x=1"],
        ["--recipe", "tiny", "--world-size", "0"],
        [],
    ):
        assert estimate_main(arguments) == 2
        printed = capsys.readouterr()
        assert (
            printed.err.startswith("error: ") and printed.err.count("\n") == 1 and printed.out == ""
        )
    assert list(elsewhere.iterdir()) == []
