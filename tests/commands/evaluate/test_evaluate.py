"""evaluate.py from a prompt file to a report, for every benchmark, with a judge that answers by
rule."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from benchmark_files import WRITERS, rule
from evaluate_command import JUDGED, ROOT, generate, result, run, score, values
from judge_server import JudgeServer
from PIL import Image

from uno_ds.commands.evaluate import main, sized
from uno_ds.evaluation.benchmarks import BENCHMARKS
from uno_ds.sequence.composition import Geometry

# What `rule` answers, by hand.
TWO, THREE, YES = math.exp(-0.5) + math.exp(-3.0), math.exp(-2.0), math.exp(-0.1) + math.exp(-3.0)
# Three rows each of two, three and four, which has no probability, and one of four questions.
AM = 100 * (3 * ((TWO + YES) / 2 + (THREE + YES) / 2 + YES / 2) + (TWO + 3 * YES) / 4) / 10
EXPECTED = {
    "geneval2": {"AM": AM, "AM, attribute": 100 * YES},
    # Of three questions the first is yes, the second no, and the third loses its point to the
    # second; the first text has a fourth, which is yes.
    "dpg": {"overall": 100 * (2 / 4 + 1 / 3 + 1 / 3) / 3, "entity": 100.0, "attribute": 0.0},
    # Style holds everywhere; of Attribute: size fails six times and colour holds three times, in
    # ten rows of 1, 2, 3, 1 ... points.
    "unigenbench": {"overall": (100 + 100 / 3) / 2, "Style": 100.0, "Attribute": 100 / 3},
    "gedit": {"overall": math.sqrt(4 * 8), "SC": 4.0, "PQ": 8.0, "ps_human": math.sqrt(32)},
    "imgedit": {"overall": 4.0, "add": 4.0},
    # Consistency 5, quality 4 everywhere; instruction 1, but 3 in the three rows of knowledge,
    # which have knowledge 2 too.
    "kris": {
        "overall": (10 * 100 + 10 * 75 + 7 * 0 + 3 * (50 + 25)) / 33,
        "knowledge": 25.0,
        "instruction": 15.0,
        "biology": (100 + 75 + 50 + 25) / 4,
        "practical_knowledge": (100 + 75 + 50 + 25) / 4,
        "rule-based_reasoning": (100 + 75 + 50 + 25) / 4,
        "temporal_prediction": (100 + 75 + 0) / 3,
    },
}


FAULTS = ("429", "500", "broken", "refusal", "empty", "no_logprobs")


def every_other_request_fails(number: int) -> str | None:
    return FAULTS[number // 2 % len(FAULTS)] if number % 2 else None


@pytest.mark.parametrize("name", JUDGED)
def test_a_prompt_file_is_drawn_asked_about_and_scored(name, base, tmp_path, capsys):
    data, out = WRITERS[name](tmp_path), tmp_path / "out"
    assert generate(name, base, data, out) == 0, capsys.readouterr().err
    with JudgeServer(rule, every_other_request_fails) as server:
        server.delay = 0.002
        assert score(name, out, server, "--retries", 40) == 0, capsys.readouterr().err
        asked = len(server.seen)
        assert asked > result(out)["counts"]["asked"] and not result(out)["failures"]
        # A second call asks nothing, and gives the same result.
        first = values(out)
        assert score(name, out, server) == 0 and len(server.seen) == asked
        counts = result(out)["counts"]
        assert values(out) == first and counts["kept"] == counts["questions"] > 0
    for column, expected in EXPECTED[name].items():
        assert values(out)[column] == pytest.approx(expected), column
    scorer = result(out)["scorer"]
    assert scorer["name"] == "rule/1" and scorer["endpoint"].startswith("127.0.0.1:")
    assert ("prompts_sha256" in scorer) == bool(BENCHMARKS[name].prompt_files)
    assert result(out)["generation"]["settings"]["seed"] == 0


def assert_same_image(ours: Path, theirs: Path) -> None:
    """One seed and prompt, and pixels but for the rounding of what they were computed together
    with."""
    first, second = Image.open(ours), Image.open(theirs)
    assert first.text == second.text
    gap = np.asarray(first).astype(int) - np.asarray(second).astype(int)
    assert np.abs(gap).max() <= 1


LAYOUT = {
    "geneval": ["00000/metadata.jsonl", "00000/samples/00003.png", "00009/samples/00000.png"],
    "geneval2": ["00009.png"],
    "dpg": ["cup0.png", "cup2.png"],
    "unigenbench": ["0_0.png", "9_3.png"],
    "parti": ["00009.png"],
    "coco": ["000000000006.png"],
    "gedit": ["fullset/ps_human/en/key4.png", "fullset/text_change/en/key3_SRCIMG.png"],
    "imgedit": ["109.png"],
    "kris": ["biology/7.jpg", "multi-element_composition/2.jpg"],
}


@pytest.mark.parametrize("name", WRITERS)
def test_images_lie_where_the_official_scorer_reads_them(name, base, tmp_path, capsys):
    data, out = WRITERS[name](tmp_path), tmp_path / "out"
    assert generate(name, base, data, out) == 0, capsys.readouterr().err
    for path in LAYOUT[name]:
        assert (out / "images" / path).is_file(), path
    record = json.loads((out / "evaluation.json").read_text())
    settings = record["settings"]
    assert settings["shift"] == 3.0
    # BAGEL's of this benchmark, but for the one step of this test.
    own = {key: value for key, value in BENCHMARKS[name].sampler.items() if key != "steps"}
    assert own.items() <= settings.items() and "guidance_interval" in own
    assert settings["renormalise"] == own.get("renormalise", "global")
    assert record["data"]["sha256"] and record["checkpoint"]["weights"]
    seeds = [json.loads(line) for line in (out / "seeds.jsonl").read_text().splitlines()]
    assert all((out / row["image"]).is_file() for row in seeds)
    assert len({row["seed"] for row in seeds}) == len(seeds)
    if not BENCHMARKS[name].is_edit:
        size = settings["width"], settings["height"]
        assert Image.open(out / seeds[0]["image"]).size == size


def test_bagels_settings_of_each_benchmark():
    for name, benchmark in BENCHMARKS.items():
        if name == "scenes":
            assert benchmark.sampler == {}
            continue
        assert benchmark.sampler["steps"] == 49 and benchmark.sampler["text_guidance"] == 4.0
        low = 0.4 if name == "gedit" else 0.0
        assert benchmark.sampler["guidance_interval"] == [low, 1.0]
    assert BENCHMARKS["gedit"].sampler["image_guidance"] == 1.5
    assert BENCHMARKS["gedit"].sampler["renormalise"] == "global"
    for name in ("imgedit", "kris"):
        assert BENCHMARKS[name].sampler["image_guidance"] == 2.0
        assert BENCHMARKS[name].sampler["renormalise"] == "text-channel"


def test_pictures_have_bagels_size_or_the_largest_square_of_the_model():
    def size(latent_side: int, **given: int) -> tuple[int, int]:
        settings = sized(dict(given), Geometry(16, 64, latent_side, 14, 70))
        return settings.height, settings.width

    assert size(64) == size(256) == (1024, 1024)
    assert size(32) == (512, 512) and size(64, height=512) == (512, 1024)


def test_official_layouts_hold_what_their_scorers_need(base, tmp_path):
    """GenEval reads the row beside the samples, GenEval2 a JSON object of paths, DPG quarters of a
    grid."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    assert generate("geneval", base, WRITERS["geneval"](tmp_path / "a"), tmp_path / "a/out") == 0
    row = json.loads((tmp_path / "a/out/images/00001/metadata.jsonl").read_text())
    assert row["tag"] == "two_object" and row["include"] == [
        {"class": "cup", "count": 1},
        {"class": "dog", "count": 1},
    ]
    assert generate("geneval2", base, WRITERS["geneval2"](tmp_path / "b"), tmp_path / "b/out") == 0
    paths = json.loads((tmp_path / "b/out/image_filepaths.json").read_text())
    assert len(paths) == 10 and all(Path(path).is_file() for path in paths.values())
    assert generate("dpg", base, WRITERS["dpg"](tmp_path / "c"), tmp_path / "c/out") == 0
    grid = Image.open(tmp_path / "c/out/images/cup1.png")
    single = Image.open(tmp_path / "c/out/singles/cup1_2.png")
    side = single.width
    assert grid.size == (2 * side, 2 * side)
    assert grid.crop((0, side, side, 2 * side)).tobytes() == single.convert("RGB").tobytes()


def test_a_second_call_draws_what_is_missing_and_nothing_else(base, tmp_path, capsys):
    out = tmp_path / "out"
    assert generate("scenes", base, None, out, "--limit", 6) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    (out / "images/00002.png").rename(tmp_path / "before.png")
    (out / "images/.00002.png.0a1b2c3d.part").write_bytes(b"torn")
    capsys.readouterr()
    assert generate("scenes", base, None, out, "--limit", 8, "--batch", 3) == 0
    assert "scenes: 8 images in " in (output := capsys.readouterr().out)
    assert output.endswith(": 3 drawn, 5 were there\n")
    after = {path.name: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    assert len(after) == 8 and not any(name.endswith(".part") for name in after)
    assert all(after[name] == before[name] for name in before if name != "00002.png")
    # Drawn again alone, from the noise of its own seed.
    assert_same_image(out / "images/00002.png", tmp_path / "before.png")


def test_shards_and_ranks_draw_the_images_of_one_process(base, tmp_path, monkeypatch):
    data = WRITERS["unigenbench"](tmp_path)
    assert generate("unigenbench", base, data, tmp_path / "one") == 0
    assert generate("unigenbench", base, data, tmp_path / "two", "--shard", "2/2") == 0
    shard = len(list((tmp_path / "two/images").iterdir()))
    assert shard == 20
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29999")
    for rank in ("1", "0"):
        for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, value)
        assert generate("unigenbench", base, data, tmp_path / "two", "--shard", "1/2") == 0
    # deepspeed puts a flag of its own before the command.
    assert main(["--local_rank=0", "generate", "--benchmark", "nobody", "--checkpoint", "x"]) == 2
    ours = sorted((tmp_path / "one/images").iterdir())
    assert len(ours) == 40
    for path in ours:
        assert_same_image(path, tmp_path / "two/images" / path.name)


def test_a_killed_call_goes_on_where_it_was(base, tmp_path):
    out = tmp_path / "out"
    words = [sys.executable, str(ROOT / "scripts/evaluate.py"), "generate", "--benchmark", "scenes"]
    words += ["--checkpoint", str(base), "--out", str(out), "--limit", "60", "--batch", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*words, "--set", "samples.steps=40"], env=environment)
    images = out / "images"
    deadline = time.monotonic() + 200
    while not (images.is_dir() and len(list(images.glob("*.png"))) >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    drawn = list(images.glob("*.png"))
    assert 3 <= len(drawn) < 60
    for path in drawn:
        Image.open(path).load()
    assert run("score", "--benchmark", "scenes", "--images", out)[0] == 2
    assert run("score", "--benchmark", "scenes", "--images", out, "--allow-missing")[0] == 0
    assert len(result(out, "program")["rows"]) == len(drawn)


@pytest.mark.slow
def test_the_tiny_base_has_its_recorded_figures(tmp_path):
    """Those of benchmarks/results, which another command measured: 200 prompts, 25 steps, guidance
    4. A picture more or less is rounding on another processor."""
    recorded = json.loads((ROOT / "benchmarks/results/scenes-tiny_base.json").read_text())
    (before,) = recorded["measurements"]
    words = ["--benchmark", "scenes", "--checkpoint", "tiny_base", "--out", tmp_path / "out"]
    assert run("generate", *words, "--batch", 50, "--set", "samples.steps=25")[0] == 0
    assert run("score", "--benchmark", "scenes", "--images", tmp_path / "out")[0] == 0
    ours = values(tmp_path / "out", "program")
    for aspect, share in before["right"].items():
        assert ours[aspect] == pytest.approx(100 * share, abs=0.51), aspect
    for kind, share in before["all_by_kind"].items():
        assert ours[f"all, {kind}"] == pytest.approx(100 * share, abs=1.7), kind


def test_a_report_puts_checkpoints_side_by_side(base, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    for out in (first, second):
        assert generate("scenes", base, None, out, "--limit", 12) == 0
        assert run("score", "--benchmark", "scenes", "--images", out)[0] == 0
    capsys.readouterr()
    code, out, err = run("report", first, second, "--out", tmp_path / "report", capsys=capsys)
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "report/report.json").read_text())
    gaps = report[0]["differences"][0]["values"]
    assert gaps and all(gap == {"value": 0, "low": 0, "high": 0} for gap in gaps.values())
    page = (tmp_path / "report/report.html").read_text()
    # Every chosen prompt is shown of both checkpoints.
    assert page.count("<img ") == page.count("data:image/jpeg") >= 16
    assert page.count("/first)</th>") == page.count("/second)</th>") > 2
    assert "worst" in page and "http" not in page
    # Intervals are below their values, or the tables are wider than a screen.
    assert "0.00<br><small>[0.00, 0.00]</small>" in page and "0.00 [" not in page
    assert "| checkpoint | judge | all |" in (tmp_path / "report/report.md").read_text()
    assert "Paired differences" in out


def test_another_set_of_prompts_is_scored_as_it_was_drawn(base, tmp_path):
    data, out = WRITERS["gedit"](tmp_path), tmp_path / "out"
    assert generate("gedit", base, data, out, "--variant", "cn") == 0
    with JudgeServer(rule) as server:
        assert score("gedit", out, server) == 0
    assert result(out)["variant"] == "cn" and len(result(out)["rows"]) == 4
    assert all("/cn/" in row["images"][0] for row in result(out)["rows"])


def test_chinese_files_have_names_of_their_own_for_test_points(base, tmp_path, capsys):
    data, out = WRITERS["unigenbench"](tmp_path).parent, tmp_path / "out"
    assert generate("unigenbench", base, data, out, "--variant", "zh") == 0, capsys.readouterr().err
    with JudgeServer(rule) as server:
        assert score("unigenbench", out, server) == 0, capsys.readouterr().err
        asked = server.texts()[0]
    assert "\n风格: how it looks" in asked and "\n风格: 它的风格" in asked
    expected = {"overall": (100 + 100 / 3) / 2, "风格": 100.0, "属性": 100 / 3}
    for column, value in expected.items():
        assert values(out)[column] == pytest.approx(value), column


def test_published_rows_name_their_judge(base, tmp_path, capsys):
    data, out = WRITERS["gedit"](tmp_path), tmp_path / "out"
    assert generate("gedit", base, data, out) == 0
    with JudgeServer(rule) as server:
        assert score("gedit", out, server) == 0
    assert run("report", out, "--out", tmp_path / "report")[0] == 0
    text = (tmp_path / "report/report.md").read_text()
    assert "| BAGEL (arXiv 2605.05781) | GPT-4.1 | 6.52 |" in text
    assert "| BAGEL (TorchUMM) | Qwen2.5-VL-72B | 6.35 |" in text
    assert "| rule/1 | 5.66 [5.66, 5.66] |" in text
