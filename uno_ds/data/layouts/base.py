"""The interface of a layout, the format of a data row."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from uno_ds.data.captions import CaptionReader
from uno_ds.data.columns import Form, find_columns, is_complete
from uno_ds.data.example_encoder import ExampleEncoder
from uno_ds.data.examples import Example, Load, Picture, Text
from uno_ds.data.images import BadRow
from uno_ds.sequence.composition import BOUNDARY, ImageViews, SampleComposer, SequenceSettings
from uno_ds.sequence.segments import Sample

# Columns of prepared rows: token ids, and what `RowEncoder.image` returns.
IDS = pa.list_(pa.int32())
IMAGE = pa.struct(
    [
        ("cause", pa.string()),
        ("detail", pa.string()),
        ("latent", pa.binary()),
        ("latent_shape", IDS),
        ("latent_grid", IDS),
        ("target", pa.binary()),
        ("target_grid", IDS),
        ("picture", pa.binary()),
    ]
)

ExampleT = TypeVar("ExampleT", bound=Example)
RowT = TypeVar("RowT")


class RowEncoder(Protocol):
    """Encodes texts and images for a prepared row (objectives/preparation.py)."""

    sequence: SequenceSettings

    def ids(self, text: Text) -> list[int]:
        """The token ids of a text; ids are returned as they are."""
        ...

    def image(
        self,
        image: Picture | BadRow | None,
        *,
        latent: bool = False,
        target: bool = False,
        picture: bool = False,
    ) -> dict[str, Any] | None:
        """The requested parts of an image, as a value of the column type IMAGE."""
        ...


@dataclass(frozen=True)
class SampleSize:
    """What a sample whose images have full size holds, in tokens of each kind; its texts, whose
    lengths vary, are counted. `images`: segments that are an image; `target`: patches of the image
    whose features are regressed, which are encoded but are no tokens."""

    texts: int
    images: int
    vit: int = 0
    clean: int = 0
    latents: int = 0
    captions: int = 0
    negatives: int = 0
    metaqueries: int = 0
    target: int = 0

    @property
    def image_boundaries(self) -> int:
        return BOUNDARY * self.images

    @property
    def tokens_without_texts(self) -> int:
        images = self.vit + self.clean + self.latents
        return images + self.image_boundaries + self.metaqueries

    def tokens(self, text: int) -> int:
        """With texts and captions of `text` tokens each, their bos and eos included."""
        texts = self.texts + self.captions + self.negatives
        return self.tokens_without_texts + texts * text


@dataclass(frozen=True)
class RandomContent:
    """Draws texts and images for samples without data."""

    text: Callable[[], list[int]]
    image: Callable[[], ImageViews]


class Layout(ABC, Generic[ExampleT, RowT]):
    """The format of a data row, from the names of its columns to the segments of a sample.

    A row of a file becomes an example (`parse`), and an example a sample (`sample`). Preparation
    reads a row with everything that `parse` chooses from (`parse_whole`), stores it (`encode`), and
    training reads an example from what is stored (`decode`). `parse`, `parse_whole` and `decode`
    raise BadRow for a row that cannot be used.
    """

    # In recipes, manifests of prepared folders and names of files: never changes.
    name: str
    # Class of the examples.
    example: type[ExampleT]
    # A file that has one of these columns holds rows, whatever it is named.
    row_columns: frozenset[str]
    # Columns of a prepared row: name and type.
    prepared_columns: Sequence[tuple[str, pa.DataType]]
    # The losses of which a sample can have tokens: flow, caption, regression, answer.
    losses: frozenset[str]
    # Whether no sample has more tokens than `longest_sample`.
    bounded_length: bool
    # Whether a sample can show images to the visual encoder as conditions.
    has_condition_images: bool
    # Keys of SequenceSettings that decide what a prepared row holds.
    preparation_keys: Sequence[str] = ()
    # What a row consists of, each way in which it may be laid out; `parse` then gets the values by
    # meaning, a list each (data/columns.py). Without forms it gets the raw row.
    forms: Sequence[Form] = ()
    # Columns of a row that is written as parquet (`scripts/data.py convert`); none: not supported.
    written_columns: Sequence[tuple[str, pa.DataType]] = ()

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        missing = [name for name in Layout.__annotations__ if not hasattr(cls, name)]
        if missing:
            raise TypeError(f"The layout {cls.__name__} does not set {', '.join(missing)}.")

    @property
    def generates_images(self) -> bool:
        """Whether a sample has noised latents, with supervision that reads them."""
        return "flow" in self.losses

    @property
    def has_answers(self) -> bool:
        """Whether a sample has texts that are trained as answers."""
        return "answer" in self.losses

    def matches(self, columns: set[str]) -> bool:
        """Whether a row that has values in these columns is of this layout. Raises
        AmbiguousColumns."""
        return self.recognises(sorted(columns), {})

    def recognises(self, columns: Sequence[str], given: Mapping[str, tuple[str, ...]]) -> bool:
        """`matches`, where the source names some of the columns. Raises AmbiguousColumns."""
        if not self.forms:
            return not given and self.matches(set(columns))
        chosen = find_columns(self.forms, columns, given)
        return any(is_complete(form, chosen, given) for form in self.forms)

    def written(self, row: RowT) -> dict[str, Any]:
        """The values of `written_columns` for a row of `parse_whole` whose images are encoded
        bytes. Raises BadRow for an image that is left as the error it raised."""
        raise NotImplementedError

    def first_text(self, example: ExampleT) -> str | None:
        """The first text of an example, by which a user sees what was read; None: there is none."""
        return None

    @abstractmethod
    def parse(
        self,
        key: str,
        row: Mapping[str, Any],
        load: Load,
        reader: CaptionReader,
        rng: np.random.Generator,
    ) -> ExampleT:
        """An example of a row of a data file."""

    @abstractmethod
    def parse_whole(
        self, key: str, row: Mapping[str, Any], load: Load, reader: CaptionReader
    ) -> RowT:
        """The row with everything that `parse` chooses from."""

    def unusable_images(self, row: RowT) -> list[BadRow]:
        """Of the images in a row of `parse_whole`, those that are left as the error they raised."""
        return []

    @abstractmethod
    def encode(self, row: RowT, encoder: RowEncoder) -> dict[str, Any]:
        """The values of `prepared_columns` for a row of `parse_whole`."""

    @abstractmethod
    def decode(
        self, key: str, stored: Mapping[str, Any], load: Load, rng: np.random.Generator
    ) -> ExampleT:
        """An example of a prepared row; draws from `rng` what `parse` draws."""

    def serves(self, key: str, prepared: Any, wanted: Any) -> bool:
        """Whether rows prepared with this value of a recipe's key can be trained with another."""
        return prepared == wanted

    @abstractmethod
    def sample(
        self, example: ExampleT, encoder: ExampleEncoder, rng: np.random.Generator
    ) -> Sample:
        """Raises BadRow if the example has no usable text."""

    def trains_generation(self, settings: SequenceSettings, answers: bool) -> bool:
        """Whether a sample trains the generation expert where the understanding expert is frozen.
        `answers`: the answer loss is on."""
        return self.generates_images

    @abstractmethod
    def sample_size(
        self, composer: SampleComposer, latent_cells: int, vit_cells: int
    ) -> SampleSize:
        """Of the sample that costs most. `latent_cells`, `vit_cells`: tokens of the largest image
        in the codec and in the visual encoder."""

    def longest_sample(self, composer: SampleComposer, latent_cells: int, vit_cells: int) -> int:
        """Most tokens of a sample with one image per side, one turn, and the longest texts."""
        size = self.sample_size(composer, latent_cells, vit_cells)
        return size.tokens(composer.settings.max_text_tokens + BOUNDARY)

    @abstractmethod
    def random_sample(
        self, composer: SampleComposer, content: RandomContent, rng: np.random.Generator
    ) -> Sample:
        """A sample without data, for trial steps and benchmarks."""
