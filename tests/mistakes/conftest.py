"""A working directory with everything that a recipe may name."""

import json
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from no_launcher import remove_launcher
from small_runs import random_base, write_photos


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Folder with data, a base and DeepSpeed files; it is the working directory, and `datasets`
    keeps its copies in it."""
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
        "auto": json.dumps(
            {
                "train_batch_size": "auto",
                "bf16": {"enabled": "auto"},
                "gradient_accumulation_steps": 1,
            }
        ),
    }
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        remove_launcher(patch)
        yield SimpleNamespace(folder=folder, photos=folder / "photos")
