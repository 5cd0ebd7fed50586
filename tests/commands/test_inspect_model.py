"""The command that looks inside models: one folder with everything, mistakes in one line, work that
goes on where it stopped and is shared by ranks."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import random_base, t2i_row, write_t2i, write_vlm

from uno_ds.commands.inspect_model import main
from uno_ds.generation.inference_model import open_model
from uno_ds.inspection.plan import PARTS
from uno_ds.inspection.store import Store
from uno_ds.inspection.subject import subject_of
from uno_ds.model.tensor_file import write_tensors
from uno_ds.model.weights import EXTRA_FILE
from uno_ds.objectives.uno import ObjectiveSettings
from uno_ds.settings import SettingsError, build

ROOT = Path(__file__).parents[2]
IMAGES, SIDE = 20, 3


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> tuple[Path, Path]:
    """(a base, the same with metaqueries and their head)."""
    folder = tmp_path_factory.mktemp("bases")
    plain, with_queries = random_base(folder / "plain"), random_base(folder / "uno")
    generator = torch.Generator().manual_seed(0)
    added = {
        "metaqueries.weight": torch.randn(SIDE**2, 32, generator=generator),
        "regression.weight": torch.randn(24, 32, generator=generator),
    }
    layout = {name: (torch.float32, tensor.shape) for name, tensor in added.items()}
    write_tensors(with_queries / EXTRA_FILE, layout, iter(added.values()), {"format": "pt"})
    return plain, with_queries


def words(bases: tuple[Path, ...], out: Path, *more: object) -> list[str]:
    flags = [word for base in bases for word in ("--checkpoint", str(base))]
    flags += ["--out", str(out), "--images", str(IMAGES), "--batch", "8", "--t", "0.2,0.8"]
    flags += ["--scene-prompts", "3", "--steps", "2", "--max-tokens", "4", "--gradient-images", "3"]
    return [*flags, *map(str, more)]


@pytest.fixture(scope="module")
def report(bases, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out.parent)
        assert main(words(bases, out)) == 0
    return out


def test_the_folder_holds_a_page_that_needs_no_other_file_figures_and_every_number(report):
    page = (report / "report.html").read_text()
    assert 'src="data:image/png;base64,' in page
    assert "http" not in page and 'src="figures' not in page
    assert "<b>Chance</b>" in page and "<th>shuffled, mean</th>" in page
    figures = {path.name for path in (report / "figures").iterdir()}
    assert figures == {
        "maps_0.png",
        "maps_1.png",
        "alignment_vit.png",
        "spatial.png",
        "probes.png",
        "reading.png",
        "metaqueries_uno.png",
        "gradients.png",
        "gradients_layers.png",
        "diagnosis.png",
    }
    results = json.loads((report / "results.json").read_text())
    assert set(results) == {"settings", "spatial_of_targets", *PARTS}
    assert len(list((report / "pictures/plain").iterdir())) == 3
    for key in ("plain", "uno"):
        found = results["alignment"][key]["vit"]["cknna"]
        assert len(found) == 2 and all(len(layer) == 2 for layer in found)
        compared = results["alignment"][key]["vit"]
        for measure in ("cknna", "cka"):
            pairs = zip(compared[measure], compared[f"{measure}_shuffled"], strict=True)
            assert all(one != shuffled for pair in pairs for one, shuffled in zip(*pair))
        assert results["gradients"][key]["0.2"]["losses"][:2] == ["flow", "caption"]
        cells = results["diagnosis"][key]
        assert sum(cells["cells"].values()) == cells["judged"] == 3
        for level in results["reading"][key]["levels"]:
            assert len(level["texts"]) == IMAGES and level["right"]["all"] <= 1
    assert "regression" in results["gradients"]["uno"]["0.8"]["losses"]
    assert "cosine" not in results["reading"]["plain"]["levels"][0]
    assert len(results["reading"]["uno"]["levels"][0]["cosine_of_cells"]) == SIDE**2


def test_equal_models_see_the_same_images_with_the_same_noise(report):
    # The second base has the weights of the first, and metaqueries that no latent sees.
    results = json.loads((report / "results.json").read_text())
    # Other rows in a pack change the last bits.
    first, second = (results["alignment"][key]["vit"] for key in ("plain", "uno"))
    for measure in ("cknna", "cka"):
        for one, other in zip(first[measure], second[measure], strict=True):
            assert one == pytest.approx(other, rel=1e-4)
    levels = (results["reading"][key]["levels"] for key in ("plain", "uno"))
    for first, second in zip(*levels, strict=True):
        assert first["texts"] == second["texts"]
        assert first["cross_entropy"]["mean"] == pytest.approx(
            second["cross_entropy"]["mean"], rel=1e-5
        )


def assert_same(out: Path, report: Path) -> None:
    results, expected = (
        json.loads((folder / "results.json").read_text()) for folder in (out, report)
    )
    assert results["reading"] == expected["reading"]


def test_a_call_that_was_stopped_goes_on_and_gives_the_same(
    report, bases, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(report.parent)
    written: list[str] = []
    write = Store.write

    def interrupted(self, name, arrays, values):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, arrays, values)

    out = tmp_path / "out"
    monkeypatch.setattr(Store, "write", interrupted)
    few = words(bases, out, "--only", "reading")
    assert main(few) == 130
    assert "continues" in capsys.readouterr().err and not (out / "report.html").exists()
    again: list[str] = []
    monkeypatch.setattr(
        Store, "write", lambda self, name, a, v: (again.append(name), write(self, name, a, v))
    )
    assert main(few) == 0
    assert not set(written) & set(again)
    assert_same(out, report)


def test_ranks_share_the_work_and_the_last_one_reports(
    report, bases, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(report.parent)
    out = tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert main(words(bases, out, "--only", "reading")) == 0
        assert (out / "report.html").exists() == (rank == 0)
    assert_same(out, report)
    (out / "report.html").unlink()
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert main(words(bases, out, "--only", "reading")) == 0
        assert (out / "report.html").exists() == (rank == 0), "nothing is left, and one reports"
    assert "rank 1 of 2 has done its share" in capsys.readouterr().out


def test_other_data_has_no_scenes_and_no_diagnosis(bases, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [t2i_row(seed=seed) for seed in range(24)]
    rows[3] = t2i_row(b"no picture", seed=3)
    write_t2i(tmp_path / "photos/0.parquet", rows)
    out = tmp_path / "out"
    flags = ("--data", tmp_path / "photos", "--without-prompts", "--layers", "2", "--shown", "1")
    assert main(words(bases[:1], out, *flags, "--images", "24")) == 0
    output = capsys.readouterr()
    assert "no diagnosis: --prompts" in output.err
    assert ": 23 images of " in output.out and "; skipped rows: " in output.out
    results = json.loads((out / "results.json").read_text())
    assert "diagnosis" not in results
    assert set(results["probes"]["plain"]) == {"vit"}
    level = results["reading"]["plain"]["levels"][0]
    assert level["right"] is None and len(level["texts"]) == 23
    assert len(results["alignment"]["plain"]["vit"]["cka"]) == 1


def test_another_encoder_is_a_second_target(bases, tmp_path, monkeypatch):
    from transformers import Dinov2Config, Dinov2Model

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    (tmp_path / "dino/preprocessor_config.json").write_text('{"size": {"shortest_edge": 42}}')
    out = tmp_path / "out"
    flags = ("--encoder", tmp_path / "dino", "--only", "alignment", "--layers", "1")
    assert main(words(bases[:1], out, *flags)) == 0
    found = json.loads((out / "results.json").read_text())["alignment"]["plain"]
    assert {"vit", "encoder"} <= set(found) and found["encoder"] != found["vit"]
    assert (out / "figures/alignment_encoder.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--t", "0.5,2"], "--t: must be noise levels from 0 to 1"),
        (["--t", ""], "--t: must be noise levels"),
        (["--layers", "3"], "--layers: must be numbers from 1 to 2"),
        (["--only", "probes,colour"], "--only: knows no part 'colour'; allowed are maps"),
        (["--images", "19"], "--images: must be 20 to"),
        (["--batch", "0"], "--batch: must be 1 to"),
        (["--data", "nowhere"], "--data: source 'nowhere' at 'nowhere': there is no parquet"),
        (["--data", "scenes/vlm"], "has no images to generate"),
        (["--recipe", "bagel_7b_uno"], "--recipe: its data.latent_image.max_side is 1024"),
        (["--recipe", "bad.yaml"], "--recipe: its sequence must be a mapping"),
        (["--recipe", "unknown"], "--recipe: 'unknown' is neither a file nor one of"),
        (["--encoder", "nowhere", "--only", "alignment"], "--encoder: 'nowhere' is no folder"),
        (["--prompts", "nowhere.txt"], "--prompts: 'nowhere.txt'"),
        (["--steps", "0"], "--steps: must be at least 1"),
        (["--checkpoint", "nowhere"], "--checkpoint: 'nowhere' does not exist"),
        (["--checkpoint", "tiny_base"], "--checkpoint: tiny_base has another"),
        (["--unknown"], "command line: unrecognized arguments"),
        (["--images", "x"], "command line: argument --images"),
    ],
)
def test_every_mistake_is_one_line_before_anything_is_computed(
    bases, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("sequence: 5\n")
    assert main(words(bases[:1], tmp_path / "out", *flags)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not list(tmp_path.glob("out/work/*/*"))


def test_work_of_other_settings_is_refused_and_replaced_on_request(
    bases, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = ("--only", "gradients")
    assert main(words(bases[:1], tmp_path / "out", *flags)) == 0
    assert main(words(bases[:1], tmp_path / "out", *flags, "--seed", "1")) == 2
    assert "give another folder, or --overwrite" in capsys.readouterr().err
    assert main(words(bases[:1], tmp_path / "out", *flags, "--seed", "1", "--overwrite")) == 0


def test_without_scikit_learn_probes_are_left_out_unless_asked_for(
    bases, tmp_path, monkeypatch, capsys
):
    def missing() -> None:
        raise SettingsError("--only", "probes needs scikit-learn.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("uno_ds.commands.inspect_model.check_probes", missing)
    assert main(words(bases[:1], tmp_path / "out", "--only", "probes")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr("uno_ds.commands.inspect_model.Inspection.run", lambda self: None)
    assert main(words(bases[:1], tmp_path / "out")) == 0
    assert "warning: no probes: --only: probes needs" in capsys.readouterr().err


def test_a_model_with_metaqueries_that_do_not_fit_is_refused(bases):
    opened = open_model(bases[0])
    added = {"metaqueries.weight": torch.zeros(9, 7), "regression.weight": torch.zeros(24, 32)}
    with pytest.raises(SettingsError, match="metaqueries.weight has shape"):
        subject_of(opened, added, ObjectiveSettings())
    added["metaqueries.weight"] = torch.zeros(8, 32)
    with pytest.raises(SettingsError, match="metaqueries.weight"):
        subject_of(opened, added, ObjectiveSettings())


def test_a_model_without_metaqueries_has_no_regression_and_keeps_the_other_weights(bases):
    settings = build(ObjectiveSettings, {"caption_weight": 0.3, "regression_weight": 0.9})
    subject = subject_of(open_model(bases[0]), {}, settings)
    expected = dataclasses.replace(settings, regression_weight=0.0, regression_target="vit")
    assert dataclasses.replace(subject.objective.settings, regression_target="vit") == expected
    assert subject.metaqueries == 0 and subject.objective.regression is None


def test_prompts_are_drawn_asked_about_and_judged_later(bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    flags = ("--only", "diagnosis", "--prompts", path)
    lines = [{"prompt": "a cup.", "questions": [["what is it?", "a cup"]]}, {"prompt": "two cups."}]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert main(words(bases[:1], out, *flags)) == 0
    found = json.loads((out / "results.json").read_text())["diagnosis"]["plain"]
    assert (found["judged"], found["not_judged"]) == (0, 2)
    question, wanted, answer = found["records"][0]["answers"][0]
    assert (question, wanted) == ("what is it?", "a cup") and isinstance(answer, str)
    # The verdicts of a judge who has seen the pictures; nothing is drawn again.
    drawn = sorted((out / "work/plain").iterdir())
    times = [file.stat().st_mtime_ns for file in drawn]
    lines[0]["drawn_right"] = {"plain": False}
    path.write_text("\n".join(map(json.dumps, lines)))
    assert main(words(bases[:1], out, *flags)) == 0
    assert [file.stat().st_mtime_ns for file in drawn] == times
    found = json.loads((out / "results.json").read_text())["diagnosis"]["plain"]
    assert (found["judged"], found["not_judged"]) == (1, 1)
    assert (
        found["cells"]["drawn wrong, read right"] + found["cells"]["drawn wrong, read wrong"] == 1
    )


def test_too_few_rows_are_refused(bases, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_t2i(tmp_path / "few/0.parquet", [t2i_row(seed=seed) for seed in range(5)])
    assert main(words(bases[:1], tmp_path / "out", "--data", tmp_path / "few")) == 2
    assert "has 5 usable rows; at least 20 are needed." in capsys.readouterr().err


def test_make_inspect_says_what_to_run_where_there_is_no_run(tmp_path):
    for name in ("Makefile", "constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    # An installation that is newer than what it depends on.
    (tmp_path / ".venv/.installed").touch()
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    made = subprocess.run(
        ["make", "inspect"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert made.returncode != 0 and "runs/tiny has no checkpoint: run 'make demo'" in made.stdout


def test_conversations_have_nothing_to_look_at(bases, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_vlm(tmp_path / "vlm", ["0.jpg"])
    assert main(words(bases[:1], tmp_path / "out", "--data", tmp_path / "vlm")) == 2
    assert "give a t2i or edit source" in capsys.readouterr().err


def test_figures_show_something_and_tokens_of_an_image_differ(report):
    for path in (report / "figures").iterdir():
        assert np.asarray(Image.open(path).convert("L")).std() > 5, path
    results = json.loads((report / "results.json").read_text())
    for layer in results["alignment"]["uno"]["spatial"]["contrast"]:
        assert all(0 < value < math.sqrt(2) for value in layer)
