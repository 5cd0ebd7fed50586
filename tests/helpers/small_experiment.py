"""A small experiment, as a file that a test changes."""

from pathlib import Path

import yaml

from benchmarks.suite.gain_experiment import read_experiment

FLOW = ["objective.caption_weight=0", "objective.regression_weight=0"]
COMPARABLE = [
    "optimizer.schedule=constant",
    "data.sources=[{path: scenes/t2i}]",
    "data.max_samples_per_pack=4",
    "sequence.token_budget=1536",
]
SCENES = "data.scenes={rows: 24, kinds: {pair: 1, triple: 1}, held_out: 0.4}"


def plain(**changes):
    return {
        "name": "small",
        "recipe": "tiny",
        "overrides": [*COMPARABLE, SCENES],
        "arms": {"flow": FLOW, "uno": []},
        "steps": 8,
        "curve": 2,
        "curve_prompts": 4,
        "prompts": 6,
        "rows": 4,
        "times": [0.5],
    } | changes


def written(folder: Path, **changes) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(plain(**changes)))
    return path


def experiment_of(folder: Path, **changes):
    return read_experiment(str(written(folder, **changes)))
