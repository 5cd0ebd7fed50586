"""Preparation of rows: unusable ones are shown, and the chosen keys of captions belong to the
preparation."""

import json
from pathlib import Path

import pytest
import yaml
from small_runs import random_base, t2i_row, tree, write_t2i

from uno_ds.commands import prepare as command
from uno_ds.data.prepared import PreparedSource
from uno_ds.data.sources import SourceSettings
from uno_ds.settings import SettingsError, build


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with a recipe over three rows, one of them without captions."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    captions = json.dumps({"short": "a cup", "long": "a white cup"})
    rows = [t2i_row(captions=captions), t2i_row(captions="{"), t2i_row(captions=captions)]
    write_t2i(tmp_path / "t2i/a.parquet", rows)
    base = str(random_base(tmp_path / "base"))
    plain = tree(tmp_path, [tmp_path / "t2i"], model={"base": base})
    del plain["model"]["architecture"], plain["model"]["tokenizer"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))
    return tmp_path


def prepare(place: Path, *keys: str) -> int:
    chosen = [f"data.sources.0.caption_keys=[{', '.join(keys)}]"] if keys else []
    flags = [word for value in chosen for word in ("--set", value)]
    recipe = str(place / "recipe.yaml")
    return command.main(["--recipe", recipe, "--out", str(place / "out"), *flags])


def opened(place: Path, **values) -> PreparedSource:
    settings = {"path": str(place / "out/0_t2i"), **values}
    return PreparedSource(build(SourceSettings, settings))


def test_the_first_row_of_each_cause_is_shown(place, capsys):
    assert prepare(place) == 0
    said = capsys.readouterr().out.splitlines()
    (line,) = [line for line in said if "the first with" in line]
    assert line.startswith(f"  the first with bad_json: row 1 of '{place}/t2i/a.parquet': ")
    assert opened(place).locate(1) == (place / "out/0_t2i/00000.parquet", 1)


def test_other_keys_of_captions_are_another_preparation(place, capsys):
    assert prepare(place, "short") == 0 and prepare(place, "short") == 0
    assert prepare(place, "long") == 2
    assert 'was prepared with caption_keys ["short"], this preparation has ["long"]' in (
        capsys.readouterr().err
    )
    assert opened(place).columns(0) == opened(place, caption_keys=["short"]).left_out_keys == []
    with pytest.raises(SettingsError, match=r'caption_keys: are \["long"\], but .* \["short"\]'):
        opened(place, caption_keys=["long"])


def test_a_folder_of_a_version_without_the_key_goes_on(place):
    assert prepare(place) == 0
    path = place / "out/0_t2i/prepared.json"
    manifest = json.loads(path.read_text())
    del manifest["caption_keys"]
    path.write_text(json.dumps(manifest))
    assert prepare(place) == 0 and len(opened(place)) == 3
