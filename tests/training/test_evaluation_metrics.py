"""What Metrics writes of an evaluation: a line, after those of the steps before it, and nothing
that is no number."""

import json
from pathlib import Path

from uno_ds.settings import build
from uno_ds.training.logging_settings import LoggingSettings
from uno_ds.training.metrics import EVALUATIONS, Metrics, read_metrics


class Recorder:
    """In the place of TensorBoard and W&B."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[str]]] = []

    def add(self, step: int, values: dict[str, float]) -> None:
        self.calls.append((step, sorted(values)))

    def log(self, values: dict[str, float], step: int) -> None:
        self.add(step, values)

    def close(self) -> None:
        pass

    finish = close


def metrics(folder: Path, start_step: int = 0) -> Metrics:
    settings = build(LoggingSettings, {"every": 10, "tensorboard": False, "progress": "lines"})
    return Metrics(folder, settings, 0, 20, start_step=start_step)


def test_an_evaluation_comes_after_the_steps_before_it(tmp_path):
    written = metrics(tmp_path)
    written._board, written._wandb = Recorder(), Recorder()
    written.record(1, {"loss": 2.0})
    written.record(2, {"loss": 1.0})
    values = {"held/flow/t=0.5": 0.25, "held/caption/t=0.5": float("nan")}
    written.evaluation(2, values, weights="average")
    for recorder in (written._board, written._wandb):
        assert [step for step, _ in recorder.calls] == [1, 2, 2]
        assert recorder.calls[-1] == (2, ["evaluation/held/flow/t=0.5"])
    written.close()
    (line,) = (tmp_path / EVALUATIONS).read_text().splitlines()
    assert json.loads(line) == {
        "step": 2,
        "weights": "average",
        "held/flow/t=0.5": 0.25,
        "held/caption/t=0.5": None,
    }


def test_a_resumed_run_forgets_later_evaluations_and_knows_the_earlier_ones(tmp_path):
    first = metrics(tmp_path)
    for step in (0, 5, 10):
        first.evaluation(step, {"x": float(step)})
    first.close()
    resumed = metrics(tmp_path, start_step=5)
    assert resumed.evaluated == {0, 5}
    resumed.evaluation(10, {"x": 11.0})
    resumed.close()
    rows = read_metrics(tmp_path / EVALUATIONS)
    assert [(row["step"], row["x"]) for row in rows] == [(0, 0.0), (5, 5.0), (10, 11.0)]
