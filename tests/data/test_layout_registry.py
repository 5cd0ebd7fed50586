"""A layout that is added to the registry alone is handled everywhere; an unknown name raises."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from small_runs import encoded, picture, random_base, tree

from uno_ds.commands import prepare as prepare_command
from uno_ds.commands import train
from uno_ds.commands.fake_ranks import synthetic_batch
from uno_ds.cost.scenario import fullest_packs
from uno_ds.data.example_encoder import ExampleEncoder
from uno_ds.data.examples import Example, Picture, Text
from uno_ds.data.layouts import LAYOUTS, detect_layout, get_layout, planned_layout
from uno_ds.data.layouts.base import IDS, IMAGE, Layout, RandomContent, RowEncoder, SampleSize
from uno_ds.data.prepared import read_manifest, write_shard
from uno_ds.data.sources import SourceSettings
from uno_ds.objectives.preparation import RowEncoder as RowEncoderOfBase
from uno_ds.objectives.preparation import encoding_of, wants_targets
from uno_ds.run import prepare
from uno_ds.sequence.composition import SampleComposer
from uno_ds.sequence.segments import Sample
from uno_ds.settings import SettingsError, build


@dataclass(frozen=True)
class Titled(Example):
    picture: Picture
    titles: list[Text]


class TitledLayout(Layout[Titled, Titled]):
    """A picture, of which one of several titles is the prompt. Only this class knows of it."""

    name = "titled"
    example = Titled
    row_columns = frozenset({"picture"})
    prepared_columns = (("picture", IMAGE), ("titles", pa.list_(IDS)))
    losses = frozenset({"flow", "regression"})
    bounded_length = True
    has_condition_images = False

    def matches(self, columns: set[str]) -> bool:
        return {"picture", "titles"} <= columns

    def parse(self, key, row, load, reader, rng) -> Titled:
        return self.parse_whole(key, row, load, reader)

    def parse_whole(self, key, row, load, reader) -> Titled:
        return Titled(key, load(row["picture"]), reader.texts(row["titles"]))

    def encode(self, row: Titled, encoder: RowEncoder) -> dict[str, Any]:
        return {
            "picture": encoder.image(row.picture, latent=True, target=True),
            "titles": [encoder.ids(title) for title in row.titles],
        }

    def decode(self, key, stored, load, rng) -> Titled:
        return Titled(key, load(stored["picture"]), stored["titles"])

    def sample(self, example: Titled, encoder: ExampleEncoder, rng) -> Sample:
        title = encoder.one_of(example.titles, rng)
        image = encoder.generated_views(example.picture)
        return self._compose(encoder.composer, example.key, title, image, rng)

    def sample_size(self, composer: SampleComposer, latent_cells: int, vit_cells: int):
        return SampleSize(
            texts=1,
            images=1,
            latents=latent_cells,
            metaqueries=composer.queries,
            target=vit_cells if composer.metaqueries else 0,
        )

    def random_sample(self, composer: SampleComposer, content: RandomContent, rng) -> Sample:
        return self._compose(composer, self.name, content.text(), content.image(), rng)

    def _compose(self, composer, key, title, image, rng) -> Sample:
        builder = composer.builder()
        builder.text(title)
        builder.generated(image, None, rng)
        return builder.sample(key)


@pytest.fixture
def titled(tmp_path, monkeypatch) -> Path:
    """A recipe over ten rows of the added layout, one of them unusable; its base is at base/."""
    monkeypatch.setitem(LAYOUTS, "titled", TitledLayout())
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {"picture": encoded(picture(seed=seed)), "titles": ["a cup", f"cup {seed}"]}
        for seed in range(9)
    ]
    rows.append({"picture": b"broken", "titles": ["a cup"]})
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data/rows.parquet")
    base = str(random_base(tmp_path / "base"))
    plain = tree(tmp_path, [tmp_path / "data"], model={"base": base})
    del plain["model"]["architecture"], plain["model"]["tokenizer"]
    plain["data"]["sources"][0]["name"] = "data"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def packs(run, number: int = 4) -> list:
    stream = run.stream(0, 1)
    found = [batches[0] for _, batches in zip(range(number), stream, strict=False)]
    stream.close()
    return found


def test_a_layout_that_is_added_to_the_registry_alone_is_handled_everywhere(titled, capsys):
    run = prepare(str(titled))
    assert run.layouts == [("data", "titled")] and not run.idle and not run.read_answers
    pixels = packs(run)
    assert all(batch.loss_counts["flow"] and batch.loss_counts["regression"] for batch in pixels)

    out = titled.parent / "out"
    assert prepare_command.main(["--recipe", str(titled), "--out", str(out)]) == 0
    assert "unusable rows: undecodable_image 1" in capsys.readouterr().out
    prepared = f"data.sources=[{{path: {out / '0_titled'}, name: data}}]"
    again = prepare(str(titled), [prepared])
    assert again.layouts == run.layouts
    for batch, same in zip(pixels, packs(again), strict=True):
        assert batch.keys == same.keys
        assert torch.equal(batch.text_ids, same.text_ids)

    (pack,) = fullest_packs(run.recipe, ["titled"]).values()
    assert pack.latents and pack.metaqueries == 4 and not pack.caption
    longest = get_layout("titled").longest_sample(run.recipe.composer(None), 64, 16)
    assert longest == 50 + 66 + 4
    assert synthetic_batch(run.recipe, ["titled"]).loss_counts["flow"]
    assert train.main(["--recipe", str(titled), "--dry-run", "--json"]) == 0
    assert '"titled"' in capsys.readouterr().out


def test_a_name_that_is_no_layout_raises_in_every_place_that_takes_one(titled, tmp_path):
    run = prepare(str(titled))
    recipe, source = run.recipe, run.sources[0]
    nobody = dataclasses.replace(run, layouts=[("data", "nobody")])
    encode = RowEncoderOfBase(recipe, run.tokenizer, None, None, torch.device("cpu"), "float32")
    source.layout = "nobody"
    places = [
        lambda: get_layout("nobody"),
        lambda: planned_layout("nobody"),
        lambda: source.read(0, np.random.default_rng(0)),
        lambda: source.read_whole(0),
        lambda: write_shard(tmp_path / "a.parquet", "nobody", iter([])),
        lambda: encode("nobody", {}),
        lambda: wants_targets(recipe, "nobody"),
        lambda: encoding_of(recipe, run.tokenizer, "nobody"),
        lambda: recipe.check_data([("data", "nobody")], None),
        lambda: fullest_packs(recipe, ["nobody"]),
        lambda: synthetic_batch(recipe, ["nobody"]),
        lambda: nobody.read_answers,
        lambda: nobody.idle,
    ]
    for place in places:
        with pytest.raises(ValueError, match="Unknown layout 'nobody'; allowed are t2i, edit"):
            place()
    with pytest.raises(TypeError, match="No layout makes examples of type Example"):
        run.make_sample(Example("key"), np.random.default_rng(0))
    with pytest.raises(SettingsError, match="layout: .*auto, t2i, edit, vlm.*nobody"):
        build(SourceSettings, {"path": "data", "layout": "nobody"})
    folder = tmp_path / "prepared"
    folder.mkdir()
    manifest = {"format": 1, "rows": 1, "rows_per_shard": 1, "dtype": "float32", "recipe": {}}
    manifest |= {"unreadable_files": {}, "layout": "nobody"}
    (folder / "prepared.json").write_text(json.dumps(manifest))
    with pytest.raises(SettingsError, match="its values are not those of a preparation"):
        read_manifest(folder)


def test_a_layout_that_lacks_a_part_cannot_be_defined_or_made():
    with pytest.raises(TypeError, match="Half does not set example, row_columns, prepared_columns"):
        type("Half", (Layout,), {"name": "half"})
    whole = {name: getattr(TitledLayout, name) for name in Layout.__annotations__}
    without_methods = type("Half", (Layout,), whole)
    with pytest.raises(TypeError, match=r"abstract method.* sample\b"):
        without_methods()


def test_the_columns_of_a_row_tell_layouts_apart():
    assert list(LAYOUTS) == ["t2i", "edit", "vlm", "interleaved"]
    conversation = {"image", "caption", "conversations"}
    sequence = {"image", "caption", "image_list", "instruction_list"}
    found = [({"jpg", "text"}, "t2i"), (sequence, "edit"), (conversation, "vlm")]
    for columns, name in [*found, (conversation | {"parts"}, "interleaved")]:
        assert detect_layout(columns).name == name
    for columns in (set(), {"image"}, {"captions"}, {"image_list"}):
        assert detect_layout(columns) is None
