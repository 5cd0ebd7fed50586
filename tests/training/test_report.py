"""The summary of a run, in JSON and in words."""

import math
import shutil
import subprocess
import types

import pytest
import torch
from metric_runs import run, strict, values_at

import uno_ds
from uno_ds.training.finish import after_training
from uno_ds.training.metrics import LOSSES
from uno_ds.training.pictures import plot_curves
from uno_ds.training.report import environment, summarise, write_summary


def test_first_and_last_losses_are_means_over_a_tenth_of_the_steps(tmp_path):
    def values(step):
        return {"loss": float(step), "loss_flow": math.nan if step == 2 else float(step)}

    losses = summarise(run(tmp_path, range(1, 41), total=40, values=values))["losses"]
    assert losses["averaged_steps"] == 4
    assert losses["first"] == {
        "loss": 2.5,
        "loss_flow": pytest.approx(8 / 3),
        **dict.fromkeys(LOSSES[2:]),
    }
    assert losses["last"]["loss"] == 38.5


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_shortest_runs_have_a_summary_and_curves(tmp_path, steps):
    path = run(tmp_path, range(1, steps + 1), total=3)
    summary = summarise(path)
    assert summary["steps"] == steps and summary["losses"]["averaged_steps"] == min(steps, 1)
    assert summary["losses"]["first"]["loss"] == (1.0 if steps else None)
    plot_curves(path, tmp_path / "curves.png")
    write_summary(tmp_path, complete(summary))


def complete(summary: dict, **changes) -> dict:
    return {
        **environment(),
        **summary,
        "parameters": {"trainable": 1234567, "frozen": 89},
        "checksums": {"frozen_start": "ab12", "frozen_end": "ab12"},
        "skipped_samples": {"undecodable image": 3, "no caption": 12},
        "exit": "completed",
        **changes,
    }


def test_summary_holds_what_was_asked_for_in_json_and_in_words(tmp_path):
    path = run(
        tmp_path,
        range(1, 21),
        values=lambda step: {**values_at(step), "skipped": 2 if step > 9 else 0},
    )
    (tmp_path / "curves.png").touch()
    write_summary(tmp_path, complete(summarise(path), scores={"right": math.nan}))
    summary, text = (
        strict((tmp_path / "summary.json").read_text()),
        (tmp_path / "summary.md").read_text(),
    )
    assert {"python", "torch", "deepspeed", "transformers"} <= set(summary["versions"])
    assert (
        summary["hardware"]["cores"] >= 1
        and summary["hardware"]["memory_bytes"] > 1 << 28
        and summary["hardware"]["cpu"]
    )
    assert summary["speed"] == {
        "step_seconds": 0.25,
        "tokens_per_second": 400,
        "mfu": None,
        "total_step_seconds": 5,
    }
    assert summary["skipped_steps"] == 2 and summary["scores"] == {"right": None}
    for piece in (
        "completed",
        "flow matching | 1.5000 | 0.1026 | -93.2 %",
        "1,234,567",
        "no caption: 12",
        "unchanged (checksum ab12)",
        "400",
        f"torch {torch.__version__}",
        "![curves](curves.png)",
    ):
        assert piece in text
    assert "captioning" not in text and "samples.png" not in text


def test_changed_frozen_weights_stand_out(tmp_path):
    summary = summarise(run(tmp_path, [1]))
    write_summary(
        tmp_path, complete(summary, checksums={"frozen_start": "ab12", "frozen_end": "cd34"})
    )
    assert (
        "**CHANGED** (checksum ab12 at the start, cd34 at the end)"
        in (tmp_path / "summary.md").read_text()
    )


def test_incomplete_summary_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="checksums"):
        write_summary(
            tmp_path,
            {
                key: value
                for key, value in complete(summarise(run(tmp_path, [1]))).items()
                if key != "checksums"
            },
        )


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_commit_is_that_of_the_package_and_not_of_a_repository_around_it(tmp_path, monkeypatch):
    inner = tmp_path / "site-packages"
    inner.mkdir()
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    for folder, known in ((tmp_path, True), (inner, False)):
        monkeypatch.setattr(uno_ds, "__file__", str(folder / "uno_ds/__init__.py"))
        assert (environment()["commit"] is not None) == known


@pytest.mark.parametrize(
    ("export", "prompts", "words"),
    [
        (True, ["a cup"], "the last checkpoint, the export of the model and pictures"),
        (True, [], "the last checkpoint and the export of the model"),
        (False, ["a cup"], "the last checkpoint"),
    ],
)
def test_what_follows_the_last_step_is_printed(export, prompts, words):
    recipe = types.SimpleNamespace(
        checkpoint=types.SimpleNamespace(export=export),
        samples=types.SimpleNamespace(prompts=prompts),
    )
    assert after_training(recipe) == words
