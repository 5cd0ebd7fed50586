"""Texts of an example as token ids, and its pictures as the encoders' views."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from uno_ds.data.examples import Picture, PreparedImage, Text
from uno_ds.data.images import BadRow, ImageSettings, resize, to_array
from uno_ds.data.text import Tokenizer
from uno_ds.sequence.composition import ImageViews, SampleComposer


class ExampleEncoder:
    """`latent_image`, `vit_image`: how images are sized for the codec and the visual encoder."""

    def __init__(
        self,
        composer: SampleComposer,
        tokenizer: Tokenizer,
        latent_image: ImageSettings,
        vit_image: ImageSettings,
    ):
        self.composer = composer
        self.tokenizer = tokenizer
        self.latent_image = latent_image
        self.vit_image = vit_image

    def text(self, text: Text) -> list[int]:
        """Raises BadRow for a text of more tokens than sequence.max_text_tokens."""
        ids = self._short_ids(text)
        if ids is None:
            size = f"{len(text):,} {'characters' if isinstance(text, str) else 'tokens'}"
            raise BadRow(
                "text_too_long",
                f"{size} are more than the {self.composer.settings.max_text_tokens} tokens of "
                "sequence.max_text_tokens",
            )
        return ids

    def one_of(self, texts: Sequence[Text], rng: np.random.Generator) -> list[int]:
        """One of the texts that are not too long. Raises BadRow if all are."""
        for index in rng.permutation(len(texts)):
            ids = self._short_ids(texts[index])
            if ids is not None:
                return ids
        return self.text(texts[0])

    def two_of(
        self, texts: Sequence[Text], rng: np.random.Generator
    ) -> tuple[list[int], list[int]]:
        """Two of the texts that are not too long: different ones if there are two. Raises BadRow if
        all are too long."""
        first = self.one_of(texts, rng)
        others = [ids for ids in self.all_of(texts) if ids != first]
        second = others[int(rng.integers(len(others)))] if others else first
        return first, second

    def all_of(self, texts: Sequence[Text]) -> list[list[int]]:
        """Those of the texts that are not too long."""
        encoded = [self._short_ids(text) for text in texts]
        return [ids for ids in encoded if ids is not None]

    def views(self, image: Picture, latent: bool, vit: bool) -> ImageViews:
        """The requested views of an image that is a condition."""
        if isinstance(image, PreparedImage):
            pixels = None
            if vit:
                assert image.picture is not None, "prepared of every condition"
                pixels = to_array(image.picture)
            return ImageViews(image.latent if latent else None, pixels)
        return self._views_of_pixels(image, latent, vit)

    def generated_views(self, image: Picture) -> ImageViews:
        """The views of an image that is to be generated: latents, and what metaqueries regress."""
        metaqueries = self.composer.metaqueries
        if isinstance(image, PreparedImage):
            return ImageViews(image.latent, image.target if metaqueries else None)
        return self._views_of_pixels(image, latent=True, vit=metaqueries)

    def _views_of_pixels(self, image: Image.Image, latent: bool, vit: bool) -> ImageViews:
        geometry = self.composer.geometry
        latent_pixels = vit_pixels = None
        if latent:
            latent_pixels = to_array(resize(image, geometry.latent_stride, self.latent_image))
        if vit:
            vit_pixels = to_array(resize(image, geometry.vit_stride, self.vit_image))
        return ImageViews(latent_pixels, vit_pixels)

    def _short_ids(self, text: Text) -> list[int] | None:
        """None for a text of more tokens than sequence.max_text_tokens."""
        most = self.composer.settings.max_text_tokens
        if isinstance(text, str):
            characters = self.tokenizer.most_characters(most)
            # Tokenising megabytes takes seconds, and so long a text cannot fit.
            if characters is not None and len(text) > characters:
                return None
            text = self.tokenizer.encode(text)
        return text if len(text) <= most else None
