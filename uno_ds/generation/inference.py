"""Inference: a picture for a prompt, an edited picture, a text about a picture.

Samples are composed as in training (data/layouts), with drop rates of 0 and 1 for the branches of
guidance."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from uno_ds.data.images import inference_size, resize_to, to_array
from uno_ds.data.layouts.conversation import VIEWS, conversation_sample
from uno_ds.data.layouts.edit import edit_sample
from uno_ds.data.layouts.text_to_image import text_to_image_sample
from uno_ds.data.text import Tokenizer
from uno_ds.generation.cache import Cache
from uno_ds.generation.sampler import Branches, EditSettings, Observe, SamplerSettings, draw
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import Codec
from uno_ds.sequence.composition import (
    Geometry,
    ImageViews,
    SampleComposer,
    SequenceSettings,
    SpecialTokens,
)
from uno_ds.sequence.segments import Kind, Sample, Segment
from uno_ds.settings import SettingsError, build, setting

# Called for each token's place with the logits [V] of every text that has not ended, by its number.
ObserveLogits = Callable[[int, dict[int, np.ndarray]], None]
# The public BAGEL's shortest sides, 512 of 1024 and 224 of 980 pixels, as shares of the longest.
LATENT_LEAST, VIT_LEAST = 512 / 1024, 224 / 980


@dataclass(frozen=True)
class SampleSettings(SamplerSettings):
    edit: EditSettings = setting(
        factory=EditSettings, doc="How `sample.py edit` edits with a model of this run."
    )
    prompts: list[str] = setting(
        factory=list,
        doc="Prompts of the pictures drawn at the end of a run, with the base model and with the "
        "trained one; none: no pictures.",
    )
    height: int = setting(
        32,
        doc="Height of the pictures in pixels.",
        minimum=1,
        maximum=65_536,
    )
    width: int = setting(
        32,
        doc="Width of the pictures in pixels.",
        minimum=1,
        maximum=65_536,
    )


@dataclass(frozen=True)
class CaptionSettings:
    max_tokens: int = setting(
        256,
        doc="Tokens after which a caption is cut if it has not ended.",
        minimum=1,
        maximum=10**6,
    )
    temperature: float = setting(
        0.0,
        doc="0: always the likeliest token (greedy); above: tokens are drawn from softmax(logits / "
        "temperature).",
        minimum=1e-3,
        maximum=1e3,
        or_zero=True,
    )
    top_p: float = setting(
        1.0,
        doc="Draw among the likeliest tokens that together have this probability.",
        above=0,
        maximum=1,
    )
    seed: int = setting(
        0,
        doc="Seed of the first caption's draws and of the noise of a noised image; the next ones "
        "count up.",
        minimum=0,
        maximum=2**62,
    )


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    ids = (tokenizer.bos, tokenizer.eos, tokenizer.start_of_image, tokenizer.end_of_image)
    bos, eos, start_of_image, end_of_image = ids
    assert bos is not None and eos is not None, "checked when the tokenizer is opened"
    assert start_of_image is not None and end_of_image is not None, "likewise"
    return SpecialTokens(bos, eos, start_of_image, end_of_image)


def generate(
    model: Bagel,
    codec: Codec,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    progress: str | None = None,
    noise_BGC: torch.Tensor | None = None,
    observe: Observe | None = None,
) -> list[Image.Image]:
    """One picture for each prompt of the settings; see `draw`."""
    blank = ImageViews(latent=blank_pixels(model.shape.geometry, settings.height, settings.width))

    def sample(prompt: str, drop_text: float) -> Sample:
        composer = sampling_composer(model, tokenizer, drop_text=drop_text)
        ids = tokenizer.encode(prompt)
        return text_to_image_sample(composer, prompt, ids, None, blank, np.random.default_rng(0))

    pictures = []
    for prompt in settings.prompts:
        without_text = sample(prompt, drop_text=1.0) if settings.text_guidance > 1 else None
        pictures.append(Branches(sample(prompt, drop_text=0.0), without_text))
    tokens = special_tokens(tokenizer)
    return draw(model, codec, tokens, pictures, settings, progress, noise_BGC, observe)


def edit(
    model: Bagel,
    codec: Codec,
    tokenizer: Tokenizer,
    sources: Sequence[Image.Image | ImageViews | Sequence[Image.Image]],
    instructions: Sequence[str],
    settings: EditSettings,
    size: tuple[int, int] | None = None,
    progress: str | None = None,
    noise_BGC: torch.Tensor | None = None,
    observe: Observe | None = None,
) -> list[Image.Image]:
    """Each source image (RGB), or several that are read one after the other, changed by its
    instruction; see `draw`. `size`: (height, width) of the result; None: that of the (last) source
    as the codec reads it, and then all requests must have one size."""
    geometry = model.shape.geometry

    def sample(
        views: list[ImageViews], instruction: str, blank: ImageViews, **drops: float
    ) -> Sample:
        return edit_sample(
            sampling_composer(model, tokenizer, **drops),
            instruction,
            views,
            tokenizer.encode(instruction),
            None,
            blank,
            np.random.default_rng(0),
        )

    pictures = []
    for source, instruction in zip(sources, instructions, strict=True):
        images = [source] if isinstance(source, (Image.Image, ImageViews)) else source
        views = [image_views(geometry, image) for image in images]
        height, width = size or pixel_size(views[-1])
        request = (views, instruction, ImageViews(latent=blank_pixels(geometry, height, width)))
        without_text = without_image = None
        if settings.text_guidance > 1:
            without_text = sample(*request, drop_text=1.0)
        if settings.image_guidance > 1:
            without_image = sample(*request, drop_vit=1.0, drop_latent=1.0)
        pictures.append(Branches(sample(*request), without_text, without_image))
    tokens = special_tokens(tokenizer)
    return draw(model, codec, tokens, pictures, settings, progress, noise_BGC, observe)


def caption(
    model: Bagel,
    codec: Codec,
    tokenizer: Tokenizer,
    images: Sequence[Image.Image | ImageViews],
    settings: CaptionSettings,
    question: str | None = None,
    view: str = "vit",
) -> list[str]:
    """The understanding expert's text about each image (RGB), after a question if there is one.
    `view`: vit, latents or both, how it sees the image."""
    texts = caption_tokens(model, codec, tokenizer, images, settings, question, view)
    return [tokenizer.decode(ids) for ids in texts]


@torch.no_grad()
def caption_tokens(
    model: Bagel,
    codec: Codec,
    tokenizer: Tokenizer,
    images: Sequence[Image.Image | ImageViews],
    settings: CaptionSettings,
    question: str | None = None,
    view: str = "vit",
    observe: ObserveLogits | None = None,
) -> list[list[int]]:
    """The token ids of `caption`, without bos and eos."""
    show_latents, show_vit = VIEWS[view]
    composer = sampling_composer(model, tokenizer)
    samples = []
    for image in images:
        views = image_views(model.shape.geometry, image)
        shown = ImageViews(
            latent=views.latent if show_latents else None,
            vit=views.vit if show_vit else None,
        )
        parts: list[list[int] | ImageViews] = [shown]
        if question is not None:
            parts.append(tokenizer.encode(question))
        samples.append(conversation_sample(composer, "", [(False, parts)]))
    return decode_texts(model, codec, tokenizer, samples, settings, observe)


@torch.no_grad()
def caption_noised(
    model: Bagel,
    codec: Codec,
    tokenizer: Tokenizer,
    images: Sequence[Image.Image],
    settings: CaptionSettings,
    t: float,
    prompt: str | None = None,
) -> list[str]:
    """The text that the understanding expert reads from each image's latents noised to level t in
    [0, 1]: what UNO's caption loss supervises. The generation expert reads `prompt` before the
    latents; the caption does not see it, as in training."""
    if not 0 <= t <= 1:
        raise SettingsError(
            "from_noised", f"must be a noise level from 0 (clean) to 1 (noise), got {t}."
        )
    composer = sampling_composer(model, tokenizer, drop_text=1.0 if prompt is None else 0.0)
    samples = []
    for number, image in enumerate(images):
        sample = text_to_image_sample(
            composer,
            "",
            tokenizer.encode(prompt or ""),
            None,
            image_views(model.shape.geometry, image),
            np.random.default_rng(0),
        )
        *conditions, noised = sample.segments
        assert noised.noise is not None, "the last segment is the noised image"
        generator = np.random.default_rng([settings.seed + number, 0])
        noise = generator.standard_normal(noised.noise.shape, dtype=np.float32)
        noised = dataclasses.replace(noised, timestep=t, noise=noise)
        samples.append(Sample("", [*conditions, noised]))
    texts = decode_texts(model, codec, tokenizer, samples, settings)
    return [tokenizer.decode(ids) for ids in texts]


def image_views(geometry: Geometry, image: Image.Image | ImageViews) -> ImageViews:
    """Both encoders' views of an image, with the sizes of the public BAGEL's inference: as large as
    the position tables allow, small images enlarged to half of that for the codec. The visual
    encoder reads the picture as it was resized for the codec, also where the codec's view is not
    used."""
    if isinstance(image, ImageViews):
        return image
    height, width = codec_size(geometry, image)
    for_codec = resize_to(image, (width, height))
    stride, most = geometry.vit_stride, geometry.vit_stride * geometry.vit_side
    vit_size = inference_size(width, height, stride, most, round(most * VIT_LEAST))
    return ImageViews(latent=to_array(for_codec), vit=to_array(resize_to(for_codec, vit_size)))


def pixel_size(view: ImageViews) -> tuple[int, int]:
    """(height, width) of the pixels that the codec reads."""
    assert isinstance(view.latent, np.ndarray), "a view of pixels"
    _, height, width = view.latent.shape
    return height, width


def codec_size(geometry: Geometry, image: Image.Image) -> tuple[int, int]:
    """(height, width) of the image as the codec reads it: the size of an edit's result."""
    stride, most = geometry.latent_stride, geometry.latent_stride * geometry.latent_side
    width, height = inference_size(*image.size, stride, most, round(most * LATENT_LEAST))
    return height, width


@torch.no_grad()
def decode_texts(
    model: Bagel,
    codec: Codec,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    settings: CaptionSettings,
    observe: ObserveLogits | None = None,
) -> list[list[int]]:
    """Continues every sample with a text, token by token until its eos: a caption of the noised
    image if the sample ends with one. Returns the token ids, without bos and eos."""
    tokens = special_tokens(tokenizer)
    cache = Cache(model, tokens)
    conditions = []
    for number, sample in enumerate(samples):
        conditions += [(number, segment) for segment in sample.segments]
    cache.append(conditions, codec)
    generators = [
        np.random.default_rng([settings.seed + number, 1]) for number in range(len(samples))
    ]
    texts: list[list[int]] = [[] for _ in samples]
    # The last token of every text that has not ended, by the number of its sample.
    last_tokens = {number: tokens.bos for number in range(len(samples))}
    for place in range(settings.max_tokens):
        pieces = [
            (number, _token_segment(samples[number], token, place))
            for number, token in last_tokens.items()
        ]
        hidden = cache.append(pieces, grow=place > 0)
        logits = model.lm_head(hidden).float().cpu().numpy()
        logits_of = dict(zip(last_tokens, logits, strict=True))
        if observe is not None:
            observe(place, logits_of)
        last_tokens = {}
        for number, row in logits_of.items():
            token = _choose(row, settings, generators[number])
            if token != tokens.eos:
                last_tokens[number] = token
                texts[number].append(token)
        if not last_tokens:
            break
    return texts


def _token_segment(sample: Sample, token: int, place: int) -> Segment:
    """One token of the text that continues a sample, at `place` of the text."""
    last = sample.segments[-1]
    captions_it = last.kind == Kind.NOISED
    return Segment(
        Kind.CAPTION if captions_it else Kind.TEXT,
        last.rope_ids[-1:] + 1 + place,
        token_ids=np.array([token]),
        supervises=len(sample.segments) - 1 if captions_it else -1,
    )


def _choose(logits: np.ndarray, settings: CaptionSettings, generator: np.random.Generator) -> int:
    """The likeliest token, or one drawn among the likeliest of joint probability `top_p`."""
    if not settings.temperature:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / settings.temperature
    probability = np.exp(scaled - scaled.max())
    probability /= probability.sum()
    order = np.argsort(-probability, kind="stable")
    count = int(np.searchsorted(np.cumsum(probability[order]), settings.top_p)) + 1
    kept = order[:count]
    return int(generator.choice(kept, p=probability[kept] / probability[kept].sum()))


def sampling_composer(model: Bagel, tokenizer: Tokenizer, **drops: float) -> SampleComposer:
    settings = build(
        SequenceSettings,
        {
            "token_budget": 1,
            "metaquery_grid": 0,
            "drop_text": 0.0,
            "drop_vit": 0.0,
            "drop_latent": 0.0,
        }
        | drops,
    )
    return SampleComposer(
        settings, model.shape.geometry, special_tokens(tokenizer), captions=False, metaqueries=False
    )


def blank_pixels(geometry: Geometry, height: int, width: int) -> np.ndarray:
    """Pixels of the picture to be drawn, of which only the size is read."""
    stride, most = geometry.latent_stride, geometry.latent_stride * geometry.latent_side
    if (
        height % stride
        or width % stride
        or not 0 < min(height, width) <= max(height, width) <= most
    ):
        raise SettingsError(
            "samples.height",
            f"height and width must be multiples of {stride} pixels up to {most}, got {height} x "
            f"{width}.",
        )
    return np.zeros((3, height, width), dtype=np.float32)
