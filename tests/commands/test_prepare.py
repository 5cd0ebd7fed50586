"""Preparation: training from prepared rows is training from pixels bit for bit, and a preparation
can be stopped, shared and not be mistaken for another one."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from small_runs import (
    ARCHITECTURE,
    CAPTIONS,
    edit_row,
    encoded,
    picture,
    random_base,
    t2i_row,
    tree,
    write_t2i,
    write_vlm,
)

from uno_ds.commands import prepare as command
from uno_ds.data.images import BadRow
from uno_ds.data.layouts.conversation import Conversation
from uno_ds.data.layouts.edit import Edit
from uno_ds.data.layouts.text_to_image import TextToImage
from uno_ds.data.prepared import MANIFEST, PreparedSource
from uno_ds.data.sources import Source, SourceSettings
from uno_ds.data.stream import skipped_samples
from uno_ds.model.architecture import Architecture
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import build_codec, latents_to_rows
from uno_ds.model.weights import WeightsFile, bagel_name
from uno_ds.objectives.preparation import RowEncoder, TargetEncoder
from uno_ds.objectives.uno import LOSSES, UnoObjective
from uno_ds.objectives.visual_regression import grid_targets
from uno_ds.run import Run, prepare
from uno_ds.sequence.composition import SpecialTokens
from uno_ds.sequence.packing import Collator
from uno_ds.sequence.segments import Kind, Sample, Segment
from uno_ds.settings import SettingsError, build
from uno_ds.training.sharded_objective import initialise

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_data.py"
# Whole and broken numbers of patches, both orientations: features of such images differ in their
# last bits with the pack.
SIZES = ((40, 30), (30, 40), (64, 20), (24, 24), (20, 64), (50, 49))
SPECIAL_TEXT = "<|im_end|> a cup <|vision_start|>"
LAYOUTS = ("t2i", "edit", "vlm")


def varied(seed: int) -> bytes:
    return encoded(picture(*SIZES[seed % len(SIZES)], seed=seed))


def write_sources(folder: Path) -> dict[str, Path]:
    """Usable and unusable rows in all layouts; an edit of three images one of which is broken, so
    that the row is bad by chance."""
    broken = varied(0)[:100]
    t2i = [{**t2i_row(seed=seed), "image": varied(seed)} for seed in range(17)]
    t2i += [
        t2i_row(broken),
        t2i_row(b""),
        t2i_row(captions="{"),
        t2i_row(captions=json.dumps({"a": "word " * 600})),
        t2i_row(varied(3), captions=json.dumps({"a": SPECIAL_TEXT, "b": "a cup", "c": " "})),
    ]
    file = write_t2i(folder / "t2i/a.parquet", t2i)
    (folder / "t2i/b.parquet").write_bytes(file.read_bytes()[:-400])
    edits = [
        edit_row([varied(seed), varied(seed + 1), varied(seed + 2)], seed=seed) for seed in range(5)
    ]
    edits += [
        edit_row([varied(0), varied(1), broken]),
        edit_row([varied(0)]),
        {**edit_row(seed=2), "instruction_list": [[]]},
        {
            **edit_row([varied(2), varied(5), varied(1)]),
            "instruction_list": [["grow it", SPECIAL_TEXT]],
        },
    ]
    captioned = [
        {**row, "caption_list": [[], [CAPTIONS[0]], list(CAPTIONS)][: len(row["image_list"])]}
        for row in edits
    ]
    (folder / "edit").mkdir()
    pq.write_table(pa.Table.from_pylist(captioned), folder / "edit/a.parquet")
    write_vlm(
        folder / "vlm",
        [f"{number}.jpg" for number in range(5)],
        extra=['{"image": "0.jpg", "conversa'],
        missing=["gone.jpg"],
    )
    return {layout: folder / layout for layout in LAYOUTS}


@dataclass(frozen=True)
class Place:
    folder: Path
    paths: dict[str, Path]

    def recipe(self, sources: dict[str, Path], **changes: Any) -> str:
        """A file: UNO from a base of random weights, over sources that are named by their
        layout."""
        plain = tree(
            self.folder,
            [],
            model={"base": str(self.folder / "base")},
            sequence={"metaquery_grid": 3, "conversation_images": "random"},
            data={
                "sources": [{"path": str(path), "name": layout} for layout, path in sources.items()]
            },
            engine={"packs_per_step": 2},
        )
        del plain["model"]["architecture"], plain["model"]["tokenizer"]
        for key, value in changes.items():
            branch, leaf = key.split("__")
            plain[branch][leaf] = value
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(plain))
        return str(path)

    def open(self, sources: dict[str, Path], *overrides: str, **changes: Any) -> Run:
        return prepare(self.recipe(sources, **changes), overrides, world_size=1)

    def prepare(self, out: str, *flags: str, **changes: Any) -> dict[str, Path]:
        """The prepared folders by layout."""
        assert (
            command.main(
                [
                    "--recipe",
                    self.recipe(self.paths, **changes),
                    "--out",
                    str(self.folder / out),
                    "--rows-per-shard",
                    "4",
                    *flags,
                ]
            )
            == 0
        )
        return self.prepared(out)

    def prepared(self, out: str) -> dict[str, Path]:
        return {
            layout: self.folder / out / f"{number}_{layout}"
            for number, layout in enumerate(LAYOUTS)
        }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("prepare")
    random_base(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        yield Place(folder, write_sources(folder / "data"))


@pytest.fixture(scope="module")
def prepared(place: Place) -> dict[str, Path]:
    return place.prepare("out")


def objective_of(run: Run) -> UnoObjective:
    recipe, kernels = run.recipe, run.recipe.kernels.resolved()
    model = Bagel(recipe.architecture, kernels.attention, read_context=run.read_answers)
    objective = UnoObjective(
        model,
        build_codec(recipe.architecture),
        recipe.objective,
        kernels,
        recipe.sequence.metaquery_grid**2,
    )
    weights = WeightsFile(recipe.base)
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if name.startswith("model."):
                parameter.copy_(weights.read(bagel_name(name.removeprefix("model."))))
            else:
                initialise(name, parameter, 0)
    objective.set_trainable(everything=recipe.model.train == "all")
    return objective


def train_plainly(
    run: Run, threads: int = 1, steps: int = 4
) -> tuple[list[tuple[str, ...]], torch.Tensor, torch.Tensor, dict[str, int]]:
    """(keys, losses, gradients, skipped rows) of some steps without updates."""
    objective, stream = objective_of(run), run.stream(0, 1)
    keys, losses = [], []
    torch.set_num_threads(threads)
    try:
        for _, batches in zip(range(steps), stream, strict=False):
            for batch in batches:
                total, parts = objective(
                    batch,
                    torch.tensor([batch.loss_counts[name] for name in LOSSES], dtype=torch.float64),
                )
                total.backward()
                keys.append(batch.keys)
                losses.append(torch.cat([total.detach()[None], parts]))
    finally:
        torch.set_num_threads(1)
    stream.close()
    gradients = torch.cat(
        [
            parameter.grad.flatten()
            for parameter in objective.parameters()
            if parameter.grad is not None
        ]
    )
    return keys, torch.stack(losses), gradients, dict(skipped_samples(stream.state))


def assert_same(pixels: Run, prepared: Run, threads: int = 1) -> None:
    keys, losses, gradients, skipped = train_plainly(pixels, threads)
    assert (losses > 0).any(dim=0).all() and len(skipped) > 3, (
        "not every loss and not enough bad rows were met"
    )
    other_keys, other_losses, other_gradients, other_skipped = train_plainly(prepared, threads)
    assert keys == other_keys and skipped == other_skipped
    assert torch.equal(losses, other_losses), (
        f"losses differ by up to {(losses - other_losses).abs().max():.1e}"
    )
    assert torch.equal(gradients, other_gradients)


# Widths at which products of few rows and activations are seen to differ in their last bits with
# the rows around and the threads.
WIDE = ARCHITECTURE | {
    "hidden": 36,
    "heads": 3,
    "kv_heads": 3,
    "vit_hidden": 288,
    "vit_heads": 4,
    "vit_mlp": 1100,
    "vit_layers": 2,
    "vit_patch": 4,
    "vit_side": 9,
}


@pytest.mark.parametrize("alone_threads, pack_threads", [(1, 1), (2, 1), (1, 2)])
def test_features_and_targets_of_an_image_are_the_same_bits_alone_in_a_pack_and_on_any_threads(
    alone_threads, pack_threads
):
    shape, rng = build(Architecture, WIDE), np.random.default_rng(0)
    torch.manual_seed(0)
    encoder = TargetEncoder(shape, "connector").to_empty(device="cpu").requires_grad_(False)
    for parameter in encoder.parameters():
        parameter.normal_(0, parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3)
    segments = [
        Segment(
            Kind.METAQUERY,
            np.zeros(1, dtype=np.int64),
            pixels=rng.uniform(-1, 1, (3, 4 * rows, 4 * columns)).astype(np.float32),
            grid=(rows, columns),
            side=1,
            supervises=0,
        )
        for rows, columns in ((3, 1), (9, 9), (1, 5), (7, 8), (3, 3))
    ]

    def encode(segments: list[Segment], threads: int) -> list[torch.Tensor]:
        batch = Collator(shape.geometry, SpecialTokens(0, 1, 2, 3), True, False)(
            [Sample("", [segment]) for segment in segments]
        )
        torch.set_num_threads(threads)
        try:
            features = encoder.vit(
                batch.vision.patches_PC,
                batch.vision.positions_P,
                batch.vision.plan,
                batch.vision.lengths,
            )
            tokens = encoder.connector(features, batch.vision.lengths)
            return [
                *features.split(batch.vision.lengths),
                *tokens.split(batch.vision.lengths),
                *grid_targets(features, batch.targets),
                *grid_targets(tokens, batch.targets),
            ]
        finally:
            torch.set_num_threads(1)

    packed = encode(segments, pack_threads)
    alone = [encode([segment], alone_threads) for segment in segments]
    for part, number in itertools.product(range(4), range(len(segments))):
        assert torch.equal(packed[part * len(segments) + number], alone[number][part]), (
            f"part {part} of image {number}"
        )


class Products:
    """A codec of weights whose products have last bits that depend on the number of threads."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.inner, self.outer = (
            torch.randn(288, 3072, generator=generator),
            torch.randn(3072, 288, generator=generator),
        )

    def encode(self, pixels_B3hw: torch.Tensor) -> torch.Tensor:
        blocks = F.pixel_unshuffle(pixels_B3hw, 32).flatten(2).mT
        rows = torch.stack([F.linear(F.linear(image, self.inner), self.outer) for image in blocks])
        return F.pixel_shuffle(rows.mT.unflatten(2, (3, 3)), 16)


def test_latents_of_a_codec_with_weights_are_the_same_bits_on_any_number_of_threads(
    place, prepared
):
    run, codec, rng = place.open(place.paths), Products(), np.random.default_rng(0)
    encode = RowEncoder(run.recipe, run.tokenizer, codec, None, torch.device("cpu"), "float32")
    pixels = [rng.uniform(-1, 1, (3, 96, 96)).astype(np.float32) for _ in range(2)]
    segments = [
        Segment(Kind.CLEAN, np.zeros(24**2 + 2, dtype=np.int64), pixels=image, grid=(24, 24))
        for image in pixels
    ]
    batch = Collator(run.recipe.architecture.geometry, SpecialTokens(0, 1, 2, 3), False, True)(
        [Sample("", [segment]) for segment in segments]
    )
    objective = objective_of(run)
    object.__setattr__(objective, "codec", codec)
    expected = torch.cat([latents_to_rows(encode.latent(image)[None], 2) for image in pixels])
    with torch.no_grad():
        torch.set_num_threads(2)
        try:
            assert not torch.equal(
                codec.encode(batch.latents.images[0])[0], encode.latent(pixels[0])
            ), "threads make no difference to this codec"
            assert torch.equal(objective.latent_rows(batch), expected)
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("threads", [1, 2])
def test_losses_gradients_and_skipped_rows_are_those_of_training_from_pixels_bit_for_bit(
    place, prepared, threads
):
    from_prepared = place.open(prepared)
    assert all(isinstance(source, PreparedSource) for source in from_prepared.sources)
    assert_same(place.open(place.paths), from_prepared, threads)


def test_prepared_and_pixel_sources_mix_in_one_pack_bit_for_bit(place, prepared):
    mixed = place.open(
        {"t2i": prepared["t2i"], "edit": place.paths["edit"], "vlm": place.paths["vlm"]}
    )
    batches = next(iter(mixed.stream(0, 1)))
    assert any(
        len(batch.targets.prepared_EW) and len(batch.targets.patches_RP) for batch in batches
    )
    assert_same(place.open(place.paths), mixed)


def test_targets_behind_the_connector_are_bit_for_bit_too(place):
    change = {"objective__regression_target": "connector"}
    assert_same(
        place.open(place.paths, **change),
        place.open(place.prepare("connector", **change), **change),
    )


def test_latents_serve_joint_training_without_regression_bit_for_bit(place, prepared):
    def run(paths: dict[str, Path]) -> Run:
        return place.open(paths, "model.train=all", "objective.regression_weight=0")

    keys, losses, gradients, skipped = train_plainly(run(place.paths))
    other = train_plainly(run(prepared))
    assert (
        (keys, skipped) == (other[0], other[3])
        and torch.equal(losses, other[1])
        and torch.equal(gradients, other[2])
    )


def test_bfloat16_halves_the_values_and_changes_losses_by_their_rounding(place, prepared):
    narrow = place.prepare("narrow", "--dtype", "bfloat16")
    wide, rounded = (train_plainly(place.open(paths)) for paths in (prepared, narrow))
    assert wide[0] == rounded[0] and not torch.equal(wide[1], rounded[1])
    torch.testing.assert_close(wide[1], rounded[1], rtol=2e-2, atol=1e-3)
    image = place.open(narrow).sources[0].read(0, np.random.default_rng(0)).image
    exact = place.open(prepared).sources[0].read(0, np.random.default_rng(0)).image
    assert np.array_equal(
        image.latent.values, torch.from_numpy(exact.latent.values).bfloat16().float().numpy()
    )


def outcome(source: Source, index: int, seed: int, encode: Callable[[str], list[int]]) -> Any:
    """What row `index` gives: its bad cause and detail, or its key, its texts as ids and the number
    of its images."""
    try:
        example = source.read(index, np.random.default_rng(seed))
    except BadRow as error:
        return error.cause, error.detail

    def ids(texts: list) -> list[list[int]]:
        return [encode(text) if isinstance(text, str) else text for text in texts]

    if isinstance(example, TextToImage):
        return example.key, ids(example.captions)
    if isinstance(example, Edit):
        return example.key, ids(example.instructions), ids(example.captions)
    assert isinstance(example, Conversation)
    return example.key, [
        (
            role,
            [
                encode(part)
                if isinstance(part, str)
                else part
                if isinstance(part, list)
                else "image"
                for part in parts
            ],
        )
        for role, parts in example.turns
    ]


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


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


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


@pytest.mark.parametrize("after", [4, 6], ids=["at the end of a shard", "within a shard"])
def test_a_preparation_that_was_stopped_goes_on_and_finished_shards_are_not_redone(
    place, prepared, monkeypatch, after
):
    out = place.folder / f"stopped{after}"
    encode, calls = RowEncoder.__call__, []

    def stop(self: RowEncoder, layout: str, row: Any) -> dict[str, Any]:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(row)
        return encode(self, layout, row)

    with monkeypatch.context() as patch:
        patch.setattr(RowEncoder, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            place.prepare(out.name)
    finished = out / "0_t2i" / "00000.parquet"
    assert sorted(path.name for path in (out / "0_t2i").glob("*.parquet")) == [finished.name]
    with pytest.raises(
        SettingsError, match=r"data\.sources\.0\.path: .* is incomplete: 00001\.parquet is missing"
    ):
        place.open({"t2i": out / "0_t2i"})
    before = finished.stat().st_mtime_ns
    assert place.prepare(out.name)
    assert finished.stat().st_mtime_ns == before
    assert contents(out) == contents(place.folder / "out")


def test_a_preparation_that_was_killed_goes_on_to_the_same_files(place, prepared):
    out = place.folder / "killed"
    flags = ["--recipe", place.recipe(place.paths), "--out", str(out), "--rows-per-shard", "4"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_CACHE": str(place.folder / "cache"),
    }
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 400
    while (
        not (out / "0_t2i" / "00001.parquet").exists()
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / "0_t2i" / "00001.parquet").exists() and not (
        out / "2_vlm" / "00001.parquet"
    ).exists()
    assert command.main(flags) == 0
    assert contents(out) == contents(place.folder / "out")


def test_ranks_share_the_shards_without_talking_and_make_the_same_files(
    place, prepared, monkeypatch, capsys
):
    shards = {layout: len(list(prepared[layout].glob("*.parquet"))) for layout in LAYOUTS}
    counted = 0
    for rank in range(3):
        if rank < 2:
            flags = ["--rank", str(rank), "--world-size", "3"]
        else:
            with pytest.raises(SettingsError, match="incomplete"):
                place.open(place.prepared("shared"))
            monkeypatch.setenv("RANK", "2")
            monkeypatch.setenv("WORLD_SIZE", "3")
            flags = []
        capsys.readouterr()
        place.prepare("shared", *flags)
        said = capsys.readouterr().out
        counted += sum(
            int(line.split(" rows in ")[0].rsplit(" ", 1)[1])
            for line in said.splitlines()
            if " rows in " in line
        )
        own = [number for number in range(shards["t2i"]) if number % 3 == rank]
        there = {int(path.stem) for path in place.prepared("shared")["t2i"].glob("*.parquet")}
        assert (
            there == {number for number in range(shards["t2i"]) if number % 3 <= rank}
            and set(own) <= there
        )
        assert ("complete; train" in said) == (rank == 2)
    assert counted == sum(len(source) for source in place.open(place.paths).sources)
    assert contents(place.folder / "shared") == contents(place.folder / "out")


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


def test_another_visual_encoder_or_tokenizer_is_told_from_the_files(place, prepared, tmp_path):
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


def said(capsys: pytest.CaptureFixture, arguments: list[str]) -> str:
    capsys.readouterr()
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--rows-per-shard", "5"], "rows_per_shard 4, this preparation has 5"),
        (["--dtype", "bfloat16"], 'dtype "float32", this preparation has "bfloat16"'),
        (
            ["--set", "sequence.metaquery_grid=2"],
            "sequence.metaquery_grid 3, this preparation has 2",
        ),
        (["--source", "3"], "--source"),
        (["--rank", "2", "--world-size", "2"], "--rank"),
        (["--rows-per-shard", "0"], "--rows-per-shard"),
        (["--set", "model.train=all"], "model.train"),
    ],
)
def test_a_preparation_that_does_not_belong_into_the_folder_is_refused_in_one_line(
    place, prepared, capsys, flags, named
):
    before = contents(place.folder / "out")
    assert named in said(
        capsys,
        [
            "--recipe",
            place.recipe(place.paths),
            "--out",
            str(place.folder / "out"),
            "--rows-per-shard",
            "4",
            *flags,
        ],
    )
    assert contents(place.folder / "out") == before


def test_other_rows_another_source_and_foreign_folders_are_refused_in_one_line(
    place, prepared, capsys, tmp_path
):
    out = str(place.folder / "out")
    other = write_t2i(tmp_path / "t2i/a.parquet", [t2i_row(seed=1)])
    flags = ["--source", "0", "--rows-per-shard", "4"]
    assert "prepared with source" in said(
        capsys, ["--recipe", place.recipe({"t2i": other}), "--out", out, *flags]
    )
    (tmp_path / "full/0_t2i").mkdir(parents=True)
    (tmp_path / "full/0_t2i/thesis.txt").write_text("")
    assert "thesis.txt" in said(
        capsys, ["--recipe", place.recipe(place.paths), "--out", str(tmp_path / "full"), *flags]
    )
    assert "is prepared already" in said(
        capsys, ["--recipe", place.recipe(prepared), "--out", str(tmp_path / "twice"), *flags]
    )
    scratch = [
        "--set",
        "model.base=",
        "--set",
        f"model.tokenizer={place.folder / 'base'}",
        "--set",
        f"model.architecture={json.dumps(ARCHITECTURE)}",
    ]
    assert "model.base" in said(
        capsys,
        [
            "--recipe",
            place.recipe(place.paths),
            "--out",
            str(tmp_path / "scratch"),
            *flags,
            *scratch,
        ],
    )


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
