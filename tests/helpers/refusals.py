"""Command lines of training that have to be refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from small_runs import tree

from uno_ds.commands.train import main


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
