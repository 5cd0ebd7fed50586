"""Interleaved inference: any number of images and texts in, a text or an image out, which is read
by what comes next.

Samples are composed as interleaved samples of training are (data/layouts/interleaved). What a reply
reads is computed once and cached for its tokens or its steps."""

import numpy as np
import torch
from PIL import Image

from uno_ds.data.layouts.conversation import VIEWS, conversation_sample
from uno_ds.data.layouts.interleaved import ImagePiece, TextPiece, interleaved_sample
from uno_ds.data.text import Tokenizer
from uno_ds.generation.inference import (
    CaptionSettings,
    blank_pixels,
    decode_texts,
    image_views,
    pixel_size,
    sampling_composer,
    special_tokens,
)
from uno_ds.generation.sampler import Branches, EditSettings, SamplerSettings, draw
from uno_ds.model.bagel import Bagel
from uno_ds.model.codec import Codec
from uno_ds.sequence.composition import ImageViews
from uno_ds.sequence.segments import Sample


class Chat:
    """One conversation. `view`: one of VIEWS, how images are seen."""

    def __init__(self, model: Bagel, codec: Codec, tokenizer: Tokenizer, view: str = "both"):
        self.model, self.codec, self.tokenizer = model, codec, tokenizer
        self.shows_latents, self.shows_vit = VIEWS[view]
        self.pieces: list[TextPiece | ImagePiece] = []
        self._size: tuple[int, int] | None = None

    def say(self, text: str) -> None:
        """Adds a text."""
        self.pieces.append(TextPiece(self.tokenizer.encode(text)))

    def show(self, image: Image.Image) -> None:
        """Adds an image (RGB)."""
        views = image_views(self.model.shape.geometry, image)
        self._size = pixel_size(views)
        latent = views.latent if self.shows_latents else None
        self.pieces.append(ImagePiece(ImageViews(latent, views.vit if self.shows_vit else None)))

    @property
    def has_images(self) -> bool:
        return any(isinstance(piece, ImagePiece) for piece in self.pieces)

    @torch.no_grad()
    def answer(self, settings: CaptionSettings) -> str:
        """The understanding expert's text after everything so far, which is added."""
        (ids,) = decode_texts(self.model, self.codec, self.tokenizer, [self.question()], settings)
        self.pieces.append(TextPiece(ids))
        return self.tokenizer.decode(ids)

    def draw(self, settings: SamplerSettings, size: tuple[int, int] | None = None) -> Image.Image:
        """A picture after everything so far, which is added. `size`: (height, width) in pixels;
        None: that of the last image, else the largest square. Guidance of images needs
        EditSettings."""
        guides_images = self.has_images and isinstance(settings, EditSettings)
        image_guidance = settings.image_guidance if isinstance(settings, EditSettings) else 1.0
        full = self.request(size)
        without_text = without_image = None
        if settings.text_guidance > 1:
            without_text = self.request(size, drop_text=1.0)
        if guides_images and image_guidance > 1:
            without_image = self.request(size, drop_vit=1.0, drop_latent=1.0)
        branches = Branches(full, without_text, without_image)
        tokens = special_tokens(self.tokenizer)
        (picture,) = draw(self.model, self.codec, tokens, [branches], settings)
        self.show(picture)
        return picture

    def question(self) -> Sample:
        """The sample that an answer continues."""
        composer = sampling_composer(self.model, self.tokenizer)
        parts: list[list[int] | ImageViews] = [
            piece.ids if isinstance(piece, TextPiece) else piece.shown for piece in self.pieces
        ]
        return conversation_sample(composer, "", [(False, parts)])

    def request(self, size: tuple[int, int] | None = None, **drops: float) -> Sample:
        """The sample of a picture: its last segment is the picture to be drawn."""
        geometry = self.model.shape.geometry
        largest = geometry.latent_stride * geometry.latent_side
        height, width = size or self._size or (largest, largest)
        blank = ImageViews(latent=blank_pixels(geometry, height, width))
        composer = sampling_composer(self.model, self.tokenizer, **drops)
        target = ImagePiece(ImageViews(), target=blank)
        return interleaved_sample(composer, "", [*self.pieces, target], np.random.default_rng(0))
