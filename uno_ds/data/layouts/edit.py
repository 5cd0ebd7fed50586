"""Layout edit: a sequence of images with instructions that lead from each one to the next."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from uno_ds.data import known_columns
from uno_ds.data.captions import CaptionReader, unpack
from uno_ds.data.columns import first
from uno_ds.data.example_encoder import ExampleEncoder
from uno_ds.data.examples import Example, Load, Picture, Text
from uno_ds.data.images import BadRow
from uno_ds.data.layouts.base import IDS, IMAGE, Layout, RandomContent, RowEncoder, SampleSize
from uno_ds.sequence.composition import ImageViews, SampleComposer
from uno_ds.sequence.segments import Sample


@dataclass(frozen=True)
class Edit(Example):
    """`captions` are of the target and may be empty."""

    source: Picture
    target: Picture
    instructions: Sequence[Text]
    captions: Sequence[Text]


@dataclass(frozen=True)
class EditSequence:
    """An edit row before one of its pairs is drawn. `instructions[i]`: wordings of the edit from
    image i to i + 1, there is one in all; `captions[i]` are of image i + 1. Both have an entry for
    each image but the first. `images` are values of the image column until they are loaded."""

    images: list[Any]
    instructions: Sequence[Sequence[Text]]
    captions: Sequence[Sequence[Text]]

    @property
    def pairs(self) -> list[int]:
        """The images from which an edit starts."""
        return [index for index, wordings in enumerate(self.instructions) if wordings]

    def draw(self, key: str, load: Load, rng: np.random.Generator) -> Edit:
        """One of the pairs. Raises BadRow if `load` does."""
        index = self.pairs[int(rng.integers(len(self.pairs)))]
        return Edit(
            key,
            load(self.images[index]),
            load(self.images[index + 1]),
            self.instructions[index],
            self.captions[index],
        )


class EditLayout(Layout[Edit, EditSequence]):
    name = "edit"
    example = Edit
    forms = known_columns.EDIT
    written_columns = (
        ("image_list", pa.list_(pa.binary())),
        ("instruction_list", pa.list_(pa.list_(pa.string()))),
        ("caption_list", pa.list_(pa.list_(pa.string()))),
    )
    row_columns = frozenset({"image_list", "source_image", "target_image", "edited_image"})
    prepared_columns = (
        ("images", pa.list_(IMAGE)),
        ("instructions", pa.list_(pa.list_(IDS))),
        ("captions", pa.list_(pa.list_(IDS))),
    )
    losses = frozenset({"flow", "caption", "regression"})
    bounded_length = True
    has_condition_images = True

    def parse(
        self,
        key: str,
        row: Mapping[str, Any],
        load: Load,
        reader: CaptionReader,
        rng: np.random.Generator,
    ) -> Edit:
        return _sequence(row, reader).draw(key, load, rng)

    def parse_whole(
        self, key: str, row: Mapping[str, Any], load: Load, reader: CaptionReader
    ) -> EditSequence:
        """An image is a decoded picture, the BadRow that it raises, or None where no pair has
        it."""
        sequence = _sequence(row, reader)
        sources = set(sequence.pairs)
        targets = {image + 1 for image in sources}
        images = [
            _load_or_error(load, value) if number in sources | targets else None
            for number, value in enumerate(sequence.images)
        ]
        return replace(sequence, images=images)

    def unusable_images(self, row: EditSequence) -> list[BadRow]:
        return [image for image in row.images if isinstance(image, BadRow)]

    def written(self, row: EditSequence) -> dict[str, Any]:
        for error in self.unusable_images(row):
            raise error
        captions = [[], *row.captions]
        return {
            "image_list": row.images,
            "instruction_list": row.instructions,
            "caption_list": captions if any(captions) else None,
        }

    def first_text(self, example: Edit) -> str | None:
        return next((text for text in example.instructions if isinstance(text, str)), None)

    def encode(self, row: EditSequence, encoder: RowEncoder) -> dict[str, Any]:
        sources = set(row.pairs)
        targets = {image + 1 for image in sources}
        images = [
            encoder.image(image, latent=True, target=number in targets, picture=number in sources)
            for number, image in enumerate(row.images)
        ]
        return {
            "images": images,
            "instructions": _ids(row.instructions, encoder),
            "captions": _ids(row.captions, encoder),
        }

    def decode(
        self, key: str, stored: Mapping[str, Any], load: Load, rng: np.random.Generator
    ) -> Edit:
        sequence = EditSequence(stored["images"], stored["instructions"], stored["captions"])
        return sequence.draw(key, load, rng)

    def sample(self, example: Edit, encoder: ExampleEncoder, rng: np.random.Generator) -> Sample:
        instruction = encoder.one_of(example.instructions, rng)
        caption = encoder.one_of(example.captions, rng) if example.captions else None
        source = encoder.views(example.source, latent=True, vit=True)
        target = encoder.generated_views(example.target)
        return edit_sample(encoder.composer, example.key, source, instruction, caption, target, rng)

    def sample_size(
        self, composer: SampleComposer, latent_cells: int, vit_cells: int
    ) -> SampleSize:
        return SampleSize(
            texts=1,
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
        source = content.image()
        instruction = content.text()
        caption = content.text()
        target = content.image()
        return edit_sample(composer, self.name, source, instruction, caption, target, rng)


def edit_sample(
    composer: SampleComposer,
    key: str,
    source: ImageViews | Sequence[ImageViews],
    instruction: list[int],
    caption: list[int] | None,
    target: ImageViews,
    rng: np.random.Generator,
) -> Sample:
    """Clean latents and visual-encoder view of the source, or of each of several, and the
    instruction, each unless it is dropped, and the noised target with its supervision."""
    builder, settings = composer.builder(), composer.settings
    draw_latent, draw_vit, draw_text = rng.random(3)
    for view in [source] if isinstance(source, ImageViews) else source:
        if draw_latent >= settings.drop_latent:
            assert view.latent is not None, "a view that is not dropped is there"
            builder.clean(view.latent)
        if draw_vit >= settings.drop_vit:
            assert view.vit is not None, "a view that is not dropped is there"
            builder.vit(view.vit)
    if draw_text >= settings.drop_text:
        builder.text(instruction)
    builder.generated(target, caption, rng)
    return builder.sample(key)


def _sequence(row: Mapping[str, Any], reader: CaptionReader) -> EditSequence:
    """Raises BadRow."""
    if "source" in row or "target" in row:
        return _pair(row, reader)
    images = first(row, "image_list")
    if not isinstance(images, list) or len(images) < 2:
        raise BadRow("missing_image", "image_list must hold at least two images")
    pairs = len(images) - 1
    wordings = _wordings(first(row, "instruction_list"), pairs)
    instructions = _texts_of_pairs(wordings, 0, pairs, reader)
    captions = _texts_of_pairs(unpack(first(row, "caption_list")), 1, pairs, reader)
    sequence = EditSequence(images, instructions, captions)
    if not sequence.pairs:
        raise BadRow("missing_instruction", "instruction_list holds no text for any pair of images")
    return sequence


def _pair(row: Mapping[str, Any], reader: CaptionReader) -> EditSequence:
    """Of a row with a column for the source image and one for the target. Raises BadRow."""
    images = [_only_image(first(row, meaning), meaning) for meaning in ("source", "target")]
    instructions = next(filter(None, map(reader.texts, row.get("instruction", ()))), [])
    more = chain.from_iterable(map(reader.texts, row.get("rewording", ())))
    instructions = list(dict.fromkeys([*instructions, *more]))
    if not instructions:
        raise BadRow("missing_instruction", "no instruction column holds a text")
    captions = next(filter(None, map(reader.texts, row.get("caption", ()))), [])
    return EditSequence(images, [list(instructions)], [list(captions)])


def _only_image(value: Any, meaning: str) -> Any:
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise BadRow(
            "image_count",
            f"one {meaning} image expected, {len(value)} given; rows of the layout "
            "interleaved may have several",
        )
    return value[0]


def _texts_of_pairs(value: Any, first: int, pairs: int, reader: CaptionReader) -> list[list[str]]:
    """The texts of `value` from entry `first` on, with an entry for each pair."""
    entries = value[first:] if isinstance(value, list) else []
    given = [reader.texts(entry) for entry in entries]
    return (given + [[]] * pairs)[:pairs]


def _wordings(value: Any, pairs: int) -> Any:
    """`instruction_list` as a list with an entry for each pair. A single text or object is of the
    first pair; so is JSON text of a list of strings where there is one pair only."""
    given = unpack(value)
    if isinstance(given, (str, Mapping)):
        return [given]
    flat = isinstance(given, list) and all(isinstance(item, str) for item in given)
    return [given] if isinstance(value, str) and pairs == 1 and flat else given


def _load_or_error(load: Load, value: Any) -> Picture | BadRow:
    try:
        return load(value)
    except BadRow as error:
        return error


def _ids(texts_of_pairs: Sequence[Sequence[Text]], encoder: RowEncoder) -> list[list[list[int]]]:
    ids_of_pairs = []
    for texts in texts_of_pairs:
        ids_of_pairs.append([encoder.ids(text) for text in texts])
    return ids_of_pairs
