"""Layout t2i: an image and captions. One caption is the prompt, another one the supervision."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from uno_ds.data import known_columns
from uno_ds.data.captions import CaptionReader, unpack
from uno_ds.data.columns import first
from uno_ds.data.example_encoder import ExampleEncoder
from uno_ds.data.examples import Example, Load, Picture, Text
from uno_ds.data.files import parse_json
from uno_ds.data.images import BadRow
from uno_ds.data.layouts.base import IDS, IMAGE, Layout, RandomContent, RowEncoder, SampleSize
from uno_ds.sequence.composition import ImageViews, SampleComposer
from uno_ds.sequence.segments import Sample


@dataclass(frozen=True)
class TextToImage(Example):
    """`negatives`: captions that are wrong for the image."""

    image: Picture
    captions: Sequence[Text]
    negatives: Sequence[Text] = ()


class TextToImageLayout(Layout[TextToImage, TextToImage]):
    name = "t2i"
    example = TextToImage
    forms = known_columns.TEXT_TO_IMAGE
    written_columns = (
        ("image", pa.binary()),
        ("captions", pa.string()),
        ("negative_captions", pa.list_(pa.string())),
    )
    row_columns = frozenset(known_columns.IMAGE.names)
    prepared_columns = (
        ("image", IMAGE),
        ("captions", pa.list_(IDS)),
        ("negatives", pa.list_(IDS)),
    )
    losses = frozenset({"flow", "caption", "regression"})
    bounded_length = True
    has_condition_images = False

    def parse(
        self,
        key: str,
        row: Mapping[str, Any],
        load: Load,
        reader: CaptionReader,
        rng: np.random.Generator,
    ) -> TextToImage:
        return self.parse_whole(key, row, load, reader)

    def parse_whole(
        self, key: str, row: Mapping[str, Any], load: Load, reader: CaptionReader
    ) -> TextToImage:
        captions = _captions(row, reader)
        negatives = list(chain.from_iterable(map(reader.texts, row.get("negative", ()))))
        return TextToImage(key, load(_image(row)), captions, negatives)

    def written(self, row: TextToImage) -> dict[str, Any]:
        return {
            "image": row.image,
            "captions": json.dumps(row.captions, ensure_ascii=False),
            "negative_captions": row.negatives or None,
        }

    def first_text(self, example: TextToImage) -> str | None:
        return next((text for text in example.captions if isinstance(text, str)), None)

    def encode(self, row: TextToImage, encoder: RowEncoder) -> dict[str, Any]:
        return {
            "image": encoder.image(row.image, latent=True, target=True),
            "captions": [encoder.ids(caption) for caption in row.captions],
            "negatives": [encoder.ids(negative) for negative in row.negatives],
        }

    def decode(
        self, key: str, stored: Mapping[str, Any], load: Load, rng: np.random.Generator
    ) -> TextToImage:
        # Rows that were prepared before there were negatives have no such column.
        negatives = stored.get("negatives") or ()
        return TextToImage(key, load(stored["image"]), stored["captions"], negatives)

    def sample(
        self, example: TextToImage, encoder: ExampleEncoder, rng: np.random.Generator
    ) -> Sample:
        prompt, caption = encoder.two_of(example.captions, rng)
        image = encoder.generated_views(example.image)
        composer = encoder.composer
        negatives = encoder.all_of(example.negatives) if composer.reads_negatives else []
        return text_to_image_sample(composer, example.key, prompt, caption, image, rng, negatives)

    def sample_size(
        self, composer: SampleComposer, latent_cells: int, vit_cells: int
    ) -> SampleSize:
        return SampleSize(
            texts=1,
            images=1,
            latents=latent_cells,
            captions=int(composer.captions),
            negatives=composer.negatives(has_column=True),
            metaqueries=composer.queries,
            target=vit_cells if composer.metaqueries else 0,
        )

    def random_sample(
        self, composer: SampleComposer, content: RandomContent, rng: np.random.Generator
    ) -> Sample:
        prompt = content.text()
        caption = content.text()
        image = content.image()
        negatives = [content.text()] if composer.reads_negatives else []
        return text_to_image_sample(composer, self.name, prompt, caption, image, rng, negatives)


def text_to_image_sample(
    composer: SampleComposer,
    key: str,
    prompt: list[int],
    caption: list[int] | None,
    image: ImageViews,
    rng: np.random.Generator,
    negatives: Sequence[list[int]] = (),
) -> Sample:
    """The prompt, unless it is dropped, and the noised image with its supervision."""
    builder = composer.builder()
    if rng.random() >= composer.settings.drop_text:
        builder.text(prompt)
    builder.generated(image, caption, rng, negatives)
    return builder.sample(key)


def _captions(row: Mapping[str, Any], reader: CaptionReader) -> list[str]:
    """Captions of the first column that has any, and those of other captioners. A string in
    `captions` is JSON; elsewhere it is the caption unless it is JSON of a list or an object."""
    found: list[str] = []
    for value in (*map(_parsed, row.get("captions", ())), *row.get("caption", ())):
        found = reader.texts(value)
        if found:
            break
    more = chain.from_iterable(map(reader.texts, row.get("recaption", ())))
    captions = list(dict.fromkeys([*found, *more]))
    if not captions:
        raise BadRow("no_caption", f"no caption column holds a text{_keys_hint(row, reader)}")
    return captions


def _parsed(value: Any) -> Any:
    is_text = isinstance(value, str) and value.strip()
    return parse_json(value, (dict, list)) if is_text else value


def _keys_hint(row: Mapping[str, Any], reader: CaptionReader) -> str:
    """Which keys the objects in the caption columns have, and which were read."""
    columns = (row.get(meaning, ()) for meaning in ("captions", "caption", "recaption"))
    values = map(unpack, chain.from_iterable(columns))
    objects = [value for value in values if isinstance(value, Mapping)]
    keys = list(map(str, chain.from_iterable(objects)))
    if not keys:
        return ""
    read = ", ".join(sorted(reader.keys)) if reader.keys is not None else "all but metadata"
    return f"; an object has the keys {', '.join(keys)}, and caption_keys are {read}"


def _image(row: Mapping[str, Any]) -> Any:
    value = first(row, "image")
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise BadRow("image_count", f"one image expected, {len(value)} given")
    return value[0]
