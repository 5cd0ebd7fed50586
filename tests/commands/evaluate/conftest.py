"""A base, and an environment without launchers and keys."""

from pathlib import Path

import pytest
from small_runs import random_base


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return random_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OPENAI_API_KEY", "UNO_DS_JUDGE_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("uno_ds.evaluation.judge.FIRST_PAUSE", 0.01)
    monkeypatch.chdir(tmp_path)
