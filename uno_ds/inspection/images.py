"""The images that are looked at: rows of a source as training's samples, at a noise level that is
given and with the same noise for every model."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from uno_ds.data.images import BadRow, ImageSettings
from uno_ds.data.layouts import get_layout
from uno_ds.data.prepared import PreparedSource
from uno_ds.data.samples import SampleMaker
from uno_ds.data.scene_drawing import draw_shape
from uno_ds.data.scene_reading import score_text
from uno_ds.data.sources import Source
from uno_ds.data.text import Tokenizer
from uno_ds.sequence.composition import Geometry, SampleComposer, SequenceSettings, SpecialTokens
from uno_ds.sequence.segments import Kind, Sample, Segment

MOST_TOKENS = 10**8
# A side of a token where the objects of a scene are drawn to see which tokens they cover.
PIXELS_OF_TOKEN = 32


@dataclass(frozen=True)
class Composition:
    """How images become samples. prompts: whether the generation expert reads the prompt, or the
    conditions of an edit; seed: of the choice of images, captions and noise."""

    latent_image: ImageSettings
    vit_image: ImageSettings
    max_text_tokens: int
    prompts: bool
    seed: int

    def composer(
        self, geometry: Geometry, tokens: SpecialTokens, metaqueries: list[int] | int
    ) -> SampleComposer:
        """metaqueries: side of their grid, or of several; 0: none."""
        dropped = 0.0 if self.prompts else 1.0
        settings = SequenceSettings(
            token_budget=MOST_TOKENS,
            max_text_tokens=self.max_text_tokens,
            metaquery_grid=metaqueries,
            drop_text=dropped,
            drop_vit=dropped,
            drop_latent=dropped,
        )
        return SampleComposer(
            settings, geometry, tokens, captions=True, metaqueries=settings.metaqueries > 0
        )


class ImageSet:
    """`count` usable rows of a source, drawn without repetition by the seed of the composition;
    fewer if the source has no more. Rows are read again whenever they are asked for, so that none
    is kept.

    rows: their numbers in the source; skipped: unusable rows by cause. Raises SettingsError if the
    source has no images to generate, or no usable row."""

    def __init__(
        self, source: Source, composition: Composition, count: int, make_sample: SampleMaker
    ):
        if isinstance(source, PreparedSource):
            raise source.error(
                "it is prepared and holds no pictures; give the source it was made from"
            )
        if not get_layout(source.layout).generates_images:
            raise source.error(
                f"its layout {source.layout} has no images to generate; give a t2i or edit source"
            )
        self.source, self.composition = source, composition
        self.rows: list[int] = []
        self.skipped: Counter[str] = Counter()
        order = np.random.default_rng([composition.seed, 0]).permutation(len(source))
        for row in order.tolist():
            if len(self.rows) == count:
                break
            try:
                self._sample(row, make_sample)
                self.rows.append(row)
            except BadRow as error:
                self.skipped[error.cause] += 1
        if not self.rows:
            causes = ", ".join(f"{cause} {number}" for cause, number in self.skipped.items())
            raise source.error(f"none of its rows can be used ({causes})")

    def __len__(self) -> int:
        return len(self.rows)

    def samples(self, numbers: Sequence[int], make_sample: SampleMaker) -> list[Sample]:
        """The samples of the images `numbers`, with the noise of their rows."""
        return [self._sample(self.rows[number], make_sample) for number in numbers]

    def scene(self, number: int) -> Any:
        """The ground truth of an image of the embedded set; None for other data, and for edits,
        whose rows have several scenes."""
        value = self.source.value(self.rows[number], "scene")
        try:
            scene = json.loads(value)
            score_text("", scene)
        except (ValueError, TypeError, KeyError, AttributeError):
            # Another data set's column of that name.
            return None
        return scene

    def _sample(self, row: int, make_sample: SampleMaker) -> Sample:
        rng = np.random.default_rng([self.composition.seed, 1, row])
        return make_sample(self.source.read(row, rng), rng)


def sample_maker(
    composition: Composition,
    geometry: Geometry,
    tokenizer: Tokenizer,
    tokens: SpecialTokens,
    metaqueries: list[int] | int,
) -> SampleMaker:
    """Training's, with nothing dropped at random and every image supervised."""
    composer = composition.composer(geometry, tokens, metaqueries)
    return SampleMaker(
        composer, tokenizer, composition.latent_image, composition.vit_image, MOST_TOKENS
    )


def at_noise_level(sample: Sample, t: float) -> Sample:
    """The sample with its noised image at level t."""
    segments = [
        dataclasses.replace(segment, timestep=t) if segment.kind == Kind.NOISED else segment
        for segment in sample.segments
    ]
    return Sample(sample.key, segments)


def noised_segment(sample: Sample) -> Segment:
    return next(segment for segment in sample.segments if segment.kind == Kind.NOISED)


def caption_ids(sample: Sample) -> list[int] | None:
    """Ids of the sample's caption, bos and eos among them; None if it has none."""
    captions = [segment for segment in sample.segments if segment.kind == Kind.CAPTION]
    return captions[0].ids.tolist() if captions else None


def picture_of(pixels_3hw: np.ndarray) -> Image.Image:
    """The picture of pixels in [-1, 1]."""
    values = np.clip((pixels_3hw.transpose(1, 2, 0) + 1) * 127.5, 0, 255)
    return Image.fromarray(values.round().astype(np.uint8))


def foreground(scene: Any, grid: tuple[int, int]) -> torch.Tensor | None:
    """bool [T]: which tokens of the grid, row by row, are at least half covered by an object of the
    scene; None without a scene."""
    if scene is None:
        return None
    rows, columns = grid
    width, height = columns * PIXELS_OF_TOKEN, rows * PIXELS_OF_TOKEN
    mask = Image.new("L", (width, height))
    canvas = ImageDraw.Draw(mask)
    for thing in scene["objects"]:
        centre = (thing["x"] * width, thing["y"] * height)
        extent = (thing["size"] * width, thing["size"] * height)
        draw_shape(canvas, thing["shape"], centre, extent, 255)
    covered = np.asarray(mask, dtype=np.float32) / 255
    cells = covered.reshape(rows, PIXELS_OF_TOKEN, columns, PIXELS_OF_TOKEN).mean(axis=(1, 3))
    return torch.from_numpy(cells.flatten() >= 0.5)


def metaquery_segment(sample: Sample) -> Segment:
    return next(segment for segment in sample.segments if segment.kind == Kind.METAQUERY)
