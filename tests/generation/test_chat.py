"""Interleaved inference: replies read everything before them, as the whole forward without a cache
does."""

import numpy as np
import pytest
import torch
from small_runs import picture
from whole_forward import CODEC, TOKENIZER, TOKENS, small_model, whole_forward

from uno_ds.data.layouts.conversation import conversation_sample
from uno_ds.generation import inference, sampler
from uno_ds.generation.chat import Chat
from uno_ds.generation.inference import CaptionSettings
from uno_ds.generation.sampler import EditSettings, SamplerSettings
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import rows_to_latents
from uno_ds.sequence.segments import Kind, Sample
from uno_ds.settings import build

SIZE = (16, 24)


@pytest.fixture(scope="module")
def model() -> Bagel:
    return small_model()


def chat_of(model: Bagel, view: str = "both") -> Chat:
    """Two images and two texts."""
    chat = Chat(model, CODEC, TOKENIZER, view)
    chat.show(picture(seed=1))
    chat.say("put this")
    chat.show(picture(seed=2))
    chat.say("on that")
    return chat


def kinds(sample: Sample) -> list[Kind]:
    return [segment.kind for segment in sample.segments]


TEXT, VIT, CLEAN, NOISED = Kind.TEXT, Kind.VIT, Kind.CLEAN, Kind.NOISED


def test_what_a_reply_reads(model):
    chat = chat_of(model)
    context = [CLEAN, VIT, TEXT, CLEAN, VIT, TEXT]
    assert kinds(chat.question()) == context
    assert kinds(chat.request(SIZE)) == [*context, NOISED]
    assert kinds(chat.request(SIZE, drop_text=1.0)) == [CLEAN, VIT, CLEAN, VIT, NOISED]
    without_images = chat.request(SIZE, drop_vit=1.0, drop_latent=1.0)
    assert kinds(without_images) == [TEXT, TEXT, NOISED]
    assert kinds(chat_of(model, "vit").question()) == [VIT, TEXT, VIT, TEXT]
    # Replies are read by what comes next, a picture in both views.
    chat.answer(CaptionSettings(max_tokens=3))
    drawn = chat.draw(SamplerSettings(steps=1, text_guidance=1.0), SIZE)
    assert drawn.size == (24, 16)
    assert kinds(chat.question()) == [*context, TEXT, CLEAN, VIT]


@pytest.mark.parametrize("view", ["vit", "latents", "both"])
def test_a_greedy_answer_is_that_of_the_whole_forward(model, view):
    chat = chat_of(model, view)
    composer = inference.sampling_composer(model, TOKENIZER)
    parts = [piece.ids if hasattr(piece, "ids") else piece.shown for piece in chat.pieces]
    expected: list[int] = []
    while len(expected) < 5:
        sample = conversation_sample(composer, "", [(False, [*parts, expected])])
        rows, _ = whole_forward(model, sample, None, 0.0)
        # The last row is the end of the text; the one before it predicts the next token.
        token = int(model.lm_head(rows[-2]).argmax())
        if token == TOKENS.eos:
            break
        expected.append(token)
    answer = chat.answer(CaptionSettings(max_tokens=5))
    assert answer == TOKENIZER.decode(expected) and chat.pieces[-1].ids == expected


def test_a_guided_picture_is_that_of_the_whole_forward(model):
    settings = build(
        EditSettings, {"steps": 3, "text_guidance": 2.0, "image_guidance": 1.5, "seed": 4}
    )
    chat = chat_of(model)
    drops = {
        "full": {},
        "without_text": {"drop_text": 1.0},
        "without_image": {"drop_vit": 1.0, "drop_latent": 1.0},
    }
    branches = {name: chat.request(SIZE, **dropped) for name, dropped in drops.items()}
    grid = branches["full"].segments[-1].grid
    noise = np.random.default_rng([settings.seed, 0])
    values = noise.standard_normal((grid[0] * grid[1], model.shape.latent_values), dtype=np.float32)
    x = torch.from_numpy(values)
    times = settings.times()
    for t, next_t in zip(times[:-1], times[1:], strict=True):
        velocities = {
            name: model.llm2vae(whole_forward(model, sample, x, t)[1])[None]
            for name, sample in branches.items()
        }
        x = x - sampler.guide(velocities, settings)[0] * (t - next_t)
    latents = rows_to_latents(x, grid, model.shape.latent_patch)
    pixels = ((CODEC.decode(latents).clamp(-1, 1) + 1) * 127.5)[0].permute(1, 2, 0).numpy()
    drawn = np.asarray(chat.draw(settings, SIZE)).astype(np.float32)
    # A value is rounded to a byte; values close to the middle may go either way.
    assert np.abs(drawn - pixels).max() <= 0.5 + 1e-2
