"""Layout vlm: a conversation about images. Answers are trained, questions are not."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from uno_ds.data import known_columns
from uno_ds.data.captions import CaptionReader
from uno_ds.data.columns import first
from uno_ds.data.example_encoder import ExampleEncoder
from uno_ds.data.examples import Example, Load, Picture, Text
from uno_ds.data.images import BadRow
from uno_ds.data.layouts.base import IDS, IMAGE, Layout, RandomContent, RowEncoder, SampleSize
from uno_ds.data.turns import ANSWER, ImageValue, Piece, read_turns
from uno_ds.sequence.composition import BOUNDARY, ImageViews, SampleComposer, SequenceSettings
from uno_ds.sequence.segments import Sample

# (clean latents, visual encoder) by sequence.conversation_images.
VIEWS = {"vit": (False, True), "latents": (True, False), "both": (True, True)}
DRAWN_VIEWS = ("vit", "latents")  # of "random"

Part = Text | Picture
EncodedPart = list[int] | ImageViews


@dataclass(frozen=True)
class Conversation(Example):
    """`turns` are (role, parts): role "human" or "gpt", parts texts and pictures in their order;
    there is a "gpt" turn."""

    turns: list[tuple[str, list[Part]]]


class ConversationLayout(Layout[Conversation, Conversation]):
    name = "vlm"
    example = Conversation
    forms = known_columns.CONVERSATION
    written_columns = (
        ("images", pa.list_(pa.binary())),
        (
            "conversations",
            pa.list_(
                pa.struct(
                    [
                        ("role", pa.string()),
                        (
                            "content",
                            pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())])),
                        ),
                    ]
                )
            ),
        ),
    )
    row_columns = frozenset({"conversations", "messages"})
    prepared_columns = (
        (
            "turns",
            pa.list_(
                pa.struct(
                    [
                        ("role", pa.string()),
                        ("parts", pa.list_(pa.struct([("ids", IDS), ("image", IMAGE)]))),
                    ]
                )
            ),
        ),
    )
    losses = frozenset({"answer"})
    bounded_length = False  # any number of turns
    has_condition_images = True
    preparation_keys = ("conversation_images",)

    def parse(
        self,
        key: str,
        row: Mapping[str, Any],
        load: Load,
        reader: CaptionReader,
        rng: np.random.Generator,
    ) -> Conversation:
        return self.parse_whole(key, row, load, reader)

    def parse_whole(
        self, key: str, row: Mapping[str, Any], load: Load, reader: CaptionReader
    ) -> Conversation:
        turns = read_turns(first(row, "conversations"), images_of_row(row))
        if all(role != ANSWER for role, _ in turns):
            raise BadRow("missing_answer", "no turn is from gpt")

        def loaded(piece: Piece) -> Part:
            return load(piece.value) if isinstance(piece, ImageValue) else piece

        return Conversation(key, [(role, [*map(loaded, pieces)]) for role, pieces in turns])

    def written(self, row: Conversation) -> dict[str, Any]:
        turns: list[dict[str, Any]] = []
        images: list[Any] = []
        for role, parts in row.turns:
            content: list[dict[str, Any]] = []
            for part in parts:
                if isinstance(part, str):
                    content.append({"type": "text", "text": part})
                    continue
                content.append({"type": "image", "text": None})
                images.append(part)
            turns.append({"role": role, "content": content})
        return {"images": images, "conversations": turns}

    def first_text(self, example: Conversation) -> str | None:
        parts = chain.from_iterable(parts for _, parts in example.turns)
        return next((part for part in parts if isinstance(part, str)), None)

    def encode(self, row: Conversation, encoder: RowEncoder) -> dict[str, Any]:
        latent, picture = stored_views(encoder.sequence)

        def encode_part(part: Part) -> dict[str, Any]:
            if isinstance(part, (str, list)):
                return {"ids": encoder.ids(part)}
            return {"image": encoder.image(part, latent=latent, picture=picture)}

        turns = []
        for role, parts in row.turns:
            turns.append({"role": role, "parts": [encode_part(part) for part in parts]})
        return {"turns": turns}

    def decode(
        self, key: str, stored: Mapping[str, Any], load: Load, rng: np.random.Generator
    ) -> Conversation:
        def decode_part(part: Mapping[str, Any]) -> Part:
            return part["ids"] if part["ids"] is not None else load(part["image"])

        turns = []
        for turn in stored["turns"]:
            turns.append((turn["role"], [decode_part(part) for part in turn["parts"]]))
        return Conversation(key, turns)

    def serves(self, key: str, prepared: Any, wanted: Any) -> bool:
        return serves_views(key, prepared) or super().serves(key, prepared, wanted)

    def sample(
        self, example: Conversation, encoder: ExampleEncoder, rng: np.random.Generator
    ) -> Sample:
        latent, vit = conversation_views(encoder.composer.settings, rng)

        def encode_part(part: Part) -> EncodedPart:
            if isinstance(part, (str, list)):
                return encoder.text(part)
            return encoder.views(part, latent, vit)

        turns = []
        for role, parts in example.turns:
            turns.append((role == ANSWER, [encode_part(part) for part in parts]))
        return conversation_sample(encoder.composer, example.key, turns)

    def trains_generation(self, settings: SequenceSettings, answers: bool) -> bool:
        """Answers read images through the generation expert only as clean latents."""
        shows_latents, _ = stored_views(settings)
        return answers and shows_latents

    def sample_size(
        self, composer: SampleComposer, latent_cells: int, vit_cells: int
    ) -> SampleSize:
        """A pack may hold samples of either view where they are drawn: both count."""
        latent, vit = stored_views(composer.settings)
        return _size(latent, vit, latent_cells, vit_cells)

    def longest_sample(self, composer: SampleComposer, latent_cells: int, vit_cells: int) -> int:
        how = composer.settings.conversation_images
        text = composer.settings.max_text_tokens + BOUNDARY
        possible = DRAWN_VIEWS if how == "random" else (how,)
        sizes = [_size(*VIEWS[views], latent_cells, vit_cells) for views in possible]
        return max(size.tokens(text) for size in sizes)

    def random_sample(
        self, composer: SampleComposer, content: RandomContent, rng: np.random.Generator
    ) -> Sample:
        latent, vit = conversation_views(composer.settings, rng)
        image = content.image()
        shown = ImageViews(image.latent if latent else None, image.vit if vit else None)
        question: list[EncodedPart] = [shown, content.text()]
        answer: list[EncodedPart] = [content.text()]
        turns = [(False, question), (True, answer)]
        return conversation_sample(composer, self.name, turns)


def conversation_views(settings: SequenceSettings, rng: np.random.Generator) -> tuple[bool, bool]:
    """(latents, vit): the views in which a sample shows its images."""
    how = settings.conversation_images
    if how == "random":
        how = DRAWN_VIEWS[int(rng.integers(len(DRAWN_VIEWS)))]
    return VIEWS[how]


def conversation_sample(
    composer: SampleComposer,
    key: str,
    turns: list[tuple[bool, list[EncodedPart]]],
) -> Sample:
    """`turns`: (is an answer, parts); a part is a text's ids or an image."""
    builder = composer.builder()
    for answer, parts in turns:
        for part in parts:
            if not isinstance(part, ImageViews):
                builder.text(part, answer)
                continue
            if part.latent is not None:
                builder.clean(part.latent)
            if part.vit is not None:
                builder.vit(part.vit)
    return builder.sample(key)


def stored_views(settings: SequenceSettings) -> tuple[bool, bool]:
    """(latents, vit): every view that a sample may show."""
    how = settings.conversation_images
    return VIEWS["both"] if how == "random" else VIEWS[how]


def _size(latent: bool, vit: bool, latent_cells: int, vit_cells: int) -> SampleSize:
    """With one image, a question and an answer."""
    return SampleSize(
        texts=2,
        images=latent + vit,
        vit=vit_cells if vit else 0,
        clean=latent_cells if latent else 0,
    )


def serves_views(key: str, prepared: Any) -> bool:
    """Whether the recipe's key is that of the views, and rows were prepared with both."""
    return key == "sequence.conversation_images" and prepared in ("both", "random")


def images_of_row(row: Mapping[str, Any]) -> list[Any]:
    """The images of a row by meaning."""
    images = first(row, "image")
    if images is None:
        return []
    return images if isinstance(images, list) else [images]
