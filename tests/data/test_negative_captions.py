"""Negative captions of data rows: their column, prepared rows, the refusal where there are none,
and what they cost."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from equal_batches import alike, take
from small_runs import edit_row, t2i_row, tree, write_edit, write_rows

from uno_ds.cost.flops import flops
from uno_ds.cost.scenario import fullest_packs, read_scenario, without_supervision
from uno_ds.data.examples import PreparedImage
from uno_ds.data.layouts import get_layout
from uno_ds.data.layouts.text_to_image import TextToImage
from uno_ds.recipe import load_recipe
from uno_ds.run import Run, prepare
from uno_ds.settings import SettingsError

WRONG = ["a dog on a table", "a cup below a table"]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    """make(column of the negatives, source=..., objective settings): a checked run."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def made(column: str | None, source: dict[str, Any] | None = None, **objective: Any) -> Run:
        rows = [t2i_row(seed=seed) for seed in range(12)]
        fields = [("image", pa.binary()), ("captions", pa.string())]
        if column is not None:
            # A row without any is a row without a negative.
            rows = [{**row, column: WRONG if n else None} for n, row in enumerate(rows)]
            fields.append((column, pa.list_(pa.string())))
        folder = tmp_path / f"data_{column}"
        write_rows(folder / "a.parquet", rows, pa.schema(fields))
        plain = tree(tmp_path, [folder], objective=objective)
        plain["data"]["sources"][0] |= {"name": "photos", **(source or {})}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(plain))
        return prepare(str(path))

    yield made


@pytest.mark.parametrize(
    "column, source",
    [
        ("negative_captions", {}),
        ("negative_caption", {}),
        ("not_this", {"columns": {"negative": "not_this"}}),
    ],
)
def test_negatives_come_from_their_column(make, column, source):
    run = make(column, source, negative_weight=0.3)
    (source_of_run,) = run.sources
    assert source_of_run.read(3, np.random.default_rng(0)).negatives == WRONG
    assert source_of_run.read(0, np.random.default_rng(0)).negatives == []
    (packs,) = take(run.stream(0, 1), 1)
    counts = packs[0].loss_counts
    assert 0 < counts["negative"] <= len(packs[0].keys)
    rows = packs[0].negatives.labels
    assert run.tokenizer is not None
    allowed = {token for text in WRONG for token in run.tokenizer.encode(text)}
    assert set(rows.labels_Y.tolist()) <= allowed | {run.make_sample.encoder.composer.tokens.eos}


def test_without_the_weight_the_column_changes_nothing(make):
    assert alike(take(make("negative_captions").stream(0, 1), 3), take(make(None).stream(0, 1), 3))


def test_from_the_pack_no_column_is_needed(make):
    run = make(None, negative_weight=0.3, negative_source="pack")
    (packs,) = take(run.stream(0, 1), 1)
    assert packs[0].loss_counts["negative"] == len(packs[0].keys) - 1
    assert packs[0].tokens <= run.recipe.sequence.token_budget


def test_a_run_without_any_negative_caption_is_refused(make):
    with pytest.raises(SettingsError) as refused:
        make(None, negative_weight=0.3)
    assert str(refused.value) == (
        "objective.negative_source: is column, but none of the sources 'photos' has a negative "
        "caption in its first 100 rows; name their column by `columns: {negative: NAME}` of the "
        "t2i source, prepare a prepared source again, or set negative_source to pack."
    )


def test_edits_alone_have_no_column_of_negatives(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_edit(tmp_path / "edit/a.parquet", [edit_row(seed=seed) for seed in range(3)])
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(tree(tmp_path, [tmp_path / "edit"], objective={"negative_weight": 1.0}))
    )
    with pytest.raises(SettingsError, match="objective.negative_source: is column, but none"):
        prepare(str(path))


def test_prepared_rows_keep_negatives_and_older_ones_have_none():
    class Encoder:
        def ids(self, text: str) -> list[int]:
            return [len(text)]

        def image(self, image: Any, **parts: bool) -> dict[str, Any]:
            return {"image": image}

    layout = get_layout("t2i")
    row = TextToImage("key", "picture", ["one", "three"], ["wrong"])
    stored = layout.encode(row, Encoder())
    assert set(stored) == {name for name, _ in layout.prepared_columns}
    image = PreparedImage(None, None, None)
    decoded = layout.decode("key", stored, lambda _: image, np.random.default_rng(0))
    assert (decoded.captions, decoded.negatives) == ([[3], [5]], [[5]])
    del stored["negatives"]
    older = layout.decode("key", stored, lambda _: image, np.random.default_rng(0))
    assert (older.captions, list(older.negatives)) == ([[3], [5]], [])


def test_a_negative_costs_what_its_caption_costs():
    shape = load_recipe("tiny").architecture
    both = read_scenario("prompt=9,latents=49,caption=11,negative=11,metaqueries=9,samples=5")
    caption_only = dataclasses.replace(both, negative=0)
    neither = dataclasses.replace(both, negative=0, caption=0)
    costs = [flops(shape, pack).uno_structured for pack in (both, caption_only, neither)]
    assert costs[0] - costs[1] == costs[1] - costs[2] > 0
    assert both.tokens - caption_only.tokens == 5 * 11
    assert without_supervision(both).supervision == 0


@pytest.mark.parametrize("source, layouts", [("column", {"t2i"}), ("pack", {"t2i", "edit"})])
def test_planned_packs_have_room_for_negatives(source, layouts):
    given = ["objective.negative_weight=0.1", f"objective.negative_source={source}"]
    packs = fullest_packs(load_recipe("tiny", given), ["t2i", "edit"])
    assert {name for name, pack in packs.items() if pack.negative} == layouts
    for pack in packs.values():
        assert pack.negative in (0, pack.caption)
    plain = fullest_packs(load_recipe("tiny"), ["t2i", "edit"])
    assert not any(pack.negative for pack in plain.values())
