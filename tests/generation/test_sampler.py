"""Drawing, editing and captioning: cached sampling against the whole forward."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from rounding import assert_equal_up_to_rounding
from small_runs import picture
from tiny import ROW_SUMS
from whole_forward import CODEC, TOKENIZER, TOKENS, small_model, whole_forward

from uno_ds.data.layouts import edit as edit_layout
from uno_ds.data.layouts.conversation import conversation_sample
from uno_ds.data.layouts.text_to_image import text_to_image_sample
from uno_ds.generation import inference, sampler
from uno_ds.generation.cache import Cache
from uno_ds.generation.inference import (
    CaptionSettings,
    SampleSettings,
    caption,
    caption_noised,
    edit,
    generate,
    image_views,
)
from uno_ds.generation.sampler import EditSettings
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import latents_to_rows, rows_to_latents
from uno_ds.sequence.segments import Kind, Sample, Segment
from uno_ds.settings import SettingsError, build


@pytest.fixture(scope="module")
def model() -> Bagel:
    return small_model()


def draw(model: Bagel, prompts: list[str], **changes) -> list[np.ndarray]:
    settings = build(
        SampleSettings, {"prompts": prompts, "height": 16, "width": 24, "steps": 4, **changes}
    )
    return [np.asarray(image).astype(int) for image in generate(model, CODEC, TOKENIZER, settings)]


def edit_sample(model: Bagel, image: Image.Image, **drops: float) -> Sample:
    geometry = model.shape.geometry
    blank = inference.ImageViews(latent=np.zeros((3, 16, 24), dtype=np.float32))
    composer, rng = inference.sampling_composer(model, TOKENIZER, **drops), np.random.default_rng(0)
    return edit_layout.edit_sample(
        composer, "k", image_views(geometry, image), TOKENIZER.encode("change it"), None, blank, rng
    )


@pytest.mark.parametrize("drops", [{}, {"drop_text": 1.0}, {"drop_vit": 1.0, "drop_latent": 1.0}])
def test_a_cached_velocity_equals_that_of_the_whole_forward(model, drops):
    """Clean latents, visual-encoder image and instruction come from the cache, at every noise
    level, with a neighbour."""
    sample, neighbour = edit_sample(model, picture(), **drops), edit_sample(model, picture(seed=3))
    cache = Cache(model, TOKENS)
    cache.append(
        [
            (number, segment)
            for number, one in enumerate((sample, neighbour))
            for segment in one.segments[:-1]
        ],
        CODEC,
    )
    before = len(cache.segment_T)
    batch = cache.lay_out([(0, sample.segments[-1]), (1, neighbour.segments[-1])])
    for t in (1.0, 0.3):
        x = torch.randn(2, 24, model.shape.latent_values)
        for own, one, latents in zip(
            cache.velocity(batch, x.flatten(0, 1), t).chunk(2), (sample, neighbour), x, strict=True
        ):
            expected = model.llm2vae(whole_forward(model, one, latents, t)[1])
            assert_equal_up_to_rounding(own, expected, *ROW_SUMS)
    assert len(cache.segment_T) == before == len(cache.keys_values[0][0]), (
        "a velocity adds nothing to the cache"
    )


def test_pictures_equal_those_of_a_sampler_that_computes_everything_at_every_step(model):
    settings = build(
        EditSettings,
        {
            "steps": 3,
            "text_guidance": 3.0,
            "image_guidance": 1.5,
            "guidance_interval": [0.5, 1.0],
            "renormalise": "global",
            "seed": 5,
        },
    )
    sources = [picture(), picture(seed=3)]
    ours = edit(model, CODEC, TOKENIZER, sources, ["change it"] * 2, settings, size=(16, 24))
    for number, source in enumerate(sources):
        samples = {
            name: edit_sample(model, source, **drops)
            for name, drops in (
                ("full", {}),
                ("without_text", {"drop_text": 1.0}),
                ("without_image", {"drop_vit": 1.0, "drop_latent": 1.0}),
            )
        }
        x = torch.from_numpy(
            np.random.default_rng([5 + number, 0]).standard_normal(
                (24, model.shape.latent_values), dtype=np.float32
            )
        )
        times = [3 * line / (1 + 2 * line) for line in (1.0, 2 / 3, 1 / 3, 0.0)]
        for t, following in zip(times[:-1], times[1:], strict=True):
            v = {
                name: model.llm2vae(whole_forward(model, sample, x, t)[1])
                for name, sample in samples.items()
            }
            if t > 0.5:
                texted = v["without_text"] + 3.0 * (v["full"] - v["without_text"])
                guided = v["without_image"] + 1.5 * (texted - v["without_image"])
                guided = guided * min(1.0, float(v["full"].norm() / guided.norm()))
            else:
                guided = v["full"]
            x = x - guided * (t - following)
        pixels = (
            ((CODEC.decode(rows_to_latents(x, (4, 6), 2))[0].clamp(-1, 1) + 1) * 127.5)
            .round()
            .permute(1, 2, 0)
            .numpy()
        )
        assert np.abs(np.asarray(ours[number]).astype(int) - pixels).max() <= 1


def test_a_picture_depends_on_its_prompt_and_seed_and_not_on_its_neighbours(model):
    red, blue = draw(model, ["a red circle.", "a blue square."], text_guidance=2.0)
    assert red.shape == (16, 24, 3)
    assert np.abs(draw(model, ["a red circle."], text_guidance=2.0)[0] - red).max() <= 1
    assert np.abs(draw(model, ["a green cross."], text_guidance=2.0)[0] - red).max() > 1
    assert np.abs(draw(model, ["a red circle."], text_guidance=2.0, seed=7)[0] - red).max() > 1
    assert np.abs(draw(model, ["a blue square."], text_guidance=2.0, seed=1)[0] - blue).max() <= 1


def test_euler_follows_the_straight_path_of_a_perfect_velocity_to_the_image(monkeypatch, model):
    """With v = eps - x0 the path is a line: any number of steps, any shift, ends at x0."""
    target = torch.linspace(-0.9, 0.9, 3 * 16 * 24).reshape(1, 3, 16, 24)
    clean = latents_to_rows(CODEC.encode(target), 2)

    def perfect(_cache, _batch, x, t):
        return (
            x - clean.repeat(len(x) // len(clean), 1)
        ) / t  # x_t = (1 - t) x0 + t eps gives eps - x0 = (x_t - x0) / t

    monkeypatch.setattr(sampler.Cache, "velocity", perfect)
    expected = ((target[0].permute(1, 2, 0).numpy() + 1) * 127.5).round()
    for steps, shift in ((1, 1.0), (7, 3.0)):
        assert np.abs(draw(model, ["any"], steps=steps, shift=shift)[0] - expected).max() <= 1


def test_unguided_branches_are_computed_inside_the_interval_only(monkeypatch, model):
    seen = []

    def record(_cache, batch, x, t):
        seen.append((t, len(x) // 24))
        return torch.ones_like(x)

    monkeypatch.setattr(sampler.Cache, "velocity", record)
    draw(model, ["any"], steps=4, shift=1.0, guidance_interval=[0.5, 0.75])
    assert seen == [(1.0, 1), (0.75, 2), (0.5, 1), (0.25, 1)]
    seen.clear()
    draw(model, ["any"], steps=2, text_guidance=1.0)
    assert [branches for _, branches in seen] == [1, 1]


def test_sizes_that_are_no_multiple_of_a_latent_token_or_beyond_the_table_are_refused(model):
    for height in (18, 64):
        with pytest.raises(SettingsError, match="samples.height: .*multiples of 4 pixels up to 32"):
            draw(model, ["any"], height=height)


@pytest.mark.parametrize("view", ["vit", "latents", "both"])
def test_a_greedy_caption_equals_the_likeliest_tokens_of_the_whole_forward(model, view):
    images, question = [picture(), picture(seed=4)], "what is it?"
    texts = caption(
        model, CODEC, TOKENIZER, images, build(CaptionSettings, {"max_tokens": 6}), question, view
    )
    for image, text in zip(images, texts, strict=True):
        views = image_views(model.shape.geometry, image)
        shown = inference.ImageViews(
            latent=views.latent if view != "vit" else None,
            vit=views.vit if view != "latents" else None,
        )
        asked = [(False, [shown, TOKENIZER.encode(question)])]
        context = conversation_sample(
            inference.sampling_composer(model, TOKENIZER), "k", asked
        ).segments
        ids = [TOKENIZER.bos]
        for _ in range(6):
            rope = int(context[-1].rope_ids[-1]) + 1 + np.arange(len(ids))
            hidden, _ = whole_forward(
                model,
                Sample("k", [*context, Segment(Kind.TEXT, rope, token_ids=np.array(ids))]),
                None,
                0.0,
            )
            ids.append(int(model.lm_head(hidden[-1]).argmax()))
            if ids[-1] == TOKENIZER.eos:
                break
        assert text == TOKENIZER.decode(ids[1:])


@pytest.mark.parametrize("prompt", [None, "a red circle."])
def test_a_caption_from_noised_latents_reads_what_the_caption_loss_supervises(
    model, prompt, monkeypatch
):
    """The logits of every step equal those of a training batch: prompt, noised image, and the
    caption that supervises it."""
    logits, choose = [], inference._choose
    monkeypatch.setattr(
        inference, "_choose", lambda row, *rest: logits.append(row.copy()) or choose(row, *rest)
    )
    text = caption_noised(
        model,
        CODEC,
        TOKENIZER,
        [picture()],
        build(CaptionSettings, {"max_tokens": 5, "seed": 2}),
        0.4,
        prompt,
    )
    sample = text_to_image_sample(
        inference.sampling_composer(model, TOKENIZER, drop_text=0.0 if prompt else 1.0),
        "k",
        TOKENIZER.encode(prompt or ""),
        None,
        image_views(model.shape.geometry, picture()),
        np.random.default_rng(0),
    )
    noised = sample.segments[-1]
    x = latents_to_rows(CODEC.encode(torch.from_numpy(noised.pixels)[None]), 2)
    eps = torch.from_numpy(
        np.random.default_rng([2, 0]).standard_normal(tuple(x.shape), dtype=np.float32)
    )
    ids = [TOKENIZER.bos, *(int(row.argmax()) for row in logits)]
    written = Segment(
        Kind.CAPTION,
        noised.rope_ids[0] + 1 + np.arange(len(ids)),
        token_ids=np.array(ids),
        supervises=len(sample.segments) - 1,
    )
    hidden, _ = whole_forward(
        model, Sample("k", [*sample.segments, written]), 0.6 * x + 0.4 * eps, 0.4
    )
    expected = model.lm_head(hidden[-len(ids) : -1])
    assert_equal_up_to_rounding(torch.from_numpy(np.stack(logits)), expected, *ROW_SUMS)
    assert text == [TOKENIZER.decode([token for token in ids[1:] if token != TOKENIZER.eos])]


def test_captions_stop_at_eos_each_on_its_own(model, monkeypatch):
    """A caption that has ended is not prolonged by its neighbours, whose text does not change
    either."""
    ids = iter([[7, 9], [TOKENIZER.eos, 11], [12], [TOKENIZER.eos]])
    step = []

    def choose(row, settings, generator):
        if not step:
            step.extend(next(ids))
        return step.pop(0)

    monkeypatch.setattr(inference, "_choose", choose)
    texts = caption(
        model,
        CODEC,
        TOKENIZER,
        [picture(), picture(seed=4)],
        build(CaptionSettings, {"max_tokens": 50}),
    )
    assert texts == [TOKENIZER.decode([7]), TOKENIZER.decode([9, 11, 12])]


def test_drawn_tokens_follow_temperature_top_p_and_seed():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))

    def shares(**changes):
        settings, generator = build(CaptionSettings, changes), np.random.default_rng(0)
        return (
            np.bincount(
                [inference._choose(logits, settings, generator) for _ in range(4000)], minlength=4
            )
            / 4000
        )

    assert shares(temperature=0.0).tolist() == [1, 0, 0, 0]
    assert np.abs(shares(temperature=1.0) - [0.5, 0.3, 0.15, 0.05]).max() < 0.03
    square = np.array([0.25, 0.09, 0.0225, 0.0025])
    assert np.abs(shares(temperature=0.5) - square / square.sum()).max() < 0.03
    assert np.abs(shares(temperature=1.0, top_p=0.7) - [0.625, 0.375, 0, 0]).max() < 0.03


def test_drawn_captions_repeat_with_their_seed_alone_or_in_company(model):
    images = [picture(), picture(seed=4)]
    settings = build(CaptionSettings, {"max_tokens": 8, "temperature": 1.0, "seed": 3})
    together = caption(model, CODEC, TOKENIZER, images, settings)
    assert together == caption(model, CODEC, TOKENIZER, images, settings)
    assert together[1:] == caption(
        model, CODEC, TOKENIZER, images[1:], dataclasses.replace(settings, seed=4)
    )
    assert together != caption(
        model, CODEC, TOKENIZER, images, dataclasses.replace(settings, seed=30)
    )


def test_rows_and_latents_are_inverse_for_several_images():
    latents = torch.randn(3, 12, 4, 6)
    rows = latents_to_rows(latents, 2)
    assert rows.shape == (3 * 2 * 3, 48)
    assert torch.equal(rows_to_latents(rows, (2, 3), 2), latents)
    pixels = torch.randn(2, 3, 8, 8)
    assert torch.equal(CODEC.decode(CODEC.encode(pixels)), pixels)
