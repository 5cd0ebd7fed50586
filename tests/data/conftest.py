"""Sources below the folder of the test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from uno_ds.data.scenes import ScenesSettings
from uno_ds.data.sources import Source, SourceSettings
from uno_ds.settings import build


@pytest.fixture
def open_source(tmp_path: Path) -> Callable[..., Source]:
    """open_source(path, **settings): a source whose drawn sets and unpacked files lie below the
    folder of the test."""

    def opened(path: Path | str, **values: Any) -> Source:
        return Source(
            build(SourceSettings, {"path": str(path), **values}),
            root=tmp_path / "root",
            cache=tmp_path / "cache",
            embedded=ScenesSettings(rows=12),
        )

    return opened
