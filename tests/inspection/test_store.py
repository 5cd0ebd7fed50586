"""Work that is done is found again, and work of other settings is refused."""

import json
import tracemalloc

import numpy as np
import pytest

from uno_ds.inspection.analysis import pooled
from uno_ds.inspection.plan import Plan
from uno_ds.inspection.store import SETTINGS, Store
from uno_ds.settings import SettingsError


def test_what_was_written_is_read_by_another_process(tmp_path):
    first = Store(tmp_path / "out", {"t": [0.1, 0.5]})
    assert not first.has("a/states")
    first.write("a/states", {"pooled": np.arange(3.0)}, {"texts": ["a red circle"], "loss": None})
    second = Store(tmp_path / "out", {"t": [0.1, 0.5]})
    assert second.has("a/states") and second.keys("a/states") == {"pooled"}
    assert second.array("a/states", "pooled").tolist() == [0, 1, 2]
    assert second.values("a/states") == {"texts": ["a red circle"], "loss": None}
    assert not list((tmp_path / "out/a").glob(".*"))


def test_other_settings_are_refused_in_one_line(tmp_path):
    Store(tmp_path, {"t": [0.1], "images": 3})
    with pytest.raises(SettingsError) as raised:
        Store(tmp_path, {"t": [0.2], "images": 3})
    line = str(raised.value)
    assert "--out" in line and "t [0.1], this one has [0.2]" in line and "\n" not in line


def test_a_damaged_or_unwritable_folder_is_refused_in_one_line(tmp_path):
    (tmp_path / SETTINGS).write_text("{")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(SettingsError, match="--out") as raised:
            Store(folder, json.loads("{}"))
        assert "\n" not in str(raised.value)


def test_features_of_one_layer_and_noise_level_are_read_without_the_others(tmp_path):
    layers = (1, 2, 3, 4, 5, 6, 7, 8)
    plan = Plan(("m",), ("probes",), (0.1, 0.9), layers, 64, 1, 16, 1, 1, (), {})
    store = Store(tmp_path, {})
    rng = np.random.default_rng(0)
    whole = {level: rng.random((64, len(layers), 4, 256), np.float32) for level in plan.levels}
    for level, values in whole.items():
        for name, chunk in zip(plan.states("m", level), plan.chunks, strict=True):
            store.write(name, {"pooled": values[chunk.start : chunk.stop]}, {})
    tracemalloc.start()
    try:
        found = pooled(plan, store, "m", 0.9, 5)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.array_equal(found, whole[0.9][:, 5])
    # The pieces of the files, and what they are joined into.
    assert peak < 4 * found.nbytes
