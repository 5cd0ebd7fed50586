"""A name that is in a registry but that no branch knows raises, in every place that reads it."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_runs import encoded, picture, random_base, tree
from tiny_objective import (
    collate,
    loss_counts,
    make_composer,
    mixed_pack,
    tiny_objective,
    tiny_shape,
)

from uno_ds.commands import prepare as prepare_command
from uno_ds.commands import train
from uno_ds.commands.fake_ranks import synthetic_batch
from uno_ds.cost.memory import Sharding, kept_per_row, memory
from uno_ds.cost.parameters import parameters_of
from uno_ds.cost.scenario import Scenario, fullest_packs
from uno_ds.cost.step_flops import codec_flops
from uno_ds.cost.utilisation import plan_of
from uno_ds.data.example_encoder import ExampleEncoder
from uno_ds.data.examples import Example, Picture, Text
from uno_ds.data.layouts import LAYOUTS, detect_layout, get_layout, planned_layout
from uno_ds.data.layouts.base import IDS, IMAGE, Layout, RandomContent, RowEncoder, SampleSize
from uno_ds.data.prepared import read_manifest, write_shard
from uno_ds.data.sources import SourceSettings
from uno_ds.generation.sampler import RENORMALISATIONS, SamplerSettings, guide
from uno_ds.kernels import backends
from uno_ds.kernels.backends import (
    AttentionMemory,
    Backend,
    KernelSettings,
    unavailable_reason,
)
from uno_ds.kernels.conditioning_attention import conditioning_attention
from uno_ds.kernels.cross_entropy import linear_cross_entropy
from uno_ds.kernels.metaquery_regression import kinds, metaquery_regression, reference
from uno_ds.kernels.metaquery_regression.kinds import RegressionKind
from uno_ds.kernels.plan import FULL, build_plan
from uno_ds.kernels.pointwise import rms_norm, swiglu
from uno_ds.kernels.qk_norm_rope import qk_norm_rope
from uno_ds.model.architecture import CODEC_NAMES
from uno_ds.model.codec import CODECS, PixelCodec, build_codec, check_codec, get_codec
from uno_ds.model.weights import missing_files
from uno_ds.objectives.golden import load_case
from uno_ds.objectives.preparation import RowEncoder as RowEncoderOfBase
from uno_ds.objectives.preparation import TargetEncoder, encoding_of, wants_targets
from uno_ds.objectives.regression_target import REGRESSION_TARGETS, RegressionTarget
from uno_ds.objectives.sampling_case import load_sampling_case
from uno_ds.objectives.sampling_replay import replay
from uno_ds.objectives.sampling_task import TASKS, PictureTask
from uno_ds.objectives.uno import ObjectiveSettings, UnoObjective
from uno_ds.recipe import load_recipe
from uno_ds.run import prepare
from uno_ds.sequence.composition import SampleComposer
from uno_ds.sequence.segments import Sample
from uno_ds.settings import SettingsError, build


def one_segment_plan(rows: int):
    import numpy as np

    zeros = np.zeros(rows, dtype=np.int64)
    relation = np.full((1, 1), FULL, dtype=np.int8)
    return build_plan(zeros, zeros, relation, np.zeros(1, dtype=np.int64), (0, rows))


def call(kernel: str, backend: str) -> None:
    x = torch.ones(4, 2, 8)
    rows = torch.ones(4, 8)
    if kernel == "attention":
        conditioning_attention(x, x, x, one_segment_plan(4), backend)
    elif kernel == "regression":
        metaquery_regression(rows, None, rows, "cosine", backend)
    elif kernel == "norm_rope":
        angles, weight = torch.ones(4, 4), torch.ones(8)
        qk_norm_rope([x], [x], [x], [weight], [weight], angles, angles, 1e-6, backend=backend)
    elif kernel == "cross_entropy":
        linear_cross_entropy(rows, torch.ones(5, 8), torch.zeros(4, dtype=torch.int64), backend)
    elif kernel == "pointwise":
        rms_norm(rows, torch.ones(8), 1e-6, backend)
        swiglu(rows, rows, backend)
    else:
        raise AssertionError(f"this test does not call the kernel {kernel}")


@pytest.mark.parametrize("kernel", backends.KERNELS)
def test_the_reference_of_every_kernel_runs_by_name_and_an_unknown_name_raises(kernel):
    call(kernel, "reference")
    with pytest.raises(ValueError, match="Unknown .* 'nobody'; allowed are "):
        call(kernel, "nobody")
    with pytest.raises(ValueError, match="Unknown"):
        unavailable_reason(kernel, "nobody")


@pytest.mark.parametrize("kernel", backends.KERNELS)
def test_a_backend_without_an_implementation_raises_and_never_runs_another_one(kernel, monkeypatch):
    def load():
        raise ModuleNotFoundError("not written yet")

    added = {**backends.KERNELS[kernel].backends, "dummy": Backend(load)}
    monkeypatch.setattr(
        backends, "KERNELS", {kernel: backends.Kernel(added, "reference", "reference")}
    )
    with pytest.raises(ModuleNotFoundError, match="not written yet"):
        call(kernel, "dummy")


def test_a_backend_that_is_unavailable_gives_its_own_reason(monkeypatch):
    attention = backends.KERNELS["attention"]
    dummy = Backend(backends._conditioning_attention_reference, lambda: "it needs a wand")
    added = backends.Kernel({**attention.backends, "dummy": dummy}, "sdpa", "dummy")
    monkeypatch.setitem(backends.KERNELS, "attention", added)
    with pytest.raises(SettingsError, match=r"kernels.attention.*'dummy' .* it needs a wand\."):
        backends._resolved("attention", "dummy")
    assert backends._resolved("attention", "auto") == "sdpa"


def test_heads_that_a_backend_cannot_compute_are_refused_for_any_backend_that_says_so(monkeypatch):
    picky = Backend(backends._conditioning_attention_reference, head_dims=(16,))
    added = backends.Kernel({"picky": picky}, "picky", "picky")
    monkeypatch.setitem(backends.KERNELS, "attention", added)
    settings = KernelSettings(attention="picky", norm_rope="reference")
    settings.check_heads(16, 16)
    with pytest.raises(SettingsError, match="'picky' takes heads of 16 values, .* heads of 72"):
        settings.check_heads(16, 72)


def test_the_memory_estimate_counts_what_a_backend_states_and_refuses_one_that_states_nothing(
    monkeypatch,
):
    shape = load_recipe("tiny").architecture
    flash = kept_per_row(shape, True, 2, "flash")
    with pytest.raises(ValueError, match="Unknown attention backend 'dummy'"):
        kept_per_row(shape, True, 2, "dummy")
    load = backends._conditioning_attention_reference
    silent = {**backends.KERNELS["attention"].backends, "dummy": Backend(load)}
    monkeypatch.setitem(backends.KERNELS, "attention", backends.Kernel(silent, "sdpa", "sdpa"))
    with pytest.raises(ValueError, match="'dummy' does not state what autograd keeps"):
        kept_per_row(shape, True, 2, "dummy")
    stated = Backend(load, memory=AttentionMemory(expands_keys=True))
    monkeypatch.setitem(backends.KERNELS["attention"].backends, "dummy", stated)
    expanded = 2 * 2 * (shape.query_width - shape.key_width)
    assert kept_per_row(shape, True, 2, "dummy") == flash + expanded
    assert expanded > 0


class MoreKinds:
    """A regression kind that is only in the list."""

    setting, value = "dummy", 7

    def __int__(self) -> int:
        return 7


def test_a_regression_kind_that_no_branch_knows_raises_in_every_backend(monkeypatch):
    rows = torch.randn(3, 16)
    with pytest.raises(ValueError, match="Unknown regression loss 'dummy'; allowed are cosine"):
        metaquery_regression(rows, None, rows, "dummy")
    dummy = MoreKinds()
    with pytest.raises(KeyError):
        reference.metaquery_regression(rows, None, rows, dummy)
    assert set(reference.DISTANCES) == set(RegressionKind)

    from uno_ds.kernels.metaquery_regression import triton_operator

    leaf = rows.clone().requires_grad_()
    with pytest.raises(Exception, match="no branch here"):
        triton_operator.metaquery_regression(leaf, None, rows, dummy)
    statistics = torch.ones(3, 3)
    with pytest.raises(Exception, match="no branch here"):
        triton_operator.backward(torch.ones(3), rows, None, rows, statistics, 7, True, False)
    assert kinds.kind_names() == ("cosine", "l2", "smooth_l1")


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


def with_target(recipe, name: str):
    objective = dataclasses.replace(recipe.objective, regression_target=name)
    return dataclasses.replace(recipe, objective=objective)


def regression_loss(target: str) -> float:
    """Mean cosine loss of a fixed pack. The head, where there is one, is fixed too."""
    objective = tiny_objective()
    settings = dataclasses.replace(objective.settings, regression_target=target)
    kernels = KernelSettings().resolved()
    changed = UnoObjective(objective.model, objective.codec, settings, kernels, 4).double()
    changed.load_state_dict(objective.state_dict(), strict=False)
    batch = collate(mixed_pack(0, make_composer()))
    _, losses = changed(batch, loss_counts(batch))
    return float(losses[2])


@pytest.mark.parametrize("like", ["vit", "connector"])
def test_a_regression_target_that_is_added_to_the_registry_alone_is_handled_everywhere(
    like, monkeypatch
):
    """The opposite of a known target: the cosine changes its sign."""
    known = REGRESSION_TARGETS[like]
    opposite = dataclasses.replace(known, features=lambda *given: -known.features(*given))
    monkeypatch.setitem(REGRESSION_TARGETS, "opposite", opposite)
    loss = regression_loss(like)
    assert loss != pytest.approx(1, abs=1e-4)
    assert regression_loss("opposite") == pytest.approx(2 - loss, rel=1e-9)

    recipe = load_recipe("tiny")
    assert plan_of(with_target(recipe, "opposite"), False) == plan_of(
        with_target(recipe, like), False
    )
    assert plan_of(with_target(recipe, "vit"), False) != plan_of(
        with_target(recipe, "connector"), False
    )
    shape = tiny_shape()
    batch = collate(mixed_pack(0, make_composer()))
    features = []
    for name in (like, "opposite"):
        encoder = TargetEncoder(shape, name).to_empty(device="cpu").double()
        for number, parameter in enumerate(encoder.parameters()):
            torch.nn.init.normal_(
                parameter, std=0.1, generator=torch.Generator().manual_seed(number)
            )
        features.append(encoder(batch.vision))
    assert torch.equal(features[0], -features[1]) and features[0].any()


def test_a_name_that_is_no_regression_target_raises_in_every_place_that_takes_one():
    recipe = with_target(load_recipe("tiny"), "nobody")
    places = [
        lambda: regression_loss("nobody"),
        lambda: TargetEncoder(tiny_shape(), "nobody"),
        lambda: plan_of(recipe, False),
    ]
    for place in places:
        with pytest.raises(
            ValueError, match="Unknown regression target 'nobody'; allowed are vit, connector"
        ):
            place()
    with pytest.raises(SettingsError, match="regression_target: .*vit, connector; got .*nobody"):
        build(ObjectiveSettings, {"regression_target": "nobody"})
    with pytest.raises(TypeError, match="head_width"):
        RegressionTarget(lambda *given: given[0], uses_connector=False)


def recorded_case(folder: Path, task: str) -> Path:
    """One run of a recorded case, under another name of its task."""
    goldens = Path(__file__).parent / "goldens" / "sampling"
    description = json.loads((goldens / "t2i.json").read_text())
    description |= {"task": task, "model": str(goldens / "base"), "runs": description["runs"][:1]}
    path = folder / "case.json"
    path.write_text(json.dumps(description))
    save_file(load_file(goldens / "t2i.safetensors"), folder / "case.safetensors")
    return path


def test_a_task_of_recorded_sampling_that_is_added_to_the_table_alone_is_replayed(
    tmp_path, monkeypatch
):
    drawn = []

    def draw(opened, sources, texts, settings, size, noise_BGC, observe):
        drawn.append((len(sources), texts))
        known.draw(opened, sources, texts, settings, size, noise_BGC, observe)

    known = TASKS["text_to_image"]
    assert isinstance(known, PictureTask)
    expected = list(replay(recorded_case(tmp_path, "text_to_image"), "sdpa", 1e-4))
    monkeypatch.setitem(TASKS, "sketch", dataclasses.replace(known, draw=draw))
    assert list(replay(recorded_case(tmp_path, "sketch"), "sdpa", 1e-4)) == expected
    assert drawn and all(sources == 0 and texts for sources, texts in drawn)


def test_a_name_that_is_no_task_of_recorded_sampling_raises_and_so_does_a_task_of_no_kind(
    tmp_path, monkeypatch
):
    path = recorded_case(tmp_path, "video")
    with pytest.raises(SettingsError, match="one of text_to_image, edit, caption; got 'video'"):
        load_sampling_case(path)
    monkeypatch.setitem(TASKS, "video", SimpleNamespace(has_sources=False))
    with pytest.raises(AssertionError, match="unreachable"):
        load_sampling_case(path)


def test_a_recorded_training_case_with_an_unknown_kind_of_item_is_refused(tmp_path):
    goldens = Path(__file__).parent / "goldens"
    name = "flow_and_vlm"
    text = (goldens / f"{name}.json").read_text().replace("vae_image", "audio")
    (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / f"{name}.safetensors").symlink_to(goldens / f"{name}.safetensors")
    with pytest.raises(SettingsError, match="must be text, vit_image or vae_image; got 'audio'"):
        load_case(tmp_path / f"{name}.json")


def bytes_of(recipe, codec: str) -> tuple[int, int]:
    """(weights, activations) of a codec, as the memory model estimates them for an empty pack."""
    shape = dataclasses.replace(recipe.architecture, codec=codec)
    needed = memory(
        parameters_of(recipe),
        shape,
        Sharding.of(recipe, 1, "fp32"),
        Scenario(prompt=0, latents=0, caption=0, metaqueries=0, samples=1),
        recompute=False,
        average=False,
        image_pixels=10**6,
        codec_bytes=4,
        attention="sdpa",
    )
    return needed.resident["codec"], needed.working.get("codec", 0)


def test_a_codec_that_is_added_to_the_registry_alone_is_handled_everywhere(tmp_path, monkeypatch):
    added = dataclasses.replace(
        CODECS["pixel"], weights_file="blocks.safetensors", parameters=7, values_per_pixel=3
    )
    encoder = torch.nn.Conv2d(3, 1, 1, device="meta")
    added = dataclasses.replace(added, empty_encoder=lambda: encoder)
    monkeypatch.setitem(CODECS, "blocks", added)
    recipe = load_recipe("tiny")
    shape = dataclasses.replace(recipe.architecture, codec="blocks")
    check_codec(shape, None)
    assert isinstance(build_codec(shape), PixelCodec)
    assert bytes_of(recipe, "blocks") == (7 * 4, 3 * 10**6 * 4)
    assert bytes_of(recipe, "pixel") == (0, 0)
    assert codec_flops("blocks", 8, 4) == 2 * 3 * 8 * 4
    base = random_base(tmp_path / "base")
    assert missing_files(base) == []
    config = json.loads((base / "config.json").read_text())
    config["vae_config"]["codec"] = "blocks"
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingsError, match=r"\.codec: must be flux, pixel; got blocks"):
        missing_files(base)
    monkeypatch.setattr("uno_ds.model.architecture.CODEC_NAMES", (*CODEC_NAMES, "blocks"))
    assert missing_files(base) == ["blocks.safetensors"]


def test_a_name_that_is_no_codec_raises_in_every_place_that_takes_one():
    assert set(CODEC_NAMES) == set(CODECS)
    recipe = load_recipe("tiny")
    shape = dataclasses.replace(recipe.architecture, codec="nobody")
    places = [
        lambda: get_codec("nobody"),
        lambda: build_codec(shape),
        lambda: check_codec(shape, None),
        lambda: codec_flops("nobody", 8, 8),
        lambda: bytes_of(recipe, "nobody"),
    ]
    for place in places:
        with pytest.raises(ValueError, match="Unknown codec 'nobody'; allowed are flux, pixel"):
            place()


def test_every_renormalisation_of_guidance_has_a_formula_and_an_unknown_one_raises():
    velocities = {name: torch.randn(1, 3, 4) for name in ("full", "without_text")}
    for name in RENORMALISATIONS:
        assert guide(velocities, SamplerSettings(renormalise=name)).shape == (1, 3, 4)
    with pytest.raises(ValueError, match="Unknown renormalisation 'nobody'; allowed are global"):
        guide(velocities, SamplerSettings(renormalise="nobody"))
