"""A prepared folder gives the rows of its source, to recipes that would encode them alike and to no
others; a damaged one is refused."""

import json
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from preparation_case import SPECIAL_TEXT
from safetensors.torch import load_file, save_file

from uno_ds.data.images import BadRow
from uno_ds.data.layouts.conversation import Conversation
from uno_ds.data.layouts.edit import Edit
from uno_ds.data.layouts.text_to_image import TextToImage
from uno_ds.data.prepared import MANIFEST, PreparedSource
from uno_ds.data.sources import Source, SourceSettings
from uno_ds.settings import SettingsError, build


def outcome(source: Source, index: int, seed: int, encode: Callable[[str], list[int]]) -> Any:
    """What row `index` gives: its bad cause and detail, or its key, its texts as ids and the number
    of its images."""
    try:
        example = source.read(index, np.random.default_rng(seed))
    except BadRow as error:
        return error.cause, error.detail

    def ids_of(text: str | list[int]) -> list[int]:
        return encode(text) if isinstance(text, str) else text

    def ids(texts: list) -> list[list[int]]:
        return [ids_of(text) for text in texts]

    def without_images(parts: list) -> list:
        return [ids_of(part) if isinstance(part, str | list) else "image" for part in parts]

    if isinstance(example, TextToImage):
        return example.key, ids(example.captions)
    if isinstance(example, Edit):
        return example.key, ids(example.instructions), ids(example.captions)
    assert isinstance(example, Conversation)
    return example.key, [(role, without_images(parts)) for role, parts in example.turns]


def test_every_row_gives_the_texts_or_the_bad_cause_that_its_source_gives_whatever_is_drawn(
    place, prepared
):
    raw, ready = place.open(place.paths), place.open(prepared)
    causes = set()
    for source, other in zip(raw.sources, ready.sources, strict=True):
        assert (len(source), source.name, source.layout, source.unreadable_files) == (
            len(other),
            other.name,
            other.layout,
            other.unreadable_files,
        )
        for index in range(len(source)):
            for seed in range(4):
                expected = outcome(source, index, seed, raw.tokenizer.encode)
                assert outcome(other, index, seed, raw.tokenizer.encode) == expected
                causes.add(expected[0])
    assert {
        "undecodable_image",
        "empty_image",
        "bad_json",
        "missing_image",
        "missing_instruction",
    } <= causes


def test_special_tokens_in_a_text_stay_text(place, prepared):
    run = place.open(prepared)
    tokenizer, example = run.tokenizer, run.sources[0].read(21, np.random.default_rng(0))
    assert example.captions == [tokenizer.encode(SPECIAL_TEXT), tokenizer.encode("a cup")]
    assert not {
        tokenizer.bos,
        tokenizer.eos,
        tokenizer.start_of_image,
        tokenizer.end_of_image,
    }.intersection(example.captions[0])


def test_pixels_of_pictures_that_are_no_condition_are_not_stored(place, prepared):
    sources = place.open(prepared).sources
    image = sources[0].read(0, np.random.default_rng(0)).image
    assert image.picture is None and image.latent is not None and image.target is not None
    edit = sources[1].read(0, np.random.default_rng(0))
    assert (
        edit.source.picture is not None
        and edit.target.latent is not None
        and edit.target.target is not None
    )


@pytest.mark.parametrize(
    "change, named",
    [
        ("data.latent_image.max_side=28", "data.latent_image.max_side 32, but the recipe has 28"),
        ("data.latent_image.max_source_pixels=99999", "data.latent_image.max_source_pixels"),
        ("data.vit_image.min_side=20", "data.vit_image.min_side 16, but the recipe has 20"),
        (
            "objective.regression_target=connector",
            'objective.regression_target "vit", but the recipe has "connector"',
        ),
        ("sequence.metaquery_grid=2", "sequence.metaquery_grid 3, but the recipe has 2"),
        ("data.sources.0.layout=edit", "layout"),
    ],
)
def test_a_recipe_that_would_encode_otherwise_is_refused_by_the_key_and_both_values(
    place, prepared, change, named
):
    with pytest.raises(SettingsError) as refused:
        place.open({"t2i": prepared["t2i"]}, change)
    assert (
        str(refused.value).startswith("data.sources.0.")
        and named in str(refused.value)
        and "\n" not in str(refused.value)
    )


@pytest.mark.parametrize(
    "key",
    [
        "model.architecture.vit_patch",
        "model.architecture.codec",
        "model.architecture.codec_downsample",
        "model.architecture.latent_channels",
        "model.architecture.latent_patch",
        "model.architecture.vit_heads",
        "model.tokenizer",
        "model.base (visual encoder)",
    ],
)
def test_another_model_is_refused_by_the_key_and_both_values(place, prepared, tmp_path, key):
    folder = shutil.copytree(prepared["t2i"], tmp_path / "other")
    manifest = json.loads((folder / MANIFEST).read_text())
    given, manifest["recipe"][key] = manifest["recipe"][key], "another"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(SettingsError) as refused:
        place.open({"t2i": folder})
    assert f'prepared with {key} "another", but the recipe has {json.dumps(given)}' in str(
        refused.value
    )


def test_another_visual_encoder_or_tokenizer_is_recognised_by_its_files(place, prepared, tmp_path):
    base = shutil.copytree(place.folder / "base", tmp_path / "base")
    tensors = load_file(base / "ema.safetensors")
    tensors["language_model.lm_head.weight"][0, 0] += 1
    save_file(tensors, base / "ema.safetensors")
    place.open({"t2i": prepared["t2i"]}, f"model.base={base}")
    tensors["vit_model.vision_model.post_layernorm.bias"][0] += 1e-3
    save_file(tensors, base / "ema.safetensors")
    with pytest.raises(SettingsError, match=r"model\.base \(visual encoder\)"):
        place.open({"t2i": prepared["t2i"]}, f"model.base={base}")
    # What needs no targets does not look at the encoder.
    place.open({"t2i": prepared["t2i"]}, f"model.base={base}", "objective.regression_weight=0")
    state = json.loads((base / "tokenizer.json").read_text())
    state["model"]["merges"].pop()
    (base / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(SettingsError, match=r"model\.tokenizer"):
        place.open({"t2i": prepared["t2i"]}, f"model.base={base}", "objective.regression_weight=0")


def test_conversations_serve_the_views_that_were_prepared(place, prepared):
    for how in ("vit", "latents", "both", "random"):
        place.open({"vlm": prepared["vlm"]}, f"sequence.conversation_images={how}")
    narrow = place.prepare("vit_only", "--source", "2", sequence__conversation_images="vit")
    with pytest.raises(
        SettingsError, match='sequence.conversation_images "vit", but the recipe has "both"'
    ):
        place.open({"vlm": narrow["vlm"]}, "sequence.conversation_images=both")


def test_a_row_whose_bytes_changed_on_disk_is_a_bad_row_and_never_other_numbers(prepared, tmp_path):
    folder = shutil.copytree(prepared["t2i"], tmp_path / "changed")
    data = bytearray((folder / "00000.parquet").read_bytes())
    data[len(data) // 3] ^= 1
    (folder / "00000.parquet").write_bytes(data)
    source, causes = PreparedSource(build(SourceSettings, {"path": str(folder)})), []
    for index in range(4):
        try:
            source.read(index, np.random.default_rng(0))
        except BadRow as error:
            causes.append(error.cause)
    assert causes and set(causes) == {"bad_row"}


@pytest.mark.parametrize(
    "damage, named",
    [
        (
            lambda folder: (folder / MANIFEST).write_text('{"format": 2}'),
            "its format is 2, this version reads 1",
        ),
        (lambda folder: (folder / MANIFEST).write_text("{"), "is not readable"),
        (lambda folder: (folder / "00001.parquet").write_bytes(b"PAR1"), "00001.parquet"),
        (
            lambda folder: shutil.copy(folder / "00005.parquet", folder / "00001.parquet"),
            "rows instead of 4",
        ),
        (lambda folder: (folder / "00002.parquet").unlink(), "00002.parquet is missing"),
    ],
)
def test_a_damaged_preparation_is_refused_in_one_line(prepared, tmp_path, damage, named):
    folder = shutil.copytree(prepared["t2i"], tmp_path / "damaged")
    damage(folder)
    with pytest.raises(SettingsError) as refused:
        PreparedSource(build(SourceSettings, {"path": str(folder)}))
    assert named in str(refused.value) and "\n" not in str(refused.value)
