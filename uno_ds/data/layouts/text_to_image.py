"""Layout t2i: an image and captions. One caption is the prompt, another one the supervision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from uno_ds.data.captions import CaptionReader, unpack
from uno_ds.data.example_encoder import ExampleEncoder
from uno_ds.data.examples import Example, Load, Picture, Text
from uno_ds.data.files import parse_json
from uno_ds.data.images import BadRow
from uno_ds.data.layouts.base import IDS, IMAGE, Layout, RandomContent, RowEncoder, SampleSize
from uno_ds.sequence.composition import ImageViews, SampleComposer
from uno_ds.sequence.segments import Sample

CAPTION_COLUMNS = ("captions", "caption", "text")
IMAGE_COLUMNS = ("image", "images", "jpg", "png", "webp")


@dataclass(frozen=True)
class TextToImage(Example):
    image: Picture
    captions: Sequence[Text]


class TextToImageLayout(Layout[TextToImage, TextToImage]):
    name = "t2i"
    example = TextToImage
    row_columns = frozenset(IMAGE_COLUMNS)
    prepared_columns = (("image", IMAGE), ("captions", pa.list_(IDS)))
    losses = frozenset({"flow", "caption", "regression"})
    bounded_length = True
    has_condition_images = False

    def matches(self, columns: set[str]) -> bool:
        return not columns.isdisjoint(IMAGE_COLUMNS) and not columns.isdisjoint(CAPTION_COLUMNS)

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
        return TextToImage(key, load(_first_image(row)), captions)

    def encode(self, row: TextToImage, encoder: RowEncoder) -> dict[str, Any]:
        return {
            "image": encoder.image(row.image, latent=True, target=True),
            "captions": [encoder.ids(caption) for caption in row.captions],
        }

    def decode(
        self, key: str, stored: Mapping[str, Any], load: Load, rng: np.random.Generator
    ) -> TextToImage:
        return TextToImage(key, load(stored["image"]), stored["captions"])

    def sample(
        self, example: TextToImage, encoder: ExampleEncoder, rng: np.random.Generator
    ) -> Sample:
        prompt, caption = encoder.two_of(example.captions, rng)
        image = encoder.generated_views(example.image)
        return text_to_image_sample(encoder.composer, example.key, prompt, caption, image, rng)

    def sample_size(
        self, composer: SampleComposer, latent_cells: int, vit_cells: int
    ) -> SampleSize:
        return SampleSize(
            texts=1,
            images=1,
            latents=latent_cells,
            captions=int(composer.captions),
            metaqueries=composer.queries,
            target=vit_cells if composer.metaqueries else 0,
        )

    def random_sample(
        self, composer: SampleComposer, content: RandomContent, rng: np.random.Generator
    ) -> Sample:
        prompt = content.text()
        caption = content.text()
        image = content.image()
        return text_to_image_sample(composer, self.name, prompt, caption, image, rng)


def text_to_image_sample(
    composer: SampleComposer,
    key: str,
    prompt: list[int],
    caption: list[int] | None,
    image: ImageViews,
    rng: np.random.Generator,
) -> Sample:
    """The prompt, unless it is dropped, and the noised image with its supervision."""
    builder = composer.builder()
    if rng.random() >= composer.settings.drop_text:
        builder.text(prompt)
    builder.generated(image, caption, rng)
    return builder.sample(key)


def _captions(row: Mapping[str, Any], reader: CaptionReader) -> list[str]:
    """Captions of the first column that has any. A string in `captions` is JSON; in `caption` and
    `text` it is the caption unless it is JSON of a list or an object."""
    for column in CAPTION_COLUMNS:
        value = row.get(column)
        if column == "captions" and isinstance(value, str) and value.strip():
            value = parse_json(value, (dict, list))
        if found := reader.texts(value):
            return found
    raise BadRow("no_caption", f"no caption column holds a text{_keys_hint(row, reader)}")


def _keys_hint(row: Mapping[str, Any], reader: CaptionReader) -> str:
    """Which keys the objects in the caption columns have, and which were read."""
    keys: list[str] = []
    for column in CAPTION_COLUMNS:
        value = unpack(row.get(column))
        if isinstance(value, Mapping):
            keys += map(str, value)
    if not keys:
        return ""
    read = ", ".join(sorted(reader.keys)) if reader.keys is not None else "all but metadata"
    return f"; an object has the keys {', '.join(keys)}, and caption_keys are {read}"


def _first_image(row: Mapping[str, Any]) -> Any:
    value = next((row[column] for column in IMAGE_COLUMNS if row.get(column) is not None), None)
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise BadRow("image_count", f"one image expected, {len(value)} given")
    return value[0]
