"""Layout interleaved: texts and images in any order, of which any may be trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from uno_ds.data import known_columns
from uno_ds.data.captions import CaptionReader
from uno_ds.data.columns import ROW, first
from uno_ds.data.example_encoder import ExampleEncoder
from uno_ds.data.examples import Example, Load
from uno_ds.data.layouts.base import IDS, IMAGE, Layout, RandomContent, RowEncoder, SampleSize
from uno_ds.data.layouts.conversation import (
    VIEWS,
    conversation_views,
    images_of_row,
    serves_views,
    stored_views,
)
from uno_ds.data.parts import ImagePart, Part, TextPart, is_trained, parts_of_turns, read_parts
from uno_ds.sequence.composition import ImageViews, SampleBuilder, SampleComposer
from uno_ds.sequence.segments import Sample


@dataclass(frozen=True)
class Interleaved(Example):
    """A part at least is trained."""

    parts: list[Part]


@dataclass(frozen=True, eq=False)
class TextPiece:
    """The ids of a text part."""

    ids: list[int]
    loss: bool = False


@dataclass(frozen=True, eq=False)
class ImagePiece:
    """An image part. `shown`: the views in which it is a condition of later parts; `target`: how it
    is generated, None if it is not; `caption`: for supervision."""

    shown: ImageViews
    target: ImageViews | None = None
    caption: list[int] | None = None


class InterleavedLayout(Layout[Interleaved, Interleaved]):
    name = "interleaved"
    example = Interleaved
    forms = known_columns.INTERLEAVED
    written_columns = (
        (
            "parts",
            pa.list_(
                pa.struct(
                    [
                        ("text", pa.list_(pa.string())),
                        ("loss", pa.bool_()),
                        ("image", pa.binary()),
                        ("generate", pa.bool_()),
                        ("views", pa.string()),
                        ("captions", pa.list_(pa.string())),
                    ]
                )
            ),
        ),
    )
    row_columns = frozenset({"parts"})
    prepared_columns = (
        (
            "parts",
            pa.list_(
                pa.struct(
                    [
                        ("texts", pa.list_(IDS)),
                        ("loss", pa.bool_()),
                        ("image", IMAGE),
                        ("generate", pa.bool_()),
                        ("views", pa.string()),
                        ("captions", pa.list_(IDS)),
                    ]
                )
            ),
        ),
    )
    losses = frozenset({"flow", "caption", "regression", "answer"})
    bounded_length = False  # any number of parts
    has_condition_images = True
    preparation_keys = ("conversation_images",)

    def recognises(self, columns: Sequence[str], given: Mapping[str, tuple[str, ...]]) -> bool:
        """Only by its parts: a conversation is one of the layout vlm unless a source says
        otherwise."""
        return "parts" in columns or "parts" in given

    def parse(
        self,
        key: str,
        row: Mapping[str, Any],
        load: Load,
        reader: CaptionReader,
        rng: np.random.Generator,
    ) -> Interleaved:
        return self.parse_whole(key, row, load, reader)

    def parse_whole(
        self, key: str, row: Mapping[str, Any], load: Load, reader: CaptionReader
    ) -> Interleaved:
        if "parts" not in row and "conversations" in row:
            turns = first(row, "conversations")
            return Interleaved(key, parts_of_turns(turns, images_of_row(row), load))
        return Interleaved(key, read_parts(first(row, "parts"), first(row, ROW), load, reader))

    def written(self, row: Interleaved) -> dict[str, Any]:
        return {"parts": [_written(part) for part in row.parts]}

    def first_text(self, example: Interleaved) -> str | None:
        texts = (part.texts[0] for part in example.parts if isinstance(part, TextPart))
        return next((text for text in texts if isinstance(text, str)), None)

    def encode(self, row: Interleaved, encoder: RowEncoder) -> dict[str, Any]:
        return {
            "parts": [
                _encoded(part, _shown_later(row.parts, number), encoder)
                for number, part in enumerate(row.parts)
            ]
        }

    def decode(
        self, key: str, stored: Mapping[str, Any], load: Load, rng: np.random.Generator
    ) -> Interleaved:
        return Interleaved(key, [_decoded(part, load) for part in stored["parts"]])

    def serves(self, key: str, prepared: Any, wanted: Any) -> bool:
        return serves_views(key, prepared) or super().serves(key, prepared, wanted)

    def sample(
        self, example: Interleaved, encoder: ExampleEncoder, rng: np.random.Generator
    ) -> Sample:
        settings = encoder.composer.settings
        drawn = conversation_views(settings, rng)
        pieces: list[TextPiece | ImagePiece] = []
        for number, part in enumerate(example.parts):
            if isinstance(part, TextPart):
                pieces.append(TextPiece(encoder.one_of(part.texts, rng), part.loss))
                continue
            shown = _shown_later(example.parts, number)
            latent, vit = _views(part, shown, drawn)
            if not part.generate:
                pieces.append(ImagePiece(encoder.views(part.image, latent, vit)))
                continue
            target = encoder.generated_views(part.image)
            seen = encoder.views(part.image, False, vit)
            caption = encoder.one_of(part.captions, rng) if part.captions else None
            shown_views = ImageViews(target.latent if latent else None, seen.vit)
            pieces.append(ImagePiece(shown_views, target, caption))
        return interleaved_sample(encoder.composer, example.key, pieces, rng)

    def sample_size(
        self, composer: SampleComposer, latent_cells: int, vit_cells: int
    ) -> SampleSize:
        """With an image and a text as conditions, a text that is trained, and an image that is
        generated."""
        return SampleSize(
            texts=2,
            images=3,
            vit=vit_cells,
            clean=latent_cells,
            latents=latent_cells,
            captions=int(composer.captions),
            negatives=composer.negatives(),
            metaqueries=composer.queries,
            target=vit_cells if composer.metaqueries else 0,
        )

    def random_sample(
        self, composer: SampleComposer, content: RandomContent, rng: np.random.Generator
    ) -> Sample:
        pieces: list[TextPiece | ImagePiece] = [
            ImagePiece(content.image()),
            TextPiece(content.text()),
            TextPiece(content.text(), loss=True),
            ImagePiece(ImageViews(), content.image(), content.text()),
        ]
        return interleaved_sample(composer, self.name, pieces, rng)


def interleaved_sample(
    composer: SampleComposer,
    key: str,
    pieces: Sequence[TextPiece | ImagePiece],
    rng: np.random.Generator,
) -> Sample:
    """The pieces in their order: a generated image as noised latents with its supervision, then, if
    something comes after it, as a condition.

    Texts and views of images that are conditions of a generated image are dropped at the rates of
    the settings, each on its own. What a trained text after them reads is never dropped, or the
    text would be learned without its question."""
    builder, settings = composer.builder(), composer.settings
    for number, piece in enumerate(pieces):
        later = pieces[number + 1 :]
        droppable = any(map(_is_target, later)) and not any(map(_is_answer, later))
        draw_latent, draw_vit, draw_text = rng.random(3) if droppable else (1.0, 1.0, 1.0)
        if isinstance(piece, TextPiece):
            if piece.loss or draw_text >= settings.drop_text:
                builder.text(piece.ids, piece.loss)
            continue
        if piece.target is not None:
            _generate(builder, piece.target, piece.caption, rng)
        if piece.shown.latent is not None and draw_latent >= settings.drop_latent and later:
            builder.clean(piece.shown.latent)
        if piece.shown.vit is not None and draw_vit >= settings.drop_vit and later:
            builder.vit(piece.shown.vit)
    return builder.sample(key)


def _generate(
    builder: SampleBuilder,
    target: ImageViews,
    caption: list[int] | None,
    rng: np.random.Generator,
) -> None:
    """Noised latents and supervision do not move the positions of what comes after them: the clean
    view has the RoPE id of the noised one, as in the public BAGEL code."""
    rope_id = builder.rope_id
    builder.generated(target, caption, rng)
    builder.rope_id = rope_id


def _is_target(piece: TextPiece | ImagePiece) -> bool:
    return isinstance(piece, ImagePiece) and piece.target is not None


def _is_answer(piece: TextPiece | ImagePiece) -> bool:
    return isinstance(piece, TextPiece) and piece.loss


def _shown_later(parts: Sequence[Part], number: int) -> str:
    """How part `number` is shown by default: "both" if it is generated and seen later, or a later
    image is generated; "answers" if only texts come after it; "" if nothing does."""
    part, later = parts[number], parts[number + 1 :]
    if not later:
        return ""
    is_generated = isinstance(part, ImagePart) and part.generate
    if is_generated or any(isinstance(other, ImagePart) and is_trained(other) for other in later):
        return "both"
    return "answers"


def _views(part: ImagePart, shown: str, of_answers: tuple[bool, bool]) -> tuple[bool, bool]:
    """(latents, vit): the views in which an image part is shown to later parts."""
    if not shown:
        return False, False
    if part.views is not None:
        return VIEWS[part.views]
    return VIEWS["both"] if shown == "both" else of_answers


def _encoded(part: Part, shown: str, encoder: RowEncoder) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"texts": [encoder.ids(str(text)) for text in part.texts], "loss": part.loss}
    latent, vit = _views(part, shown, stored_views(encoder.sequence))
    image = encoder.image(
        part.image, latent=latent or part.generate, target=part.generate, picture=vit
    )
    return {
        "image": image,
        "generate": part.generate,
        "views": part.views,
        "captions": [encoder.ids(str(text)) for text in part.captions or []],
    }


def _written(part: Part) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"text": part.texts, "loss": part.loss}
    values = {"image": part.image, "generate": part.generate, "views": part.views}
    return values | {"captions": part.captions}


def _decoded(stored: Mapping[str, Any], load: Load) -> Part:
    if stored["texts"] is not None:
        return TextPart(stored["texts"], stored["loss"])
    image = load(stored["image"])
    return ImagePart(image, stored["generate"], stored["views"], stored["captions"])
