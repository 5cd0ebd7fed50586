"""Data sets of the hub, from a local stand-in of it: fetched once, read like a folder, and every
failure one line."""

from pathlib import Path

import pytest
from hub_server import run_script, serving
from public_rows import parquet
from shaded_rows import picture

from uno_ds.data.hub import local_path
from uno_ds.settings import SettingsError

READ = """
import json, sys
import numpy as np
from pathlib import Path
from uno_ds.data.sources import Source, SourceSettings
from uno_ds.settings import SettingsError, build
found = []
for path in sys.argv[2:]:
    try:
        source = Source(build(SourceSettings, {"path": path}), cache=Path(sys.argv[1]))
        rng = np.random.default_rng(0)
        captions = [source.read(row, rng).captions for row in range(len(source))]
        found.append([source.name, source.layout, captions])
    except SettingsError as error:
        found.append(str(error))
print(json.dumps(found))
"""


@pytest.fixture
def hub(tmp_path):
    rows = [{"image": picture(number), "prompt": f"cup {number}"} for number in range(2)]
    parquet(tmp_path / "hub/data/train-00000.parquet", *rows)
    parquet(tmp_path / "hub/other/train-00000.parquet", {"image": picture(7), "prompt": "mug"})
    with serving(tmp_path / "hub") as served:
        yield served


def read(address: str, folder: Path, *paths: str, offline: bool = False) -> list:
    arguments = (str(folder / "cache"), *paths)
    return run_script(READ, address, folder / "home", *arguments, offline=offline)


def test_a_data_set_is_fetched_once_and_read_like_a_folder(hub, tmp_path):
    address, requests = hub
    cups, mugs = "hf://datasets/them/cups/data", "hf://datasets/them/mugs"
    expected = ["cups/data", "t2i", [["cup 0"], ["cup 1"]]]
    found, error = read(address, tmp_path, cups, mugs)
    assert found == expected
    assert error.startswith(f"path: '{mugs}' cannot be fetched from the hub: ")
    assert any(request.endswith("data/train-00000.parquet") for request in requests)
    assert not any("other/train" in request for request in requests if "/resolve/" in request)
    requests.clear()
    found, error = read(address, tmp_path, cups, mugs, offline=True)
    assert found == expected and not requests
    assert "cannot be fetched from the hub" in error and "\n" not in error


@pytest.mark.parametrize("path", ["hf://them/cups", "hf://datasets/cups", "hf://datasets/a/b@"])
def test_other_addresses_are_refused(path):
    with pytest.raises(SettingsError, match="must be hf://datasets/ORG/NAME, with @REVISION"):
        local_path(path)
