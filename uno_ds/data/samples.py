"""From an example of a source to a laid-out sample: caption choice, tokens, image views, and the checks that make a row bad."""

import numpy as np

from uno_ds.data.images import BadRow, ImageSettings, resize, to_array
from uno_ds.data.rows import Conversation, Edit, Example, Picture, PreparedImage, Text, TextToImage
from uno_ds.data.text import Tokenizer
from uno_ds.sequence.composition import Geometry, ImageViews, SampleComposer
from uno_ds.sequence.segments import Sample


class SampleMaker:
    """`latent_image`, `vit_image`: how images are sized for the codec and for the visual encoder."""

    def __init__(
        self,
        composer: SampleComposer,
        tokenizer: Tokenizer,
        latent_image: ImageSettings,
        vit_image: ImageSettings,
        token_budget: int,
    ):
        self.composer, self.tokenizer = composer, tokenizer
        self.latent_image, self.vit_image, self.token_budget = latent_image, vit_image, token_budget

    def __call__(self, example: Example, rng: np.random.Generator) -> Sample:
        """Raises BadRow if the example has no usable text or does not fit the token budget."""
        if isinstance(example, TextToImage):
            prompt, caption = self._two_captions(example.captions, rng)
            sample = self.composer.text_to_image(
                example.key, prompt, caption, self._target(example.image), rng
            )
        elif isinstance(example, Edit):
            instruction = self._one_of(example.instructions, rng)
            caption = self._one_of(example.captions, rng) if example.captions else None
            source = self._views(example.source, latent=True, vit=True)
            sample = self.composer.edit(
                example.key, source, instruction, caption, self._target(example.target), rng
            )
        else:
            sample = self._conversation(example, rng)
        if sample.length > self.token_budget:
            raise BadRow(
                "too_long_for_budget", f"{sample.length} tokens, the budget is {self.token_budget}"
            )
        return sample

    def _conversation(self, example: Conversation, rng: np.random.Generator) -> Sample:
        latent, vit = self.composer.conversation_views(rng)
        turns = []
        for role, parts in example.turns:
            laid = [
                self._text(part)
                if isinstance(part, (str, list))
                else self._views(part, latent, vit)
                for part in parts
            ]
            turns.append((role == "gpt", laid))
        return self.composer.conversation(example.key, turns, rng)

    def _two_captions(
        self, captions: list[Text], rng: np.random.Generator
    ) -> tuple[list[int], list[int]]:
        """Prompt and supervision: different captions of the image where it has two of bearable length."""
        prompt = self._one_of(captions, rng)
        others = [
            ids
            for ids in (self._ids(caption) for caption in captions)
            if ids is not None and ids != prompt
        ]
        return prompt, others[int(rng.integers(len(others)))] if others else prompt

    def _one_of(self, texts: list[Text], rng: np.random.Generator) -> list[int]:
        for index in rng.permutation(len(texts)):
            ids = self._ids(texts[index])
            if ids is not None:
                return ids
        return self._text(texts[0])

    def _ids(self, text: Text) -> list[int] | None:
        """None for a text of more tokens than sequence.max_text_tokens."""
        most = self.composer.settings.max_text_tokens
        if isinstance(text, str):
            characters = self.tokenizer.most_characters(most)
            # Tokenising megabytes takes seconds, and so long a text cannot fit.
            if characters is not None and len(text) > characters:
                return None
            text = self.tokenizer.encode(text)
        return text if len(text) <= most else None

    def _text(self, text: Text) -> list[int]:
        ids = self._ids(text)
        if ids is None:
            size = f"{len(text):,} {'characters' if isinstance(text, str) else 'tokens'}"
            raise BadRow(
                "text_too_long",
                f"{size} are more than the {self.composer.settings.max_text_tokens} tokens of "
                "sequence.max_text_tokens",
            )
        return ids

    def _target(self, image: Picture) -> ImageViews:
        if isinstance(image, PreparedImage):
            return ImageViews(image.latent, image.target if self.composer.metaqueries else None)
        return self._views(image, latent=True, vit=self.composer.metaqueries)

    def _views(self, image: Picture, latent: bool, vit: bool) -> ImageViews:
        geometry: Geometry = self.composer.geometry
        if isinstance(image, PreparedImage):
            return ImageViews(
                image.latent if latent else None, to_array(image.picture) if vit else None
            )
        return ImageViews(
            latent=to_array(resize(image, geometry.latent_stride, self.latent_image))
            if latent
            else None,
            vit=to_array(resize(image, geometry.vit_stride, self.vit_image)) if vit else None,
        )
