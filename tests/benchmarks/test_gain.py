"""Experiments as a whole: measured, killed, continued, and reported."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from benchmarks.commands import gain
from benchmarks.suite.gain_controller import Controller
from benchmarks.suite.gain_experiment import SPLITS, read_experiment
from benchmarks.suite.gain_results import EQUAL_FLOP, collect, comparisons
from benchmarks.suite.gain_runs import ArmRun, Machine, measured_base
from benchmarks.suite.results import ROOT, read_result
from uno_ds.data.scene_drawing import draw
from uno_ds.data.scene_score import score
from uno_ds.data.scenes import content_of
from uno_ds.model.architecture import packaged
from uno_ds.training.metrics import read_metrics

TINY = {
    "name": "tiny_experiment",
    "recipe": "tiny",
    "overrides": [
        "optimizer.schedule=constant",
        "optimizer.warmup=2",
        "data.sources=[{path: scenes/t2i}]",
        "data.scenes={rows: 100, kinds: {pair: 1, triple: 1}, held_out: 0.4}",
        "data.latent_image={max_side: 32, min_side: 16, max_pixels: 1024}",
        "data.vit_image={max_side: 32, min_side: 16, max_pixels: 1024}",
        "data.max_samples_per_pack=4",
        "engine.packs_per_step=1",
        "engine.deepspeed=zero1",
        "logging.every=1",
        "logging.tensorboard=false",
        "samples.height=32",
        "samples.width=32",
        "samples.steps=3",
    ],
    "arms": {
        "flow": ["objective.caption_weight=0", "objective.regression_weight=0"],
        "uno": [],
        "twin": ["objective.caption_weight=0", "objective.regression_weight=0"],
    },
    "seeds": 1,
    "steps": 6,
    "curve": 2,
    "curve_prompts": 4,
    "prompts": 6,
    "rows": 12,
    "times": [0.2, 0.8],
    "batch": 4,
}


def controller_of(folder: Path, **changes) -> Controller:
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(TINY | changes))
    return Controller(str(path), read_experiment(str(path)), folder / "runs", Machine(1, 1))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The tiny base by the measurement of the experiment."""
    controller = controller_of(tmp_path_factory.mktemp("measured"))
    return controller, controller.measurement(packaged("tiny_base"), "validation", 6, True)


def test_a_measurement_is_repeated_to_the_last_bit_and_a_shorter_one_is_its_beginning(measured):
    controller, found = measured
    again = controller.measurement(packaged("tiny_base"), "validation", 6, True)
    for key in ("rows", "losses", "alignment", "captions_right"):
        assert again[key] == found[key]
    few = controller.measurement(packaged("tiny_base"), "validation", 4, False)
    assert few["rows"] == found["rows"][:4] and "losses" not in few


def test_a_measurement_holds_what_it_should(measured):
    controller, found = measured
    assert set(found["losses"]) == {"flow/t=0.2", "flow/t=0.8", "caption/t=0.2", "caption/t=0.8"}
    # The caption of a nearly clean image is easier to read than that of noise.
    assert found["losses"]["caption/t=0.2"] < found["losses"]["caption/t=0.8"]
    assert set(found["captions_right"]) == {"latents", "vit", "noised, t=0.2", "noised, t=0.8"}
    asked = controller.measurement._prompts("validation", 6)
    assert found["texts"] == [prompt for prompt, _ in asked]
    for encoded, (_, scene), row in zip(found["pictures"], asked, found["rows"], strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert {name: bool(value) for name, value in row["right"].items()} == score(picture, scene)
    assert [row["content"] for row in found["rows"]] == [content_of(scene) for _, scene in asked]
    assert SPLITS["validation"][2] != SPLITS["test"][2]


def test_the_losses_of_a_measurement_are_those_of_held_out_rows_in_a_run(measured):
    """One batch through the objective, computed by itself."""
    import torch

    from uno_ds.inspection.subject import subject_of
    from uno_ds.objectives.uno import LOSSES, ObjectiveSettings
    from uno_ds.training.held_out import at_level

    controller, found = measured
    measurement = controller.measurement
    opened = measurement._open(packaged("tiny_base"))
    subject = subject_of(opened, {}, ObjectiveSettings(caption_weight=1.0))
    samples = [at_level(s, 0.8) for s in measurement.held_out_samples(opened, "validation")]
    batch = subject.collator()(samples)
    counts = torch.tensor([batch.loss_counts[name] for name in LOSSES])
    with torch.no_grad():
        _, losses = subject.objective(batch, counts)
    assert found["losses"]["flow/t=0.8"] == pytest.approx(losses[0].item(), rel=1e-5)
    assert found["losses"]["caption/t=0.8"] == pytest.approx(losses[1].item(), rel=1e-5)


def test_the_alignment_is_that_of_states_and_features_taken_image_by_image(measured):
    """Hidden states of one sample to a pack, features by the dense implementation."""
    import torch
    from dense import visual_features

    from uno_ds.inspection.alignment import cknna
    from uno_ds.inspection.hidden_states import hidden_states
    from uno_ds.inspection.subject import subject_of
    from uno_ds.objectives.uno import ObjectiveSettings
    from uno_ds.training.held_out import at_level

    controller, found = measured
    measurement = controller.measurement
    opened = measurement._open(packaged("tiny_base"))
    last = len(opened.model.layers)
    assert f"layer {last}/t=0.2" in found["alignment"] and len(found["alignment"]) == 2 * 4
    subject = subject_of(opened, {}, ObjectiveSettings(caption_weight=1.0))
    collate = subject.collator()
    means, features = [], []
    for sample in measurement.held_out_samples(opened, "validation"):
        states, _ = hidden_states(subject.objective, collate([at_level(sample, 0.8)]), [last])
        means.append(states[last].mean(dim=0))
    for _, scene in measurement._prompts("validation", 12):
        picture = draw(scene, measurement.recipe.data.scenes.size)
        pixels = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
        features.append(visual_features(subject.objective, pixels).mean(dim=0))
    expected = cknna(torch.stack(means), torch.stack(features))
    assert found["alignment"][f"layer {last}/t=0.8"] == pytest.approx(expected, abs=1e-5)


def written_base(controller: Controller, measured: dict) -> None:
    path = measured_base(controller.output)
    path.parent.mkdir(parents=True)
    named = {"arm": "base", "seed": 0, "step": 0, "identity": controller.identity}
    path.write_text(json.dumps(measured | named))


def written_runs(controller: Controller, scores: dict[str, float], measured: dict) -> None:
    """Files as runs and measurements leave them, with this share of right pictures."""
    experiment = controller.experiment
    rng = np.random.default_rng(3)
    hard = rng.random(200)
    for seed in range(experiment.seeds):
        for arm, share in scores.items():
            run = ArmRun(experiment, arm, seed, controller.output)
            run.folder.mkdir(parents=True)
            cost = 1.5 if arm == "uno" else 1.0
            lines = [
                json.dumps({"step": step, "mfu": cost / 100, "step_seconds": 1.0})
                for step in range(1, 10 if arm == "flow" else 7)
            ]
            (run.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
            for step in (3, 6, 9) if arm == "flow" else (3, 6):
                gained = share + 0.1 * (step == 9) + rng.normal(0, 0.01)
                rows = [
                    {
                        "content": f"{place}",
                        "kind": "pair" if place % 2 else "triple",
                        "right": {
                            aspect: int(value < gained)
                            for aspect in ("all", "count", "colours", "shapes", "relation")
                        },
                    }
                    for place, value in enumerate(hard)
                ]
                path = run.measured(step, "validation")
                path.parent.mkdir(parents=True, exist_ok=True)
                content = {
                    "arm": arm,
                    "seed": seed,
                    "step": step,
                    "split": "validation",
                    "rows": rows,
                    "losses": {"flow/t=0.2": 1 - gained, "caption/t=0.2": 2 - gained},
                    "alignment": {"layer 4/t=0.2": gained},
                    "captions_right": {"latents": {"pair": 0.9, "triple": 0.8}},
                    "pictures": measured["pictures"],
                    "texts": measured["texts"],
                    "seconds": 1.0,
                    "identity": controller.identity,
                }
                path.write_text(json.dumps(content))


def test_the_page_and_the_numbers_say_what_was_found_at_equal_steps_and_at_equal_flop(
    tmp_path, capsys, measured
):
    (tmp_path / "mine.yaml").write_text("extends: tiny\n")
    arms = {**TINY["arms"], "not_run": []}
    controller = controller_of(
        tmp_path, arms=arms, seeds=4, recipe="mine.yaml", arm_seeds={"twin": 6}
    )
    written_base(controller, measured[1])
    written_runs(controller, {"flow": 0.2, "uno": 0.3, "twin": 0.2}, measured[1])
    options = gain._parse([controller.name, "--out", str(tmp_path / "result"), "--report-only"])
    assert gain.report(controller, options, ["A note."]) == 0
    found = collect(controller.experiment, controller.output, controller.identity)
    # UNO's 6 steps cost 9 of flow's.
    assert {found.equal_flop["uno", seed] for seed in range(4)} == {9}
    assert {found.equal_flop["twin", seed] for seed in range(4)} == {6}
    by_name = {(c.arm, c.at): c for c in comparisons(found, "validation")}
    assert "uno is better than flow at equal steps" in by_name["uno", "at equal steps"].verdict
    assert "No difference shown" in by_name["uno", "at equal FLOP"].verdict
    assert comparisons(found, "test") == []

    result = read_result(tmp_path / "result" / "gain.json")
    assert result["complete"] and len(result["measurements"]) == 1 + 4 * (3 + 2 + 2)
    point = next(m for m in result["measurements"] if (m["arm"], m["step"]) == ("uno", 6))
    assert point["flops"] == pytest.approx(6 * 1.5e10)
    assert len(point["right"]["all"]) == 200 == len(result["details"]["prompts"]["validation"])
    assert point["alignment"] == {"layer 4/t=0.2": pytest.approx(1 - point["losses"]["flow/t=0.2"])}
    share = 100 * point["right"]["all"].count("1") / 200
    assert point["means"]["all"] == pytest.approx(share)
    verdicts = [c["verdict"] for c in result["details"]["comparisons"]["validation"]]
    text = (tmp_path / "result" / "report.html").read_text()
    printed = capsys.readouterr().out
    for line in verdicts:
        assert line in printed and line.replace("&", "&amp;") in text
    # Without the folders of this machine.
    assert "Recipe mine.yaml." in text and result["details"]["experiment"]["recipe"] == "mine.yaml"
    assert "Alignment with the visual encoder" in text
    page = (tmp_path / "result" / "report.md").read_text()
    assert "| uno | 4 of 4 | 6 |" in page and "| twin | 4 of 6 | 6 |" in page
    # All of what was measured, and no more, is made again by the command.
    command = f"python -m benchmarks gain {controller.name} --arms flow,twin,uno"
    assert result["details"]["reproduce"] == command and f"{command}: " in page
    contents = len(set(result["details"]["prompts"]["validation"]))
    assert f"(validation {contents})" in page and "validation contents" in page
    assert "test contents" not in page
    assert "A note." in text and text.count("data:image/png") == 5
    assert "python -m benchmarks gain" in text


def command(controller: Controller, *flags: str) -> list[str]:
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks", "gain", controller.name]
    return [*words, "--output", str(controller.output), "--jobs", "2", *flags]


def alive(folder: Path) -> list[int]:
    """Processes that were started for this experiment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if str(folder).encode() in words:
            found.append(int(path.parent.name))
    return found


TWO = {arm: TINY["arms"][arm] for arm in ("flow", "uno")}


def finish(controller: Controller, *flags: str) -> str:
    """Runs a call to its end; what it printed."""
    out = controller.output.parent / "result"
    words = command(controller, "--out", str(out), *flags)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_call_goes_on_and_finds_the_same_numbers(tmp_path):
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    killed = controller_of(tmp_path / "killed", arms=TWO)
    whole = controller_of(tmp_path / "whole", arms=TWO)
    first = subprocess.Popen(command(killed), cwd=ROOT, stdout=subprocess.DEVNULL)
    run = ArmRun(killed.experiment, "flow", 0, killed.output)
    # In the middle of the first arm's training.
    while not run.saved_steps():
        assert first.poll() is None
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    # Training ends with a checkpoint, and no child goes on by itself.
    deadline = time.monotonic() + 200
    while alive(killed.output):
        assert time.monotonic() < deadline, "children outlive the killed call"
        time.sleep(0.1)

    losses, rows = [], []
    for controller in (killed, whole):
        finish(controller)
        arms = {}
        for arm in TWO:
            folder = controller.output / f"{arm}-seed0"
            arms[arm] = [
                (row["step"], row["loss"]) for row in read_metrics(folder / "metrics.jsonl")
            ]
            assert len(arms[arm]) >= 6
        losses.append(arms)
        found = collect(controller.experiment, controller.output, controller.identity)
        rows.append({key: point["rows"] for key, point in found.points.items()})
    assert losses[0] == losses[1] and rows[0] == rows[1]
    beyond = found.equal_flop["uno", 0]
    assert beyond > 6 and ("flow", 0, beyond, "validation") in rows[1]

    # An arm whose cost the baseline is beyond already: its steps are trained again, in a folder of
    # their own from the checkpoint before, and are the same ones.
    arms = {**TWO, "mid": [*TWO["flow"], "steps=7"]}
    more = controller_of(tmp_path / "whole", arms=arms)
    finish(more, "--test")
    assert (more.output / "flow-seed0-to-7").is_dir()
    found = collect(more.experiment, more.output, more.identity)
    assert found.equal_flop["mid", 0] == 7 < beyond
    for split in SPLITS:
        mid = [c for c in comparisons(found, split) if (c.arm, c.at) == ("mid", EQUAL_FLOP)]
        assert [c.by_seed for c in mid] == [[0.0]]

    # Everything is there: nothing is trained again.
    assert "training to step" not in finish(more, "--test")
    # A budget in which nothing fits is refused before anything is trained.
    larger = controller_of(tmp_path / "whole", arms=arms, seeds=2)
    words = command(larger, "--minutes", "0.01")
    refused = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "--minutes: is 0.01" in refused.stderr
    assert "DOES NOT FIT" in refused.stdout
